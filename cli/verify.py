"""`surgery verify`: whether a folder is what its manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Json, Quiet

EXAMPLES = """
surgery verify joint
surgery verify joint --json
"""


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that surgery wrote.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rebuild each member of a folder, and compare it with its origin and the recorded hashes.

    Ends with exit code 1 where something does not match.
    """
    raise NotImplementedError
