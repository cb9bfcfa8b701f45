"""Generation by a Triton kernel against `embedding_bag` on a GPU: `python -m benchmarks.triton_kernel`.

The problems are those of `benchmarks.kernel`. One Triton program sums one bag of rows, so that the same kernel makes
blocks and, with the transposed code at hand, the gradient of rows without atomics; another takes one dot product for
each entry, the gradient of coefficients. Competitors take turns; medians over rounds. `TRITON_INTERPRET=1` runs the
kernels on a CPU, to see that they are right.

`--steps` times whole captured steps of `benchmarks.joint_step` in which either generates, `--models large` those of
ViT-B/16, BERT-base and ResNet-50. Steps of Triton are to be 1.3 times as fast before it is worth its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import joint_step
from benchmarks.harness import judge, make_header, make_parser, show, take_turns
from benchmarks.kernel import LOCATIONS, Problem, both_ways, embedding_bag, make_problem
from surgery.core.kernel import TransposedIndex, transpose
from surgery.methods.hypermodules import contest
from surgery.methods.rows import bank

WANTED = 1.3


@triton.jit
def _sum_bag(source, index, weight, offset, result, width, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    bag = tl.program_id(0)
    column = tl.arange(0, lanes)
    inside = column < width
    total = tl.zeros((lanes,), tl.float32)
    for entry in range(tl.load(offset + bag), tl.load(offset + bag + 1)):
        row = tl.load(index + entry)
        total += tl.load(weight + entry) * tl.load(source + row * width + column, mask=inside, other=0.0)
    tl.store(result + bag * width + column, total, mask=inside)


@triton.jit
def _dot_entry(rows, index, grad, location, result, width, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0)
    column = tl.arange(0, lanes)
    inside = column < width
    row, place = tl.load(index + entry), tl.load(location + entry)
    mine = tl.load(rows + row * width + column, mask=inside, other=0.0)
    theirs = tl.load(grad + place * width + column, mask=inside, other=0.0)
    tl.store(result + entry, tl.sum(mine * theirs))


def sum_bags(source: Tensor, index: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """`weight[e] * source[index[e]]` summed over `e = offset[b] .. offset[b+1]-1`: `[n, d]` of `[N, d]`."""
    bags, width = len(offset) - 1, source.shape[1]
    result, lanes = source.new_empty(bags, width), triton.next_power_of_2(width)
    start: Any = _sum_bag[(bags,)]  # type: ignore[reportIndexIssue]
    start(source, index, weight, offset, result, width, lanes, num_warps=2)
    return result


def dot_entries(rows: Tensor, index: Tensor, grad: Tensor, location: Tensor) -> Tensor:
    """`rows[index[e]] . grad[location[e]]`: `[E]`."""
    result, width = rows.new_empty(len(index)), rows.shape[1]
    lanes = triton.next_power_of_2(width)
    _dot_entry[(len(index),)](rows, index, grad, location, result, width, lanes, num_warps=2)  # type: ignore[reportIndexIssue]
    return result


class _Generate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, coefficient: Tensor, index: Tensor, offset: Tensor, code: TransposedIndex
    ) -> Tensor:
        ctx.save_for_backward(rows, coefficient, index, offset)
        ctx.code = code
        return sum_bags(rows, index.reshape(-1), coefficient.reshape(-1), offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        rows, coefficient, index, offset = ctx.saved_tensors
        grad = grad.contiguous()
        code = ctx.code
        own = sum_bags(grad, code.location, coefficient.reshape(-1)[code.entry], code.offset)
        location = torch.arange(len(offset) - 1, device=index.device).repeat_interleave(
            offset.diff(), output_size=index.numel()
        )
        entries = dot_entries(rows, index.reshape(-1), grad, location)
        return own, entries.view(index.shape), None, None, None


def by_triton(problem: Problem, code: TransposedIndex) -> Tensor:
    """All blocks `[L, d]`."""
    locations, wide = problem.index.shape
    offset = torch.arange(locations + 1, device=problem.index.device) * wide
    return _Generate.apply(problem.rows, problem.coefficient, problem.index, offset, code)


@contextmanager
def in_steps() -> Iterator[None]:
    """Inside, banks and contests generate by Triton. Their alignment must stay as it is."""
    known: dict[tuple[int, ...], TransposedIndex] = {}

    def generate(
        rows: Tensor,
        index: Tensor,
        coefficient: Tensor,
        transposed: TransposedIndex | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        # On a device nobody keeps the transposed code of a bank, and making it waits for the device.
        key = (len(rows), *index.shape)
        code = transposed or known.setdefault(key, known.get(key) or transpose(index, len(rows), offset))
        if offset is None:
            offset = torch.arange(len(index) + 1, device=index.device) * index.shape[1]
        return _Generate.apply(rows.contiguous(), coefficient.contiguous(), index.contiguous(), offset, code)

    before = bank.generate, contest.generate
    bank.generate = contest.generate = generate
    try:
        yield
    finally:
        bank.generate, contest.generate = before


def agrees(problem: Problem) -> bool:
    """Whether both ways give the same blocks and gradients, up to rounding."""
    code, found = transpose(problem.index, len(problem.rows)), []
    for way in (embedding_bag, partial(by_triton, code=code)):
        blocks = way(problem)
        gradients = torch.autograd.grad(blocks, (problem.rows, problem.coefficient), problem.grad)
        found.append((blocks.detach(), *gradients))
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*found, strict=True))


def measure(hypermodules: int, locations: int, device: str, rounds: int) -> dict[str, Any]:
    """Median milliseconds both ways and of the forward pass alone, and how many times as fast Triton is."""
    problem = make_problem(hypermodules, locations, device)
    code = transpose(problem.index, len(problem.rows))
    triton_way = partial(by_triton, code=code)
    ways: dict[str, Callable[[], object]] = {
        "bag forward": torch.no_grad()(partial(embedding_bag, problem)),
        "triton forward": torch.no_grad()(partial(triton_way, problem)),
        "bag": partial(both_ways, problem, embedding_bag),
        "triton": partial(both_ways, problem, triton_way),
    }
    times = {name: 1e3 * each.median for name, each in take_turns(ways, rounds, 3, device).items()}
    return {
        "hypermodules": hypermodules,
        "agree": agrees(problem),
        **times,
        "forward, times": times["bag forward"] / times["triton forward"],
        "both ways, times": times["bag"] / times["triton"],
    }


def measure_steps(size: Sequence[int], options: Any) -> list[dict[str, Any]]:
    """Captured steps in which `embedding_bag` and Triton generate, with and without alternatives that compete."""
    members, batches = joint_step.prepare(size, options)
    found = []
    for competing in (False, True):
        steps: dict[str, Callable[[], object]] = {}
        for name in ("bag", "triton"):
            trainer = joint_step.make_trainer(members, batches, options, competing, capture=True)
            steps[name] = trainer.train_step
            if name == "bag":
                _repeat(steps[name])
            else:
                with in_steps():
                    _repeat(steps[name])
        times = {
            name: 1e3 * each.median for name, each in take_turns(steps, options.rounds, 3, "cuda").items()
        }
        found.append(
            {
                "batch": "/".join(map(str, size)),
                "step": "competing" if competing else "joint",
                **times,
                "times": times["bag"] / times["triton"],
            }
        )
    return found


def _repeat(step: Callable[[], object]) -> None:
    for _ in range(4):  # the third is captured
        step()


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--locations", type=int, default=LOCATIONS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--steps", action="store_true", help="time whole captured steps")
    joint_step.add_options(parser)
    options = parser.parse_args(argv)
    if options.steps:
        sizes = options.batch or ((joint_step.LARGE,) if options.models == "large" else joint_step.BATCHES)
        rows = [row for size in sizes for row in measure_steps(size, options)]
        verdict = judge(
            "a step of `embedding_bag` at most so many of Triton's", min(r["times"] for r in rows), WANTED
        )
        show("Captured steps", make_header("triton_kernel", options, argv), rows, [verdict], options.json)
        return
    counts = [options.locations, options.locations // 8, options.locations // 64]
    results = [measure(count, options.locations, options.device, options.rounds) for count in counts]
    least = min(result["both ways, times"] for result in results)
    verdict = judge("embedding_bag's time at most so many times Triton's", least, WANTED)
    show(
        "Generation by Triton", make_header("triton_kernel", options, argv), results, [verdict], options.json
    )


if __name__ == "__main__":
    main()
