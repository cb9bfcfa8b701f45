"""Artifacts that run as they are stored: members whose weights stay packed in memory.

A layer's weight is decoded, or generated from rows that are decoded, when it is used, and dropped after. What members
have in common is held once, packed as well. Codes are held as they are stored, but for Huffman coding, and for some
that a few bytes more make faster to decode: `shared` has more of these bytes than `packed`. A cache keeps
decoded weights, and with `shared` what members have in common, from which the weights of each one are generated.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.artifact.guarding import unguard
from surgery.core.joint import JointModel
from surgery.errors import TrainingError
from surgery.members.member import Member
from surgery.slots.slots import forget_derived
from surgery.storage.cache import Cache
from surgery.storage.packed import REFUSED, PackedWeight, held_bytes, moved_together
from surgery.util.devices import pick_device
from surgery.util.memory import compact
from surgery.util.showing import as_html, as_text, plural
from surgery.util.stamps import Stamp, stamps
from surgery.util.wording import size

Resident = Literal["packed", "shared"]


class ResidentModel:
    """Members of an artifact whose weights stay packed in memory.

    Attributes:
        members: by name.
        resident: how: `packed` or `shared`.
        stored_bytes: of all weights in the artifact.
        cache: of decoded tensors; None without one.

    Example:
        >>> import surgery, torch
        >>> packed = surgery.load("joint", resident="packed")
        >>> packed["text"](torch.arange(8)[None]).last_hidden_state.shape
        torch.Size([1, 8, 32])
    """

    def __init__(
        self, members: Mapping[str, Member], resident: Resident, stored_bytes: int, cache: Cache | None = None
    ):
        self.members, self.resident = dict(members), resident
        self.stored_bytes, self.cache = stored_bytes, cache
        self._active: _Active | None = None
        self._sources: dict[str, dict[str, tuple]] = {}  # by member and place, as far as they were asked for
        self._contents: dict[
            int, tuple[weakref.ref, bytes]
        ] = {}  # of what is held, by id: nothing changes it

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(self.members)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights that are held, each once, those in the cache and in what is active included."""
        own = held_bytes(member.module for member in self.members.values())
        own += self.cache.nbytes if self.cache else 0
        return own + (held_bytes([self._active.module]) if self._active else 0)

    def __getitem__(self, name: str) -> nn.Module:
        """The member's module, of its own class, ready to call."""
        self._check(name)
        return self.members[name].module

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> ResidentModel:
        """Move all weights, packed as they are, or cast what they are decoded to; what members share is moved once.

        Args:
            device: where they go, or a dtype.
            dtype: that floating-point weights are decoded to.

        Raises:
            PlanError: where the device is not there.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        place = None if device is None else pick_device(device)
        with moved_together():
            for member in self.members.values():
                member.module.to(place, dtype)  # a cache drops what forms were moved away
        if self._active is not None and dtype is not None:
            self._active = None  # it is made anew, of another dtype
        elif self._active is not None:
            active, cast = self._active, self._active.cast_back()
            now = stamps(_places(active.module))
            same = {k: s for k, s in active.sources.items() if k not in cast and now[k] == active.stamps[k]}
            self._active = _Active.of(active.module.to(place), same)
        return self

    def half(self) -> ResidentModel:
        """`to` float16."""
        return self.to(dtype=torch.float16)

    def bfloat16(self) -> ResidentModel:
        """`to` bfloat16."""
        return self.to(dtype=torch.bfloat16)

    def float(self) -> ResidentModel:
        """`to` float32."""
        return self.to(dtype=torch.float32)

    def cuda(self, device: int | None = None) -> ResidentModel:
        """`to` a CUDA device."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def cpu(self) -> ResidentModel:
        """`to` the CPU."""
        return self.to("cpu")

    def eval(self) -> ResidentModel:
        """Itself: its members never train."""
        return self

    @torch.no_grad()
    def extract(self, name: str) -> nn.Module:
        """A copy of one member with ordinary weights, which trains."""
        from copy import deepcopy

        self._check(name)
        module = deepcopy(self.members[name].module)
        unguard(module)
        made: dict[tuple, nn.Parameter] = {}
        for part in module.modules():
            for attribute, each in part._parameters.items():
                if isinstance(each, PackedWeight):
                    if each.form.key not in made:
                        made[each.form.key] = nn.Parameter(_own(each.unpacked()))
                    setattr(part, attribute, made[each.form.key])
                elif each is not None and each.is_floating_point():
                    each.requires_grad_(True)
        for part in module.modules():
            if isinstance(part, nn.RNNBase):
                part.flatten_parameters()
        forget_derived(module)
        return module

    @torch.no_grad()
    def activate(self, name: str) -> nn.Module:
        """One module with ordinary weights that is a member, and is made another one by what differs.

        Members of one architecture take turns in the same module: tensors that are stored once for both stay. What was
        trained or edited in it meanwhile is put back.

        Args:
            name: the member that it shall be.
        """
        self._check(name)
        theirs = _places(self.members[name].module)
        if name not in self._sources:
            self._sources[name] = {key: self._content(each) for key, each in theirs.items()}
        cast = self._active.cast_back() if self._active else set()
        sources, mine = self._sources[name], _places(self._active.module) if self._active else {}
        if self._active is None or not _alike(mine, theirs):
            module = self.extract(name).eval()
            self._active = _Active.of(module, sources)
            return module
        active, now, written = self._active, stamps(mine), set()
        for key, source in sources.items():
            changed = key in cast or now[key] != active.stamps[key]  # by whoever trained or edited the module
            if (changed or source != active.sources.get(key)) and id(mine[key]) not in written:
                written.add(id(mine[key]))
                each = theirs[key]
                mine[key].copy_(each.unpacked() if isinstance(each, PackedWeight) else each)
        anew = {key: each for key, each in mine.items() if id(each) in written}
        self._active = _Active(active.module, sources, {**now, **stamps(anew)}, active.dtypes)
        forget_derived(active.module)
        return active.module

    def _content(self, tensor: Tensor) -> tuple:
        """Equal for tensors whose stored forms are; each is looked at once."""
        if isinstance(tensor, PackedWeight):
            place = tensor.form.plan and (tensor.form.plan[0].key, str(tensor.form.plan[1].site.view))
            parts = [
                (name, str(each.precision), each.parts) for name, each in sorted(tensor.form.parts.items())
            ]
        else:
            place, parts = None, [("", "", {"": tensor})]
        found = []
        for name, precision, pieces in parts:
            for piece, each in sorted(pieces.items()):
                found.append((name, precision, piece, tuple(each.shape), self._digest(each)))
        return place, tuple(tensor.shape), *found

    def _digest(self, tensor: Tensor) -> bytes:
        known = self._contents.get(id(tensor))
        if known is None or known[0]() is not tensor:  # ids of what is gone are given out again
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            data = flat.numpy().data if flat.numel() else b""
            known = weakref.ref(tensor), hashlib.blake2b(data, digest_size=16).digest()
            self._contents[id(tensor)] = known
        return known[1]

    def __repr__(self) -> str:
        return as_text(self._title(), ["  ".join(row) for row in self._rows()])

    def _repr_html_(self) -> str:
        return as_html(self._title(), ("member", "class", "held by itself"), self._rows())

    def _title(self) -> str:
        what = f"{size(self.resident_bytes)} in memory, {size(self.stored_bytes)} stored"
        return f"ResidentModel of {plural(len(self), 'member')}, {self.resident}: {what}"

    def _rows(self) -> list[list[str]]:
        return [
            [name, type(each.module).__name__, size(held_bytes([each.module]))]
            for name, each in self.members.items()
        ]

    def __getattr__(self, name: str) -> Any:
        if name in _OF_JOINT_MODELS or (not name.startswith("_") and hasattr(JointModel, name)):
            raise _Refused(
                f"A model that is resident as {self.__dict__.get('resident')} has no `{name}`; a member, which is a "
                f"module, may have: take `joint[NAME]`. {REFUSED}"
            )
        raise AttributeError(f"'ResidentModel' object has no attribute '{name}'")

    def _check(self, name: str) -> None:
        if name not in self.members:
            raise KeyError(f"no member '{name}'; the members are {', '.join(self.members)}")


