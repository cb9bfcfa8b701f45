"""The method of templates: the layers of stacks as mixtures, everything else as hypermodules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Plan
from surgery.core.bank import Bank
from surgery.core.method import Opening, Picture, PlanRequest, register_method
from surgery.methods.rows import parts as stored
from surgery.methods.rows.bank import RowsBank
from surgery.methods.rows.method import RowsMethod
from surgery.methods.templates.bank import TemplateBank
from surgery.methods.templates.mixtures import has_templates, reopen_stack, run_lengths
from surgery.methods.templates.plan import plan_templates
from surgery.settings.names import SHIPPED_METHODS
from surgery.util.showing import plural

if TYPE_CHECKING:
    from surgery.anatomy.sites import Anatomy
    from surgery.core.joint import JointModel
    from surgery.core.settle import Settled
    from surgery.fitting.scene import Scene
    from surgery.fitting.units import Group
    from surgery.methods.templates.mixtures import Templates
    from surgery.settings.target import Target
    from surgery.settings.training import Training
    from surgery.storage.stored import Stored
    from surgery.training.loop.moves import Moves
    from surgery.training.loop.trainer import Trainer


@register_method
class TemplatesMethod(RowsMethod):
    """Every layer of a stack is a mixture of K templates. # Compositional models"""

    name: ClassVar[str] = "templates"
    summary: ClassVar[str] = SHIPPED_METHODS["templates"]
    lever: ClassVar[str] = "templates"

    def plan(self, anatomies: Sequence[Anatomy], request: PlanRequest) -> Plan:
        """A bank for each tensor of a stack's layers, and blocks for what lies outside of stacks."""
        return plan_templates(
            anatomies,
            request.block,
            request.context,
            mix_norms=request.mix_norms,
            stacks=request.stacks,
        )

    def unpack(self, plan: BankPlan, parts: Mapping[str, Tensor]) -> Bank:
        """A bank of rows and codes; templates where there are any."""
        bank = stored.unpack(plan, parts)
        return TemplateBank.of(bank) if bank.hypermodules == 1 and not bank.singles else bank

    def asks(self, plan: Plan, target: Target) -> str:
        """K."""
        return plural(target.templates, "template") if target.templates else ""

    def exactly(self, scene: Scene, plan: Plan) -> Settled:
        """K templates for each stack."""
        from surgery.methods.templates.exactly import templates_of_number

        return templates_of_number(scene, plan)

    def arrange(self, scene: Scene, plan: Plan) -> list[Group]:
        """The layers of each stack apart, or from templates of every number that is worth trying."""
        from surgery.methods.templates.arrangements import arrange_stacks

        return arrange_stacks(scene, plan)

    def report(
        self, plan: Plan, stored: Stored, originals: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Any]:
        """How the layers of each stack are stored."""
        from surgery.methods.templates.report import report_stacks

        return report_stacks(plan, stored, originals)

    def open(self, plan: Plan, banks: Mapping[str, Bank], how: Opening) -> dict[str, Bank]:
        """Templates and mixtures for every stack that has none; those that there are stay."""
        opened: dict[str, Bank] = dict(banks)
        for keys in plan.stacks.values():
            stack = {key: bank for key in keys if isinstance(bank := banks[key], RowsBank)}
            if has_templates(stack):
                opened.update({key: TemplateBank.of(bank) for key, bank in stack.items()})
                continue
            runs = run_lengths([p for p in plan.placements if p.bank == keys[0]])
            opened.update(reopen_stack(stack, how.options.get(self.name), how.generator, runs))
        return opened

    # -- training ------------------------------------------------------------------------------------------

    def training_options(self, config: Training) -> Templates:
        """How many templates, in which mixtures."""
        from surgery.methods.templates.training import how_to_open

        return how_to_open(config.templates)

    def unsuited(self, joint: JointModel, config: Training) -> list[str]:
        """Mixtures that cannot be what the settings ask of them."""
        from surgery.methods.templates.training import wrong_settings

        return wrong_settings(config.templates)

    def phases(self, config: Training) -> str:
        """Those in which templates are hardened."""
        return f"the last {config.final} with hardened templates" if config.templates.harden else ""

    def start(self, joint: JointModel, config: Training, generator: torch.Generator) -> None:
        """Freeze what shall stay as it is."""
        from surgery.methods.templates.training import settle_parts

        settle_parts(joint, config.templates)

    def take_over(self, joint: JointModel, loaded: JointModel) -> None:
        """Nothing: templates are found again by fitting as many to what they generate."""

    def moves(self, trainer: Trainer) -> Moves:
        """Regularisers and hardening."""
        from surgery.methods.templates.moves import TemplateMoves

        return TemplateMoves(self.name, trainer)

    def pictures(self) -> dict[str, Picture]:
        """Mixtures over time."""
        from surgery.methods.templates.pictures import draw_mixtures

        return {"mixtures.png": draw_mixtures}
