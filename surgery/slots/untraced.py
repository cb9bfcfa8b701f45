"""Calls that torch.compile leaves out of its graphs; importing this module imports torch's compiler.

The functions are made once, here: one that is made where it is needed may be made within a frame that the
compiler traces, which then need not see it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from surgery.slots.filler import Filler


@torch.compiler.disable
def enter(filler: Filler, name: str, path: str) -> bool:
    """Fill the slots below a part of a member, as `Filler.enter` does, outside of every graph."""
    return filler.fill_before(name, path)
