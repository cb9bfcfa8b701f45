"""Lists in messages: the first few and how many more there are, said by one function everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from artifacts import pair
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.artifact.manifest import read_manifest
from surgery.errors import ArtifactError, first_few, shorten

ROOT = Path(surgery.__file__).parents[1]


@given(st.lists(st.sampled_from("abc")), st.integers(1, 5), st.sampled_from([", ", "; "]))
def test_every_thing_is_named_or_counted(things: list[str], limit: int, separator: str):
    named = first_few(things, limit)
    counted = int(named[-1].split()[1]) if len(things) > limit else 0
    assert len(named) - bool(counted) + counted == len(things)
    text = shorten(things, limit, separator)
    assert text.count("and") == bool(counted) and not text.startswith(separator)
    assert len(re.findall(r"\b[abc]\b", text)) == min(len(things), limit)


def test_no_module_counts_the_rest_by_hand():
    by_hand = re.compile(r"and \{[^}]*\} more")
    files = [*ROOT.glob("surgery/**/*.py"), *ROOT.glob("cli/*.py"), *ROOT.glob("surgery_cli/*.py")]
    found = [path.name for path in files if by_hand.search(path.read_text()) and path.name != "errors.py"]
    assert files and found == []


def test_all_broken_rules_of_a_manifest_are_counted(tmp_path):
    surgery.save(pair(), tmp_path / "joint")
    text = (tmp_path / "joint" / "manifest.json").read_text()
    wrong = ", ".join(f'"x{number}": 1' for number in range(25))
    (tmp_path / "joint" / "manifest.json").write_text(text.replace("{", f"{{ {wrong},", 1))
    with pytest.raises(ArtifactError, match="and 15 more"):
        read_manifest(tmp_path / "joint")
