"""Folders of Llama models with random bfloat16 weights, of any size, made tensor by tensor and so without memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA = {
    "fast": (64, 2, 128, 4, 2, 128),
    "0.03": (512, 6, 1376, 8, 8, 8000),
    "0.1": (768, 10, 2048, 12, 12, 16000),
    "0.3": (1024, 20, 2816, 16, 8, 32000),
    "1.1": (2048, 22, 5632, 32, 4, 32000),
    "3": (3200, 26, 8640, 32, 32, 32000),
    "7": (4096, 32, 11008, 32, 32, 32000),
    "70": (8192, 80, 28672, 64, 8, 32000),
}
"""By billions of parameters: hidden size, layers, intermediate size, heads, those of keys and values, words."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a folder to be made: its name and shape, and the deviation of its values."""

    name: str
    shape: tuple[int, ...]
    deviation: float

    @property
    def nbytes(self) -> int:
        """Bytes of it in bfloat16."""
        return 2 * math.prod(self.shape)


def llama(size: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Configuration and tensors of a Llama model of random weights."""
    hidden, layers, inner, heads, groups, words = LLAMA[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": words,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
    }
    less = hidden // heads * groups
    tensors = [Tensor("model.embed_tokens.weight", (words, hidden), 0.02)]
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (less, hidden),
            "self_attn.v_proj": (less, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        tensors += [Tensor(f"{at}.{name}.weight", shape, 0.02) for name, shape in shapes.items()]
        tensors += [
            Tensor(f"{at}.{name}.weight", (hidden,), 0.0)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    tensors += [Tensor("model.norm.weight", (hidden,), 0.0), Tensor("lm_head.weight", (words, hidden), 0.02)]
    return config, tensors


def make_folder(
    folder: Path, size: str, seed: int, base: Path | None = None, sparse: bool = False, shard: int = 2 * 10**9
) -> int:
    """Write a transformers folder of random weights, tensor by tensor, in shards as the hub's libraries name them.

    Args:
        folder: made anew.
        size: in billions of parameters, a key of `LLAMA`.
        seed: of the weights.
        base: a folder of the same size of which this one is a fine-tune: its linear maps are moved by a tenth of a
            deviation, of rank 8, everything else is as it is.
        sparse: whether headers alone are written, and files are holes behind these.
        shard: bytes of a file.

    Returns:
        bytes of all files of weights.
    """
    folder.mkdir(parents=True)
    config, tensors = llama(size)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + tensor.nbytes > shard:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, held in zip(names, shards, strict=True):
        _write_shard(folder / name, held, None if sparse else _values(tensors, seed, base))
    total = sum(tensor.nbytes for tensor in tensors)
    where = {tensor.name: name for name, held in zip(names, shards, strict=True) for tensor in held}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_shard(
    path: Path, tensors: Sequence[Tensor], values: Callable[[Tensor], Iterator[Any]] | None
) -> None:
    """A safetensors file as its own library lays it out: its header is padded to 8 bytes and no further."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}  # pyright: ignore[reportArgumentType]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors if values is not None else ():
            for piece in values(tensor):  # pyright: ignore[reportOptionalCall]
                file.write(piece)
        file.truncate(8 + len(text) + end)


def _values(tensors: Sequence[Tensor], seed: int, base: Path | None) -> Callable[[Tensor], Iterator[Any]]:
    """The bytes of each tensor, some rows at a time."""
    import torch
    from safetensors import safe_open

    number = {tensor.name: i for i, tensor in enumerate(tensors)}
    held = (
        {} if base is None else json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    )

    def values(tensor: Tensor) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed * 10_000 + number[tensor.name])
        rows, width = tensor.shape[0], math.prod(tensor.shape[1:])
        step = max(1, (1 << 22) // width)
        moves = base is not None and ".layers." in tensor.name and len(tensor.shape) == 2
        left, right = torch.randn(rows, 8, generator=generator), torch.randn(8, width, generator=generator)
        if base is not None:
            with safe_open(str(base / held[tensor.name]), "pt") as file:
                given = file.get_slice(tensor.name)
                for start in range(0, rows, step):
                    piece = given[start : start + step]
                    if moves:
                        move = left[start : start + step] @ right * (tensor.deviation * 0.1 / 8**0.5)
                        piece = (piece.float() + move).bfloat16()
                    yield piece.contiguous().view(-1).view(torch.uint8).numpy().data
            return
        for start in range(0, rows, step):
            shape = (min(step, rows - start), *tensor.shape[1:])
            piece = torch.randn(shape, generator=generator) * tensor.deviation + (tensor.deviation == 0)
            yield piece.bfloat16().view(-1).view(torch.uint8).numpy().data

    return values
