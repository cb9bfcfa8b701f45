"""Domain adaptation without target labels: a member learns to see a new domain as its twin sees the old one.

Both members draw on the same frozen templates; of the target's member only the mixtures are trained (and running
statistics of batch norms follow). Two losses, each for a `surgery.Task` whose data are unlabelled target inputs:

    Moments     the target's features get the moments of the source's     (M3SDA, Peng et al. 2019, Eq. 1)
    Adversary   a discriminator cannot tell them from the source's        (ADDA, Tzeng et al. 2017, Eqs. 7 and 9)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.errors import PlanError
from surgery.joint import JointModel
from surgery.training.tasks import Batch, as_batch


class Tap:
    """Keeps what reaches a module of a member: the features in front of a head.

    Args:
        module: the member's.
        path: of the part whose first input is kept, for example `head`.

    Raises:
        PlanError: where there is no such part.
    """

    def __init__(self, module: nn.Module, path: str):
        try:
            part = module.get_submodule(path)
        except AttributeError:
            known = ", ".join(name for name, _ in module.named_children())
            raise PlanError(
                f"Features are what reaches a module, but there is no '{path}'; there are {known}."
            ) from None
        self.path = path
        self.features: Tensor | None = None
        self._hook = part.register_forward_pre_hook(self._keep)

    def _keep(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        self.features = args[0].flatten(1)

    def take(self) -> Tensor:
        """The features of the last forward pass `[B, F]`, once.

        Raises:
            PlanError: where the part did not run.
        """
        found, self.features = self.features, None
        if found is None:
            raise PlanError(f"'{self.path}' did not run in the member's forward pass, so it has no features.")
        return found

    def close(self) -> None:
        """Keep nothing any more."""
        self._hook.remove()


@torch.no_grad()
def features_of(joint: JointModel, member: str, data: Iterable[Any], path: str) -> Tensor:
    """The features `[N, F]` of a member on some data, in eval mode.

    Args:
        joint: whose member it is.
        member: its name.
        data: batches, as a task takes them.
        path: of the part that they reach.
    """
    module = joint[member]
    tap, training = Tap(module, path), module.training
    device = next((p.device for p in joint.parameters()), torch.device("cpu"))
    module.eval()
    try:
        found = []
        for raw in data:
            batch = as_batch(raw).map(lambda tensor: tensor.to(device))
            module(*batch.args, **batch.kwargs)
            found.append(tap.take())
        return torch.cat(found)
    finally:
        module.train(training)
        tap.close()


class Moments:
    """The distance of the first moments of target features from those of the source.

    `sum_k |mean(source^k) - mean(target^k)|`, features scaled by the source's deviations, so that all count alike.

    Args:
        module: the target's member.
        path: of the part that features reach.
        source: features `[N, F]` of the source's member, which does not change.
        orders: how many moments.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        >>> loss = Moments(net, "1", torch.randn(8, 3))
        >>> float(loss(net(torch.randn(4, 3)), Batch())) > 0
        True
    """

    def __init__(self, module: nn.Module, path: str, source: Tensor, orders: int = 2):
        self.tap = Tap(module, path)
        self.mean, self.deviation = source.mean(0), source.std(0, correction=0).clamp_min(1e-6)
        scaled = (source - self.mean) / self.deviation
        self.moments = [scaled.pow(order).mean(0) for order in range(1, orders + 1)]

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        """The loss of what the member just computed."""
        scaled = (self.tap.take().float() - self.mean) / self.deviation
        distances = [(scaled.pow(k).mean(0) - moment).norm() for k, moment in enumerate(self.moments, 1)]
        return torch.stack(distances).sum()


class Adversary:
    """How well a discriminator tells target features from the source's; it learns whenever gradients are recorded.

    Args:
        module: the target's member.
        path: of the part that features reach.
        source: features `[N, F]` of the source's member, which does not change.
        width: of the discriminator's hidden layer.
        lr: learning rate of the discriminator.
        seed: of its weights and of the source features that it sees.
    """

    def __init__(
        self, module: nn.Module, path: str, source: Tensor, width: int = 64, lr: float = 1e-3, seed: int = 0
    ):
        self.tap, self.source = Tap(module, path), source
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = nn.Linear(source.shape[1], width), nn.ReLU(), nn.Linear(width, 1)
            self.discriminator = nn.Sequential(*layers).to(source.device)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=lr)

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        """The loss of what the member just computed; while gradients are recorded the discriminator learns first."""
        target = self.tap.take().float()
        if torch.is_grad_enabled():
            self._learn(target.detach())
        scores = self.discriminator.requires_grad_(False)(target)
        self.discriminator.requires_grad_(True)
        return F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))  # inverted labels, Eq. (9)

    def _learn(self, target: Tensor) -> None:
        """One step of the discriminator: source features are 1, target features 0. # Eq. (7)"""
        rows = torch.randint(len(self.source), (len(target),), generator=self.generator)
        scores = self.discriminator(torch.cat([self.source[rows.to(self.source.device)], target]))
        truth = torch.cat([torch.ones(len(target), 1), torch.zeros(len(target), 1)]).to(scores)
        self.optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(scores, truth).backward()
        self.optimizer.step()
