"""Serving: weights and modules that depend on the task, within a step and outside of it."""

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import made
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery.anatomy.plan import make_plan
from surgery.anatomy.sites import discover
from surgery.core.bank import Bank, Parts
from surgery.core.joining import join
from surgery.errors import PlanError
from surgery.training.tasks.tasks import Task
from surgery.training.tasks.validation import evaluate
from surgery.training.train import train

TASKS = ("one", "two", "three")
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Offsets(Bank):
    """Blocks that all tasks share, plus an offset of each task's own."""

    form, by_task = "offsets", True

    def __init__(self, block: tuple[int, int], shared: Tensor):
        super().__init__()
        self.block = block
        self.shared = nn.Parameter(shared.clone())
        draw = torch.Generator().manual_seed(0)
        self.own = nn.ParameterDict(
            {t: nn.Parameter(torch.randn(shared.shape, generator=draw)) for t in TASKS}
        )

    @property
    def locations(self) -> int:
        return len(self.shared)

    def blocks(self, start: int = 0, stop: int | None = None, task: str | None = None) -> Tensor:
        own = 0 if task is None else self.own[task][start:stop]
        return self.shared[start:stop] + own

    def pack(self, plan, like=()) -> Parts:
        raise NotImplementedError


class Layer(nn.Linear):
    """Recomputed in the backward pass."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Again(nn.Module):
    """What is within runs again in the backward pass."""

    def __init__(self, *within, reentrant=False):
        super().__init__()
        self.within, self.reentrant = nn.Sequential(*within), reentrant

    def forward(self, x):
        return checkpoint(self.within, x, use_reentrant=self.reentrant)


class Shift(nn.Module):
    """A module that listens."""

    task: str | None = None

    def serve_task(self, task):
        self.task = task

    def forward(self, x):
        return x if self.task is None else x + TASKS.index(self.task)


def build(names=("net",), seed=0, shift=False):
    members = []
    for number, name in enumerate(names):
        torch.manual_seed(seed + number)
        layers = [nn.Linear(3, 8), nn.Tanh(), Layer(8, 8), nn.Tanh(), Shift() if shift else nn.Identity()]
        members.append(
            made(name, nn.Sequential(*layers, nn.Linear(8, 8), nn.Linear(8, 2)), torch.zeros(2, 3))
        )
    joint = join(members, make_plan([discover(each) for each in members], (4, 4), 1))
    for key in joint.dictionary:
        bank = joint.dictionary[key]
        joint.dictionary.banks[key] = Offsets(bank.block, bank.settled_blocks())
    joint.refresh()
    return joint


def gradients(joint):
    return {
        name: None if p.grad is None else p.grad.clone()
        for name, p in nn.Module.named_parameters(joint)
        if "_slots" not in name
    }


def loss_of(joint, name, x):
    return joint[name](x).square().mean()


@given(
    st.lists(st.tuples(st.sampled_from(("a", "b")), st.sampled_from(TASKS)), min_size=1, max_size=6),
    st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_a_step_of_several_tasks_has_the_gradients_of_each_by_itself(passes, seed):
    joint = build(("a", "b"))
    draw = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(4, 3, generator=draw) for _ in passes]
    for (name, task), x in zip(passes, inputs, strict=True):  # outside of a step: each generates for itself
        with joint.serving(task):
            loss_of(joint, name, x).backward()
    wanted = gradients(joint)
    joint.zero_grad()
    with joint.step():
        for (name, task), x in zip(passes, inputs, strict=True):
            with joint.serving(task):
                loss_of(joint, name, x).backward()
    found = gradients(joint)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        if gradient is None:
            assert found[name] is None or not found[name].any(), name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_each_task_has_its_own_weights_outside_of_steps():
    joint, x = build(), torch.randn(4, 3)
    bank = next(iter(joint.dictionary.banks.values()))
    with torch.no_grad():
        plain = joint["net"](x)
        outputs = {}
        for task in TASKS:
            with joint.serving(task):
                assert joint.task == task
                outputs[task] = joint["net"](x)
                state = joint["net"].state_dict()
        assert joint.task is None
        assert torch.equal(joint["net"](x), plain)  # and the default once more
    assert not torch.equal(outputs["one"], outputs["two"]) and not torch.equal(outputs["one"], plain)
    assert not torch.equal(state["2.weight"], joint["net"].state_dict()["2.weight"])
    assert torch.equal(joint.collapse("net")["2.weight"], joint["net"].state_dict()["2.weight"])
    with torch.no_grad():
        bank.shared += bank.own["two"]
        torch.testing.assert_close(joint["net"](x), outputs["two"])


def test_serving_ends_with_what_it_began_with():
    joint = build()
    with joint.serving("one"):
        with pytest.raises(KeyError), joint.serving("two"):
            raise KeyError
        assert joint.task == "one"


def test_a_look_without_gradients_takes_none_away():
    joint, x = build(), torch.randn(4, 3)
    with joint.step(), joint.serving("one"):
        with torch.no_grad():
            joint["net"](x)
        loss_of(joint, "net", x).backward()
    bank = next(iter(joint.dictionary.banks.values()))
    assert bank.own["one"].grad is not None and bank.own["two"].grad is None


def test_what_is_written_into_a_task_s_weights_is_not_lost_unsaid():
    joint, x = build(), torch.randn(4, 3)
    with pytest.raises(PlanError, match="changed in place"), joint.step():
        with joint.serving("one"), torch.no_grad():
            joint["net"](x)
            joint["net"][2].weight.zero_()
        with joint.serving("two"):
            joint["net"](x)


def test_modules_that_listen_are_told():
    joint, x = build(shift=True), torch.randn(4, 3)
    module = joint["net"][4]
    with torch.no_grad(), joint.serving("three"):
        assert module.task == "three"
        joint["net"](x)
    assert module.task is None
    copied = copy.deepcopy(joint)
    with copied.serving("two"):
        assert copied["net"][4].task == "two" and module.task is None


def recomputing(reentrant, kind, twice=False):
    """A joint model in which a region runs again: with weights of tasks, with a module that listens, or with both."""
    torch.manual_seed(0)
    shift = () if kind == "weights" else (Scale(),)
    inner = [
        nn.Linear(8, 8),
        nn.Tanh(),
        *shift,
        *(() if kind == "listener" else (nn.Linear(8, 8), nn.Tanh())),
    ]
    inner = inner[1:] if kind == "listener" else inner
    if twice:
        inner = [nn.Linear(8, 8), nn.Tanh(), Again(*inner, reentrant=twice == "reentrant"), nn.Tanh()]
    layers = [
        nn.Linear(3, 8),
        nn.Tanh(),
        Again(*inner, reentrant=reentrant),
        nn.Linear(8, 8),
        nn.Linear(8, 2),
    ]
    member = made("net", nn.Sequential(*layers), torch.zeros(2, 3))
    joint = join([member], make_plan([discover(member)], (4, 4), 1))
    for key in joint.dictionary:
        bank = joint.dictionary[key]
        joint.dictionary.banks[key] = Offsets(bank.block, bank.settled_blocks())
    joint.refresh()
    return joint


class Scale(Shift):
    """Listens; what it returns is no sum, so that its input is looked at in the backward pass."""

    def forward(self, x):
        return x * x * (1.0 if self.task is None else TASKS.index(self.task) + 2.0)


@pytest.mark.parametrize("kind", ["weights", "listener", "both"])
@pytest.mark.parametrize(
    ("reentrant", "twice"),
    [
        (False, False),
        (True, False),
        (False, "other"),
        (True, "reentrant"),
        (True, "other"),
        (False, "reentrant"),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("where", ["after", "within another", "looked at between"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_that_run_again_serve_the_task_that_they_served(kind, reentrant, twice, inside, where, device):
    draw = torch.Generator().manual_seed(1)
    inputs = {task: torch.randn(4, 3, generator=draw).to(device).requires_grad_() for task in TASKS}
    joint = recomputing(reentrant, kind, twice).to(device)
    for task, x in inputs.items():
        with joint.serving(task):
            loss_of(joint, "net", x).backward()
    wanted = gradients(joint)
    joint.zero_grad()
    with joint.step() if inside else nullcontext():
        losses = []
        for task, x in inputs.items():
            with joint.serving(task):
                losses.append(loss_of(joint, "net", x))
        if where == "looked at between":
            with torch.no_grad():
                joint["net"](inputs["one"])
        with joint.serving("two") if where == "within another" else nullcontext():
            torch.stack(losses).sum().backward()
            assert joint.task == ("two" if where == "within another" else None)
    for name, gradient in gradients(joint).items():
        if wanted[name] is None:
            assert gradient is None or not gradient.any(), name
        else:
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():  # what ran again left nothing behind
        plain = recomputing(reentrant, kind, twice).to(device)["net"](inputs["one"])
        torch.testing.assert_close(joint["net"](inputs["one"]), plain)


class Watched(nn.Module):
    """Notes which task is served."""

    def __init__(self, seen):
        super().__init__()
        self.seen, self.task = seen, None

    def serve_task(self, task):
        self.task = task

    def forward(self, x):
        self.seen.append(self.task)
        return x

    def __deepcopy__(self, memo):
        return Watched(self.seen)


def test_training_validation_and_rehearsal_serve_each_task():
    seen = []
    torch.manual_seed(0)
    layers = nn.Linear(3, 8), Watched(seen), nn.Linear(8, 8), nn.Linear(8, 2)
    joint = join([made("net", nn.Sequential(*layers), torch.zeros(2, 3))], block=(4, 4), context=1)
    seen.clear()
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 3, generator=draw), torch.randint(2, (4,), generator=draw)) for _ in range(2)]
    tasks = [Task(name, "net", data, validation=data) for name in ("one", "two")]
    train(joint, tasks, {"steps": 2, "generations": 1, "final": 0}, cpu=True)
    assert set(seen) == {"one", "two"} and seen[0] == "one"
    seen.clear()
    evaluate(joint, tasks, {})
    assert seen == ["one", "one", "two", "two"]
