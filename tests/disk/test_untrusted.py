"""Files and documents from elsewhere: what is refused, before it costs anything, and in how many words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from special_files import special

from surgery.disk.untrusted import (
    UnreadableError,
    is_regular,
    parse_json,
    parse_yaml,
    read_regular,
    regular_size,
    shown,
    shown_text,
)
from surgery.errors import LONGEST, PlanError, SurgeryError
from surgery.settings.documents import override, read_document
from surgery.settings.recipe import Recipe

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
MODEL = {"models": [{"model": "timm:resnet18"}]}


@pytest.mark.parametrize(
    ("kind", "said"),
    [("pipe", "a pipe"), ("folder", "a folder"), ("socket", "a socket"), ("device", "a device"),
     ("loop", "levels of symbolic links"), ("nothing", "does not exist")],
)  # fmt: skip
def test_only_regular_files_are_read(tmp_path, kind, said):
    path = special(kind, tmp_path / "file")
    assert not is_regular(path)
    for read in (lambda: read_regular(path, 100), lambda: regular_size(path)):
        with pytest.raises(UnreadableError, match=said):
            read()


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_regular(path, 100) == b"x" * 100 and regular_size(path) == 100
    with pytest.raises(UnreadableError, match="at most 99 bytes, but has 100"):
        read_regular(path, 99)
    os.truncate(path, 1 << 40)
    with pytest.raises(UnreadableError, match="has 1,099,511,627,776"):
        read_regular(path, 1 << 26)


def test_a_file_that_states_no_size_is_read_no_further_than_its_limit():
    with pytest.raises(UnreadableError, match="at most 3 bytes"):
        read_regular(Path("/proc/self/status"), 3)


@pytest.mark.parametrize(("text", "said"), [
    (BOMB, "aliases unfold to more"),
    ("a: &x [*x]", r"alias \*x for what is not there yet"),
    ("- " * 3000, "at most 64 levels"),
    ("[" * 3000 + "]" * 3000, "at most 64 levels|maximum nesting depth"),
    ("a: 1\nb: 2\na: 3", "'a' is there again in line 3"),
    ("a: {b: {c: 1, c: 2}}", "'c' is there again"),
    ("a: 2001-99-99", "cannot read: month"),
    ("a: " + "9" * 6000, "Exceeds the limit"),
    ("a: !!python/object/apply:os.system [x]", "no YAML"),
    ('a: "\\ud800"', "no YAML"),
    ("{[1]: 2}", "unhashable"),
])  # fmt: skip
def test_yaml_within_bounds(text, said):
    with pytest.raises(UnreadableError, match=said) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("text", "said"), [
    ("[" * 100_000, "at most 64 levels"),
    ("[" * 70 + "]" * 70, "at most 64 levels"),
    ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there more than once"),
    ("[NaN]", "finite numbers, but holds NaN"),
    ("[-Infinity]", "holds -Infinity"),
    ("[1e999]", "too large for a float"),
    ("9" * 6000, "Exceeds the limit"),
    (b"\xff", "not UTF-8 at byte 0"),
    (b"\xef\xbb\xbf{}", "byte order mark"),
    ('"\\ud800"', "surrogate"),
    ('{"a":', "no JSON"),
    ("", "no JSON"),
])  # fmt: skip
def test_json_within_bounds(text, said):
    with pytest.raises(UnreadableError, match=said) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 400


def test_documents_of_others_may_hold_what_python_writes():
    assert parse_json('{"a": Infinity, "a": 1}', finite=False, unique=False) == {"a": 1}
    assert parse_yaml("{<<: {b: 1}, b: 2, c: &x [1], d: *x}") == {"b": 2, "c": [1], "d": [1]}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(values)
def test_what_is_shown_is_short_and_printable(value):
    text = shown(value)
    assert len(text) < 250 and text.isprintable()


def test_what_is_shown_of_anything_large():
    assert shown(10**6000) == "a number of about 6,000 digits"
    assert len(shown("x" * 10**7)) < 100 and len(shown([["y" * 1000] * 1000] * 1000)) < 250
    assert shown_text("a\x1b[31m\ud800") == "a\\x1b[31m\\ud800"


@given(st.integers(LONGEST + 1, 10 * LONGEST))
def test_errors_keep_their_beginning_and_their_end(length):
    text = ("0123456789" * length)[:length]
    said = str(SurgeryError(text))
    assert len(said) <= LONGEST + 20 and said.startswith(text[:1000]) and said.endswith(text[-500:])
    assert str(SurgeryError(text[:LONGEST])) == text[:LONGEST]


@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_a_recipe_that_is_no_file(tmp_path, kind):
    with pytest.raises(PlanError, match=r"recipe .*file (must be a regular file|cannot be read)"):
        read_document(special(kind, tmp_path / "file"))


@pytest.mark.parametrize(
    "text", [BOMB, "models: &x [*x]", "models: 1\nmodels: 2", "seed: " + "9" * 6000, "\0"]
)
def test_a_recipe_that_is_no_document(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(PlanError) as caught:
        read_document(tmp_path / "recipe.yaml")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(("changes", "said"), [
    ({"parameters": {"context": 10**59}}, "parameters.context: .*65536, found a number of about 59 digits"),
    ({"settings": {"templates": 10**59}, "method": "templates"}, "settings.templates"),
    ({"parameters": {"block": f"{10**59}x1"}}, "parameters.block"),
    ({"parameters": {"max_error": float("inf")}}, "parameters.max_error"),
    ({"seed": 2**32}, "seed: .*4294967295"),
    ({"train": {"steps": 2**31}}, "train.steps"),
    ({"train": {"evolution": {"power": float("nan")}}}, "train.evolution.power"),
    ({"models": [{"model": "x" * 10**6, "name": ["y" * 10**6] * 9}] * 1000}, "and 980 more"),
    ({"k" * 10**6: 1}, "is not a known key"),
    ({"models": {"a": 1}}, "models"),
])  # fmt: skip
def test_a_recipe_of_impossible_values(changes, said):
    with pytest.raises(PlanError, match=said) as caught:
        Recipe.of({**MODEL, **changes})
    assert len(str(caught.value)) <= LONGEST + 20


def test_a_change_that_is_no_yaml_is_text():
    assert override(MODEL, ["out=[*x"])["out"] == "[*x"
