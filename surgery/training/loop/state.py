"""Reads and writes the state of a run as one safetensors file.

Tensors by name, everything else as JSON in the file's header: no pickle. A file is written beside its place and
moved into it, so that a kill leaves the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgery.core.joint import JointModel
from surgery.disk.files import share
from surgery.disk.untrusted import UnreadableError, as_mapping, broken_rules, parse_json, shown, shown_text
from surgery.errors import TrainingError
from surgery.members.extra_state import extra_state_of, from_document, set_extra_state, to_document
from surgery.members.member import content_hash
from surgery.safetensors.header import parse_header
from surgery.slots.slots import locate
from surgery.storage.keys import StateKey, of_owner
from surgery.training.loop.state_document import VERSION, StateDocument

Tensors = dict[StateKey, Tensor]


def model_tensors(joint: JointModel) -> Tensors:
    """Everything of a joint model that training changes; the tensors are its own.

    Of what several processes hold in parts, each gets its part.
    """
    found: Tensors = {}
    for key in joint.dictionary:
        bank = joint.dictionary[key]
        found |= {StateKey("bank", key, name): t for name, t in bank.state().items()}
    for name in joint.names:
        generated = {owner for p in joint.plan.of(name) for owner in p.site.owners}
        for first in joint.owners[name]:
            if first not in generated:
                own = own_part(getattr(*locate(joint[name], first)).detach())
                found[StateKey("member", name, first)] = own
        if values := extra_state_of(joint[name]):
            found[StateKey("extra", name)] = torch.frombuffer(
                bytearray(to_document(values, name)), dtype=torch.uint8
            )
    return found


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; all of it but for those that `fully_shard` made parts of."""
    return getattr(tensor, "_local_tensor", tensor)


def snapshot(joint: JointModel) -> Tensors:
    """A copy of `model_tensors` on the CPU."""
    return {key: tensor.to("cpu", copy=True) for key, tensor in model_tensors(joint).items()}


@torch.no_grad()
def restore(joint: JointModel, tensors: Mapping[StateKey, Tensor]) -> None:
    """Give a joint model of the same plan the tensors of a `snapshot`; banks take whatever size they had.

    Raises:
        TrainingError: where the tensors are those of another joint model.
    """
    for key, tensor in model_tensors(joint).items():
        if key.kind == "extra":
            _restore_extra_state(joint, key, tensors)
            continue
        if key not in tensors or (key.kind == "member" and tensor.shape != tensors[key].shape):
            raise TrainingError(
                f"The checkpoint must hold what this recipe trains, but '{key}' is missing or of another shape: "
                "it belongs to another run; choose another folder, or delete it."
            )
        if key.kind == "member":
            tensor.copy_(tensors[key])
    for key in joint.dictionary:
        bank, own = joint.dictionary[key], of_owner(tensors, "bank", key)
        if wrong := bank.misfits(own):
            raise TrainingError(
                f"The checkpoint must hold what this recipe trains, but bank '{key}' {wrong[0]}: it belongs to "
                "another plan."
            )
        bank.restore(own)
    joint.refresh()


@contextmanager
def undone(joint: JointModel) -> Iterator[None]:
    """Undo afterwards whatever changed values inside, in the same tensors and parameters: `restore` makes new ones in
    banks.

    Inside, values may change, and no bank its size.
    """
    live, before = model_tensors(joint), snapshot(joint)
    try:
        yield
    finally:
        with torch.no_grad():
            for key, tensor in live.items():
                if key.kind == "extra":
                    _restore_extra_state(joint, key, before)
                else:
                    tensor.copy_(before[key])
        joint.refresh()


def _restore_extra_state(joint: JointModel, key: StateKey, tensors: Mapping[StateKey, Tensor]) -> None:
    """Restore the extra state of one member where the state holds it; states of earlier versions do not."""
    if key in tensors:
        try:
            values = from_document(json.loads(tensors[key].cpu().numpy().tobytes()))
        except ValueError as error:
            raise TrainingError(
                f"The checkpoint's '{key}' must be extra state, but {error}: delete the checkpoint to start anew."
            ) from None
        set_extra_state(joint[key.owner or ""], values)


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All global generators that a user's data or members may draw from: tensors, and the rest."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, inner, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return tensors, {"python": [version, list(inner), gauss], "numpy": [kind, *map(float, rest)]}


def set_random_state(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Put the global generators where `random_state` found them."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, inner, gauss = rest["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, position, has, cached = rest["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, int(position), int(has), cached))


def write_state(path: Path, tensors: Mapping[StateKey, Tensor], document: Mapping[str, Any]) -> None:
    """Write tensors and a JSON document as one file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)  # what a kill left, or something that would be waited for
    plain = {str(key): tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    # safetensors refuses two names for one memory, as tied weights have.
    seen: dict[int, str] = {}
    for name, tensor in plain.items():
        if seen.setdefault(tensor.untyped_storage().data_ptr(), name) != name:
            plain[name] = tensor.clone()
    text = json.dumps({**document, "version": VERSION})
    save_file(plain, beside, metadata={"document": text, "digest": _digest(text, plain)})
    share([beside], path.parent)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def read_document(path: Path) -> dict[str, Any]:
    """The JSON document of a state, unchecked; empty where it cannot be read, which `read_state` explains."""
    try:
        return dict(as_mapping(parse_json(parse_header(path).metadata["document"], finite=False)))
    except (UnreadableError, OSError, KeyError):
        return {}


def read_state(path: Path, kind: type[BaseModel] = StateDocument) -> tuple[Tensors, dict[str, Any]]:
    """What `write_state` wrote, its document typed and its bytes those that were written.

    Raises:
        TrainingError: where the file is damaged or from another version.
    """
    try:
        metadata = parse_header(path).metadata
        if "document" not in metadata:
            raise UnreadableError("has no document in its header")
        text = metadata["document"]
        document = dict(as_mapping(parse_json(text, finite=False)))
        if document.get("version") != VERSION:
            raise TrainingError(
                f"The checkpoint {path} must be of version {VERSION}, found {shown(document.get('version'))}: "
                "go on with the surgery that wrote it, or delete it to start anew."
            )
        kind.model_validate_json(text)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # States of earlier versions have no digest.
        if metadata.get("digest", found := _digest(text, tensors)) != found:
            raise UnreadableError("does not hold what was written")
    except ValidationError as error:
        raise _unusable(path, "; ".join(broken_rules(error, 5))) from None
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(path, shown_text(" ".join(str(error).split()))) from None
    return {StateKey.parse(name): tensor for name, tensor in tensors.items()}, document


def of_model(tensors: Mapping[StateKey, Tensor]) -> Tensors:
    """The joint model's tensors of a state, by the keys that they have without one."""
    return {replace(key, model=False): tensor for key, tensor in tensors.items() if key.model}


def _unusable(path: Path, why: str) -> TrainingError:
    return TrainingError(f"The checkpoint {path} cannot be read ({why}): delete it to start anew.")


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{content_hash(tensors)} {text}".encode()).hexdigest()
