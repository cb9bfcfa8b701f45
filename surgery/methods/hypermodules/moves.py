"""What hypermodules do while they are trained: the alignment evolves, generation by generation.

# MUiR, Algorithm 2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from surgery.core.bank import Parts, Trained
from surgery.core.moves import Facts, Moves
from surgery.disk.untrusted import shown
from surgery.errors import PlanError
from surgery.methods.hypermodules.analysis import kinds_of_modules, layer_overlap, subsets
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.contest import Contest
from surgery.methods.hypermodules.contest_state import pack_contest, unpack_contest, wrong_contest
from surgery.methods.hypermodules.evolution import conclude, contend, inherit, redraw
from surgery.methods.hypermodules.heat import Thermostat, wrong_heat
from surgery.methods.hypermodules.price import blocks_taken, expected_saving, saved_by
from surgery.methods.hypermodules.rewards import costs_of, draw, note
from surgery.methods.hypermodules.sensitivity import normalise
from surgery.methods.hypermodules.splitting import split
from surgery.methods.hypermodules.starts import siblings
from surgery.storage.keys import StateKey, of_owner
from surgery.training.loop.optimizers import Resized, carry, drop, enter, plain

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer

STRIP = 1024  # locations up to which a bank's whole alignment is logged
_LARGEST = 1 << 53  # number of a hypermodule in a state


class HypermoduleMoves(Moves):
    """Evolution of the alignment.

    Attributes:
        capacity: by bank how many hypermodules there may be, K at the start.
        identity: by bank the lifelong number of each hypermodule, `[K]`: removals do not change it.
        born: by bank how many numbers were given.
        moved: share of locations whose hypermodule the last decision changed.
        heat: what contests are opened with, and did.
    """

    top: ClassVar[bool] = True

    def __init__(self, name: str, trainer: Trainer):
        super().__init__(name, trainer)
        self.capacity = {key: bank.hypermodules for key, bank in self.banks.items()}
        self.identity = {key: torch.arange(count) for key, count in self.capacity.items()}
        self.born = dict(self.capacity)
        self.siblings = {key: siblings(self.joint, key) for key in self.banks}
        self.moved = 0.0
        if self.config.evolution.splits is not None and any(b.columns.partial for b in self.banks.values()):
            raise PlanError(
                "`evolution.splits` needs whole blocks in every process: leave it away under FSDP."
            )
        given = self.config.evolution.alpha is not None
        self.heat = Thermostat(None if given else self.config.evolution.heat)
        self.seen: list[list[float]] = []  # losses of a generation's steps before it was interrupted

    @property
    def banks(self) -> dict[str, HypermoduleBank]:
        """The banks of hypermodules by key."""
        return super().banks

    # -- parameters ----------------------------------------------------------------------------------------

    @property
    def balances(self) -> bool:
        """Whether rows are balanced by factors, which then carry members' own rates."""
        return self.config.evolution.scale == "balanced"

    def more_groups(self) -> list[Trained]:
        """Soft weights, with a learning rate of their own; between contests there are none."""
        settings = self.config.optimizer
        options = {"eps": settings.soft_eps}
        return [Trained("soft", (), False, settings.soft_lr, scheduled=False, options=options)]

    def penalty(self) -> Tensor | None:
        """What alternatives take, at its price; banks count by their parameters."""
        price = self.config.evolution.price
        if not price or self._rewards:
            return None
        sizes = {key: bank.locations * bank.width for key, bank in self.banks.items()}
        terms = [
            saving * (-price * sizes[key] / sum(sizes.values()))
            for key, bank in self.banks.items()
            if (saving := expected_saving(bank)) is not None
        ]
        return torch.stack(terms).sum() if terms else None

    @property
    def _rewards(self) -> bool:
        """Whether contests are judged by what losses came of each draw."""
        return self.config.evolution.judge == "rewards"

    def before_step(self) -> None:
        """Draw one alternative for each sampled location, where contests are judged by rewards."""
        if not self._rewards:
            return
        self._learn()
        for bank in self.banks.values():
            if bank.contest is not None:
                bank.contest.drawn = draw(bank.contest.soft, self.generator)

    def _learn(self) -> None:
        """Take down what the last step's draws led to."""
        drawn = {
            key: bank
            for key, bank in self.banks.items()
            if bank.contest is not None and bank.contest.drawn is not None
        }
        if not drawn:
            return
        number = {name: n for n, name in enumerate(self.joint.names)}
        accelerator, trace = self.trainer.accelerator, self.trainer.running.trace[-1]
        trace = trace if accelerator.num_processes == 1 else accelerator.reduce(trace, "mean")
        losses = trace.new_zeros(len(number))
        for task, loss in zip(self.trainer.tasks, trace, strict=True):
            losses[number[task.member]] += self.trainer.weights[task.name] * loss
        sizes = sum(bank.locations * bank.width for bank in self.banks.values())
        for key, bank in drawn.items():
            contest = bank.contest
            assert contest is not None and contest.drawn is not None
            member = torch.zeros(bank.locations, dtype=torch.long)
            for p in self.joint.plan.placements:
                if p.bank == key:
                    member[p.start : p.stop] = number[p.site.member]
            mine = member.to(contest.chosen.device)[contest.chosen]
            saved = saved_by(bank, contest).gather(1, contest.drawn.unsqueeze(1)).squeeze(1)
            price = self.config.evolution.price * bank.width / sizes
            note(contest, costs_of(losses, mine, saved, price), self.config.evolution.reward_rate)

    def before_update(self) -> None:
        """What must not change has no gradient; contests of small tasks keep up, where the settings say so."""
        for bank in self.banks.values():
            bank.hold()
        if self.config.evolution.normalise:
            for bank in self.banks.values():
                normalise(self.trainer.optimizer, bank)

    def acts_in_steps(self) -> str | None:
        """Nothing but where it has to look at values: which gradients it takes away, and how contests compare."""
        if self.config.keep:
            return f"it keeps {', '.join(self.config.keep)} as they are"
        if self._rewards:
            return "evolution.judge rewards"
        return "evolution.normalise" if self.config.evolution.normalise else None

    # -- a generation --------------------------------------------------------------------------------------

    def before_generation(self) -> None:
        """Let alternatives compete, or draw an alignment, where the settings say so."""
        if self._splits:
            for bank in self.banks.values():
                bank.pull = bank.rows.detach().new_zeros(bank.locations, bank.width)
        if self.config.competes(self.trainer.generation):
            self.contend()
        if self.config.redraws(self.trainer.generation):
            self.redraw()

    def after_generation(self) -> None:
        """Decide what competed."""
        self._learn()
        if self.config.evolution.change == "evolve":
            opened = any(bank.contest is not None for bank in self.banks.values())
            self.heat.end(self._losses(), opened)
            self.seen = []
        if not self.config.redraws(self.trainer.generation):
            self.conclude()
        for key, bank in self.banks.items():
            if bank.pull is not None:
                bank.pull = self._averaged(bank.pull)
                self._follow(key, split(bank, self.config.evolution.splits or 0.0))
                bank.pull = None

    @property
    def _splits(self) -> bool:
        """Whether hypermodules may split after this generation."""
        phase = self.config.phase(self.trainer.generation)
        return self.config.evolution.splits is not None and phase != "final"

    def _averaged(self, pull: Tensor) -> Tensor:
        """The mean of what processes found, each on its part of every batch."""
        accelerator = self.trainer.accelerator
        return pull if accelerator.num_processes == 1 else accelerator.reduce(pull, "mean")

    def begins_anew(self, generation: int) -> bool:
        """States from before the last phase have parameters that were not worth their price.

        Regret has no units that a price could be added in; where losses are compared, `cost_of` is.
        """
        config = self.config
        last = generation == config.burn_in + config.generations
        return last and config.evolution.price > 0 and config.keeps == "regret"

    def cost_of(self, member: str) -> float:
        """The price of the blocks that a member's locations take; users of one hypermodule divide its blocks."""
        price = self.config.evolution.price
        whole = sum(bank.locations * bank.width for bank in self.banks.values())
        if not price or not whole:
            return 0.0
        taken = 0.0
        for key, bank in self.banks.items():
            blocks = blocks_taken(bank.psi, bank.hypermodules, bank.context)
            mine = (p for p in self.joint.plan.in_bank(key) if p.site.member == member)
            taken += bank.width * sum(float(blocks[p.start : p.stop].sum()) for p in mine)
        return price * taken / whole

    def contend(self) -> None:
        """Let alternatives compete for sampled locations of every bank."""
        settings = self.config.evolution.model_copy(update={"fraction": self.config.fraction})
        alpha = self.heat.begin(self.config.alpha(self.trainer.generation))
        for key, bank in self.banks.items():
            moments = plain(self.trainer.optimizer).state.get(bank.rows, {}).get("exp_avg_sq")
            resized = contend(
                bank, settings, alpha, self.capacity[key], self.generator, self.siblings[key], moments
            )
            self._follow(key, resized)
            if bank.contest is not None:
                self._enter(bank.contest)

    def conclude(self) -> None:
        """Decide every contest; unused hypermodules and their optimizer rows go."""
        changed, locations = 0, 0
        for key, bank in self.banks.items():
            contest = bank.contest
            if contest is None:
                continue
            inherit(plain(self.trainer.optimizer), bank)
            resized, moved = conclude(bank)
            drop(plain(self.trainer.optimizer), _parameters(contest).values())
            self._follow(key, resized)
            changed, locations = changed + moved, locations + bank.locations
        self.moved = changed / locations if locations else 0.0

    def redraw(self) -> None:
        """A new alignment by chance, to compare evolution with."""
        banks = self.banks.values()
        changed = sum(redraw(bank, self.config.fraction, self.generator) for bank in banks)
        self.moved = changed / max(sum(bank.locations for bank in banks), 1)

    def _losses(self) -> list[list[float]]:
        """The tasks' losses in every step of this generation."""
        return [*self.seen, *self.trainer.running.steps()]

    def _enter(self, contest: Contest) -> None:
        for role, parameter in _parameters(contest).items():
            enter(plain(self.trainer.optimizer), role, parameter)

    def _follow(self, key: str, resized: Sequence[Resized]) -> None:
        """Optimizer rows and lifelong numbers follow a bank's rows."""
        for each in resized:
            carry(plain(self.trainer.optimizer), each)
            source = each.source[:: self.banks[key].context].cpu() // self.banks[key].context
            known = self.identity[key][source.clamp_min(0)]
            fresh = (source < 0) | _repeated(source)
            known[fresh] = torch.arange(self.born[key], self.born[key] + int(fresh.sum()))
            self.identity[key], self.born[key] = known, self.born[key] + int(fresh.sum())

    # -- its state -----------------------------------------------------------------------------------------

    def pack(self) -> tuple[Parts, Facts]:
        """Open contests and lifelong numbers."""
        self._learn()
        tensors: Parts = {}
        for key, bank in self.banks.items():
            parts = pack_contest(bank.contest)
            tensors |= {str(StateKey("contest", key, name)): t for name, t in parts.items()}
            tensors[_identity(key)] = self.identity[key]
            if bank.pull is not None:
                bank.pull = self._averaged(bank.pull)
                tensors[_pull(key)] = bank.pull
        facts: Facts = {"moved": self.moved, "born": dict(self.born)}
        if self.config.evolution.change == "evolve":
            facts["heat"] = {**self.heat.document(), "steps": self._losses()}
        return tensors, facts

    def reads(self, name: str) -> bool:
        """Those of its banks, and three facts."""
        key = StateKey.parse(name)
        return name in ("moved", "born", "heat") or (
            key.kind in ("identity", "contest", "pull") and key.owner in self.banks
        )

    def wrong(self, tensors: Parts, facts: Facts, model: Mapping[StateKey, Tensor]) -> Iterator[str]:
        """What cannot be true of contests and numbers, beside rows and an alignment that are as they should be."""
        moved, born = facts.get("moved"), facts.get("born")
        if isinstance(moved, bool) or not isinstance(moved, int | float) or not 0 <= moved <= 1:
            yield f"the share of locations that moved must lie between 0 and 1, found {shown(moved)}"
        if not isinstance(born, Mapping) or not all(
            type(n) is int and 0 <= n < _LARGEST for n in born.values()
        ):
            yield f"hypermodules that were born must be counted, found {shown(born)}"
            return
        if facts.get("heat") is not None and (wrong := wrong_heat(facts["heat"], len(self.trainer.tasks))):
            yield wrong
        for key, bank in self.banks.items():
            rows, psi = (model[StateKey("bank", key, name)] for name in ("rows", "psi"))
            count = len(rows) // bank.context
            if parts := _contest(tensors, key):
                yield from wrong_contest(parts, psi, count, bank.context)
            pull = tensors.get(_pull(key))
            if pull is not None and (pull.shape != (len(psi), bank.width) or not pull.is_floating_point()):
                yield f"gradients of blocks must be {[len(psi), bank.width]}, found {list(pull.shape)}"
            yield from wrong_identity(tensors.get(_identity(key)), born.get(key), count, key)

    def entering(self, tensors: Parts) -> dict[str, list[Tensor]]:
        """Soft weights and contexts of open contests."""
        found: dict[str, list[Tensor]] = {}
        for key in self.banks:
            parts = _contest(tensors, key)
            for role in ("soft", "contexts"):
                if role in parts:
                    found.setdefault(role, []).append(parts[role])
        return found

    def unpack(self, tensors: Parts, facts: Facts) -> None:
        """Open the contests that were open."""
        self.moved = float(facts["moved"])
        self.born = {key: facts["born"][key] for key in self.banks}
        heat = facts.get("heat") or {}  # states of earlier versions have none
        self.heat.take(heat)
        self.seen = [list(map(float, step)) for step in heat.get("steps", ())]
        for key, bank in self.banks.items():
            self.identity[key] = tensors[_identity(key)].clone()
            pull = tensors.get(_pull(key))
            bank.pull = None if pull is None else pull.to(bank.rows, copy=True)
            bank.contest = unpack_contest(bank, _contest(tensors, key))
            if bank.contest is not None:
                self._enter(bank.contest)

    # -- what it tells -------------------------------------------------------------------------------------

    def describe(self) -> Facts:
        """Shapes and numbers of the banks."""
        banks = {
            key: {
                "block": list(bank.block),
                "context": bank.context,
                "locations": bank.locations,
                "hypermodules": bank.hypermodules,
            }
            for key, bank in self.banks.items()
        }
        return {"banks": banks}

    def log(self) -> Facts:
        """How many there are, who uses them, and the alignment of banks that are small enough to be seen whole."""
        alignment = {
            key: self.identity[key][bank.psi.cpu()].tolist()
            for key, bank in self.banks.items()
            if bank.locations <= STRIP
        }
        found = {
            **self.reached(),
            "moved": self.moved,
            "subsets": subsets(self.joint),
            "alignment": alignment,
        }
        if self.heat.opening is not None:
            found["opening"] = {"alpha": self.heat.alpha, **self.heat.opening.document()}
        return found

    def words(self) -> list[str]:
        """How many, and how much of the alignment changed."""
        return [f"{self._count} hypermodules", f"{self.moved:.0%} moved"]

    def lighter(self) -> list[str]:
        """Fewer basis blocks, or alternatives."""
        return ["a smaller parameters.context", "fewer train.evolution.challengers"]

    def tracked(self) -> dict[str, float]:
        """The same."""
        return {"hypermodules": self._count, "moved": self.moved}

    def reached(self) -> Facts:
        """How many there are in each bank."""
        return {"hypermodules": {key: bank.hypermodules for key, bank in self.banks.items()}}

    def analyse(self) -> Facts:
        """Which layers share, and what sets shared hypermodules apart."""
        shared = [key for key, bank in self.banks.items() if bank.hypermodules]
        overlap = {key: layer_overlap(self.joint, key) for key in shared}
        return {"overlap": overlap, "statistics": kinds_of_modules(self.joint)}

    @property
    def _count(self) -> int:
        return sum(bank.hypermodules for bank in self.banks.values())


