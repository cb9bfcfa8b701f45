"""Dictionary: all banks of a joint model.

A bank that was read from an artifact can be had again, bit for bit, from its stored form. It *rests* once slots are
filled with what it generates: its rows, as large as the weights or larger, are not in memory. Whoever asks for it, to
train, to save, or to fit, gets an ordinary bank, which is made then and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import Placement
from surgery.core.bank import Bank
from surgery.util.stamps import Stamp


@dataclass
class Source:
    """What a bank can be made from again.

    Attributes:
        make: makes the bank: with equal values each time.
        token: stands for the bank's versions and stamp as long as it is what was made.
        made: versions and stamp of the bank that was made last; None before, and of a copy.
        learns: as of the bank.
        by_task: as of the bank.
        empty: a tensor without elements, of the bank's dtype and device.
    """

    make: Callable[[], Bank]
    token: object = field(default_factory=object)
    made: tuple[Stamp, Stamp] | None = None
    learns: bool | None = None
    by_task: bool | None = None
    empty: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> Source:
        return Source(self.make, self.token, None, self.learns, self.by_task, self.empty)


class _Resting(nn.Module):
    """A placeholder for a bank that rests."""


class Banks(nn.ModuleDict):
    """Banks by key, of which some rest until somebody asks for them, for their parameters, or for all modules.

    Args:
        banks: banks, or sources of banks that rest at first.
    """

    def __init__(self, banks: Mapping[str, Bank | Source]):
        self.sources: dict[str, Source] = {}
        super().__init__({key: bank for key, bank in banks.items() if isinstance(bank, Bank)})
        for key, source in banks.items():
            if isinstance(source, Source):
                super().__setitem__(key, _Resting())
                self.sources[key] = source
        self._modules = {key: self._modules[key] for key in banks}

    def rests(self, key: str) -> bool:
        """Whether a bank is not in memory."""
        return isinstance(self._modules[key], _Resting)

    def wake(self) -> None:
        """Make all banks that rest."""
        for key in self:
            self[key]

    def rest(self, key: str) -> None:
        """Let a bank rest that is what its source made; others stay."""
        source, bank = self.sources.get(key), self._modules[key]
        if source is None or not isinstance(bank, Bank) or source.made is None:
            return
        if bank.stamp() == source.made[1] and bank.learns == source.learns:
            resting = _Resting()
            resting.training = bank.training
            self._modules[key] = resting

    def __getitem__(self, key: str) -> nn.Module:
        found = super().__getitem__(key)
        return self._made(key, found) if isinstance(found, _Resting) else found

    def _made(self, key: str, resting: _Resting) -> Bank:
        source = self.sources[key]
        with torch.inference_mode(False), torch.no_grad():
            bank = source.make().train(resting.training)
        source.made = bank.versions(), bank.stamp()
        source.learns, source.by_task = bank.learns, bank.by_task
        source.empty = torch.empty(0, dtype=bank.dtype, device=bank.device)
        self._modules[key] = bank
        return bank

    # -- as of any module of modules ---------------------------------------------------------------------------

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self.sources.pop(key, None)
        super().__setitem__(key, module)

    def __delitem__(self, key: str) -> None:
        self.sources.pop(key, None)
        super().__delitem__(key)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self[name] if isinstance(found, _Resting) else found

    def items(self) -> Any:
        """Keys and banks, all of them made."""
        self.wake()
        return super().items()

    def values(self) -> Any:
        """All banks, made."""
        self.wake()
        return super().values()

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """`nn.Module.named_modules` once all banks are made, since parameters are found through it."""
        self.wake()
        return super().named_modules(*args, **kwargs)

    def apply(self, fn: Callable[[nn.Module], None]) -> Banks:
        """`nn.Module.apply` once all banks are made."""
        self.wake()
        return super().apply(fn)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Banks:
        for key, source in self.sources.items():
            if self.rests(key) and (source.empty is None or not _alike(fn(source.empty), source.empty)):
                self[key]
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.wake()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.wake()
        super()._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Banks:
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(deepcopy(vars(self), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self.wake()
        return {**vars(self), "sources": {}}


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device)


class Dictionary(nn.Module):
    """All banks of a joint model, by key (`"16x16-float32"`).

    Args:
        banks: banks, or sources of banks that rest until they are asked for.
    """

    def __init__(self, banks: Mapping[str, Bank | Source] | None = None):
        super().__init__()
        self.banks = Banks(banks or {})

    def __getitem__(self, key: str) -> Bank:
        bank = self.banks[key]
        assert isinstance(bank, Bank)
        return bank

    def __iter__(self) -> Iterator[str]:
        return iter(self.banks)

    def keys(self) -> list[str]:
        """The banks' keys."""
        return list(self.banks.keys())

    # -- what is known of banks that rest ----------------------------------------------------------------------

    def rests(self, key: str) -> bool:
        """Whether a bank is not in memory, and is made when it is asked for."""
        return self.banks.rests(key)

    def resting(self) -> list[str]:
        """Keys of the banks that rest."""
        return [key for key in self if self.rests(key)]

    def rest(self, keys: Iterable[str]) -> None:
        """Let banks rest that are what their sources made, and that nobody else refers to; others stay."""
        for key in keys:
            if key in self.banks:
                self.banks.rest(key)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Inside, banks that rest are made for a passing use; afterwards those that did not change rest again."""
        resting = self.resting()
        try:
            yield
        finally:
            self.rest(resting)

    def versions(self, key: str) -> Stamp:
        """The versions of a bank; one that rests has them without being made."""
        return self._known(key, 0) or self[key].versions()

    def stamp(self, key: str) -> Stamp:
        """The stamp of a bank; one that rests has it without being made."""
        return self._known(key, 1) or self[key].stamp()

    def _known(self, key: str, which: int) -> Stamp:
        """The token that stands for the versions (0) or the stamp (1) of a bank while it is what its source made; else
        empty.
        """
        source = self.banks.sources.get(key)
        if source is None:
            return ()
        if self.rests(key):
            return (source.token,)
        bank = self[key]
        same = source.made is not None and source.made[which] == (bank.stamp() if which else bank.versions())
        return (source.token,) if same else ()

    @property
    def learns(self) -> bool:
        """Whether any bank has parameters that require gradients."""
        known = [self.banks.sources[key].learns if self.rests(key) else self[key].learns for key in self]
        unknown = (key for key, learns in zip(self, known, strict=True) if learns is None)
        with self.borrowed():
            return True in known or any(self[key].learns for key in unknown)

    def by_task(self, key: str) -> bool:
        """Whether a bank's blocks depend on the task that is served."""
        known = self.banks.sources[key].by_task if self.rests(key) else None
        with self.borrowed():
            return self[key].by_task if known is None else known

    def lent(self, key: str) -> Iterable[tuple[Placement, Tensor]]:
        """Sites whose whole weight a bank holds as it is, with these weights; a bank that rests holds none."""
        return () if self.rests(key) else self[key].lent()


def index_dtype(count: int) -> torch.dtype:
    """The smallest integer type that numbers `count` things."""
    return torch.uint8 if count <= 1 << 8 else torch.uint16 if count <= 1 << 16 else torch.int32
