"""Tracing: one forward pass of any module as a graph, and the uses of its parameters.

tracing      `trace`: the first tier that serves, then what it did not reach
tiers        ways of tracing, one after the other
reading      uses of parameters in a graph
table        uses by types of modules alone, where no forward pass got there
"""

from surgery.tracing.bounds import Bounds
from surgery.tracing.once import recorded_once
from surgery.tracing.tiers import TIERS, Tier, run_without_weights
from surgery.tracing.tracing import TABLE, trace
from surgery.tracing.types import Trace, Use

__all__ = [
    "TABLE",
    "TIERS",
    "Bounds",
    "Tier",
    "Trace",
    "Use",
    "recorded_once",
    "run_without_weights",
    "trace",
]
