"""What routes cost: a hardened route against the plain model of as many layers, and a soft step against one by hand.

hard        a forward pass in eval mode: four of six layers on a hard route, and the plain model of the four, whose
            weights lie where those of the route do; an equal plain model in other memory says how much that matters
one text    the same of layers as wide as MiniLM's, for one text of sixteen tokens
soft        a forward and backward pass: soft routes over four components at four depths, and the same sum by hand
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import make_header, make_parser, show, take_turns

ORDER = (0, 1, -1, 3, -1, 5)


def hard(width: int, tokens: int, texts: int = 8) -> dict[str, Any]:
    """A joint model on a hard route, and its plain form, as functions."""
    import torch
    from transformers import BertConfig, BertModel

    import surgery

    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=6,
        num_attention_heads=4 if width < 384 else 12,
        intermediate_size=4 * width,
        vocab_size=100,
    )
    ids = torch.randint(5, 100, (texts, tokens))
    member = surgery.load_member(BertModel(config).eval(), name="text", inputs=ids)
    settings = {"routing": "permuted", "orders": {"text": {"": ORDER}}}
    joint = surgery.join([member], surgery.plan_modules([member], "routes", settings))
    routed, plain = joint["text"], joint.extract("text").eval()
    other = joint.extract("text").eval()
    joined = surgery.join([surgery.load_member(other, name="text", inputs=ids)], block=(16, 16))["text"]

    share_memory(plain, routed)

    def of(module: Any) -> Any:
        def forward() -> object:
            with torch.no_grad():
                return module(ids)

        return forward

    elsewhere = joint.extract("text").eval()
    return {"plain": of(plain), "plain elsewhere": of(elsewhere), "joined": of(joined), "routed": of(routed)}


def share_memory(plain: Any, routed: Any) -> None:
    """Let the layers of a plain model have the tensors of those of a route."""
    for layer, depth in zip(plain.encoder.layer, (d for d in ORDER if d >= 0), strict=True):
        own = routed.encoder.layer[depth].held[0]
        for name, parameter in layer.named_parameters():
            path, _, attribute = name.rpartition(".")
            parameter.data = getattr(own.get_submodule(path), attribute).detach()


def soft(width: int, rows: int) -> dict[str, Any]:
    """A soft step, and the same by hand, as functions."""
    import torch
    from torch import nn

    import surgery

    parts = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)]
    routed = surgery.Routed(parts, routing="soft").train()
    scores = [nn.Parameter(torch.zeros(4)) for _ in range(4)]
    x = torch.randn(rows, width)

    def by_hand() -> None:
        y = x
        for own in scores:
            g = torch.softmax(own, 0)
            total = g[0] * parts[0](y)
            for share, part in zip(g[1:], parts[1:], strict=True):
                total = total + share * part(y)
            y = total
        y.square().mean().backward()

    return {"by hand": by_hand, "routed": lambda: routed(x).square().mean().backward()}


def main(argv: Sequence[str] | None = None) -> None:
    """Both ratios in one run."""
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    width, tokens, rounds = (32, 8, 3) if options.fast else (256, 64, options.rounds)
    rows = []
    one = (32, 4, 1) if options.fast else (384, 16, 1)
    for name, competitors, times_more in (
        ("hard", hard(width, tokens), 1),
        ("one text", hard(*one), 10),
        ("soft", soft(width, 8 * tokens), 1),
    ):
        times = take_turns(competitors, times_more * rounds)
        base = next(iter(times.values()))
        for way, own in times.items():
            row = {"what": name, "way": way, "seconds": own.median}
            row |= {"medians": own.median / base.median, "fastest": own.fastest / base.fastest}
            rows.append(row)
    show("Routes against none", make_header("route_step", options, argv), rows, [], options.json)


if __name__ == "__main__":
    main()
