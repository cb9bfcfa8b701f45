"""Templates with bits: the allocation's own laws, targets with and without a given number, families of siblings."""

import numpy as np
import pytest
import torch
from artifacts import contents, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import assert_same_bits, made, plain_copy, run, sibling
from torch import nn

import surgery
from surgery.anatomy.plan import make_plan
from surgery.anatomy.sites import discover
from surgery.core.joining import join
from surgery.errors import ArtifactError, PlanError
from surgery.fitting.assembly import Assembler
from surgery.fitting.decoding import Decodings
from surgery.fitting.fit import fit
from surgery.fitting.tabulated import Choice
from surgery.fitting.units import Arrangement, measure, tabulate
from surgery.methods.templates.arrangements import candidates, stack_group
from surgery.methods.templates.layers import read_stack
from surgery.methods.templates.plan import plan_templates
from surgery.methods.templates.settings import Settings
from surgery.storage.codecs import NATIVE
from surgery.storage.keys import PartKey, PlainKey
from surgery.storage.stored import store

MIXING = ("linear", "softmax", "one-hot")


def only(kept):
    """All mixtures, the others than one in the slow tests."""
    return [pytest.param(each, marks=() if each == kept else pytest.mark.slow) for each in MIXING]


def chain(width=64, depth=3, name="base"):
    """Layers of one structure, each of which moves the output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
        net = nn.Sequential(nn.Linear(6, width), *layers, nn.Linear(width, 5))
        x = torch.randn(8, 6)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p *= 2.5
    return made(name, net, x)


def family(count=3, noise=0.02, **sizes):
    base = chain(**sizes)
    return [base, *(sibling(base, f"s{i}", noise, i) for i in range(1, count))]


def fitted(members, **target):
    return fit(join(members, plan_templates([discover(each) for each in members], (8, 8))), **target)


def whole(joint):
    return sum(joint.report.original_bytes.values())


@given(st.integers(0, 999), st.sampled_from(MIXING), st.sampled_from([0.02, 0.5]), st.booleans())
@settings(max_examples=6, deadline=None)
def test_predicted_errors_are_those_of_the_weights_that_members_get(seed, mixing, noise, exact):
    members = family(2, noise, width=16, depth=3)
    plan = plan_templates([discover(each) for each in members], (8, 8))
    generator = torch.Generator().manual_seed(seed)
    states = {each.name: dict(each.module.state_dict()) for each in members}
    originals = {(name, key): t for name, state in states.items() for key, t in state.items()}
    moved = {key: float(10 ** torch.rand((), generator=generator)) for key in originals}
    tensors = read_stack(plan, "stack0", originals, moved)
    mine = [(site.member, site.name) for each in tensors for site in each.sites]
    alone = [measure({PlainKey(m, n): originals[m, n]}, {m: moved[m, n]}) for m, n in mine]
    group = stack_group(tensors, Arrangement(tuple(alone)), Settings(mixture=mixing), seed)
    assert not group.shared and len(group.arrangements) > 3
    table, units, arrangements = tabulate([group], list(states))
    assembler = Assembler(plan, {}, units, arrangements)
    for number in range(len(arrangements)):
        options = [len(unit.options) for unit in units]
        # The least precisions leave errors that are no noise, and dropped templates may have parts in common.
        picked = [0 if exact else int(torch.randint(max(1, n - 4), (), generator=generator)) for n in options]
        taken = np.arange(len(arrangements)) == number
        stored = assembler.assemble(Choice(np.array(picked), taken, 0.0, np.zeros(2)))
        active = taken[table.arrangement]
        cost = table.weight * table.error[np.arange(len(units)), picked][:, None]
        predicted = cost[active].sum(0)
        for i, name in enumerate(states):
            found = Decodings().weights_of(stored, name)
            error = sum(
                moved[m, n] * float((found[n] - originals[m, n]).double().square().sum())
                for m, n in mine
                if m == name
            )
            assert error == pytest.approx(predicted[i], rel=1e-4 if exact else 0.15, abs=1e-7)
        size = table.size[np.arange(len(units)), picked][active].sum() + table.fixed[number]
        headers = 160 * 2 * active.sum() + 400 * len(tensors)
        assert size - headers <= stored.nbytes <= size


def test_numbers_of_templates_that_are_tried():
    assert candidates(5, 5) == [1, 2, 3, 4, 5]
    many = candidates(96, 12)
    assert many[:8] == list(range(1, 9)) and {12, 24, 36, 96} <= {*many} and len(many) < 30


@pytest.mark.parametrize("mixing", only("softmax"))
def test_bounds_and_budgets_hold_and_bits_make_templates_smaller(mixing):
    together = fitted(family(), max_error=0.03, mixture=mixing)
    report = together.report
    assert report.met and max(report.errors.values()) <= 0.03
    assert report.stored_bytes == store(together).nbytes
    assert whole(together) - report.stored_bytes == sum(report.saved.values())
    assert min(report.saved.values()) >= 0
    # At the members' precision: the fewest templates that hold the bound are at least one for each layer of a member.
    native = fitted(family(), templates=3, mixture=mixing).report
    assert report.stored_bytes < 0.5 * native.stored_bytes
    small = fitted(family(), budget=0.2, mixture=mixing)
    assert store(small).nbytes <= 0.2 * whole(small) and max(small.report.errors.values()) < 0.03


@pytest.mark.slow
def test_a_family_takes_less_as_templates_than_apart_and_less_still_as_relatives():
    """Differences of low rank are each member's own, which mixtures of whole templates cannot have."""
    members = family()
    rows = fit(join(members, make_plan([discover(m) for m in members], (8, 8))), max_error=0.02).report
    templates = fitted(family(), max_error=0.02).report
    apart = sum(fitted([each], max_error=0.02).report.stored_bytes for each in family())
    assert rows.stored_bytes < templates.stored_bytes < 0.8 * apart
    assert rows.saved["sharing"] > 0
    # What sharing saved is what the same errors cost apart.
    assert 0.5 < templates.saved["sharing"] / (apart - templates.stored_bytes) < 1.5
    stack = templates.stacks["stack0"]
    assert stack.layers == 9 and 3 <= stack.templates <= 9 and stack.nbytes < 0.25 * stack.original


