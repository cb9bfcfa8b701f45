"""Balance: a step of the optimizer moves generated weights as far as plain training does, whatever generates them."""

from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.methods.hypermodules.balance import balance, homes
from surgery.methods.hypermodules.opening import open_bank
from surgery.methods.rows.bank import exact_bank
from surgery.settings.training import Training
from surgery.training.loop.starting import start
from surgery.training.loop.trainer import Trainer
from surgery.training.tasks.tasks import Task

RATE = 1e-4


def loss(scores, target):
    """So large that Adam's epsilon is below every gradient, and a step of SGD above rounding."""
    return 1e6 * nn.functional.cross_entropy(scores, target)


class Sequences(nn.Module):
    """An LSTM and attention between linear maps."""

    def __init__(self):
        super().__init__()
        self.into, self.lstm = nn.Linear(6, 16), nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.lstm(self.into(x))[0]
        return self.out(self.attention(hidden, hidden, hidden, need_weights=False)[0][:, -1])


def pictures():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3), nn.Flatten(),
        nn.Linear(8 * 36, 32), nn.ReLU(), nn.Linear(32, 3),
    )  # fmt: skip


def strands():
    return nn.Sequential(
        nn.Conv1d(4, 8, 1),
        nn.Conv1d(8, 16, 5),
        nn.Flatten(),
        nn.Linear(16 * 8, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


KINDS = {"pictures": (pictures, (1, 8, 8)), "strands": (strands, (4, 12)), "sequences": (Sequences, (5, 6))}


def nets(scale):
    made = {}
    for number, (name, (build, shape)) in enumerate(KINDS.items()):
        torch.manual_seed(number)
        module = build()
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(scale if p.ndim > 1 else 1)
        made[name] = module, torch.randn(16, *shape), torch.randint(3, (16,))
    return made


def after_a_step(scale, block, context, config):
    """Sites before, after a joint step, and after a step of plain training, by member and name."""
    made = nets(scale)
    members = [surgery.load_member(deepcopy(m), name=n, inputs=x[:2]) for n, (m, x, _) in made.items()]
    joint = surgery.join(members, block=block, context=context)
    sites = [(p.site.member, p.site.name) for p in joint.plan.placements]
    before = {(m, n): t for m, state in joint.collapse().items() for n, t in state.items()}
    tasks = [
        Task(name, name, [(x, y)], lambda scores, batch: loss(scores, batch.target))
        for name, (_, x, y) in made.items()
    ]
    training = Training.model_validate(config)
    start(joint, training, 0)
    for member, state in joint.collapse().items():  # an exact start, bit for bit
        assert all(torch.equal(t, before[member, name]) for name, t in state.items())
    trainer = Trainer(joint, tasks, training, 0, Accelerator(cpu=True))
    joint.bodies.train()
    trainer.train_step()
    after = {(m, n): t for m, state in joint.collapse().items() for n, t in state.items()}
    plain = {}
    rates = training.optimizer.rates
    for name, (module, x, y) in made.items():
        rate = rates.get(name, training.optimizer.lr)
        kind = torch.optim.SGD if training.optimizer.name == "sgd" else torch.optim.Adam
        optimizer = kind(module.train().parameters(), lr=rate)
        (loss(module(x), y) / len(made)).backward()
        optimizer.step()
        plain |= {(name, key): t.detach() for key, t in module.state_dict().items()}
    return sites, before, after, plain


def assert_alike(found):
    sites, before, after, plain = found
    for site in sites:
        moved, wanted = (float((each[site] - before[site]).square().mean().sqrt()) for each in (after, plain))
        assert moved == pytest.approx(wanted, rel=0.1), site


@pytest.mark.parametrize("scale", [0.2, 1.0, 8.0])
@pytest.mark.parametrize(("block", "context"), [((8, 8), 1), ((8, 8), 4), ((4, 4), 2), ((1, 8), 3)])
def test_a_step_moves_generated_weights_as_far_as_plain_training(scale, block, context):
    config = {"optimizer": {"lr": RATE}, "evolution": {"change": "none"}}
    assert_alike(after_a_step(scale, block, context, config))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("codes", ["contexts", "ones"])
def test_members_move_at_rates_of_their_own(optimizer, codes):
    base = RATE * (1e-3 if optimizer == "sgd" else 1)
    rates = {"pictures": 10 * base, "sequences": base / 5}
    config = {
        "optimizer": {"name": optimizer, "lr": base, "rates": rates, "momentum": 0.0},
        "evolution": {"change": "none", "codes": codes},
    }
    assert_alike(after_a_step(1.0, (8, 8), 4, config))


def test_the_law_does_not_hold_for_the_papers_scale():
    config = {"optimizer": {"lr": RATE}, "evolution": {"change": "none", "scale": "contexts"}}
    with pytest.raises(AssertionError):
        assert_alike(after_a_step(1.0, (8, 8), 4, config))


@given(st.integers(0, 999), st.integers(1, 5), st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None)
def test_balancing_changes_no_block_and_fits_what_is_foreign(seed, context, norm):
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(12, generator=generator) * 2 + 0.01
    blocks = torch.randn(12, 64, generator=generator) * sigma.unsqueeze(1)
    bank = open_bank(exact_bank(blocks, (8, 8)), context, generator, sigma, "balanced", norm)
    rates = 10 ** (torch.rand(12, generator=generator) * 2 - 1)
    balance(bank, rates, norm)
    torch.testing.assert_close(bank.blocks(), blocks, rtol=1e-4, atol=1e-5 * float(sigma.max()))
    assert torch.equal(bank.settled_blocks(), blocks)
    length = bank.coefficients.detach().abs().pow(norm).sum(1)
    torch.testing.assert_close(length, rates, rtol=1e-4, atol=0)
    bank.psi = bank.psi.roll(1)  # every location takes the hypermodule of another one
    ratio = bank.blocks().detach().square().mean(1).sqrt() / sigma
    assert bool((ratio > 0.5).all()) and bool((ratio < 2).all())


def test_homes_are_the_first_users():
    assert homes(torch.tensor([2, 0, 2, 0]), 3).tolist() == [1, 0, 0]
