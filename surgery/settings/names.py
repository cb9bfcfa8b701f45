"""Names of what can be chosen, for recipes and for programs that must not wait for torch."""

from collections.abc import Mapping
from typing import Any, Literal

DEFAULT_METHOD = "hypermodules"
"""The method that takes what no other does."""

SHIPPED_METHODS = {
    "hypermodules": "blocks of all sites draw on shared hypermodules",
    "templates": "the layers of stacks are mixtures of templates, the rest is hypermodules",
    "routes": "tasks learn which layers they use, at which depth and how much",
}
"""Methods of this package that a recipe can name, each a folder of `surgery.methods`, with what they do in one line."""

TARGETS = ("max_error", "budget", "hypermodules")
"""What can be asked of a fit, each with a value; at most one of them."""

PARAMETERS_OF = {"hypermodules": ("hypermodules",)}
"""Parameters of a recipe that only one method reads."""

LEVERS = {"hypermodules": "hypermodules", "templates": "templates"}
"""What says how many a method of this package makes: a parameter or a setting of a recipe."""

RELATED = ("siblings",)
"""Ways of storing related sites together, which a fit takes by itself: each a module `related` in a folder of
`surgery.methods`; the method of their banks, where they have one of their own, is in the folder's module `method`."""

Mixing = Literal["linear", "softmax", "one-hot"]
"""Mixtures of templates: any, positive ones that sum to 1, or one template for each layer."""

SIGNATURES = ("sequential", "cyclic", "progressive", "random")
"""One template for each layer, by hand."""

Scale = Literal["balanced", "contexts", "rows"]
"""What carries the deviation of a layer's weights when its blocks become hypermodules."""


def without_target(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's document without the target of a fit: for weights that were not made by that fit alone.

    Example:
        >>> without_target({"parameters": {"max_error": 0.05, "context": 4}})
        {'parameters': {'max_error': None, 'context': 4}}
    """
    parameters = recipe.get("parameters")
    if not isinstance(parameters, Mapping):
        return dict(recipe)
    return {**recipe, "parameters": {**parameters, **{key: None for key in TARGETS if key in parameters}}}
