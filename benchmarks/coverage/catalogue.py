"""Catalogue: which models there are, and one for each distinct implementation.

Two models share an implementation where they are of the same class and made of the same model classes of their
library's own (layers that all models use do not count); the one with the fewest parameters stands for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.inputs import timm_picture
from surgery.members.member import Inputs

LARGEST = 1_200_000_000  # parameters; a larger timm model is built with two layers


@dataclass(frozen=True)
class Entry:
    """One model to be tried: its library, its name there, and what it stands for."""

    library: str
    model: str
    implementation: str = ""


def entries(library: str, every: bool) -> list[Entry]:
    """The models of a library, one for each implementation or every one."""
    names = NAMES[library]()
    if every or library == "transformers":  # there a model type is an implementation
        return [Entry(library, name) for name in names]
    smallest: dict[tuple[str, ...], tuple[int, Entry]] = {}
    for name in names:
        try:
            with torch.device("meta"):
                module = build(Entry(library, name))[0]
        except Exception:  # some cannot be built on meta; then the name stands for itself
            smallest[name,] = (0, Entry(library, name))
            continue
        kinds = _implementation(module, library)
        size = sum(p.numel() for p in module.parameters())
        if kinds not in smallest or size < smallest[kinds][0]:
            smallest[kinds] = (size, Entry(library, name, kinds[0]))
    return sorted((entry for _, entry in smallest.values()), key=lambda entry: entry.model)


def build(entry: Entry, seed: int = 0) -> tuple[nn.Module, Inputs | None]:
    """The model in eval mode with random weights, and inputs where the library's own do not tell."""
    torch.manual_seed(seed)
    module, inputs = BUILDERS[entry.library](entry.model)
    return module.eval(), inputs


def _implementation(module: nn.Module, library: str) -> tuple[str, ...]:
    home = f"{library}.models"
    own = {type(m).__qualname__ for m in module.modules() if type(m).__module__.startswith(home)}
    return (type(module).__name__, *sorted(own))


# timm -------------------------------------------------------------------------------------------------


def _timm_names() -> list[str]:
    import timm

    return timm.list_models()


def _build_timm(name: str) -> tuple[nn.Module, Inputs | None]:
    """With the inputs that surgery makes up for timm, but one picture, and not run to see whether it works."""
    import timm

    def size(**options: Any) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, pretrained=False, **options).parameters())

    chosen: dict[str, Any] = {}
    if size() > LARGEST:  # no memory for it beside its copy: fewer of the layers that it repeats
        for options in ({"depth": 2}, {"depths": (1, 1, 1, 1)}):
            with contextlib.suppress(TypeError, AssertionError):
                size(**options)
                chosen = options
                break
    module = timm.create_model(name, pretrained=False, **chosen)
    made = timm_picture(module, 0)
    return module, made and Inputs((made.args[0][:1],), {}, made.source)


# torchvision ------------------------------------------------------------------------------------------


def _torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models()


def _build_torchvision(name: str) -> tuple[nn.Module, Inputs]:
    import torchvision

    options: dict[str, Any] = {"weights": None}
    builder = torchvision.models.get_model_builder(name)
    kind = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    if kind in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if name in ("googlenet", "quantized_googlenet", "inception_v3", "quantized_inception_v3"):
        options["init_weights"] = True
    module = torchvision.models.get_model(name, **options)
    return module, _torchvision_inputs(name, kind)


def _torchvision_inputs(name: str, kind: str) -> Inputs:
    """Small pictures, two for optical flow, a list of them for detection, a clip for video."""
    if kind == "optical_flow":
        args: tuple[Any, ...] = (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    elif kind == "detection":
        args = ([torch.rand(3, 96, 128)],)
    elif kind == "video":
        side = 224 if name.startswith(("mvit", "swin3d", "s3d")) else 112
        args = (torch.rand(1, 3, 16, side, side),)
    else:
        args = (torch.rand(2, 3, 299 if "inception" in name else 224, 299 if "inception" in name else 224),)
    return Inputs(args, {}, f"torchvision {kind}")


# transformers -----------------------------------------------------------------------------------------


def _transformers_names() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def _build_transformers(name: str) -> tuple[nn.Module, None]:
    from benchmarks.coverage.shrink import shrunk_model

    kind, _, wanted = name.partition("/")
    return shrunk_model(kind, wanted or None), None


NAMES: dict[str, Callable[[], list[str]]] = {
    "timm": _timm_names,
    "torchvision": _torchvision_names,
    "transformers": _transformers_names,
}
BUILDERS: dict[str, Callable[[str], tuple[nn.Module, Inputs | None]]] = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
    "transformers": _build_transformers,
}


def preload(libraries: Iterable[str]) -> None:
    """Import what the children will need, once for all of them; nothing here may start a thread."""
    torch.set_num_threads(1)

    if "timm" in libraries:
        import timm  # noqa: F401
    if "torchvision" in libraries:
        import torchvision  # noqa: F401
    if "transformers" in libraries:
        import transformers  # noqa: F401
