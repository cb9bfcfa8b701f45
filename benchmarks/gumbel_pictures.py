"""The Gumbel-Matrix on pictures with all runs side by side: as much training as the paper's, on one GPU.

    digits      4-MNIST, as in the recipe four_mnist: test accuracies, and what copies share in the end
    clusters    forty tasks of three kinds, as in the recipe clusters, with a budget of 0.5: how well clusters of the
                tasks' embeddings agree with their kinds, by the adjusted Rand index

The nets are those of the recipes, three depths of small convolutions, but one tensor holds a weight of all
runs, and a step of all of them is one CUDA graph. A batch belongs to one task and has a step of Adam of its own; its
pictures are drawn with replacement. Ways of 4-MNIST, by whose
components a task uses:

    apart               its own
    shared              all of them, the mean of what they give
    shared, sum         all of them, the sum
    gumbel              what it learns to
    gumbel, budget 0.75 the same, and the mean probability of being on is penalised above that
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.gumbel_matrix import common, tabulate
from benchmarks.harness import make_header, make_parser, show

DEPTHS = ((5, True), (3, True), (3, False))  # by depth, the side of its filters and whether it is pooled
PLACES = 9  # of the last depth


@dataclass(frozen=True)
class Way:
    """Which components tasks use.

    Attributes:
        allocation: `gumbel`, `shared` or `apart`, as in the recipe.
        budget: of a learned allocation.
        summed: whether outputs are summed in place of their mean.
    """

    allocation: str = "gumbel"
    budget: float = 1.0
    summed: bool = False


@dataclass(frozen=True)
class Setting:
    """Sizes and rates.

    Attributes:
        components: at each depth.
        filters: of each component.
        lr: of weights.
        rate: how many times as fast logits are.
        batch: pictures in a batch.
        dropout: before heads.
    """

    components: int = 4
    filters: int = 4
    lr: float = 0.005
    rate: float = 1.0
    batch: int = 16
    dropout: float = 0.5


WAYS: Mapping[str, Way] = {
    "apart": Way("apart"),
    "shared": Way("shared"),
    "shared, sum": Way("shared", summed=True),
    "gumbel": Way(),
    "gumbel, budget 0.75": Way(budget=0.75),
}
CLUSTERS = Setting(components=16, filters=8, lr=3e-4, rate=20.0)
Task = tuple[Any, Any]
"""Pictures `[N, 28, 28]` and classes `[N]`."""


def gathered(parts: Mapping[str, Any]) -> dict[str, Task]:
    """All pictures of a recipe's data, for `train` and `test`."""
    import torch

    found = {}
    for name in ("train", "test"):
        x, y = zip(*parts[name], strict=True)
        found[name] = torch.cat(x).squeeze(1), torch.cat(y)
    return found


