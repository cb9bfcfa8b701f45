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
    ExportError,
    LoadError,
    OutputError,
    PlanError,
    SurgeryError,
    TraceError,
    TrainingError,
)
from surgery.integrations.arrival import when_imported
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.anatomy.plan import Plan, make_plan
    from surgery.anatomy.sites import Anatomy, LeftAlone, Site, discover
    from surgery.artifact import load, save
    from surgery.artifact.export import export
    from surgery.artifact.exporting import ExportPlan, plan_export
    from surgery.artifact.publish import Upload, push_to_hub
    from surgery.artifact.resident import ResidentModel
    from surgery.artifact.verify import VerifyReport, verify
    from surgery.core.joining import join
    from surgery.core.joint import JointModel
    from surgery.core.registry import plan_with
    from surgery.core.replacing import plan_modules
    from surgery.fitting.fit import FitReport, fit
    from surgery.members.member import Inputs, Member, Origin
    from surgery.members.references import load_member
    from surgery.methods.routes.hardening import harden
    from surgery.methods.routes.routed import Routed
    from surgery.methods.templates.plan import plan_templates
    from surgery.pipeline.add import add, remove
    from surgery.pipeline.merge import merge
    from surgery.pipeline.refit import refit
    from surgery.settings.recipe import Recipe
    from surgery.tracing import trace
    from surgery.training.report.report import TrainReport
    from surgery.training.tasks.tasks import Task
    from surgery.training.train import train

_HOMES = {
    "artifact": ("load", "save"),
    "artifact.export": ("export",),
    "artifact.exporting": ("ExportPlan", "plan_export"),
    "fitting.fit": ("FitReport", "fit"),
    "core.joining": ("join",),
    "core.joint": ("JointModel",),
    "core.registry": ("plan_with",),
    "core.replacing": ("plan_modules",),
    "members.member": ("Inputs", "Member", "Origin"),
    "pipeline.add": ("add", "remove"),
    "pipeline.merge": ("merge",),
    "pipeline.refit": ("refit",),
    "anatomy.plan": ("Plan", "make_plan"),
    "settings.recipe": ("Recipe",),
    "members.references": ("load_member",),
    "anatomy.sites": ("Anatomy", "LeftAlone", "Site", "discover"),
    "methods.routes.hardening": ("harden",),
    "methods.routes.routed": ("Routed",),
    "methods.templates.plan": ("plan_templates",),
    "tracing": ("trace",),
    "training.report.report": ("TrainReport",),
    "training.tasks.tasks": ("Task",),
    "training.train": ("train",),
    "artifact.publish": ("Upload", "push_to_hub"),
    "artifact.resident": ("ResidentModel",),
    "artifact.verify": ("VerifyReport", "verify"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Anatomy", "ArtifactError", "ConsentError", "ExportError", "ExportPlan", "FitReport", "Inputs",
    "JointModel", "LeftAlone", "LoadError", "Member", "Origin", "OutputError", "Plan", "PlanError", "Recipe",
    "ResidentModel", "Routed", "Site", "SurgeryError", "Task", "TraceError", "TrainReport", "TrainingError",
    "Upload", "VerifyReport", "__version__", "add", "discover", "export", "fit", "harden", "join", "load",
    "load_member", "make_plan", "merge", "plan_export", "plan_modules", "plan_templates", "plan_with", "push_to_hub",
    "refit", "remove", "save", "trace", "train", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'surgery' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"surgery.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


when_imported("transformers.quantizers.auto", "surgery.integrations.transformers")
