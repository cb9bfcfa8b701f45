"""Alphabets: letters of twenty scripts, each drawn twenty times with different fonts, turned, stretched and bent.

In place of Omniglot, whose drawings no package registry has: fonts of Debian's fonts-noto-core, upright and bold, with
and without serifs. A task is one script, whose letters are told apart.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.errors import LoadError, PlanError
from surgery.training.tasks.streams import Batches

from .packages import find_files

SCRIPTS = {
    "armenian": (0x0561, 0x0587, 1),
    "bengali": (0x0985, 0x09B9, 1),
    "cyrillic": (0x0430, 0x044F, 1),
    "devanagari": (0x0905, 0x0939, 1),
    "ethiopic": (0x1200, 0x1350, 8),  # the first form of each consonant
    "georgian": (0x10D0, 0x10F0, 1),
    "greek": (0x03B1, 0x03C9, 1),
    "gujarati": (0x0A85, 0x0AB9, 1),
    "gurmukhi": (0x0A05, 0x0A39, 1),
    "hebrew": (0x05D0, 0x05EA, 1),
    "kannada": (0x0C85, 0x0CB9, 1),
    "khmer": (0x1780, 0x17B3, 1),
    "lao": (0x0E81, 0x0EAE, 1),
    "latin": (0x0061, 0x007A, 1),
    "malayalam": (0x0D05, 0x0D39, 1),
    "myanmar": (0x1000, 0x102A, 1),
    "sinhala": (0x0D85, 0x0DC6, 1),
    "tamil": (0x0B85, 0x0BB9, 1),
    "telugu": (0x0C05, 0x0C39, 1),
    "thai": (0x0E01, 0x0E2E, 1),
}
"""By script, the first and last code point of its letters, and the distance between those that are taken."""

LETTERS, DRAWINGS = 30, 20  # letters of a script at most; drawings of a letter
HELD, TESTED = 4, 6  # drawings of a letter for validation and for test
# Pixels of a drawing before it is made smaller, of its ink at most, of the font.
CANVAS, INK, SIZE = (112, 80, 64)
MEAN, DEVIATION = 0.077, 0.23  # of the drawings, in [0, 1]
SHARED = ("cyrillic", "greek", "latin")  # scripts that have one file together


def alphabet(
    script: str = "latin",
    batch: int = 16,
    seed: int = 0,
    side: int = 28,
    letters: int = LETTERS,
    folder: str | None = None,
) -> dict[str, Any]:
    """Batches of pictures `[B, 1, side, side]` and letters `[B]`.

    Half of the drawings of each letter are for training, a fifth for validation and three tenths for test, by chance
    but the same in every run.

    Args:
        script: one of `SCRIPTS`.
        batch: drawings in a batch.
        seed: of the order.
        side: of a picture.
        letters: of the script that are told apart, the first ones that all fonts have, at most so many.
        folder: with the fonts; the user's cache by default.

    Raises:
        LoadError: where fonts are missing or are not what they should be.
        PlanError: for a script that is not known, or another number of letters than it can be.
    """
    if script not in SCRIPTS:
        raise PlanError(f"The script must be one of {', '.join(SCRIPTS)}, found '{script}'.")
    if not 2 <= letters <= LETTERS:
        raise PlanError(f"Letters must be from 2 to {LETTERS}, found {letters}.")
    name = "" if script in SHARED else script.capitalize()
    paths = {path.name: path for path in find_files("alphabets", folder)}
    fonts = [
        paths[f"Noto{kind}{name}-{face}.ttf"] for kind in ("Sans", "Serif") for face in ("Regular", "Bold")
    ]
    pictures, which = drawn(script, tuple(fonts), side)
    order = torch.rand(len(pictures), generator=_generator(script, 1)).view(-1, DRAWINGS).argsort(1)[:letters]
    rows = (order + torch.arange(len(order)).unsqueeze(1) * DRAWINGS).split(
        (DRAWINGS - HELD - TESTED, HELD, TESTED), 1
    )
    return {
        part: Batches(pictures[use.flatten()], which[use.flatten()], batch, part == "train", seed)
        for part, use in zip(("train", "validation", "test"), rows, strict=True)
    }


@lru_cache(maxsize=len(SCRIPTS))
def drawn(script: str, fonts: tuple[Path, ...], side: int) -> tuple[Tensor, Tensor]:
    """Drawings `[letters * 20, 1, side, side]` of a script, and their letters."""
    glyphs = _glyphs(script, fonts)  # [letters, fonts, CANVAS, CANVAS]
    count = len(glyphs)
    which = torch.arange(DRAWINGS) % len(fonts)
    pictures = glyphs[:, which].flatten(0, 1).unsqueeze(1)
    bent = F.grid_sample(pictures, _places(len(pictures), _generator(script, 0)), align_corners=False)
    small = F.interpolate(bent, (side, side), mode="area")
    return (small - MEAN) / DEVIATION, torch.arange(count).repeat_interleave(DRAWINGS)


def _generator(script: str, what: int) -> torch.Generator:
    return torch.Generator().manual_seed(2 * list(SCRIPTS).index(script) + what)


def _glyphs(script: str, fonts: tuple[Path, ...]) -> Tensor:
    """Letters that all fonts have, in the middle of canvases `[letters, fonts, CANVAS, CANVAS]`, from 0 to 1."""
    from PIL import ImageFont

    first, last, apart = SCRIPTS[script]
    points = [chr(n) for n in range(first, last + 1, apart) if unicodedata.category(chr(n)) in ("Lo", "Ll")]
    try:
        faces = [ImageFont.truetype(str(path), SIZE, layout_engine=ImageFont.Layout.BASIC) for path in fonts]
    except OSError as error:
        raise LoadError(
            f"{', '.join(map(str, fonts))} must be fonts, but reading them says: {error}"
        ) from error
    lacking = [_ink(face, "\u0378") for face in faces]  # no letter: what a font shows for what it lacks
    found = []
    for point in points:
        inks = [_ink(face, point) for face in faces]
        if all(ink.numel() and not _same(ink, none) for ink, none in zip(inks, lacking, strict=True)):
            found.append(torch.stack([_centred(ink) for ink in inks]))
    if len(found) < 2:
        raise LoadError(f"The fonts of {script} must have its letters, found {len(found)}.")
    return torch.stack(found[:LETTERS])


def _ink(face: Any, text: str) -> Tensor:
    """What a font draws `[H, W]`, from 0 to 1."""
    mask = face.getmask(text)
    wide, high = mask.size
    return (
        torch.frombuffer(bytearray(bytes(mask)), dtype=torch.uint8).view(high, wide).float() / 255
        if wide * high
        else torch.zeros(0)
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _centred(ink: Tensor) -> Tensor:
    """Ink in the middle of a canvas, made smaller where it is too large."""
    high, wide = ink.shape
    if (most := max(high, wide)) > INK:
        high, wide = max(1, high * INK // most), max(1, wide * INK // most)
        ink = F.interpolate(ink[None, None], (high, wide), mode="area")[0, 0]
    top, left = (CANVAS - high) // 2, (CANVAS - wide) // 2
    return F.pad(ink, (left, CANVAS - wide - left, top, CANVAS - high - top))


def _places(count: int, generator: torch.Generator) -> Tensor:
    """Where the pixels of drawings come from `[N, CANVAS, CANVAS, 2]`: turned, stretched, slanted, moved and bent."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    turn, slant = between(-0.25, 0.25), between(-0.2, 0.2)
    wide, high = between(0.75, 1.15), between(0.75, 1.15)
    rows = [
        torch.stack([turn.cos() * wide, (slant - turn.sin()) * high, between(-0.1, 0.1)], -1),
        torch.stack([turn.sin() * wide, turn.cos() * high, between(-0.1, 0.1)], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, CANVAS, CANVAS], align_corners=False)
    bends = 0.06 * torch.randn(count, 2, 5, 5, generator=generator)
    wave = F.interpolate(torch.eye(5)[None, None], (CANVAS, 5), mode="bicubic", align_corners=True)[0, 0]
    return grid + (wave @ bends @ wave.t()).permute(0, 2, 3, 1)
