"""What ordinary code does to a joined member reaches the dictionary, or is refused in one sentence: nothing is lost."""

import copy
from collections import OrderedDict

import pytest
import torch
from nets import assert_same_bits, joined_alone, member, plain_copy, run
from torch import nn
from torch.nn.utils import parametrize, prune

import surgery
from surgery.core.joining import join
from surgery.errors import PlanError
from surgery.members.member import Member
from surgery.slots.hooks import Enter

EXTRACT = r"extract\('tied'\)"


def _two():
    """Two members that draw on one bank, one of which shares a layer's rows with the other."""
    first, second = member("tied"), plain_copy(member("tied"))
    other = Member("other", second.module, second.inputs, second.origin)
    with torch.no_grad():
        other.module.first.weight.mul_(1.5).add_(0.01)
    return join([first, other], block=(8, 8))


def _outputs(module, dtype=torch.float32):
    with torch.no_grad():
        return (
            run(module, member("tied"))[0]
            if dtype == torch.float32
            else module(member("tied").inputs.args[0].to(dtype))
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_is_the_members_own_affair_or_the_dictionarys(dtype):
    joint, joined, plain = joined_alone()
    assert joined.to(dtype) is joined
    plain.to(dtype)
    assert_same_bits(joined.state_dict(), plain.state_dict())
    assert_same_bits(joint.collapse("tied"), plain.state_dict())
    torch.testing.assert_close(_outputs(joined, dtype), _outputs(plain, dtype))


def test_one_of_two_members_takes_a_shorter_dtype_and_back(tmp_path):
    joint = _two()
    other = copy.deepcopy(joint["other"])
    wanted = copy.deepcopy(joint["tied"]).half()
    joint["tied"].half()
    assert_same_bits(joint["tied"].state_dict(), wanted.state_dict())
    assert_same_bits(joint["other"].state_dict(), other.state_dict())
    surgery.save(joint, tmp_path / "saved")
    again = surgery.load(
        tmp_path / "saved", modules={"tied": wanted.to(torch.float32).half(), "other": other}
    )
    assert_same_bits(again["other"].state_dict(), joint["other"].state_dict())
    assert_same_bits(again["tied"].state_dict(), joint["tied"].state_dict())


@pytest.mark.parametrize("way", [lambda m: m.double(), lambda m: m.to("meta"), lambda m: m.first.to("meta")])
def test_moving_rows_that_another_member_uses_is_refused(way):
    joint = _two()
    before = {name: copy.deepcopy(joint[name].state_dict()) for name in joint}
    with pytest.raises(PlanError, match=rf"'other'.*joint\.to\(\.\.\.\).*{EXTRACT}"):
        way(joint["tied"])
    for name, state in before.items():
        assert_same_bits(joint[name].state_dict(), state)


def test_a_part_in_another_dtype_is_what_it_is_alone():
    _, joined, plain = joined_alone("t5")
    for net in (joined, plain):
        net.encoder.block[0].to(torch.float16)
        net.decoder.float()  # changes nothing
    assert_same_bits(joined.state_dict(), plain.state_dict())


def test_an_optimizer_over_a_members_parameters_trains_all_of_it():
    joint, joined, plain = joined_alone()
    start = copy.deepcopy(plain.state_dict())
    for net in (joined, plain):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(2):
            net.zero_grad()
            run(net, member("tied"))[0].square().mean().backward()
            optimizer.step()
    rows = [p for p in joint.dictionary.parameters()]
    assert {id(p) for p in rows} < {id(p) for p in joined.parameters()}
    assert {id(p) for p in joined.first.parameters()} == {id(p) for p in (joined.first.bias, *rows)}
    for key, tensor in joint.collapse("tied").items():
        moved = not torch.equal(tensor, start[key])
        assert moved == (not torch.equal(plain.state_dict()[key], start[key])), key
    joined.zero_grad()
    assert all(p.grad is None for p in joint.parameters())


def test_freezing_a_member_freezes_its_rows_and_is_undone():
    joint, joined, _ = joined_alone()
    joined.requires_grad_(False)
    assert not any(p.requires_grad for p in joint.parameters())
    assert not run(joined, member("tied"))[0].requires_grad
    assert not any(p.requires_grad for p in joint.extract("tied").parameters())
    joined.requires_grad_(True)
    assert all(p.requires_grad for p in joint.parameters())
    assert all(p.requires_grad for p in joint.extract("tied").parameters())
    with pytest.raises(PlanError, match=rf"'other' also draws.*{EXTRACT}"):
        _two()["tied"].requires_grad_(False)


EDITS = {
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(torch.full_like(w, 0.25) + torch.arange(w.numel()).view_as(w)),
    "init": lambda w: nn.init.normal_(w, std=0.02),
    "index": lambda w: w.__setitem__((0, slice(None)), 3.0),
    "data": lambda w: setattr(w, "data", w.detach() * 3),
    "data.mul_": lambda w: w.data.mul_(0.5),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("use", ["call", "state", "gradient", "save", "extract", "step"])
def test_what_is_done_to_a_weight_in_place_goes_into_its_rows(edit, use, tmp_path):
    joint, joined, plain = joined_alone()
    for net in (joined, plain):
        torch.manual_seed(0)
        with torch.no_grad():
            edit(net.first.weight)
            net.into.bias.zero_()
    if use == "call":
        assert torch.equal(_outputs(joined), _outputs(plain))
    elif use == "gradient":
        run(joined, member("tied"))[0].sum().backward()
    elif use == "state":
        assert_same_bits(joined.state_dict(), plain.state_dict())
    elif use == "save":
        surgery.save(joint, tmp_path / "saved")
    elif use == "extract":
        assert_same_bits(joint.extract("tied").state_dict(), plain.state_dict())
    else:
        with joint.step():
            run(joined, member("tied"))[0].sum().backward()
    assert_same_bits(joint.collapse("tied"), plain.state_dict())
    assert torch.equal(_outputs(joined), _outputs(plain))


def test_edits_that_rows_cannot_follow_are_refused_until_they_are_taken_back():
    joint = _two()
    before = {name: copy.deepcopy(joint[name].state_dict()) for name in joint}
    joint["tied"].first.weight.data.mul_(2)  # rows of its own
    joint["tied"].state_dict()
    joint = _two()
    joint["tied"].out.weight.data.mul_(2)  # not a site: private
    shared = join([member("tied"), Member("other", *_parts(plain_copy(member("tied"))))], block=(8, 8))
    shared["tied"].first.weight.data.mul_(2)
    for use in (lambda: _outputs(shared["tied"]), shared["tied"].state_dict, lambda: shared.extract("tied")):
        with pytest.raises(PlanError, match=rf"first\.weight of 'tied' \(16 of 16 .*share rows.*{EXTRACT}"):
            use()
    shared.refresh()
    assert_same_bits(
        shared["tied"].state_dict(), {k: t for k, t in plain_copy(member("tied")).module.state_dict().items()}
    )
    assert before


def _parts(one):
    return one.module, one.inputs, one.origin


def test_an_edit_of_a_weight_that_is_out_of_date_is_refused():
    joint, joined, _ = joined_alone()
    with torch.no_grad():
        joint.dictionary["8x8-float32"].rows.mul_(1.1)
        joined.first.weight.mul_(2)
    with pytest.raises(PlanError, match="the dictionary may have changed since it was generated"):
        _outputs(joined)
    joint.refresh()
    _outputs(joined)


def test_an_edit_within_a_step_is_refused():
    joint, joined, _ = joined_alone()
    with pytest.raises((PlanError, RuntimeError)), joint.step():
        joined.first.weight.data.mul_(2)
        raise PlanError("nothing was carried") if False else RuntimeError
    joint.refresh()


def test_setting_requires_grad_of_a_generated_weight_is_refused():
    _, joined, _ = joined_alone()
    joined.first.weight.requires_grad_(False)
    with pytest.raises(PlanError, match=rf"requires_grad was set.*{EXTRACT}"):
        _outputs(joined)


def test_data_of_another_shape_is_refused():
    _, joined, plain = joined_alone()
    with pytest.raises(PlanError, match=r"3x3 float32.*extract"):
        joined.first.weight.data = torch.ones(3, 3)
    assert torch.equal(_outputs(joined), _outputs(plain))


REPLACED = {
    "parameter": lambda m: setattr(m.first, "weight", nn.Parameter(torch.ones(32, 32))),
    "register": lambda m: m.first.register_parameter("weight", nn.Parameter(torch.ones(32, 32))),
    "prune": lambda m: prune.l1_unstructured(m.first, "weight", amount=0.5),
    "prune, structured": lambda m: prune.ln_structured(m.first, "weight", 0.5, 2, 0),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED.keys())
def test_replacing_a_weight_is_refused_at_once_and_nothing_is_changed(replace):
    joint, joined, plain = joined_alone()
    with pytest.raises(PlanError, match=rf"first\.weight.*{EXTRACT}"):
        replace(joined)
    assert torch.equal(_outputs(joined), _outputs(plain))
    assert_same_bits(joint.collapse("tied"), plain.state_dict())
    replace(joint.extract("tied"))


LATER = {
    "tensor": lambda m: setattr(m.first, "weight", torch.ones(32, 32)),
    "layer": lambda m: setattr(m, "first", nn.Linear(32, 32)),
    "deleted": lambda m: delattr(m.first, "weight"),
}


@pytest.mark.parametrize("replace", LATER.values(), ids=LATER.keys())
def test_what_stands_in_place_of_a_slot_is_noticed_at_the_next_use(replace):
    for use in (_outputs, lambda m: m.state_dict(), copy.deepcopy):
        _, joined, _ = joined_alone()
        replace(joined)
        with pytest.raises(PlanError, match=rf"first.*{EXTRACT}"):
            use(joined)


def test_functional_calls_with_other_weights_are_refused():
    joint, joined, plain = joined_alone()
    x = member("tied").inputs.args
    state = {
        k: t * 2 if t.is_floating_point() else t
        for k, t in plain.state_dict().items()
        if k != "second.weight"
    }
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(PlanError, match=EXTRACT):
            torch.func.functional_call(joined, state, x)
    assert torch.equal(_outputs(joined), _outputs(plain))
    with torch.no_grad():
        assert torch.equal(
            torch.func.functional_call(joint.extract("tied"), state, x),
            torch.func.functional_call(plain, state, x),
        )


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_reparametrizing_a_generated_weight_fails_and_changes_nothing(norm):
    _, joined, plain = joined_alone()
    with pytest.raises((PlanError, KeyError, ValueError)):
        norm(joined.first)
    assert not parametrize.is_parametrized(joined)
    assert torch.equal(_outputs(joined), _outputs(plain))


def test_adapters_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    one = member("bert")
    joint = join([one], block=(8, 8))
    config = peft.LoraConfig(target_modules=["query", "value"], r=2)
    net = peft.get_peft_model(joint["bert"], config)
    for use in (lambda: run(net, one), joint["bert"].state_dict, lambda: surgery.save(joint, "nowhere")):
        with pytest.raises(PlanError, match=r"query.*extract\('bert'\)"):
            use()
    joint = join([member("bert")], block=(8, 8))
    run(peft.get_peft_model(joint.extract("bert"), config), one)


def _layers():
    torch.manual_seed(0)
    net, x = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))), torch.randn(2, 32)
    plain = copy.deepcopy(net)
    return join([surgery.load_member(net, name="tied", inputs=x)], block=(8, 8)), plain, x


