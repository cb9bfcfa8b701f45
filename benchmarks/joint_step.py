"""One training step of LeNet, an LSTM language model and DeepBind jointly, against the three plain models.

Random tensors; pictures of 28x28, texts of 35 words from a vocabulary of 33,278, sequences of 101 bases; batches
of 16/2/16 and of 64/8/64. *Joint* is what training does in one step while a contest with lambda = 1 is open over
half of all locations: generate once, forward and backward passes of all three, one backward pass through the
dictionary, one optimizer step; *captured* is the same as a CUDA graph (`train.capture`). It begins at the pessimistic
start, where every location has a hypermodule of its own, so no later step costs more. *Plain* is the three models, each
with its own optimizer; captured, all three are one graph. All take turns in one process; peak memory is that of a
process of its own for each, libraries included, or on a device what each takes there.

`--models large` takes ViT-B/16 (224x224), BERT-base (128 tokens) and ResNet-50 (224x224) of transformers with random
weights, in batches of 32; `--narrow` begins with one basis block for each location, as evolution at a price does.

    python -m benchmarks.joint_step --device cuda --bf16 --models large --narrow
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from surgery_recipes.nets import deepbind, lenet, word_model
from torch import Tensor, nn

import surgery
from benchmarks.harness import judge, make_header, make_parser, show, take_turns
from surgery.methods.hypermodules.settings import Evolution
from surgery.settings.training import Training
from surgery.training.loop.trainer import Trainer
from surgery.training.tasks.tasks import Task, prediction_of
from surgery.training.train import start

WORDS, LENGTH, BASES = 33_278, 35, 101
BATCHES = ((16, 2, 16), (64, 8, 64))
LARGE = (32, 32, 32)
LARGE_LIMITS = {"time": 1.05, "memory": 1.3}
LIMITS = {(16, 2, 16): 1.25, (64, 8, 64): 1.08}
Batch = tuple[Tensor, Tensor]


def make_members(seed: int, words: int, width: int, tied: bool) -> list[surgery.Member]:
    """The three members, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = {
            "lenet": lenet(16),
            "lstm": word_model(words, width, tied=tied),
            "deepbind": deepbind(width, classes=2, length=BASES),
        }
    return [
        surgery.load_member(module, name=name, inputs=inputs, seed=seed)
        for name, (module, inputs) in made.items()
    ]


def make_batches(sizes: Sequence[int], words: int, seed: int, device: str) -> dict[str, Batch]:
    """Random inputs and targets of each member."""
    generator = torch.Generator().manual_seed(seed)
    pictures, texts, sequences = sizes
    found = {
        "lenet": (
            torch.randn(pictures, 1, 28, 28, generator=generator),
            torch.randint(10, (pictures,), generator=generator),
        ),
        "lstm": (
            torch.randint(words, (texts, LENGTH), generator=generator),
            torch.randint(words, (texts, LENGTH), generator=generator),
        ),
        "deepbind": (
            torch.randn(sequences, 4, BASES, generator=generator),
            torch.randint(2, (sequences,), generator=generator),
        ),
    }
    return {name: (x.to(device), y.to(device)) for name, (x, y) in found.items()}


def make_large_members(seed: int, fast: bool) -> list[surgery.Member]:
    """ViT-B/16, BERT-base and ResNet-50 with random weights; tiny ones of the same kinds where it is fast."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = {**small, "intermediate_size": 64} if fast else {}
    stages: dict[str, Any] = (
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]} if fast else {}
    )
    picture, text = torch.zeros(2, 3, 224, 224), torch.zeros(2, 16, dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = {
            "vit": (ViTForImageClassification(ViTConfig(**small)), picture),
            "bert": (BertForSequenceClassification(BertConfig(**small)), text),
            "resnet": (ResNetForImageClassification(ResNetConfig(**stages)), picture),
        }
    return [
        surgery.load_member(module, name=name, inputs=(inputs,), seed=seed)
        for name, (module, inputs) in made.items()
    ]


def make_large_batches(sizes: Sequence[int], seed: int, device: str) -> dict[str, Batch]:
    """Random pictures, texts of 128 tokens and pictures."""
    generator = torch.Generator().manual_seed(seed)
    pictures, texts, others = sizes
    found = {
        "vit": torch.randn(pictures, 3, 224, 224, generator=generator),
        "bert": torch.randint(30_000, (texts, 128), generator=generator),
        "resnet": torch.randn(others, 3, 224, 224, generator=generator),
    }
    return {
        name: (x.to(device), torch.randint(2, (len(x),), generator=generator).to(device))
        for name, x in found.items()
    }


class Again:
    """One batch, as often as it is asked for."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        return repeat(self.batch)


def plain_step(
    modules: dict[str, nn.Module], batches: dict[str, Batch], optimizers: list[Any], bf16: bool
) -> None:
    """One step of each plain model."""
    for name, module in modules.items():
        inputs, target = batches[name]
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            scores = prediction_of(module(inputs))
            loss = F.cross_entropy(scores.flatten(0, -2).float(), target.flatten())
        (loss / len(modules)).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def captured_plain_step(
    modules: dict[str, nn.Module], batches: dict[str, Batch], bf16: bool
) -> Callable[[], object]:
    """The same step as a CUDA graph, after three ordinary ones."""
    optimizers = [
        torch.optim.Adam(m.parameters(), lr=1e-3, fused=True, capturable=True) for m in modules.values()
    ]
    step = partial(plain_step, modules, batches, optimizers, bf16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def make_trainer(
    members: Sequence[surgery.Member],
    batches: dict[str, Batch],
    options: Any,
    competing: bool,
    capture: bool = False,
) -> Trainer:
    """A trainer at the pessimistic start, with an open contest where alternatives compete."""
    from accelerate import Accelerator

    joint = surgery.join([deepcopy(member) for member in members])
    evolution = Evolution(fraction=0.5, challengers=1, narrow=options.narrow)
    settings = Training(evolution=evolution, capture=capture)
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision="bf16" if options.bf16 else "no")
    start(joint, settings, options.seed)
    tasks = [Task(name, name, Again(batch)) for name, batch in batches.items()]
    trainer = Trainer(joint, tasks, settings, options.seed, accelerator)
    joint.bodies.train()
    if competing:
        for each in trainer.moves:
            each.before_generation()
    return trainer


