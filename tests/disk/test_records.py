"""Nothing is deleted or replaced that this tool did not write and record, whoever's folder it is."""

import json
import tempfile
from pathlib import Path

import pytest
from artifacts import contents, pair
from command_line import surgery as run
from hypothesis import given
from hypothesis import strategies as st
from training_nets import CONFIG, build, tasks

from surgery.artifact import save
from surgery.artifact.export import export
from surgery.disk.claims import place_of
from surgery.disk.files import files_below, put
from surgery.disk.folders import new_folder
from surgery.disk.records import RECORD, note, owned_files, remove_owned, unowned_files, write_owned
from surgery.errors import OutputError
from surgery.training.loop.run import BEST, STATE
from surgery.training.report.pictures import draw_run, write_pictures
from surgery.training.report.runlog import NAME as LOG
from surgery.training.train import train

SHORT = {**CONFIG, "steps": 1, "generations": 1, "burn_in": 1, "final": 0}
CODE = """
import torch
from torch import nn

def net(width=8):
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 2)), (
        torch.zeros(2, 4),
    )

def data():
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return [(x, (x.sum(1) > 0).long())]
"""
NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)


@given(ours=st.sets(NAMES), theirs=st.sets(NAMES), changed=st.sets(NAMES))
def test_what_is_removed_is_what_was_recorded_and_not_changed(ours, theirs, changed):
    """Whatever files a folder holds: those of the user's are there afterwards, with their content, and no other."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        folder.mkdir()
        held: dict[str, bytes] = {}
        for name in sorted(ours | theirs, key=len):
            if (
                not any(parent.as_posix() in held for parent in Path(name).parents)
                and not (folder / name).exists()
            ):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if name in ours:
                    write_owned(folder, name, b"ours")
                else:
                    (folder / name).write_bytes(b"theirs")
                if name in ours & changed:
                    (folder / name).write_bytes(b"changed")
                held[name] = (folder / name).read_bytes()
        kept = {name: content for name, content in held.items() if content != b"ours"}
        assert unowned_files(folder) == sorted(kept)
        assert remove_owned(folder) == sorted(kept)
        assert contents(folder) == kept if kept else not folder.exists()


def test_a_record_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RECORD).write_text(f"-  ../mine.txt\n-  {tmp_path}/mine.txt\n-  \n-\nrubbish\n")
    assert owned_files(tmp_path / "run") == {RECORD}
    assert remove_owned(tmp_path / "run") == [] and (tmp_path / "mine.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path)
    assert remove_owned(tmp_path / "link") == [] and (tmp_path / "mine.txt").exists()


@pytest.fixture
def recipe(tmp_path):
    """A training recipe of one small member on data of a file."""
    (tmp_path / "mine.py").write_text(CODE)
    data = f"{tmp_path}/mine.py:data"
    document = {
        "models": [{"model": f"{tmp_path}/mine.py:net", "name": "net", "tasks": [{"data": data}]}],
        "parameters": {"block": "8x8", "context": 2},
        "train": SHORT,
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(document))  # JSON is YAML
    return tmp_path / "recipe.json"


def test_training_keeps_the_users_files_in_its_run_folder(recipe, tmp_path):
    mine = tmp_path / "m.training" / "notes" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("weeks of work")
    for more in ((), ("--overwrite",)):
        code, _, err = run("train", recipe, "--out", tmp_path / "m", "--trust-remote-code", *more)
        assert code == 0, err
        assert contents(tmp_path / "m.training") == {"notes/mine.txt": b"weeks of work"}
    (tmp_path / "m.training" / LOG).write_text("a log of my own")
    code, _, err = run("train", recipe, "--out", tmp_path / "m", "--trust-remote-code", "--overwrite")
    assert code == 2 and "holds log.jsonl" in err
    assert (tmp_path / "m.training" / LOG).read_text() == "a log of my own"
    assert mine.exists() and (tmp_path / "m" / "manifest.json").exists()


def test_a_bad_recipe_leaves_an_earlier_runs_state(recipe, tmp_path):
    run_folder = tmp_path / "m.training"
    note(run_folder, STATE, BEST)
    (run_folder / STATE).write_text("three days of training")
    document = json.loads(recipe.read_text())
    document["models"][0]["model"] += "?width=wrong"
    recipe.write_text(json.dumps(document))
    code, _, _ = run("train", recipe, "--out", tmp_path / "m", "--trust-remote-code", "--overwrite")
    assert code == 2 and (run_folder / STATE).read_text() == "three days of training"


def test_what_a_run_wrote_is_recorded_as_soon_as_it_is_there(tmp_path):
    train(build(), tasks(), SHORT, folder=tmp_path / "run", cpu=True)
    assert unowned_files(tmp_path / "run") == [] and {LOG, STATE} <= set(files_below(tmp_path / "run"))
    assert remove_owned(tmp_path / "run") == [] and not (tmp_path / "run").exists()


def test_pictures_replace_only_pictures_of_this_tools(tmp_path):
    train(build(), tasks(), SHORT, folder=tmp_path / "run", cpu=True)
    log, pictures = tmp_path / "run" / LOG, tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "losses.png").write_bytes(b"my own losses")
    with pytest.raises(OutputError, match=r"holds losses\.png"):
        write_pictures(log, pictures)
    assert contents(pictures) == {"losses.png": b"my own losses"}
    (pictures / "losses.png").unlink()
    write_pictures(log, pictures)
    write_pictures(log, pictures)  # its own ones again
    (pictures / "losses.png").write_bytes(b"my own losses")
    with pytest.raises(OutputError, match=r"holds losses\.png"):
        write_pictures(log, pictures)


def test_a_report_changes_nothing_in_an_artifact(tmp_path):
    train(build(), tasks(), SHORT, folder=tmp_path / "run", cpu=True)
    log = (tmp_path / "run" / LOG).read_bytes()
    drawn = {f"training/{name}": b"of an older version" for name in draw_run(tmp_path / "run" / LOG)}
    out = save(pair(), tmp_path / "out", extras={f"training/{LOG}": log, **drawn})
    before = contents(out)
    code, _, err = run("report", out)
    assert code == 0, err
    assert contents(out) == before


def test_an_export_replaces_only_an_export(tmp_path):
    mine = {"model.safetensors": b"my own weights", "config.json": b"{}"}
    for name, content in mine.items():
        put(tmp_path / "my-model" / name, content)
    with pytest.raises(OutputError, match="which no record says"):
        export(pair(), "one", tmp_path / "my-model", overwrite=True)
    assert contents(tmp_path / "my-model") == mine
    out = export(pair(), "one", tmp_path / "export")
    first = contents(out)
    assert contents(export(pair(), "one", out, overwrite=True)) == first
    (out / "model.safetensors").write_bytes(b"trained further by me")
    with pytest.raises(OutputError, match=r"also holds model\.safetensors"):
        export(pair(), "one", out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == b"trained further by me"


def test_an_artifact_with_a_card_or_folder_of_the_users_stays(tmp_path):
    out = save(pair(), tmp_path / "out")
    (out / "empty").mkdir()
    with pytest.raises(OutputError, match="also holds empty/"):
        save(pair(), out, overwrite=True)
    (out / "empty").rmdir()
    (out / "README.md").write_text("a card that I wrote")
    with pytest.raises(OutputError, match=r"also holds README\.md"):
        save(pair(), out, overwrite=True)
    assert (out / "README.md").read_text() == "a card that I wrote"
    assert not place_of(out).exists()


def test_files_that_come_at_the_last_moment_are_kept(tmp_path, monkeypatch):
    from surgery.disk import folders

    with new_folder(tmp_path / "out") as new:
        put(new / "a", b"old")
    move = folders._move_into_place

    def late(temporary, final):
        put(final / "mine", b"mine")
        move(temporary, final)

    monkeypatch.setattr(folders, "_move_into_place", late)
    meanwhile = pytest.raises(OutputError, match="had come into it meanwhile")
    with meanwhile, new_folder(tmp_path / "out", overwrite=True) as new:
        put(new / "a", b"new")
    assert (tmp_path / "out" / "a").read_bytes() == b"new"
    kept = [path for path in tmp_path.iterdir() if path.name.startswith("out.")]
    assert [contents(path) for path in kept] == [{"mine": b"mine"}] and not place_of(
        tmp_path / "out"
    ).exists()


def test_recipes_cp_leaves_the_file_that_a_link_leads_to(tmp_path):
    put(tmp_path / "precious", b"mine")
    put(tmp_path / ".mine.yaml.new", b"mine too")
    (tmp_path / "mine.yaml").symlink_to(tmp_path / "precious")
    code, _, err = run("recipes", "cp", "demo", tmp_path / "mine.yaml", "--overwrite")
    assert code == 0, err
    assert (tmp_path / "precious").read_bytes() == b"mine" and not (tmp_path / "mine.yaml").is_symlink()
    assert (tmp_path / ".mine.yaml.new").read_bytes() == b"mine too"


@pytest.mark.slow
def test_the_demo_replaces_only_what_it_wrote(tmp_path):
    from surgery_cli.demo_inputs import write_inputs

    put(tmp_path / "inputs" / "sentences.txt", b"my sentences")
    with pytest.raises(OutputError, match=r"also holds sentences\.txt"):
        write_inputs(tmp_path / "inputs")
    write_inputs(tmp_path / "again")
    write_inputs(tmp_path / "again")
