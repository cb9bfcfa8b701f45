"""Templates: the layers of a stack as mixtures of K full sets of a layer's parameters. # Compositional models, 3.2

`W[l] = sum_k A[l, k] * theta[k]`, A the mixtures `[L, K]`, theta the templates `[K, D]`. The squared error of an
approximation whose templates are combinations of the layers, `theta = C W`, is a function of the layers' Gram matrix
`G = W W^T` alone, so all fits here work on L x L numbers, whatever D is. Each is the best of its kind:

    linear    any mixtures: the K principal directions (Eckart and Young)
    softmax   mixtures that are positive and sum to 1: templates are the corners of a simplex around the layers'
              projections onto their K - 1 principal directions about the mean
    one-hot   one template a layer: clustering, by exchange from several starts
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.settings.names import SIGNATURES, Mixing

_INSIDE = (
    0.05  # of 1/K: the least share of a template in a fitted softmax mixture, so that it can still learn
)
_STARTS = 20  # of a clustering


def fit_mixtures(
    gram: Tensor, count: int, mixing: Mixing, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The mixtures and templates that come nearest to the layers.

    Args:
        gram: `[L, L]` inner products of the layers, tensors weighted as their errors count.
        count: K, at most L.
        mixing: which mixtures are allowed.
        generator: on the CPU; decides the starts of a clustering.

    Returns:
        `mixtures [L, K]` and `combine [K, L]`, so that `templates = combine @ layers`; float64.

    Raises:
        ValueError: where K is not between 1 and L.

    Example:
        >>> layers = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
        >>> mixtures, combine = fit_mixtures(layers @ layers.T, 1, "linear", torch.Generator())
        >>> torch.allclose(mixtures @ combine @ layers.double(), layers.double())
        True
    """
    layers = len(gram)
    if not 1 <= count <= layers:
        raise ValueError(f"the number of templates must lie between 1 and {layers}, found {count}")
    gram = gram.double().cpu()
    if mixing == "one-hot":
        return _cluster(gram, count, generator)
    if mixing == "linear":
        vectors = torch.linalg.eigh(gram)[1].flip(1)[:, :count]
        return vectors, vectors.T.contiguous()
    return _enclose(gram, count)


def squared_error(gram: Tensor, mixtures: Tensor, combine: Tensor) -> float:
    """`|W - A C W|^2 / |W|^2`, between 0 and 1 for a fit.

    Args:
        gram: `[L, L]`.
        mixtures: `[L, K]`.
        combine: `[K, L]`.
    """
    gram = gram.double().cpu()
    rest = torch.eye(len(gram), dtype=gram.dtype) - mixtures.double().cpu() @ combine.double().cpu()
    total = float(gram.trace())
    return max(0.0, float((rest @ gram * rest).sum())) / total if total > 0 else 0.0


def solve_templates(mixtures: Tensor) -> Tensor:
    """`combine [K, L]` of the templates that come nearest to the layers with given mixtures `[L, K]`."""
    return torch.linalg.pinv(mixtures.double().cpu())


def signature(kind: str, layers: int, count: int, generator: torch.Generator) -> Tensor:
    """One template number for each layer, by hand: `[L]`.

    `sequential` gives 0011 for four layers and two templates, `cyclic` 0101; `progressive` uses every later template
    one time more than the one before it, as far as layers allow; `random` uses each at least once.

    Raises:
        ValueError: for another kind, or where K is not between 1 and L.

    Example:
        >>> signature("progressive", 6, 3, torch.Generator()).tolist()
        [0, 1, 1, 2, 2, 2]
    """
    if not 1 <= count <= layers:
        raise ValueError(f"the number of templates must lie between 1 and {layers}, found {count}")
    place = torch.arange(layers)
    if kind == "sequential":
        return place * count // layers
    if kind == "cyclic":
        return place % count
    if kind == "progressive":
        ends = torch.arange(1, count + 1).cumsum(0).double() * layers / (count * (count + 1) / 2)
        ends = torch.maximum(ends.round().long(), torch.arange(1, count + 1))
        return torch.searchsorted(ends, place, right=True).clamp_max(count - 1)
    if kind == "random":
        rest = torch.randint(count, (layers - count,), generator=generator)
        every = torch.cat([torch.arange(count), rest])
        return every[torch.randperm(layers, generator=generator)]
    raise ValueError(f"a signature is one of {', '.join(SIGNATURES)}, found '{kind}'")


def entropy(mixtures: Tensor) -> Tensor:
    """Mean entropy of mixtures `[..., K]` that sum to 1, over its greatest value ln K: 0 for signatures, 1 for none.

    Differentiable; 0 where K is 1.
    """
    count = mixtures.shape[-1]
    if count == 1:
        return mixtures.sum() * 0
    each = -(mixtures * mixtures.clamp_min(torch.finfo(mixtures.dtype).tiny).log()).sum(-1)
    return each.mean() / torch.log(torch.tensor(float(count)))


