"""Training templates: what regularises their mixtures, hardening, and what is reported of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.core.joint import JointModel
from surgery.methods.templates.bank import TemplateBank
from surgery.methods.templates.mixtures import harden_stack, has_templates
from surgery.methods.templates.settings import Settings, TemplateSettings
from surgery.methods.templates.solving import attraction, entropy


def wrong_settings(said: Settings, settings: TemplateSettings) -> list[str]:
    """Linear mixtures, whose shares are no probabilities, can neither harden nor have an entropy: a sentence.

    Args:
        said: of the plan.
        settings: of the run.
    """
    linear = said.mixture == "linear" and "mixture" in said.model_fields_set
    if linear and (settings.harden or settings.entropy or settings.attraction):
        return [
            "Hardening, entropy and attraction of templates need mixtures of positive shares, found linear ones: use "
            "`settings.mixture=softmax`."
        ]
    return []


def settle_parts(joint: JointModel, settings: TemplateSettings) -> None:
    """Freeze what shall stay as it is: templates, or mixtures."""
    for banks in stacks_of(joint).values():
        for bank in banks.values():
            bank.rows.requires_grad_(not settings.freeze)
            bank.contexts.requires_grad_(settings.learn and bank.mixing != "one-hot")


def stacks_of(joint: JointModel) -> dict[str, dict[str, TemplateBank]]:
    """The banks of each stack that is open, by key."""
    found: dict[str, dict[str, Any]] = {
        name: {key: joint.dictionary[key] for key in keys} for name, keys in joint.plan.stacks.items()
    }
    return {name: banks for name, banks in found.items() if has_templates(banks)}


def penalty(joint: JointModel, settings: TemplateSettings) -> Tensor | None:
    """The regularisers of all stacks in the mean, weighted; None where there is nothing to regularise.

    # Compositional models, entropy and attraction
    """
    terms = []
    for banks in stacks_of(joint).values():
        first = next(iter(banks.values()))
        if first.mixing == "one-hot" or not (settings.entropy or settings.attraction):
            continue
        mixtures = first.coefficients
        term = settings.entropy * entropy(mixtures)
        if settings.attraction:
            grams = [_gram(bank) for bank in banks.values()]
            term = term + settings.attraction * attraction(torch.stack(grams).sum(0), mixtures)
        terms.append(term)
    return torch.stack(terms).mean() if terms else None


def _gram(bank: TemplateBank) -> Tensor:
    """Products of templates with one another `[K, K]`; each process goes back into the columns that it holds."""
    return bank.columns.summed(bank.rows @ bank.rows.T)


def harden_stacks(joint: JointModel) -> None:
    """Give every layer the template that contributes most to it."""
    for banks in stacks_of(joint).values():
        harden_stack(banks)
    joint.refresh()


def mixtures_of(joint: JointModel) -> dict[str, list[list[float]]]:
    """The mixtures of every stack, a row for each layer, rounded for the log."""
    found = {}
    for name, banks in stacks_of(joint).items():
        mixtures = next(iter(banks.values())).coefficients.detach().cpu()
        found[name] = [[round(value, 4) for value in row] for row in mixtures.tolist()]
    return found


def describe_stacks(joint: JointModel) -> dict[str, Any]:
    """The layers of every stack and how many templates it has, for the log."""
    facts = {}
    for name, banks in stacks_of(joint).items():
        key, bank = next(iter(banks.items()))
        placed = sorted(joint.plan.in_bank(key), key=lambda p: p.start)
        facts[name] = {
            "layers": [[p.site.member, p.site.name] for p in placed],
            "templates": bank.context,
            "numbers": sum(b.width for b in banks.values()),
        }
    return facts
