"""FSDP: accelerate's settings of sharding, those that training cannot take, and which modules are gathered at once.

Read from accelerate's own plugin and the variables that `accelerate launch` sets, so that processes on CPUs, for which
accelerate itself shards nothing, do the same as those on accelerators.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.core.joint import JointModel
from surgery.core.registry import active_methods
from surgery.errors import PlanError
from surgery.settings.training import Training
from surgery.training.tasks.losses import adapts_by
from surgery.training.tasks.tasks import Task


@dataclass(frozen=True)
class Sharding:
    """How members are cut.

    Attributes:
        mesh: of all processes.
        device: of this one.
        rank: of this one.
        world: how many there are.
        reshard: whether a unit's weights are given up after its forward pass and gathered again for its backward pass.
        classes: names of the classes whose modules are units, a unit being what is gathered at once; the layers that
            a member repeats where there are none.
        least: modules with more parameters than this are units, in place of classes.
        root: whether a member is one unit.
    """

    mesh: Any
    device: torch.device
    rank: int
    world: int
    reshard: bool = True
    classes: tuple[str, ...] = ()
    least: int | None = None
    root: bool = False

    def apply(self, member: str, module: nn.Module, whole: Collection[nn.Parameter] = ()) -> nn.Module:
        """Cut a module's parameters in place.

        Args:
            member: its name, for errors.
            module: on the CPU.
            whole: parameters that every process keeps, besides those that cannot be cut.

        Raises:
            PlanError: where PyTorch cannot shard the module.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        kept = {*whole, *uncut(module)}
        for parameter in kept:
            parameter.data = parameter.data.to(self.device)
        learns = any(p.requires_grad for p in module.parameters())
        # Gradients of members in half precision are added up in full.
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
        common: dict[str, Any] = {
            "mesh": self.mesh,
            "ignored_params": kept,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None),
        }
        try:
            for unit in self.units(module):
                if not set(unit.parameters()) <= kept:
                    fully_shard(unit, reshard_after_forward=self.reshard, **common)
            # What is left is needed again as soon as the backward pass begins; a frozen module has none.
            fully_shard(module, reshard_after_forward=None if learns else True, **common)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
            raise PlanError(
                f"Under FSDP every member's layers must be such that PyTorch's fully_shard takes them, but for "
                f"'{member}' it says: {' '.join(str(error).split())[:300]}. Train without FSDP, where every "
                "process holds all members."
            ) from error
        return module

    def units(self, module: nn.Module) -> list[nn.Module]:
        """The modules below a member that are gathered one by one, inner ones first."""
        if self.root:
            return []
        if self.least is not None:
            found = [m for m in module.modules() if sum(p.numel() for p in m.parameters()) > self.least]
        else:
            names = self.classes or tuple(getattr(module, "_no_split_modules", None) or ())
            found = [m for m in module.modules() if type(m).__name__ in names]
            found = _outermost(found or list(_repeated(module)))
        apart = _apart(module)
        return [m for m in reversed(found) if m is not module and m in apart and _callable(m)]


def check_launch() -> None:
    """Look at what `accelerate launch` says before accelerate acts on it: some of that needs an accelerator.

    Raises:
        PlanError: for FSDP of version 1.
    """
    if _asked() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise PlanError(
            "Joint training needs FSDP of version 2, but accelerate is configured for version 1, which flattens the "
            "parameters that generated weights are distinguished by: launch it with `fsdp_version: 2`."
        )


def read_sharding(accelerator: Any, settings: Training) -> Sharding | None:
    """How accelerate is set to shard; None where every process shall hold everything.

    Raises:
        PlanError: for ways of splitting a model that training cannot take.
    """
    way = accelerator.distributed_type.value
    asked = way == "FSDP" or _asked()
    plugin = getattr(accelerator.state, "fsdp_plugin", None) if asked else None
    if asked and plugin is None:
        from accelerate import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
    if bad := _refusals(accelerator, settings, plugin):
        raise PlanError(f"Joint training cannot take what accelerate is configured for: {'; '.join(bad)}.")
    if plugin is None or accelerator.num_processes == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper()
    names = plugin.transformer_cls_names_to_wrap or ()
    if isinstance(names, str):
        names = tuple(name.strip() for name in names.split(","))
    return Sharding(
        init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        reshard=bool(plugin.reshard_after_forward),
        classes=tuple(names) if policy == "TRANSFORMER_BASED_WRAP" else (),
        least=(plugin.min_num_params or None) if policy == "SIZE_BASED_WRAP" else None,
        root=policy == "NO_WRAP",
    )


