"""The method of hypermodules: blocks of all sites from one bank for each block shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from surgery.anatomy.plan import Placement, Plan, make_plan
from surgery.core.bank import Bank
from surgery.core.method import Curves, Opening, Picture, PlanRequest, register_method
from surgery.errors import PlanError
from surgery.methods.hypermodules.atoms import share_atoms
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.opening import fixed_bank, open_bank, open_rest
from surgery.methods.rows.bank import RowsBank, exact_bank
from surgery.methods.rows.method import RowsMethod
from surgery.settings.names import LEVERS, SHIPPED_METHODS, Scale

if TYPE_CHECKING:
    from surgery.anatomy.sites import Anatomy
    from surgery.core.joint import JointModel
    from surgery.core.moves import Moves
    from surgery.core.settle import Settled
    from surgery.fitting.scene import Scene
    from surgery.settings.target import Target
    from surgery.settings.training import Training
    from surgery.training.loop.trainer import Trainer


@dataclass(frozen=True)
class HypermoduleOpening:
    """How single rows become hypermodules.

    Attributes:
        context: c; by default what the plan says. With 0, hypermodules of one basis block with coefficients that stay.
        scale: what carries the deviations of layers; see `open_bank`.
        norm: as in `open_bank`.
        atoms: whether all of them become one, which every location mixes.
    """

    context: int | None = None
    scale: Scale = "contexts"
    norm: int = 1
    atoms: bool = False


@register_method
class Hypermodules(RowsMethod):
    """Every block is a sum of the basis blocks of the hypermodule that its location uses. # MUiR"""

    name: ClassVar[str] = "hypermodules"
    summary: ClassVar[str] = SHIPPED_METHODS["hypermodules"]
    claims: ClassVar[bool] = False
    lever: ClassVar[str] = LEVERS["hypermodules"]

    def plan(self, anatomies: Sequence[Anatomy], request: PlanRequest) -> Plan:
        """Every site in banks of one block shape."""
        if request.stacks:
            raise PlanError(
                "Stacks (`stacks`) are for templates: choose `method=templates`, or leave them out."
            )
        return make_plan(anatomies, request.block, request.context)

    def asks(self, plan: Plan, target: Target) -> str:
        """K hypermodules, in words."""
        return f"{target.hypermodules} hypermodules" if target.hypermodules else ""

    def exactly(self, scene: Scene, plan: Plan) -> Settled:
        """A bank of exactly K hypermodules."""
        from surgery.methods.hypermodules.exactly import bank_of_size

        return bank_of_size(scene, plan)

    def open(self, plan: Plan, banks: Mapping[str, Bank], how: Opening) -> dict[str, Bank]:
        """Every single row becomes a hypermodule; hypermodules that there are stay."""
        given = HypermoduleOpening(**how.options.get(self.name, {}))
        return {key: self._open(plan, key, bank, how, given) for key, bank in banks.items()}

    # -- training ------------------------------------------------------------------------------------------

    def training_options(self, config: Training) -> dict[str, Any]:
        """Hypermodules of one basis block where locations have no contexts."""
        from surgery.methods.hypermodules.balance import norm_of

        settings = config.evolution
        context = None if settings.codes == "contexts" else 0
        context = 1 if settings.narrows else context
        how = {"context": context, "scale": settings.scale, "norm": norm_of(config.optimizer)}
        return {**how, "atoms": settings.start == "atoms"}

    def unsuited(self, joint: JointModel, config: Training) -> list[str]:
        """Reasons why a run cannot begin from the present codes as its settings ask."""
        from surgery.methods.hypermodules.starts import wrong_start

        return wrong_start(joint, config.evolution)

    def phases(self, config: Training) -> str:
        """Burn-in, evolution or draws by chance, and final generations, where the alignment changes."""
        if config.evolution.change == "none":
            return ""
        change = "evolution" if config.evolution.change == "evolve" else "random draws"
        return f"{config.burn_in} burn-in, {config.generations} {change}, {config.final} final"

    def start(self, joint: JointModel, config: Training, generator: torch.Generator) -> None:
        """Give every bank the alignment to begin with, and bring it into balance."""
        from surgery.methods.hypermodules.balance import balance_banks
        from surgery.methods.hypermodules.starts import align, keep

        settings = config.evolution
        align(joint, settings, generator)
        keep(joint, config.keep)
        if settings.scale == "balanced":
            balance_banks(joint, config.optimizer, settings.codes == "contexts")

    def take_over(self, joint: JointModel, loaded: JointModel) -> None:
        """Hypermodules go on in all blocks that the artifact has too."""
        from surgery.methods.hypermodules.starts import take_over

        take_over(joint, loaded)

    def moves(self, trainer: Trainer) -> Moves:
        """Evolution."""
        from surgery.methods.hypermodules.moves import HypermoduleMoves

        return HypermoduleMoves(self.name, trainer)

    def pictures(self) -> dict[str, Picture]:
        """Who uses hypermodules, which layers share, and the alignment over time."""
        from surgery.methods.hypermodules.pictures import draw_alignment, draw_layers, draw_subsets

        return {"modules.png": draw_subsets, "layers.png": draw_layers, "alignment.png": draw_alignment}

    def curves(self, generations: Sequence[dict[str, Any]]) -> list[Curves]:
        """Who uses hypermodules."""
        from surgery.methods.hypermodules.pictures import curves_of

        return curves_of(generations)

    def _open(self, plan: Plan, key: str, bank: Bank, how: Opening, given: HypermoduleOpening) -> Bank:
        if not isinstance(bank, RowsBank):
            bank = exact_bank(bank.settled_blocks(), bank.block)
        if not bank.singles:
            return HypermoduleBank.of(bank)
        c = plan.bank(key).context if given.context is None else given.context
        if given.atoms and not bank.hypermodules:
            return share_atoms(fixed_bank(bank), plan.bank(key).context)
        if not c and not bank.hypermodules:
            return fixed_bank(bank)
        sigma = _deviations(bank.blocks(), plan.in_bank(key))
        if bank.hypermodules:
            return open_rest(bank, how.generator, sigma, given.scale, given.norm)
        return open_bank(bank, c, how.generator, sigma, given.scale, given.norm)


@torch.no_grad()
def _deviations(blocks: Tensor, placements: list[Placement]) -> Tensor:
    """The deviation of the weights of each location's site `[L]`, of the blocks of a bank `[L, m*n]`."""
    sigma = blocks.new_ones(len(blocks))
    for p in placements:
        size = p.grid.stack * p.grid.out * p.grid.into  # padding does not count
        sigma[p.start : p.stop] = (blocks[p.start : p.stop].square().sum() / size).sqrt()
    return sigma