def test_quantisation_by_quanto_fails_loudly():
    quanto = pytest.importorskip("optimum.quanto")
    joint, plain, x = _layers()
    with pytest.raises((PlanError, TypeError), match=r"Parameter|extract"):
        quanto.quantize(joint["tied"], weights=quanto.qint8, include="2")
    with torch.no_grad():
        assert torch.equal(joint["tied"](x), plain(x))
        quanto.quantize(extracted := joint.extract("tied"), weights=quanto.qint8)
        extracted(x)


def test_quantisation_by_torchao_is_refused():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    joint, plain, x = _layers()
    with pytest.raises(PlanError, match=EXTRACT):
        quantize_(joint["tied"], Int8WeightOnlyConfig(), lambda m, name: name == "2")
    with torch.no_grad():
        assert torch.equal(joint["tied"](x), plain(x))
        quantize_(extracted := joint.extract("tied"), Int8WeightOnlyConfig())
        extracted(x)


def test_a_pass_asks_no_gate_below_the_one_it_was_entered_by(monkeypatch):
    joint, joined, plain = joined_alone()
    asked, seen = [], []
    enter = Enter.__call__
    monkeypatch.setattr(
        Enter, "__call__", lambda self, *args: (asked.append(self.path), enter(self, *args))[1]
    )
    x = member("tied").inputs.args[0]
    with torch.no_grad():
        assert torch.equal(joined(x), plain(x)) and asked == [""]
        joined.first.weight.mul_(2)
        plain.first.weight.mul_(2)
        given = torch.randn(1, joined.first.weight.shape[1])
        assert torch.equal(joined.first(given), plain.first(given)) and asked == ["", "first"]
        handle = joined.first.register_forward_pre_hook(lambda *_: seen.append("hook"))
        assert torch.equal(joined(x), plain(x)) and len(seen) == asked.count("first") - 1 > 0
        handle.remove()
        del asked[:]
        assert torch.equal(joined(x), plain(x)) and asked == [""]
    assert type(joint.extract("tied").first._forward_pre_hooks) is OrderedDict


