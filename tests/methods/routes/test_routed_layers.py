"""Routes over the layers of pretrained stacks: exact starts, training, hardening, artifacts and plain models."""

import copy
import json
import signal
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
from torch import nn

import surgery
from surgery.errors import ExportError, PlanError
from surgery.methods.routes import measuring
from surgery.methods.routes.groups import penalty_of, routes_in
from surgery.methods.routes.hardening import is_hard
from surgery.slots import hooks
from surgery.training.loop.interruptions import Interrupted
from surgery.training.loop.trainer import Trainer
from surgery.training.tasks.streams import Batches

IDS = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))
CONFIG = {"steps": 3, "burn_in": 1, "generations": 2, "final": 1, "optimizer": {"lr": 0.003},
          "evolution": {"change": "none", "codes": "ones", "start": "given"}}  # fmt: skip


def bert(seed=0, layers=4):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.BertModel(config).eval()


def member(module=None, name="text", inputs=IDS):
    return surgery.load_member(module or bert(), name=name, inputs=inputs)


def joined(settings=None, module=None, name="text", inputs=IDS):
    one = member(module, name, inputs)
    return surgery.join([one], surgery.plan_modules([one], "routes", settings))


def run(module, x=IDS):
    with torch.no_grad():
        found = module(x)
    return getattr(found, "last_hidden_state", found)


def distilled(name="text", member=None):
    return surgery.Task(name, member or name, Batches(IDS, IDS, 3), {"distillation": 1.0})


def train(joint, *tasks, **config):
    return surgery.train(joint, tasks or [distilled()], {**CONFIG, **config}, cpu=True)


def by_hand(*order):
    return {"routing": "permuted", "orders": {"text": {"": order}}}


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


# -- soft routes, and several tasks ----------------------------------------------------------------------------


def loss_without(gone):
    """The loss of the first two batches, of four layers without some."""
    model = bert()
    model.encoder.layer = nn.ModuleList(each for i, each in enumerate(model.encoder.layer) if i not in gone)
    return float((run(model) - run(bert())).square().mean())


def test_learning_begins_with_the_layers_that_are_missed_most(tmp_path):
    gone: list[int] = []
    while len(gone) < 2:
        gone.append(min(set(range(4)) - set(gone), key=lambda i: loss_without([*gone, i])))
    joint = joined({"layers": 2, "rate": 1e-9})
    task = surgery.Task("text", "text", Batches(IDS, run(bert()), 3), "mse")
    before = [{key: value.clone() for key, value in joint["text"].state_dict().items() if "gates" not in key}]
    report = train(joint, task, burn_in=0, steps=1, generations=1, final=0, optimizer={"lr": 1e-12})
    found = report.methods["routes"]["measured"]["text:encoder.layer.*"][""]
    assert found["left"] == gone and found["passes"] >= (4 * 3 + 3 * 2) * 2  # more where losses are close
    assert found["losses"] == pytest.approx([loss_without(gone[:1]), loss_without(gone)], rel=1e-4)
    (depths,) = routes_in(joint["text"]).values()
    for depth, gates in enumerate(depths):
        assert gates.hard is None
        p = 1 - gates.settings.p_init if depth in gone else gates.settings.p_init
        torch.testing.assert_close(gates.table(), torch.tensor([[p]]))
    after = joint["text"].state_dict()
    assert all(torch.allclose(after[key], value) for key, value in before[0].items())


def test_without_a_phase_in_which_routes_are_learned_the_measured_ones_are_kept():
    joint = joined({"layers": 2})
    report = train(joint, burn_in=0, generations=0, final=2)
    (chosen,) = report.methods["routes"]["chosen"].values()
    left = report.methods["routes"]["measured"]["text:encoder.layer.*"][""]["left"]
    assert [i for i, (name,) in enumerate(chosen[""]) if name == "identity"] == sorted(left)
    layer = sum(t.numel() for t in bert().encoder.layer[0].parameters())
    sizes = {when: each["text"]["parameters"] for when, each in report.sizes.items()}
    assert sizes["joint"] == sizes["alone"] - 2 * layer  # as it is stored


@pytest.mark.slow
def test_trials_decide_between_close_choices_and_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(
        measuring, "_SURE", float("inf")
    )  # the batches are equal, so that they tell choices apart

    def one(**settings):
        joint = joined({"layers": 3, **settings})
        before = {
            key: value.clone() for key, value in joint["text"].state_dict().items() if "gates" not in key
        }
        task = surgery.Task(
            "text", "text", Batches(IDS, run(bert(1)), 3), "mse"
        )  # none of the layers is missed
        report = train(joint, task, burn_in=0, steps=1, generations=1, final=0, optimizer={"lr": 1e-12})
        after = joint["text"].state_dict()
        assert all(torch.allclose(after[key], value, atol=1e-6) for key, value in before.items())
        (depths,) = routes_in(joint["text"]).values()
        return report.methods["routes"]["measured"]["text:encoder.layer.*"][""], [g.table() for g in depths]

    plain, _ = one()
    found, p = one(trials=2)
    assert found["passes"] > plain["passes"]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-3)  # at such a rate a trial moves nothing
    assert [float(each) < 0.5 for each in p] == [depth in found["left"] for depth in range(4)]


