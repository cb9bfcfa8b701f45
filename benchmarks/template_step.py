"""One training step with layers generated from templates, against the plain model: what generating a stack costs.

Isometric nets of eight layers from four templates, at batch 128. *templates* is a whole step of a joint model: mixtures
to weights, forward and backward pass, gradients back to templates and mixtures, one step of Adam. *generating* is the
part of it that a plain model does not have, forward and backward, by itself. All take turns in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from surgery_recipes.isometric import cnn, vit
from torch import Tensor, nn

import surgery
from benchmarks.harness import judge, make_header, make_parser, show, take_turns
from surgery.anatomy.sites import discover
from surgery.core.joint import JointModel
from surgery.methods.templates.mixtures import Templates
from surgery.methods.templates.plan import plan_templates

NETS = {"cnn": cnn, "vit": vit}
LAYERS, TEMPLATES, LIMIT = 8, 4, 0.05


def step(run: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> None:
    """Forward and backward pass."""
    F.cross_entropy(run(batch[0]), batch[1]).backward()


def plain_step(net: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> None:
    step(net, batch)
    optimizer.step()
    optimizer.zero_grad()


def template_step(joint: JointModel, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> None:
    with joint.step():
        step(joint["net"], batch)
    optimizer.step()
    optimizer.zero_grad()


def generate_only(joint: JointModel, gradients: Sequence[Tensor]) -> None:
    """All weights of the stack, and gradients of all of them back to templates and mixtures."""
    torch.autograd.backward(list(joint.generate().values()), gradients)
    joint.zero_grad()


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    size, rounds = (4, 1) if options.fast else (options.batch, options.rounds)
    results, verdicts = [], []
    for name, build in NETS.items():
        torch.manual_seed(options.seed)
        net, inputs = build(layers=LAYERS)
        pictures = torch.randn(size, *inputs[0].shape[1:]).to(options.device)
        batch = pictures, torch.randint(10, (size,)).to(options.device)
        plain = deepcopy(net).to(options.device).train()
        member = surgery.load_member(net, name="net", inputs=inputs)
        joint = surgery.join([member], plan_templates([discover(member)]))
        joint.open(templates=Templates(TEMPLATES, start="uniform")).to(options.device).train()
        gradients = [torch.ones_like(weight) for weight in joint.generate().values()]
        competitors = {
            "plain": partial(plain_step, plain, batch, torch.optim.Adam(plain.parameters(), fused=True)),
            "templates": partial(
                template_step, joint, batch, torch.optim.Adam(joint.parameters(), fused=True)
            ),
            "generating": partial(generate_only, joint, gradients),
        }
        times = take_turns(competitors, rounds, 2, options.device)
        for kind, timing in times.items():
            ratio = timing.median / times["plain"].median
            results.append(
                {"net": name, "step": kind, "median ms": timing.median * 1e3, "ratio to plain": ratio}
            )
        cost = times["generating"].median / times["plain"].median
        verdicts.append(judge(f"generating / plain step of {name} at batch {size}", cost, LIMIT))
    title = f"one step, {LAYERS} layers from {TEMPLATES} templates, {options.device}"
    show(title, make_header("template_step", options, argv), results, verdicts, options.json)


if __name__ == "__main__":
    main()
