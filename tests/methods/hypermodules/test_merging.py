"""Merging moves: all users go or none, what is refused stays bit for bit, what is saved is what the bank takes less."""

import pytest
import torch
import training_nets
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.contest_state import pack_contest, unpack_contest, wrong_contest
from surgery.methods.hypermodules.evolution import conclude, contend, inherit
from surgery.methods.hypermodules.merging import draw_mergers, merged_saving
from surgery.methods.hypermodules.price import expected_saving
from surgery.methods.hypermodules.settings import Evolution
from surgery.training.loop.optimizers import carry
from surgery.training.train import train

MERGE = Evolution(fraction=0.6, merges=0.7, challengers=2, epsilon=0.2)
FACTORS = st.booleans()


def make_bank(seed, locations=20, hypermodules=8, context=2, width=6, factors=False):
    g = torch.Generator().manual_seed(seed)
    rest = torch.randint(hypermodules, (locations - hypermodules,), generator=g)
    psi = torch.cat([torch.arange(hypermodules), rest])
    rows = torch.randn(hypermodules * context, width, generator=g)
    bank = HypermoduleBank((1, width), rows, psi, torch.randn(locations, context, generator=g), hypermodules)
    if factors:
        bank.set_factors(
            torch.rand(locations, generator=g) + 0.5, torch.rand(hypermodules, generator=g) + 0.5
        )
    return bank


