"""Whether transformers opens a packed checkpoint: tried on outlines of its tensors, then on what was written.

Some classes read weights of layers while they are loaded, to draw what they think is missing, and packed layers have
none. Which ones do differs from version to version of transformers, so it is asked itself.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.errors import ExportError
from surgery.util.quiet import quiet
from surgery.util.text import one_line


def check_outline(
    module: Any, member: str, outlines: Mapping[str, Tensor], quantization: Mapping[str, Any]
) -> str:
    """Open a checkpoint that is not written yet, where compressed-tensors is here to try; no value is looked at.

    Args:
        module: of the model, without weights.
        member: its name, for errors.
        outlines: the tensors that would be written, on the meta device.
        quantization: `quantization_config` of it.

    Returns:
        what is left to see when it is written, in words; empty where nothing is.

    Raises:
        ExportError: where the class reads weights that are packed.
    """
    if not _can_try():
        return ""
    kind, config = type(module), copy.deepcopy(module.config)
    config.quantization_config = dict(quantization)
    try:
        with _silent():
            kind.from_pretrained(None, config=config, state_dict={**outlines}, device_map={"": "meta"})
    except Exception as error:
        if _reads_weights(error):
            raise _refusal(kind, member, error) from error
        said = one_line(error)  # of the meta device, perhaps, and not of what is packed
        return f"whether {kind.__name__} opens it is seen when it is written: without values it raises {said}"
    return ""


def check_opens(folder: Path, kind: Any, member: str) -> None:
    """Open what was written, where compressed-tensors is here to try.

    Args:
        folder: in which it lies.
        kind: class of the model.
        member: its name, for errors.

    Raises:
        ExportError: where transformers cannot.
    """
    if not _can_try():
        return
    try:
        with _silent():
            kind.from_pretrained(folder)
    except Exception as error:
        raise _refusal(kind, member, error) from error


def _can_try() -> bool:
    return importlib.util.find_spec("compressed_tensors") is not None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # where progress is shown
        yield


def _reads_weights(error: Exception) -> bool:
    """Whether it is of a layer that has no weight, because that is packed."""
    return isinstance(error, AttributeError) and isinstance(error.obj, nn.Linear)


def _refusal(kind: Any, member: str, error: Exception) -> ExportError:
    why = "its class reads weights that are packed; " if _reads_weights(error) else ""
    return ExportError(
        f"transformers must open what is written of member '{member}', but {kind.__name__} raises {one_line(error)}: "
        f"{why}export it as plain or transformers."
    )
