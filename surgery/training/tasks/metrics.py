"""Metrics by name, from torchmetrics: `f1`, `r2`, `top5`, or the name of any of its classes, with arguments.

A name for classification means what the data say, with outputs `[..., C]`:

    targets `[...]`, C > 2               one class of C (`multiclass`)
    targets `[...]`, C = 2               yes or no (`binary`); the score of yes is the second less the first
    targets `[..., C]`, or C = 1         yes or no for every score, all counted together (`binary`)

or what the argument `task` says: `binary`, `multiclass`, or `multilabel`, each of `[B, C]` labels measured by itself.
Scores are logits, as the losses take them, and are made probabilities; a member that gives probabilities is measured by
a class's own name, such as `BinaryF1Score`, which sees outputs and targets as they are. Targets of -100 do not count.

A metric is updated batch by batch. Of several processes each measures all data, so nothing is gathered.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from surgery.errors import PlanError
from surgery.settings.problems import advice_on
from surgery.training.tasks.tasks import Batch, prediction_of

if TYPE_CHECKING:
    from torchmetrics import Metric

IGNORED = -100
KINDS = ("Binary", "Multiclass", "Multilabel")
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "accuracy": ("Accuracy", {"average": "micro"}),
    "f1": ("F1Score", {}),
    "precision": ("Precision", {}),
    "recall": ("Recall", {}),
    "average_precision": ("AveragePrecision", {}),
    "auroc": ("AUROC", {}),
    "r2": ("R2Score", {}),
    "mse": ("MeanSquaredError", {}),
    "rmse": ("MeanSquaredError", {"squared": False}),
    "mae": ("MeanAbsoluteError", {}),
    "pearson": ("PearsonCorrCoef", {}),
    "spearman": ("SpearmanCorrCoef", {}),
    "perplexity": ("Perplexity", {"ignore_index": IGNORED}),
}
"""Names of our own: a class of torchmetrics, and arguments that it gets unless others are given."""

_TOP = re.compile(r"top[-_]?([1-9]\d*)")
_WHOLE = ("classification", "regression", "clustering", "nominal", "segmentation")
_CHOSEN = {  # classes of other rooms that need neither words nor another model
    "text": ("Perplexity",),
    "image": (
        "PeakSignalNoiseRatio", "StructuralSimilarityIndexMeasure", "MultiScaleStructuralSimilarityIndexMeasure",
        "UniversalImageQualityIndex", "TotalVariation", "SpectralAngleMapper",
    ),
    "audio": ("SignalNoiseRatio", "ScaleInvariantSignalNoiseRatio", "ScaleInvariantSignalDistortionRatio"),
}  # fmt: skip
_PROCESSES = ("sync_on_compute", "dist_", "process_group", "compute_", "distributed_")

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Prediction and target as a metric wants them."""


@dataclass(frozen=True)
class Measure:
    """What a metric's name stands for.

    Attributes:
        title: the name with its arguments, as it is shown.
        makers: classes of torchmetrics by kind of task, or one under the empty name, whatever the task.
        pair: how that one sees outputs and targets.
        options: arguments that were given.
        preset: arguments that hold where a class takes them.
    """

    title: str
    makers: Mapping[str, type[Metric]]
    pair: Pair
    options: Mapping[str, Any] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)


