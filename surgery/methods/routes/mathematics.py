"""The mathematics of routes: `y[t, d] = sum_i g[t, d, i] * f_i(y[t, d-1])` for task t, depth d and component f_i.

Gumbel routes: K. Maziarz, E. Kokiopoulou, A. Gesmundo, L. Sbaiz, G. Bartok and J. Berent, *Flexible Multi-task
Networks by Learning Parameter Allocation*, 2019, arXiv 1910.04915. A component is on or off for a task by a Bernoulli
variable, whose probability is learned through straight-through Gumbel-softmax samples.
Soft routes: E. Meyerson and R. Miikkulainen, *Beyond Shared Hierarchies: Deep Multitask Learning through Soft Layer
Ordering*, ICLR 2018, arXiv 1711.00108. Each task mixes all components at each depth, by a softmax of learned scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# -- Gumbel-Matrix ---------------------------------------------------------------------------------------------


def bernoulli_logits(probability: Tensor) -> Tensor:
    """Two complementary logits `[..., 2]`, on and off, of probabilities `[...]`: their logarithms.

    Example:
        >>> bernoulli_logits(torch.tensor(0.5)).tolist()
        [-0.6931471824645996, -0.6931471824645996]
    """
    return torch.stack([probability.log(), (-probability).log1p()], -1)


def probability_on(logits: Tensor) -> Tensor:
    """Probabilities `[...]` of being on, of logits `[..., 2]`.

    Example:
        >>> round(probability_on(bernoulli_logits(torch.tensor(0.97))).item(), 4)
        0.97
    """
    return torch.softmax(logits, -1)[..., 0]


def gumbel_noise(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of a shape, float32, on the CPU.

    Args:
        shape: of the logits that it is added to.
        generator: on the CPU; PyTorch's own by default.
    """
    tiny = torch.finfo(torch.float32).tiny
    uniform = torch.rand(tuple(shape), generator=generator).clamp(tiny, 1 - 2**-24)
    return -(-uniform.log()).log()


def sampled(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Straight-through samples z `[...]`, each 0 or 1, of logits `[..., 2]`. # Maziarz et al., the Gumbel-Matrix

    Forward they are the argmax of `log(pi) + Gumbel noise`, which follows Bernoulli(p); backward they have the
    gradient of the softmax of the same sum at a temperature.

    Args:
        logits: complementary, as `bernoulli_logits` makes them.
        noise: as `gumbel_noise` draws it, of the same shape.
        temperature: of the softmax, above 0.
    """
    noisy = logits + noise
    soft = torch.softmax(noisy / temperature, -1)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).to(soft)
    return hard + (soft - soft.detach())


def temperature_at(step: int, start: float = 50.0, least: float = 0.5) -> float:
    """The temperature of the softmax backward, annealed over the batches of all tasks.

    Example:
        >>> temperature_at(0), temperature_at(99), temperature_at(10**6)
        (50.0, 5.0, 0.5)
    """
    return max(least, start / math.sqrt(step + 1))


def shares_of_on(on: Tensor) -> Tensor:
    """Shares g `[..., N]` of components that are on: their mean; all zeros where all are off.

    # Maziarz et al., routing layers

    The mean has a corner where one component is on. Backward, that one is compared with zeros, which would be left
    without it, and each of the others with the mean that it would join.

    Example:
        >>> shares_of_on(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])).tolist()
        [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    """
    fixed = on.detach()
    count = fixed.sum(-1, keepdim=True)
    alone = (count == 1) & (fixed == 1)
    total = torch.where(alone, fixed, on).sum(-1, keepdim=True)
    return on / torch.where(count >= 1, total, torch.ones_like(total))


def shares_or_identity(on: Tensor) -> Tensor:
    """Shares g `[..., N + 1]` of components `[..., N]` that are on and, last, of the identity where all are off.

    Backward, a component that is on alone is compared with the identity, which would stand in for it.

    Example:
        >>> shares_or_identity(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).tolist()
        [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
        >>> z = torch.tensor([1.0])
        >>> torch.autograd.functional.jacobian(shares_or_identity, z).flatten().tolist()
        [1.0, -1.0]
    """
    fixed = on.detach()
    count = fixed.sum(-1, keepdim=True)
    others = (count == 1) & (fixed == 0)
    total = torch.where(others, fixed, on).sum(-1, keepdim=True)
    rest = torch.where(count <= 1, 1 - total, torch.zeros_like(total))
    return torch.cat([shares_of_on(on), rest], -1)


def budget_excess(probability: Tensor, budget: float) -> Tensor:
    """How far the mean probability lies above a budget: 0 below it, linear above. # Maziarz et al., the budget penalty

    Args:
        probability: of being on, of all components of a task.
        budget: the share of them that the task may use on average.

    Example:
        >>> budget_excess(torch.tensor([1.0, 0.5]), 0.5).item(), budget_excess(torch.tensor([0.2]), 0.5).item()
        (0.25, 0.0)
    """
    return (probability.mean() - budget).clamp_min(0)


def most_likely(logits: Tensor) -> Tensor:
    """The likelier value of each z, `[...]` bool, of logits `[..., 2]`; on where both are as likely."""
    return logits[..., 0] >= logits[..., 1]


def strongest(probability: Tensor, count: int) -> Tensor:
    """Which components a task keeps, at all depths together: so many of those likeliest to be on.

    Args:
        probability: of being on `[D, N]`; of equal ones the first count more.
        count: how many are kept.

    Example:
        >>> strongest(torch.tensor([[0.9], [0.2], [0.4]]), 2).flatten().tolist()
        [True, False, True]
    """
    order = probability.flatten().argsort(descending=True, stable=True)[:count]
    kept = torch.zeros(probability.numel(), dtype=torch.bool, device=probability.device)
    kept[order] = True
    return kept.view(probability.shape)


# -- soft ordering ---------------------------------------------------------------------------------------------


def soft_shares(scores: Tensor) -> Tensor:
    """Shares g `[..., N]` of components: the softmax of scores. # Meyerson and Miikkulainen, soft ordering

    Example:
        >>> soft_shares(torch.zeros(4)).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return torch.softmax(scores, -1)


def anchored_shares(scores: Tensor, start: Tensor, own: Tensor, anchor: float) -> Tensor:
    """Soft shares that begin as one component alone, exactly: with anchor 1 at the starting scores they are `own`.

    Args:
        scores: `[..., N]`.
        start: what they were at first.
        own: shares to begin with, one-hot.
        anchor: how much of the difference to `own` is taken away; with 0 these are `soft_shares`.
    """
    return soft_shares(scores) + anchor * (own - soft_shares(start))


# -- both ------------------------------------------------------------------------------------------------------


def mixed(shares: Sequence[Tensor] | Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """`sum_i g_i * f_i`, in the outputs' dtype.

    Args:
        shares: `[N]`.
        outputs: one for each share, of one shape.
    """
    total = shares[0].to(outputs[0].dtype) * outputs[0]
    for share, output in zip(shares[1:], outputs[1:], strict=True):
        total = torch.addcmul(total, share.to(output.dtype), output)
    return total