class Nets:
    """Nets of several runs, and their training.

    Args:
        ways: of each run.
        tasks: by task, what it is trained with.
        setting: sizes and rates.
        rounds: batches of each task that it may be trained with.
        seed: of all that is drawn.
        device: where.
    """

    def __init__(
        self,
        ways: Sequence[Way],
        tasks: Sequence[Task],
        setting: Setting,
        rounds: int,
        seed: int,
        device: str,
    ):
        import torch

        runs, count, own = len(ways), len(tasks), setting
        self.setting, self.device, self.shape = own, device, (runs, count, len(DEPTHS), own.components)
        draw = torch.Generator(device).manual_seed(seed)
        torch.manual_seed(seed)

        def glorot(fan: int, *shape: int) -> Any:
            uniform = torch.rand(shape, generator=draw, device=device)
            return ((uniform * 2 - 1) * math.sqrt(6 / fan)).requires_grad_()

        self.weights = []
        for depth, (side, _) in enumerate(DEPTHS):
            channels = own.filters if depth else 1
            fan, outputs = (channels + own.filters) * side**2, own.components * own.filters
            self.weights.append(glorot(fan, runs, channels * side**2, outputs))
            self.weights.append(torch.zeros(runs, 1, outputs, device=device, requires_grad=True))
        width, classes = own.filters * PLACES, 1 + max(int(y.max()) for _, y in tasks)
        self.heads = glorot(width + classes, count, runs, width + 1, classes).detach()
        self.heads[:, :, -1] = 0  # the bias
        self.heads_mean, self.heads_square = torch.zeros_like(self.heads), torch.zeros_like(self.heads)
        self.heads_steps = torch.zeros(count, device=device)
        self.logits = torch.full((*self.shape, 2), math.log(0.5), device=device).requires_grad_()
        self.learned = torch.tensor([way.allocation == "gumbel" for way in ways], device=device)
        self.summed = torch.tensor([way.summed for way in ways], device=device)
        self.budget = torch.tensor([way.budget for way in ways], device=device)
        self.fixed = torch.ones(self.shape, device=device)
        for run, way in enumerate(ways):
            for task in range(count if way.allocation == "apart" else 0):
                mine = slice(own.components * task // count, own.components * (task + 1) // count)
                self.fixed[run, task] = 0
                self.fixed[run, task, :, mine] = 1
        groups = [{"params": self.weights}, {"params": [self.logits], "lr": own.lr * own.rate}]
        self.adam = torch.optim.Adam(groups, lr=own.lr, fused=True, capturable=device != "cpu")
        self.x = torch.cat([x for x, _ in tasks]).to(device)
        self.y = torch.cat([y for _, y in tasks]).to(device)
        sizes = torch.tensor([len(y) for _, y in tasks], device=device)
        self.first, self.size = sizes.cumsum(0) - sizes, sizes
        turns = torch.rand(rounds, count, generator=draw, device=device)
        self.order, self.passes = turns.argsort(1).flatten(), torch.zeros(1, dtype=torch.long, device=device)
        self.graph: Any = None

    def step(self) -> None:
        """One batch of the task whose turn it is, drawn for each run."""
        import torch
        import torch.nn.functional as F

        from surgery.methods.routes.mathematics import sampled

        runs, batch = self.shape[0], self.setting.batch
        task = self.order[self.passes]  # [1]
        place = torch.rand(runs, batch, device=self.device) * self.size[task]
        rows = self.first[task] + place.long().clamp_max(self.size[task] - 1)
        temperature: Any = (50 / (self.passes + 1).float().sqrt()).clamp_min(0.5)
        logits = self.logits.index_select(1, task).squeeze(1)  # [R, D, C, 2]
        noise = -(-torch.rand(logits.shape, device=self.device).clamp(1e-20, 1 - 2**-24).log()).log()
        z = torch.where(self.learned[:, None, None], sampled(logits, noise, temperature), self._fixed(task))
        head = self.heads[task].squeeze(0).requires_grad_()
        scores = self._scores(self.x[rows], self._shares(z), head, training=True)
        losses = F.cross_entropy(scores.flatten(0, 1), self.y[rows].flatten(), reduction="none")
        p = torch.softmax(logits, -1)[..., 0].mean((1, 2))
        loss = losses.view(runs, batch).mean(1) + (p - self.budget).clamp_min(0)
        wanted = [*self.weights, self.logits, head]
        *gradients, slope = torch.autograd.grad(loss.sum(), wanted)
        for parameter, gradient in zip(wanted, gradients, strict=False):
            parameter.grad = gradient
        self.adam.step()
        self._move_head(task, head.detach(), slope)
        self.passes += 1

    def _move_head(self, task: Any, head: Any, slope: Any) -> None:
        """Adam for the head of one task alone."""
        self.heads_steps.index_add_(0, task, self.passes.new_ones(1).float())
        steps = self.heads_steps[task]
        first = self.heads_mean[task].squeeze(0).lerp(slope, 0.1)
        second = self.heads_square[task].squeeze(0).lerp(slope.square(), 0.001)
        moved = (first / (1 - 0.9**steps)) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
        for kept, value in (
            (self.heads_mean, first),
            (self.heads_square, second),
            (self.heads, head - self.setting.lr * moved),
        ):
            kept.index_copy_(0, task, value.unsqueeze(0))

    def _fixed(self, task: Any) -> Any:
        return self.fixed.index_select(1, task).squeeze(1)

    def _shares(self, z: Any) -> Any:
        """Shares of components `[R, D, C]` that are on: their mean, or their sum."""
        import torch

        from surgery.methods.routes.mathematics import shares_of_on

        return torch.where(self.summed[:, None, None], z, shares_of_on(z))

    def _scores(self, x: Any, shares: Any, head: Any, training: bool) -> Any:
        """Pictures `[R, B, 28, 28]` -> scores `[R, B, K]`."""
        import torch.nn.functional as F

        h = x.unsqueeze(-1)  # [R, B, H, W, channels]
        for depth, (side, pooled) in enumerate(DEPTHS):
            seen = h.unfold(2, side, 1).unfold(3, side, 1)  # [R, B, H, W, channels, side, side]
            runs, batch, high, wide = seen.shape[:4]
            weight, bias = self.weights[2 * depth : 2 * depth + 2]
            f = (seen.reshape(runs, batch * high * wide, -1) @ weight + bias).relu()
            f = f.view(runs, batch, high, wide, self.setting.components, self.setting.filters)
            h = (f * shares[:, depth, None, None, None, :, None]).sum(-2)
            if pooled:
                h = h.view(runs, batch, high // 2, 2, wide // 2, 2, -1).mean((3, 5))
        h = F.dropout(h.flatten(2), self.setting.dropout, training)
        return h @ head[:, :-1] + head[:, -1:]

    def train(self, steps: int) -> None:
        """Train with so many batches, of all tasks together."""
        import torch

        if self.device == "cpu":
            for _ in range(steps):
                self.step()
            return
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            steps -= 3  # what is captured is not run
        for _ in range(steps):
            self.graph.replay()
        torch.cuda.synchronize()

    def on(self) -> Any:
        """Whether a component is on `[R, T, D, C]`: of what is learned, the likelier value."""
        import torch

        likely = self.logits[..., 0] >= self.logits[..., 1]
        return torch.where(self.learned[:, None, None, None], likely, self.fixed.bool())

    def probabilities(self) -> Any:
        """Of being on `[R, T, D, C]`."""
        import torch

        return torch.softmax(self.logits.detach(), -1)[..., 0]

    def accuracies(self, tasks: Sequence[Task]) -> Any:
        """Shares of test pictures that are right `[R, T]`."""
        import torch

        on, found = self.on().float(), []
        with torch.no_grad():
            for number, (x, y) in enumerate(tasks):
                shares = self._shares(on[:, number])
                right = torch.zeros(self.shape[0], device=self.device)
                for some, classes in zip(x.split(200), y.split(200), strict=True):
                    seen = some.to(self.device).expand(self.shape[0], -1, -1, -1)
                    scores = self._scores(seen, shares, self.heads[number], training=False)
                    right += (scores.argmax(-1) == classes.to(self.device)).sum(1)
                found.append(right / len(y))
        return torch.stack(found, 1)


def described(on: Any) -> list[list[str]]:
    """By depth, names of the components that a task has on, of `[D, C]`."""
    return [[f"{depth}.{n}" for n, is_on in enumerate(row) if is_on] for depth, row in enumerate(on.tolist())]


def look(nets: Nets, ways: Sequence[str], tests: Sequence[Task], seeds: int) -> list[dict[str, Any]]:
    """What each run has reached on test data, and what its tasks have in common."""
    scores, on = nets.accuracies(tests).tolist(), nets.on()
    found = []
    for run, (way, mine) in enumerate(zip(ways, scores, strict=True)):
        each = {"way": way, "seed": run % seeds, "score": mean(mine), "scores": mine}
        chosen = [described(task) for task in on[run]]
        each["on"] = mean(sum(map(len, task)) for task in chosen)
        shared = {(a, b): common(chosen[a], chosen[b]) for a, b in combinations(range(len(chosen)), 2)}
        of_pair = [shared.pop(pair) for pair in ((0, 1), (2, 3))]
        found.append({**each, "of a pair": mean(of_pair), "of two pairs": mean(shared.values())})
    return found


def four_mnist(fast: bool, folder: str | None) -> list[dict[str, Task]]:
    """Two copies of MNIST, and two of rotated MNIST."""
    from surgery_recipes.mnist import mnist

    sizes: dict[str, Any] = {"train": 64, "validation": 8, "test": 32} if fast else {}
    copies = [gathered(mnist(batch=64, view=view, folder=folder, **sizes)) for view in ("plain", "rotated")]
    return [copies[0], copies[0], copies[1], copies[1]]


def three_kinds(fast: bool, folder: str | None) -> list[dict[str, Task]]:
    """Ten tasks of MNIST and ten of Fashion-MNIST, one class left out in each, and an alphabet in each of twenty."""
    from surgery_recipes.alphabets import SCRIPTS, alphabet
    from surgery_recipes.fashion import fashion_mnist
    from surgery_recipes.mnist import mnist

    kept = [[k for k in range(10) if k != left] for left in range(10)]
    sizes: dict[str, Any] = {"train": 64, "validation": 8, "test": 32} if fast else {}
    several = sizes or {"train": 9000, "validation": 900}
    return [
        *(gathered(mnist(batch=64, classes=each, folder=folder, **sizes)) for each in kept),
        *(gathered(fashion_mnist(batch=64, classes=each, folder=folder, **several)) for each in kept),
        *(gathered(alphabet(script, batch=64, folder=folder)) for script in SCRIPTS),
    ]


KINDS = [0] * 10 + [1] * 10 + [2] * 20
"""Of the tasks of `three_kinds`."""


def agreement(embeddings: Any, kinds: Sequence[int]) -> float:
    """The adjusted Rand index of kinds and of clusters of embeddings `[T, N]`: average linkage by cosine distance, cut
    where there are as many clusters as kinds."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform
    from sklearn.metrics import adjusted_rand_score

    from surgery.methods.routes.pictures import cosine

    far = (1 - cosine(embeddings)).clip(0)
    far = (far + far.T) / 2
    for number in range(len(far)):
        far[number, number] = 0
    found = fcluster(linkage(squareform(far), "average"), len(set(kinds)), "maxclust")
    return float(adjusted_rand_score(kinds, found))


def look_at_clusters(nets: Nets, tests: Sequence[Task]) -> list[dict[str, Any]]:
    """What each run has reached, and how well its embeddings agree with the kinds of tasks."""
    from surgery.methods.routes.pictures import cosine

    right, found = nets.accuracies(tests).tolist(), []
    for run, (on, p) in enumerate(zip(nets.on().cpu(), nets.probabilities().cpu(), strict=True)):
        binary = on.float().flatten(1).numpy()
        alike = cosine(binary).tolist()
        same, other = [], []
        for a, b in combinations(range(len(tests)), 2):
            (same if KINDS[a] == KINDS[b] else other).append(alike[a][b])
        by_kind = [mean(r for r, k in zip(right[run], KINDS, strict=True) if k == kind) for kind in range(3)]
        each = {"seed": run, "rand index": agreement(binary, KINDS)}
        each |= {"by probabilities": agreement(p.flatten(1).numpy(), KINDS)}
        each |= {"cosine within kinds": mean(same), "between kinds": mean(other)}
        each |= {"on, of 48": float(on.sum((1, 2)).float().mean()), "p": float(p.mean())}
        each |= dict(zip(("mnist", "fashion", "alphabets"), by_kind, strict=True))
        each["rows"] = ["".join(str(int(n)) for n in row) for row in binary.tolist()]
        found.append(each)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Train by all ways at once, and look now and then."""
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("figure", choices=("digits", "clusters"))
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--runs", type=int, default=10, help="seeds")
    parser.add_argument("--rounds", type=int, default=37500, help="batches of each task")
    parser.add_argument(
        "--looks", type=int, default=12, help="how often test data are tried, the last time at the end"
    )
    parser.add_argument("--minutes", type=float, default=None, help="train no further after so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kept", type=Path, default=None, help="a file that each look is added to")
    parser.add_argument("--folder", default=None, help="with the digits; the user's cache by default")
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(options.threads)
    began = time.monotonic()
    runs, rounds, looks = (1, 2, 1) if options.fast else (options.runs, options.rounds, options.looks)
    of_digits = options.figure == "digits"
    ways = [way for way in (options.ways if of_digits else ["clusters"]) for _ in range(runs)]
    parts = (four_mnist if of_digits else three_kinds)(options.fast, options.folder)
    nets = Nets(
        [WAYS[way] if of_digits else Way(budget=0.5) for way in ways],
        [part["train"] for part in parts],
        Setting() if of_digits else CLUSTERS,
        rounds,
        options.seed,
        "cpu" if options.fast else options.device,
    )
    tests = [part["test"] for part in parts]
    found, done = [], 0
    for turn in range(looks):
        end = rounds * (turn + 1) // looks
        nets.train((end - done) * len(parts))
        done, seconds = end, time.monotonic() - began
        found = look(nets, ways, tests, runs) if of_digits else look_at_clusters(nets, tests)
        if options.kept is not None:
            with options.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"rounds": done, "seconds": seconds, "found": found}) + "\n")
        if options.minutes is not None and seconds > 60 * options.minutes:
            break
    header = {**make_header("gumbel_pictures", options, argv), "rounds": done}
    rows = (
        tabulate(found) if of_digits else [{k: v for k, v in each.items() if k != "rows"} for each in found]
    )
    show(f"{options.figure}, side by side", header, rows, [], options.json)


if __name__ == "__main__":
    main()
