"""The method of templates: the layers of stacks as mixtures, everything else as hypermodules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Plan
from surgery.core.bank import Bank
from surgery.core.method import Opening, PlanRequest, TensorMethod, register_method
from surgery.methods.rows import parts as stored
from surgery.methods.rows.bank import RowsBank
from surgery.methods.rows.exact import exact_bank
from surgery.methods.templates.bank import TemplateBank
from surgery.methods.templates.mixtures import has_templates, reopen_stack, run_lengths
from surgery.methods.templates.plan import plan_templates
from surgery.storage.codecs import Encoded

if TYPE_CHECKING:
    from surgery.anatomy.sites import Anatomy


@register_method
class TemplatesMethod(TensorMethod):
    """Every layer of a stack is a mixture of K templates. # Compositional models"""

    name: ClassVar[str] = "templates"
    summary: ClassVar[str] = "the layers of stacks are mixtures of templates, the rest is hypermodules"
    form: ClassVar[str] = "rows"

    def plan(self, anatomies: Sequence[Anatomy], request: PlanRequest) -> Plan:
        """A bank for each tensor of a stack's layers, and blocks for what lies outside of stacks."""
        return plan_templates(
            anatomies,
            request.block,
            request.context,
            mix_norms=request.mix_norms,
            stacks=request.stacks,
        )

    def make(self, plan: BankPlan, blocks: Tensor, generator: torch.Generator) -> Bank:
        """Every distinct layer as a template: nothing is lost."""
        return exact_bank(blocks, plan.block)

    def unpack(self, plan: BankPlan, parts: Mapping[str, Tensor]) -> Bank:
        """A bank of rows and codes; templates where there are any."""
        bank = stored.unpack(plan, parts)
        return TemplateBank.of(bank) if bank.hypermodules == 1 and not bank.singles else bank

    def wrong_parts(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> list[str]:
        """What cannot be true of stored rows and codes."""
        return stored.wrong_parts(plan, parts)

    def location_bytes(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> Tensor:
        """Rows are divided among the locations that draw on them."""
        return stored.location_bytes(parts)

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
