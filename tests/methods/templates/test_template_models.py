"""Templates in joint models: the contract that hypermodules keep, on several architectures, and what is their own."""

import pytest
import timm
import torch
from command_line import surgery as command
from nets import assert_same_bits, loss_of, made, member, plain_copy, run, sibling
from torch import nn

import surgery
from surgery.anatomy.plan import make_plan
from surgery.anatomy.sites import discover
from surgery.core.joining import join
from surgery.errors import PlanError
from surgery.fitting.fit import fit
from surgery.members.member import Member
from surgery.methods.templates.mixtures import Templates, harden_stack
from surgery.methods.templates.plan import plan_templates
from surgery.storage.stored import revive, store

KINDS = ("bert", "gpt2", "llama", "t5", "mixtral", "attention", "vit", "mixer", "convmixer", "convnext")
MIXING = ("linear", "softmax", "one-hot")


def only(kept):
    """All mixtures, the others than one in the slow tests."""
    return [pytest.param(each, marks=() if each == kept else pytest.mark.slow) for each in MIXING]


def vit():
    return timm.models.VisionTransformer(img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=5)


def mixer():
    return timm.models.MlpMixer(img_size=64, patch_size=32, embed_dim=32, num_blocks=3, num_classes=5)


def convmixer():
    return timm.models.ConvMixer(16, 3, num_classes=5)


def convnext():
    return timm.models.ConvNeXt(depths=(1, 1, 3, 1), dims=(8, 8, 16, 16), num_classes=5)


PICTURES = {"vit": (vit, 32), "mixer": (mixer, 64), "convmixer": (convmixer, 64), "convnext": (convnext, 64)}


def network(kind):
    """A member with a stack."""
    if kind not in PICTURES:
        return member(kind)
    build, side = PICTURES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build()
    return made(kind, module, torch.linspace(-1, 1, 2 * 3 * side * side).reshape(2, 3, side, side))


ANATOMIES = {}
"""Of networks of one name, class and shapes, which are traced once."""


def anatomy(member):
    state = member.module.state_dict()
    shapes = tuple((key, tuple(tensor.shape), tensor.dtype) for key, tensor in state.items())
    known = member.name, type(member.module), shapes
    if known not in ANATOMIES:
        ANATOMIES[known] = discover(member)
    return ANATOMIES[known]


def joined(*members, block=(8, 8), **options):
    return join(members, plan_templates([anatomy(each) for each in members], block, **options))


def zeroed(joint):
    empty = []
    for one in joint.members.values():
        module = joint.extract(one.name)
        with torch.no_grad():
            for tensor in module.parameters():
                tensor.zero_()
        empty.append(Member(one.name, module, one.inputs, one.origin))
    return empty


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_start_changes_neither_outputs_nor_weights(kind, mixing):
    one = network(kind)
    before = {key: t.clone() for key, t in one.module.state_dict().items()}
    with torch.no_grad():
        expected = run(one.module, one)
    joint = joined(one)
    assert joint.plan.stacks
    with torch.no_grad():
        for found, wanted in zip(run(joint[kind], one), expected, strict=True):
            assert torch.equal(found, wanted)
    joint.open(templates=Templates(mixing=mixing))
    assert_same_bits(joint.collapse(kind), before)
    with torch.no_grad():
        for found, wanted in zip(run(joint[kind], one), expected, strict=True):
            assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())
    assert_same_bits(joint.extract(kind).state_dict(), before)
    assert store(joint).nbytes <= sum(t.numel() * t.element_size() for t in before.values()) + 64


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("kind", ["bert", "t5", "convmixer", "convnext"])
def test_fewer_templates_store_revive_and_collapse_to_what_runs(kind, mixing):
    base = network(kind)
    joint = joined(base, sibling(base, "sibling", 0.1, 1)).open(templates=Templates(2, mixing))
    stored = store(joint)
    again = revive(zeroed(joint), stored)
    assert {k: e.precision for k, e in store(again).tensors.items()} == {
        k: e.precision for k, e in stored.tensors.items()
    }
    for name in joint:
        with torch.no_grad():
            outputs = run(joint[name], joint.members[name])
            for other in (again[name], joint.extract(name), again.extract(name)):
                for found, wanted in zip(run(other, joint.members[name]), outputs, strict=True):
                    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "t5", "attention", "convmixer"])
