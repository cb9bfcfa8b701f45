"""A method that is no part of the package trains: draws, penalties, states, logs and pictures by one interface."""

import os
from dataclasses import replace

import pytest
import torch
from ended_runs import stopped_at
from processes import Started, forks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery.anatomy.plan import make_plan
from surgery.anatomy.sites import discover
from surgery.core import method as registry
from surgery.core.bank import Bank, Parts, Trained
from surgery.core.joining import join
from surgery.core.module_method import ModuleSurgery
from surgery.core.moves import Moves
from surgery.core.tensor_method import TensorMethod
from surgery.errors import PlanError, TrainingError
from surgery.members.replacement import Replacement
from surgery.settings.methods import REGISTERED
from surgery.settings.problems import Strict
from surgery.storage.keys import StateKey
from surgery.training.distributed.fsdp import check_banks
from surgery.training.loop.interruptions import Interrupted
from surgery.training.loop.run import STATE
from surgery.training.loop.state import read_state, write_state
from surgery.training.loop.trainer import Trainer
from surgery.training.report.pictures import draw_run
from surgery.training.report.runlog import read_log
from surgery.training.tasks.streams import Batches
from surgery.training.tasks.tasks import Task
from surgery.training.train import train


class Settings(Strict):
    """Of `Products`."""

    rank: int = 3
    lr: float = 0.05
    weight: float = 0.01


class Product(Bank):
    """Each block is a product of two factors of low rank."""

    form = "product"

    def __init__(self, block: tuple[int, int], left: Tensor, right: Tensor):
        super().__init__()
        self.block = block
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)  # [L, m, r], [L, r, n]
        self.kept: Tensor | None = None  # [r], drawn for a step

    @property
    def locations(self) -> int:
        return len(self.left)

    def blocks(self, start: int = 0, stop: int | None = None, task: str | None = None) -> Tensor:
        left = self.left[start:stop]
        if self.kept is not None and torch.is_grad_enabled():
            left = left * self.kept
        return (left @ self.right[start:stop]).flatten(1)

    def trained(self) -> list[Trained]:
        return [Trained("left", (self.left,)), Trained("right", (self.right,), decay=False)]

    def pack(self, plan, like=()) -> Parts:
        return {"left": self.left.detach(), "right": self.right.detach()}


class ProductMoves(Moves):
    """Drops one rank of all banks in each step, and forgets the weakest after each generation."""

    def __init__(self, name, trainer):
        super().__init__(name, trainer)
        self.settings = Settings(**next(iter(self.joint.plan.banks)).settings)
        self.drawn = torch.zeros(self.settings.rank, dtype=torch.int64)
        self.forgotten = 0

    def groups(self):
        own = super().groups()
        return [replace(t, lr=self.settings.lr, scheduled=False) if t.role == "right" else t for t in own]

    def before_step(self):
        rank = self.settings.rank
        which = int(torch.randint(rank, (), generator=self.generator))
        self.drawn[which] += 1
        kept = torch.ones(rank)
        kept[which] = 0
        for bank in self.banks.values():
            bank.kept = kept * rank / (rank - 1)

    def penalty(self):
        terms = [bank.left.square().mean() for bank in self.banks.values()]
        return self.settings.weight * torch.stack(terms).sum()

    @torch.no_grad()
    def after_generation(self):
        for bank in self.banks.values():
            bank.kept = None
            bank.left[:, :, int(bank.left.square().sum((0, 1)).argmin())] *= 0.5
        self.forgotten += 1

    def begins_anew(self, generation):
        return generation == 1

    def pack(self):
        return {"drawn": self.drawn}, {"forgotten": self.forgotten}

    def unpack(self, tensors, facts):
        self.drawn, self.forgotten = tensors["drawn"].clone(), facts["forgotten"]

    def log(self):
        return {"drawn": self.drawn.tolist()}

    def words(self):
        return [f"{self.forgotten} forgotten"]

    def tracked(self):
        return {"forgotten": self.forgotten}

    def reached(self):
        return {"forgotten": self.forgotten}