def test_a_family_that_differs_a_lot_is_no_larger_than_its_members_apart():
    for mixing in ("linear", "one-hot"):
        together = fitted(family(2, 0.5), max_error=0.03, mixture=mixing).report
        apart = sum(fitted([each], max_error=0.03).report.stored_bytes for each in family(2, 0.5))
        assert together.met and together.stored_bytes <= 1.05 * apart


def test_unrelated_layers_stay_apart_and_cost_what_they_cost_without_templates(monkeypatch):
    """Rounded plainly, as templates are."""
    monkeypatch.setattr("surgery.fitting.learning.LARGEST", 0)
    one = fitted([chain()], max_error=0.05).report
    member = chain()
    plain = fit(join([member], make_plan([discover(member)], (8, 8))), max_error=0.05).report
    assert one.stored_bytes == pytest.approx(plain.stored_bytes, rel=0.03)
    assert one.saved["sharing"] <= 0.02 * one.stored_bytes
    assert one.stacks["stack0"].templates == one.stacks["stack0"].layers == 3


@pytest.mark.parametrize("mixing", ["linear", "one-hot"])
def test_equal_layers_count_once(mixing):
    twins = [chain(name="one"), chain(name="two")]
    report = fitted(twins, max_error=0.05, mixture=mixing).report
    alone = fitted([chain()], max_error=0.05).report
    assert report.saved["sharing"] == pytest.approx(alone.stored_bytes, rel=0.2)  # the second twin
    assert report.stored_bytes < 1.2 * alone.stored_bytes
    assert report.stacks["stack0"].templates <= 3 < report.stacks["stack0"].layers


