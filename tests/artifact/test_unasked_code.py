"""Nothing runs and nothing is opened because an artifact names it: hostile artifacts of every kind, every verb.

A process of its own installs an audit hook and then does with each artifact what a user would do with one from
elsewhere. The hook sees what Python itself sees: code that is compiled or executed from outside of the environment,
imports, sockets, subprocesses and files that are opened.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from artifacts import rewrite
from command_line import surgery as command
from processes import Started, forks
from surgery_cli import console
from surgery_cli.__main__ import app, main
from surgery_recipes import SHIPPED
from torch import nn
from typer.testing import CliRunner

import surgery
from surgery.errors import ConsentError, LoadError, SurgeryError
from surgery.members.origins.factory import find_function
from surgery.members.origins.transformers_parts import check_parts
from surgery.members.references import load_member
from surgery.permission import Permission
from surgery.pipeline.train import train_recipe
from surgery.settings.recipe import Recipe
from surgery.training.tasks.sources import check_sources

EVIL = """
from pathlib import Path
Path({ran!r}).touch()
import torch
def make(**options):
    Path({ran!r}).touch()
    layers = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)
    for layer in layers:
        torch.nn.init.constant_(layer.weight, 0.1)
        torch.nn.init.constant_(layer.bias, 0.1)
    return torch.nn.Sequential(*layers), (torch.zeros(2, 8),)
def data(**options):
    Path({ran!r}).touch()
    return [(torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))]
"""


def drive(cases: dict[str, list[list[str]]], outside: list[str], place: str, out: str) -> None:
    """Run every command of every case, and write what was seen of each; for a process of its own, which it changes.

    Args:
        cases: lists of arguments by name.
        outside: files and folders that nothing may touch.
        place: the working directory, and the last place to import from.
        out: where to write.
    """
    home = Path(out).parent / "home"
    home.mkdir()
    os.chdir(place)
    sys.path[:] = [path for path in sys.path if path not in ("", place)] + [place]
    os.environ.clear()
    os.environ.update({"PATH": "/usr/bin:/bin", "HOME": str(home), "OMP_NUM_THREADS": "1"})
    outside, seen = [os.path.realpath(root) for root in outside], []

    def inside(path):
        real = os.path.realpath(os.fspath(path) if not isinstance(path, bytes) else os.fsdecode(path))
        return not any(real == root or real.startswith(root + os.sep) for root in outside)

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            if not inside(arguments[0]):
                seen.append(f"{event} {arguments[0]}")
        elif event in ("exec", "compile"):
            name = getattr(arguments[0], "co_filename", None) if event == "exec" else arguments[1]
            if isinstance(name, (str, bytes)) and not os.fsdecode(name).startswith("<") and not inside(name):
                seen.append(f"{event} {name}")
        elif event == "import" and arguments[1] and not inside(arguments[1]):
            seen.append(f"import {arguments[0]}")
        elif event.startswith(
            ("socket.connect", "socket.getaddrinfo", "subprocess.", "os.system", "os.exec", "os.posix_spawn",
             "os.spawn", "os.fork", "pickle.find_class", "webbrowser")
        ):  # fmt: skip
            seen.append(f"{event} {arguments}")

    sys.addaudithook(hook)
    found = {}
    for name, verbs in cases.items():
        for verb in verbs:
            seen.clear()
            error = CliRunner().invoke(app, verb).exception
            fault = error is not None and not isinstance(error, (SurgeryError, SystemExit))
            found[f"{name}: {' '.join(verb)}"] = {"seen": list(seen), "fault": repr(error) if fault else None}
    Path(out).write_text(json.dumps(found))


REFERENCES = (
    "{evil}/evil.py:make", "{evil}/evil.py:make?x=1", "evil:make?x=1", "os:system?command=touch%20{ran}",
    "surgery_recipes.zoo/evil.py:make", "surgery_recipes.fetch:fetch?name=mnist", "timm:resnet18={evil}/weights.pth",
    "timm:resnet18?checkpoint_path={evil}/weights.pth", "{evil}", "org/name@main", "timm/resnet18.a1_in1k",
    "hf-hub:org/name",
)  # fmt: skip
KINDS = ("timm", "transformers", "factory")
DATA = ("{evil}/evil.py:data", "evil:data", "surgery_recipes.zoo/evil.py:data", "datasets:org/name", "{evil}/data.npz",
        "surgery_recipes.fetch:main", "os:listdir")  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder that no verb may open, and artifacts of a transformers, a timm and a factory member."""
    from tiny_transformers import save_tiny

    root = tmp_path_factory.mktemp("unasked")
    evil, ran = root / "evil", root / "ran"
    (evil / "surgery_recipes.zoo").mkdir(parents=True)
    for file in (evil / "evil.py", evil / "surgery_recipes.zoo" / "evil.py"):
        file.write_text(EVIL.format(ran=str(ran)))
    torch.save({"a": Path}, evil / "weights.pth")
    (evil / "config.json").write_text(
        '{"model_type": "x", "auto_map": {"AutoConfig": "evil.A", "AutoModel": "evil.B"}}'
    )
    made = root / "made"
    nets = {
        "timm": load_member("timm:test_vit?pretrained=false", name="net"),
        "transformers": load_member(str(save_tiny("bert", root / "bert")), name="net"),
        "factory": load_member("surgery_recipes.isometric:vit?layers=2&width=16&heads=2", name="net"),
    }
    for kind, member in nets.items():
        surgery.save(surgery.join([member]), made / kind, recipe={"models": [{"model": "x", "name": "net"}]})
    return {"root": root, "evil": evil, "ran": ran, "made": made}