class Products(TensorMethod):
    """Products of low rank."""

    name, form, settings = "products", "product", Settings

    def plan(self, anatomies, request):
        plan = make_plan(anatomies, request.block, 1)
        own = request.settings.model_dump()
        return replace(plan, banks=tuple(replace(b, method=self.name, settings=own) for b in plan.banks))

    def make(self, plan, blocks, generator):
        left, values, right = torch.linalg.svd(blocks.view(-1, *plan.block), full_matrices=False)
        rank = plan.settings["rank"]
        return Product(plan.block, left[..., :rank] * values[:, None, :rank], right[:, :rank].contiguous())

    def unpack(self, plan, parts):
        return Product(plan.block, parts["left"], parts["right"])

    def unsuited(self, joint, config):
        return ["Products do not adapt."] if config.accumulate > 1 else []

    def moves(self, trainer):
        return ProductMoves(self.name, trainer)

    def pictures(self):
        return {"drawn.png": lambda start, lines, end: repr(lines[-1]["methods"]["products"]).encode()}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(REGISTERED, "products", Products())


CONFIG = {
    "steps": 4, "burn_in": 1, "generations": 2, "final": 1, "save_seconds": 0,
    "optimizer": {"name": "adamw", "lr": 0.01, "schedule": "cosine", "weight_decay": 0.1, "clip": 1.0},
}  # fmt: skip


def network(dropout=0.1):
    torch.manual_seed(0)
    layers = nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Dropout(dropout), nn.Linear(16, 16), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(16, 2))


def build(dropout=0.1, **settings):
    member = surgery.load_member(network(dropout), name="net", inputs=torch.randn(2, 4))
    request = registry.PlanRequest((8, 8), settings=Settings(**settings))
    return join([member], Products().plan([discover(member)], request))


def task(dtype=torch.float32):
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = (x.sum(1) > 0).long()
    held = Batches(x[32:], y[32:], 16, shuffle=False)
    return Task("signs", "net", Batches(x[:32], y[:32], 16), "cross_entropy", "accuracy", validation=held)


def run(joint, folder=None, **more):
    return train(joint, [task()], CONFIG, folder=folder, cpu=True, **more)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTERED, "products", Products())
        joint = build()
        return joint, run(joint, folder), folder


def test_it_learns_and_says_so(unbroken):
    joint, report, folder = unbroken
    first, *lines, end = read_log(folder / "log.jsonl")
    assert first["method_names"] == ["products"] and "banks" not in first
    assert lines[-1]["losses"]["signs"] < lines[0]["losses"]["signs"]
    assert [sum(line["methods"]["products"]["drawn"]) for line in lines] == [4, 8, 12, 16]
    assert report.methods == {"products": {"forgotten": 4}} == end["methods"]
    assert report.best >= 1  # what is reached before generation 1 does not count
    assert draw_run(folder / "log.jsonl")["drawn.png"].startswith(b"{'drawn'")
    assert all(isinstance(bank, Product) for bank in joint.dictionary.banks.values())


def test_roles_have_groups_with_rates_of_their_own(monkeypatch):
    seen = []
    plain = Trainer.train_step
    monkeypatch.setattr(
        Trainer,
        "train_step",
        lambda self: (seen.append([dict(g) for g in self.optimizer.param_groups]), plain(self)),
    )
    run(build())
    groups = {group["role"]: group for group in seen[-1]}
    assert set(groups) == {"left", "right", "private"}
    assert groups["right"]["lr"] == 0.05 and groups["left"]["lr"] < 0.01
    assert groups["right"]["weight_decay"] == 0 and groups["left"]["weight_decay"] == 0.1


@pytest.mark.parametrize("step", [2, 4, 11, 16])
def test_interrupted_at_any_step_it_ends_as_an_unbroken_run(unbroken, tmp_path, step):
    with stopped_at(step), pytest.raises(Interrupted):
        run(build(), tmp_path)
    joint = build()
    report = run(joint, tmp_path, resume=True)
    wanted, found = unbroken[0].collapse("net"), joint.collapse("net")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert report.scores == unbroken[1].scores and report.methods == unbroken[1].methods
    logs = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(folder / "log.jsonl")]
        for folder in (tmp_path, unbroken[2])
    ]
    assert logs[0] == logs[1]


@pytest.fixture
def state(tmp_path):
    with stopped_at(1), pytest.raises(Interrupted):
        run(build(), tmp_path)
    return tmp_path


def put(name, value):
    return lambda tensors, document: tensors.update({StateKey.parse(name): value})


