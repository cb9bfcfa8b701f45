"""The format `compressed-tensors`: linear layers as packed integers that other tools run as they are.

Grouped integers of 2 to 8 bits are compressed-tensors' `pack-quantized`, value for value: symmetric, a scale a group.
So nothing is rounded again; what the format cannot hold is written as it is, and said so by name before anything is
written. Widths differ from layer to layer, by one of `config_groups` for each, whose targets are patterns of names.

Servers merge layers that read the same inputs, such as q, k and v, and take one scheme for all of a merged layer:
`tie_widths` gives these one width, of those that every server has. Codes of fewer bits are codes of more bits, so this
takes room and costs nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.artifact.formats.checkpoint import architecture, checkpoint_names, write_checkpoint
from surgery.artifact.formats.opening import check_opens, check_outline
from surgery.errors import ExportError
from surgery.members.member import Member
from surgery.storage.codecs import BFLOAT16, Encoded, Grouping, codes_of, grouping_of, unpacked
from surgery.storage.states import lazy_state_of
from surgery.storage.stored import Stored
from surgery.util.showing import plural
from surgery.util.text import shorten
from surgery.util.wording import size

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
MERGED = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"),
    ("q_lin", "k_lin", "v_lin"),
)  # fmt: skip
"""Layers that servers make one layer of, by the last step of their names."""
EVERYWHERE = (4, 8)
"""Bits that every server's kernels have; newer ones take all from 2 to 8."""


@dataclass(frozen=True)
class Packing:
    """What becomes of a member's tensors.

    Attributes:
        packed: bits and group of linear layers, by the layer's name.
        plain: why a compressed tensor is written as it is, by its name.
        sizes: bytes that tensors have as they are written, by name.
        open_question: what is known only when it is written, in words; empty where nothing is.
    """

    packed: Mapping[str, Grouping]
    plain: Mapping[str, str]
    sizes: Mapping[str, int]
    open_question: str = ""

    def lines(self) -> list[str]:
        """What becomes of every tensor that is stored compressed, for people."""
        found = []
        for how in sorted(set(self.packed.values()), key=lambda each: (each.bits, each.group)):
            names = [name for name, each in self.packed.items() if each == how]
            bytes_ = sum(self.sizes[f"{name}.weight"] for name in names)
            amount = f"{plural(len(names), 'layer')}, {size(bytes_)}"
            found.append(
                f"packed, {how.bits} bits, a scale for {how.group} values ({amount}): {', '.join(in_short(names))}"
            )
        for reason in dict.fromkeys(self.plain.values()):
            names = [name for name, each in self.plain.items() if each == reason]
            bytes_ = sum(self.sizes[name] for name in names)
            found.append(f"as it is, {reason} ({size(bytes_)}): {', '.join(in_short(names))}")
        return found + ([self.open_question] if self.open_question else [])


def write_compressed_tensors(
    folder: Path, packing: Packing, module: Any, stored: Stored, member: Member
) -> None:
    """Write a checkpoint that transformers, with compressed-tensors installed, and servers read.

    Args:
        folder: in which it is written.
        packing: as `plan_packing` returns it.
        module: of the member, without weights.
        stored: of this member alone, on the CPU.
        member: as it is described where it is stored.

    Raises:
        ExportError: where transformers cannot open it, as far as compressed-tensors is here to try.
    """
    state, plain = lazy_state_of(stored, member.name), _plain(stored, member.name)
    tensors: dict[str, Tensor] = {}
    for name in checkpoint_names(module):
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in packing.packed:
            tensors |= _pack(layer, plain[name], packing.packed[layer].bits)
        elif name in state:
            as_stored = name in plain and plain[name].precision == BFLOAT16
            tensors[name] = state[name].to(torch.bfloat16) if as_stored else state[name].contiguous()
    dtypes = {each.dtype for each in state.handles.values()}
    entries = {"quantization_config": configuration(packing, module)}
    write_checkpoint(folder, module, member, tensors, entries, dtypes)
    check_opens(folder, type(module), member.name)


