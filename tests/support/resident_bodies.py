"""What members that stay packed do on another device than the CPU: bodies of tests for any device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from artifacts import fitted, hypermodules, member, modules, seeded
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import surgery
from surgery.anatomy.plan import place
from surgery.anatomy.sites import discover
from surgery.artifact.resident import ResidentModel
from surgery.core.dictionary import Dictionary
from surgery.core.joint import JointModel
from surgery.methods.siblings.bank import SiblingsBank
from surgery.storage.codecs import Precision, encode
from surgery.storage.keys import PartKey, PlainKey
from surgery.storage.packed import PackedWeight
from surgery.storage.stored import Stored, revive, store

PRECISIONS = (
    "int2/16", "int3/16", "int4/64", "int5/16", "int6/8", "int7/64", "int8/16", "int10/16", "int12/64", "bfloat16",
    "huffman:int3/16", "huffman:bfloat16",
)  # fmt: skip


def draw(*shape: int) -> Tensor:
    """Numbers that follow from a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Many(nn.Module):
    """Layers of many kinds: looked up, multiplied, convolved, recurrent, attended to, and a tied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(90, 64, padding_idx=0)
        self.conv = nn.Conv1d(64, 64, 3, padding=1, groups=2)
        self.lstm = nn.LSTM(64, 32, batch_first=True, bidirectional=True)
        self.mix = nn.ModuleList(nn.Linear(64, 64) for _ in range(len(PRECISIONS)))
        self.attend = nn.MultiheadAttention(
            64, 4
        )  # whose fast path, which sums in another order, is for batches first
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 90, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(40))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.steps[: ids.shape[1], None].to(self.embed.weight.dtype) / 40
        x = self.norm(self.conv(x.mT)).mT
        x = x + self.lstm(x)[0]
        y = x.transpose(0, 1)
        x = x + self.attend(y, y, y, need_weights=False)[0].transpose(0, 1)
        for layer in self.mix:
            x = x + layer(x).tanh()
        return self.head(x)


def stored_as(joint: surgery.JointModel, fresh: list[Any]) -> surgery.JointModel:
    """The same with matrices in all precisions in turn, tables by row."""
    stored, tensors = store(joint), {}
    number = 0
    for key, each in stored.tensors.items():
        if isinstance(key, PlainKey) and len(each.shape) > 1 and each.precision.is_native:
            half = each.shape[0] // 2
            text = (
                f"mixed6.0/16:8x{half},4x{each.shape[0] - half}"
                if "embed" in key.name
                else PRECISIONS[number % 12]
            )
            each, number = encode(each.parts[""], Precision.parse(text)), number + 1
        tensors[key] = each
    return revive(fresh, Stored(stored.plan, tensors, stored.aliases, stored.ties))


IDS = torch.arange(24).view(4, 6) * 3 % 90


def many() -> surgery.JointModel:
    joint = surgery.join([member(seeded(Many), "many", IDS)], block=(8, 8))
    return stored_as(joint, [member(seeded(Many, 4), "many", IDS)])


def family() -> surgery.JointModel:
    """Relatives that share a matrix and differ by products of low rank, all of them in few bits."""

    def members() -> list[Any]:
        return [member(seeded(Wide, n), f"m{n}", draw(4, 32)) for n in range(3)]

    return related(members, "2.weight")


def related(members: Callable[[], list[Any]], name: str, rank: int = 2) -> surgery.JointModel:
    """Members of one architecture, made anew by each call, whose tensor of a name is a shared matrix and products."""
    found = members()
    sites = [site for each in found for site in discover(each).sites if site.name == name]
    (out, into), count = sites[0].shape, len(found)
    plan = place([each.name for each in found], [(site, (1, into)) for site in sites], context=1)
    plan = replace(plan, banks=tuple(replace(bank, method="siblings") for bank in plan.banks))
    shared, owner, rows = draw(out, into) / 12, torch.arange(count).repeat_interleave(rank), rank * count
    contexts = draw(rows, out + 1)[:, :out] / 12
    bank = SiblingsBank(count, shared, draw(rows, into) / 12, contexts, owner, (rows,) if rows else ())
    joint = JointModel(members(), plan, Dictionary({plan.banks[0].key: bank}))
    stored = store(joint)
    tensors = {
        key: encode(each.parts[""], Precision.parse("int4/64"))
        if isinstance(key, PartKey) and key.part != "owner"
        else each
        for key, each in stored.tensors.items()
    }
    return revive(members(), Stored(stored.plan, tensors, stored.aliases, stored.ties))


def Wide() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))


def _cases() -> dict[
    str, tuple[Callable[[], surgery.JointModel], Callable[[], dict[str, nn.Module]], Tensor]
]:
    x = draw(3, 8)
    return {
        "many": (many, lambda: {"many": seeded(Many, 9)}, IDS),
        "family": (family, lambda: {f"m{n}": seeded(Wide, n) for n in range(3)}, draw(4, 32)),
        "fitted": (fitted, modules, x),
        "hypermodules": (hypermodules, modules, x),
    }


CASES = ("many", "family", "fitted", "hypermodules")


def saved(kind: str, folder: Path) -> tuple[Path, Callable[[], dict[str, nn.Module]], Tensor]:
    """An artifact in a folder for all of them, its architectures, and an input."""
    make, architectures, x = _cases()[kind]
    out = folder / kind
    return out if out.exists() else surgery.save(make(), out), architectures, x


def run(net: nn.Module, x: Tensor) -> Any:
    """The member's outputs; cuDNN's advice to compact weights, which packed ones cannot follow, is a fault."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "RNN module weights")
        return net(x)


