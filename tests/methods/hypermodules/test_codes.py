"""What a location has of its own: contexts, nothing, or a diagonal. Starting, training and collapsing stay exact."""

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import PlanError
from surgery.settings.training import Evolution, Training
from surgery.storage.stored import store
from surgery.training.loop.starting import start
from surgery.training.loop.state import restore, snapshot
from surgery.training.tasks.tasks import Task
from surgery.training.train import train


def net(seed, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    )


def joined(count=2):
    members = [surgery.load_member(net(s), name=f"net{s}", inputs=torch.randn(2, 4)) for s in range(count)]
    return surgery.join(members, block=(8, 4), context=3)


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(3)
    ]


@pytest.mark.parametrize("codes", ["contexts", "ones", "diagonals"])
def test_every_kind_of_code_starts_exactly(codes):
    joint = joined()
    start(joint, Training(evolution=Evolution(codes=codes)), seed=0)
    for seed in range(2):
        for name, tensor in net(seed).state_dict().items():
            assert torch.equal(joint.collapse(f"net{seed}")[name], tensor)


@pytest.mark.parametrize("codes", ["ones", "diagonals"])
def test_what_was_trained_is_what_collapses(codes, tmp_path):
    joint = joined()
    tasks = [Task(f"net{s}", f"net{s}", batches(s)) for s in range(2)]
    settings = {"generations": 2, "steps": 3, "evolution": {"codes": codes, "start": "order"}}
    train(joint, tasks, settings, cpu=True)
    bank = joint.dictionary["8x4-float32"]
    assert bank.hypermodules < bank.locations and bool((bank.contexts == 1).all())
    assert (bank.diagonals is not None and bool(bank.diagonals.any())) == (codes == "diagonals")
    x = torch.randn(5, 4)
    plain = sum(t.numel() * t.element_size() for s in range(2) for t in net(s).state_dict().values())
    assert store(joint).nbytes <= plain
    surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(tmp_path / "joint", modules={f"net{s}": net(s) for s in range(2)})
    for name in joint.names:
        assert torch.equal(joint.extract(name)(x), joint[name](x))
        assert torch.equal(loaded[name](x), joint[name](x))


def test_ones_without_sharing_are_plain_training():
    """A single-task baseline in the same loop: one hypermodule a block, nothing else, is the member itself."""
    joint, plain = joined(1), net(0)
    settings = {
        "generations": 1, "final": 0, "steps": 6, "stopping": {"keep": "last"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "evolution": {"codes": "ones", "change": "none"},
    }  # fmt: skip
    train(joint, [Task("net0", "net0", batches())], settings, cpu=True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches() * 2:
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(joint.collapse("net0")[name], tensor)


def test_order_shares_the_same_place_of_every_member():
    joint = joined()
    start(joint, Training(evolution=Evolution(codes="ones", start="order", change="none")), seed=0)
    first, second = (joint.collapse(name)["2.weight"] for name in joint.names)
    assert torch.equal(first, second)


def test_alternatives_compete_without_contexts():
    joint = joined()
    tasks = [Task(f"net{s}", f"net{s}", batches(s)) for s in range(2)]
    settings = {"generations": 6, "steps": 2, "optimizer": {"soft_lr": 1.0}, "evolution": {"codes": "ones"}}
    train(joint, tasks, settings | {"stopping": {"keep": "last"}}, cpu=True)
    bank = joint.dictionary["8x4-float32"]
    assert bank.hypermodules < bank.locations and bool((bank.contexts == 1).all())


def test_diagonals_are_part_of_a_state():
    joint = joined()
    start(joint, Training(evolution=Evolution(codes="diagonals")), seed=0)
    bank = joint.dictionary["8x4-float32"]
    with torch.no_grad():
        bank.diagonals.normal_()
    kept, wanted = snapshot(joint), bank.diagonals.detach().clone()
    with torch.no_grad():
        bank.diagonals.zero_()
    restore(joint, kept)
    assert torch.equal(bank.diagonals, wanted)


def test_a_diagonal_is_added_to_the_block():
    joint = joined(1)
    before = joint.collapse("net0")["2.weight"].clone()
    start(joint, Training(evolution=Evolution(codes="diagonals")), seed=0)
    bank = joint.dictionary["8x4-float32"]
    with torch.no_grad():
        bank.diagonals[0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    change = joint.collapse("net0")["2.weight"] - before
    assert change[:8, :4].diagonal().tolist() == pytest.approx([1, 2, 3, 4])
    assert float(change.abs().sum()) == pytest.approx(10, abs=1e-4)


def test_codes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="no contexts"):
        Evolution(codes="ones", contexts="fitted")
    joint = joined().open()
    with pytest.raises(PlanError, match="joined anew"):
        start(joint, Training(evolution=Evolution(codes="diagonals")), seed=0)


@pytest.mark.parametrize("codes", ["contexts", "ones", "diagonals"])
def test_what_blocks_were_takes_no_memory_of_a_device(codes):
    joint = joined()
    before = joint.collapse()
    start(joint, Training(evolution=Evolution(codes=codes, start="own")), 0)
    (key,) = {p.bank for p in joint.plan.placements}
    bank = joint.dictionary[key]
    origin = bank.origin.clone()
    bank.double()
    assert bank.rows.dtype == bank.origin.dtype == torch.float64 and torch.equal(bank.origin.float(), origin)
    bank.float()
    for name, state in joint.collapse().items():
        assert all(torch.equal(tensor, before[name][k]) for k, tensor in state.items())
    bank.to("meta")
    assert bank.rows.device.type == "meta" and bank.origin.device.type == "cpu"
    assert "origin" not in bank.state_dict() and torch.equal(bank.origin, origin)