@pytest.mark.parametrize(("change", "said"), [
    (put("method/products/drawn", torch.zeros(3)), "'drawn' of method products must be torch.int64"),
    (put("method/products/more", torch.zeros(3)), "of method products it must hold .*'drawn'"),
    (put("method/others/drawn", torch.zeros(3)), "'method/others/drawn' is none of a state's tensors"),
    (put("identity/8x8-float32", torch.zeros(3)), "is none of a state's tensors"),
    (put("model/bank/8x8-float32/left", torch.zeros(3)), "must have left of torch.float32"),
    (lambda tensors, document: document.update(methods={}), "of method products it must hold"),
    (lambda tensors, document: document["methods"].update(others={}), "methods that this run does not use"),
])  # fmt: skip
def test_a_state_that_does_not_fit_changes_nothing(state, change, said):
    tensors, document = read_state(state / STATE)
    assert "born" not in document and "moved" not in document
    change(tensors, document)
    write_state(state / STATE, tensors, document)
    joint = build()
    before = joint.collapse("net")
    with pytest.raises(TrainingError, match=said):
        run(joint, state, resume=True)
    assert set(before) == set(joint.collapse("net"))


def test_other_settings_of_the_method_are_another_plan(state):
    with pytest.raises(TrainingError, match=r"another plan .*weight was 0.01 and is 0.5"):
        run(build(weight=0.5), state, resume=True)


def test_what_it_refuses_is_said_before_anything_changes():
    joint = build()
    with pytest.raises(PlanError, match="Products do not adapt"):
        train(joint, [task()], {**CONFIG, "accumulate": 2}, cpu=True)
    assert not any(isinstance(bank, Product) for bank in joint.dictionary.banks.values())


def test_what_was_trained_is_saved_and_loaded(unbroken, tmp_path):
    joint = unbroken[0]
    surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(tmp_path / "joint", modules={"net": network()})
    wanted, found = joint.collapse("net"), loaded.collapse("net")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not any("psi" in name for name in load_file(next((tmp_path / "joint").glob("*.safetensors"))))


# Modules ----------------------------------------------------------------------------------------------------


class RouteSettings(Strict):
    """Of `Routes`."""

    path: str = "2"
    tasks: tuple[str, ...] = ("signs", "sums")
    lr: float = 0.5
    budget: float = 1.0


class Routed(nn.Module):
    """Components of which each task takes some: gates are drawn for each forward pass of training."""

    def __init__(self, first, tasks):
        super().__init__()
        torch.manual_seed(1)
        self.parts = nn.ModuleList([first, nn.Linear(first.in_features, first.out_features)])
        self.logits = nn.Parameter(torch.zeros(len(tasks), len(self.parts)))
        self.names, self.task, self.noise, self.temperature = tuple(tasks), None, None, 1.0

    def serve_task(self, task):
        self.task = task

    def gates(self):
        own = self.logits[self.names.index(self.task)] if self.task in self.names else self.logits.mean(0)
        if self.training and self.noise is not None:
            return ((own + self.noise) / self.temperature).sigmoid()
        return (own >= 0).to(own)

    def forward(self, x):
        gates = self.gates()
        return sum(g * part(x) for g, part in zip(gates, self.parts, strict=True)) / gates.sum().clamp_min(1)


class RouteMoves(Moves):
    """Draws gates, lowers their temperature, and keeps to a budget of components."""

    def __init__(self, name, trainer):
        super().__init__(name, trainer)
        self.modules = [m for m in self.joint.bodies.modules() if isinstance(m, Routed)]
        replaced = [each for member in self.joint.members.values() for each in member.replaced]
        self.settings = RouteSettings(**replaced[0].replacement.settings)
        self.passes: list[str] = []

    def more_groups(self):
        own = tuple(module.logits for module in self.modules)
        return [Trained("logits", own, decay=False, lr=self.settings.lr, scheduled=False)]

    def before_step(self):
        for module in self.modules:
            module.temperature = max(0.5, 50 / (self.trainer.steps + 1) ** 0.5)

    def before_pass(self, task):
        self.passes.append(task)
        for module in self.modules:
            uniform = torch.rand(2, generator=self.generator).clamp(1e-6, 1 - 1e-6)
            module.noise = (uniform / (1 - uniform)).log()

    def penalty(self):
        over = [(m.logits.sigmoid().sum(1) - self.settings.budget).relu().mean() for m in self.modules]
        return torch.stack(over).sum()

    def log(self):
        return {"gates": [m.logits.sigmoid().tolist() for m in self.modules], "passes": len(self.passes)}

    def pack(self):
        return {}, {"passes": len(self.passes)}

    def unpack(self, tensors, facts):
        self.passes = [""] * facts["passes"]


