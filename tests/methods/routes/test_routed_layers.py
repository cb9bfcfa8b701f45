"""Routes over the layers of pretrained stacks: exact starts, training, hardening, artifacts and plain models."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import surgery_recipes
import timm
import torch
import transformers
import yaml
from command_line import surgery as command
from routed import IDS, bert, by_hand, distilled, joined, member, run, train
from torch import nn

import surgery
from surgery.errors import ExportError
from surgery.methods.routes.groups import penalty_of, routes_in
from surgery.methods.routes.hardening import is_hard
from surgery.slots import hooks

# -- the start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {}, {"routing": "soft"}, {"routing": "parallel"}, {"layers": 2}, {"p_init": 0.6, "identity": False},
    by_hand(0, 1, 2, 3), {"tasks": {"text": ["mood", "topic"]}},
])  # fmt: skip
def test_the_start_is_exact_bit_for_bit(settings):
    joint = joined(settings)
    expected = run(bert())
    assert torch.equal(run(joint["text"]), expected)
    with joint.serving("mood"):
        assert torch.equal(run(joint["text"]), expected)
    plain = joint.collapse("text")
    assert list(plain) == list(bert().state_dict())
    assert all(torch.equal(plain[name], tensor) for name, tensor in bert().state_dict().items())


def test_the_first_step_of_a_soft_route_computes_what_the_member_does():
    joint = joined({"routing": "soft"})
    for depths in routes_in(joint["text"]).values():
        for gates in depths:
            gates.enter(1.0)
    assert torch.equal(run(joint["text"]), run(bert()))
    for depths in routes_in(joint["text"]).values():
        for gates in depths:
            gates.enter(0.5)
            torch.testing.assert_close(gates.table().sum(1), torch.ones(1))
    assert not torch.equal(run(joint["text"]), run(bert()))


def test_a_pass_asks_no_gate_of_a_routed_layer_but_a_layer_called_alone_learns_the_task(monkeypatch):
    joint = joined({"tasks": {"text": ["mood", "topic"]}})
    routed = [part for part in joint["text"].modules() if hasattr(type(part), "serve_task")]
    asked, call = [], hooks.Listen.__call__
    monkeypatch.setattr(hooks.Listen, "__call__", lambda self, *args: (asked.append(1), call(self, *args))[1])
    with joint.serving("mood"), torch.no_grad():
        expected = joint["text"](IDS).last_hidden_state
        assert not asked and [part.gates.task for part in routed] == ["mood"] * 4
    with joint.serving("topic"), torch.no_grad():
        routed[1](expected)
        assert asked == [1] and [part.gates.task for part in routed] == ["topic"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"layers": 2, "rate": 3.0}, {"routing": "soft"}])
def test_trained_routes_harden_are_stored_alone_and_export_as_plain_models(settings, tmp_path):
    joint = joined(settings)
    report = train(joint)
    (kept,) = report.methods["routes"]["chosen"]["text:encoder.layer.*"].values()
    names = [name for (name,) in kept]
    used = {name for name in names if name != "identity"}
    assert "layers" not in settings or len(used) == 2
    held = {key.split(".")[2] for key in joint["text"].state_dict() if key.startswith("encoder.layer.")}
    assert held == used and not any("gates" in key for key in joint["text"].state_dict())
    surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(tmp_path / "joint")
    assert torch.equal(run(loaded["text"]), run(joint["text"]))
    surgery.export(tmp_path / "joint", "text", tmp_path / "plain")
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'surgery': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import torch, transformers\n"
        f"model, info = transformers.AutoModel.from_pretrained({str(tmp_path / 'plain')!r}, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        f"torch.save(model.eval()(torch.tensor({IDS.tolist()}))[0], {str(tmp_path / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), run(joint["text"]), rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["num_hidden_layers"] == sum(name != "identity" for name in names)
    assert surgery.verify(tmp_path / "joint").ok


def test_a_layer_that_is_used_twice_is_stored_once_and_written_out(tmp_path):
    joint = joined(by_hand(0, 2, 2, -1))
    expected = bert()
    expected.encoder.layer = nn.ModuleList([expected.encoder.layer[i] for i in (0, 2, 2)])
    assert torch.equal(run(joint["text"]), run(expected))
    folder = surgery.save(joint, tmp_path / "joint")
    whole = surgery.save(joined({"routing": "parallel"}), tmp_path / "whole")
    size, most = (sum(f.stat().st_size for f in each.rglob("*.safetensors")) for each in (folder, whole))
    layer = sum(p.nbytes for p in bert().encoder.layer[0].parameters())
    assert size < most - 1.9 * layer
    plain = joint.extract("text")
    assert plain.config.num_hidden_layers == 3 == len(plain.encoder.layer)
    assert plain.encoder.layer[1] is not plain.encoder.layer[2]
    assert torch.equal(run(plain), run(expected))


def test_timm_models_get_their_depth(tmp_path):
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 2, "num_classes": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(net)
    del expected.blocks[1]
    joint = joined({"routing": "permuted", "orders": {"vit": {"": [0, -1, 2, 3]}}}, net, "vit", x)
    assert torch.equal(run(joint["vit"], x), run(expected, x))
    surgery.export(joint, "vit", tmp_path / "plain")
    again = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    assert len(again.blocks) == 3 and torch.equal(run(again, x), run(expected, x))


def test_a_budget_is_reached_step_by_step():
    depths = next(iter(routes_in(joined({"layers": 2, "p_init": 0.9})["text"]).values()))
    found = [penalty_of(depths, left).item() for left in (1.0, 0.6, 0.3, 0.0)]
    assert found == pytest.approx([0.0, 0.9 - 0.8, 0.9 - 0.65, 0.9 - 0.5], abs=1e-6)


# -- soft routes, and tasks with routes of their own ----------------------------------------------------------


def test_soft_routes_are_stored_and_their_plain_export_names_the_remedy(tmp_path):
    joint = joined({"routing": "soft", "harden": False})
    train(joint)
    assert not is_hard(joint)
    surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(tmp_path / "joint")
    assert torch.equal(run(loaded["text"]), run(joint["text"]))
    with pytest.raises(ExportError, match=r"'text' at encoder.layer.3 is still soft.*`harden`"):
        surgery.export(tmp_path / "joint", "text", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    surgery.export(tmp_path / "joint", "text", tmp_path / "plain", harden=True)
    assert is_hard(loaded) is False
    surgery.harden(loaded)
    torch.testing.assert_close(
        run(transformers.AutoModel.from_pretrained(tmp_path / "plain").eval()), run(loaded["text"])
    )


def test_each_task_of_a_member_has_its_own_route_and_its_own_plain_model():
    joint = joined({"routing": "permuted", "tasks": {"text": ["mood", "topic"]},
                    "orders": {"text": {"mood": [0, 1, -1, 3], "topic": [3, 2, 1, 0]}}})  # fmt: skip
    for task, order in (("mood", (0, 1, 3)), ("topic", (3, 2, 1, 0))):
        expected = bert()
        expected.encoder.layer = nn.ModuleList([expected.encoder.layer[i] for i in order])
        with joint.serving(task):
            assert torch.equal(run(joint["text"]), run(expected))
            assert torch.equal(run(joint.extract("text")), run(expected))
    with pytest.raises(ExportError, match="mood, topic of member 'text' take different routes"):
        joint.extract("text")


# -- several members -------------------------------------------------------------------------------------------


def family(**settings):
    members = [member(bert(seed), name) for seed, name in ((0, "a"), (1, "b"))]
    return surgery.join(members, surgery.plan_modules(members, "routes", {"members": True, **settings}))


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["gumbel", "soft"])
def test_members_use_layers_of_others_which_stay_one(routing, tmp_path):
    joint = family(routing=routing, rate=3.0, harden=False)
    for seed, name in ((0, "a"), (1, "b")):
        assert torch.equal(run(joint[name]), run(bert(seed)))
    train(joint, distilled("a"), distilled("b"))

    def check(model):
        for one, other in (("a", "b"), ("b", "a")):
            own = model[one].state_dict()
            copies = [k for k in model[other].state_dict() if ".held.1." in k]
            assert len(copies) == 4 * 16
            for key in copies:
                source = own[key.replace(".held.1.", ".held.0.")]
                assert torch.equal(model[other].state_dict()[key], source), key

    check(joint)
    folder = surgery.save(joint, tmp_path / "joint")
    check(surgery.load(folder))
    for name in ("a", "b"):
        alone = surgery.load(folder, members=[name])
        assert torch.equal(run(alone[name]), run(joint[name]))
    apart = surgery.save(surgery.join([member(bert(0), "a"), member(bert(1), "b")]), tmp_path / "apart")
    size, most = (sum(f.stat().st_size for f in each.rglob("*.safetensors")) for each in (folder, apart))
    assert size < 1.35 * most  # and not twice as large


def test_layers_of_others_are_written_out_in_plain_models():
    joint = family(harden=True)
    depths = next(iter(routes_in(joint["a"]).values()))
    with torch.no_grad():
        for gates in depths:
            gates.enter(0.0)
        depths[2].logits[0] = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])  # the other's layer
        depths[3].logits[0] = torch.tensor([[-2.0, 0.0], [-2.0, 0.0]])  # none
    surgery.harden(joint)
    expected, other = bert(0), bert(1)
    expected.encoder.layer = nn.ModuleList([*expected.encoder.layer[:2], other.encoder.layer[2]])
    assert torch.equal(run(joint["a"]), run(expected))
    assert torch.equal(run(joint.extract("a")), run(expected))
    assert torch.equal(run(joint["b"]), run(bert(1))) and torch.equal(run(joint.extract("b")), run(bert(1)))


# -- recipes ---------------------------------------------------------------------------------------------------


DATA = """
import torch


