"""Templates with bits: one model and a family of siblings within an error, by method, in bytes and measured errors.

The model is all-MiniLM-L6-v2, whose weights come as a Python package. Its siblings are made here: the same model with
normal noise on every matrix, independent for each, of a given size relative to the matrix; real fine-tunes differ in
less than that, and more alike. All methods have the same bound on the same made-up inputs.

    python -m benchmarks.template_bits
    python -m benchmarks.template_bits --siblings 3 --noise 0.02 --max-error 0.02
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import make_header, make_parser, show
from surgery import Member, discover, fit, join, load_member, make_plan
from surgery.methods.templates.plan import plan_templates

METHODS: dict[str, dict[str, Any]] = {
    "hypermodules": {},
    "templates, linear": {"mixture": "linear"},
    "templates, softmax": {"mixture": "softmax"},
    "templates, one-hot": {"mixture": "one-hot"},
}


def load_family(count: int, noise: float, seed: int, fast: bool) -> list[Member]:
    """MiniLM, or a tiny model of its kind, and `count - 1` siblings of it."""
    members = []
    for number in range(count):
        member = load_member(*_base(fast), name=f"m{number}", seed=seed)
        generator = torch.Generator().manual_seed(seed + number)
        with torch.no_grad():
            for p in member.module.parameters():
                if number and p.ndim > 1:
                    p += noise * p.std() * torch.randn(p.shape, generator=generator)
        members.append(member)
    return members


def _base(fast: bool) -> tuple[Any, ...]:
    if not fast:
        from surgery_recipes.pretrained import minilm_folder

        return (str(minilm_folder()),)
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=64
        )
        return (BertModel(config).eval(),)


def measure_method(members: Sequence[Member], method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One method's bytes and errors."""
    found = [discover(member) for member in members]
    plan = make_plan(found) if method == "hypermodules" else plan_templates(found)
    start = time.perf_counter()
    joint = fit(join(members, plan), max_error=options.max_error, seed=options.seed, **METHODS[method])
    report = joint.report
    return {
        "members": len(members), "method": method, "bytes": report.stored_bytes,
        "of fp32": report.stored_bytes / sum(report.original_bytes.values()),
        "largest error": max(report.errors.values()),
        "templates": ", ".join(f"{s.templates} of {s.layers}" for s in report.stacks.values()) or "-",
        "saved by sharing": report.saved["sharing"], "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--siblings", type=int, default=3, help="members of the family")
    parser.add_argument("--noise", type=float, default=0.02, help="of a sibling's matrices, relative")
    parser.add_argument("--max-error", type=float, default=0.05)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--alone", type=int, default=1, help="0 leaves out the model by itself")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = [
        measure_method(load_family(count, options.noise, options.seed, options.fast), method, options)
        for count in ([1] if options.alone else []) + [options.siblings]
        for method in options.methods
    ]
    title = f"Templates with bits, max-error {options.max_error:g}, noise {options.noise:g}"
    show(title, make_header("template_bits", options, argv), rows, [], options.json)


if __name__ == "__main__":
    main()