def measure_of(wanted: str | Mapping[str, Any]) -> Measure:
    """What a metric's name stands for.

    Args:
        wanted: a name, or one name with its arguments.

    Raises:
        PlanError: for a name or an argument that is not known; it says what is.

    Example:
        >>> measure_of({"f1": {"average": "micro"}}).title
        'f1(average=micro)'
    """
    if not isinstance(wanted, str) and len(wanted) != 1:
        raise PlanError(
            "A metric must be a name, or one name with its arguments such as {f1: {average: macro}}, found "
            f"{', '.join(map(str, wanted)) or 'none'}."
        )
    name, given = (wanted, None) if isinstance(wanted, str) else next(iter(wanted.items()))
    if not isinstance(name, str) or not isinstance(given, Mapping | None):
        raise PlanError(f"The arguments of metric '{name}' must be a mapping, found {given!r}.")
    options = dict(given or {})
    written = ", ".join(f"{key}={value}" for key, value in options.items())
    title = f"{name}({written})" if written else name
    if top := _TOP.fullmatch(name):
        makers = {"Multiclass": known_metrics()["accuracy"][1]["Multiclass"]}
        return _checked(Measure(title, makers, _numbers, options, {"average": "micro", "top_k": int(top[1])}))
    target, preset = SHORT.get(name, (name, {}))
    room, makers = known_metrics().get(_plain(target), ("", {}))
    if not makers:
        own = [*SHORT, "top5"]
        advice = advice_on(name, [*own, *_titles()], show=[*own, "the classes of torchmetrics"])
        raise PlanError(f"There is no metric '{name}', {advice}")
    pair = _numbers if name in SHORT and room != "text" else _columns if room == "regression" else _as_is
    pair = _columns if name == "r2" else pair
    return _checked(Measure(title, makers, pair, options, preset))


@cache
def known_metrics() -> dict[str, tuple[str, Mapping[str, type[Metric]]]]:
    """Rooms and classes of torchmetrics by their names without capitals; those for each kind of task by kind."""
    from torchmetrics import Metric

    found: dict[str, tuple[str, Mapping[str, type[Metric]]]] = {}
    for room in (*_WHOLE, *_CHOSEN):
        module = importlib.import_module(f"torchmetrics.{room}")
        for name in _CHOSEN.get(room, getattr(module, "__all__", ())):
            made = getattr(module, name, None)
            if isinstance(made, type) and issubclass(made, Metric):
                kinds = {kind: getattr(module, f"{kind}{name}", None) for kind in KINDS}
                makers = {kind: each for kind, each in kinds.items() if each is not None}
                found.setdefault(_plain(name), (room, makers or {"": made}))
    return found


class Meter:
    """One task's metric over one pass of its data.

    Args:
        wanted: a name, a name with its arguments, a torchmetrics metric, or None for none.

    Raises:
        PlanError: for a name or an argument that is not known.

    Example:
        >>> meter = Meter("f1")
        >>> import torch
        >>> meter.update(torch.tensor([2.0, -1.0]), Batch(target=torch.tensor([1, 0])))
        >>> meter.value()
        1.0
    """

    def __init__(self, wanted: Any):
        self.name: str | None = None
        self.metric: Metric | None = None
        self.pair: Pair = _as_is
        self.measure: Measure | None = None
        if isinstance(wanted, str | Mapping):
            self.measure = measure_of(wanted)
            self.name = self.measure.title
        elif wanted is not None:
            mine: Metric = wanted.clone()
            self.name, self.metric = type(wanted).__name__, mine
            mine.reset()
            mine.sync_on_compute = False  # every process measures all the data

    def update(self, output: Any, batch: Batch) -> None:
        """Add a batch."""
        if self.name is None or batch.target is None:
            return
        prediction, target = prediction_of(output), batch.target
        if self.metric is None:
            assert self.measure is not None
            self.metric, self.pair = _made(self.measure, prediction, target)
        if self.metric.device != prediction.device:
            self.metric = self.metric.to(prediction.device)
        self.metric.update(*self.pair(prediction, target))

    def value(self) -> float | None:
        """The metric over all batches; None where there is none, or it is not finite.

        Raises:
            PlanError: where it gives more than one number.
        """
        if self.metric is None:
            return None
        found = self.metric.compute()
        if not isinstance(found, Tensor) or found.numel() != 1:
            shape = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise PlanError(
                f"Metric '{self.name}' must give one number, but gives {shape}: choose an average, or another metric."
            )
        value = float(found)
        return value if math.isfinite(value) else None