def hostile(places: dict[str, Path]) -> dict[str, list[list[str]]]:
    """Copies of the artifacts, each with one hostile text, and the verbs to try on it."""
    import shutil

    words = {"evil": str(places["evil"]), "ran": str(places["ran"])}
    made: dict[str, list[list[str]]] = {}

    def add(name: str, kind: str, change, recipe: dict | None = None) -> None:
        folder = places["root"] / "hostile" / name
        shutil.copytree(places["made"] / kind, folder)
        if recipe is not None:
            _replace(folder, "recipe.yaml", json.dumps(recipe).encode())
        if change is not None:
            rewrite(folder, change)
        out = str(places["root"] / "out" / name)
        verbs = [
            ["verify", str(folder)],
            ["export", str(folder), "--member", "net", "--out", f"{out}-plain"],
            ["evaluate", str(folder)],
        ]
        if not name.startswith(("origin-transformers", "origin-factory")):  # how a run starts knows no kinds
            verbs.append(
                ["train", str(folder), "--out", f"{out}-new", "--fast-dev-run", "--cpu", "--resume", "auto"]
            )
        if name.startswith("data"):
            verbs.append(["report", str(folder)])
        if name.startswith(("recipe", "data")):
            verbs.append(["train", str(folder), "--dry-run"])
        if name in ("recipe-model-0", "recipe-model-2", "recipe-model-4", "data-0", "data-1", "data-2"):
            file = str(folder / "recipe.yaml")
            verbs.append(["train", file, "--out", f"{out}-again", "--cpu"])
            verbs.append(["merge", "--config", file, "--out", f"{out}-merged"])
        made[name] = verbs

    def origin(**fields):
        return lambda manifest: manifest["members"]["net"]["origin"].update(fields)

    task = {"data": "surgery_recipes.mnist:mnist", "options": {"folder": words["evil"]}}
    for number, reference in enumerate(text.format(**words) for text in REFERENCES):
        model = {"model": reference, "name": "net", "tasks": [{"data": "surgery_recipes.synthetic:data"}]}
        for kind in KINDS:
            add(f"origin-{kind}-{number}", kind, origin(reference=reference), {"models": [model]})
            if kind != KINDS[number % len(KINDS)]:  # all verbs with one kind, loading with each
                made[f"origin-{kind}-{number}"] = made[f"origin-{kind}-{number}"][:2]
        add(f"recipe-model-{number}", "transformers", None, {"models": [{**model, "tasks": [
            {"data": "surgery_recipes.synthetic:data", "loss": "distillation"}]}], "train": {}})  # fmt: skip
    for number, data in enumerate(text.format(**words) for text in DATA):
        model = {"model": "x", "name": "net", "tasks": [{"data": data}]}
        add(f"data-{number}", "factory", None, {"models": [model], "train": {}})
    model = {"model": "x", "name": "net", "tasks": [task]}
    add("data-folder", "factory", None, {"models": [model], "train": {}})
    source = {"templates": {"source": words["evil"], "count": 2}}
    add("source", "factory", None, {"models": [model], "train": source})
    add("tracker", "factory", None, {
        "models": [{**model, "tasks": [{"data": "surgery_recipes.synthetic:data"}]}], "train": {"trackers": ["wandb"]},
    })  # fmt: skip
    weights = words["evil"] + "/weights.pth"
    for option in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        add(f"timm-{option}", "timm", origin(options={option: weights}))
    add("timm-architecture", "timm", origin(architecture=f"local-dir:{words['evil']}"))
    add("class", "transformers", origin(architecture="evil.B"))
    for number, method in enumerate(("evil", "os", "surgery.methods.rows", "templates", "evil.method")):
        replaced = {"method": method, "path": "encoder", "settings": {"of": weights}, "package": "evil"}
        add(f"method-{number}", "transformers", lambda manifest, replaced=replaced: manifest["members"]["net"].update(
            replacements=[replaced]))  # fmt: skip
    for name, fields in {
        "auto-map": {"auto_map": {"AutoConfig": "evil.A", "AutoModel": "evil.B"}, "model_type": "own"},
        "auto-map-elsewhere": {"auto_map": {"AutoModel": "org/name--evil.B"}, "architectures": ["B"]},
        "kernel": {"attn_implementation": "org/kernel"},
        "flash": {"attn_implementation": "flash_attention_2"},
        "part-weights": {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"],
                         "architecture": "test_vit", "model_args": {"checkpoint_path": weights}},
        "part-folder": {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"],
                        "architecture": f"local-dir:{words['evil']}"},
        "part-hub": {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"],
                     "architecture": "hf-hub:org/name"},
        "backbone": {"model_type": "upernet", "architectures": ["UperNetForSemanticSegmentation"],
                     "backbone": "org/name"},
        "backbone-of-timm": {"model_type": "upernet", "architectures": ["UperNetForSemanticSegmentation"],
                             "backbone": "resnet18"},
        "backbone-inside": {"model_type": "detr", "architectures": ["DetrModel"], "use_timm_backbone": True,
                            "backbone_config": {"model_type": "timm_backbone",
                                                "backbone": f"local-dir:{words['evil']}"}},
    }.items():  # fmt: skip
        config = json.loads((places["made"] / "transformers" / "members/net/config.json").read_text())
        folder = places["root"] / "hostile" / f"config-{name}"
        add(f"config-{name}", "transformers", None)
        _replace(folder, "members/net/config.json", json.dumps({**config, **fields}).encode())
    return made


