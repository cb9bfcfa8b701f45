"""Joint models: what joining changes (nothing), collapse, copies, and how members follow the dictionary."""

import copy

import pytest
import torch
from nets import (
    HUGE,
    NAMES,
    assert_gradients,
    assert_same_bits,
    dictionary_gradients,
    loss_of,
    member,
    open_joint,
    plain_copy,
    run,
)

from surgery.anatomy.plan import torch_dtype
from surgery.core.joining import join
from surgery.errors import PlanError

SMALL = tuple(name for name in NAMES if name not in HUGE)


@pytest.mark.parametrize("kind", [*SMALL, *(pytest.param(each, marks=pytest.mark.slow) for each in HUGE)])
def test_joining_changes_neither_outputs_nor_weights(kind):
    one = member(kind)
    before = {key: t.clone() for key, t in one.module.state_dict().items()}
    with torch.no_grad():
        expected = run(one.module, one)
    joint = join([one], block=(8, 8))
    with torch.no_grad():
        for found, wanted in zip(run(joint[kind], one), expected, strict=True):
            assert torch.equal(found, wanted)
    assert_same_bits(joint.collapse(kind), before)
    joint.open(3)
    assert_same_bits(joint.collapse(kind), before)
    # Opened blocks are sums of c products: right to some rounding errors; in short dtypes such an error may
    # move a weight to its neighbour, 2^-8 away in bfloat16.
    tolerance = 1e-5 if expected[0].dtype.itemsize > 2 else 2**-8
    with torch.no_grad():
        for found, wanted in zip(run(joint[kind], one), expected, strict=True):
            assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("kind", SMALL)
def test_an_extracted_module_is_the_original_and_depends_on_nothing(kind):
    one = member(kind)
    original = plain_copy(one).module
    joint = join([one], block=(8, 8)).open(2)
    extracted = joint.extract(kind)
    assert_same_bits(extracted.state_dict(), original.state_dict())
    assert [n for n, _ in extracted.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert [p.requires_grad for p in extracted.parameters()] == [
        p.requires_grad for p in original.parameters()
    ]
    with torch.no_grad():
        expected = run(original, one)
        for p in joint.parameters():
            p.fill_(0.5)
        for found, wanted in zip(run(extracted, one), expected, strict=True):
            assert torch.equal(found, wanted)


def test_extraction_keeps_what_was_frozen():
    one = member("tied")
    one.module.first.weight.requires_grad_(False)
    assert not join([one]).extract("tied").first.weight.requires_grad


def test_training_reaches_the_outputs_of_calls_steps_and_parts():
    joint, plain = open_joint("t5")
    optimizer = torch.optim.SGD(joint.dictionary.parameters(), lr=0.1)
    one = plain["t5"]
    for _ in range(2):
        with joint.step():
            loss = loss_of(run(joint["t5"], one))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        fresh = joint.extract("t5")
        with torch.no_grad():
            for found, wanted in zip(run(joint["t5"], one), run(fresh, one), strict=True):
                torch.testing.assert_close(found, wanted)


def test_a_part_of_a_member_follows_the_dictionary_too():
    """`generate` of an encoder-decoder model calls its encoder before the model itself."""
    joint, plain = open_joint("t5")
    ids = plain["t5"].inputs.kwargs["input_ids"]
    with torch.no_grad():
        before = joint["t5"].get_encoder()(ids).last_hidden_state
        for p in joint.dictionary.parameters():
            p.mul_(1.1)
        found = joint["t5"].get_encoder()(ids).last_hidden_state
        wanted = joint.extract("t5").get_encoder()(ids).last_hidden_state
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, wanted)
    (joint["t5"].get_encoder()(ids).last_hidden_state ** 2).sum().backward()
    (gradient,) = dictionary_gradients(joint)[0].values()
    assert float(gradient.norm()) > 0


@pytest.mark.parametrize("path", ["", "encoder", "encoder.block.0"])
def test_a_call_that_fails_leaves_no_trace(path):
    joint, plain = open_joint("t5")
    part = joint["t5"].get_submodule(path)
    hooks = [len(module._forward_hooks) for module in joint.modules()]
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises((TypeError, ValueError, AttributeError)):
            part("nonsense", nonsense=1)
    assert [len(module._forward_hooks) for module in joint.modules()] == hooks
    ids = plain["t5"].inputs.kwargs["input_ids"]
    with torch.no_grad():
        for p in joint.dictionary.parameters():
            p.mul_(1.1)
        wanted = joint.extract("t5").get_encoder()(ids).last_hidden_state
        found = joint["t5"].get_encoder()(ids).last_hidden_state
    torch.testing.assert_close(found, wanted)


def test_caches_in_the_member_follow_the_dictionary():
    joint, plain = open_joint("caching")
    one = plain["caching"]
    with torch.no_grad():
        run(joint["caching"], one)
        for p in joint.dictionary.parameters():
            p.mul_(1.1)
        found, extracted = run(joint["caching"], one)[0], run(joint.extract("caching"), one)[0]
        one.module.load_state_dict(joint.collapse("caching"))
        wanted = run(one.module, one)[0]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(extracted, wanted)


