"""Codecs: laws that hold for every one of them, and one that is added from outside, as docs/add_a_codec.md has it."""

from __future__ import annotations

import re
from pathlib import Path

import artifacts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DOCS

import surgery
from surgery.artifact.picture import draw_sharing
from surgery.artifact.shares import count_shares
from surgery.errors import ArtifactError
from surgery.page.overview import look
from surgery.page.render import render
from surgery.storage.codecs import (
    BFLOAT16,
    CODECS,
    NATIVE,
    Precision,
    as_dtype,
    decode,
    encode,
    grouped,
    part_layout,
    register,
    take_rows,
)
from surgery.storage.keys import PlainKey
from surgery.storage.stored import store
from surgery.util.wording import size

PAGE = DOCS / "add_a_codec.md"
KEY = PlainKey("one", "2.weight")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(scope="module")
def page():
    """The page's blocks of code and the names that they define; its codecs are registered while these tests run."""
    if not PAGE.is_file():
        pytest.skip("docs are not part of an installed package")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    before, names = dict(CODECS), {}
    exec(blocks[0], names)
    yield blocks, names
    CODECS.clear()
    CODECS.update(before)


@pytest.fixture
def joint(page, tmp_path, monkeypatch):
    """Two members, a tensor of the first stored by the page's codec, saved as `joint`."""
    monkeypatch.chdir(tmp_path)
    blocks, names = page
    x = torch.zeros(2, 8)
    one, two = (artifacts.seeded(artifacts.stack, seed) for seed in (1, 2))
    names["joint"] = surgery.join([artifacts.member(one, "one", x), artifacts.member(two, "two", x)])
    exec(blocks[1], names)
    return names["joint"]


def test_a_codec_from_outside_is_saved_and_loaded_bit_for_bit(joint):
    stored = store(joint)
    assert str(stored.tensors[KEY].precision) == "signs"
    again = surgery.load("joint", modules=artifacts.modules())
    for name in joint.names:
        one, other = joint.collapse(name), again.collapse(name)
        assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)
    assert len(joint.collapse("one")["2.weight"].abs().unique(dim=1)[0]) == 1
    surgery.save(again, "again")
    assert artifacts.contents(Path("again")) == artifacts.contents(Path("joint"))
    report = surgery.verify("joint", modules=artifacts.modules())
    assert not report.files and all(check.rebuilt for check in report.members)


def test_a_codec_from_outside_is_exported_and_shown(joint):
    surgery.export(joint, "one", "small", format="compressed")
    small = surgery.load("small", modules={"one": artifacts.modules()["one"]})
    assert torch.equal(small.collapse("one")["2.weight"], joint.collapse("one")["2.weight"])
    html = render(look("joint"))
    assert "signs" in html and 'class="other"' in html
    shares = count_shares(store(joint))
    assert shares.kinds["one"]["signs"] == 32 * 4 + 32 * 4
    assert f"| {size(shares.after['one'])} |" in Path("joint/README.md").read_text()
    assert Path("joint/sharing.png").read_bytes() == draw_sharing(shares)


def test_what_no_codec_is_registered_for_is_named(joint, monkeypatch):
    monkeypatch.delitem(CODECS, "signs")
    with pytest.raises(
        ArtifactError,
        match=r"'signs' is not a precision: native, bfloat16, intB.*, mixed.* or huffman.* registers",
    ):
        surgery.load("joint", modules=artifacts.modules())
    with pytest.raises(ValueError, match="one of native, bfloat16, int, mixed, huffman, found 'signs'"):
        encode(torch.ones(2, 2), Precision("signs"))


def test_a_damaged_part_is_found_by_its_layout(joint):
    artifacts.rewrite(Path("joint"), lambda m: m["members"]["one"]["encoded"][0].__setitem__(2, [32, 40]))
    with pytest.raises(ArtifactError, match=r"must hold 2.weight:bits as torch.uint8 \(32, 5\)"):
        surgery.load("joint", modules=artifacts.modules())


def test_a_fit_tries_what_a_codec_offers(page, joint, monkeypatch):
    blocks, names = page
    exec(blocks[2], names)
    fitted_signs = names["FittedSigns"]()
    monkeypatch.setitem(CODECS, fitted_signs.name, fitted_signs)
    with torch.no_grad():  # what signs times a scale are exact for
        for name in ("2.weight", "4.weight"):
            weight = joint["two"].get_parameter(name)
            weight.copy_(weight.sign() * torch.linspace(0.05, 0.1, len(weight))[:, None].bfloat16().float())
    fresh = artifacts.member(joint.extract("two"), "two", torch.zeros(2, 8))
    fit = surgery.fit(surgery.join([fresh]), max_error=1e-3, seed=0)
    found = {key: str(each.precision) for key, each in store(fit).tensors.items()}
    assert found[PlainKey("two", "2.weight")] == found[PlainKey("two", "4.weight")] == "fitted_signs"
    assert all(error <= 1e-3 for error in fit.report.errors.values())


precisions = st.sampled_from(
    [NATIVE, BFLOAT16, *(grouped(b, g) for b in (2, 3, 7, 12) for g in (1, 5, 64)), Precision("signs")]
)
shapes = st.lists(st.integers(0, 9), max_size=4)


@given(shapes, precisions, st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.data())
@settings(max_examples=150, deadline=None)
def test_laws_of_every_codec(page, shape, precision, dtype, other, data):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    encoded = encode(x, precision)
    layout = {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts.items()}
    assert layout == part_layout(tuple(shape), dtype, precision)
    assert Precision.parse(str(precision)) == precision
    y = decode(encoded)
    assert (y.shape, y.dtype) == (x.shape, dtype) and y.untyped_storage().nbytes() == y.nbytes
    moved = as_dtype(encoded, other)
    assert (moved is None) == (encoded.precision.is_native and other != dtype)
    assert moved is None or (decode(moved).dtype, decode(moved).shape) == (other, x.shape)
    if len(shape) > 1 and x.numel():
        rows = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=5)))
        taken = take_rows(encoded, rows)
        assert torch.equal(decode(taken), y[rows]) and taken.shape == (len(rows), *shape[1:])
        alone = encode(x[rows], precision)
        assert all(torch.equal(part, alone.parts[name]) for name, part in taken.parts.items())


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("int4", "'int4' beside 'int'"),
        ("bf", "beside"),
        ("native", "beside"),
        ("A", "lower"),
        ("a/b", "lower"),
        ("", "lower"),
    ],
)
def test_names_that_would_be_ambiguous_are_refused(name, match):
    codec = type("Odd", (type(CODECS["bfloat16"]),), {"name": name})()
    with pytest.raises(ValueError, match=match):
        register(codec)
    assert list(CODECS)[:3] == ["native", "bfloat16", "int"] and not isinstance(CODECS["native"], type(codec))


def test_nothing_outside_the_room_asks_how_many_bits():
    root = Path(surgery.__file__).parent
    room = root / "storage" / "codecs"
    asked = re.compile(r"\bprecision\.(bits|group|settings\.)|\.bits (in|==|!=)|\bbits in \(0")
    outside = [p for p in root.rglob("*.py") if not p.is_relative_to(room)]
    assert [p.name for p in outside if asked.search(p.read_text(encoding="utf-8"))] == []
