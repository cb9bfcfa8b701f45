"""Layer kinds: which calls and modules use a tensor as a linear map, and on which axes.

registry     the kinds, one `register` line each
operations   how each operation uses its arguments
axes         roles of a tensor's axes: stack, out, in
"""

from surgery.tracing.layers.registry import KINDS, LayerKind, kind_met_by, read_call, read_module, register

__all__ = ["KINDS", "LayerKind", "kind_met_by", "read_call", "read_module", "register"]
