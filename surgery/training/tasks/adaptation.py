"""Domain adaptation without target labels: losses by which a member sees a new domain as a source sees the old one.

The member draws on frozen templates of the source; only its mixtures are trained (and running statistics of batch norms
follow). Each way is a loss of a task whose data are target inputs without labels; a new one is a class and a line in
`WAYS`:

    moments     the target's features get the moments of the source's     (M3SDA, Peng et al. 2019, Eq. 1)
    adversary   a discriminator cannot tell them from the source's        (ADDA, Tzeng et al. 2017, Eqs. 7 and 9)

A way is called with the target's module, the path of the part that features reach, the source's features `[N, F]`, the
seed if it takes one, and its own settings by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.errors import PlanError
from surgery.training.tasks.features import SourceFeatures, Tap
from surgery.training.tasks.shared_batches import over_batch
from surgery.training.tasks.tasks import Batch, Loss
from surgery.util.collectives import average


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
        if orders < 1:
            raise ValueError(f"there must be at least one moment, found orders {orders}")
        self.tap, self.source = Tap(module, path), source
        self.mean, self.deviation = source.mean(0), source.std(0, correction=0).clamp_min(1e-6)
        scaled = (source - self.mean) / self.deviation
        self.moments = [scaled.pow(order).mean(0) for order in range(1, orders + 1)]

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        """The loss of what the member just computed."""
        scaled = (self.tap.take_like(self.source) - self.mean) / self.deviation
        found = [over_batch(scaled.pow(k).mean(0), batch) for k in range(1, len(self.moments) + 1)]
        distances = [(mean - moment).norm() for mean, moment in zip(found, self.moments, strict=True)]
        return torch.stack(distances).sum()

    def close(self) -> None:
        """Let go of the member."""
        self.tap.close()


class Adversary:
    """How well a discriminator tells target features from the source's; it learns whenever gradients are recorded.

    Discriminator, optimizer and generator are its state. Processes that share a batch average the discriminator's
    gradients, so that it is the same in all of them.

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
        target = self.tap.take_like(self.source)
        with torch.autocast(target.device.type, enabled=False):
            if torch.is_grad_enabled():
                self._learn(target.detach(), batch)
            scores = self.discriminator.requires_grad_(False)(target)
            self.discriminator.requires_grad_(True)
            # Inverted labels, Eq. (9)
            return F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))

    def _learn(self, target: Tensor, batch: Batch) -> None:
        """One step of the discriminator: source features are 1, target features 0. # Eq. (7)"""
        begin, whole, weight = 0, len(target), 1.0
        if batch.place is not None:  # all processes draw for the whole batch, and take what is theirs
            begin, whole, weight = batch.place.begin, batch.place.whole, batch.place.weight
        rows = torch.randint(len(self.source), (whole,), generator=self.generator)
        rows = rows[begin : begin + len(target)].to(self.source.device)
        scores = self.discriminator(torch.cat([self.source[rows], target]))
        truth = torch.cat([torch.ones(len(target), 1), torch.zeros(len(target), 1)]).to(scores)
        self.optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(scores, truth).backward()
        average([p.grad for p in self.discriminator.parameters() if p.grad is not None], weight)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Tensor]:
        """All that learning changes, by name."""
        found = {
            f"discriminator.{name}": tensor.detach()
            for name, tensor in self.discriminator.state_dict().items()
        }
        for number, parameter in enumerate(self.discriminator.parameters()):
            for name, tensor in self._adam(parameter).items():
                found[f"optimizer.{number}.{name}"] = tensor
        return {**found, "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned."""
        weights = self.discriminator.state_dict()
        self.discriminator.load_state_dict({name: state_dict[f"discriminator.{name}"] for name in weights})
        for number, parameter in enumerate(self.discriminator.parameters()):
            for name, tensor in self._adam(parameter).items():
                tensor.copy_(state_dict[f"optimizer.{number}.{name}"])
        self.generator.set_state(state_dict["generator"].cpu())

    def _adam(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Adam's own tensors of a parameter, made as Adam would where it has not stepped yet."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def close(self) -> None:
        """Let go of the member."""
        self.tap.close()


WAYS: dict[str, Callable[..., Loss]] = {"moments": Moments, "adversary": Adversary}


def adapt_by(name: str, module: nn.Module, source: SourceFeatures | None) -> Loss:
    """The loss of a way of adaptation, for one task.

    Args:
        name: of the way.
        module: the target's member.
        source: what it is compared with.

    Raises:
        PlanError: where there is nothing to compare with, or settings that the way does not take.
    """
    if source is None:
        raise PlanError(
            f"The loss {name} compares a member's features with those of a source, but the task has none: in a recipe "
            "give it 'adaptation' and name an artifact in train.templates.source, in Python give the task source=."
        )
    way = WAYS[name]
    known = [each for each in inspect.signature(way).parameters if each not in ("module", "path", "source")]
    if strange := [each for each in source.settings if each not in known]:
        raise PlanError(
            f"The settings of the loss {name} must be of {', '.join(known)}, found {', '.join(strange)}."
        )
    settings = {**({"seed": source.seed} if "seed" in known else {}), **source.settings}
    device = next((p.device for p in module.parameters()), source.features.device)
    features = source.features.to(device).float()
    try:
        return way(module, source.part, features, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"The settings of the loss {name} must suit it, found {settings}: {error}") from error
