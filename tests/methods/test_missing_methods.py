"""An artifact that names a method that is not there, or whose package is broken: one error, and nothing is imported."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from artifacts import modules, pair, rewrite

import surgery
from surgery.errors import MissingMethodError
from surgery.settings import methods

MARK = "raise RuntimeError('it ran')\n"


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact whose banks name a method; a file of the same name lies in the working directory."""
    surgery.save(pair(), tmp_path / "joint")
    rewrite(tmp_path / "joint", lambda m: [bank.update(method="unheard_of") for bank in m["banks"].values()])
    (tmp_path / "unheard_of.py").write_text(MARK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "joint"


def test_a_method_that_is_not_installed_is_named_and_nothing_is_imported(named: Path):
    words = "Bank 8x8-float32 of .* needs method 'unheard_of', which generates its blocks and is not installed here: "
    words += "install the package that offers it .* group surgery.methods"
    with pytest.raises(MissingMethodError, match=words):
        surgery.load(named, modules=modules())
    checked = surgery.verify(named)
    assert not checked.ok and all("unheard_of" in str(check.reasons) for check in checked.members)
    assert "unheard_of" not in sys.modules


def test_a_package_that_cannot_be_imported_is_an_error_too(named: Path, monkeypatch: pytest.MonkeyPatch):
    point = EntryPoint("unheard_of", "unheard_of:Own", methods.ENTRY_POINTS)
    monkeypatch.setattr(methods, "installed", lambda: {"unheard_of": point})
    with pytest.raises(
        MissingMethodError, match="needs unheard_of:Own, which cannot be imported: RuntimeError: it ran"
    ):
        surgery.load(named, modules=modules())
    assert "it ran" in str(surgery.verify(named).members[0].reasons)
