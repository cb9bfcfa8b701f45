"""Parts of a transformers configuration that other libraries build: models that they name, and arguments of these.

A configuration may name a backbone of timm or of the hub, and timm opens files that its arguments name. Text of an
artifact may name timm's own architectures alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from surgery.disk.untrusted import shown
from surgery.errors import LoadError
from surgery.members.origins.timm import check_options
from surgery.permission import Permission

NAMES = ("architecture", "backbone")
"""Keys under which configurations name a model that is built as one of their parts."""


def check_parts(config: Any, where: str, permission: Permission) -> None:
    """Refuse a configuration whose parts would be fetched or read from elsewhere, whatever depth they lie at.

    Args:
        config: a document, as JSON or as a configuration's dictionary.
        where: the reference, for errors.
        permission: of the text that the configuration came with.

    Raises:
        ConsentError: where a part is a model that timm does not have by this name.
        LoadError: where an argument of a part names files, weights or configurations.

    Example:
        >>> check_parts({"backbone": "resnet18", "use_timm_backbone": True}, "detr", Permission.NONE)
        >>> check_parts({"vision_config": {"architecture": "hf-hub:org/name"}}, "vlm", Permission.NONE)
        Traceback (most recent call last):
        surgery.errors.ConsentError: the configuration of vlm ...
    """
    if permission >= Permission.ALL:
        return
    for part in _mappings(config):
        named = [part[key] for key in NAMES if isinstance(part.get(key), str)]
        for name in named:
            if not _of_timm(name) or _looked_for(part):
                least = Permission.ALL if name.startswith("local-dir:") else Permission.OWN
                permission.require(
                    least, f"the configuration of {where} opens another model, {shown(name)}, that it names"
                )
        arguments = part.get("model_args")
        if named and isinstance(arguments, Mapping):
            if not _of_timm(named[0]):
                raise LoadError(
                    f"the configuration of {where} gives arguments to {shown(named[0])}, which timm does not have: "
                    "leave model_args out"
                )
            check_options(named[0].partition(".")[0], arguments)


def closed_hub(permission: Permission) -> AbstractContextManager[None]:
    """A context in which the hub is not asked, where a text may open nothing outside of its folder."""
    return _offline() if permission < Permission.OWN else nullcontext()


@contextmanager
def _offline() -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _of_timm(name: str) -> bool:
    import timm

    return ":" not in name and "/" not in name and timm.is_model(name)


def _looked_for(part: Mapping[str, Any]) -> bool:
    """Whether transformers asks the hub for a backbone of this name before it takes timm's."""
    if "backbone" not in part or part.get("model_type") == "timm_backbone" or part.get("backbone_config"):
        return False
    return bool(part.get("backbone_kwargs")) or not part.get("use_timm_backbone", False)


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings of a document, the outermost first; nested ones may be configurations already."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if hasattr(value, "to_dict"):
            value = value.to_dict()
        if isinstance(value, Mapping):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
