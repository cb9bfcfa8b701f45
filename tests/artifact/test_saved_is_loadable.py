"""Nothing is written that cannot be read back: values that cannot be rounded, and members that were changed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from artifacts import contents, member, modules, pair, seeded, stack
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_transformers import save_tiny
from torch import nn

import surgery
from surgery.artifact.export import export
from surgery.artifact.folder import load, save
from surgery.artifact.verify import verify
from surgery.errors import OutputError, PlanError
from surgery.members.references import load_member
from surgery.storage.codecs import BFLOAT16, NATIVE, decode, encode, grouped, is_tame

INF = float("inf")
values = st.sampled_from([INF, -INF, float("nan"), 1e30, -3.4e38, 2e18, 1.0, 0.0, -2.5])
precisions = st.sampled_from([NATIVE, BFLOAT16, grouped(2, 64), grouped(8, 16), grouped(12, 64)])


@given(
    st.lists(values, min_size=1, max_size=70), precisions, st.sampled_from(["float32", "float64", "bfloat16"])
)
@settings(max_examples=150, deadline=None)
def test_what_cannot_be_rounded_is_kept_as_it_is(numbers, precision, dtype):
    x = torch.tensor(numbers, dtype=getattr(torch, dtype))
    encoded = encode(x, precision)
    y = decode(encoded)
    if is_tame(x):
        assert bool(y.isfinite().all())
    else:
        assert encoded.precision == NATIVE and x.view(torch.uint8).equal(y.view(torch.uint8))


class Masked(nn.Module):
    """A net with a causal mask, a buffer of -inf alone, a sentinel, and one huge weight."""

    def __init__(self, huge: float = 1e30):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)))
        self.register_buffer("mask", torch.full((32, 32), -INF).triu(1))
        self.register_buffer("nothing", torch.full((512,), -INF))
        self.register_buffer("sentinel", torch.full((512,), 1e30))
        self.unused = nn.Linear(32, 32)
        with torch.no_grad():
            self.unused.weight[0, 0] = huge

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (x @ x.transpose(1, 2) + self.mask).softmax(-1) @ x
        hidden = self.layers(weights)
        return (
            hidden + 0 * self.unused(torch.zeros_like(hidden)) + self.sentinel[0] * 0 + self.nothing[0].exp()
        )


def masked(name: str, seed: int, huge: float = 1e30):
    module = seeded(lambda: Masked(huge), seed)
    return load_member(module, name=name, inputs=torch.randn(2, 32, 32), allow_nonfinite=True)


@pytest.mark.parametrize(
    "how, huge",
    [
        ({"max_error": 0.05}, 1e30),
        ({"max_error": 0}, INF),
        ({"hypermodules": 2}, 1e30),
        ({}, INF),
        ({}, 1e30),
    ],
)
def test_infinities_and_sentinels_come_back(tmp_path: Path, how: dict, huge: float):
    members = [masked("one", 1, huge), masked("two", 1, huge)]
    before = {each.name: {k: t.clone() for k, t in each.module.state_dict().items()} for each in members}
    joint = surgery.join(members, block=(8, 8))
    if how:
        surgery.fit(joint, **how)
    out = save(joint, tmp_path / "joint")
    live = {name: seeded(lambda: Masked(huge), 9) for name in before}
    again = load(out, modules=live)
    for name, state in before.items():
        found = again.collapse(name)
        for key in ("mask", "nothing", "sentinel", "unused.weight"):
            assert torch.equal(found[key], state[key]), key
        assert all(not bool(t.isnan().any()) for t in found.values())


def test_stacks_leave_a_tensor_of_infinities_alone(tmp_path: Path):
    net = seeded(
        lambda: nn.Sequential(nn.Linear(8, 24), *(nn.Linear(24, 24) for _ in range(4)), nn.Linear(24, 2))
    )
    with torch.no_grad():
        net[2].bias[3] = -INF
    mine = load_member(net, name="net", inputs=torch.ones(2, 8), allow_nonfinite=True)
    plan = surgery.plan_templates([surgery.discover(mine)])
    joint = surgery.join([mine], plan)
    left = [entry.name for entry in joint.plan.left_alone if "infinite" in entry.reason]
    assert sorted(left) == ["1.bias", "2.bias", "3.bias", "4.bias"]
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()} | joint.collapse("net")
    joint.open(seed=0)
    found = load(
        save(joint, tmp_path / "joint"),
        modules={
            "net": seeded(
                lambda: nn.Sequential(
                    nn.Linear(8, 24), *(nn.Linear(24, 24) for _ in range(4)), nn.Linear(24, 2)
                )
            )
        },
    ).collapse("net")
    assert torch.equal(found["2.bias"], before["2.bias"]) and not any(t.isnan().any() for t in found.values())


def test_a_difference_of_infinities_is_not_overlooked():
    from surgery.artifact.comparing import _farthest

    mask = torch.full((4, 4), -INF).triu(1)
    assert _farthest({"m": mask}, {"m": mask.clamp(min=-3.4e38)}, relative=True) == INF
    assert _farthest({"m": mask}, {"m": mask.clone()}) == 0
    assert _farthest({"m": mask}, {"m": torch.where(mask == 0, 1.0, mask)}) == 1


def test_a_joint_model_that_no_load_accepts_is_not_written(tmp_path: Path):
    save(pair(), tmp_path / "joint")
    before = contents(tmp_path / "joint")
    joint = pair().open(context=2)
    with torch.no_grad():  # as training does that diverges
        for bank in joint.dictionary.banks.values():
            bank.rows[0] = float("nan")
            bank.psi.zero_()
    joint.refresh()
    with pytest.raises(
        OutputError, match=r"must load again, but .*joint would not: bank .*NaN or infinite"
    ) as error:
        save(joint, tmp_path / "joint", overwrite=True)
    assert ".joint." not in str(error.value)
    assert contents(tmp_path / "joint") == before and [p.name for p in tmp_path.iterdir()] == ["joint"]


def bert(tmp_path: Path):
    return load_member(str(save_tiny("bert_mlm", tmp_path / "text")), name="text")


def twelve(tmp_path: Path, kind: str = "bert", layers: int = 4):
    import transformers
    from tiny_transformers import TINY

    name, config, arguments = TINY[kind]
    key = {"gpt2": "n_layer", "t5": "num_layers"}.get(kind, "num_hidden_layers")
    module = seeded(
        lambda: getattr(transformers, name)(getattr(transformers, config)(**{**arguments, key: layers}))
    )
    module.save_pretrained(tmp_path / "text")
    return load_member(str(tmp_path / "text"), name="text")


def outputs_equal(joint: surgery.JointModel, out: Path) -> surgery.JointModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = load(out)
    for name in joint.names:
        found, expected = again.collapse(name), joint.collapse(name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert verify(out, origins=True).ok
    return again


def test_resized_embeddings_are_saved_with_their_configuration(tmp_path: Path):
    text = bert(tmp_path)
    text.module.resize_token_embeddings(120)
    joint = surgery.join([text], block=(8, 8))
    again = outputs_equal(joint, save(joint, tmp_path / "joint"))
    assert again["text"].config.vocab_size == 120
    assert again["text"](torch.tensor([[110]])).logits.shape[-1] == 120


@pytest.mark.parametrize(
    "kind, path", [("bert", "encoder.layer"), ("gpt2", "transformer.h"), ("llama", "model.layers")]
)
def test_layers_that_were_cut_off_are_said_and_saved_with_their_configuration(
    tmp_path: Path, kind: str, path: str
):
    text = twelve(tmp_path, kind)
    holder, _, name = path.rpartition(".")
    parent = text.module.get_submodule(holder)
    setattr(parent, name, getattr(parent, name)[:2])
    joint = surgery.join([text], block=(8, 8))
    with pytest.warns(UserWarning, match=rf"= 4, but the tensors hold 2 in {path};"):
        out = save(joint, tmp_path / "joint")
    outputs_equal(joint, out)


def test_another_classifier_is_saved_as_a_live_module_with_a_warning(tmp_path: Path):
    text = twelve(tmp_path, "vit", 1)
    text.module.classifier = nn.Linear(32, 7, bias=False)
    joint = surgery.join([text], block=(8, 8))
    with pytest.warns(
        UserWarning, match=r"live module.*classifier\.bias.*classifier\.weight.*modules="
    ) as seen:
        out = save(joint, tmp_path / "joint")
    assert len(seen) == 1
    again = load(out, modules={"text": joint.extract("text")})
    assert torch.equal(again.collapse("text")["classifier.weight"], text.module.classifier.weight)


def test_timms_own_reset_classifier_is_saved_with_its_configuration(tmp_path: Path):
    torch.save(seeded(lambda: timm.create_model("test_resnet")).state_dict(), tmp_path / "w.pth")
    net = load_member(f"net=timm:test_resnet={tmp_path / 'w.pth'}")
    net.module.reset_classifier(7)
    joint = surgery.join([net], block=(8, 8))
    again = outputs_equal(joint, save(joint, tmp_path / "joint"))
    assert again["net"](torch.zeros(1, 3, 160, 160)).shape == (1, 7)


def test_an_adapter_that_was_left_is_said(tmp_path: Path):
    peft = pytest.importorskip("peft")
    text = bert(tmp_path)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["query"]), text.module)
    joint = surgery.join([text], block=(8, 8))
    with pytest.warns(UserWarning, match=r"live module.*lora_A"):
        out = save(joint, tmp_path / "joint")
    again = load(out, modules={"text": joint.extract("text")})
    assert again.collapse("text").keys() == joint.collapse("text").keys()


def test_a_parameter_that_was_added_after_joining_is_saved(tmp_path: Path):
    joint = pair()
    joint["one"].register_parameter("gain", nn.Parameter(torch.ones(3)))
    joint["two"].register_buffer("count", torch.arange(4))
    out = save(joint, tmp_path / "joint")
    live = modules()
    live["one"].register_parameter("gain", nn.Parameter(torch.zeros(3)))
    live["two"].register_buffer("count", torch.zeros(4, dtype=torch.long))
    again = load(out, modules=live)
    assert torch.equal(again.collapse("one")["gain"], torch.ones(3))
    assert torch.equal(again.collapse("two")["count"], torch.arange(4))
    assert "gain" in joint.collapse("one")


def test_a_generated_weight_that_was_replaced_is_refused(tmp_path: Path):
    joint = pair()
    joint["one"][2] = nn.Linear(32, 32)
    joint["two"][4] = nn.Sequential(joint["two"][4])
    with pytest.raises(PlanError, match=r"2 \(Linear\) of 'one', 4 \(Sequential\) of 'two'.*extract"):
        save(joint, tmp_path / "joint")
    assert not (tmp_path / "joint").exists()


def test_a_part_that_is_scripted_comes_back(tmp_path: Path):
    net = seeded(stack)
    net[2] = torch.jit.script(net[2])
    joint = surgery.join([member(net, "net", torch.zeros(2, 8))], block=(8, 8))
    again = load(save(joint, tmp_path / "joint"), modules={"net": seeded(stack, 3)})
    assert all(torch.equal(t, joint.collapse("net")[key]) for key, t in again.collapse("net").items())
    scripted = seeded(stack, 4)
    scripted[2] = torch.jit.script(scripted[2])
    again = load(tmp_path / "joint", modules={"net": scripted})
    assert all(torch.equal(t, joint.collapse("net")[key]) for key, t in again.collapse("net").items())


def test_a_compressed_export_of_a_changed_member_loads(tmp_path: Path):
    text = bert(tmp_path)
    text.module.resize_token_embeddings(120)
    out = export(surgery.join([text], block=(8, 8)), "text", tmp_path / "small", format="compressed")
    assert load(out)["text"].config.vocab_size == 120
    assert json.loads((out / "members/text/config.json").read_text())["vocab_size"] == 120