def _repeated(source: Tensor) -> Tensor:
    """Which of some numbers were there before: boolean."""
    numbers, place = torch.unique(source, return_inverse=True)
    each = torch.arange(len(source))
    first = torch.full((len(numbers),), len(source)).scatter_reduce(0, place, each, "amin")
    return each != first[place]


def _pull(key: str) -> str:
    return str(StateKey("pull", key))


def _identity(key: str) -> str:
    return str(StateKey("identity", key))


def _contest(tensors: Parts, key: str) -> Parts:
    return of_owner({StateKey.parse(name): tensor for name, tensor in tensors.items()}, "contest", key)


def _parameters(contest: Contest) -> dict[str, nn.Parameter]:
    """What is trained of a contest, by role."""
    found = {"soft": contest.soft}
    return found if contest.contexts is None else {**found, "contexts": contest.contexts}


def wrong_identity(identity: Any, born: Any, count: int, key: str) -> Iterator[str]:
    """Reasons why numbers that a run recorded cannot be those of a bank's hypermodules, in sentences.

    Args:
        identity: int64 `[count]`, the number that each hypermodule keeps for life.
        born: how many numbers were given out so far.
        count: of the bank's hypermodules.
        key: of the bank.
    """
    if identity is None or identity.dtype != torch.int64 or tuple(identity.shape) != (count,) or born is None:
        found = None if identity is None else list(identity.shape)
        yield f"the {count} hypermodules of bank {key} must be numbered, found {found} and {born} born"
    elif count and (int(identity.min()) < 0 or int(identity.max()) >= born):
        yield f"hypermodules of bank {key} must have numbers below {born}, found up to {int(identity.max())}"