@pytest.mark.parametrize("mixing", ["linear", "softmax"])
def test_gradients_are_those_of_the_plain_model_carried_through_the_mixtures(kind, mixing):
    one = network(kind)
    plain = plain_copy(one)
    joint = joined(one).open(templates=Templates(mixing=mixing))
    with joint.step():
        loss_of(run(joint[kind], one)).backward()
    loss_of(run(plain.module, plain)).backward()
    named = dict(plain.module.named_parameters())
    for keys in joint.plan.stacks.values():
        expected = None
        for key in keys:
            bank = joint.dictionary[key]
            placed = [p for p in joint.plan.placements if p.bank == key]
            gradient = torch.stack([named[p.site.name].grad.reshape(-1) for p in placed])  # [L, D]
            mixtures = bank.coefficients.detach()
            rows = mixtures.T @ gradient
            assert float((bank.rows.grad - rows).norm()) <= 2e-4 * float(rows.norm()) + 1e-9, key
            part = gradient @ bank.rows.detach().T
            expected = part if expected is None else expected + part
        if mixing == "softmax":  # the slow chain rule, one layer at a time
            expected = torch.stack([a * (g - (a * g).sum()) for a, g in zip(mixtures, expected, strict=True)])
        found = joint.dictionary[keys[0]].contexts.grad
        assert float((found - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-8


def test_all_tensors_of_a_stack_have_one_mixture_that_is_trained_once():
    joint = joined(network("bert")).open(templates=Templates(mixing="softmax"))
    (keys,) = joint.plan.stacks.values()
    assert len({id(joint.dictionary[key].contexts) for key in keys}) == 1 and len(keys) == 12
    names = [name for name, _ in joint.dictionary.named_parameters() if name.endswith("contexts")]
    assert len(names) == 1 + len([key for key in joint.dictionary if key not in keys])


def test_fine_tunes_draw_on_one_set_of_templates():
    base = network("bert")
    joint = joined(base, sibling(base, "s", 0.02, 1), sibling(base, "t", 0.02, 2))
    (keys,) = joint.plan.stacks.values()
    assert joint.dictionary[keys[0]].locations == 6
    apart = [float(fit_error(joint, base.name, count)) for count in (6, 3, 2)]
    assert apart[0] < 1e-6 and apart[0] <= apart[1] <= apart[2]
    # What siblings have in common needs two templates for two layers; unrelated layers would be lost.
    assert apart[2] < 0.1


def fit_error(joint, name, count):
    base = joint.members[name]
    again = joined(*(plain_copy(Member(n, joint.extract(n), base.inputs, base.origin)) for n in joint))
    fit(again, templates=count)
    return again.report.errors[name]


def test_hard_signatures_load_as_tied_layers(tmp_path):
    one = network("bert")
    plain = plain_copy(one)
    joint = joined(one)
    fit(joint, templates=1, mixture="one-hot")
    surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(tmp_path / "joint", modules={"bert": plain.module})
    layers = loaded["bert"].encoder.layer
    first, second = (layer.attention.self.query.weight for layer in layers)
    assert first.data_ptr() == second.data_ptr()
    assert layers[0].output.LayerNorm.weight.data_ptr() != layers[1].output.LayerNorm.weight.data_ptr()
    norms = sum(p.numel() for name, p in layers[1].named_parameters() if "LayerNorm" in name)
    mixed = 4 * (sum(p.numel() for p in layers[1].parameters()) - norms)
    assert joint.report.saved["sharing"] > 0.95 * mixed  # one of two layers, but for the alignment
    with torch.no_grad():
        for found, wanted in zip(run(loaded["bert"], one), run(joint["bert"], one), strict=True):
            torch.testing.assert_close(found, wanted)


def test_hardening_keeps_the_templates_that_contribute_most():
    joint = joined(network("mixer")).open(templates=Templates(2, "softmax"))
    (keys,) = joint.plan.stacks.values()
    bank = joint.dictionary[keys[0]]
    wanted, rows = bank.coefficients.argmax(1), bank.rows.detach().clone()
    chosen = harden_stack({key: joint.dictionary[key] for key in keys})
    assert torch.equal(chosen, wanted) and not bank.contexts.requires_grad
    torch.testing.assert_close(bank.blocks(), rows[chosen])
    assert all(bank.context == 1 for bank in store(joint).plan.banks)


@pytest.mark.slow
@pytest.mark.parametrize("mixing", only("linear"))
def test_error_and_budget_decide_the_number_of_templates(mixing):
    base = network("vit")
    whole = sum(t.numel() * t.element_size() for t in base.module.state_dict().values())
    members = [plain_copy(base), sibling(base, "s", 0.01, 1)]
    bounded = fit(joined(*members), max_error=0.2, mixture=mixing)
    assert bounded.report.met and max(bounded.report.errors.values()) <= 0.2
    assert bounded.report.stored_bytes < 0.4 * whole and bounded.report.saved["sharing"] > 0  # siblings share
    small = fit(
        joined(*(plain_copy(m) for m in [base, sibling(base, "s", 0.01, 1)])), budget=0.6, mixture=mixing
    )
    assert store(small).nbytes <= 0.6 * 2 * whole
    with pytest.raises(PlanError, match="cannot be met: the smallest"):
        fit(joined(plain_copy(base)), budget=0.01, mixture=mixing)


def test_some_stacks_take_templates_and_the_rest_hypermodules():
    one = network("t5")
    joint = joined(one, stacks=["encoder.block.*"]).open(2)
    kinds = {bool(joint.plan.bank(p.bank).stack): p.site.name.split(".")[0] for p in joint.plan.placements}
    assert kinds == {True: "encoder", False: "decoder"}
    assert joint.dictionary["8x8-float32"].hypermodules > 1
    with pytest.raises(PlanError, match=r"there are: encoder\.block\.\*, decoder\.block\.\*"):
        joined(network("t5"), stacks=["encoder.layers.*"])


def test_what_cannot_be_is_refused():
    flat = made("flat", nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.zeros(1, 4))
    with pytest.raises(PlanError, match="the members have none"):
        joined(flat)
    one = network("bert")
    blocks = join([plain_copy(one)], make_plan([discover(one)], (8, 8)))
    for options, words in (
        ({"templates": 2}, "needs `method=templates`"),
        ({"templates": 2, "budget": 0.5}, "needs `method=templates`"),
        ({"templates": 2, "hypermodules": 3}, "needs `method=templates`"),
        ({"settings": {"templats": 2}}, "'settings.templats' is not a known key"),
    ):
        with pytest.raises(PlanError, match=words):
            fit(blocks, **options)
    with pytest.raises(PlanError, match="needs `method=hypermodules`"):
        fit(joined(one), hypermodules=3)


def test_the_command_line_merges_inspects_verifies_and_exports(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    layer = lambda: nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)\n"
        "    return nn.Sequential(nn.Linear(6, 32), *(layer() for _ in range(4)), nn.Linear(32, 3)), "
        "torch.zeros(2, 5, 6)\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, err = command("inspect", "own.py:net")
    assert code == 0, err
    assert "* 4 12 7504" in " ".join(out.split())
    code, out, err = command(
        "merge", "own.py:net", "--method", "templates", "--templates", "2", "--mixture", "one-hot", "--out", "joint"
    )  # fmt: skip
    assert code == 0, err
    assert command("verify", "joint", "--trust-remote-code")[0] == 0
    code, out, err = command("export", "joint", "--member", "net", "--format", "plain", "--out", "plain",
                             "--trust-remote-code")  # fmt: skip
    assert code == 0, err
    code, out, err = command("merge", "own.py:net", "--templates", "2", "--out", "other")
    assert code == 2 and "--templates needs --method templates, found method hyp" in " ".join(err.split())
    templates = ("--method", "templates", "--templates", "2", "--dry-run")
    assert command("merge", "own.py:net", "--stacks", "*", *templates)[0] == 0
    for options, words in (
        (("--stacks", "body.*", *templates), "there are: *"),
        (("--stacks", "*", "--dry-run"), "choose --method templates"),
    ):
        code, out, err = command("merge", "own.py:net", *options)
        assert code == 2 and words in " ".join(err.split())