@pytest.mark.usefixtures("compiler")
def test_compiled_members_still_follow_the_dictionary():
    joint, joined, plain = joined_alone()
    compiled = torch.compile(joined, backend="eager")
    x = member("tied").inputs.args[0]
    with torch.no_grad():
        assert torch.equal(compiled(x), plain(x))
        joined.first.weight.mul_(2)
        plain.first.weight.mul_(2)
        assert torch.equal(compiled(x), plain(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in joint.dictionary.parameters() if p.requires_grad)


def test_one_edit_after_another_is_followed_and_what_was_derived_is_forgotten():
    one = member("caching")
    plain = plain_copy(one)
    joint = join([one], block=(8, 8))
    for _ in range(3):
        for net in (one.module, plain.module):
            with torch.no_grad():
                net.middle.weight.mul_(1.5)
        assert_same_bits(one.module.state_dict(), plain.module.state_dict())
        plain.module.train()
        plain.module.eval()
        with torch.no_grad():
            torch.testing.assert_close(run(joint["caching"], one)[0], run(plain.module, plain)[0])


def test_weights_clipped_after_a_step_of_training_are_refused_and_never_undo_it():
    joint, joined, _ = joined_alone()
    optimizer = torch.optim.Adam(joined.parameters(), lr=0.01, fused=True)
    run(joined, member("tied"))[0].square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        joined.first.weight.clamp_(-0.01, 0.01)
    with pytest.raises(PlanError, match="may have changed since"):
        joined.state_dict()
    joint.refresh()
    for (_, site), weight in joint.generate().items():
        assert torch.equal(joined.state_dict()[site], weight)
