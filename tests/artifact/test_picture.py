"""The picture of a model card: of many members the largest and the mean of all others are drawn."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from surgery.artifact.picture import MOST, draw_sharing, fold
from surgery.artifact.shares import ROWS, Shares


def shares(count: int) -> Shares:
    """Members of 1000, 990, ... bytes before, a tenth of that now, on rows that all of them use."""
    names = tuple(f"m{i}" for i in range(count))
    before = {name: 1000 - 10 * i for i, name in enumerate(names)}
    kinds = {name: {ROWS: before[name] // 10} for name in names}
    blocks = tuple(tuple(0 if i == j else 40 for j in range(count)) for i in range(count))
    return Shares(names, kinds, before, blocks)


def test_others_are_drawn_by_their_mean_so_that_bars_can_be_compared():
    folded = fold(shares(MOST + 2))
    *large, others = folded.members
    assert large == [f"m{i}" for i in range(MOST - 1)]
    assert others == "mean of 3 others"
    assert folded.before[others] == 900
    assert folded.after[others] == 90
    assert folded.blocks[-1][0] == 40
    assert folded.blocks[-1][-1] == round(40 * 6 / 9)


def test_few_members_are_drawn_one_by_one():
    assert fold(shares(MOST)) == shares(MOST)


@pytest.mark.parametrize("count", [1, 2, MOST + 2])
def test_the_same_numbers_give_the_same_picture(count: int):
    first = draw_sharing(shares(count))
    assert first == draw_sharing(shares(count))
    picture = Image.open(io.BytesIO(first)).convert("RGB")
    channels = (each.tobytes() for each in picture.split())
    assert min(abs(r - 213) + abs(g - 94) + b for r, g, b in zip(*channels, strict=True)) < 40  # bars of rows