def close(found: Any, wanted: Any, device: torch.device, tolerance: float = 1e-4) -> None:
    for mine, theirs in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert mine.device.type == device.type and type(mine) is not PackedWeight
        torch.testing.assert_close(mine.cpu().float(), theirs.float(), rtol=tolerance, atol=tolerance)


def held_on(joint: ResidentModel, device: torch.device) -> None:
    """Everything is on the device, as it says itself and in fact."""
    where = torch.zeros(1, device=device).device
    for name in joint:
        for each in (*joint[name].parameters(), *joint[name].buffers()):
            assert each.device == where, (name, each.device)
            if isinstance(each, PackedWeight):
                assert {part.device for part in each.form.tensors} == {where}


def moved_members_compute(
    kind: str,
    way: Any,
    cache: int,
    how: str,
    device: torch.device,
    folder: Path,
    allocated: Callable[[], int],
) -> None:
    """Outputs are the CPU's, what is held on the device is what is said, and the way back changes no bit."""
    folder, architectures, x = saved(kind, folder)
    plain = surgery.load(folder, modules=architectures())
    wanted = {name: run(plain[name], x) for name in plain.names}
    before = allocated()
    if how == "load":
        joint = surgery.load(folder, modules=architectures(), resident=way, cache=cache, device=str(device))
    else:
        joint = surgery.load(folder, modules=architectures(), resident=way, cache=cache)
        said = joint.resident_bytes
        if how == "to":
            assert joint.to(device) is joint
        else:
            for name in joint:
                assert joint[name].to(device) is joint[name]
        # What members have in common is theirs alone where they are moved one by one.
        assert joint.resident_bytes == said or (how == "module" and len(joint) > 1)
    held_on(joint, device)
    assert any(isinstance(p, PackedWeight) for name in joint for p in joint[name].parameters())
    there = x.to(device)
    held = allocated() - before - there.nbytes
    pieces = sum(1 for name in joint for _ in joint[name].parameters()) * 8
    assert joint.resident_bytes <= held <= joint.resident_bytes + 512 * pieces  # an allocator rounds up
    for _ in range(2):
        for name in joint:
            close(run(joint[name], there), wanted[name], device)
    if not cache:
        tables = 40 << 10  # of what spreads bits, made once
        assert allocated() - before - there.nbytes <= held + tables
    else:
        assert joint.cache is not None and {each.device.type for each in joint.cache.tensors} <= {device.type}
    for name in joint:
        close(run(joint.activate(name), there), wanted[name], device)
        close(run(joint.extract(name), there), wanted[name], device)
    joint.to("cpu")
    held_on(joint, torch.device("cpu"))
    for name in joint:
        assert all(map(torch.equal, tree_leaves(run(joint[name], x)), tree_leaves(wanted[name])))


def casts_stay_packed(dtype: torch.dtype, device: torch.device, folder: Path) -> None:
    """A cast on the device holds the same codes and gives what a cast plain model gives."""
    folder, architectures, x = saved("many", folder)
    joint = surgery.load(folder, modules=architectures(), resident="packed", device=str(device))
    plain = surgery.load(folder, modules=architectures()).extract("many").eval().to(device, dtype)
    net = joint["many"].to(dtype)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert sum(isinstance(p, PackedWeight) for p in net.parameters()) >= len(PRECISIONS)
    close(run(net, x.to(device)), tree_map(lambda t: t.cpu(), run(plain, x.to(device))), device, 0.1)
    again = surgery.load(folder, modules=architectures(), resident="packed", device=str(device))["many"]
    with torch.autocast(device.type, dtype=dtype):
        run(again, x.to(device))


def members_take_turns(device: torch.device, folder: Path) -> None:
    """One module on the device is one member after the other; a move in between is no harm."""
    folder, architectures, x = saved("fitted", folder)
    plain = surgery.load(folder, modules=architectures())
    joint = surgery.load(folder, modules=architectures(), resident="packed", device=str(device))
    first = joint.activate("one")
    places = {name: t.data_ptr() for name, t in first.state_dict(keep_vars=True).items()}
    for name in ("two", "one", "two"):
        assert joint.activate(name) is first
        close(run(first, x.to(device)), run(plain[name], x), device)
    assert places == {name: t.data_ptr() for name, t in first.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for weight in first.parameters():
            weight.add_(1)
    close(run(joint.activate("two"), x.to(device)), run(plain["two"], x), device)
    joint.to("cpu")  # with what is active, and with what was edited in it
    with torch.no_grad():
        first[2].weight.add_(1)  # pyright: ignore
    close(run(joint.to(device).activate("two"), x.to(device)), run(plain["two"], x), device)


def extracted_trains(device: torch.device, folder: Path) -> None:
    """What is extracted on the device has ordinary weights there, all of which get gradients."""
    folder, architectures, x = saved("many", folder)
    joint = surgery.load(folder, modules=architectures(), resident="packed", device=str(device))
    net = joint.extract("many").train()
    net(x.to(device)).float().square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.device.type == device.type, name


def one_weight_at_a_time(
    device: torch.device, folder: Path, peak: Callable[[Callable[[], Any]], int]
) -> None:
    """Beside activations a forward pass holds no more than the weight that is used and what it is decoded from.

    Args:
        device: where.
        folder: for artifacts.
        peak: the most bytes that are allocated more while something runs.
    """

    def layers() -> nn.Module:
        return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in PRECISIONS))

    made = [member(seeded(layers, n), "net", draw(2, 1024)) for n in range(2)]
    out = surgery.save(stored_as(surgery.join(made[:1]), made[1:]), folder / "layers")
    joint = surgery.load(out, modules={"net": seeded(layers, 2)}, resident="packed", device=str(device))
    net, x = joint["net"], draw(2, 1024).to(device)
    run(net, x)
    assert peak(lambda: run(net, x)) < 4 * 1024 * 1024 * 4
