"""Storage: a joint model as named, encoded tensors, and back.

Keys are `plain/<member>/<name>` for tensors that a member owns and `bank/<key>/<part>` for the dictionary:

    rows.<j>  [K, m*n]  basis block j of every hypermodule; each j may have its own precision
    single    [S, m*n]  single rows; or, where each may have its own precision, single.<s> [1, m*n]
    psi       [L]       alignment, in the smallest integer type that holds it
    contexts  [L', c]   of the locations on hypermodules
    factor    [L'']     of the locations on single rows; absent where all are 1

A stored form belongs to the weights that it was made from. A tensor whose live value is what its stored form decodes
to is written in that form again, so saving what was loaded gives the same bytes; a tensor that changed is stored in
its own dtype, as it is, until a fit decides anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Plan, torch_dtype
from surgery.core.joint import JointModel
from surgery.core.known import Known
from surgery.core.settle import index_dtype, settle
from surgery.dictionary.dictionary import Bank, Dictionary, master_dtype
from surgery.members.extra_state import extra_state_of, set_extra_state
from surgery.members.member import Member
from surgery.members.occupancy import check_unoccupied
from surgery.slots.collapse import follow
from surgery.slots.slots import assign, locate
from surgery.storage.codecs import Encoded, as_dtype, decode, encode_native

ALIAS_BYTES = 512  # a tensor smaller than this is not worth the manifest's line that would alias it


@dataclass(frozen=True)
class Stored:
    """Everything that an artifact holds of a joint model.

    Attributes:
        plan: what is generated.
        tensors: encoded tensors by storage key.
        aliases: keys of plain tensors that equal another key's, byte for byte, and are stored once.
        ties: per member, tied names by first owner.
        extra: per member, extra state by its key in the state dict.
    """

    plan: Plan
    tensors: Mapping[str, Encoded]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are stored."""
        return sum(encoded.nbytes for encoded in self.tensors.values())


@torch.no_grad()
def store(joint: JointModel) -> Stored:
    """Encode a joint model.

    Banks that have the parts and the alignment that a fit or an artifact gave them are stored part by part; others are
    settled first. Whatever is not what its stored form decodes to is stored without loss.

    Raises:
        PlanError: where a generated weight of a member was replaced.
    """
    follow(joint)
    keep = {plan.key for plan in joint.plan.banks if _has_stored_form(plan, joint)}
    settled = settle(joint, keep)
    live = plain_tensors(joint, settled.plan, settled.plain)
    for plan in settled.plan.banks:
        live.update(bank_tensors(plan, settled.banks[plan.key], _row_by_row(plan.key, keep, joint)))
    known = {key: each for key, each in joint.encoded.items() if key[0] == "p" or key.split("/")[1] in keep}
    tensors = {key: _encode_as_before(tensor, known.get(key)) for key, tensor in live.items()}
    return deduplicate(Stored(settled.plan, tensors, ties=ties(joint), extra=extra(joint)))


def _has_stored_form(plan: BankPlan, joint: JointModel) -> bool:
    """Whether a bank has the parts, shapes and alignment that it was stored with."""
    prefix, bank = f"bank/{plan.key}/", joint.dictionary[plan.key]
    before = {key: each for key, each in joint.encoded.items() if key.startswith(prefix)}
    if not before or bank.diagonals is not None:  # diagonals have no stored form: they become part of blocks
        return False
    live = bank_tensors(plan, bank, f"{prefix}single.0" in before)
    same = {key: each.shape for key, each in before.items()} == {
        key: tuple(t.shape) for key, t in live.items()
    }
    psi = f"{prefix}psi"
    return same and torch.equal(decode(before[psi]).long(), live[psi].cpu().long())


def _row_by_row(key: str, keep: Collection[str], joint: JointModel) -> bool:
    """Whether a bank that keeps its form has single rows that are stored one by one."""
    return key in keep and f"bank/{key}/single.0" in joint.encoded


