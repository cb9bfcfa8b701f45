"""transformers models: a local folder, or a hub id `org/name[@revision]`; `?class=NAME` chooses the class, and
`?pretrained=false` draws weights at random."""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.disk.files import write_files
from surgery.disk.untrusted import shown
from surgery.errors import LoadError, SurgeryWarning
from surgery.members.member import Origin
from surgery.members.origins.base import (
    WEIGHT_FILES,
    Loaded,
    Request,
    read_config,
    read_small_files,
    split_options,
)
from surgery.members.origins.bounded import bounded
from surgery.members.origins.empty import build_empty
from surgery.members.origins.licences import licence_file
from surgery.members.origins.peft import check_base, is_adapter, load_onto_base
from surgery.members.origins.prefixes import said
from surgery.members.origins.quantised import check_library
from surgery.members.origins.transformers_classes import model_class, read_configuration
from surgery.members.origins.transformers_dtypes import decoded_float8
from surgery.members.origins.transformers_options import (
    attention_in_use,
    attention_of,
    forget_renaming,
    renaming,
    wrappers_prefix,
)
from surgery.members.origins.transformers_parts import closed_hub
from surgery.members.origins.transformers_places import (
    FILES,
    bounds_of,
    check_folder,
    check_hub,
    part_files,
    snapshot,
    split_revision,
)
from surgery.members.origins.transformers_saving import save_plain as save_plain
from surgery.members.origins.transformers_weights import draw_weights, load_weights
from surgery.permission import Permission
from surgery.util.quiet import quiet

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


def claims(reference: str) -> bool:
    """Whether `reference` is a folder, or could be a hub id."""
    head = reference.partition("?")[0]
    path = Path(head).expanduser()
    return path.is_dir() or (
        path.suffix not in WEIGHT_FILES and not path.is_file() and bool(_HUB_ID.fullmatch(head))
    )


def check(reference: str) -> None:
    """Whether a folder is complete, with the base of an adapter, or a hub id is cached or can be reached.

    Raises:
        LoadError: where it is not.
    """
    head, options = split_options(reference)
    folder = Path(head).expanduser()
    if not claims(head):
        raise LoadError(
            f"there is no folder {head}, which is no hub id either: put it there, or give its path"
        )
    if not folder.is_dir():
        check_hub(head)
    elif is_adapter(folder):
        check_base(folder, check)
    else:
        check_folder(folder, options.get("pretrained", True) is not False)


def load(reference: str, request: Request) -> Loaded:
    """Load config, class, weights and small files, and check that every tensor found its place.

    Raises:
        LoadError: where anything is missing, damaged or does not fit, or the hub cannot be reached.
    """
    head, options = split_options(reference)
    _check_options(options)
    stored = options.get("pretrained", True) is not False
    folder = Path(head).expanduser()
    local = folder.is_dir()
    where, revision = (str(folder), None) if local else split_revision(head)
    if local and is_adapter(folder):
        asked = reference.removeprefix(head)
        return load_onto_base(reference, folder, asked, lambda base: load(base, request), FILES)
    if local:
        check_folder(folder, stored)
    attention = attention_of(options, reference)
    with quiet():
        config = read_configuration(where, revision, request, reference)
        check_library(config.to_dict(), where)
        kind = model_class(config, options.get("class"), where, revision, request)
        prefix = ""
        if stored:
            with bounded(where, **(bounds_of(folder) if local else {})):
                prefix = wrappers_prefix(kind, config, folder) if local else ""
                how = {**attention, **renaming(prefix)}
                unused = str(options.get("unused", ""))
                module, extra, dtype = load_weights(
                    kind, config, where, revision, request, unused, how, prefix
                )
            forget_renaming(module, prefix)
        else:
            module, extra = draw_weights(kind, config, where), {}
            dtype = module.dtype
            if attention:
                module.set_attn_implementation(attention["attn_implementation"])
        commit = getattr(config, "_commit_hash", None)
        place = folder if local else snapshot(where, commit or revision)
        files = {**read_small_files(place, FILES), **part_files(place), **licence_file(place)}
    if stored and (note := decoded_float8(config, folder, module)) is not None:
        warnings.warn(f"{reference}: {note}", SurgeryWarning, stacklevel=4)
    if prefix:
        warnings.warn(said(reference, prefix), SurgeryWarning, stacklevel=4)
    made = {"dtype": str(dtype).removeprefix("torch."), **attention, **extra}
    origin = Origin("transformers", reference, type(module).__name__, commit, made)
    return Loaded(module.eval(), origin, files, stored=stored)


def _check_options(options: Mapping[str, Any]) -> None:
    unknown = set(options) - {"class", "unused", "pretrained", "attn_implementation"}
    if unknown:
        raise LoadError(
            "a transformers reference takes ?class=NAME, ?unused=drop, ?pretrained=false and "
            f"?attn_implementation=eager, not {', '.join(sorted(unknown))}"
        )


def build(origin: Origin, files: Mapping[str, bytes], request: Request) -> nn.Module:
    """The class again on empty parameters, from the configuration among `files`.

    Raises:
        LoadError: where the configuration or the class is not known to this transformers.
    """
    if "config.json" not in files:
        raise LoadError(f"building '{origin.reference}' again needs its config.json, which the files lack")
    with tempfile.TemporaryDirectory() as folder, quiet(), closed_hub(request.permission):
        names = ("config.json", "generation_config.json")
        write_files({name: files[name] for name in names if name in files}, Path(folder))
        where = folder
        if request.permission >= Permission.ALL and "auto_map" in read_config(Path(folder) / "config.json"):
            source = str(origin.options.get("base", origin.reference))
            where = split_options(source)[0].partition("@")[0]  # code stays where it came from
        config = read_configuration(where, origin.revision, request, origin.reference)
        kind = model_class(config, origin.architecture, where, origin.revision, request)
        dtype = getattr(torch, str(origin.options.get("dtype", "float32")), None)
        if not isinstance(dtype, torch.dtype):
            raise LoadError(
                f"the dtype of '{origin.reference}' must be one of torch's, found {shown(origin.options['dtype'])}"
            )
        extra = {key: value for key, value in origin.options.items() if key == "add_pooling_layer"}
        extra |= attention_of(origin.options, origin.reference)
        module: Any = build_empty(lambda: kind._from_config(config, dtype=dtype, **extra))
        if "generation_config.json" in files and module.can_generate():
            from transformers.generation.configuration_utils import GenerationConfig

            module.generation_config = GenerationConfig.from_pretrained(folder)
    return module.eval()


def adopt(module: nn.Module) -> Loaded | None:
    """A live module of a class that transformers has, so that it can be built again; None for any other."""
    if "transformers.modeling_utils" not in sys.modules:  # then no module can be of its classes
        return None
    import transformers

    kind = type(module)
    if (
        not isinstance(module, transformers.PreTrainedModel)
        or getattr(transformers, kind.__name__, None) is not kind
    ):
        return None
    with tempfile.TemporaryDirectory() as folder, quiet():
        module.config.save_pretrained(folder)
        if module.can_generate() and module.generation_config is not None:
            module.generation_config.save_pretrained(folder)
        files = read_small_files(Path(folder), FILES)
    options = {"dtype": str(module.dtype).removeprefix("torch."), **attention_in_use(module)}
    return Loaded(module, Origin("transformers", kind.__name__, kind.__name__, None, options), files)
