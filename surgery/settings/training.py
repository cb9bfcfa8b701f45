"""Settings of joint training, as they stand under `train:` in a recipe; every one has a sensible default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from surgery.methods.hypermodules.settings import Evolution
from surgery.methods.templates.settings import TemplateSettings
from surgery.settings.problems import Strict
from surgery.settings.quantities import Count, NotNegative, Positive, Rate


class Optimizer(Strict):
    """What steps the dictionary and private parameters.

    Attributes:
        name: `adam`, `adamw` or `sgd`.
        lr: learning rate.
        rates: learning rates of members in place of `lr`, by name; what members share learns at the rate of the member
            that had it first. A recipe says them as `lr` of a model or of its task.
        soft_lr: of the soft weights; the paper takes 10 to 100 times `lr`.
        soft_eps: Adam's epsilon for the soft weights: well above their gradients, steps follow a gradient's
            size and not only its sign, so that noise decides less.
        weight_decay: of rows and private parameters, never of contexts and soft weights.
        momentum: of `sgd`.
        clip: largest norm of all gradients together; none by default.
        schedule: of `lr` over all steps.
        warmup: steps over which `lr` rises from 0.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Rate = 1e-3
    rates: dict[str, Rate] = Field(default_factory=dict)
    soft_lr: Rate = 0.1
    soft_eps: Rate = 1e-8
    weight_decay: NotNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    clip: Rate | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Count = 0


class Adaptation(Strict):
    """What a task without labels adapts to: features of the member that templates came from, on the data that it knows.

    They are computed once, at the start, by the member of `train.templates.source` that `train.templates.like` names.

    Attributes:
        part: features are what reaches this part of the members, for example `head`.
        data: of the source; named as a task's.
        options: of these data.
        batch: examples in a batch of them; as the task's by default.
        settings: of the way of adaptation, such as `width` and `lr` of an adversary's discriminator or the `orders` of
            moments.
    """

    part: str
    data: str
    options: dict[str, Any] = Field(default_factory=dict)
    batch: Positive | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class Stopping(Strict):
    """When training ends early, and which state is kept.

    Attributes:
        patience: validations without a better one after which training stops; none trains to the end.
        keep: the `best` state by validation, or the `last`.
        best: for whom. `member`: each member in its own best state, with the rows that it used then; members that are
            best in one generation go on sharing. `regret`: the one state in which no task is far from the least loss
            that it had. `all`: the one of the least mean loss. By default `member`, or `regret` where what is shared
            from the start would be lost. Where members share what cannot be taken apart, `member` is `all`. At a
            `price` members whose best generations differ share less: `regret` takes fewer parameters.
    """

    patience: Positive | None = None
    keep: Literal["best", "last"] = "best"
    best: Literal["member", "regret", "all"] | None = None


