"""State dicts of handles, which read like those of tensors and hold one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from surgery.handles.handle import Handle, Resident, read


class LazyState(Mapping[str, Any]):
    """A state dict of handles that reads like one of tensors: `state[name]` reads, and keeps nothing.

    What is no handle, such as extra state, is given as it is. Names that are tied have one handle, but a tensor each
    time that it is read.

    Example:
        >>> state = LazyState({"a": Made((2,), torch.int64, CPU, lambda: torch.arange(2)), "step": 3})
        >>> state["a"], state["step"], state.handles["a"].nbytes
        (tensor([0, 1]), 3, 16)
    """

    def __init__(self, entries: Mapping[str, Any]):
        self.entries = dict(entries)

    @property
    def handles(self) -> dict[str, Handle]:
        """The handles by name."""
        return {name: each for name, each in self.entries.items() if isinstance(each, Handle)}

    def __getitem__(self, name: str) -> Any:
        return read(self.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read
        return name in self.entries

    def look(self, name: str) -> Any:
        """An entry as `state[name]` gives it, for somebody who does not write to it."""
        entry = self.entries[name]
        return entry.look() if isinstance(entry, Handle) else entry

    def resident(self, *, writable: bool = True) -> dict[str, Any]:
        """All of it read: an ordinary dict, in which tied names have one tensor.

        Args:
            writable: whether somebody may write to the tensors; those that are mapped are copied then.
        """
        made: dict[int, Any] = {}
        for name, each in self.entries.items():
            if id(each) not in made:
                made[id(each)] = read(each) if writable else self.look(name)
        return {name: made[id(each)] for name, each in self.entries.items()}


def handles_of(state: Mapping[str, Any]) -> dict[str, Handle]:
    """Handles of a state dict's tensors, of handles or resident; extra state is left out."""
    if isinstance(state, LazyState):
        return state.handles
    return {name: Resident(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}
