"""Artifacts that run as they are stored: packed in memory, decoded when they are used, equal to a plain load."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifacts import Tied, fitted, hypermodules, member, modules, pair, seeded
from hypothesis import given
from hypothesis import strategies as st
from resident_bodies import draw
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery.artifact.resident import ResidentModel
from surgery.errors import ArtifactError, PlanError, TrainingError
from surgery.storage import packed as packing
from surgery.storage.cache import Cache
from surgery.storage.codecs import Precision, decode, encode, take_rows
from surgery.storage.keys import PlainKey
from surgery.storage.packed import Form, PackedWeight, _decoded
from surgery.storage.stored import Stored, revive, store
from surgery.util.stamps import stamps

WAYS = ["packed", "shared"]


def packed(weight: torch.Tensor, precision: str = "int4/16") -> tuple[nn.Parameter, torch.Tensor]:
    stored = encode(weight, Precision.parse(precision))
    made = PackedWeight(Form({"": stored}), stored.shape, stored.dtype)
    return nn.Parameter(made, requires_grad=False), decode(stored)


LAYERS = {
    "linear": (lambda: nn.Linear(32, 8), draw(3, 32)),
    "conv": (lambda: nn.Conv2d(4, 8, 3), draw(2, 4, 6, 6)),
    "norm": (lambda: nn.LayerNorm((4, 16)), draw(2, 4, 16)),
    "lstm": (lambda: nn.LSTM(16, 8, batch_first=True), draw(2, 5, 16)),
    "attention": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), draw(2, 5, 32)),
    "embedding": (lambda: nn.Embedding(40, 16, padding_idx=0), torch.tensor([[1, 5, 0], [39, 5, 2]])),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_compute_with_what_is_decoded(kind):
    make, x = LAYERS[kind]
    plain, small = seeded(make), seeded(make)
    for name, weight in [*plain.named_parameters()]:
        if weight.ndim > 1:
            path, _, attribute = name.rpartition(".")
            parameter, dense = packed(weight.detach())
            setattr(small.get_submodule(path), attribute, parameter)
            weight.data.copy_(dense)
    with torch.no_grad():
        one, other = plain(x), small(x)
    for mine, theirs in zip(
        torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other), strict=True
    ):
        # PyTorch's fast path of attention, which is for its own tensors alone, sums in another order.
        close = torch.allclose(mine, theirs, atol=1e-5) if kind == "attention" else torch.equal(mine, theirs)
        assert type(theirs) is torch.Tensor and close
    assert any(isinstance(p, PackedWeight) for p in copy.deepcopy(small).parameters())
    small.half()
    assert all(p.dtype == torch.float16 for p in small.parameters())
    assert any(isinstance(p, PackedWeight) for p in small.parameters())


@given(
    st.integers(1, 9),
    st.integers(1, 80),
    st.sampled_from(["int2/16", "int3/64", "int5/8", "int7/64", "int10/64"]),
    st.data(),
)
def test_rows_of_codes_are_those_of_the_whole(rows, columns, precision, data):
    stored = encode(draw(rows, columns), Precision.parse(precision))
    index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1)))
    assert torch.equal(decode(take_rows(stored, index)), decode(stored)[index])


def test_a_weight_is_moved_and_cast_by_itself():
    """As `Module.to` does it, which writes the metadata of another tensor into a parameter."""
    net = nn.Linear(16, 32, bias=False)
    net.weight, dense = packed(draw(32, 16))
    twin = copy.deepcopy(net).half()
    assert twin.weight.form.parts[""] is not net.weight.form.parts[""]  # pyright: ignore
    assert net.weight.dtype == torch.float32 and torch.equal(net(dense), nn.functional.linear(dense, dense))
    assert torch.equal(twin.weight + 0, dense.half())
    other, _ = packed(2 * draw(32, 16))
    moved = net.weight
    net._apply(lambda each: other.data)
    assert net.weight is moved and moved.form is other.data.form  # pyright: ignore
    with pytest.raises(TrainingError, match=r"extract\(NAME\)"):
        net.weight.data = dense
    whole = net.weight.to(torch.int64)
    assert type(whole) is torch.Tensor and torch.equal(whole, net.weight.unpacked().to(torch.int64))  # pyright: ignore


def test_sums_are_taken_in_the_order_of_a_plain_model():
    """Which for inputs that do not lie in order depends on whether the weight requires gradients."""
    weight, dense = packed(draw(48, 64))
    x = draw(6, 4, 64).transpose(0, 1)
    with torch.no_grad():
        found = nn.functional.linear(x, weight)
        assert torch.equal(found, nn.functional.linear(x, nn.Parameter(dense))) and not found.requires_grad
    assert not nn.functional.linear(x, weight).requires_grad
    for mode, marked in ((torch.no_grad(), True), (torch.enable_grad(), False)):
        with mode:
            assert _decoded([weight], True, True)[0].requires_grad == marked
            with torch.autocast("cpu", dtype=torch.bfloat16):  # it would keep a cast of each until it ends
                assert not _decoded([weight], True, True)[0].requires_grad


def test_casts_of_generated_weights_take_no_room(tmp_path):
    folder = surgery.save(hypermodules(), tmp_path / "joint")
    joint = surgery.load(folder, modules=modules(), resident="packed")
    before = joint.resident_bytes
    wanted = joint.extract("one").half()
    joint["one"].half()
    small = [each for each in joint["one"].parameters() if isinstance(each, PackedWeight)]
    assert small and all(each.dtype == torch.float16 for each in small) and joint.resident_bytes <= before
    assert all(
        torch.equal(mine + 0, theirs)
        for mine, theirs in zip(joint["one"].parameters(), wanted.parameters(), strict=True)
    )


def joints() -> dict[str, surgery.JointModel]:
    tied = surgery.join([member(seeded(Tied), "tied", torch.tensor([[1, 2]]))], block=(8, 8))
    stored = store(tied)
    tensors = {
        key: encode(decode(each), Precision.parse("int6/16"))
        if isinstance(key, PlainKey) and len(each.shape) > 1
        else each
        for key, each in stored.tensors.items()
    }
    again = [member(seeded(Tied, 4), "tied", torch.tensor([[1, 2]]))]
    return {
        "exact": pair(), "fitted": fitted(), "hypermodules": hypermodules(),
        "tied": revive(again, Stored(stored.plan, tensors, stored.aliases, stored.ties)),
    }  # fmt: skip


@pytest.mark.parametrize("way, cache", [("packed", 0), ("packed", 600), ("shared", 0), ("shared", 1 << 20)])
@pytest.mark.parametrize("kind", ["exact", "fitted", "hypermodules", "tied"])
def test_outputs_are_those_of_a_plain_load(kind, way, cache, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("surgery.storage.held.SMALL", 64)
    folder = surgery.save(joints()[kind], tmp_path / "joint")

    def architectures():
        return {"tied": seeded(Tied, 9)} if kind == "tied" else modules()

    plain = surgery.load(folder, modules=architectures())
    joint = surgery.load(folder, modules=architectures(), resident=way, cache=cache)
    assert isinstance(joint, ResidentModel) and joint.names == plain.names
    for name in joint:
        x = torch.tensor([[1, 2, 7]]) if kind == "tied" else draw(3, 8)
        with torch.no_grad():
            assert torch.equal(joint[name](x), plain[name](x))
            assert torch.equal(joint[name](x), plain[name](x))  # from the cache, where there is one
            assert torch.equal(joint.activate(name)(x), plain[name](x))
        ordinary = joint.extract(name)
        state, wanted = ordinary.state_dict(), plain.collapse(name)
        assert state.keys() == wanted.keys() and all(torch.equal(state[n], wanted[n]) for n in wanted)
        ordinary.train()(x).sum().backward()
        if kind == "tied":
            assert ordinary.head.weight is ordinary.embed.weight
    assert joint.names[0] in repr(joint) and "<table" in joint._repr_html_()


def test_members_take_turns_in_one_module(tmp_path):
    folder = surgery.save(pair(), tmp_path / "joint")
    joint = surgery.load(folder, modules=modules(), resident="packed")
    first = joint.activate("one")
    before = {name: (t.data_ptr(), t._version) for name, t in first.state_dict(keep_vars=True).items()}
    assert joint.activate("two") is first
    written = {
        n for n, t in first.state_dict(keep_vars=True).items() if (t.data_ptr(), t._version) != before[n]
    }
    assert "2.weight" not in written and "4.weight" in written  # equal in both members
    plain = surgery.load(folder, modules=modules())
    assert torch.equal(first(draw(2, 8)), plain["two"](draw(2, 8)))
    with torch.no_grad():  # what was edited is put back, whether or not it differs between the members
        for weight in first.parameters():
            weight.data.add_(1)
    for name in ("one", "two"):
        assert torch.equal(joint.activate(name)(draw(2, 8)), plain[name](draw(2, 8)))


def test_a_module_that_was_cast_becomes_the_next_member(tmp_path):
    folder = surgery.save(pair(), tmp_path / "joint")
    joint, plain = (
        surgery.load(folder, modules=modules(), resident="packed"),
        surgery.load(folder, modules=modules()),
    )
    module = joint.activate("one")
    for cast in (module.double, module.half, module.bfloat16):
        cast()
        for name in ("two", "one"):
            assert joint.activate(name) is module
            assert torch.equal(module(draw(2, 8)), plain[name](draw(2, 8)))


def test_a_switch_decodes_what_differs_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.storage.held.SMALL", 0)
    folder = surgery.save(fitted(), tmp_path / "joint")
    joint = surgery.load(folder, modules=modules(), resident="packed")
    made: list[PackedWeight] = []
    read = PackedWeight.unpacked
    monkeypatch.setattr(PackedWeight, "unpacked", lambda self: made.append(self) or read(self))
    joint.activate("one")
    first = len(made)
    joint.activate("one")
    assert len(made) == first  # the same again
    joint.to("cpu").activate("two")
    theirs = {each.form.key for each in joint["two"].parameters() if isinstance(each, PackedWeight)}
    ours = {each.form.key for each in joint["one"].parameters() if isinstance(each, PackedWeight)}
    assert len(made) - first == len(theirs - ours)
    x, plain = draw(2, 8), surgery.load(folder, modules=modules())
    for name in ("one", "two", "one"):
        assert torch.equal(joint.to("cpu").activate(name)(x), plain[name](x))


@given(st.integers(0, 999), st.integers(0, 3), st.sampled_from(["add_", "data", "none"]))
def test_stamps_find_what_changed(seed, which, how):
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "a": torch.randn(5, generator=g), "b": torch.randn(40, 3, generator=g).half(), "c": torch.arange(9),
        "d": torch.randn(2, 2, generator=g, dtype=torch.complex64), "e": torch.zeros(0), "f": torch.ones(3, 4).t(),
    }  # fmt: skip
    before, key = stamps(tensors), [*tensors][which]
    if how == "add_":
        tensors[key].add_(1)
    if how == "data":
        tensors[key].data.add_(1)  # leaves no trace but in values
    changed = {name for name, each in stamps(tensors).items() if each != before[name]}
    assert changed == (set() if how == "none" else {key})


def test_a_compiler_leaves_packed_members_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.storage.held.SMALL", 0)
    out = surgery.save(fitted(), tmp_path / "joint")
    joint = surgery.load(out, modules=modules(), resident="packed")
    net, x = joint["one"], joint.members["one"].inputs.args[0]
    wanted = net(x)
    again = copy.deepcopy(net)
    assert again.forward.args[0] is again and inspect.signature(again.forward) == inspect.signature(
        net.forward
    )
    for compiled in (
        torch.compile(net, backend="eager"),
        torch.compile(nn.Sequential(again), backend="eager"),
    ):
        assert torch.equal(compiled(x), wanted)
    plain = joint.extract("one")
    assert "forward" not in vars(plain)
    assert torch.equal(torch.compile(plain, backend="eager", fullgraph=True)(x), wanted)


def given_later(optimizer: torch.optim.Optimizer, module: nn.Module) -> torch.optim.Optimizer:
    optimizer.param_groups[0]["params"] += [*module.parameters()]
    return optimizer


@pytest.mark.parametrize("way", WAYS)
def test_training_is_refused_and_extract_named(way, tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.storage.held.SMALL", 0)
    joint = surgery.load(surgery.save(fitted(), tmp_path / "joint"), modules=modules(), resident=way)
    for ask in (
        lambda: joint["one"].train(),
        lambda: joint["one"].requires_grad_(True),
        lambda: surgery.train(joint, []),
        lambda: surgery.fit(joint, max_error=0.1),
        lambda: surgery.save(joint, tmp_path / "again"),
        lambda: joint.step(),
        lambda: torch.optim.AdamW(joint["one"].parameters()),
        lambda: torch.optim.SGD([{"params": [*joint["one"].parameters()]}], lr=1.0),
        lambda: torch.optim.SGD([nn.Parameter(draw(2))]).add_param_group(
            {"params": joint["one"].parameters()}
        ),
        lambda: given_later(torch.optim.SGD([nn.Parameter(draw(2))], lr=1.0), joint["one"]).step(),
        lambda: next(part for part in joint["one"].children()).train(),
    ):
        with pytest.raises(TrainingError, match=r"extract\(NAME\)"):
            ask()
    assert joint["one"].eval() is joint["one"] and not hasattr(joint, "other")
    assert not any(p.requires_grad for p in joint["one"].parameters())
    with pytest.raises(KeyError, match="the members are one, two"):
        joint["three"]
    for members in ("one", 3):
        with pytest.raises(ArtifactError, match=r"must be a list of names, found "):
            surgery.load(tmp_path / "joint", members=members)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match="must be one of packed, shared, found 'small'"):
        surgery.load(tmp_path / "joint", resident="small")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("way", WAYS)
def test_packed_weights_are_not_changed_nor_saved(way, tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.storage.held.SMALL", 0)
    joint = surgery.load(surgery.save(fitted(), tmp_path / "joint"), modules=modules(), resident=way)
    net = joint["one"]
    small = next(p for p in net.parameters() if isinstance(p, PackedWeight))
    before = net(draw(2, 8))
    for ask in (
        lambda: small.add_(1),
        lambda: small.data.zero_(),
        lambda: small.copy_(torch.zeros(small.shape)),
        lambda: torch.add(small.unpacked(), 1, out=small),
        lambda: net.load_state_dict(joint["two"].state_dict()),
        lambda: net.share_memory(),
        lambda: small.share_memory_(),
        lambda: small.data_ptr(),
        lambda: torch.save(net.state_dict(), tmp_path / "state.pt"),
        lambda: save_file(net.state_dict(), tmp_path / "state.safetensors"),
    ):
        with pytest.raises(TrainingError, match=r"extract\(NAME\)"), torch.no_grad():
            ask()
    assert torch.equal(net(draw(2, 8)), before)


def test_relatives_hold_what_they_share_once(tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.storage.held.SMALL", 64)
    base = seeded(
        lambda: nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)
        )
    )
    nets = []
    for number in range(4):
        net = copy.deepcopy(base)
        with torch.no_grad():
            net[2].weight += 0.02 * draw(256, 2) @ draw(2, 256 + number)[:, :256]
        nets.append(surgery.load_member(net, name=f"m{number}", inputs=draw(4, 64)))
    folder = surgery.save(surgery.fit(surgery.join(nets), max_error=0.02), tmp_path / "joint")
    own = {f"m{n}": copy.deepcopy(base) for n in range(4)}
    plain = surgery.load(folder, modules=copy.deepcopy(own))
    joint = surgery.load(folder, modules=copy.deepcopy(own), resident="packed")
    assert joint.resident_bytes <= 1.15 * joint.stored_bytes
    shared = surgery.load(folder, modules=copy.deepcopy(own), resident="shared")
    assert joint.resident_bytes <= shared.resident_bytes <= 1.3 * shared.stored_bytes
    forms = [
        {name: p.form for name, p in shared[each].named_parameters() if isinstance(p, PackedWeight)}
        for each in shared
    ]
    common = [{id(part) for form in mine.values() for part in form.parts.values()} for mine in forms]
    assert common[0] & common[1] & common[2] & common[3]
    cached = surgery.load(folder, modules=copy.deepcopy(own), resident="shared", cache=1 << 20)
    alone = surgery.load(folder, modules={"m1": own["m1"]}, members=["m1"], resident="packed")
    assert alone.resident_bytes < joint.resident_bytes < 1.3 * alone.resident_bytes
    with torch.no_grad():
        for name in joint:
            for other in (joint, shared, cached, cached):
                assert torch.equal(other[name](draw(3, 64)), plain[name](draw(3, 64)))
    assert cached.cache is not None and len(cached.cache.tensors) == len(
        common[0] & common[1]
    )  # one for all members
    assert cached.resident_bytes == shared.resident_bytes + cached.cache.nbytes


def test_a_cache_is_not_written_to(tmp_path):
    weight, dense = packed(draw(32, 16))
    cache = Cache(1 << 20)
    weight = nn.Parameter(weight.data.like(replace(weight.data.form, cache=cache)), requires_grad=False)  # pyright: ignore
    x = draw(2, 16).requires_grad_()
    with torch.inference_mode():
        nn.functional.linear(x.detach(), weight)
    nn.functional.linear(x, weight).sum().backward()  # what inference kept has no marks of it
    weight.t().zero_(), weight.view(-1).add_(1), weight[0].zero_()  # copies, as without a cache
    assert (
        torch.equal(weight + 0, dense)
        and torch.equal(weight.unpacked(), dense)
        and cache.nbytes == dense.nbytes
    )
    weight.unpacked().zero_(), cache.tensors[0].zero_()
    assert torch.equal(weight + 0, dense)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("cached", [False, True])
def test_views_of_packed_weights(mode, cached):
    weight, dense = packed(draw(32, 16))
    if cached:
        form = replace(weight.data.form, cache=Cache(1 << 20))  # pyright: ignore
        weight = nn.Parameter(weight.data.like(form), requires_grad=False)  # pyright: ignore
    x = draw(2, 16)
    with mode():
        for view in (
            lambda w: w.t(), lambda w: w[3:5], lambda w: w.view(16, 32), lambda w: w.reshape(-1),
            lambda w: w[None].expand(3, -1, -1), lambda w: w.unsqueeze(0), lambda w: w.chunk(2)[1],
            lambda w: x @ w.mT, lambda w: w.flatten().sum(), lambda w: torch.cat([w, w]),
        ):  # fmt: skip
            assert torch.equal(view(weight), view(dense))


def test_a_cache_of_wrong_size_is_refused(tmp_path):
    for wrong in (
        {"cache": 3},
        {"cache": -1, "resident": "packed"},
        {"cache": "a lot", "resident": "packed"},
    ):
        with pytest.raises(
            PlanError,
            match="`cache` must be a number of bytes or a size such as 50MB, beside `resident`, found",
        ):
            surgery.load(tmp_path, **wrong)  # pyright: ignore


@pytest.mark.parametrize("way", [None, *WAYS])
def test_some_members_are_read_alone(way, tmp_path):
    folder = surgery.save(fitted(), tmp_path / "joint")
    wanted = surgery.load(folder, modules=modules())["one"](draw(2, 8))
    lent = [entry for entry in surgery.artifact.folder.read_manifest(folder).same_of("one").values()]
    assert not lent
    for path in (folder / "members" / "two").glob("*"):
        path.unlink()
    alone = surgery.load(folder, modules={"one": modules()["one"]}, members=["one"], resident=way)
    assert torch.equal(alone["one"](draw(2, 8)), wanted) and [*alone.names] == ["one"]


def test_advice_of_cudnn_is_kept_from_whoever_runs_packed_layers(monkeypatch):
    """On a GPU each call of a recurrent layer asks for `flatten_parameters`, which packed ones have none of."""

    def layer(weight):
        warnings.warn("RNN module weights are not part of single contiguous chunk of memory.", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return weight

    weight = PackedWeight(
        Form({"": encode(torch.ones(8, 8), Precision.parse("int4/8"))}), (8, 8), torch.float32
    )
    monkeypatch.setattr(packing, "_RECURRENT", {layer})
    with pytest.warns(UserWarning) as said:
        PackedWeight.__torch_function__(layer, (PackedWeight,), (weight,))
    assert [str(each.message) for each in said] == ["something else"]
