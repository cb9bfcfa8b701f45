"""Formats sizes, counts and fractions, alike on the screen, in cards and in pictures."""

from __future__ import annotations

import math


def sentence(text: str) -> str:
    """Text with the stop that ends a sentence, where it has none.

    Example:
        >>> sentence("known are mse, mae"), sentence("did you mean 'mse'?")
        ('known are mse, mae.', "did you mean 'mse'?")
    """
    return text if text.endswith((".", "?", "!")) else f"{text}."


def size(amount: float) -> str:
    """Bytes, in powers of ten.

    Example:
        >>> size(90_868_376), size(512), size(-2048)
        ('90.9 MB', '512 B', '-2.0 kB')
    """
    if amount < 0:
        return f"-{size(-amount)}"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < (999.5 if unit == "B" else 999.95):
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def more_than(value: float, limit: float, digits: int = 3) -> str:
    """A number in as many digits as it takes to see that it is above a limit.

    Args:
        value: above the limit.
        limit: of which the reader knows.
        digits: significant ones at least.

    Example:
        >>> more_than(0.20037, 0.2), more_than(0.5, 0.2)
        ('0.2004', '0.5')
    """
    for more in range(digits, 17):
        if float(text := f"{value:.{more}g}") > limit:
            return text
    return repr(value)


def rounded_up(value: float) -> float:
    """A number of two digits that is a little above a positive one.

    Example:
        >>> rounded_up(0.287), rounded_up(2.41e-05), rounded_up(0.9999)
        (0.29, 2.5e-05, 1.01)
    """
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step + 0.1) * step:.3g}")


def count(number: float) -> str:
    """A number of parameters.

    Example:
        >>> count(22_713_216), count(384)
        ('22.7M', '384')
    """
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= max(limit, 1e4):
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction in percent; what is not zero never reads as zero.

    Example:
        >>> percent(0.26), percent(0), percent(1e-7)
        ('26.0%', '0%', '<0.1%')
    """
    if fraction == 0:
        return "0%"
    smallest = 10.0**-digits
    return f"<{smallest:.{digits}f}%" if abs(fraction) * 100 < smallest else f"{fraction * 100:.{digits}f}%"