def data(batch=4, seed=0):
    ids = torch.randint(5, 60, (12, 7), generator=torch.Generator().manual_seed(seed))
    rows = [({"input_ids": some}, torch.zeros(len(some))) for some in ids.split(batch)]
    return {"train": rows, "validation": rows[:1], "test": rows[1:2]}
"""


def test_the_recipe_of_routes_ends_in_a_plain_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert().save_pretrained("bert")
    (tmp_path / "data.py").write_text(DATA)
    found = yaml.safe_load((Path(surgery_recipes.__file__).parent / "routes.yaml").read_text())
    (model,) = found["models"]
    model["model"] = "bert"
    model["tasks"][0] |= {"data": "data.py:data", "options": {}, "batch": 4}
    found["settings"] |= {"layers": 2}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(found))
    code, out, err = command("train", "r.yaml", "--out", "joint", "--fast-dev-run", "--cpu")
    assert code == 0, (out, err)
    assert command("report", "joint", "--html")[0] == 0
    code, out, err = command("export", "joint", "--member", "minilm", "--out", "plain")
    assert code == 0, (out, err)
    plain = transformers.AutoModel.from_pretrained("plain").eval()
    assert len(plain.encoder.layer) == 2 == plain.config.num_hidden_layers
    torch.testing.assert_close(run(plain), run(surgery.load("joint")["minilm"]))
    folder = tmp_path / "joint" / "training"
    assert {"allocation.png", "routes.png"} <= {each.name for each in folder.iterdir()}


def test_the_first_pass_leaves_modes_of_single_modules_as_they_are():
    joint = joined({"layers": 3})
    body = joint["text"].train()
    norms = [each for each in body.modules() if isinstance(each, torch.nn.LayerNorm)]
    for norm in norms:
        norm.eval()  # as those that are frozen
    run(body)
    assert body.training and not any(norm.training for norm in norms)