def plain_tensors(
    joint: JointModel, plan: Plan, settled: Mapping[tuple[str, str], Tensor]
) -> dict[str, Tensor]:
    """Every tensor that `plan` does not generate, by storage key, once for all its owners."""
    generated = {(p.site.member, p.site.name) for p in plan.placements}
    tensors: dict[str, Tensor] = {}
    for name in joint.names:
        for first in joint.owners[name]:
            if (name, first) in generated:
                continue
            tensor = settled.get((name, first))
            if tensor is None:
                holder, attribute = locate(joint[name], first)
                tensor = getattr(holder, attribute).detach()
            tensors[f"plain/{name}/{first}"] = tensor
    return tensors


def bank_tensors(plan: BankPlan, bank: Bank, row_by_row: bool = False) -> dict[str, Tensor]:
    """The parts of one bank by storage key; single rows as one tensor, or each as its own."""
    k, c = bank.hypermodules, bank.context
    rows, psi, contexts = bank.rows.detach(), bank.psi, bank.coefficients.detach()
    shared = psi < k
    prefix = f"bank/{plan.key}/"
    parts: dict[str, Tensor] = {}
    if k:
        parts.update({f"{prefix}rows.{j}": rows[: k * c].view(k, c, -1)[:, j].contiguous() for j in range(c)})
        parts[f"{prefix}contexts"] = contexts[shared].contiguous()
    if bank.singles:
        single = rows[k * c :].to(torch_dtype(plan.dtype))
        if row_by_row:
            parts.update({f"{prefix}single.{s}": single[s : s + 1] for s in range(len(single))})
        else:
            parts[f"{prefix}single"] = single
        if bool((contexts[~shared, 0] != 1).any()):
            parts[f"{prefix}factor"] = contexts[~shared, 0].contiguous()
    parts[f"{prefix}psi"] = psi.to(index_dtype(k + bank.singles))
    return parts


def build_bank(plan: BankPlan, tensors: Mapping[str, Encoded]) -> Bank:
    """The inverse of `bank_tensors`."""
    prefix = f"bank/{plan.key}/"
    parts = {key.removeprefix(prefix): decode(tensors[key]) for key in tensors if key.startswith(prefix)}
    master = master_dtype(torch_dtype(plan.dtype))
    bases = [parts[f"rows.{j}"].to(master) for j in range(sum(part.startswith("rows.") for part in parts))]
    singles = [parts[part].to(master) for part in parts_of_singles(parts)]
    rows = ([torch.stack(bases, 1).flatten(0, 1)] if bases else []) + singles
    # A fit on a device measures with rows that lie there; small tensors may lie on the CPU.
    device = rows[0].device
    psi = parts["psi"].long().to(device)
    k, c = (len(bases[0]), len(bases)) if bases else (0, 1)
    shared = psi < k
    contexts = torch.zeros(len(psi), c, dtype=master, device=device)
    if k:
        contexts[shared] = parts["contexts"].to(device, master)
    if singles:
        contexts[~shared, 0] = parts["factor"].to(device, master) if "factor" in parts else 1
    return Bank(plan.block, torch.cat(rows), psi, contexts, k)


def compressed(plan: Plan, encoded: Mapping[str, Encoded]) -> frozenset[tuple[str, str]]:
    """Tensors, by member and first owner, that are not stored in their own dtype.

    Args:
        plan: what is generated.
        encoded: by storage key, as `expand` returns them.
    """
    found = {tuple(key.split("/", 2)) for key, each in encoded.items() if not each.precision.is_native}
    banks = {owner for kind, owner, _ in found if kind == "bank"}
    plain = {(owner, name) for kind, owner, name in found if kind == "plain"}
    return frozenset(plain | {(p.site.member, p.site.name) for p in plan.placements if p.bank in banks})


def loosened(joint: JointModel) -> dict[str, int]:
    """How many compressed tensors changed since, so that they are stored in their own dtype; by that dtype.

    Example:
        >>> surgery.train(surgery.fit(joint, max_error=0.02), tasks)
        >>> loosened(joint)
        {'float32': 38}
    """
    before = joint.known.compressed
    if not before:
        return {}
    stored = store(joint)
    found: dict[str, int] = {}
    for member, name in sorted(before - compressed(stored.plan, expand(stored))):
        dtype = str(getattr(*locate(joint[member], name)).dtype).removeprefix("torch.")
        found[dtype] = found.get(dtype, 0) + 1
    return found


