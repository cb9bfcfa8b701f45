"""State dicts of joined members: whole, in order, of now; and what is loaded goes into the dictionary or is refused."""

import copy
import pickle

import accelerate
import huggingface_hub
import pytest
import safetensors.torch
import torch
from nets import Tied, assert_same_bits, joined_alone, member, open_joint, plain_copy, run
from torch import nn

import surgery
from surgery.core.joining import join
from surgery.errors import PlanError

KINDS = ("t5", "tied", "lstm", "attention", "bert")


def _changed(state, seed=0):
    """Other values; what is tied stays tied."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for t in state.values():
        if (place := (t.data_ptr(), t.shape)) not in made:
            other = (
                torch.rand(t.shape, generator=generator, dtype=torch.float64) if t.is_floating_point() else t
            )
            made[place] = other.to(t.dtype)
    return {key: made[t.data_ptr(), t.shape] for key, t in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_and_each_of_its_parts_has_its_whole_state_in_order(kind):
    _, joined, plain = joined_alone(kind)
    for path, part in plain.named_modules():
        assert_same_bits(joined.get_submodule(path).state_dict(prefix="x."), part.state_dict(prefix="x."))
    kept = joined.state_dict(keep_vars=True)
    assert list(kept) == list(plain.state_dict())
    assert {key: t.requires_grad for key, t in kept.items()} == {
        key: t.requires_grad for key, t in plain.state_dict(keep_vars=True).items()
    }


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_is_what_the_dictionary_says_now(fused):
    joint, plain = open_joint("tied")
    one = plain["tied"]
    optimizer = torch.optim.Adam(joint.dictionary.parameters(), lr=0.1, fused=fused)
    run(joint["tied"], one)[0].sum().backward()
    optimizer.step()
    state = joint["tied"].state_dict()
    for (_, site), weight in joint.generate().items():
        assert torch.equal(state[site], weight)
    fresh = Tied()
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(run(fresh.eval(), one)[0], run(joint["tied"], one)[0])


def test_asking_for_the_state_between_a_forward_and_its_backward_changes_no_gradient():
    gradients = []
    for asks in (False, True):
        joint, plain = open_joint("tied")
        loss = run(joint["tied"], plain["tied"])[0].square().sum()
        if asks:
            joint["tied"].state_dict()
        loss.backward()
        gradients.append([p.grad for p in joint.dictionary.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def _torch(module, folder):
    torch.save(module.state_dict(), folder / "all.pth")
    return torch.load(folder / "all.pth", weights_only=True)


def _safetensors(module, folder):
    safetensors.torch.save_model(module, str(folder / "all.safetensors"))
    return safetensors.torch.load_file(folder / "all.safetensors")


def _hub(module, folder):
    huggingface_hub.save_torch_model(module, folder)
    return safetensors.torch.load_file(folder / "model.safetensors")


def _accelerate(module, folder):
    accelerate.Accelerator(cpu=True).save_model(module, folder)
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("save", [_torch, _safetensors, _hub, _accelerate])
def test_libraries_write_a_joined_member_as_they_write_it_alone(save, tmp_path):
    _, joined, plain = joined_alone("tied")
    for name in ("joined", "alone"):
        (tmp_path / name).mkdir()
    found, wanted = save(joined, tmp_path / "joined"), save(plain, tmp_path / "alone")
    assert found.keys() == wanted.keys() and found
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_transformers_own_saving_writes_a_joined_member_whole(kind, tmp_path):
    _, joined, plain = joined_alone(kind)
    joined.save_pretrained(tmp_path / "all")
    again = type(plain).from_pretrained(tmp_path / "all")
    assert_same_bits(again.state_dict(), plain.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_values_go_into_the_dictionary(kind, assign):
    one = member(kind)
    one.module.load_state_dict(_changed(one.module.state_dict(), 1))  # layers that start as copies share rows
    plain = plain_copy(one).module
    joint, joined = join([one], block=(8, 8)), one.module
    state = _changed(plain.state_dict())
    assert not any(joined.load_state_dict(state, assign=assign))
    plain.load_state_dict(state)
    assert_same_bits(joined.state_dict(), plain.state_dict())
    assert_same_bits(joint.collapse(kind), plain.state_dict())
    with torch.no_grad():
        for found, wanted in zip(run(joined, one), run(plain, one), strict=True):
            assert torch.equal(found, wanted)


def test_safetensors_loads_into_a_joined_member(tmp_path):
    _, joined, plain = joined_alone("tied")
    plain.load_state_dict(_changed(plain.state_dict()))
    safetensors.torch.save_model(plain, str(tmp_path / "all.safetensors"))
    safetensors.torch.load_model(joined, str(tmp_path / "all.safetensors"), strict=True)
    assert_same_bits(joined.state_dict(), plain.state_dict())


def test_a_part_of_a_member_is_loaded_alone():
    joint, joined, plain = joined_alone("t5")
    state = _changed(plain.encoder.block.state_dict())
    joined.encoder.block.load_state_dict(state)
    plain.encoder.block.load_state_dict(state)
    assert_same_bits(joint.collapse("t5"), plain.state_dict())
    nn.Sequential(joined.encoder.block).load_state_dict({f"0.{key}": t * 2 for key, t in state.items()})
    assert torch.equal(
        joined.encoder.block.state_dict()["0.layer.0.SelfAttention.q.weight"],
        state["0.layer.0.SelfAttention.q.weight"] * 2,
    )


def test_missing_and_unexpected_keys_and_wrong_shapes_are_said_as_pytorch_says_them():
    _, joined, plain = joined_alone("tied")
    state = plain.state_dict()
    less = {key: t for key, t in state.items() if key != "second.weight"} | {"no.such": torch.ones(1)}
    for net in (joined, plain):
        found = net.load_state_dict(less, strict=False)
        assert (found.missing_keys, found.unexpected_keys) == (["second.weight"], ["no.such"])
        with pytest.raises(RuntimeError, match=r'Missing key.*"second\.weight"'):
            net.load_state_dict(less)
        wrong = state | {"first.weight": torch.ones(3, 3)}
        with pytest.raises(RuntimeError, match=r"size mismatch for first\.weight") as caught:
            net.load_state_dict(wrong, strict=False)
        assert str(caught.value).count("size mismatch") == 1


@pytest.mark.parametrize("strict", [False, True])
def test_what_the_dictionary_cannot_hold_is_refused_and_nothing_is_loaded(strict):
    joint, _ = open_joint("tied")  # sums of basis blocks
    before = copy.deepcopy(joint["tied"].state_dict())
    state = _changed(before)
    with pytest.raises(PlanError, match=r"first\.weight \(16 of 16 blocks are sums of .*extract\('tied'\)"):
        joint["tied"].load_state_dict(state, strict=strict)
    assert_same_bits(joint["tied"].state_dict(), before)
    joint["tied"].load_state_dict(before, strict=strict)  # what is there already
    joint["tied"].load_state_dict(joint.collapse("tied"), strict=strict)


def test_rows_that_others_use_are_not_overwritten():
    first, second = member("tied"), plain_copy(member("tied"))
    second = type(second)("other", second.module, second.inputs, second.origin)
    joint = join([first, second], block=(8, 8))
    state = _changed(joint["tied"].state_dict())
    with pytest.raises(PlanError, match="share rows with other places"):
        joint["tied"].load_state_dict(state)
    with pytest.raises(PlanError, match=r"assign=True would make it .*float16"):
        joint["tied"].load_state_dict(
            {k: t.half() if t.is_floating_point() else t for k, t in state.items()}, assign=True
        )


def test_the_joint_models_own_state_has_rows_and_nothing_twice():
    joint, _ = open_joint("tied", "lstm")
    state = joint.state_dict()
    assert {key.split(".")[0] for key in state} == {"bodies", "dictionary"}
    generated = {owner for p in joint.plan.placements for owner in p.site.owners}
    assert not any(key.split(".", 2)[2] in generated for key in state if key.startswith("bodies."))
    twin = copy.deepcopy(joint)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert not any(twin.load_state_dict(state))
    for name in joint:
        assert_same_bits(twin.collapse(name), joint.collapse(name))
    nn.Sequential(twin).load_state_dict(nn.Sequential(joint).state_dict())


@pytest.mark.parametrize("kind", ["tied", "t5", "lstm"])
def test_pickled_and_copied_members_are_ordinary_modules(kind):
    joint, joined, plain = joined_alone(kind)
    run(joined, member(kind))[0].sum().backward()
    for again in (pickle.loads(pickle.dumps(joined)), copy.deepcopy(joined), copy.copy(joined)):
        assert type(again) is type(plain) and not again._forward_pre_hooks
        assert_same_bits(again.state_dict(), plain.state_dict())
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in plain.named_parameters()]
    with torch.no_grad():
        for p in joint.parameters():
            p.zero_()
    assert_same_bits(again.state_dict(), plain.state_dict())


def test_a_part_is_copied_as_an_ordinary_module():
    _, joined, plain = joined_alone("t5")
    again = copy.deepcopy(joined.encoder.block[0])
    assert_same_bits(again.state_dict(), plain.encoder.block[0].state_dict())
    assert len(list(again.parameters())) == len(list(plain.encoder.block[0].parameters()))


def test_a_joint_model_is_pickled_whole(tmp_path):
    joint, plain = open_joint("tied", "lstm")
    torch.save(joint, tmp_path / "joint.pt")
    again = torch.load(tmp_path / "joint.pt", weights_only=False)
    for name in joint:
        assert_same_bits(again[name].state_dict(), joint[name].state_dict())
        with torch.no_grad():
            for found, wanted in zip(
                run(again[name], plain[name]), run(joint[name], plain[name]), strict=True
            ):
                assert torch.equal(found, wanted)


def test_a_member_with_a_scripted_part_is_extracted_copied_and_moved():
    torch.manual_seed(0)
    net, x = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5))), torch.randn(2, 32)
    net[2] = torch.jit.script(net[2])
    joint = join([surgery.load_member(net, name="net", inputs=x)], block=(8, 8))
    for again in (joint.extract("net"), copy.deepcopy(joint)["net"]):
        with torch.no_grad():
            assert torch.equal(again(x), joint["net"](x))
        assert_same_bits(again.state_dict(), joint["net"].state_dict())
    assert joint["net"].double()(x.double()).dtype == torch.float64
