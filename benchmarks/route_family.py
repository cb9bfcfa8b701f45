"""Three fine-tunes of one vision transformer in fewer stored layers: routes, weight averaging, task arithmetic.

A base learns clothes, and three members go on from it with views of their own (`benchmarks.frontier`). Of their
layers, four each, only some are stored in the end; embeddings, norms and heads stay with each member in every way. At
each number of stored layers all that can be chosen is chosen by the loss on validation pictures, without training;
then all that is stored is trained jointly, for as many steps at as many rates in every way.

    alone        every member has its own layers
    routes       each member takes, at each depth, its own layer or another member's: of all choices that store no more
                 layers, the best
    average      at some depths, the best ones, all members have the mean of theirs
    arithmetic   the same with the base plus a factor times the sum of differences from it, the best of eleven factors
    learned      gumbel routes as they come out of training, however many layers they store
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

from benchmarks.harness import make_header, make_parser, run_cells, show

MEMBERS, DEPTH = ("rotated", "inverted", "sheared"), 4
WAYS = ("alone", "routes", "average", "arithmetic", "learned")
FACTORS = tuple(n / 10 for n in range(11))
Route = tuple[int, ...]


def family(seed: int, size: str, device: str) -> dict[str, Any]:
    """The base's weights, the members', and pictures of each: to train on, validation and test.

    Args:
        seed: of everything.
        size: `whole` as in `benchmarks.frontier`, `small` for minutes of one core, `fast` on made-up pictures.
        device: on which all are trained.
    """
    import torch
    import torch.nn.functional as F

    from benchmarks.frontier.families import vit
    from benchmarks.frontier.families.base import Batch, generator_of
    from benchmarks.frontier.families.training import train

    fast = size == "fast"
    sizes = replace(vit.FAST if fast else vit.Sizes(), depth=DEPTH, base_epochs=1 if fast else 4)
    if size == "small":
        sizes = replace(sizes, width=64, fashion=12_000, fine=4_000, validation=500, batch=64)
    source = cache(vit.made_up if fast else vit.pictures_of)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = vit.build(sizes).to(device)

    def seen(views: str, part: str, count: int, *names: str) -> Batch:
        found = vit.see_some(*source("fashion", part), views, count, generator_of(seed, *names, part))
        return Batch(found.target.to(device), tuple(each.to(device) for each in found.args))

    def learn(module: Any, data: Batch, epochs: int, rate: float, *names: str) -> Any:
        train(
            module, data, F.cross_entropy, epochs=epochs, batch=sizes.batch, rate=rate, decay=0.05,
            generator=generator_of(seed, *names, "order"),
        )  # fmt: skip
        return module.state_dict()

    first = learn(
        base, seen("plain", "train", sizes.fashion, "base"), sizes.base_epochs, sizes.base_rate, "base"
    )
    states, data = {}, {}
    for name in MEMBERS:
        variant = vit.VARIANTS[name]
        net = vit.build(sizes).to(device)
        net.load_state_dict(first)
        data[name] = {
            part: seen(variant.views, part, count, name)
            for part, count in (("train", sizes.fine), ("validation", sizes.validation), ("test", sizes.test))
        }
        states[name] = learn(net, data[name]["train"], 1 if fast else variant.epochs, variant.rate, name)
    return {"build": lambda: vit.build(sizes), "base": first, "states": states, "data": data}


def layers_of(state: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """The tensors of one layer by their whole names."""
    return {key: t for key, t in state.items() if key.startswith(f"blocks.{depth}.")}


class Losses:
    """Losses on validation pictures of members that have layers of others; each is computed once."""

    def __init__(self, found: Mapping[str, Any], device: str):
        self.found = found
        self.net = found["build"]().to(device).eval()

    def of(self, member: str, layers: Mapping[int, Mapping[str, Any]]) -> float:
        """Of a member with some layers in place of its own."""
        import torch
        import torch.nn.functional as F

        state = dict(self.found["states"][member])
        for own in layers.values():
            state |= own
        self.net.load_state_dict(state)
        batch = self.found["data"][member]["validation"]
        with torch.no_grad():
            return float(F.cross_entropy(batch.run(self.net), batch.target))


def best_routes(losses: Losses, states: Mapping[str, Any], stored: Sequence[int]) -> dict[int, list[Route]]:
    """For each number of stored layers the routes of all members that lose least."""
    import numpy as np

    every = list(product(range(len(MEMBERS)), repeat=DEPTH))
    found = [
        np.array(
            [losses.of(m, {d: layers_of(states[MEMBERS[o]], d) for d, o in enumerate(r)}) for r in every]
        )
        for m in MEMBERS
    ]
    used = np.array([[1 << (d * len(MEMBERS) + o) for d, o in enumerate(r)] for r in every]).sum(1)
    total = found[0][:, None, None] + found[1][None, :, None] + found[2][None, None, :]
    union = used[:, None, None] | used[None, :, None] | used[None, None, :]
    count = sum((union >> bit) & 1 for bit in range(DEPTH * len(MEMBERS)))
    best = {}
    for number in stored:
        at = np.unravel_index(np.where(count <= number, total, np.inf).argmin(), total.shape)
        best[number] = [every[int(i)] for i in at]
    return best


def merged(found: Mapping[str, Any], depth: int, factor: float | None) -> dict[str, Any]:
    """One layer of all members: their mean, or the base plus a factor times the sum of differences."""
    base, own = layers_of(found["base"], depth), [layers_of(s, depth) for s in found["states"].values()]
    if factor is None:
        return {key: sum(each[key] for each in own) / len(own) for key in base}
    return {key: t + factor * sum(each[key] - t for each in own) for key, t in base.items()}


def best_merge(losses: Losses, found: Mapping[str, Any], stored: int, factors: Sequence[float | None]) -> Any:
    """Depths at which all members have one layer, and the factor, that lose least."""
    shared = (DEPTH * len(MEMBERS) - stored) // (len(MEMBERS) - 1)
    tried = {}
    for factor in factors:
        made = [merged(found, depth, factor) for depth in range(DEPTH)]
        for some in combinations(range(DEPTH), shared):
            layers = {d: made[d] for d in some}
            tried[some, factor] = sum(losses.of(m, layers) for m in MEMBERS)
    return min(tried, key=lambda key: tried[key])


def joined(found: Mapping[str, Any], routes: Sequence[Route], given: Mapping[int, Mapping[str, Any]]) -> Any:
    """The members on hard routes through one another's layers; the first member's may be given."""
    import surgery
    from surgery.methods.routes.gates import LearnedGates
    from surgery.methods.routes.groups import routes_in
    from surgery.methods.routes.hardening import drop_unused

    members = []
    for number, name in enumerate(MEMBERS):
        net = found["build"]()
        state = dict(found["states"][name])
        for layer in given.values() if number == 0 else ():
            state |= layer
        net.load_state_dict({key: t.cpu() for key, t in state.items()})
        example = found["data"][name]["validation"].args[0][:2].cpu()
        members.append(surgery.load_member(net.eval(), name=name, inputs=example))
    joint = surgery.join(members, surgery.plan_modules(members, "routes", {"members": True}))
    for number, name in enumerate(MEMBERS if routes else ()):
        (depths,) = routes_in(joint[name]).values()
        for gates in depths:
            owner = routes[number][gates.depth]
            component = f"{gates.depth}" if owner == number else f"{MEMBERS[owner]}/{gates.depth}"
            assert isinstance(gates, LearnedGates)
            gates.harden({"": (gates.names.index(component),)})
    return drop_unused(joint) if routes else joint


def measure(joint: Any, found: Mapping[str, Any], part: str) -> dict[str, float]:
    """The share of pictures that each member is right about."""
    import torch

    scores = {}
    for name in MEMBERS:
        batch = found["data"][name][part]
        device = next(joint[name].parameters()).device
        with torch.no_grad():
            guess = joint[name].eval()(batch.args[0].to(device)).argmax(1).to(batch.target.device)
        scores[name] = float((guess == batch.target).double().mean())
    return scores


def stored_in(joint: Any) -> tuple[int, int]:
    """Layers that are stored, and bytes of a saved artifact's tensors."""
    import surgery
    from surgery.methods.routes.sharing import routed_layers

    names = {
        name if "/" in name else f"{member}/{name}"
        for member in joint.names
        for layer in routed_layers(joint, member).values()
        for name in layer.own
    }
    with tempfile.TemporaryDirectory() as folder:
        saved = surgery.save(joint, Path(folder) / "joint")
        return len(names), sum(each.stat().st_size for each in saved.rglob("*.safetensors"))