def wants_checkpointing() -> bool:
    """Whether accelerate is set to recompute activations."""
    return os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true"


def check_members(joint: JointModel, sharding: Sharding) -> None:
    """Raise where a class that accelerate's settings name is in no member, or a method cannot train members in parts.

    Raises:
        PlanError: naming these.
    """
    if whole := [method.name for method in active_methods(joint) if not method.sharded]:
        raise PlanError(
            f"Method {', '.join(whole)} needs whole members in every process, but FSDP cuts them: train in one "
            "process, or in several without FSDP."
        )
    known = {type(module).__name__ for module in joint.bodies.modules()}
    if lost := [name for name in sharding.classes if name not in known]:
        raise PlanError(
            f"Every `fsdp_transformer_layer_cls_to_wrap` must be the class of a layer of some member, but "
            f"{', '.join(lost)} is not: correct it, or leave it away, and the layers that a member repeats are taken."
        )


def check_banks(joint: JointModel) -> None:
    """Refuse weights that depend on the task: FSDP's modules are filled once for a step.

    Raises:
        PlanError: naming the methods that generate them.
    """
    banks = [plan for plan in joint.plan.banks if joint.dictionary[plan.key].by_task]
    if names := dict.fromkeys(plan.method for plan in banks):
        raise PlanError(
            f"Under FSDP weights must be the same for every task, but {', '.join(names)} generates others for each: "
            "train in one process, or in several without FSDP."
        )


def check_losses(tasks: Sequence[Task]) -> None:
    """Refuse losses that look inside a member: while it is cut, a copy of it runs.

    Raises:
        PlanError: naming the tasks.
    """
    if adapting := [task.name for task in tasks if adapts_by(task.loss)]:
        raise PlanError(
            f"Under FSDP a loss must need nothing but outputs, but {', '.join(adapting)} compares features inside a "
            "member: adapt it in one process, or in several without FSDP."
        )


def uncut(module: nn.Module) -> set[nn.Parameter]:
    """The parameters that every process has to keep: single numbers, and whatever is not of the dtype of most."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    most = sizes.most_common(1)[0][0] if sizes else None
    return {p for p in module.parameters() if p.dtype != most or not p.ndim or not p.numel()}


def _asked() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _refusals(accelerator: Any, settings: Training, plugin: Any) -> list[str]:
    way = accelerator.distributed_type.value
    bad = []
    if way in ("DEEPSPEED", "MEGATRON_LM", "TP"):
        bad.append(
            f"{way} splits members in ways of its own, and weights are generated from one dictionary before each step; "
            "use plain multi-processing (`distributed_type: MULTI_GPU`), or `distributed_type: FSDP` with "
            "`fsdp_version: 2` where a device has no room for all members"
        )
    sizes = getattr(accelerator, "parallelism_config", None)
    if sizes is not None and any(
        getattr(sizes, f"{each}_size", 1) > 1 for each in ("tp", "cp", "sp", "dp_replicate")
    ):
        bad.append("of its parallelism_config only dp_shard is supported; leave the other sizes at 1")
    if plugin is None:
        return bad
    if "CPUOffload" in type(plugin.cpu_offload).__name__:
        bad.append("rows and their gradients stay on the device; set `fsdp_offload_params: false`")
    if plugin.ignored_modules:
        bad.append("every module of a member is sharded; leave fsdp_ignored_modules away")
    if accelerator.num_processes > 1:
        if accelerator.mixed_precision == "fp16":
            bad.append("scaled losses of fp16 are not supported under FSDP; use `mixed_precision: bf16`")
        if settings.compile:
            bad.append("compiled members are not supported under FSDP; set train.compile=false")
    return bad


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """Modules of one class that stand side by side in a list or a sequence, as a model's layers do."""
    for parent in module.modules():
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            alike = defaultdict(list)
            for child in parent:
                if any(True for _ in child.parameters()):
                    alike[type(child)].append(child)
            yield from (child for children in alike.values() if len(children) > 1 for child in children)


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    inside = {below for module in modules for below in module.modules() if below is not module}
    return [module for module in dict.fromkeys(modules) if module not in inside]


def _apart(module: nn.Module) -> set[nn.Module]:
    """The modules that share no parameter with what lies outside of them."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {
        below
        for path, below in module.named_modules()
        if all(n.startswith(f"{path}.") for p in below.parameters() for n in names[id(p)])
    }


def _callable(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict))
