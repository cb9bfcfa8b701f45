"""Layers of another width on a route: the exact start, training, artifacts, resuming, plain models, what is refused."""

import signal

import pytest
import timm
import torch
import transformers
from ended_runs import stopped_at
from routed import IDS, run
from torch import nn

import surgery
from surgery.errors import ExportError, PlanError
from surgery.methods.routes.adapters import Adapted, Lent
from surgery.methods.routes.groups import routes_in
from surgery.methods.routes.hardening import drop_unused
from surgery.methods.routes.sharing import routed_layers
from surgery.training.loop.interruptions import Interrupted
from surgery.training.tasks.streams import Batches

CONFIG = {"steps": 2, "burn_in": 1, "generations": 2, "final": 1, "optimizer": {"lr": 0.003},
          "evolution": {"change": "none", "codes": "ones", "start": "given"}}  # fmt: skip
ROUTE = "encoder.layer.*"


def bert(seed=0, layers=4, width=16, heads=2):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.BertModel(config).eval()


WIDE = {"seed": 1, "layers": 2, "width": 24}


def pair(**settings):
    members = [surgery.load_member(m, name=n, inputs=IDS) for n, m in (("a", bert()), ("b", bert(**WIDE)))]
    how = {"members": True, "adapters": True, **settings}
    return surgery.join(members, surgery.plan_modules(members, "routes", how))


def train(joint, **options):
    tasks = [surgery.Task(n, n, Batches(IDS, IDS, 3), {"distillation": 1.0}) for n in joint.names]
    return surgery.train(joint, tasks, CONFIG, cpu=True, **options)


def taking(joint, member, depth, name):
    """Harden a route that takes one component of another member at some depth, its own layers elsewhere."""
    for gates in routes_in(joint[member])[ROUTE]:
        gates.harden({"": (gates.names.index(name) if gates.depth == depth else 0,)})
    for other in set(joint.names) - {member}:
        for gates in routes_in(joint[other])[ROUTE]:
            gates.harden({"": (0,)})


@pytest.mark.parametrize("routing", ["gumbel", "soft"])
def test_the_start_is_exact_and_every_layer_lies_once_as_deep_as_in_its_own_stack(routing):
    joint = pair(routing=routing)
    for name, other in (("a", bert()), ("b", bert(**WIDE))):
        assert torch.equal(run(joint[name]), run(other))
        plain = joint.extract(name)
        assert torch.equal(run(plain), run(other)) and list(plain.state_dict()) == list(other.state_dict())
    a, b = ([layer.own for layer in routed_layers(joint, name).values()] for name in "ab")
    assert a == [("0", "b/0"), ("1",), ("2", "b/1"), ("3",)]
    assert b == [("0", "a/0", "a/1"), ("1", "a/2", "a/3")]
    names = [gates.names for gates in routes_in(joint["b"])[ROUTE]]
    everything = ("0", "a/0", "a/1", "1", "a/2", "a/3", "identity")
    assert names == ([everything] * 2 if routing == "soft" else [(*own, "identity") for own in b])