@pytest.mark.parametrize("how", [{"measure": 0, "layers": 2}, {"layers": 4}, {}, {"routing": "soft"}])
def test_nothing_is_measured_where_nothing_is_chosen_by_it(how):
    report = train(joined(how), burn_in=0, steps=1, generations=1)
    assert "measured" not in report.methods["routes"]


def test_each_task_is_measured_by_its_own_batches():
    joint = joined({"layers": 3, "tasks": {"text": ["mood", "topic"]}})
    others = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(9))
    tasks = [surgery.Task(name, "text", Batches(x, x, 3), {"distillation": 1.0})
             for name, x in (("mood", IDS), ("topic", others))]  # fmt: skip
    report = train(joint, *tasks, burn_in=0, steps=1, generations=1)
    found = report.methods["routes"]["measured"]["text:encoder.layer.*"]
    assert set(found) == {"mood", "topic"} and found["mood"]["losses"] != found["topic"]["losses"]


def test_a_run_that_was_measured_resumes(tmp_path, monkeypatch):
    def one(folder, **options):
        joint = joined({"layers": 2})
        report = surgery.train(joint, [distilled()], CONFIG, folder=folder, cpu=True, **options)
        return report.methods["routes"], joint.collapse("text")

    wanted, weights = one(tmp_path / "whole")
    advance, calls = Trainer.advance, []

    def interrupted(self):
        calls.append(None)
        if len(calls) == 6:  # within the phase in which routes are learned
            signal.raise_signal(signal.SIGTERM)
        advance(self)

    monkeypatch.setattr(Trainer, "advance", interrupted)
    with pytest.raises(Interrupted):
        one(tmp_path / "broken")
    monkeypatch.setattr(Trainer, "advance", advance)
    found, again = one(tmp_path / "broken", resume=True)
    assert found == wanted and found["measured"]
    assert list(again) == list(weights) and all(torch.equal(again[k], weights[k]) for k in weights)


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


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "said"), [
    ({"layers": 5}, r"`layers` is 5, but encoder.layer.\* of 'text' has 4"),
    ({"component_budget": 0.2}, "of 0.2 leaves less than one layer of a stack of 4: give at least 0.25"),
    (by_hand(0, 1, 2), r"name one of 4 components, from 0, for each of 4 depths, but that of task '' has 3"),
    (by_hand(0, 1, 2, 9), "names 9"),
    ({"p_init": 0.0}, "p_init"),
    ({"tasks": {"image": ["mood"]}}, r"must name members \(text\), found image"),
    ({"layers": 2, "identity": False}, "identity true"),
])  # fmt: skip
def test_what_no_route_can_be(settings, said):
    with pytest.raises(PlanError, match=said):
        joined(settings)


def test_layers_that_change_the_shape_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1)
            self.layers = nn.ModuleList([nn.Conv1d(4, 4, 3, stride=2) for _ in range(3)])

        def forward(self, x):
            x = self.into(x)
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.out(x)

    with pytest.raises(
        PlanError, match=r"of one shape, but for an input \[2, 4, 40\] of layers.0 .*identity gives"
    ):
        joined({}, Net(), "net", torch.randn(2, 4, 40))


def test_stacks_with_caches_are_refused_with_the_remedy():
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    with pytest.raises(PlanError, match=r"keep no cache.*`use_cache` to false"):
        joined({}, transformers.GPT2Model(config).eval(), "gpt", IDS)
    config.use_cache = False
    joint = joined(
        {"routing": "permuted", "orders": {"gpt": {"": [1, -1]}}},
        transformers.GPT2Model(config).eval(),
        "gpt",
    )
    assert joint.extract("gpt").config.n_layer == 1


class Reads(nn.Module):
    """A net that reads the outputs of single layers."""

    def __init__(self, read):
        super().__init__()
        self.into, self.out, self.read = nn.Linear(12, 16), nn.Linear(16, 2), read
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x):
        outs = [self.into(x)]
        for layer in self.layers:
            outs.append(torch.relu(layer(outs[-1])))
        return self.out(sum(outs[i] for i in self.read))


@pytest.mark.parametrize("read", [(1, 3), (2, 3), (1, 2, 3), (1,)])
def test_stacks_whose_single_layers_are_read_are_refused_before_anything_is_joined(read):
    settings = {"routing": "permuted", "orders": {"net": {"": [-1, 1, 2]}}}
    for each in (settings, {}, {"layers": 2}, {"routing": "soft"}):
        with pytest.raises(PlanError, match=r"layers\.[01] .*is read elsewhere too: choose other stacks"):
            member(Reads(read), "net", torch.randn(2, 12)).module.requires_grad_(True)
            joined(each, Reads(read), "net", torch.randn(2, 12))
    assert joined({"identity": False}, Reads(read), "net", torch.randn(2, 12))  # every depth keeps a layer


def test_hidden_states_that_a_model_returns_are_read():
    model = bert()
    model.config.output_hidden_states = True
    with pytest.raises(PlanError, match="by the model's outputs"):
        joined({"layers": 2}, model)


def test_what_lies_between_layers_reads_nothing():
    joint = joined({"layers": 2}, Reads((3,)), "net", torch.randn(2, 12))
    assert len(routes_in(joint["net"])["layers.*"]) == 3


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
