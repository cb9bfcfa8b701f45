"""What the tests of artifacts share: small members of several kinds, and ways to look into a folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import surgery
from surgery.anatomy.plan import place
from surgery.anatomy.sites import discover
from surgery.core.dictionary import Dictionary
from surgery.core.joint import JointModel
from surgery.core.known import Known
from surgery.fitting.report import FitReport, Probes
from surgery.members.member import Inputs, Member, Origin
from surgery.methods.rows.bank import RowsBank
from surgery.safetensors.header import parse_header
from surgery.storage.codecs import Precision, encode, grouped
from surgery.storage.keys import PlainKey
from surgery.storage.stored import Stored, revive, store


class Tied(nn.Module):
    """An embedding whose weight is the last layer's too, with a buffer of whole numbers."""

    def __init__(self, words: int = 40, width: int = 32):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.mix = nn.Linear(width, width)
        self.deep = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.deep(torch.relu(self.mix(self.embed(ids))))))


def seeded(make, seed: int = 0) -> nn.Module:
    """`make()` with weights that depend on `seed` alone, leaving the global generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def stack(width: int = 32, depth: int = 3) -> nn.Sequential:
    layers = [nn.Linear(8, width)]
    for _ in range(depth):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 4))


def member(
    module: nn.Module, name: str, inputs: torch.Tensor, files: dict[str, bytes] | None = None
) -> Member:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return Member(name, module, Inputs((inputs,)), Origin("module", type(module).__name__, kind), files or {})


def pair(dtype: torch.dtype = torch.float32, files: dict[str, bytes] | None = None) -> surgery.JointModel:
    """Two members of one shape, half of whose middle layers are equal, with block shape 8x8."""
    one, two = seeded(stack, 1).to(dtype), seeded(stack, 2).to(dtype)
    with torch.no_grad():
        two[2].weight.copy_(one[2].weight)
        two[4].weight[:16] = one[4].weight[:16] * 2
    x = torch.zeros(2, 8, dtype=dtype)
    return surgery.join([member(one, "one", x, files), member(two, "two", x, files)], block=(8, 8))


def modules(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Architectures for `pair`, with other weights."""
    return {"one": seeded(stack, 8).to(dtype), "two": seeded(stack, 9).to(dtype)}


INT4 = grouped(4, 32)


def fitted(precision: Precision = INT4) -> JointModel:
    """`pair` with plain tensors of `precision` where they are matrices, and a report."""
    joint = pair()
    stored = store(joint)
    tensors = {
        key: encode(each.parts[""], precision) if isinstance(key, PlainKey) and len(each.shape) == 2 else each
        for key, each in stored.tensors.items()
    }
    lossy = Stored(stored.plan, tensors, stored.aliases, stored.ties)
    report = FitReport(
        "max-error 0.5",
        True,
        errors={"one": 0.1, "two": float("nan")},
        saved={"sharing": 10, "precision": 20},
        probes=Probes(7),
    )
    fresh = [member(m, name, torch.zeros(2, 8)) for name, m in modules().items()]
    return revive(fresh, lossy, Known(report))


def hypermodules(seed: int = 0) -> JointModel:
    """Two members on a bank of three hypermodules of c = 2 and some single rows."""
    found = [member(seeded(stack, i), name, torch.zeros(2, 8)) for i, name in enumerate(("one", "two"))]
    sites = [(site, (8, 8)) for each in found for site in discover(each).sites]
    plan = place(["one", "two"], sites, context=2)
    count = plan.banks[0].locations
    generator = torch.Generator().manual_seed(seed)
    psi = torch.randint(0, 5, (count,), generator=generator)
    contexts = torch.randn(count, 2, generator=generator)
    contexts[psi >= 3, 1] = 0
    bank = RowsBank((8, 8), torch.randn(3 * 2 + 2, 64, generator=generator), psi, contexts, 3)
    joint = JointModel(found, plan, Dictionary({plan.banks[0].key: bank}))
    return revive([member(m, n, torch.zeros(2, 8)) for n, m in modules().items()], store(joint))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def size(folder: Path) -> int:
    return sum(len(content) for content in contents(folder).values())


def rewrite(folder: Path, change) -> None:
    """Change a manifest by a function of its JSON, with a right checksum."""
    from surgery.artifact.manifest import manifest_bytes

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("checksum")
    change(manifest)
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))


def rewrite_tensors(folder: Path, file: str, change) -> None:
    """Change the tensors of a file by a function of them all; the manifest says that these were written."""
    path = folder / file
    save_file(change(load_file(path)), path)

    def follow(manifest):
        entry = manifest["files"][file]
        entry.update(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        entry["header"] = parse_header(path).digest

    rewrite(folder, follow)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made inside."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                self.nbytes = max(self.nbytes, each.untyped_storage().nbytes())
        return made


def numbers(shares) -> bytes:
    """What a picture of sharing is drawn from."""
    return json.dumps(asdict(shares), sort_keys=True).encode()
