"""Settings of hypermodules: how they are trained, under `train.evolution` in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from surgery.settings.names import Scale
from surgery.settings.problems import Strict
from surgery.settings.quantities import NotNegative, Positive, Rate, Share


class Settings(Strict):
    """None: what is made of blocks follows from the recipe's `parameters`."""


class Evolution(Strict):
    """The alignment and how it changes (MUiR, Algorithm 2).

    Attributes:
        start: `own`, every location its own hypermodule (the pessimistic start); `order`, the k-th location
            of each member shares (classical hard sharing by topological order); `random`, each location one
            of `hypermodules` by chance; `given`, as it is in the joint model, where equal blocks share; `atoms`, every
            location mixes the same `parameters.context` blocks, the best for all of them (matrix atoms).
        codes: what a location has of its own: a trained `contexts` of c coefficients; `ones`, nothing, so that
            blocks are hypermodules of one basis block as they are (c = 0); `diagonals`, such a block plus a
            diagonal (parallel adapters).
        change: whether the alignment evolves (`evolve`); is drawn anew by chance for the sampled locations of every
            generation (`random`), for comparison; or stays (`none`).
        freeze: whether hypermodules stay as they are, so that nothing but stacks and private parameters is trained;
            with `change` none and `codes` ones.
        judge: what decides a contest. `gradients`: all alternatives are generated, weighted, and soft weights are
            trained (Eq. 8). `rewards`: one alternative of each location is drawn in each step, and those with which
            losses were low become likelier, by a natural evolution strategy (learned weight sharing), for comparison.
        reward_rate: how far a population of eight steps moves the probabilities of alternatives, with `judge` rewards.
        fraction: share of the locations that are sampled for a generation (p); by default a quarter, fewer where a
            generation has less than 100 steps, and half of them where the alignment is drawn by chance.
        challengers: alternatives that compete with the incumbent of each sampled location (lambda).
        draw: challengers by `usage`, `uniform`ly, or by how much of a block they `explain`.
        power: exponent of the share of a block's energy that a hypermodule explains, in an `explain` draw;
            the higher, the rarer are challengers that could not take over the block.
        least: share of a block's energy that a challenger must explain to compete at all: a pretrained block is not
            disturbed by what could not take it over. From 0, anything, to 1.
        siblings: whether the same location of members with the same tensor is tried first; with `explain`.
        contexts: challengers use the location's `own` context, one `fitted` to its block by least squares, or
            a fitted one `scaled` so that the block that it generates is as long as the incumbent's: a fit alone
            shortens every block that a challenger does not wholly explain, which costs it the contest.
        scale: what carries the deviation of a layer's weights. `balanced`: rows, with a factor at each location that is
            not trained, so that a step moves weights as far as in plain training and any hypermodule generates blocks
            of a location's own deviation. `contexts`, as in the paper: a step moves weights a tenth as far or less.
            `rows`: steps of Adam are sqrt(c) times those of plain training, and challengers should have contexts of
            their own.
        alpha: probability of not choosing the incumbent, at the start of a generation; the number of
            challengers over that of alternatives makes all alike. By default a half in generations of 200 steps or
            more, less in shorter ones, falling to a quarter of that, and as low as `heat` asks for.
        final_alpha: what `alpha` falls to, geometrically, until the last generation; none keeps an alpha that is given.
        heat: how far losses may rise as a contest opens, relative to before, where alpha is not given: after each
            opening alpha follows the rise that was measured.
        normalise: whether the gradient of a location's soft weights is divided by how much losses depend on it,
            relative to its bank, so that contests of small tasks are decided as fast as others. With an
            `optimizer.soft_eps` far below gradients Adam follows their signs alone, and it changes nothing.
        price: what all parameters of the sites are worth, in units of the loss: each alternative pays for the blocks
            that it would take, so that hypermodules of many users grow and others are given up. With 0 evolution asks
            only what is better. Blocks of a hypermodule of at most c users are stored themselves, so that with c = 1
            two users already pay. The state that is kept is the one of the least loss and price together.
        narrow: whether locations that start on their own have one basis block and one coefficient each, whatever
            `parameters.context` is: of a single user more are redundant, and two users already pay. By default where
            there is a price.
        merges: share of the sampled locations for which all users of one hypermodule try together the one that
            generates their blocks best, so that either all of them go or none does. By default a half where there is a
            price, and otherwise 0. With them all challengers have contexts of their own.
        splits: a hypermodule that users pull apart becomes two, each with a part of them, before the last phase: where
            the cosine of what the two parts pull, added up over a generation, is below minus this. None are split by
            default. With a `given` start, siblings begin with one encoder and grow where it helps.
        epsilon: probability that a challenger is a new hypermodule.
        hypermodules: K of a `random` start.
    """

    start: Literal["own", "order", "random", "given", "atoms"] = "own"
    codes: Literal["contexts", "ones", "diagonals"] = "contexts"
    change: Literal["evolve", "random", "none"] = "evolve"
    judge: Literal["gradients", "rewards"] = "gradients"
    reward_rate: Rate = 1.0
    freeze: bool = False
    fraction: Share | None = None
    challengers: Positive = 1
    draw: Literal["usage", "uniform", "explain"] = "usage"
    power: Rate = 1.0
    least: Annotated[float, Field(ge=0, le=1)] = 0.0
    siblings: bool = False
    contexts: Literal["own", "fitted", "scaled"] = "own"
    scale: Scale = "balanced"
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    final_alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    heat: Rate = 0.1
    normalise: bool = False
    price: NotNegative = 0.0
    narrow: bool | None = None
    splits: Annotated[float, Field(ge=0, lt=1)] | None = None
    merges: Annotated[float, Field(ge=0, le=1)] | None = None
    epsilon: Annotated[float, Field(ge=0, le=1)] = 1e-4
    hypermodules: Positive | None = None

    @model_validator(mode="after")
    def _fits(self) -> Evolution:
        if self.start == "random" and self.hypermodules is None:
            raise ValueError("a random start needs 'hypermodules', how many there are to share")
        if self.freeze and (self.change != "none" or self.codes != "ones"):
            raise ValueError(
                f"hypermodules that freeze need change none and codes ones, found {self.change} and {self.codes}"
            )
        if self.codes != "contexts" and self.contexts != "own":
            raise ValueError(f"codes that are {self.codes} have no contexts, so none can be {self.contexts}")
        if self.normalise and self.codes != "contexts":
            raise ValueError(
                f"'normalise' follows the gradients of contexts, so it needs codes contexts, found {self.codes}"
            )
        if self.merges and self.codes != "contexts":
            raise ValueError(
                f"'merges' bring contexts that suit their blocks, so they need codes contexts, found {self.codes}"
            )
        if self.start == "atoms" and (self.change != "none" or self.codes != "contexts"):
            raise ValueError(
                "atoms are the same for all locations, which mix them by contexts: set change none and codes contexts, "
                f"found {self.change} and {self.codes}"
            )
        if self.judge == "rewards" and (self.merges or self.normalise):
            found = "merges" if self.merges else "normalise"
            raise ValueError(
                f"'{found}' needs soft weights that are trained: leave it away, or judge by gradients"
            )
        if self.splits is not None and self.freeze:
            raise ValueError("hypermodules that freeze are not pulled apart: leave 'splits' or 'freeze' away")
        if self.narrow and (self.codes != "contexts" or self.start != "own"):
            raise ValueError(
                "'narrow' is for locations that start on their own with contexts, found start "
                f"{self.start} and codes {self.codes}"
            )
        return self

    @property
    def narrows(self) -> bool:
        """Whether locations begin with one basis block each."""
        able = self.start == "own" and self.codes == "contexts"
        return able and (self.price > 0 if self.narrow is None else self.narrow)

    @property
    def merging(self) -> float:
        """Share of the sampled locations that take part in merging moves."""
        if self.merges is not None:
            return self.merges
        able = self.codes == "contexts" and self.judge == "gradients"
        return 0.5 if self.price > 0 and able else 0.0
