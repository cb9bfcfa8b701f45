"""Names of what can be chosen, for recipes and the command line, which must not wait for torch."""

from typing import Literal

Mixing = Literal["linear", "softmax", "one-hot"]
"""Mixtures of templates: any, positive ones that sum to 1, or one template for each layer."""

SIGNATURES = ("sequential", "cyclic", "progressive", "random")
"""One template for each layer, by hand."""

Scale = Literal["contexts", "rows"]
"""What carries the deviation of a layer's weights when its blocks become hypermodules."""
