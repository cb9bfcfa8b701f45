"""Where the tests, their data and the repository are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS, DATA = ROOT / "docs", ROOT / "tests" / "data"
