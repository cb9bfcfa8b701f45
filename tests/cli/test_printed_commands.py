"""Every command in a help text, in the README and on a model card is one that the tool takes."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from places import ROOT
from surgery_cli.__main__ import app, with_values
from surgery_cli.train import with_added

from surgery.artifact.card import USE
from surgery.settings.documents import override, read_document, recipe_names
from surgery.settings.recipe import Recipe

COMMAND = typer.main.get_command(app)


def helps(command=COMMAND, path=()):
    """The examples below every verb's help."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from helps(inner, (*path, name))
    for line in (getattr(command, "epilog", None) or "").splitlines()[1:]:
        if line.strip():
            yield line.strip()


def pages():
    """Commands in code blocks of the README and of the docs, and in the installed recipes' comments."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield from block.replace("\\\n", " ").splitlines()
    for name in recipe_names():
        yield from re.findall(
            r"^# (surgery .*)$", (ROOT / "recipes" / f"{name}.yaml").read_text(), re.MULTILINE
        )


def commands(lines):
    """The tool's arguments in each of some lines of a shell."""
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if "surgery_cli" in words:
                yield words[words.index("surgery_cli") + 1 :]
            elif words[:1] == ["surgery"]:
                yield words[1:]


CARD = [line for line in USE.format(name="net", how="").splitlines() if line.startswith("surgery ")]
# Methods of the page on methods are not installed here: what tests of that page run.
EVERY = sorted(
    {shlex.join(words) for words in commands([*helps(), *pages(), *CARD]) if "low_rank" not in words}
)


@pytest.mark.parametrize("line", EVERY)
def test_a_printed_command_is_taken(line):
    words = [word for word in with_values(shlex.split(line)) if word != "--help"]
    context = COMMAND.make_context("surgery", list(words))
    name, verb, rest = COMMAND.resolve_command(context, [*context._protected_args, *context.args])
    if hasattr(verb, "commands"):
        inner = verb.make_context(name, rest, parent=context)
        name, verb, rest = verb.resolve_command(inner, [*inner._protected_args, *inner.args])
    taken = verb.make_context(name, rest, parent=context).params
    recipe = taken.get("config") if name == "merge" else taken.get("source") if name == "train" else None
    recipe = taken["name"] if name == "cp" else recipe
    if recipe and "/" not in recipe and not recipe.endswith(".yaml"):
        assert recipe in (*recipe_names(), "joint")
    if taken.get("changes"):
        base = (
            read_document(recipe) if recipe in recipe_names() else {"models": [{"model": "x"}], "train": {}}
        )
        if taken.get("add"):  # to a folder of two members
            two = {"models": [{"model": "x", "name": name} for name in "ab"], "train": {}}
            base = with_added(two, Path("joint"), taken["add"], True)
        Recipe.of(override(base, taken["changes"]))


def test_there_are_examples_of_every_verb():
    found = {line.split()[0] for line in EVERY}
    assert found == set(COMMAND.commands) and len(EVERY) > 30


def test_options_that_messages_name_exist():
    """`--word` in a string of the package is an option of a verb, or of a launcher that messages speak of."""
    known = {"--help", "--nproc-per-node", "--use_fsdp", "--mixed_precision", "--multi_gpu", "--no-deps"}
    waiting = [COMMAND]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        known |= {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    strange = set()
    for file in (*(ROOT / "surgery").rglob("*.py"), *(ROOT / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?<![\w-])--[a-z][a-z_-]+\b", node.value)
                strange |= {
                    f"{file.name}: {each}"
                    for each in named
                    if each not in known and not each.startswith("--fsdp_")
                }
    assert strange == set()


def test_a_card_says_how_members_are_loaded():
    from surgery.artifact.card import _use
    from surgery.artifact.manifest import OriginEntry

    kinds = {
        "a": ("module", "Net"),
        "b": ("factory", "mine.py:net"),
        "c": ("factory", "surgery_recipes.nets:lenet"),
    }
    cards = {n: OriginEntry(kind=kind, reference=text, architecture="") for n, (kind, text) in kinds.items()}
    assert 'surgery.load(".", modules={"a": ...}, trust_remote_code=True)' in _use(cards)
    assert 'surgery.load(".")' in _use({"c": cards["c"]})