def test_what_an_adapted_layer_computes():
    layer, lent = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), Lent(
        layers=("0",), width=3, own=5, kind="", reference="", architecture=""
    )  # fmt: skip
    adapted, y = Adapted(layer, lent, "0"), torch.randn(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(adapted(y), torch.cat([layer(y[:, :3]), y[:, 3:]], 1))  # as it begins
        adapted.into.weight.normal_()
        adapted.out.weight.normal_()
        z = y @ adapted.into.weight.T
        torch.testing.assert_close(adapted(y), y + (layer(z) - z) @ adapted.out.weight.T)
        adapted.out.weight.zero_()
        assert torch.equal(adapted(y), y)


@pytest.mark.slow
def test_adapters_and_layers_are_trained_stored_and_loaded_alone_and_together(tmp_path):
    joint = pair(routing="soft", harden=False)
    before = {k: v.clone() for k, v in joint["a"].state_dict().items() if ".held.1." in k}
    train(joint)
    moved = {k for k, v in before.items() if not torch.equal(v, joint["a"].state_dict()[k])}
    assert {k for k in before if k.endswith(("into.weight", "out.weight", "query.weight"))} <= moved

    def check(model):
        own, copies = model["b"].state_dict(), model["a"].state_dict()
        lent = [k for k in copies if ".held.1.layer." in k]
        assert len(lent) == 2 * 16
        for key in lent:
            depth, rest = key.split(".")[2], key.partition(".held.1.layer.")[2]
            assert torch.equal(copies[key], own[f"encoder.layer.{int(depth) // 2}.held.0.{rest}"]), key

    check(joint)
    folder = surgery.save(joint, tmp_path / "joint")
    check(surgery.load(folder))
    assert surgery.verify(folder).ok
    for name in "ab":
        alone = surgery.load(folder, members=[name])
        assert torch.equal(run(alone[name]), run(joint[name]))
        again = surgery.load(surgery.save(alone, tmp_path / name))
        assert torch.equal(run(again[name]), run(joint[name]))


@pytest.mark.slow
def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    def one(folder, **options):
        joint = pair()
        train(joint, folder=folder, **options)
        return {name: joint[name].state_dict() for name in joint.names}

    wanted = one(tmp_path / "whole")
    with stopped_at(4, method="advance", number=signal.SIGTERM), pytest.raises(Interrupted):
        one(tmp_path / "broken")
    found = one(tmp_path / "broken", resume=True)
    for name, state in wanted.items():
        assert list(found[name]) == list(state)
        assert all(torch.equal(found[name][key], tensor) for key, tensor in state.items())


def test_a_hard_route_through_a_layer_of_another_width_is_stored_and_has_no_plain_model(tmp_path):
    joint = pair()
    taking(joint, "a", 2, "b/1")
    drop_unused(joint)
    assert not torch.equal(run(joint["a"]), run(bert()))
    assert [layer.own for layer in routed_layers(joint, "a").values()] == [("0",), ("1",), ("b/1",), ("3",)]
    folder = surgery.save(joint, tmp_path / "joint")
    for loaded in (surgery.load(folder), surgery.load(folder, members=["a"])):
        assert torch.equal(run(loaded["a"]), run(joint["a"]))
    with pytest.raises(
        ExportError, match=r"'a' takes b/1 at encoder.layer.2, .* between adapters.*`surgery.load`"
    ):
        surgery.export(folder, "a", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    surgery.export(folder, "b", tmp_path / "plain")
    assert torch.equal(
        run(transformers.AutoModel.from_pretrained(tmp_path / "plain").eval()), run(bert(**WIDE))
    )


def test_a_hard_route_of_own_layers_keeps_nothing_of_others():
    joint = pair()
    taking(joint, "a", 1, "identity")
    drop_unused(joint)
    assert not any("into" in key for name in "ab" for key in joint[name].state_dict())
    assert not any(each.replacement.settings.get("lent") for each in joint.members["a"].replaced)
    assert joint.extract("a").config.num_hidden_layers == 3


def test_the_order_of_members_permutes_components_and_nothing_else():
    c = {"seed": 2, "width": 8, "layers": 4}
    found = []
    for order in ("abc", "acb"):
        nets = {"a": bert(), "b": bert(**WIDE), "c": bert(**c)}
        members = [surgery.load_member(nets[name], name=name, inputs=IDS) for name in order]
        settings = {"members": True, "adapters": True, "routing": "soft", "harden": False}
        joint = surgery.join(members, surgery.plan_modules(members, "routes", settings))
        for gates in routes_in(joint["a"])[ROUTE]:
            gates.enter(0.0)
            with torch.no_grad():  # the same share for the same component
                gates.scores[0] = torch.tensor([sum(map(ord, name)) % 7 / 3 for name in gates.names])
        found.append((run(joint["a"]), {name for g in routes_in(joint["a"])[ROUTE] for name in g.names}))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_vision_transformers_of_two_widths(tmp_path):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    options = {"img_size": 16, "patch_size": 8, "num_heads": 2, "num_classes": 3}

    def vit(**sizes):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return timm.create_model("vit_tiny_patch16_224", **options, **sizes).eval()

    nets = {"narrow": vit(embed_dim=12, depth=2), "wide": vit(embed_dim=16, depth=3)}
    members = [surgery.load_member(net, name=name, inputs=x) for name, net in nets.items()]
    with torch.no_grad():
        before = {name: net(x) for name, net in nets.items()}
        joint = surgery.join(
            members, surgery.plan_modules(members, "routes", {"members": True, "adapters": True})
        )
        loaded = surgery.load(surgery.save(joint, tmp_path / "joint"))
        for name, wanted in before.items():
            assert torch.equal(joint[name](x), wanted) and torch.equal(loaded[name](x), wanted)


def test_layers_of_equal_tensors_and_other_heads_are_no_copies_of_one_another(tmp_path):
    """An artifact builds copies by the member's own layer, which has other heads."""
    members = [
        surgery.load_member(bert(i, heads=h), name=n, inputs=IDS)
        for i, (n, h) in enumerate({"a": 2, "b": 4}.items())
    ]
    joint = surgery.join(members, surgery.plan_modules(members, "routes", {"members": True}))
    assert [layer.own for layer in routed_layers(joint, "a").values()] == [("0",), ("1",), ("2",), ("3",)]
    members = [
        surgery.load_member(bert(i, heads=h), name=n, inputs=IDS)
        for i, (n, h) in enumerate({"a": 2, "b": 4}.items())
    ]
    joint = surgery.join(
        members, surgery.plan_modules(members, "routes", {"members": True, "adapters": True})
    )
    taking(joint, "a", 1, "b/1")
    loaded = surgery.load(surgery.save(joint, tmp_path / "joint"))
    assert torch.equal(run(loaded["a"]), run(joint["a"]))


class Net(nn.Module):
    """Of no library."""

    def __init__(self, width):
        super().__init__()
        self.into, self.out = nn.Linear(12, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])

    def forward(self, x):
        x = self.into(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.out(x)


def refused(nets, inputs, said, **settings):
    members = [surgery.load_member(net, name=name, inputs=inputs[name]) for name, net in nets.items()]
    before = {name: list(net.state_dict()) for name, net in nets.items()}
    with pytest.raises(PlanError, match=said):
        surgery.join(
            members, surgery.plan_modules(members, "routes", {"members": True, "adapters": True, **settings})
        )
    assert before == {name: list(net.state_dict()) for name, net in nets.items()}


def test_what_adapters_cannot_serve():
    x = {"a": torch.randn(2, 12), "b": torch.randn(2, 12)}
    refused(
        {"a": Net(16), "b": Net(24)},
        x,
        r"Layers of 'b' can serve 'a' .*: set `adapters` to false, or give such",
    )
    refused(
        {"a": bert(), "b": bert(**WIDE)}, {"a": IDS, "b": IDS}, "set members to true as well", members=False
    )
    options = {"img_size": 16, "patch_size": 8, "num_heads": 2, "num_classes": 3, "embed_dim": 12, "depth": 2}
    vit = timm.create_model("vit_tiny_patch16_224", **options).eval()
    pictures = torch.randn(2, 3, 16, 16)
    said = (
        r"of encoder.layer.0 0 gives \[3, 7, 16\]; b/0 gives an error: .*`identity`, `members` or `adapters`"
    )
    refused({"a": bert(), "b": vit}, {"a": IDS, "b": pictures}, said)
    cnn = timm.create_model("resnet18", num_classes=3).eval()
    said = r"but of layer1.\* of 'b' the graph shows none: set `adapters` to false"
    refused({"a": vit, "b": cnn}, {"a": pictures, "b": torch.randn(2, 3, 32, 32)}, said)


@pytest.mark.slow
def test_a_layer_that_its_own_member_uses_no_more_stays_one_in_others():
    members = [surgery.load_member(bert(i), name=n, inputs=IDS) for i, n in enumerate("abc")]
    joint = surgery.join(members, surgery.plan_modules(members, "routes", {"members": True}))
    for name in "abc":
        for gates in routes_in(joint[name])[ROUTE]:
            gates.harden(
                {"": (gates.names.index("a/1" if name != "a" else "identity") if gates.depth == 1 else 0,)}
            )
    drop_unused(joint)
    train(joint)
    b, c = joint["b"].state_dict(), joint["c"].state_dict()
    keys = [key for key in b if key.startswith("encoder.layer.1.held.0.")]
    assert len(keys) == 16 and all(torch.equal(b[key], c[key]) for key in keys)
    assert not torch.equal(b[keys[0]], bert().state_dict()[keys[0].replace(".held.0", "")])
