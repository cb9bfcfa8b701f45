"""Calls that torch.compile leaves out of its graphs; importing this module imports torch's compiler.

The functions are made once, here: one that is made where it is needed may be made within a frame that the
compiler traces, which then need not see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo  # before the next one, which it imports in a circle
from torch._functorch._aot_autograd import runtime_wrappers

from surgery.slots.slots import Slot

if TYPE_CHECKING:
    from surgery.slots.filler import Filler


def _enter(filler: Filler, name: str, path: str) -> bool:
    return filler.fill_before(name, path)


enter: Callable[[Filler, str, str], bool] = torch.compiler.disable(_enter)  # pyright: ignore[reportAssignmentType]
"""`Filler.enter` outside of every graph."""


def _let_pass(types: Any) -> None:
    """Have graphs take slots for the plain tensors that they are.

    In PyTorch 2.14 the first run of a graph checks custom operators for outputs that share memory, and
    refuses subclasses of tensors that it does not know; some backends then call operators on what modules hold.
    """
    if types is not None and Slot not in types:
        runtime_wrappers.HANDLED_TYPES = (*types, Slot)  # pyright: ignore[reportPrivateImportUsage]


_let_pass(getattr(runtime_wrappers, "HANDLED_TYPES", None))
