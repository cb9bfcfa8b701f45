"""The method of templates: the layers of stacks as mixtures, everything else as hypermodules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Plan
from surgery.core.bank import Bank
from surgery.core.method import Opening, Picture, PlanRequest, register_method
from surgery.core.tensor_method import States
from surgery.methods.rows import parts as stored
from surgery.methods.rows.bank import RowsBank
from surgery.methods.rows.method import RowsMethod
from surgery.methods.templates.bank import TemplateBank
from surgery.methods.templates.mixtures import Templates, has_templates, reopen_stack, run_lengths
from surgery.methods.templates.plan import plan_templates
from surgery.methods.templates.settings import Settings, settings_in
from surgery.settings.names import LEVERS, SHIPPED_METHODS
from surgery.settings.problems import Strict
from surgery.util.showing import plural

if TYPE_CHECKING:
    from surgery.anatomy.sites import Anatomy
    from surgery.core.joint import JointModel
    from surgery.core.moves import Moves
    from surgery.core.settle import Settled
    from surgery.fitting.scene import Scene
    from surgery.fitting.units import Group
    from surgery.settings.target import Target
    from surgery.settings.training import Training
    from surgery.storage.stored import Stored
    from surgery.training.loop.trainer import Trainer


@register_method
class TemplatesMethod(RowsMethod):
    """Every layer of a stack is a mixture of K templates. # Compositional models"""

    name: ClassVar[str] = "templates"
    summary: ClassVar[str] = SHIPPED_METHODS["templates"]
    lever: ClassVar[str] = LEVERS["templates"]
    settings: ClassVar[type[Strict]] = Settings
    recorded: ClassVar[type[Strict]] = Strict  # a bank says what was made

    def plan(self, anatomies: Sequence[Anatomy], request: PlanRequest) -> Plan:
        """A bank for each tensor of a stack's layers, and blocks for what lies outside of stacks."""
        return plan_templates(
            anatomies,
            request.block,
            request.context,
            templates=request.settings.templates,
            mixture=request.settings.mixture if "mixture" in request.settings.model_fields_set else None,
            mix_norms=request.settings.mix_norms,
            stacks=request.stacks,
        )

    def unpack(self, plan: BankPlan, parts: Mapping[str, Tensor]) -> Bank:
        """A bank of rows and codes; templates where there are any."""
        bank = stored.unpack(plan, parts)
        return TemplateBank.of(bank) if bank.hypermodules == 1 and not bank.singles else bank

    def asks(self, plan: Plan, target: Target) -> str:
        """K templates, in words."""
        count = settings_in(plan).templates
        return plural(count, "template") if count else ""

    def told_by(self, plan: Plan) -> dict[str, Any]:
        """What the plan says, and whether norms are mixed, which their places show."""
        norms = any(p.site.kind == "norm" for p in plan.placements)
        return {**plan.banks[0].settings, "mix_norms": norms}

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
            runs = run_lengths(plan.in_bank(keys[0]))
            wanted = self._how(plan, how.options.get(self.name))
            opened.update(reopen_stack(stack, wanted, how.generator, runs))
        return opened

    def _how(self, plan: Plan, given: Any) -> Templates | None:
        """How stacks are opened: all of it, or what a run gives and what the plan says; None where neither says any."""
        if isinstance(given, Templates):
            return given
        said = settings_in(plan)
        return Templates.of(said, **(given or {})) if given or said.model_fields_set else None

    # -- training ------------------------------------------------------------------------------------------

    def training_options(self, config: Training) -> dict[str, Any]:
        """How stacks begin; how many templates there are, and in which mixtures, the plan says."""
        return {"start": config.templates.start, "sure": config.templates.sure}

    def unsuited(self, joint: JointModel, config: Training) -> list[str]:
        """Reasons why the mixtures cannot be trained as the settings ask."""
        from surgery.methods.templates.training import wrong_settings

        return wrong_settings(settings_in(joint.plan), config.templates)

    def phases(self, config: Training) -> str:
        """The last generations, in words, where these train with hardened templates."""
        return f"the last {config.final} with hardened templates" if config.templates.harden else ""

    def start(self, joint: JointModel, config: Training, generator: torch.Generator) -> None:
        """Freeze what shall stay as it is."""
        from surgery.methods.templates.training import settle_parts

        settle_parts(joint, config.templates)

    def take_over(self, joint: JointModel, loaded: JointModel) -> None:
        """Nothing: templates are found again by fitting as many to what they generate."""

    def candidates(self, joint: JointModel, states: States) -> tuple[str, ...]:
        """The members of a source that have the layers of every stack."""
        from surgery.methods.templates.transfer import candidates

        return candidates(joint, states)

    def begin_as(self, joint: JointModel, states: States, like: str, config: Training, seed: int) -> None:
        """Open the stacks with a source's templates, every member with the mixtures of one of its members."""
        from surgery.methods.templates.transfer import transfer

        transfer(joint, states, like, config.templates, seed)

    def moves(self, trainer: Trainer) -> Moves:
        """Regularisers and hardening."""
        from surgery.methods.templates.moves import TemplateMoves

        return TemplateMoves(self.name, trainer)

    def pictures(self) -> dict[str, Picture]:
        """Mixtures over time."""
        from surgery.methods.templates.pictures import draw_mixtures

        return {"mixtures.png": draw_mixtures}
