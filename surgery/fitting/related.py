"""Related sites: which tensors of members resemble one another, and the ways of storing them together.

A way is a function that takes a scene and related sites and returns an arrangement, which the allocation then compares
with storing each of them alone. Those of this package lie below `surgery.methods`, in a module `related` each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.anatomy.sites import Site
from surgery.fitting.units import Arrangement, Key
from surgery.settings.names import RELATED

if TYPE_CHECKING:
    from surgery.fitting.scene import Scene

SAMPLE = 1 << 16  # weights compared to find relatives
RESEMBLANCE = 0.3  # least cosine of two of them; unrelated tensors of any real size lie far below

Way = Callable[["Scene", Sequence[Site]], Arrangement]
"""How related sites of one kind, shape, dtype and view are stored together."""

_WAYS: dict[str, Way] = {}


def register_way(name: str) -> Callable[[Way], Way]:
    """Make a way of storing related sites known; a decorator for its function.

    Raises:
        ValueError: where another one has the name.
    """

    def register(way: Way) -> Way:
        if _WAYS.setdefault(name, way) is not way:
            raise ValueError(f"a way of storing related sites named '{name}' is registered already")
        return way

    return register


def ways() -> list[Way]:
    """All ways of storing related sites together, those of this package first."""
    for name in RELATED:
        import_module(f"surgery.methods.{name}.related")
    return [*(_WAYS[name] for name in RELATED), *(way for name, way in _WAYS.items() if name not in RELATED)]


def related_sites(
    sites: Mapping[Key, Site], tensors: Mapping[Key, Tensor], equal: Sequence[Sequence[Key]], seed: int
) -> list[list[Key]]:
    """Groups of sites that resemble one another; tensors that are equal already share and take no part.

    Args:
        sites: to look at.
        tensors: those that can be compared.
        equal: tensors by their bytes.
        seed: of the sample of entries that is compared.
    """
    alone = {keys[0] for keys in equal if len(keys) == 1}
    alike: dict[object, list[Key]] = defaultdict(list)
    for key, site in sites.items():
        if key in tensors and key in alone:
            alike[site.kind, site.shape, site.dtype, site.view].append(key)
    return [
        [keys[i] for i in group]
        for keys in alike.values()
        for group in resembling([tensors[key] for key in keys], seed)
    ]


def resembling(tensors: Sequence[Tensor], seed: int) -> list[list[int]]:
    """Numbers of tensors of one shape that resemble one another, by connected components; single ones left out.

    Args:
        tensors: all of one shape.
        seed: of the sample of entries that is compared.
    """
    if len(tensors) < 2:
        return []
    sample = torch.stack(samples(tensors, seed))
    alike = (sample @ sample.T).abs() > least_cosine(sample.shape[1])
    return [group for group in components(alike) if len(group) > 1]


def samples(tensors: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Entries of tensors of one number of elements, the same of each, at most `SAMPLE` of them, as vectors of length 1.

    Args:
        tensors: taken one after another.
        seed: of the choice of entries.
    """
    found, picked = [], None
    for each in tensors:
        if picked is None:
            numel, generator = each.numel(), torch.Generator().manual_seed(seed)
            picked = (
                torch.randperm(numel, generator=generator)[:SAMPLE] if numel > SAMPLE else torch.arange(numel)
            )
        sample = each.reshape(-1)[picked.to(each.device)].float().cpu()
        found.append(torch.nn.functional.normalize(sample, dim=0))
    return found


def least_cosine(entries: int) -> float:
    """The cosine from which samples of so many entries resemble one another: few do by chance, so six standard
    deviations are asked for as well."""
    return max(RESEMBLANCE, 6 / entries**0.5)


def components(alike: Tensor) -> list[list[int]]:
    """Numbers that are connected, directly or through others, in a symmetric relation `[N, N]`.

    Example:
        >>> components(torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]) > 0)
        [[0, 2], [1]]
    """
    label = torch.arange(len(alike))
    while True:
        lowest = torch.where(alike, label.unsqueeze(0), len(alike)).amin(1).minimum(label)
        if torch.equal(lowest, label):
            return [torch.nonzero(label == each).flatten().tolist() for each in label.unique()]
        label = lowest