class Training(Strict):
    """Everything about a joint training run that is not the members, their tasks or the dictionary's shape.

    Attributes:
        steps: steps of the optimizer in one generation.
        burn_in: generations before the first alternatives compete.
        generations: generations in which alternatives compete.
        final: generations with a hard alignment at the end.
        accumulate: batches of each task in one step, their gradients added.
        alternate: whether each task's batch has a step of the optimizer of its own, tasks in a random order, in place
            of one step for all of them together; `steps` then counts rounds of all tasks.
        validate_every: generations between validations.
        optimizer: see `Optimizer`.
        evolution: see `Evolution`.
        templates: see `TemplateSettings`.
        stopping: see `Stopping`.
        mixed_precision: dtype of autocast, as accelerate names it; `no`, or what accelerate was launched with.
        freeze: tensors that stay as they are, beside what is generated: exact names, or `re:` patterns, in all
            members that have them, or after `MEMBER:` in one.
        keep: members that stay as they are, bit for bit: their tasks are not trained, and what the dictionary has of
            them can be used by others but does not change. For methods whose blocks are all of hypermodules.
        share: private tensors (what is not generated: norms, biases) that are one parameter for all members that have
            them in one shape; named as for `freeze`.
        sync_norms: whether batch norms take their statistics over the batch of all processes, as SyncBatchNorm does on
            accelerators, so that several processes train as one does; otherwise each normalises by its part.
        capture: whether steps are captured as CUDA graphs and replayed, which is faster where members are so small that
            starting kernels takes longer than running them. For one process on a CUDA device, with a constant learning
            rate, and members, losses and methods that do in every step what they did in the one that was captured:
            nothing that is counted or drawn in Python.
        compile: whether members are compiled.
        checkpointing: whether members that offer gradient checkpointing use it.
        trackers: accelerate's `log_with`, for example `tensorboard`.
        save_seconds: least time between two checkpoints.
    """

    steps: Positive = 100
    burn_in: Count = 0
    generations: Count = 10
    final: Count = 1
    accumulate: Positive = 1
    alternate: bool = False
    validate_every: Positive = 1
    optimizer: Optimizer = Optimizer()
    evolution: Evolution = Evolution()
    templates: TemplateSettings = TemplateSettings()
    stopping: Stopping = Stopping()
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    freeze: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    share: tuple[str, ...] = ()
    sync_norms: bool = False
    capture: bool = False
    compile: bool = False
    checkpointing: bool = False
    trackers: tuple[str, ...] = ()
    save_seconds: NotNegative = 30.0

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: object) -> object:
        return "no" if value is False else value  # what YAML makes of an unquoted `no`

    @model_validator(mode="after")
    def _has_an_end(self) -> Training:
        if self.templates.harden and not self.final:
            raise ValueError(
                "templates.harden needs final generations, in which hardened templates are trained"
            )
        if self.keep and self.evolution.start not in ("own", "given"):
            raise ValueError(
                f"members in 'keep' need evolution.start own or given, found {self.evolution.start}: it moves blocks"
            )
        if self.keep and self.optimizer.weight_decay:
            raise ValueError(
                "members in 'keep' need optimizer.weight_decay 0, since decay would change what they use, found "
                f"{self.optimizer.weight_decay:g}"
            )
        if self.capture and (wrong := self._uncapturable):
            raise ValueError(
                f"'capture' needs {', '.join(wrong)}: what a step counts in Python is not captured"
            )
        if self.evolution.normalise and self.optimizer.name == "sgd":
            raise ValueError(
                "evolution.normalise follows second moments of gradients, so it needs optimizer.name adam or adamw, "
                "found sgd"
            )
        return self

    @property
    def _uncapturable(self) -> list[str]:
        """What else these settings would have to be for steps to be captured."""
        needs = {
            "optimizer.schedule constant": self.optimizer.schedule == "constant",
            "optimizer.warmup 0": not self.optimizer.warmup,
            "mixed_precision no or bf16": self.mixed_precision != "fp16",
            "alternate off": not self.alternate,
            "compile off": not self.compile,
            "checkpointing off": not self.checkpointing,
        }
        return [need for need, met in needs.items() if not met]

    @property
    def source(self) -> str | None:
        """The artifact that training begins from, or whose features a task adapts to."""
        return self.templates.source

    @property
    def like(self) -> str | None:
        """The source's member that counts."""
        return self.templates.like

    def beginning_as(self, like: str) -> Training:
        """The same, with the source's member that counts."""
        return self.model_copy(update={"templates": self.templates.model_copy(update={"like": like})})

    def going_on(self) -> Training:
        """The same for members that are trained already: from what they have."""
        changes = {
            "evolution": self.evolution.model_copy(update={"start": "given"}),
            "templates": self.templates.model_copy(update={"start": "fit", "source": None}),
        }
        return self.model_copy(update=changes)

    def trial(self, steps: int) -> Training:
        """A short run that says how well these settings begin."""
        changes = {
            "templates": self.templates.model_copy(update={"harden": False}),
            "steps": min(steps, self.steps),
            "burn_in": 0,
            "generations": 1,
            "final": 0,
            "trackers": (),
        }
        return self.model_copy(update=changes)

    @property
    def keeps(self) -> Literal["member", "regret", "all"]:
        """For whom the state that is kept is the best."""
        return self.stopping.best or ("regret" if self.evolution.start != "own" else "member")

    @property
    def total(self) -> int:
        """Generations in all."""
        return self.burn_in + self.generations + self.final

    def competes(self, generation: int) -> bool:
        """Whether alternatives compete in a generation, counted from 0."""
        return self.phase(generation) == "evolution" and self.evolution.change == "evolve"

    def redraws(self, generation: int) -> bool:
        """Whether the alignment is drawn anew before a generation."""
        return self.phase(generation) == "evolution" and self.evolution.change == "random"

    def hardens(self, generation: int) -> bool:
        """Whether templates are hardened before a generation."""
        return self.templates.harden and generation == self.burn_in + self.generations

    def phase(self, generation: int) -> str:
        """`burn-in`, `evolution` or `final`."""
        if generation < self.burn_in:
            return "burn-in"
        return "evolution" if generation < self.burn_in + self.generations else "final"

    @property
    def fraction(self) -> float:
        """Share of the locations that are sampled for a generation."""
        if (given := self.evolution.fraction) is not None:
            return given
        return 0.5 if self.evolution.change == "random" else min(0.25, max(self.steps / 400, 0.1))

    def alpha(self, generation: int) -> float:
        """Alpha of a generation: from `alpha` to `final_alpha` by equal factors; not given, it follows from `steps`."""
        first, last = self.evolution.alpha, self.evolution.final_alpha
        if first is None:
            first = min(0.5, max(self.steps / 400, 0.05))
            last = first / 4 if last is None else last
        if last is None or self.generations < 2:
            return first
        progress = (generation - self.burn_in) / (self.generations - 1)
        return first * (last / first) ** min(max(progress, 0.0), 1.0)