@pytest.mark.parametrize("mixing", only("linear"))
def test_a_given_number_of_templates_takes_the_bits_that_the_target_asks_for(mixing):
    native = fitted(family(), templates=3, mixture=mixing).report
    reached = max(native.errors.values())
    bounded = fitted(family(), templates=3, max_error=1.2 * reached, mixture=mixing)
    assert max(bounded.report.errors.values()) <= 1.2 * reached
    assert bounded.report.stored_bytes < 0.7 * native.stored_bytes
    assert bounded.report.stacks["stack0"].templates == native.stacks["stack0"].templates == 3
    small = fitted(family(), templates=3, budget=0.1, mixture=mixing)
    assert store(small).nbytes <= 0.1 * whole(small) and small.report.stacks["stack0"].templates == 3
    assert "with 3 templates" in small.report.target
    with pytest.raises(
        PlanError, match=r"An error of 0\.001 cannot be met with 3 templates: .* more `templates`"
    ):
        fitted(family(), templates=3, max_error=0.001, mixture=mixing)
    with pytest.raises(PlanError, match=r"met with 3 templates: .* use `budget=0\.\d+` or more, or fewer `t"):
        fitted(family(), templates=3, budget=0.01, mixture=mixing)
    assert fitted(family(2), templates=6, max_error=0.0, mixture=mixing).report.errors["s1"] == 0


@pytest.mark.parametrize("mixing", MIXING)
def test_a_number_alone_is_what_it_was(mixing):
    """Every tensor as it is, from templates fitted with the mean sensitivity of layers."""
    from surgery.core.generation import to_blocks
    from surgery.core.settle import settle_banks
    from surgery.fitting.learning import inputs_to_learn_from
    from surgery.fitting.scene import Scene
    from surgery.fitting.trial import Trial
    from surgery.inputs.probes import probe_inputs
    from surgery.methods.rows.bank import exact_bank
    from surgery.methods.templates.mixtures import Templates, open_stack
    from surgery.settings.target import Target
    from surgery.storage.stored import bank_tensors
    from surgery.util.devices import pick_device

    members = family()
    plan = plan_templates([discover(each) for each in members], (8, 8))
    trials, banks = {}, {}
    for each in members:
        state = each.module.state_dict()
        owners = {name: (name,) for name in state}
        probes, others = probe_inputs(each, seed=0), inputs_to_learn_from(each, state, 0)
        trials[each.name] = Trial(each, dict(state), owners, probes, pick_device("cpu"), others)
    moved, weights = Scene(trials, plan, Target(), 0).sensitivity, {}
    (keys,) = plan.stacks.values()
    for key in keys:
        placed = [p for p in plan.placements if p.bank == key]
        state = {each.name: each.module.state_dict() for each in members}
        blocks = torch.cat([to_blocks(state[p.site.member][p.site.name], p) for p in placed])
        banks[key] = exact_bank(blocks, plan.bank(key).block)
        weights[key] = sum(moved[p.site.member, p.site.name] for p in placed) / len(placed)
    opened = open_stack(banks, Templates(3, mixing), torch.Generator().manual_seed(0), weights)
    only = plan.__class__(
        plan.members,
        tuple(plan.bank(key) for key in keys),
        tuple(p for p in plan.placements if p.bank in keys),
        (),
    )
    settled = settle_banks(only, opened)
    expected = {k: t for b in settled.plan.banks for k, t in bank_tensors(b, settled.banks[b.key]).items()}
    joint = fitted(family(), templates=3, mixture=mixing, device="cpu")
    tensors = store(joint).tensors
    assert all(each.precision == NATIVE for each in tensors.values())
    found = {key: each.parts[""] for key, each in tensors.items() if isinstance(key, PartKey)}
    assert expected and {key: t.shape for key, t in found.items()} == {
        k: t.shape for k, t in expected.items()
    }
    for key, tensor in expected.items():
        assert_same_bits({key: found[key]}, {key: tensor})
    assert joint.report.saved["precision"] == 0 and joint.report.stacks["stack0"].templates == 3


