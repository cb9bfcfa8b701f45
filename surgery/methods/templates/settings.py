"""Settings of templates: what is made, under `settings` in a recipe, and how it is trained, under `train.templates`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from surgery.settings.names import Mixing
from surgery.settings.problems import Strict
from surgery.settings.quantities import Context, NotNegative, Rate

if TYPE_CHECKING:
    from surgery.anatomy.plan import Plan


class Settings(Strict):
    """Templates of stacks: how many, and which mixtures of them layers may be; with method templates.

    Attributes:
        templates: K, so many for each stack: a merge makes them at the members' precision, or in the precisions that
            `max_error` or `budget` asks for. Where it is not given, these decide how many; training takes one for each
            distinct layer.
        mixture: `linear`, any mixtures; `softmax`, positive ones that sum to 1; or `one-hot`, one template a layer:
            layers are tied, and mixtures are not trained.
        mix_norms: whether scale and shift of norms are mixed too; running statistics never are.
    """

    templates: Context | None = None
    mixture: Mixing = "linear"
    mix_norms: bool = False


def settings_in(plan: Plan) -> Settings:
    """What a plan says of its stacks; fields that it does not say are not set."""
    said = next((bank.settings for bank in plan.banks if bank.stack), {})
    return Settings.model_validate(dict(said))


class TemplateSettings(Strict):
    """How templates of stacks are trained, where the plan has them (Compositional models).

    Attributes:
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
