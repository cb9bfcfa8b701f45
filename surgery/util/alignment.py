"""Alignment: tensors that begin at multiples of 64 bytes in memory.

PyTorch allocates at multiples of 64 bytes, and vectorised kernels may sum in another order where a tensor begins
elsewhere, so that one weight in two places gives outputs that differ in their last bit. Tensors that are mapped from a
file lie where the file has them: our own files have them aligned (`surgery.safetensors.writing`), and what lies
elsewhere in files of others is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.disk.aside import put_aside
from surgery.disk.mapped import places_of

ALIGNMENT = 64  # bytes; PyTorch's own on the CPU, and the width of its widest vectors

MUCH = 128 * 2**20  # bytes of mapped tensors that are not copied for their alignment before they have to run


def align(tensor: Tensor) -> Tensor:
    """The tensor itself where it begins at a multiple of 64 bytes, else a copy that does.

    Example:
        >>> row = torch.zeros(3, 5)[1]
        >>> row.data_ptr() % 64, align(row).data_ptr() % 64
        (20, 0)
    """
    return tensor if is_aligned(tensor) else tensor.clone()


def is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor begins at a multiple of 64 bytes; one that is not in the CPU's memory counts as such."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.numel() > 0
    return not plain or tensor.data_ptr() % ALIGNMENT == 0


@torch.no_grad()
def align_module(module: nn.Module, *, to_run: bool = False) -> nn.Module:
    """Move parameters and buffers that begin elsewhere to multiples of 64 bytes, in place; ties are kept.

    Where that would copy `MUCH` or more of a model that is mapped from files, these tensors stay until the module runs.

    Args:
        module: of any kind.
        to_run: whether it is about to run.
    """
    moved: dict[tuple, Tensor] = {}
    plain = (
        t for t in (*module.parameters(), *module.buffers()) if type(t) in (Tensor, nn.Parameter, nn.Buffer)
    )
    apart = [tensor for tensor in plain if not is_aligned(tensor)]
    if not to_run and sum(tensor.nbytes for tensor in apart) >= MUCH and (stay := places_of(apart)):
        apart = [tensor for tensor in apart if id(tensor) not in stay]
        if _ALIGN_FIRST not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_ALIGN_FIRST)
    for tensor in apart:
        if not is_aligned(tensor):
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if place not in moved:
                moved[place] = put_aside(tensor.detach().clone())
            tensor.data = moved[place]
    return module


class _AlignFirst:
    """Hook before a module runs: moves what is not aligned yet."""

    def __call__(self, module: nn.Module, *args: object) -> None:
        """Align what a call is about to read; not while the module is traced, where nothing is read."""
        if not torch.compiler.is_compiling() and not torch._C._len_torch_function_stack():
            align_module(module, to_run=True)

    def __deepcopy__(self, memo: dict) -> _AlignFirst:
        return self


_ALIGN_FIRST = _AlignFirst()
