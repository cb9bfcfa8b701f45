"""Members added, removed and fitted anew on the command line, also by a process that is killed."""

from __future__ import annotations

import contextlib
import json
import shutil
import textwrap
from signal import SIGKILL, SIGTERM

import ended_runs
import pytest
from artifacts import contents, numbers
from command_line import surgery as command
from processes import Started, forks

from surgery.artifact.manifest import read_manifest
from surgery.disk.claims import place_of


@pytest.fixture(autouse=True)
def figures(request, monkeypatch):
    """In place of a picture, which takes longer than all else here, the numbers that it is drawn from."""
    if request.node.name != "test_the_command_adds_and_removes":
        monkeypatch.setattr("surgery.artifact.writing.draw_sharing", numbers)


FACTORY = """
    import torch
    from torch import nn

    def net(seed):
        torch.manual_seed(0)
        layers = [nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU()]
        made = nn.Sequential(*layers, nn.Linear(48, 3)).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for layer in (made[2], made[4]):
                layer.weight += 0.05 * torch.randn(48, 1) @ torch.randn(1, 48)
        return made, torch.randn(8, 12)

    def a(): return net(1)
    def b(): return net(2)
    def c(): return net(3)
    def d(): return net(4)
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    place = tmp_path_factory.mktemp("merged")
    (place / "nets.py").write_text(textwrap.dedent(FACTORY))
    names = (f"{name}={place}/nets.py:{name}" for name in "abc")
    assert command("merge", *names, "--budget", 0.14, "--out", place / "joint")[0] == 0
    return place


@pytest.fixture
def nets(merged, tmp_path, monkeypatch):
    shutil.copytree(merged, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place" / "joint"


def test_the_command_adds_and_removes(nets):
    former = contents(nets)
    code, out, _ = command("add", "joint", "new=nets.py:d", "--max-error", 0.05, "--dry-run", "--json")
    tried = json.loads(out)
    assert code == 0 and not tried["written"] and contents(nets) == former
    code, out, _ = command("add", "joint", "new=nets.py:d", "--max-error", 0.05, "--json")
    done = json.loads(out)
    assert (
        code == 0
        and done["written"]
        and done["members"][0]
        == {
            **tried["members"][0],
            "disk_bytes": sum(map(len, contents(nets).values())) - sum(map(len, former.values())),
        }
    )
    assert done["members"][0]["sites"] == 2
    assert command("verify", "joint", "--origins", "--trust-remote-code")[0] == 0
    code, out, _ = command("remove", "joint", "new", "--dry-run")
    assert code == 0 and "new" in read_manifest(nets).members
    assert command("remove", "joint", "new")[0] == 0 and contents(nets) == former
    code, out, _ = command("add", "joint", "nets.py:d")
    assert code == 0 and "d" in read_manifest(nets).members and "marginal" in out
    assert "(the largest error of the others, which were made with budget 0.14), met" in " ".join(out.split())
    report = command("report", "joint")
    assert report[0] == 0


def test_the_command_fits_anew(nets):
    former = contents(nets)
    code, out, _ = command("refit", "joint", "--dry-run", "--json", "--trust-remote-code")
    found = json.loads(out)
    assert (
        code == 0 and found["target"] == "budget 0.14" and found["after"] == found["before"] - found["saved"]
    )
    assert contents(nets) == former and found["saved"] == 0
    code, out, _ = command("refit", "joint", "--max-error", 0.2, "--trust-remote-code")
    assert code == 0 and "less" in out and contents(nets) != former
    assert command("verify", "joint", "--origins", "--trust-remote-code")[0] == 0


def test_the_command_says_what_is_wrong(nets):
    former = contents(nets.parent)
    for words, said in (
        (("add", "joint", "a=nets.py:d"), "has a already"),
        (("add", "joint", "new=nets.py:d", "--max-error", 0.1, "--budget", 0.1), "only one of"),
        (("refit", "joint"), "its code may not run"),
        (("remove", "joint", "nobody"), "among a, b, c"),
        (("remove", "joint", "a", "b", "c"), "delete the folder"),
    ):
        code, _, err = command(*words)
        assert code == 2 and said in err and "Traceback" not in err
    assert contents(nets.parent) == former


MOMENTS = [
    ("surgery.artifact.amending:_Amending._check:after", SIGKILL),
    ("surgery.disk.folders:_exchange:after", SIGKILL),
    ("surgery.artifact.amending:write_front:before", SIGTERM),
    ("surgery.disk.folders:_discard_old:before", SIGKILL),
]


@forks
@pytest.mark.parametrize(
    "moments",
    [pytest.param(MOMENTS[:1], id="some"), pytest.param(MOMENTS, id="all", marks=pytest.mark.slow)],
)
def test_a_killed_run_leaves_old_or_new(nets, tmp_path, moments):
    """Links to the files of the former folder do not make it lose them."""
    old = contents(nets)
    shutil.copytree(nets.parent, tmp_path / "other")
    words = ("new=nets.py:d", "--max-error", 0.2, "--quiet")
    with contextlib.chdir(tmp_path / "other"):
        Started(ended_runs.run, ["add", "joint", *map(str, words)], None, 0).wait()
    new = contents(tmp_path / "other" / "joint")
    for at, number in moments:
        Started(ended_runs.run, ["add", "joint", *map(str, words)], at, int(number)).wait()
        assert contents(nets) in (old, new), at
        Started(ended_runs.run, ["remove", "joint", "new"], None, 0).wait()
        assert contents(nets) == old and not place_of(nets).exists(), at


def test_a_member_of_another_artifact_is_added_as_it_is_there(nets):
    assert command("merge", "e=nets.py:d", "--max-error", 0.02, "--out", "other")[0] == 0
    code, out, _ = command("add", "joint", "other", "--json", "--trust-remote-code")
    assert code == 0 and json.loads(out)["members"][0]["name"] == "e"
    assert "e" in read_manifest(nets).members
