"""Checkpoints that were quantised by other tools: which library wrote them, and what to do."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from surgery.errors import LoadError

LIBRARIES = {
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_4bit": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_8bit": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "torchao": ("torchao", "torchao"),
    "hqq": ("hqq", "hqq"),
    "aqlm": ("aqlm", "aqlm"),
    "eetq": ("eetq", "eetq"),
    "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu"),
    "fp8": ("", ""),  # transformers reads it by itself
    "mxfp4": ("kernels", "kernels"),
}
"""Module and package by `quant_method`."""


def check_library(config: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint whose weights are quantised by a library that is not installed.

    Args:
        config: the content of `config.json`.
        where: the folder or hub id, for the error.

    Raises:
        LoadError: naming the method, the library, and what to do.
    """
    quantised = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(quantised, Mapping):
        return
    method = str(
        quantised.get("quant_method") or ("bitsandbytes" if quantised.get("load_in_4bit") else "unknown")
    )
    module, package = LIBRARIES.get(method, ("", ""))
    if not module or _installed(module):
        return
    raise LoadError(
        f"{where}: weights must be floating-point numbers, but they are quantised (quant_method '{method}'), and the "
        f"library that reads them, {package}, is not installed: pip install {package}, load the checkpoint with "
        "transformers, and give the folder that model.dequantize() and save_pretrained write; or give the checkpoint "
        "that was quantised"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