def _replace(folder: Path, path: str, content: bytes) -> None:
    """Put another file into an artifact, as whoever made it would, with its right hash."""
    import hashlib

    (folder / path).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(folder, lambda manifest: manifest["files"].__setitem__(path, entry))


@forks
def test_no_verb_runs_or_opens_what_a_hostile_artifact_names(places, tmp_path):
    cases, out = hostile(places), tmp_path / "found.json"
    evil = str(places["evil"])
    Started(drive, cases, [evil, "/etc/passwd"], evil, str(out)).succeed()
    found = json.loads(out.read_text())
    assert len(found) == sum(map(len, cases.values()))
    assert {name: each for name, each in found.items() if each["seen"] or each["fault"]} == {}
    assert not places["ran"].exists()


def test_shipped_functions_are_those_that_the_recipes_name():
    from surgery.settings.documents import read_document, recipe_names

    named = set()
    for name in recipe_names():
        for model in read_document(name)["models"]:
            named.add(model["model"].partition("?")[0])
            for task in model.get("tasks", ()):
                named |= {task["data"], (task.get("adaptation") or {}).get("data", task["data"])}
    assert {name for name in named if name.startswith("surgery_recipes.")} <= SHIPPED
    for name in SHIPPED:
        assert callable(find_function(name, Permission.NONE))
    for name in (
        "surgery_recipes.fetch:fetch",
        "surgery_recipes.nets:Path",
        "surgery_recipes.zoo/evil.py:make",
    ):
        with pytest.raises(ConsentError, match=name.rpartition("/")[2]):
            find_function(name, Permission.NONE)