def run(
    way: str, stored: int, seed: int, steps: int, rates: tuple[float, ...], size: str, device: str
) -> dict[str, Any]:
    """One way at one number of stored layers: as it is chosen, and trained at the rate that validation likes best."""
    import torch

    import surgery
    from surgery.training.tasks.streams import Batches

    torch.set_num_threads(1)
    found = _known(seed, size, device)
    chosen: Any = None
    routes: Sequence[Route] = [(number,) * DEPTH for number in range(len(MEMBERS))]
    given: dict[int, Any] = {}
    if way == "routes":
        routes = chosen = _routes(seed, size, device)[stored]
    elif way == "learned":
        routes = ()
    elif way != "alone":
        factors = (None,) if way == "average" else FACTORS
        some, factor = chosen = best_merge(Losses(found, device), found, stored, factors)
        given = {d: merged(found, d, factor) for d in some}
        routes = [tuple(0 if d in some else own[d] for d in range(DEPTH)) for own in routes]
    begun = joined(found, routes, given)
    result: dict[str, Any] = {"way": way, "seed": seed, "chosen": chosen, "steps": steps}
    result["before"] = measure(begun.to(device), found, "test")
    best = -1.0
    for rate in rates:
        joint = joined(found, routes, given)
        tasks = [
            surgery.Task(name, name, Batches(pictures.cpu(), classes.cpu(), 128, True, seed), "cross_entropy")
            for name, data in found["data"].items()
            for (pictures,), classes in [(data["train"].args, data["train"].target)]
        ]
        learning = 0 if routes else 7  # parts of ten
        parts = 10 if steps >= 10 else 1
        config = {
            "steps": max(steps // 10, 1), "generations": min(learning, parts - 1), "final": max(parts - learning, 1),
            "optimizer": {"name": "adamw", "lr": rate, "schedule": "linear", "warmup": steps // 10},
            "evolution": {"codes": "ones", "change": "none", "start": "given"}, "stopping": {"keep": "last"},
        }  # fmt: skip
        report = surgery.train(joint, tasks, config, seed=seed, cpu=device == "cpu")
        score = sum(measure(joint, found, "validation").values()) / len(MEMBERS)
        if score > best:
            best = score
            result |= {"rate": rate, "validation": score, "after": measure(joint, found, "test")}
            result["layers"], result["bytes"] = stored_in(joint.to("cpu"))
            result["seconds"] = report.seconds
            if not routes:
                result["chosen"] = report.methods["routes"]["chosen"]
    return result


_FOUND: dict[Any, Any] = {}


def _known(*key: Any) -> dict[str, Any]:
    """The family, made once in a process."""
    if key not in _FOUND:
        _FOUND.clear()
        _FOUND[key] = family(*key)
    return _FOUND[key]


def _routes(*key: Any) -> dict[int, list[Route]]:
    """The best routes in this family, found once in a process."""
    found = _known(*key)
    if "routes" not in found:
        most = DEPTH * len(MEMBERS)
        stored = range(DEPTH, most + 1, len(MEMBERS) - 1)
        found["routes"] = best_routes(Losses(found, key[2]), found["states"], stored)
    return found["routes"]


def tabulate(found: Mapping[tuple[Any, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds and members."""
    from statistics import mean, stdev

    rows = []
    for way, stored in dict.fromkeys(cell[:2] for cell in found):
        mine = [r for cell, r in found.items() if cell[:2] == (way, stored)]
        row: dict[str, Any] = {"way": way, "asked": stored, "layers": mean(r["layers"] for r in mine)}
        row["bytes"] = round(mean(r["bytes"] for r in mine))
        for when in ("before", "after"):
            scores = [mean(r[when].values()) for r in mine]
            row[when] = mean(scores)
            row[f"{when}, standard error"] = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
        rows.append({**row, "seeds": len(mine)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """All ways at all numbers of stored layers."""
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=None, help="begin no run after so many")
    parser.add_argument(
        "--kept", type=Path, default=Path("route_family.jsonl"), help="where finished runs are kept"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--stored", nargs="+", type=int, default=[8, 4], help="layers, of twelve")
    parser.add_argument("--size", choices=("whole", "small"), default="whole", help="of models and data")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    steps, rates = (2, options.rates[:1]) if options.fast else (options.steps, options.rates)
    most = DEPTH * len(MEMBERS)
    every = [
        ("alone", most),
        *((w, n) for n in options.stored for w in ("routes", "average", "arithmetic")),
        ("learned", most),
    ]
    ways = [(way, number) for way, number in every if way in options.ways]
    cells = [
        (way, stored, seed, steps, tuple(rates), "fast" if options.fast else options.size, options.device)
        for seed in range(options.seed, options.seed + (1 if options.fast else options.seeds))
        for way, stored in ways
    ]
    found = run_cells(run, cells, options.jobs, options.kept, options.minutes)
    show(
        "Three fine-tunes in fewer layers",
        make_header("route_family", options, argv),
        tabulate(found),
        [],
        options.json,
    )


if __name__ == "__main__":
    main()
