"""Calls that torch.compile leaves out of its graphs; importing this module imports torch's compiler.

The functions are made once, here: one that is made where it is needed may be made within a frame that the
compiler traces, which then need not see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from surgery.slots.filler import Filler


def _enter(filler: Filler, name: str, path: str) -> bool:
    return filler.fill_before(name, path)


enter: Callable[[Filler, str, str], bool] = torch.compiler.disable(_enter)  # pyright: ignore[reportAssignmentType]
"""`Filler.enter` outside of every graph."""
