"""Mixtures: the banks of a stack opened as templates that are shared, with one set of mixtures for all its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import Placement
from surgery.methods.rows.bank import RowsBank, exact_bank
from surgery.methods.templates.bank import TemplateBank
from surgery.methods.templates.layers import inner_products, numbered
from surgery.methods.templates.settings import Settings
from surgery.methods.templates.solving import fit_mixtures, harden, signature, solve_templates
from surgery.settings.names import Mixing

_SURE = 0.9  # share of its own template in a layer's softmax mixture at an exact start


@dataclass(frozen=True)
class Templates:
    """How the stacks of a joint model are opened.

    Attributes:
        count: K; as many as there are distinct layers where it is None, or where there are fewer.
        mixing: which mixtures are allowed; `one-hot` ones are not trained.
        start: templates and mixtures that come nearest to the layers (`fit`); or the first layers as templates,
            with mixtures that are a signature by hand (`sequential`, `cyclic`, `progressive`, `random`) or
            alike for all layers (`uniform`): for architectures without pretrained weights.
        sure: share of a layer's own template at an exact start, and at a start by a signature, in softmax mixtures.
    """

    count: int | None = None
    mixing: Mixing = "softmax"
    start: str = "fit"
    sure: float = _SURE

    @classmethod
    def of(cls, said: Settings, start: str = "fit", sure: float = _SURE) -> Templates:
        """The templates that a plan asks for, in softmax mixtures where it does not say how they are mixed."""
        mixture: dict[str, Any] = {"mixing": said.mixture} if "mixture" in said.model_fields_set else {}
        return cls(said.templates, **mixture, start=start, sure=sure)


def has_templates(banks: Mapping[str, RowsBank]) -> bool:
    """Whether the banks of a stack are open: templates with one parameter of mixtures for all of them."""
    shared = {id(bank.contexts) for bank in banks.values()}
    return len(shared) == 1 and all(bank.hypermodules == 1 for bank in banks.values())


def reopen_stack(
    banks: Mapping[str, RowsBank], how: Templates | None, generator: torch.Generator, runs: Sequence[int] = ()
) -> dict[str, TemplateBank]:
    """`open_stack` for banks as they are joined, and for those that come from an artifact.

    An artifact stores each tensor's templates in the form that is smallest, so templates that all tensors mix alike are
    found again from what is generated: as many as there were, which gives every layer back.

    Args:
        banks: by key, one location for every layer.
        how: as many templates as there were, in any mixtures, where it is None.
        generator: as in `open_stack`.
        runs: as in `open_stack`.
    """
    stored = [bank.context for bank in banks.values() if bank.hypermodules]
    if stored:
        how = how or Templates(mixing="linear")
        how = replace(how, count=how.count or max(stored), start="fit")
    plain = {
        key: exact_bank(bank.settled_blocks(), bank.block) if bank.hypermodules else bank
        for key, bank in banks.items()
    }
    return open_stack(plain, how or Templates(), generator, runs=runs)


def open_stack(
    banks: Mapping[str, RowsBank],
    how: Templates,
    generator: torch.Generator,
    weights: Mapping[str, float] | None = None,
    runs: Sequence[int] = (),
) -> dict[str, TemplateBank]:
    """Templates and mixtures for the banks of one stack.

    With as many templates as distinct layers every layer stays what it was.

    Args:
        banks: by key, each with one location for every layer, without mixtures.
        how: K, and which mixtures.
        generator: on the CPU; decides clusterings and random signatures.
        weights: by key, how much a squared error counts; by default relative to the tensor's own size.
        runs: how many layers each member has, one after the other; a signature by hand is that of each run.

    Returns:
        Banks of one hypermodule whose K basis blocks are the templates; their contexts are one parameter.
    """
    blocks = {key: bank.settled_blocks() for key, bank in banks.items()}
    group = _distinct(banks)
    most = int(group.max()) + 1
    exact = how.count is None or how.count >= most
    count = most if how.count is None else min(how.count, most)
    if exact:
        first = torch.full((most,), len(group)).scatter_reduce_(0, group, torch.arange(len(group)), "amin")
        chosen = sure_mixtures(torch.arange(most), most, how)
        mixtures, combine = chosen[group], torch.zeros(most, len(group), dtype=torch.float64)
        combine[:, first] = solve_templates(chosen)
    elif how.start == "fit":
        gram = gram_of(blocks, weights)
        mixtures, combine = fit_mixtures(gram, count, how.mixing, generator)
    else:
        mixtures = torch.cat([_by_hand(how, n, count, generator) for n in runs or (len(group),)])
        combine = torch.eye(len(group), dtype=torch.float64)[:count]
        # Mixing K independent weights makes them smaller: their deviation is made up for, so that layers begin as they
        # were meant to. What is the same everywhere, such as zeros and ones, stays.
        stretch = float(mixtures.square().sum(1).mean().rsqrt())
        blocks = {key: each.mean() + (each - each.mean()) * stretch for key, each in blocks.items()}
    rows = {key: (combine.to(each.device) @ each.double()).to(each.dtype) for key, each in blocks.items()}
    if exact and how.mixing != "softmax":  # a template is a layer: bit for bit
        first = combine.argmax(1)
        rows = {key: each[first.to(each.device)].clone() for key, each in blocks.items()}
    opened = mix_banks(banks, rows, mixtures, how.mixing)
    if exact:
        for key, bank in opened.items():
            bank.origin = blocks[key]
    return opened


def run_lengths(placements: Sequence[Placement]) -> list[int]:
    """How many layers each run has, from where one tensor of a stack's layers is placed: members and towers apart."""
    ordered = sorted(placements, key=lambda p: p.start)
    return [
        len(list(run))
        for _, run in groupby(ordered, lambda p: (p.site.member, re.sub(r"\d+", "*", p.site.name)))
    ]