def attraction(gram: Tensor, mixtures: Tensor) -> Tensor:
    """How far layers are from the template that contributes most to them, relative to the templates' size.

    Unlike `entropy`, it moves templates too: each is drawn towards the weights to which it contributes most, so that
    hardening changes little. Mean over layers of `|W[l] - theta[argmax_k A[l, k]]|^2 / mean_k |theta[k]|^2`.

    Args:
        gram: `[K, K]` inner products of the templates, those of their tensors added: K x K elements in place of L x D.
        mixtures: `[L, K]`.
    """
    size = gram.diagonal().mean().detach().clamp_min(torch.finfo(gram.dtype).tiny)
    rest = mixtures - torch.nn.functional.one_hot(mixtures.argmax(1), len(gram)).to(mixtures)
    return (rest @ gram * rest).sum(1).mean() / size


def harden(mixtures: Tensor) -> Tensor:
    """The signature of mixtures `[L, K]`: the template that contributes most to each layer `[L]`."""
    return mixtures.argmax(1)


def _enclose(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Softmax mixtures: barycentric coordinates in a regular simplex that holds all layers' projections."""
    layers = len(gram)
    mean = torch.full((1, layers), 1 / layers, dtype=gram.dtype)
    centre = torch.eye(layers, dtype=gram.dtype) - mean
    if count == 1:
        return torch.ones(layers, 1, dtype=gram.dtype), mean
    values, vectors = torch.linalg.eigh(centre @ gram @ centre.T)
    values, vectors = values.flip(0)[: count - 1], vectors.flip(1)[:, : count - 1]
    length = values.clamp_min(values[0].clamp_min(1e-30) * 1e-12).sqrt()
    corners = _regular_simplex(count).to(gram)  # [K, K-1], rows of norm 1, sums 0
    # Directions are whitened, so that one size of simplex suits all of them; layer l is mean + points[l] * length.
    points = vectors  # [L, K-1]
    slopes = corners * (count - 1) / count  # barycentric: b = 1/K + <p, slope_k> / scale
    least = (points @ slopes.T).min()
    scale = -least / ((1 - _INSIDE) / count)
    mixtures = 1 / count + points @ slopes.T / scale.clamp_min(1e-12)
    # Corner k as a combination of layers: mean + scale * corner * length, the directions being vectors^T W / length.
    directions = vectors.T @ centre / length.unsqueeze(1)
    combine = mean + scale * (corners * length) @ directions
    return mixtures, combine


def _regular_simplex(count: int) -> Tensor:
    """The corners of a regular simplex about 0: `[K, K-1]` of norm 1, float64."""
    centred = torch.eye(count, dtype=torch.float64) - 1 / count
    basis = torch.linalg.svd(centred)[2][: count - 1]
    corners = centred @ basis.T
    return corners / corners.norm(dim=1, keepdim=True)


def _cluster(gram: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """k-means on the layers through their Gram matrix, the best of several starts."""
    layers = len(gram)
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(_STARTS):
        chosen = _spread(gram, count, generator)
        combine = torch.nn.functional.one_hot(chosen, layers).to(gram)
        for _ in range(100):
            distance = (combine @ gram * combine).sum(1) - 2 * gram @ combine.T  # [L, K] up to |W_l|^2
            place = distance.argmin(1)
            mixtures = torch.nn.functional.one_hot(place, count).to(gram)
            empty = mixtures.sum(0) == 0
            after = mixtures.T / mixtures.sum(0).clamp_min(1).unsqueeze(1)
            after[empty] = combine[empty]
            if torch.equal(after, combine):
                break
            combine = after
        error = squared_error(gram, mixtures, combine)
        if best is None or error < best[0]:
            best = (error, mixtures, combine)
    assert best is not None
    return best[1], best[2]


def _spread(gram: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Starts far from one another, drawn by their squared distance to those before (k-means++): `[K]`."""
    size = gram.diagonal()
    chosen = torch.randint(len(gram), (1,), generator=generator)
    while len(chosen) < count:
        distance = size.unsqueeze(1) + size[chosen] - 2 * gram[:, chosen]
        nearest = distance.min(1).values.clamp_min(0)
        nearest[chosen] = 0
        if not bool(nearest.sum() > 0):  # the rest equals what was chosen: any will do
            nearest = torch.ones_like(size)
            nearest[chosen] = 0
        chosen = torch.cat([chosen, torch.multinomial(nearest, 1, generator=generator)])
    return chosen