def stepped(bank):
    optimizer = torch.optim.Adam([bank.rows, bank.contexts], lr=0.01)
    (bank.blocks() * torch.arange(1.0, bank.locations + 1).unsqueeze(1)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def opened(seed, factors=False):
    bank = make_bank(seed, factors=factors)
    optimizer = stepped(bank)
    moments = optimizer.state[bank.rows]["exp_avg_sq"]
    generator = torch.Generator().manual_seed(seed)
    for each in contend(bank, MERGE, 0.3, 99, generator, moments=moments):
        carry(optimizer, each)
    return bank, optimizer


def all_of(bank, optimizer):
    states = [value for p in (bank.rows, bank.contexts) for value in optimizer.state[p].values()]
    return [t.detach().clone() for t in [*bank.state().values(), *states]]


@given(st.integers(0, 999), FACTORS)
@settings(max_examples=10, deadline=None)
def test_a_move_that_is_refused_leaves_everything_bit_for_bit(seed, factors):
    bank = make_bank(seed, factors=factors)
    optimizer = stepped(bank)
    before = all_of(bank, optimizer)
    generator = torch.Generator().manual_seed(seed)
    without_new = MERGE.model_copy(update={"epsilon": 0.0})
    assert contend(bank, without_new, 0.3, 8, generator) == []  # alpha: the incumbents win
    inherit(optimizer, bank)
    assert conclude(bank) == ([], 0)
    after = all_of(bank, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@given(st.integers(0, 999), FACTORS)
@settings(max_examples=10, deadline=None)
def test_all_users_go_or_none_does(seed, factors):
    bank, optimizer = opened(seed, factors)
    contest, before = bank.contest, bank.psi.clone()
    if contest.group is None:
        return
    with torch.no_grad():
        contest.soft.add_(torch.randn(contest.soft.shape, generator=torch.Generator().manual_seed(seed)) * 3)
    psi, contexts = contest.decide(bank.psi, bank.contexts.detach())
    for number in range(int(contest.group.max()) + 1):
        mine = contest.chosen[contest.group == number]
        assert torch.equal(mine, (before == before[mine[0]]).nonzero().squeeze(1))  # all its users
        assert len(set(psi[mine].tolist())) == 1
        stayed = bool((psi[mine] == before[mine]).all())
        assert stayed == torch.equal(contexts[mine], bank.contexts[mine])
    targets = contest.candidates[contest.group >= 0][:, 1:]
    assert not bool(torch.isin(targets, before[contest.chosen[contest.group >= 0]]).any())  # no chains
    inherit(optimizer, bank)
    for each in conclude(bank)[0]:
        carry(optimizer, each)
    assert optimizer.state[bank.rows]["exp_avg"].shape == bank.rows.shape
    assert set(bank.psi.tolist()) == set(range(bank.hypermodules))


@given(st.integers(0, 999), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_what_merging_saves_is_what_the_bank_takes_less(seed, context):
    psi = make_bank(seed).psi
    a, b = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:2]
    users = (psi == a).nonzero().squeeze(1)
    moved = torch.where(psi == a, b, psi)

    def taken(psi):
        return sum(min(int((psi == k).sum()), context) for k in range(8))

    saved = merged_saving(psi, 8, context, users, b.expand(len(users)))
    assert float(saved.sum()) == pytest.approx(taken(psi) - taken(moved))


@pytest.mark.parametrize("moments", [False, True])
def test_the_nearest_in_the_metric_of_gradients_is_chosen(moments):
    g = torch.Generator().manual_seed(0)
    first, second, rest = torch.randn(3, 6, generator=g).unbind()
    like = first.clone()
    like[:3] = second[:3]  # as the first in its last columns, which alone have gradients
    near = first + 0.3 * torch.randn(6, generator=g)
    rows = torch.stack([first, like, near, rest])
    bank = HypermoduleBank((1, 6), rows, torch.tensor([0, 0, 1, 2, 3]), torch.ones(5, 1), 4)
    seen = torch.tensor([0.0, 0, 0, 1, 1, 1]).expand(4, 6)
    found = None
    for seed in range(50):  # until the first alone would be given up
        found = draw_mergers(bank, 2, torch.Generator().manual_seed(seed), seen if moments else None)
        if found is not None and found.locations.tolist() == [0, 1] and seed > 0:
            break
    assert found is not None and found.locations.tolist() == [0, 1]
    assert found.targets.tolist() == ([1, 1] if moments else [2, 2])
    blocks = found.coefficients @ rows[found.targets[:1]]
    torch.testing.assert_close(blocks.norm(dim=1), first.norm().expand(2))


def test_a_move_of_several_users_counts_what_all_of_them_save():
    for seed in range(20):
        bank, _ = opened(seed)
        if bank.contest.group is not None:
            break
    saving = expected_saving(bank)
    contest, together = bank.contest, bank.contest.group >= 0
    probability = contest.soft.softmax(1)[together, 1:].sum(1)
    merged = merged_saving(
        bank.psi, bank.hypermodules, 2, contest.chosen[together], contest.candidates[together, 1]
    )
    lone = contest.soft.softmax(1)[~together] * contest.saved[~together]
    expected = (lone.sum() + (probability * merged).sum()) / bank.locations
    torch.testing.assert_close(saving, expected)


def test_a_contest_with_moves_is_saved_checked_and_restored():
    for seed in range(20):
        bank, _ = opened(seed, factors=True)
        if bank.contest.group is not None:
            break
    parts = {name: tensor.clone() for name, tensor in pack_contest(bank.contest).items()}
    assert not list(wrong_contest(parts, bank.psi, bank.hypermodules, bank.context))
    again = unpack_contest(bank, parts)
    assert torch.equal(again.group, bank.contest.group)
    expected = bank.blocks()
    bank.contest = again
    assert torch.equal(bank.blocks(), expected)
    for wrong in (parts["group"][:-1], parts["group"] + len(parts["group"]), parts["group"].float()):
        assert list(wrong_contest({**parts, "group": wrong}, bank.psi, bank.hypermodules, bank.context))
    mixed = {**parts, "group": torch.zeros_like(parts["group"])}
    (sentence,) = wrong_contest(mixed, bank.psi, bank.hypermodules, bank.context)
    assert "must have the same candidates" in sentence


CONFIG = {
    "steps": 3, "generations": 4, "final": 1, "optimizer": {"lr": 0.01, "soft_lr": 0.5},
    "evolution": {"fraction": 0.5, "alpha": 0.5, "price": 30.0, "epsilon": 0.0},
}  # fmt: skip


def test_a_run_with_a_price_begins_narrow_merges_and_resumes(tmp_path, monkeypatch):
    from surgery.training.loop.interruptions import Interrupted
    from surgery.training.loop.trainer import Trainer

    whole = training_nets.build(dropout=0.0, block=(4, 4), context=4)
    report = train(whole, training_nets.tasks(), CONFIG, cpu=True)
    key = "4x4-float32"
    assert whole.dictionary[key].context == 1  # of a single user four basis blocks are redundant
    assert report.numbers[0] < 0.9 * report.numbers[1]
    step, groups = Trainer.train_step, []

    def stopping(self):
        import os
        import signal

        step(self)
        if self.steps == 10:
            groups.append(self.joint.dictionary[key].contest.group)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    with pytest.raises(Interrupted):
        train(
            training_nets.build(dropout=0.0, block=(4, 4), context=4),
            training_nets.tasks(), CONFIG, folder=tmp_path / "run", cpu=True,
        )  # fmt: skip
    assert groups[0] is not None  # the state has a move in it
    monkeypatch.setattr(Trainer, "train_step", step)
    again = training_nets.build(dropout=0.0, block=(4, 4), context=4)
    train(again, training_nets.tasks(), CONFIG, folder=tmp_path / "run", resume=True, cpu=True)
    for name, tensor in whole.dictionary[key].state().items():
        assert torch.equal(tensor, again.dictionary[key].state()[name])


def test_narrow_starts_change_no_output():
    from surgery.settings.training import Training
    from surgery.training.loop.starting import start

    joint, x = training_nets.build(dropout=0.0, block=(4, 4), context=4), torch.randn(5, 4)
    expected = {name: joint[name].eval()(x) for name in joint.names}
    start(joint, Training(evolution=Evolution(price=1.0)), seed=0)
    for name in joint.names:
        torch.testing.assert_close(joint[name](x), expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"merges": 0.5, "codes": "ones"}, "need codes contexts, found ones"),
        ({"narrow": True, "start": "given"}, "found start given and codes contexts"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Evolution(**given)
