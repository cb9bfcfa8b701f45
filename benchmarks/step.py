"""One training step of MiniLM: plain, joined, and joined while alternatives compete.

`python -m benchmarks.step`. A step is forward, backward and, with `--optimizer`, AdamW, at 1,024 and 4,096
tokens in texts of 128. *Joined* has opened every location into a hypermodule of c = 4 basis blocks of its
own; *competing* lets a fraction p of them choose between theirs and lambda = 1 other (MUiR Eq. 8): their code
is `softmax(s) * z` over 2c rows, while all others keep c rows. All take turns in one process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from benchmarks import zoo
from benchmarks.harness import judge, make_header, make_parser, show, take_turns
from surgery import JointModel, Member
from surgery.core.kernel import generate
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.rows.bank import codes

CONTEXT, SAMPLED, LENGTH, LIMIT = 4, 0.5, 128, 1.15
TOKENS = (1024, 4096)


class CompetingBank(HypermoduleBank):
    """A bank in which some locations have one challenger besides their incumbent.

    Attributes:
        sampled: locations with a challenger, `[P]`.
        others: the remaining locations, `[L - P]`.
        challenger: the hypermodule that each sampled location tries, `[P]`.
        soft: parameter `[P, 2]`, the soft weights s of incumbent and challenger.
    """

    def __init__(self, bank: HypermoduleBank, fraction: float, generator: torch.Generator):
        super().__init__(bank.block, bank.rows.detach(), bank.psi, bank.contexts.detach(), bank.hypermodules)
        order = torch.randperm(bank.locations, generator=generator)
        count = round(fraction * bank.locations)
        challenger = torch.randint(bank.hypermodules, (count,), generator=generator)
        self.register_buffer("sampled", order[:count].to(bank.psi.device))
        self.register_buffer("others", order[count:].to(bank.psi.device))
        self.register_buffer("challenger", challenger.to(bank.psi.device))
        self.register_buffer("place", order.argsort().to(bank.psi.device))
        self.soft = nn.Parameter(torch.zeros(count, 2, device=bank.rows.device))

    def blocks(self, start: int = 0, stop: int | None = None, task: str | None = None) -> Tensor:
        """The blocks `[L, m*n]`; sampled and other locations are generated apart, then put in order."""
        parts = [
            generate(self.rows, *self._competing()),
            generate(self.rows, *codes(self.psi[self.others], self.contexts[self.others], self.hypermodules)),
        ]
        return torch.cat(parts)[self.place[start:stop]]

    def _competing(self) -> tuple[Tensor, Tensor]:
        """`index [P, 2c]` and `coefficient [P, 2c]` of the sampled locations. # Eq. (8)"""
        contexts, h = self.contexts[self.sampled], self.soft.softmax(1)
        own, z = codes(self.psi[self.sampled], contexts, self.hypermodules)
        other, _ = codes(self.challenger, contexts, self.hypermodules)
        return torch.cat([own, other], 1), torch.cat([h[:, :1] * z, h[:, 1:] * z], 1)


def joined(member: Member, seed: int, device: str, fraction: float = 0.0) -> JointModel:
    """The member joined and opened, a fraction of its locations competing."""
    joint = surgery.join([deepcopy(member)]).open(CONTEXT, seed)
    if fraction:
        generator = torch.Generator().manual_seed(seed)
        for key in list(joint.dictionary.banks):
            joint.dictionary.banks[key] = CompetingBank(joint.dictionary[key], fraction, generator)
    return joint.to(device)


def make_texts(tokens: int, member: Member, seed: int, device: str) -> dict[str, Tensor]:
    """Random ids in texts of 128 tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = min(LENGTH, tokens)
    vocabulary: Any = member.module.config.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    ids = torch.randint(1000, vocabulary, (tokens // length, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss_of(module: nn.Module, texts: dict[str, Tensor]) -> Tensor:
    return module(**texts).last_hidden_state.square().mean()


def plain_step(module: nn.Module, texts: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    loss_of(module, texts).backward()
    _finish_step(module, optimizer)


def joint_step(joint: JointModel, texts: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    with joint.step():
        loss_of(joint[joint.names[0]], texts).backward()
    _finish_step(joint, optimizer)


def _finish_step(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer:
        optimizer.step()
    module.zero_grad()


def make_competitors(
    member: Member, texts: dict[str, Tensor], options: Any
) -> dict[str, Callable[[], object]]:
    """One step of each kind of model."""

    def optimizer(module: nn.Module) -> torch.optim.Optimizer | None:
        return torch.optim.AdamW(module.parameters(), lr=1e-6) if options.optimizer else None

    plain = deepcopy(member.module).to(options.device).train()
    found: dict[str, Callable[[], object]] = {"plain": partial(plain_step, plain, texts, optimizer(plain))}
    for name, fraction in (("joined", 0.0), ("competing", SAMPLED)):
        joint = joined(member, options.seed, options.device, fraction).train()
        found[name] = partial(joint_step, joint, texts, optimizer(joint))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tokens", type=int, nargs="+", help="in a step; 1024 and 4096 by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizer", action="store_true", help="add an AdamW step")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    tokens = options.tokens or ((64,) if options.fast else TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        member = zoo.tiny_text(Path(folder), options.seed) if options.fast else zoo.minilm()
    results, verdicts = [], []
    for count in tokens:
        texts = make_texts(count, member, options.seed, options.device)
        competitors = make_competitors(member, texts, options)
        times = take_turns(competitors, options.rounds, device=options.device)
        for name, timing in times.items():
            results.append(
                {
                    "tokens": count,
                    "model": name,
                    "median ms": timing.median * 1e3,
                    "fastest ms": timing.fastest * 1e3,
                    "slowest ms": timing.slowest * 1e3,
                    "ratio to plain": timing.median / times["plain"].median,
                }
            )
        if count == max(TOKENS):
            ratio = times["competing"].median / times["plain"].median
            verdicts.append(judge(f"competing / plain at {count:,} tokens", ratio, LIMIT))
    title = f"one training step, p = {SAMPLED}, lambda = 1, c = {CONTEXT}, {options.device}"
    show(title, make_header("step", options, argv), results, verdicts, options.json)


if __name__ == "__main__":
    main()
