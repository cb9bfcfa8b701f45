"""Where a transformers model lies: a folder and what it must hold, or a hub id and whether it can be reached."""

from __future__ import annotations

import io
import os
from pathlib import Path

from surgery.disk.untrusted import is_regular, read_regular
from surgery.errors import LoadError
from surgery.members.origins.base import check_files, read_config
from surgery.members.origins.bounded import by_file
from surgery.members.origins.licences import CARD, TEXTS
from surgery.members.origins.weights import check_safetensors
from surgery.safetensors.header import misnamed, parse_header
from surgery.util.text import one_line

FILES = (
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "chat_template*",
    "additional_chat_templates/*", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modules.json",
    "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]*_*/config.json",
    "[0-9]*_*/model.safetensors", "[0-9]*_*/pytorch_model.bin", *TEXTS,
)  # fmt: skip
"""Small files that a folder needs besides its weights, sentence-transformers' own among them: of modules such as a
dense layer behind the pooling with their weights, which are no part of the model."""
_WEIGHTS = ("*.safetensors", "*.bin")
LARGEST_PART = 1 << 28  # bytes of the weights of one module behind the model
_PATIENCE = 10.0  # seconds for the hub's first answer


def check_hub(head: str) -> None:
    """Whether a hub id `org/name[@revision]` is cached or can be reached; the hub is asked once.

    Raises:
        LoadError: where it is not.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    where, revision = split_revision(head)
    if isinstance(try_to_load_from_cache(where, "config.json", revision=revision), str):
        return
    try:
        if constants.HF_HUB_OFFLINE:
            raise LoadError(
                failed(where, revision, "looking for it", OSError("the hub is set to be offline"))
            )
        get_hf_file_metadata(hf_hub_url(where, "config.json", revision=revision), timeout=_PATIENCE)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise LoadError(failed(where, revision, "looking for it", error)) from error
    except (HfHubHTTPError, LoadError) as error:  # what else the hub says, loading understands better
        if isinstance(error, LoadError):
            raise
    except Exception as error:  # no network: the class of the error depends on the hub client's version
        raise LoadError(failed(where, revision, "looking for it", error)) from error


def check_folder(folder: Path, stored: bool) -> None:
    """What can be said about a folder before anything is built; `stored` asks for weights."""
    if not any(folder.iterdir()):
        raise LoadError(f"{folder} is empty: give a folder with config.json and weights")
    path = folder / "config.json"
    if not os.path.lexists(path) and os.path.lexists(folder / "manifest.json"):
        raise LoadError(
            f"{folder} is an artifact, which may hold several members: a model alone is the folder that a plain export "
            "of one of them writes; merge and train take the artifact itself"
        )
    if not os.path.lexists(path):
        raise LoadError(
            f"{folder} has no config.json: give a folder that save_pretrained wrote, or timm:NAME=weights"
        )
    config = read_config(path)
    if not (config.get("model_type") or config.get("auto_map")):
        raise LoadError(
            f"{path} must name a 'model_type' (transformers) or an 'architecture' (timm), but has neither"
        )
    weights = [file for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
    check_files([*weights, *folder.glob("*.json")])
    if not stored:
        return
    if not weights:
        raise LoadError(
            f"{folder} has a config.json but no weights (model.safetensors or pytorch_model.bin): add them, or have "
            f"weights drawn at random with {folder}?pretrained=false"
        )
    for index in sorted(folder.glob("*.index.json")):  # of weights in several files
        named = read_config(index).get("weight_map")
        files = set(map(str, named.values())) if isinstance(named, dict) else set()
        if outside := sorted(name for name in files if Path(name).is_absolute() or ".." in Path(name).parts):
            raise LoadError(f"{index} must name files of its own folder, found {', '.join(outside[:3])}")
    for file in weights:
        if file.suffix == ".safetensors":
            check_safetensors(file)


def part_files(folder: Path) -> dict[str, bytes]:
    """Weights of sentence-transformers' modules behind the model, such as a dense layer, as safetensors files.

    They are no part of the model, and are kept as they are beside it.

    Raises:
        LoadError: where one is larger than what is kept beside a model, or cannot be read without running code.
    """
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("[0-9]*_*/*")):
        place = path.parent / "model.safetensors"
        if path.name not in ("model.safetensors", "pytorch_model.bin") or not is_regular(path):
            continue
        try:
            data = read_regular(path, LARGEST_PART)
            if path.name == "model.safetensors":
                parse_header(path)
            elif not place.exists():
                import torch
                from safetensors.torch import save

                state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
                data = save({name: tensor.contiguous() for name, tensor in state.items()})
            else:
                continue
        except Exception as error:  # damaged, too large, or a pickle of other things
            if other := misnamed(path):
                raise LoadError(f"{path} {other}") from None
            raise LoadError(
                f"{path} must hold the weights of a module of sentence-transformers, of at most {LARGEST_PART:,} "
                f"bytes, but {one_line(error)}: copy the model again, or give its first module's folder alone"
            ) from error
        found[place.relative_to(folder).as_posix()] = data
    return found


def bounds_of(folder: Path) -> dict[str, int]:
    """What the weights of a folder could fill; nothing where they say so only when they are read."""
    headers = [parse_header(path) for path in folder.glob("*.safetensors")]
    return by_file([shape for header in headers for _, shape in header.tensors.values()]) if headers else {}


def snapshot(where: str, revision: str | None) -> Path:
    """The small files of a hub model, in the hub client's cache."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(where, revision=revision, allow_patterns=[*FILES, CARD]))


def split_revision(head: str) -> tuple[str, str | None]:
    """`"org/name@main"` -> `("org/name", "main")`."""
    name, _, revision = head.partition("@")
    return name, revision or None


def failed(where: str, revision: str | None, step: str, error: BaseException) -> str:
    """One sentence for a failure in transformers: what was tried and what to do."""
    if Path(where).is_dir():
        return (
            f"{where}: {step} failed: {one_line(error)}; check that config.json and the weights are complete"
        )
    at = f" at revision '{revision}'" if revision else ""
    return (
        f"'{where}' is no local folder, and {step} from the hub{at} failed: {one_line(error, 160)}; check "
        "the name and the network (HF_HUB_OFFLINE must be unset unless it is cached), or give a local folder"
    )
