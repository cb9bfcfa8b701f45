"""surgery: join pretrained networks of any architecture, share their blocks, and give each member back.

Names are imported when they are first used, so that `import surgery` is quick and does not import torch.

Example:
    >>> import surgery, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
    >>> member = surgery.load_member(net, name="net", inputs=torch.randn(4, 8))
    >>> joint = surgery.fit(surgery.join([member]), max_error=0)
    >>> joint["net"](torch.randn(1, 8)).shape
    torch.Size([1, 2])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgery.errors import (
    ArtifactError,
    ConsentError,
    LoadError,
    OutputError,
    PlanError,
    SurgeryError,
    TraceError,
    TrainingError,
)
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.artifact import load, save
    from surgery.artifact.export import export
    from surgery.artifact.verify import VerifyReport, verify
    from surgery.fitting.fit import FitReport, fit
    from surgery.joint import JointModel, join
    from surgery.member import Inputs, Member, Origin
    from surgery.merging import merge
    from surgery.plan import Plan, make_plan
    from surgery.recipe import Recipe
    from surgery.references import load_member
    from surgery.sites import Anatomy, LeftAlone, Site, discover
    from surgery.template_plan import plan_templates
    from surgery.tracing import trace
    from surgery.training.report import TrainReport
    from surgery.training.tasks import Task
    from surgery.training.train import train

_HOMES = {
    "artifact": ("load", "save"),
    "artifact.export": ("export",),
    "fitting.fit": ("FitReport", "fit"),
    "joint": ("JointModel", "join"),
    "member": ("Inputs", "Member", "Origin"),
    "merging": ("merge",),
    "plan": ("Plan", "make_plan"),
    "recipe": ("Recipe",),
    "references": ("load_member",),
    "sites": ("Anatomy", "LeftAlone", "Site", "discover"),
    "template_plan": ("plan_templates",),
    "tracing": ("trace",),
    "training.report": ("TrainReport",),
    "training.tasks": ("Task",),
    "training.train": ("train",),
    "artifact.verify": ("VerifyReport", "verify"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Anatomy", "ArtifactError", "ConsentError", "FitReport", "Inputs", "JointModel", "LeftAlone", "LoadError", "Member",
    "Origin", "OutputError", "Plan", "PlanError", "Recipe", "Site", "SurgeryError", "Task", "TraceError",
    "TrainReport", "TrainingError", "VerifyReport", "__version__", "discover", "export", "fit", "join", "load",
    "load_member", "make_plan", "merge", "plan_templates", "save", "trace", "train", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'surgery' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"surgery.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
