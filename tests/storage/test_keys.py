"""Storage keys: text there and back for every name, and artifacts whose names look like keys themselves."""

from __future__ import annotations

import pytest
import torch
from artifacts import member, stack
from hypothesis import given
from hypothesis import strategies as st
from nets import assert_same_bits
from torch import nn

import surgery
from surgery.storage.keys import PartKey, PlainKey, StateKey, of_owner, parse_key, piece_name
from surgery.storage.stored import store

NAMES = st.text(max_size=12) | st.text("/:.%2F5é\N{SNOWMAN}", max_size=8)
ODD = ("plain/one/x", "bank/one/psi", "a:scale", "a", "50%2F", "…/:", " ")
"""Parameters of a module may be called anything without a dot."""


@given(NAMES, NAMES)
def test_text_comes_back_as_the_key_that_it_was_made_of(owner: str, name: str):
    for key in (PlainKey(owner, name), PartKey(owner, name)):
        assert parse_key(str(key)) == key and hash(parse_key(str(key))) == hash(key)
    assert PartKey.of_file(PartKey(owner, name).in_file) == PartKey(owner, name)
    assert PlainKey(owner, name) != PartKey(owner, name)


@given(st.tuples(NAMES, NAMES, st.booleans()), st.tuples(NAMES, NAMES, st.booleans()))
def test_two_keys_have_two_texts_and_one_order(one: tuple, other: tuple):
    a, b = ((PlainKey if plain else PartKey)(owner, name) for owner, name, plain in (one, other))
    assert (str(a) == str(b)) == (a == b)
    assert sorted([a, b]) == sorted([b, a])


KINDS = ("bank", "member", "optimizer", "loss", "random", "contest", "method", "extra", "running", "identity")


@given(st.sampled_from(KINDS), NAMES, st.none() | NAMES, st.booleans())
def test_keys_of_a_run_s_state_come_back_from_their_text(
    kind: str, owner: str, name: str | None, model: bool
):
    name = None if kind in ("extra", "running", "identity") else name
    key = StateKey(kind, owner, name, model)
    assert StateKey.parse(str(key)) == key
    assert str(key) == f"{'model/' * model}{kind}/{owner}" + f"/{name}" * (name is not None) or {*"/%"} & {
        *owner
    }


@given(NAMES | st.tuples(st.sampled_from(KINDS), NAMES).map("/".join), st.booleans())
def test_any_text_of_a_state_stays_what_it_is(text: str, model: bool):
    """Also that of other versions, but for signs that never stand in an owner."""
    text = f"{'model/' * model}{text}"
    assert str(StateKey.parse(text)) == text or "%" in text


def test_the_names_in_a_state_are_those_of_earlier_versions():
    found = [
        StateKey("bank", "16x16-float32", "rows", model=True), StateKey("member", "a", "0.weight", model=True),
        StateKey("extra", "a", model=True), StateKey("optimizer", "3", "exp_avg"), StateKey("loss", "0", "x.y"),
        StateKey("running", "mood"), StateKey("random", "0", "numpy"), StateKey("random", "evolution"),
        StateKey("contest", "8x8-float32", "soft"), StateKey("identity", "8x8-float32"),
        StateKey("method", "gates", "drawn"),
    ]  # fmt: skip
    assert [str(key) for key in found] == [
        "model/bank/16x16-float32/rows", "model/member/a/0.weight", "model/extra/a", "optimizer/3/exp_avg",
        "loss/0/x.y", "running/mood", "random/0/numpy", "random/evolution", "contest/8x8-float32/soft",
        "identity/8x8-float32", "method/gates/drawn",
    ]  # fmt: skip
    entries = {key: n for n, key in enumerate(found)}
    assert (
        of_owner(entries, "optimizer", 3) == {"exp_avg": 3}
        and of_owner(entries, "bank", "16x16-float32") == {}
    )


@pytest.mark.parametrize("text", ["", "plain", "plain/a", "other/a/b", "bank/a", "/plain/a/b"])
def test_what_is_no_key_is_refused(text: str):
    with pytest.raises(ValueError, match="storage key"):
        parse_key(text)


def test_pieces_have_names_of_their_own():
    assert [piece_name("a.b", piece) for piece in ("", "scale")] == ["a.b", "a.b:scale"]


class Odd(nn.Module):
    """A parameter and a buffer under every odd name."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(8, 8)
        for number, name in enumerate(ODD):
            self.register_parameter(name, nn.Parameter(torch.full((200,), float(number))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x) * sum(getattr(self, name).mean() for name in ODD)


def test_names_that_look_like_keys_are_saved_and_loaded(tmp_path):
    one, twin, other = Odd(), Odd(), stack()
    twin.load_state_dict(one.state_dict())
    x = torch.zeros(2, 8)
    joint = surgery.join(
        [member(one, "one", x), member(twin, "twin", x), member(other, "other", x)], block=(8, 8)
    )
    expected = {name: joint.collapse(name) for name in joint.names}
    assert {key.name for key in store(joint).aliases} == {*ODD}
    surgery.save(joint, tmp_path / "joint")
    again = surgery.load(tmp_path / "joint", modules={"one": Odd(), "twin": Odd(), "other": stack()})
    for name in joint.names:
        assert_same_bits(again.collapse(name), expected[name])
    only = surgery.load(tmp_path / "joint", modules={"twin": Odd()}, members=["twin"])
    assert_same_bits(only.collapse("twin"), expected["twin"])
