"""Metrics by name, from torchmetrics; a new one is a line in `METRICS`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from surgery.errors import PlanError
from surgery.training.tasks import Batch, prediction_of

if TYPE_CHECKING:
    from torchmetrics import Metric


ALONE: dict[str, Any] = {"sync_on_compute": False}  # every process measures all the data


@dataclass(frozen=True)
class Measure:
    """A metric: how it is made, and what it is shown.

    Attributes:
        make: the torchmetrics metric, from the shape of the first prediction.
        pair: prediction and target as that metric wants them.
    """

    make: Callable[[tuple[int, ...]], Metric]
    pair: Callable[[Tensor, Any], tuple[Tensor, Any]]


def _classes(prediction: Tensor, target: Any) -> tuple[Tensor, Any]:
    return prediction.flatten(0, -2), target.flatten()


def _flat(prediction: Tensor, target: Any) -> tuple[Tensor, Any]:
    return prediction.float().flatten(), target.float().flatten()


def _scores(prediction: Tensor, target: Any) -> tuple[Tensor, Any]:
    return prediction.float().flatten(), target.long().flatten()


def _accuracy(shape: tuple[int, ...]) -> Metric:
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy(num_classes=shape[-1], average="micro", **ALONE)


def _regression(name: str, **options: Any) -> Callable[[tuple[int, ...]], Metric]:
    def make(shape: tuple[int, ...]) -> Metric:
        import torchmetrics.regression

        return getattr(torchmetrics.regression, name)(**ALONE, **options)

    return make


def _perplexity(shape: tuple[int, ...]) -> Metric:
    from torchmetrics.text import Perplexity

    return Perplexity(ignore_index=-100, **ALONE)


def _auroc(shape: tuple[int, ...]) -> Metric:
    from torchmetrics.classification import BinaryAUROC

    return BinaryAUROC(**ALONE)


def _as_is(prediction: Tensor, target: Any) -> tuple[Tensor, Any]:
    return prediction.float(), target


METRICS: dict[str, Measure] = {
    "accuracy": Measure(_accuracy, _classes),
    "mse": Measure(_regression("MeanSquaredError"), _flat),
    "rmse": Measure(_regression("MeanSquaredError", squared=False), _flat),
    "mae": Measure(_regression("MeanAbsoluteError"), _flat),
    "pearson": Measure(_regression("PearsonCorrCoef"), _flat),
    "spearman": Measure(_regression("SpearmanCorrCoef"), _flat),
    "perplexity": Measure(_perplexity, _as_is),
    "auroc": Measure(_auroc, _scores),
}


class Meter:
    """One task's metric over one pass of its data.

    Args:
        wanted: a name, a torchmetrics metric, or None for none.

    Raises:
        PlanError: for a name that is not known.
    """

    def __init__(self, wanted: Any):
        if isinstance(wanted, str) and wanted not in METRICS:
            near = difflib.get_close_matches(wanted, METRICS, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(METRICS)}"
            raise PlanError(f"There is no metric '{wanted}', {advice}")
        self.wanted, self.metric = wanted, None if isinstance(wanted, str) else wanted
        if self.metric is not None:
            self.metric.reset()

    def update(self, output: Any, batch: Batch) -> None:
        """Add a batch."""
        if self.wanted is None or batch.target is None:
            return
        prediction, target = prediction_of(output), batch.target
        if isinstance(self.wanted, str):
            measure = METRICS[self.wanted]
            if self.metric is None:
                self.metric = measure.make(tuple(prediction.shape)).to(prediction.device)
            prediction, target = measure.pair(prediction, target)
        assert self.metric is not None
        self.metric.update(prediction, target)

    @property
    def name(self) -> str | None:
        """The metric's name, None where there is none."""
        return (
            self.wanted if self.wanted is None or isinstance(self.wanted, str) else type(self.wanted).__name__
        )

    def value(self) -> float | None:
        """The metric over all batches; None where there is none."""
        if self.wanted is None or self.metric is None:
            return None
        value = float(self.metric.compute())
        return value if math.isfinite(value) else None