def _made(measure: Measure, prediction: Tensor, target: Any) -> tuple[Metric, Pair]:
    """The torchmetrics metric that suits outputs and targets, and how it sees them."""
    options, preset, pair, kind = dict(measure.options), dict(measure.preset), measure.pair, ""
    asked = options.pop("task", None)
    if "" not in measure.makers:
        kind, pair = _kind(measure, asked, prediction, target)
        preset.setdefault("ignore_index", IGNORED)
    if kind == "Multilabel":
        preset.pop("average", None)  # each label by itself
    axis = -1 if kind or prediction.ndim < 2 else 1  # where torchmetrics has classes
    if prediction.ndim:
        preset |= {"num_classes": prediction.shape[axis], "num_labels": prediction.shape[axis]}
    maker = measure.makers[kind]
    known = _arguments(maker)
    wanted = {name: value for name, value in preset.items() if name in known} | options
    return maker(**wanted, sync_on_compute=False), pair  # every process measures all the data


def _kind(measure: Measure, asked: str | None, prediction: Tensor, target: Any) -> tuple[str, Pair]:
    """`Binary`, `Multiclass` or `Multilabel`, by the argument or else by the shapes; and how it sees these."""
    shape = list(target.shape) if isinstance(target, Tensor) else f"a {type(target).__name__}"
    per_class = isinstance(target, Tensor) and prediction.shape[:-1] == target.shape and prediction.ndim > 0
    single = isinstance(target, Tensor) and prediction.numel() == target.numel()
    able = measure.makers
    if asked is None:
        binary = _arguments(able["Binary"]) if "Binary" in able else []
        yes_or_no = single or (
            prediction.shape[-1:] == (2,) and all(name in binary for name in measure.options)
        )
        asked = "binary" if yes_or_no and "Binary" in able else "multiclass"
    kind = str(asked).capitalize()
    pair = {"Binary": _each if single else _second, "Multiclass": _classes, "Multilabel": _labels}[kind]
    fits = {
        "Binary": single or (per_class and prediction.shape[-1] == 2),
        "Multiclass": per_class and not single,
    }
    if kind not in able or not fits.get(kind, single):
        raise PlanError(
            f"Metric '{measure.title}' ({asked}) must have a score for each "
            f"{'class' if kind == 'Multiclass' else 'target'}, but outputs are {list(prediction.shape)} and targets "
            f"{shape}: choose another metric, or its argument task."
        )
    return kind, pair


def _checked(measure: Measure) -> Measure:
    """The same measure.

    Raises:
        PlanError: for arguments that none of its classes takes.
    """
    known = list(dict.fromkeys(name for maker in measure.makers.values() for name in _arguments(maker)))
    if "" not in measure.makers:
        known.append("task")
    if strange := [name for name in measure.options if name not in known]:
        raise PlanError(
            f"Metric '{measure.title}' takes no argument '{strange[0]}', {advice_on(strange[0], known)}"
        )
    kinds = [kind.lower() for kind in measure.makers]
    if (task := measure.options.get("task")) is not None and task not in kinds:
        raise PlanError(f"The task of metric '{measure.title}' must be {' or '.join(kinds)}, found '{task}'.")
    return measure


def _arguments(maker: type[Metric]) -> list[str]:
    """Names of the arguments of a torchmetrics class, without those that say how processes talk."""
    found = inspect.signature(maker.__init__).parameters.values()
    names = [p.name for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self"]
    return [name for name in names if not name.startswith(_PROCESSES)]


def _titles() -> list[str]:
    """Names of all classes, with capitals."""
    makers = (next(iter(each.items())) for _, each in known_metrics().values())
    return [made.__name__.removeprefix(kind) for kind, made in makers]


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def _as_is(prediction: Tensor, target: Any) -> tuple[Tensor, Any]:
    return (prediction.float() if prediction.is_floating_point() else prediction), target


def _classes(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return prediction.float().flatten(0, -2).softmax(-1), target.flatten().long()


def _second(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    scores = prediction.float().flatten(0, -2)
    return (scores[:, 1] - scores[:, 0]).sigmoid(), target.flatten().long()


def _each(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return prediction.float().flatten().sigmoid(), target.flatten().long()


def _labels(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return prediction.float().sigmoid(), target.reshape(prediction.shape).long()


def _numbers(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return prediction.float().flatten(), target.float().flatten()


def _columns(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, N]`, N above 1, as it is; other outputs number by number."""
    if prediction.ndim == 2 and prediction.shape[1] > 1:
        return prediction.float(), target.float().reshape(prediction.shape)
    return _numbers(prediction, target)
