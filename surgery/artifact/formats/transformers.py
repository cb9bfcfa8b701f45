"""The format `transformers`: a compressed checkpoint that `from_pretrained` decodes, where `surgery` is imported.

Every parameter of the class has a tensor of its name: itself, or a marker whose codes lie beside
(`surgery.artifact.codes`). Without the import transformers does not find the file of weights that the configuration
names, and where it is told another one, markers of another shape: it raises.
`surgery.integrations.transformers` reads it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from surgery.artifact.codes import PREFIX, compressed_names, pack
from surgery.artifact.formats.checkpoint import architecture, checkpoint_names, write_checkpoint
from surgery.artifact.sums import as_entry, hashes_beside, sum_of
from surgery.errors import ExportError
from surgery.members.member import Member
from surgery.storage.states import lazy_state_of
from surgery.storage.stored import Stored
from surgery.storage.trim import trim

METHOD = "surgery"
"""What `quantization_config` calls it."""
NO_FILE = "import-surgery-before-from_pretrained.safetensors"
"""What the configuration says that weights lie in; nothing does, and the quantizer takes it away."""


def write_transformers(folder: Path, stored: Stored, member: Member, trust: bool = False) -> None:
    """Write a compressed checkpoint.

    Args:
        folder: in which it is written.
        stored: of this member alone, on the CPU.
        member: as it is described where it is stored.
        trust: whether Python files that come with it may run.

    Raises:
        ExportError: where it is no model of transformers as it is, or tensors have names of the format's.
    """
    module = architecture(member, stored, "transformers", trust)
    stored = trim(stored)
    state, codes = lazy_state_of(stored, member.name), compressed_names(stored, member.name)
    document, packed = pack(stored, member.name)
    names = [name for name in checkpoint_names(module) if name in state]
    if taken := [name for name in names if name.startswith(PREFIX)]:
        raise ExportError(
            f"Names that begin with {PREFIX} are those of codes, but member '{member.name}' has "
            f"{', '.join(taken[:3])}; export it as compressed."
        )
    own: dict[str, Tensor] = {
        name: torch.empty(0, dtype=codes[name]) if name in codes else _apart(state[name]) for name in names
    }
    dtypes = {each.dtype for each in state.handles.values()}
    tensors = {**own, **packed}
    document["sums"] = as_entry({name: sum_of(each) for name, each in tensors.items()})
    if beside := hashes_beside(member.files):
        document["beside"] = beside
    entries = {"quantization_config": {"quant_method": METHOD, **document}, "transformers_weights": NO_FILE}
    write_checkpoint(folder, module, member, tensors, entries, dtypes)


def _apart(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()