@dataclass(frozen=True)
class _Active:
    """A module that is one member after the other: what its tensors were made from, stamps and dtypes, by place.

    Of what was changed since it is not known what it was made from.
    """

    module: nn.Module
    sources: Mapping[str, tuple]
    stamps: Mapping[str, Stamp]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, module: nn.Module, sources: Mapping[str, tuple]) -> _Active:
        """As the module is now."""
        places = _places(module)
        return cls(module, sources, stamps(places), {key: each.dtype for key, each in places.items()})

    def cast_back(self) -> set[str]:
        """Give tensors of a module that was cast the dtypes of its members, and say which these are, by place."""
        cast = {
            key: each
            for key, each in _places(self.module).items()
            if each.dtype != self.dtypes.get(key, each.dtype)
        }
        for key, each in cast.items():
            each.data = each.data.to(self.dtypes[key])
        return {*cast}


class _Refused(TrainingError, AttributeError):
    """Of what a joint model has and a resident one does not."""


_OF_JOINT_MODELS = ("dictionary", "plan", "known", "encoded", "slots", "filler", "task")
"""What these have beside what their class has."""


def _places(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor at every place where it is."""
    return {
        f"{path}.{name}" if path else name: each
        for path, part in module.named_modules(remove_duplicate=False)
        for name, each in (*part._parameters.items(), *part._buffers.items())
        if each is not None
    }


def _alike(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether the same places hold tensors of the same shape and dtype."""
    return some.keys() == others.keys() and all(
        each.shape == others[key].shape and each.dtype == others[key].dtype for key, each in some.items()
    )


def _own(tensor: Tensor) -> Tensor:
    return compact(tensor).clone()