class Routes(ModuleSurgery):
    """Components that tasks choose from."""

    name, settings, recorded = "gated", RouteSettings, RouteSettings

    def plan(self, anatomies, request):
        own = request.settings.model_dump(mode="json")
        return [Replacement(each.member, request.settings.path, self.name, own) for each in anatomies]

    def replace(self, place):
        return Routed(place.current, place.how.tasks)

    def moves(self, trainer):
        return RouteMoves(self.name, trainer)


def routed():
    torch.manual_seed(0)
    member = surgery.load_member(network(dropout=0.0), name="net", inputs=torch.randn(2, 4))
    return join([member], surgery.plan_modules([member], "gated", block=(8, 8)))


def two_tasks():
    return [replace(task(), name=name, weight=weight) for name, weight in (("signs", 1.0), ("sums", 3.0))]


def test_routes_between_modules_are_a_method_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setitem(REGISTERED, "gated", Routes())
    config, groups, plain = {**CONFIG, "accumulate": 2}, [], Trainer.train_step
    joint = routed()
    train(joint, two_tasks(), config, folder=tmp_path / "whole", cpu=True)
    first, *lines, _ = read_log(tmp_path / "whole" / "log.jsonl")
    assert first["method_names"] == ["hypermodules", "gated"]
    facts = [line["methods"]["gated"] for line in lines]
    assert [each["passes"] for each in facts] == [16, 32, 48, 64]  # two tasks, two batches, four steps
    gates = torch.tensor(facts[-1]["gates"][0])
    assert gates.shape == (2, 2) and bool((gates.sum(1) < 0.95).all())  # the budget, from 1 on
    module = joint["net"][2]
    assert not torch.equal(module.logits[0], module.logits[1])

    def noting(self):
        groups.append({group["role"]: group["lr"] for group in self.optimizer.param_groups})
        plain(self)

    monkeypatch.setattr(Trainer, "train_step", noting)
    with stopped_at(7), pytest.raises(Interrupted):
        train(routed(), two_tasks(), config, folder=tmp_path / "parts", cpu=True)
    assert groups[-1]["logits"] == 0.5 and groups[-1]["private"] < 0.01
    monkeypatch.setattr(Trainer, "train_step", plain)
    again = routed()
    train(again, two_tasks(), config, folder=tmp_path / "parts", resume=True, cpu=True)
    one, other = (dict(nn.Module.named_parameters(each["net"])) for each in (joint, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


# Several processes ------------------------------------------------------------------------------------------


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def in_parts(out):
    """Train as one of some processes; in float64 nothing depends on the order in which they add up."""
    REGISTERED["products"] = Products()
    joint, kinds, plain = build(dropout=0.0).to(torch.float64), set(), Trainer.train_step
    Trainer.train_step = lambda self: (kinds.add(type(self.joint).__name__), plain(self))
    try:
        train(joint, [task(torch.float64)], CONFIG, cpu=True)
    finally:
        Trainer.train_step = plain
    rank = os.environ.get("RANK", "0")
    assert kinds == {"ShardedModel" if "RANK" in os.environ else "JointModel"}
    save_file({k: t.clone() for k, t in joint.collapse("net").items()}, f"{out}/{rank}.safetensors")


@forks
def test_sharded_processes_hold_its_banks_whole_and_give_the_result_of_one(tmp_path):
    (tmp_path / "one").mkdir()
    in_parts(tmp_path / "one")
    Started(in_parts, str(tmp_path), ranks=2, environment=FSDP).succeed()
    wanted = load_file(tmp_path / "one" / "0.safetensors")
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_sharded_processes_refuse_weights_that_depend_on_the_task(monkeypatch):
    joint = build()
    check_banks(joint)
    bank = next(iter(joint.dictionary.banks.values()))
    monkeypatch.setattr(type(bank), "by_task", True)
    with pytest.raises(PlanError, match="the same for every task, but products generates others"):
        check_banks(joint)