def parts_of_singles(parts: Collection[str]) -> list[str]:
    """The names of the parts of a bank that hold its single rows, in their order.

    Example:
        >>> parts_of_singles(["single.1", "psi", "single.0"])
        ['single.0', 'single.1']
    """
    if "single" in parts:
        return ["single"]
    return [f"single.{s}" for s in range(sum(part.startswith("single.") for part in parts))]


def deduplicate(stored: Stored) -> Stored:
    """Keep one of several plain tensors that are equal byte for byte, within and across members."""
    tensors, aliases, seen = {}, {}, {}
    for key, encoded in stored.tensors.items():
        if key.startswith("plain/") and encoded.nbytes >= ALIAS_BYTES:
            first = seen.setdefault(_fingerprint(encoded), key)
            if first != key:
                aliases[key] = first
                continue
        tensors[key] = encoded
    return replace(stored, tensors=tensors, aliases=aliases)


def ties(joint: JointModel) -> dict[str, dict[str, tuple[str, ...]]]:
    """Per member, the names of every tied tensor by its first owner."""
    return {
        name: tied
        for name, owners in joint.owners.items()
        if (tied := {first: names for first, names in owners.items() if len(names) > 1})
    }


def extra(joint: JointModel) -> dict[str, dict[str, Any]]:
    """Per member that has any, extra state by its key in the state dict."""
    return {name: found for name in joint.names if (found := extra_state_of(joint[name]))}


def revive(members: Sequence[Member], stored: Stored, known: Known | None = None) -> JointModel:
    """A joint model from its stored form; the members' modules may still be without weights."""
    check_unoccupied({member.name: member.module for member in members})
    encoded = expand(stored)
    for member in members:
        _assign_plain(member, stored, encoded)
    banks = {plan.key: build_bank(plan, stored.tensors) for plan in stored.plan.banks}
    joint = JointModel(members, stored.plan, Dictionary(banks), encoded, known)
    for name, values in stored.extra.items():
        set_extra_state(joint[name], values)
    return joint


def adopt(joint: JointModel, stored: Stored, known: Known | None = None) -> JointModel:
    """Give a joint model another stored form in place: a new plan, new banks, new plain tensors."""
    joint.vacate()
    encoded = expand(stored)
    for member in joint.members.values():
        _assign_plain(member, stored, encoded)
    banks = {plan.key: build_bank(plan, stored.tensors) for plan in stored.plan.banks}
    return joint.occupy(stored.plan, Dictionary(banks), encoded, known or Known())


def expand(stored: Stored) -> dict[str, Encoded]:
    """Encoded tensors by storage key, those that are stored under another key too."""
    return dict(stored.tensors) | {key: stored.tensors[first] for key, first in stored.aliases.items()}


def _assign_plain(member: Member, stored: Stored, encoded: Mapping[str, Encoded]) -> None:
    prefix = f"plain/{member.name}/"
    shared = {*stored.aliases, *stored.aliases.values()}
    tensors = {
        # An aliased tensor is stored once but belongs to several: each gets memory of its own.
        key.removeprefix(prefix): decode(each).clone() if key in shared else decode(each)
        for key, each in encoded.items()
        if key.startswith(prefix)
    }
    assign(member.module, tensors, dict(stored.ties.get(member.name, {})))


def _encode_as_before(tensor: Tensor, before: Encoded | None) -> Encoded:
    """The stored form that a tensor came from where it still decodes to the tensor, else the tensor as it is."""
    if before is not None and before.shape == tuple(tensor.shape):
        before = as_dtype(before, tensor.dtype)  # another one where the model was moved
        if before is not None:
            old = decode(before).to(tensor.device)
            if old is tensor or _bytes(old).equal(_bytes(tensor)):
                return before
    return encode_native(tensor)


def _fingerprint(encoded: Encoded) -> bytes:
    digest = hashlib.sha256(f"{encoded.precision} {encoded.shape} {encoded.dtype}".encode())
    for name in sorted(encoded.parts):
        digest.update(_bytes(encoded.parts[name].cpu()).numpy().tobytes())
    return digest.digest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
