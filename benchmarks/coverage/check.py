"""Check: one model through trace, discover, join, forward and collapse, and whether it came back exactly."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.catalogue import Entry, build
from benchmarks.coverage.row import Row
from surgery.anatomy.plan import make_plan
from surgery.anatomy.sites import Anatomy, Site, discover
from surgery.core.joining import join
from surgery.errors import PlanError
from surgery.inputs import example_inputs
from surgery.inputs.probes import tensors_in
from surgery.members.member import Member, Origin

BLOCKS = ((16, 16), (8, 8), (4, 4), (1, 1))


@dataclass(frozen=True)
class Exactness:
    """Whether outputs and state dict were what they had been, bit for bit; `joined` is False without any site."""

    outputs: bool
    state: bool
    joined: bool


def try_model(entry: Entry, seed: int = 0) -> Row:
    """Everything about one model; a failure is described in `cause`, with its stage."""
    row = Row(entry.library, entry.model, entry.implementation)
    stage = "build"
    try:
        module, inputs = build(entry, seed)
        parameters = sum(p.numel() for p in module.parameters())
        row = replace(row, implementation=row.implementation or type(module).__name__, parameters=parameters)
        stage = "inputs"
        origin = Origin(entry.library, entry.model, type(module).__name__)
        member = Member("m", module, inputs or example_inputs(module, origin, seed=seed), origin)
        row = replace(row, inputs=member.inputs.source)
        stage = "trace"
        began = time.perf_counter()
        anatomy = discover(member)
        row = replace(row, seconds=round(time.perf_counter() - began, 3), **describe(anatomy, member))
        stage = "join"
        exact = round_trip(member, anatomy)
        row = replace(row, outputs=_yes(exact.outputs), state=_yes(exact.state))
        stage = "compare"
        if not exact.outputs or not exact.state:
            return replace(row, cause="outputs differ" if not exact.outputs else "state dict differs")
        if not row.traced:
            return replace(row, cause=f"no graph: {'; '.join(anatomy.notes)[:300]}")
        return replace(row, status="exact", cause="" if exact.joined else "no sites")
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        absent = stage == "build" and isinstance(error, LookupError)
        return replace(
            row, status="absent" if absent else "failed", cause=f"{stage}: {type(error).__name__}: {text}"
        )


def describe(anatomy: Anatomy, member: Member) -> dict[str, Any]:
    """Shares of the parameters by what they became, and why those left over were skipped."""
    numbers: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for part in (*anatomy.sites, *anatomy.left_alone):
        size = 1
        for side in part.shape:
            size *= side
        if isinstance(part, Site):
            numbers["sites"] += size
        elif part.kind != "buffer":
            numbers["private" if part.role == "private" else "skipped"] += size
            if part.role != "private":
                reasons[part.reason] += size
    total = max(sum(numbers.values()), 1)
    shares = {name: round(numbers[name] / total, 6) for name in ("sites", "private", "skipped")}
    why = "; ".join(f"{reason} ({size / total:.2%})" for reason, size in reasons.most_common(4))
    return {"tier": anatomy.tier, "inputs": anatomy.inputs, "why_skipped": why, **shares}


def round_trip(member: Member, anatomy: Anatomy | None = None) -> Exactness:
    """Join a member alone, run it, collapse it, and compare with what it was; its module is used up."""
    anatomy = anatomy or discover(member)
    state = {key: digest(value) for key, value in _tensors(member.module).items()}
    before = run(member.module, member)
    try:
        plan = _plan(anatomy)
    except PlanError:
        plan = None
    if plan is None or not plan.placements:
        return Exactness(True, True, False)
    joint = join([member], plan)
    after = run(joint["m"] if member.name == "m" else joint[member.name], member)
    back = joint.collapse(member.name)
    outputs = len(before) == len(after) and all(map(same_bits, before, after))
    keys = [key for key in joint.state_keys[member.name] if key in state]
    return Exactness(outputs, list(back) == keys and all(digest(back[k]) == state[k] for k in keys), True)


@torch.no_grad()
def run(module: nn.Module, member: Member) -> list[Tensor]:
    """All output tensors, with random numbers as ever the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [t.clone() for t in tensors_in(module(*member.inputs.args, **member.inputs.kwargs))]


def digest(tensor: Tensor) -> str:
    """Of dtype, shape and every bit; a copy of the state would cost large models their memory."""
    hashed = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def _plan(anatomy: Anatomy) -> Any:
    """A plan with the largest blocks that a site fits."""
    for block in BLOCKS[:-1]:
        try:
            return make_plan([anatomy], block)
        except PlanError:
            continue
    return make_plan([anatomy], BLOCKS[-1])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}


def _yes(value: bool) -> str:
    return "yes" if value else "no"
