"""The package is whole: a wheel has every module, and wheel and editable installs work outside the checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
from places import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = SETTINGS["tool"]["setuptools"]["package-dir"]
CHECK = """
import sys
import surgery, surgery_cli.__main__, surgery_recipes
from surgery.settings.documents import read_document, recipe_names
from surgery.settings.recipe import Recipe
from pathlib import Path
assert "torch" not in sys.modules
assert "demo" in recipe_names() and len(Recipe.of(read_document("demo")).models) == 2
assert (Path(surgery.__file__).parent / "py.typed").is_file()
assert all(getattr(surgery, name) is not None for name in surgery.__all__)
print(surgery.__file__)
"""


def test_demo_extra_pins_the_weights_that_the_demo_knows():
    from surgery_cli.demo_weights import EFFICIENTNET, MINILM

    pinned = {
        line.partition("==")[0]
        for line in SETTINGS["project"]["optional-dependencies"]["demo"]
        if "==" in line
    }
    assert {package.replace("_", "-") for package, _ in (MINILM, EFFICIENTNET)} == pinned


@pytest.fixture
def python(tmp_path):
    """The interpreter of a new environment that sees this one's libraries, but not this project."""
    venv.create(tmp_path / "venv", symlinks=True)
    site = next((tmp_path / "venv").rglob("site-packages"))
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a build reads: building leaves folders behind, and stale ones end up in wheels."""
    copy = tmp_path / "checkout"
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / file).is_file():
            shutil.copy(ROOT / file, copy)
    return copy


def run(*command, cwd):
    """Run without this process's environment, so that nothing leads back to the checkout."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(python, *what, cwd):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
    ]
    run(*pip, "--ignore-installed", *what, cwd=cwd)


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(python, checkout, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run(*build, "-w", tmp_path, checkout, cwd=tmp_path)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(FOLDERS)
    assert "surgery_recipes/demo.yaml" in names and "surgery/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {
        f"{package}/{p.relative_to(ROOT / f).as_posix()}"
        for package, f in FOLDERS.items()
        for p in (ROOT / f).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources
    install(python, wheel, cwd=tmp_path)
    assert str(tmp_path) in run(python, "-c", CHECK, cwd=tmp_path)
    assert run(python.parent / "surgery", "--version", cwd=tmp_path).startswith("surgery ")
    assert "surgery merge" in run(python, "-m", "surgery_cli", "merge", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_editable_install_works_outside_the_checkout(python, checkout, tmp_path):
    install(python, "-e", checkout, cwd=tmp_path)
    assert str(checkout) in run(python, "-c", CHECK, cwd=tmp_path)
    assert run(python.parent / "surgery", "--version", cwd=tmp_path).startswith("surgery ")