@pytest.mark.parametrize("mixing", only("one-hot"))
def test_artifacts_load_run_save_again_and_give_single_members(mixing, tmp_path):
    joint = fitted(family(), max_error=0.05, mixture=mixing)
    assert joint.plan.stacks
    modules = {each.name: plain_copy(each).module for each in family()}
    surgery.save(joint, tmp_path / "one")
    assert surgery.verify(tmp_path / "one", modules=modules).ok
    loaded = surgery.load(tmp_path / "one", modules=modules)
    surgery.save(loaded, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    for each in family():
        (found,), (wanted,) = run(loaded[each.name], each), run(joint[each.name], each)
        assert torch.equal(found, wanted)
        assert_same_bits(loaded.collapse(each.name), joint.collapse(each.name))
    single = surgery.load(tmp_path / "one", members=["s1"], modules={"s1": plain_copy(family()[1]).module})
    assert_same_bits(single.collapse("s1"), joint.collapse("s1"))
    if mixing == "one-hot":
        first, second = (loaded[name][2][0].weight for name in ("base", "s1"))
        assert torch.equal(first, second) and any("single." in str(key) for key in store(loaded).tensors)

        def forget(manifest):
            bank = next(bank for bank in manifest["banks"].values() if bank.get("encoded"))
            name = next(name for group in bank["encoded"] for name in group[3] if name.startswith("single."))
            for group in bank["encoded"]:
                group[3] = ["single.77" if each == name else each for each in group[3]]

        rewrite(tmp_path / "two", forget)
        with pytest.raises(ArtifactError, match=r"single\."):
            surgery.load(tmp_path / "two", modules={each.name: plain_copy(each).module for each in family()})
    joint.open()
    assert all(bank.hypermodules for bank in joint.dictionary.banks.values())


def test_a_signature_with_bits_loads_as_tied_layers(tmp_path):
    joint = fitted([chain()], templates=2, budget=0.3, mixture="one-hot")
    surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(tmp_path / "joint", modules={"base": chain().module})
    places = [loaded["base"][layer][0].weight.data_ptr() for layer in (1, 2, 3)]
    assert len(set(places)) == 2 and joint.report.saved["sharing"] >= 0
    assert loaded.plan.bank("stack0-0-weight").stack == "stack0"


def test_one_member_of_several_takes_its_own_templates_along(tmp_path):
    def members():
        return [chain(width=48), sibling(chain(width=48), "other", 5.0, 1)]

    joint = fitted(members(), templates=5, budget=0.3, mixture="one-hot")
    surgery.save(joint, tmp_path / "joint")
    for each in members():
        alone = surgery.load(tmp_path / "joint", members=[each.name], modules={each.name: each.module})
        assert_same_bits(alone.collapse(each.name), joint.collapse(each.name))
        assert 2 <= len([p for p in store(alone).parts("stack0-0-weight") if p.startswith("single.")]) <= 3


def test_layers_that_became_plain_are_templates_of_their_own():
    members = [chain(width=48), sibling(chain(width=48), "other", 5.0, 1)]
    report = fitted(members, templates=4, mixture="one-hot").report
    assert report.stacks["stack0"].templates == 4 and report.stacks["stack0"].layers == 6


class Undifferentiable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = chain().module

    def forward(self, x):
        with torch.no_grad():
            return self.body(x)


def test_what_no_gradient_reaches_is_measured():
    def one():
        return made("odd", Undifferentiable(), chain().inputs.args[0])

    report = fitted([one()], max_error=0.05).report
    assert report.met and report.stored_bytes < 0.4 * report.original_bytes["odd"]