def make_competitors(
    members: Sequence[surgery.Member], batches: dict[str, Batch], options: Any
) -> dict[str, Callable[[], Callable[[], object]]]:
    """What makes one step of the plain models, of the joint one, and of the joint one in a contest."""

    def plain_modules() -> dict[str, nn.Module]:
        return {m.name: deepcopy(m.module).to(options.device).train() for m in members}

    def plain() -> Callable[[], object]:
        modules = plain_modules()
        optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3, fused=True) for m in modules.values()]
        return partial(plain_step, modules, batches, optimizers, options.bf16)

    found = {
        "plain": plain,
        "joint": lambda: make_trainer(members, batches, options, False).train_step,
        "competing": lambda: make_trainer(members, batches, options, True).train_step,
    }
    if options.device != "cpu":
        found |= {
            "joint, captured": lambda: make_trainer(members, batches, options, False, True).train_step,
            "competing, captured": lambda: make_trainer(members, batches, options, True, True).train_step,
            "plain, captured": lambda: captured_plain_step(plain_modules(), batches, options.bf16),
        }
    return found


def build(
    made: dict[str, Callable[[], Callable[[], object]]], device: str
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Steps of all competitors, and the MB that each takes at most in a few steps on a device, beside the others."""
    steps: dict[str, Callable[[], object]] = {}
    peaks: dict[str, float] = {}
    for name, make in made.items():
        if device == "cpu":
            steps[name] = make()
            continue
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            step = make()
            for _ in range(4):
                step()
        except (surgery.SurgeryError, RuntimeError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)  # where members cannot be captured
            continue
        steps[name] = step
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return steps, peaks


def peak_memory(name: str, size: Sequence[int], options: Any) -> float:
    """MB at most in use in a few steps of one competitor, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, tuple(size), options))


def _peak(name: str, size: tuple[int, ...], options: Any) -> float:
    torch.set_num_threads(options.threads)
    members, batches = prepare(size, options)
    step = make_competitors(members, batches, options)[name]()
    del members
    for _ in range(3):
        step()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS
    # Linux counts what the parent process used into `ru_maxrss`.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


def prepare(size: Sequence[int], options: Any) -> tuple[list[surgery.Member], dict[str, Batch]]:
    """Members and one batch of each."""
    if options.models == "large":
        members = make_large_members(options.seed, options.fast)
        return members, make_large_batches(size, options.seed, options.device)
    words, width = (500, 32) if options.fast else (WORDS, 256)
    members = make_members(options.seed, words, width, not options.untied)
    return members, make_batches(size, words, options.seed, options.device)


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split("/"))
    if len(sizes) != 3:
        raise ValueError(f"three batch sizes are needed, as in 16/2/16; found {text}")
    return sizes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what a step is."""
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--untied", action="store_true", help="an output layer of its own for the LSTM")
    parser.add_argument(
        "--batch", action="append", type=_sizes, metavar="A/B/C", help="of the three members; repeat for more"
    )
    parser.add_argument("--models", choices=("small", "large"), default="small")
    parser.add_argument("--narrow", action="store_true", help="one basis block for each location, c = 1")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--no-peak", action="store_true", help="leave the peak memory unmeasured")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    results, verdicts = [], []
    large = options.models == "large"
    for size in ((2, 1, 2),) if options.fast else options.batch or ((LARGE,) if large else BATCHES):
        steps, peaks = build(make_competitors(*prepare(size, options), options), options.device)
        rounds = 1 if options.fast else options.rounds
        times = take_turns(steps, rounds, 2, options.device)
        if options.device == "cpu" and not options.fast and not options.no_peak:
            peaks = {name: peak_memory(name, size, options) for name in steps}
        del steps
        label = "/".join(map(str, size))
        for name, timing in times.items():
            results.append(
                {
                    "batch": label,
                    "step": name,
                    "median ms": timing.median * 1e3,
                    "fastest ms": timing.fastest * 1e3,
                    "slowest ms": timing.slowest * 1e3,
                    "ratio to plain": timing.median / times["plain"].median,
                    "peak MB": peaks.get(name),
                }
            )
        if large:
            for name in (name for name in times if not name.startswith("plain")):
                ratio = times[name].median / times["plain"].median
                verdicts.append(judge(f"{name} / plain, time", ratio, LARGE_LIMITS["time"]))
                if peaks:
                    memory = peaks[name] / peaks["plain"]
                    verdicts.append(judge(f"{name} / plain, memory", memory, LARGE_LIMITS["memory"]))
        elif "competing, captured" in times:
            ratio = times["competing, captured"].median / times["plain"].median
            verdicts.append(judge(f"competing, captured / plain at {label}", ratio, 1.0))
        elif size in LIMITS:
            ratio = times["competing"].median / times["plain"].median
            verdicts.append(judge(f"competing / plain at {label}", ratio, LIMITS[size]))
    precision = "bfloat16" if options.bf16 else "float32"
    contest = f"p = 0.5, lambda = 1, c = {1 if options.narrow else 4}"
    title = f"one training step of three members, {contest}, {options.device}, {precision}"
    show(title, make_header("joint_step", options, argv), results, verdicts, options.json)


if __name__ == "__main__":
    main()