OPTIONS = (
    "checkpoint_path=weights.pth",
    "pretrained_cfg=x",
    "pretrained_cfg_overlay=x",
    "cache_dir=/tmp",
    "file=x",
)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_timm_shape_the_architecture_alone(option, tmp_path, monkeypatch):
    class Boom:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Boom()}, "weights.pth")
    with pytest.raises(LoadError, match=option.partition("=")[0]):
        load_member(f"timm:resnet18?pretrained=false&{option}")
    assert not (tmp_path / "ran").exists()
    assert load_member("timm:test_vit?pretrained=false&num_classes=7&img_size=64").module.num_classes == 7


def test_what_the_user_types_runs_and_consent_is_one_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(EVIL.format(ran=str(ran)))
    member = load_member("evil.py:make", name="net")
    surgery.save(surgery.join([member], block=(4, 4)), "joint")
    ran.unlink()
    with pytest.raises(ConsentError, match=r"evil\.py:make.*trust_remote_code"):
        surgery.load("joint")
    report = surgery.verify("joint")
    assert report.ok and report.members[0].rebuilt and not ran.exists()
    assert "trust_remote_code" in str(report.members[0].not_built)
    code, said, _ = command("verify", "joint")
    assert code == 0 and "weights alone" in said and "--trust-remote-code" in said
    alike = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert surgery.load("joint", modules={"net": alike}).names == ("net",)
    assert not ran.exists()
    assert surgery.load("joint", trust_remote_code=True).names == ("net",)
    assert ran.exists()
    found = surgery.verify("joint", origins=True, trust_remote_code=True).members[0]
    assert found.origin == "same" and found.error is not None


def test_a_recipe_of_the_user_s_own_may_name_functions_and_one_from_an_artifact_may_not(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    recipe = Recipe.of({
        "models": [{"name": "net", "model": "evil.py:make", "tasks": [{"data": "evil.py:data"}]}],
        "parameters": {"block": "4x4", "context": 1}, "train": {"steps": 1, "generations": 1},
    })  # fmt: skip
    with pytest.raises(ConsentError, match=r"evil\.py:data"):
        train_recipe(recipe, own=False, cpu=True)
    assert not (tmp_path / "ran").exists()
    train_recipe(recipe, cpu=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "all"])
def test_a_tracker_that_a_recipe_of_an_artifact_names_takes_consent(name):
    task = {"data": "surgery_recipes.synthetic:data"}
    recipe = Recipe.of(
        {"models": [{"name": "net", "model": "x", "tasks": [task]}], "train": {"trackers": [name]}}
    )
    with pytest.raises(ConsentError, match=f"the tracker {name}"):
        check_sources(recipe, Permission.NONE)
    check_sources(recipe, Permission.OWN)
    assert recipe.train is not None
    own = recipe.model_copy(update={"train": recipe.train.model_copy(update={"trackers": ("tensorboard",)})})
    check_sources(own, Permission.NONE)


@pytest.mark.parametrize(("config", "error"), [
    ({"vision_config": {"architecture": "hf-hub:org/name"}}, ConsentError),
    ({"parts": [{"backbone": "org/name"}]}, ConsentError),
    ({"a": {"architecture": "resnet18", "model_args": {"cache_dir": "x"}}}, LoadError),
])  # fmt: skip
def test_parts_of_a_configuration_are_checked_at_any_depth(config, error):
    with pytest.raises(error):
        check_parts(config, "folder", Permission.NONE)
    check_parts(config, "folder", Permission.ALL)
    known = {"vision_config": {"architecture": "resnet18.a1_in1k", "model_args": {"in_chans": 1}}}
    check_parts(known, "folder", Permission.NONE)
    with pytest.raises(ConsentError):  # files of the user's that a folder of somebody else's names
        check_parts({"architecture": "local-dir:/x"}, "folder", Permission.OWN)


def test_no_text_of_a_file_commands_the_terminal(capfd):
    text = "a\x1b]0;title\x07\x9b2J\u202eb"
    table = console.table("name")
    table.add_row(text)
    console.out.print(table)
    console.say(text, style="bold")
    console.out.print(text)
    with pytest.raises(SystemExit):
        main(["report", text])
    found = "".join(capfd.readouterr())
    assert not set("\x1b\x07\x9b\u202e") & set(found) and found.count("a\\x1b]0;title") == 4


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors"])
def test_an_index_of_weights_names_files_of_its_own_folder(places, tmp_path, name):
    import shutil

    folder = Path(shutil.copytree(places["root"] / "bert", tmp_path / "bert"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(LoadError, match="files of its own folder"):
        load_member(str(folder))
