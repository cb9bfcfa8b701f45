"""Configuration and class of a transformers model, and whose code they may bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.errors import LoadError
from surgery.members.origins.base import Request, read_config
from surgery.members.origins.transformers_parts import check_parts
from surgery.members.origins.transformers_places import failed
from surgery.permission import Permission


def read_configuration(where: str, revision: str | None, request: Request, reference: str) -> Any:
    """The configuration of a folder or hub id.

    Raises:
        LoadError: where it cannot be read.
        ConsentError: where it needs code of the checkpoint, compiled code or other models, and the permission does
            not cover it.
    """
    from transformers import AutoConfig

    trusted = request.permission >= Permission.ALL
    if Path(where).is_dir():  # reading it already fetches what it names
        check_parts(read_config(Path(where) / "config.json"), reference, request.permission)
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trusted)
    except Exception as error:
        if "trust_remote_code" in str(error):
            request.permission.require(Permission.ALL, f"{reference} brings its own Python code")
        raise LoadError(failed(where, revision, "reading the configuration", error)) from error
    check_parts(config, reference, request.permission)
    _check_kernels(config, reference, request.permission)
    return config


def model_class(config: Any, wanted: str | None, where: str, revision: str | None, request: Request) -> Any:
    """The class to load: the one asked for, else the one the config names, else the base model of its type.

    Raises:
        LoadError: where a class that was asked for does not exist, or comes as code that may not run.
    """
    import transformers

    named = wanted or next(iter(getattr(config, "architectures", None) or ()), "")
    kind = getattr(transformers, named, None) if named else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    auto_map = getattr(config, "auto_map", None) or {}
    remote = [
        entry for entry in auto_map.values() if isinstance(entry, str) and entry.rpartition(".")[2] == named
    ]
    remote = remote or [
        entry for name, entry in auto_map.items() if name == "AutoModel" and isinstance(entry, str)
    ]
    if remote:
        return remote_class(remote[0], where, revision, request.permission)
    if wanted:
        raise LoadError(
            f"transformers {transformers.__version__} has no model class '{wanted}': check the name"
        )
    mapping: Any = transformers.AutoModel._model_mapping
    if type(config) not in mapping:
        raise LoadError(
            f"{where}: transformers {transformers.__version__} has neither the class '{named}' nor a base "
            f"model for '{config.model_type}': choose a class with ?class=NAME"
        )
    found = mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def remote_class(name: str, where: str, revision: str | None, permission: Permission) -> Any:
    """A class in the Python files that come with a checkpoint, imported.

    Args:
        name: `file.Class`, or `repository--file.Class`.
        where: folder or hub id of the checkpoint.
        revision: of the hub id.
        permission: of the text that names the checkpoint.

    Raises:
        ConsentError: where the permission does not cover code of a checkpoint; nothing was fetched or imported.
    """
    permission.require(Permission.ALL, f"{where} brings its own Python code for {name}")
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(name, where, revision=revision)


def _check_kernels(config: Any, where: str, permission: Permission) -> None:
    """Refuse implementations that transformers would fetch from the hub as compiled code, in all parts of a config."""
    for name in ("_attn_implementation", "_experts_implementation"):
        value = str(getattr(config, name, None))
        if "/" in value or value.startswith(
            "flash"
        ):  # `flash_attention_2` is fetched where its package is missing
            least = Permission.ALL if "/" in value else Permission.OWN
            permission.require(least, f"{where} brings its own code, the kernel {value}")
    for key in getattr(config, "sub_configs", None) or ():
        if (part := getattr(config, key, None)) is not None:
            _check_kernels(part, where, permission)