def test_copying_after_a_forward_with_gradients():
    joint, plain = open_joint("bert", "tied")
    joint.train()
    joint["bert"].eval()
    loss_of(run(joint["bert"], plain["bert"]))
    twin = copy.deepcopy(joint)
    assert [m.training for m in twin.modules()] == [m.training for m in joint.modules()]
    for name in joint:
        assert_same_bits(twin.collapse(name), joint.collapse(name))
    with torch.no_grad():
        for p in twin.dictionary.parameters():
            p.zero_()
    for name in joint:
        assert_same_bits(joint.collapse(name), plain[name].module.state_dict())
    loss_of(run(twin["bert"], plain["bert"])).backward()
    assert all(p.grad is None for p in joint.parameters())


def test_state_dicts_go_round():
    joint, plain = open_joint("bert", "tied")
    other, _ = open_joint("bert", "tied")
    with torch.no_grad():
        for p in joint.parameters():
            p.add_(0.01)
        run(other["bert"], plain["bert"])  # fills the slots before they change
    other.load_state_dict(joint.state_dict())
    with torch.no_grad():
        for name in joint:
            for found, wanted in zip(
                run(other[name], plain[name]), run(joint[name], plain[name]), strict=True
            ):
                assert torch.equal(found, wanted)
    fresh, _ = open_joint("bert", "tied")
    fresh.load_state_dict(joint.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(run(fresh["bert"], plain["bert"])[0], run(joint["bert"], plain["bert"])[0])


def test_an_exception_in_a_step_leaves_the_joint_model_usable():
    joint, plain = open_joint("bert")
    expected = run(joint["bert"], plain["bert"])
    with pytest.raises(ZeroDivisionError), joint.step():
        loss_of(run(joint["bert"], plain["bert"])).backward()
        raise ZeroDivisionError
    assert all(p.grad is None for p in joint.dictionary.parameters())
    assert torch.equal(run(joint["bert"], plain["bert"])[0], expected[0])
    loss_of(run(joint["bert"], plain["bert"])).backward()
    by_call = dictionary_gradients(joint)
    with joint.step():
        loss_of(run(joint["bert"], plain["bert"])).backward()
    assert_gradients(dictionary_gradients(joint), by_call, 1e-5)


def test_what_would_break_a_step_is_refused_inside_it():
    joint, _ = open_joint("tied")
    with joint.step():
        for action in (
            joint.refresh,
            joint.clear,
            joint.state_dict,
            lambda: joint.to(torch.float32),
        ):
            with pytest.raises(PlanError, match="step"):
                action()
        with pytest.raises(PlanError, match="step"), joint.step():
            pass


def test_a_step_without_sites_or_backward_does_nothing():
    joint, plain = open_joint("tied")
    with joint.step():
        pass
    with joint.step(), torch.no_grad():
        run(joint["tied"], plain["tied"])
    with torch.no_grad(), joint.step():
        run(joint["tied"], plain["tied"])
    assert all(p.grad is None for p in joint.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["bert", "lstm", "tied"])
def test_changing_dtype_changes_members_and_keeps_the_dictionary_fine(kind, dtype):
    one = member(kind)
    plain = plain_copy(one).module.to(dtype)
    joint = join([one], block=(8, 8)).to(dtype)
    assert all(p.dtype in (torch.float32, torch.float64) for p in joint.dictionary.parameters())
    assert_same_bits(joint.collapse(kind), plain.state_dict())
    assert {torch_dtype(p.site.dtype) for p in joint.plan.placements} == {dtype}
    inputs = [
        x.to(dtype) if x.is_floating_point() else x for x in (*one.inputs.args, *one.inputs.kwargs.values())
    ]
    with torch.no_grad():
        found, wanted = joint[kind](*inputs), plain(*inputs)
    found, wanted = (found[0], wanted[0]) if kind == "bert" else (found, wanted)
    # Equal weights; matrix products may pick another order of summation for memory that lies otherwise.
    torch.testing.assert_close(found, wanted)


def test_a_frozen_dictionary_filled_in_inference_mode_serves_training_of_private_parameters():
    joint, plain = open_joint("tied")
    joint.dictionary.requires_grad_(False)
    with torch.inference_mode():
        joint.refresh()
        run(joint["tied"], plain["tied"])
    loss_of(run(joint["tied"], plain["tied"])).backward()
    assert joint["tied"].into.weight.grad is not None


def test_a_replaced_parameter_is_noticed():
    joint, plain = open_joint("tied")
    (bank,) = joint.dictionary.banks.values()
    with torch.no_grad():
        before = run(joint["tied"], plain["tied"])[0]
        bank.rows.data = bank.rows.data * 1.5
        assert not torch.equal(run(joint["tied"], plain["tied"])[0], before)


def test_one_module_cannot_be_two_members():
    one = member("tied")
    with pytest.raises(PlanError, match=r"Tied of 'second' is also part of 'tied'; .*copy\.deepcopy"):
        join([one, type(one)("second", one.module, one.inputs, one.origin)])


def test_unknown_members_and_no_members():
    joint, _ = open_joint("tied")
    with pytest.raises(KeyError, match="no member 'x'; the members are tied"):
        joint["x"]
    with pytest.raises(PlanError, match="at least one member, found none"):
        join([])
