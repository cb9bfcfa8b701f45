"""Artifacts of relatives, made once for all that change them."""

from __future__ import annotations

import functools
import shutil

import pytest
import relatives
from artifacts import numbers


@pytest.fixture
def figures(monkeypatch):
    """In place of a picture, which takes longer than all else in these tests, the numbers that it is drawn from."""
    monkeypatch.setattr("surgery.artifact.writing.draw_sharing", numbers)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Artifacts of the same members by how they were made, each made when it is first asked for."""
    place = tmp_path_factory.mktemp("made")

    @functools.cache
    def make(how):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("surgery.artifact.writing.draw_sharing", numbers)
            return relatives.make_artifact(how, place / how)

    return make


@pytest.fixture
def joint(made, tmp_path):
    """A folder of its own, that of a family within a budget."""
    return shutil.copytree(made("budget"), tmp_path / "joint")
