"""The picture of a model card: of many members the largest and the mean of all others are drawn."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from PIL import Image, ImageColor
from relatives import family

import surgery
from surgery.artifact.picture import _FILLS, MOST, _draw_blocks, draw_sharing, fold
from surgery.artifact.shares import MATRIX, ROWS, Shares, count_shares
from surgery.core.sizes import count_tensors
from surgery.storage.stored import store
from surgery.util.drawing import new_figure


def shares(count: int) -> Shares:
    """Members of 1000, 990, ... bytes before, a tenth of that now, on rows that all of them use."""
    names = tuple(f"m{i}" for i in range(count))
    before = {name: 1000 - 10 * i for i, name in enumerate(names)}
    kinds = {name: {MATRIX: before[name] // 10} for name in names}
    blocks = tuple(tuple(0 if i == j else 40 for j in range(count)) for i in range(count))
    return Shares(names, kinds, before, blocks)


def test_others_are_drawn_by_their_mean_so_that_bars_can_be_compared():
    folded = fold(shares(MOST + 2))
    *large, others = folded.members
    assert large == [f"m{i}" for i in range(MOST - 1)]
    assert others == "mean of 3 others"
    mean = 1000 - 10 * MOST
    assert folded.before[others] == mean
    assert folded.after[others] == mean // 10
    assert folded.blocks[-1][0] == 40
    assert folded.blocks[-1][-1] == round(40 * 6 / 9)


def test_few_members_are_drawn_one_by_one():
    for count in (12, MOST):
        assert fold(shares(count)) == shares(count)


@pytest.mark.parametrize("own", [0, 7])
def test_a_member_shares_with_itself_only_where_blocks_do(own: int):
    given = shares(3)
    blocks = tuple(tuple(own if i == j else 0 for j in range(3)) for i in range(3))
    axes = new_figure(4, 4).subplots()
    _draw_blocks(axes, replace(given, blocks=blocks))
    assert [each.get_text() for each in axes.texts].count(str(own)) == (3 if own else 6)


@pytest.mark.parametrize("count", [1, 2, MOST + 2])
def test_the_same_numbers_give_the_same_picture(count: int):
    first = draw_sharing(shares(count))
    assert first == draw_sharing(shares(count))
    picture = Image.open(io.BytesIO(first)).convert("RGB")
    channels = (each.tobytes() for each in picture.split())
    assert min(abs(r - 213) + abs(g - 94) + b for r, g, b in zip(*channels, strict=True)) < 40  # bars of rows


def test_every_kind_keeps_its_colour_in_the_legend_and_the_page_is_white():
    widths = ("native", "bfloat16", "int12", "int10", "int8", "int7", "int6")
    widths = (ROWS, "shared copies", *widths)
    kinds = {MATRIX: 1000} | dict.fromkeys(widths, 1)  # too few bytes for a bar
    members = tuple(f"m{i}" for i in range(MOST))
    blocks = tuple(tuple(0 if i == j else 40 for j in range(MOST)) for i in range(MOST))
    drawn = draw_sharing(Shares(members, dict.fromkeys(members, kinds), dict.fromkeys(members, 1200), blocks))
    picture = Image.open(io.BytesIO(drawn)).convert("RGB")
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    found = picture.getcolors(1 << 24)
    assert isinstance(found, list)
    large = [colour for count, colour in found if count > 80]

    def nearest(fill: str) -> tuple[int, ...]:
        own = ImageColor.getrgb(fill)
        return min(large, key=lambda each: sum(abs(a - b) for a, b in zip(each, own, strict=True)))

    assert len({nearest(_FILLS[kind]) for kind in (MATRIX, *widths)}) == 1 + len(widths)


@pytest.mark.parametrize(
    ("target", "word"), [({"budget": 0.14}, "shared matrix"), ({"hypermodules": 20}, "shared rows")]
)
def test_kinds_are_called_as_the_screen_calls_them(target: dict, word: str):
    kept = store(surgery.fit(family(), **target))
    found = {kind for kinds in count_shares(kept).kinds.values() for kind in kinds}
    assert word in found and "dictionary" not in found
    assert word in {row.how for row in count_tensors(kept)}
