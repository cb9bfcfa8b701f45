"""Settings of templates in training, as they stand under `train.templates` in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from surgery.settings.names import Mixing
from surgery.settings.problems import Strict
from surgery.settings.quantities import Context, NotNegative, Rate


class TemplateSettings(Strict):
    """Templates of stacks, where the plan has them (Compositional models).

    Attributes:
        count: K; one for each distinct layer where it is None. In a recipe, `parameters.templates`.
        mixing: `softmax`, `linear` or `one-hot`; one-hot ones are not trained. In a recipe, `parameters.mixture`.
        start: templates and mixtures nearest to the layers' weights (`fit`); or the first layers as templates, with
            mixtures by hand (`sequential`, `cyclic`, `progressive`, `random`) or alike (`uniform`): for
            architectures from scratch.
        sure: share of a layer's own template in softmax mixtures that start exactly or by hand.
        learn: whether mixtures are trained.
        freeze: whether templates stay as they are.
        lr: learning rate of mixtures; that of everything else by default.
        entropy: weight of the mixtures' mean entropy, relative to its greatest value, beside the tasks' losses.
        attraction: weight of what draws templates towards the layers to which they contribute most.
        harden: whether the final generations train with each layer on one template.
        source: an artifact whose templates and mixtures are the start, for a new task (transfer) or for another domain
            (adaptation).
        like: the source's member to begin as; by default the one with which a short trial goes best.
    """

    count: Context | None = None
    mixing: Mixing = "softmax"
    start: Literal["fit", "sequential", "cyclic", "progressive", "random", "uniform"] = "fit"
    sure: Annotated[float, Field(gt=0, lt=1)] = 0.9
    learn: bool = True
    freeze: bool = False
    lr: Rate | None = None
    entropy: NotNegative = 0.0
    attraction: NotNegative = 0.0
    harden: bool = False
    source: str | None = None
    like: str | None = None