def plan_packing(stored: Stored, member: Member, tie_widths: bool, trust: bool) -> tuple[Packing, Any]:
    """What becomes of a member's tensors, and its module without weights.

    Args:
        stored: of this member alone, on the CPU.
        member: as it is described where it is stored.
        tie_widths: whether layers that servers merge get one width, of 4 or 8 bits.
        trust: whether Python files that come with it may run.

    Raises:
        ExportError: where it is no model of transformers as it is, none of its layers can be packed, or its class
            cannot be opened with layers that are.
    """
    module = architecture(member, stored, METHOD, trust)
    plain, sites = _plain(stored, member.name), {p.site.name for p in stored.plan.of(member.name)}
    names, packed, reasons = checkpoint_names(module), {}, {}
    for name in names:
        each = plain.get(name)
        if name in sites:
            reasons[name] = "generated from what several tensors have in common"
        elif each is not None and not each.precision.is_native:
            how = _fit(module, name, each)
            if isinstance(how, str):
                reasons[name] = how
            else:
                packed[name.removesuffix(".weight")] = how
    if tie_widths:
        packed, apart = tie(packed, [n for n, m in module.named_modules() if isinstance(m, nn.Linear)])
        reasons |= {f"{name}.weight": _MERGED_WITH_PLAIN for name in apart}
    if not packed:
        raise ExportError(
            f"The format {METHOD} is for linear layers stored in 2 to 8 bits, but member '{member.name}' has none; "
            f"export it in the format transformers or plain.{_why_none(reasons)}"
        )
    handles = lazy_state_of(stored, member.name).handles
    sizes = {name: handles[name].nbytes for name in names if name in handles}
    for layer, how in packed.items():
        rows, columns = plain[f"{layer}.weight"].shape
        sizes[f"{layer}.weight"] = rows * (-(-columns * how.bits // 32) * 4 + columns // how.group * 2) + 16
    for name in reasons:
        if name in plain and plain[name].precision == BFLOAT16:
            sizes[name] //= plain[name].dtype.itemsize // 2
    packing = Packing(packed, reasons, sizes)
    outlines = _outlines(packing, {name: handles[name].shape for name in names if name in handles}, module)
    question = check_outline(module, member.name, outlines, configuration(packing, module))
    return replace(packing, open_question=question), module


def _why_none(reasons: Mapping[str, str]) -> str:
    """One tensor for each reason why matrices cannot be packed, as further sentences."""
    first: dict[str, str] = {}
    for name, reason in reasons.items():
        if reason != _VECTORS:
            first.setdefault(reason, name)
    said = [f"{name}: {reason}" for reason, name in first.items()]
    return f" Such as {shorten(said, 3, '; ')}." if said else ""


_VECTORS = "biases, norms and other vectors, where weights of linear layers are packed"


def _outlines(
    packing: Packing, shapes: Mapping[str, tuple[int, ...]], module: nn.Module
) -> dict[str, Tensor]:
    """The tensors that are written, on the meta device."""
    own, found = module.state_dict(), {}
    for name, shape in shapes.items():
        how = packing.packed.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if how is None:
            found[name] = torch.empty(shape, dtype=own[name].dtype, device="meta")
        else:
            rows, columns = shape
            parts = {
                "packed": ((rows, -(-columns * how.bits // 32)), torch.int32),
                "scale": ((rows, columns // how.group), own[name].dtype),
                "shape": ((2,), torch.int64),
            }
            for part, (size_, dtype) in parts.items():
                found[f"{name}_{part}"] = torch.empty(size_, dtype=dtype, device="meta")
    return found


_MERGED_WITH_PLAIN = "servers merge it with a layer that is not packed"


def _plain(stored: Stored, member: str) -> dict[str, Encoded]:
    """A member's plain tensors by name, as codes and scales where they are of integers."""
    return {name: unpacked(each) for name, each in stored.plain(member).items()}


def _fit(module: nn.Module, name: str, encoded: Encoded) -> Grouping | str:
    """Bits and group of a compressed tensor that can be packed, or why it cannot, in words."""
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    if len(encoded.shape) < 2:
        return _VECTORS
    if attribute != "weight" or type(owner) is not nn.Linear:
        return f"of {type(owner).__name__}, where weights of Linear are packed"
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    if name in tied.values():
        return "tied to another tensor"
    how = grouping_of(encoded)
    if how is None:
        return f"stored as {encoded.precision.name}, where integers of one width are packed"
    if how.bits > 8:
        return f"stored in {how.bits} bits, where at most 8 are packed"
    if encoded.shape[1] % how.group:
        return f"with rows that are not whole groups of {how.group}"
    scale = encoded.parts["scale"]
    if not torch.equal(scale.to(encoded.dtype).float(), scale.float()):
        return f"with scales that {str(encoded.dtype).removeprefix('torch.')} does not hold"
    return how


def tie(packed: Mapping[str, Grouping], linear: Iterable[str]) -> tuple[dict[str, Grouping], list[str]]:
    """Widths that servers take: of 4 or 8 bits, one for all layers that are merged.

    Args:
        packed: bits and group by layer.
        linear: names of all linear layers.

    Returns:
        the same with no fewer bits, without layers that would be merged with one that is not packed; and these.

    Example:
        >>> tie({"a.q_proj": Grouping(3, 64), "a.k_proj": Grouping(5, 64)}, ["a.q_proj", "a.k_proj"])
        ({'a.q_proj': Grouping(bits=8, group=64), 'a.k_proj': Grouping(bits=8, group=64)}, [])
    """
    found: dict[str, Grouping] = {}
    apart = []
    merged = merged_layers(linear)
    for name, how in packed.items():
        together = merged.get(name, (name,))
        if any(each not in packed or packed[each].group != how.group for each in together):
            apart.append(name)
            continue
        most = max(packed[each].bits for each in together)
        found[name] = replace(how, bits=next(bits for bits in EVERYWHERE if bits >= most))
    return found, apart


def merged_layers(linear: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The layers that a server makes one of, by each of them; others are left out.

    Example:
        >>> merged_layers(["a.up_proj", "a.gate_proj", "a.down_proj"])["a.up_proj"]
        ('a.gate_proj', 'a.up_proj')
    """
    names, found = set(linear), {}
    for name in names:
        path, _, last = name.rpartition(".")
        for steps in MERGED:
            together = tuple(f"{path}.{step}" for step in steps if f"{path}.{step}" in names)
            if last in steps and len(together) > 1:
                found[name] = together
    return found


def server_rules(configuration: Mapping[str, Any], linear: Iterable[str]) -> list[str]:
    """What a server's loader would refuse or misread in a checkpoint, in words; nothing where it would take all of it.

    A merged layer has one scheme, that of its first part, and is packed whole or not at all; a linear layer is a target
    or ignored; widths are those that all kernels have.

    Args:
        configuration: `quantization_config` of a checkpoint.
        linear: names of all linear layers.
    """
    linear = list(linear)
    bits = {name: _scheme(configuration, name) for name in linear}
    ignored = {name: any(_matches(each, name) for each in configuration.get("ignore", ())) for name in linear}
    bad = [
        f"{name} is neither a target nor ignored"
        for name in linear
        if bits[name] is None and not ignored[name]
    ]
    bad += [
        f"{name} has {found[0]} bits, where kernels have {' or '.join(map(str, EVERYWHERE))}"
        for name in linear
        if (found := bits[name]) is not None and found[0] not in EVERYWHERE
    ]
    for together in dict.fromkeys(merged_layers(linear).values()):
        if len({bits[name] for name in together}) > 1:
            how = ", ".join(f"{name} {_shown(bits[name])}" for name in together)
            bad.append(f"layers that are merged must be stored alike, found {how}")
    return bad


def _shown(how: tuple[int, int] | None) -> str:
    return "as it is" if how is None else f"{how[0]} bits"


def _scheme(configuration: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    for group in configuration["config_groups"].values():
        if any(_matches(target, name) for target in group["targets"]):
            return group["weights"]["num_bits"], group["weights"]["group_size"]
    return None


def _matches(target: str, name: str) -> bool:
    pattern = target.removeprefix("re:")
    return bool(re.match(pattern, name)) if target != pattern else target == name


def configuration(packing: Packing, module: Any) -> dict[str, Any]:
    """`quantization_config` of a packed model.

    Args:
        packing: as `plan_packing` returns it.
        module: of the member.
    """
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    linear = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
    groups = {}
    for number, how in enumerate(
        sorted(set(packing.packed.values()), key=lambda each: (each.bits, each.group))
    ):
        names = [name for name, each in packing.packed.items() if each == how]
        weights = {
            "num_bits": how.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": how.group,
            "dynamic": False,
        }  # fmt: skip
        groups[f"group_{number}"] = {
            "targets": patterns(names, prefix, set(linear) - set(names)), "weights": weights, "input_activations": None,
            "output_activations": None, "format": FORMAT,
        }  # fmt: skip
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": patterns([name for name in linear if name not in packing.packed], prefix, packing.packed),
    }


def patterns(names: Iterable[str], prefix: str = "", others: Iterable[str] = ()) -> list[str]:
    """Targets that match these layers and no other, in a model or in a base model of it.

    What stands in front of a name is left open, as servers put models into others; less so where another layer's name
    ends alike.

    Args:
        names: of layers.
        prefix: of the base model, with its dot.
        others: names that must not match.

    Example:
        >>> patterns(["bert.layer.0.key", "bert.layer.1.key", "head"], "bert.")
        ['re:(.*\\\\.)?layer\\\\.(0|1)\\\\.key$', 're:(.*\\\\.)?head$']
        >>> patterns(["head"], "bert.", ["bert.layer.head"])
        ['re:(bert\\\\.)?head$']
    """
    others, base = list(others), "" if prefix == "." else prefix
    found: dict[str, list[str]] = {}
    for name in names:
        short = name.removeprefix(base)
        ways = ((r"(.*\.)?", short), (f"({re.escape(base)})?", short), ("", name))
        for before, rest in ways:
            if before == "()?":
                continue
            wanted = re.compile(f"{before}{re.escape(rest)}$")
            if not any(wanted.match(other) for other in others):
                break
        found.setdefault(before, []).append(rest)
    return [
        f"re:{front}{re.escape(before)}{'(' + '|'.join(numbers) + ')' if all(numbers) else ''}{re.escape(after)}$"
        for front, mine in found.items()
        for (before, after), numbers in _by_number(mine).items()
    ]


def in_short(names: Iterable[str]) -> list[str]:
    """Names that differ in one number as one.

    Example:
        >>> in_short(["layer.0.key", "layer.1.key", "head"])
        ['layer.{0,1}.key', 'head']
    """
    return [
        f"{before}{numbers[0] if len(numbers) == 1 else '{' + ','.join(numbers) + '}'}{after}"
        for (before, after), numbers in _by_number(names).items()
    ]


def _by_number(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Names by what is before and after the first step that is a number; a name without one has an empty number."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        parts = (name[: match.start()], match[0], name[match.end() :]) if match else (name, "", "")
        found.setdefault((parts[0], parts[2]), []).append(parts[1])
    return {place: sorted(numbers, key=lambda n: (len(n), n)) for place, numbers in found.items()}


def _pack(layer: str, encoded: Encoded, bits: int) -> dict[str, Tensor]:
    """A linear layer's tensors: codes of `bits` each without a gap, scales, and the shape."""
    codes, scale = codes_of(encoded, bits)
    return {
        f"{layer}.weight_packed": packed_words(codes, bits),
        f"{layer}.weight_scale": scale.contiguous(),
        f"{layer}.weight_shape": torch.tensor(encoded.shape, dtype=torch.int64),
    }


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes, uint8 `[R, n]`, as rows of 32-bit words `[R, ceil(n * bits / 32)]`, the lowest bits first.

    Example:
        >>> packed_words(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
        tensor([[801]], dtype=torch.int32)
    """
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    found = torch.empty(rows, words, dtype=torch.int32)
    step = max(1, _CHUNK // (max(columns, 1) * bits))
    for start in range(0, rows, step):
        part = codes[start : start + step].numpy()
        stream = np.unpackbits(part[:, :, None], axis=2, count=bits, bitorder="little").reshape(len(part), -1)
        stream = np.pad(stream, ((0, 0), (0, words * 32 - columns * bits)))
        packed = np.packbits(stream, axis=1, bitorder="little").view("<i4")
        found[start : start + step] = torch.from_numpy(packed.astype(np.int32, copy=False))
    return found


_CHUNK = 1 << 24  # bits that are handled at once, a byte each