def mix_banks(
    banks: Mapping[str, RowsBank], rows: Mapping[str, Tensor], mixtures: Tensor, mixing: Mixing
) -> dict[str, TemplateBank]:
    """Banks of templates in place of banks with the same locations.

    Args:
        banks: by key, one location for every layer.
        rows: by key, the templates `[K, D]`.
        mixtures: `[L, K]`, of all of them.
        mixing: which mixtures they are.
    """
    shared = _parameter(mixtures, mixing, next(iter(rows.values())))
    opened = {}
    for key, bank in banks.items():
        opened[key] = TemplateBank(bank.block, rows[key], torch.zeros_like(bank.psi), shared, mixing)
    return opened


def gram_of(blocks: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
    """Inner products of whole layers `[L, L]`, float64, from the blocks `[L, D]` of their tensors.

    Args:
        blocks: by key.
        weights: by key; by default one over the tensor's mean square, so that every number counts alike.
    """
    total: Tensor | None = None
    for key, each in blocks.items():
        gram = inner_products(list(each))
        mean = float(gram.trace()) / each.numel()
        weight = (1 / mean if mean > 0 else 0.0) if weights is None else weights.get(key, 0.0)
        total = gram * weight if total is None else total + gram * weight
    assert total is not None
    return total


@torch.no_grad()
def harden_stack(banks: Mapping[str, TemplateBank]) -> Tensor:
    """Let every layer take the template that contributes most to it, for good; the signature `[L]`."""
    first = next(iter(banks.values()))
    chosen = harden(first.coefficients)
    one = nn.functional.one_hot(chosen, first.context).to(first.contexts)
    shared = nn.Parameter(one, requires_grad=False)
    for bank in banks.values():
        bank.contexts, bank.mixing, bank.origin = shared, "one-hot", None
    return chosen


def _distinct(banks: Mapping[str, RowsBank]) -> Tensor:
    """The number of each layer among those that differ in any tensor, in the order of layers: `[L]`.

    Raises:
        ValueError: where a bank has hypermodules or templates already.
    """
    if opened := [key for key, bank in banks.items() if bank.hypermodules]:
        raise ValueError(f"only banks of single rows can be opened, {', '.join(opened)} is not one")
    # Equal tensors share a row, and a factor tells those apart that are equal up to one.
    codes = [
        torch.stack([bank.psi.double(), bank.contexts.detach()[:, 0].double()]) for bank in banks.values()
    ]
    both = torch.cat(codes).T.cpu()
    return numbered(len(both), lambda one, other: torch.equal(both[one], both[other]))


def sure_mixtures(chosen: Tensor, count: int, how: Templates) -> Tensor:
    """Mixtures in which each layer takes its chosen template, in a softmax one almost alone."""
    one = nn.functional.one_hot(chosen, count).double()
    if how.mixing != "softmax" or count == 1:
        return one
    return one * how.sure + (1 - one) * (1 - how.sure) / (count - 1)


def _by_hand(how: Templates, layers: int, count: int, generator: torch.Generator) -> Tensor:
    if how.start == "uniform":
        return torch.full((layers, count), 1 / count, dtype=torch.float64)
    # A run of fewer layers than templates takes the first of them.
    return sure_mixtures(signature(how.start, layers, min(count, layers), generator), count, how)


def _parameter(mixtures: Tensor, mixing: Mixing, like: Tensor) -> nn.Parameter:
    """The trained form of mixtures: themselves, or for softmax ones their logarithms, about 0."""
    values = mixtures
    if mixing == "softmax":
        values = mixtures.clamp_min(1e-12).log()
        values = values - values.mean(1, keepdim=True)
    return nn.Parameter(values.to(like), requires_grad=mixing != "one-hot")
