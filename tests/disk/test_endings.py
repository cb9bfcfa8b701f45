"""Runs that end at any moment leave old or new and never half; the next start cleans up what is theirs alone."""

import json
import signal
import socket
import time

import ended_runs
import pytest
from artifacts import contents
from command_line import surgery as in_this_process
from processes import SECONDS, Started, forks
from test_records import CODE, recipe  # noqa: F401  # a fixture

from surgery.disk.claims import claim, place_of
from surgery.disk.files import put
from surgery.disk.records import unowned_files
from surgery.errors import OutputError

pytestmark = forks
KILL, TERM, INT = (signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)
MERGE = [
    ("surgery.pipeline.merge:prepare:after", KILL),
    ("surgery.disk.folders:_exchange:after", KILL),
    ("surgery.artifact.writing:write_shards:before", TERM),
    ("surgery.artifact.writing:write_shards:before", INT),
    ("surgery.artifact.writing:write_shards:before", KILL),
    ("surgery.artifact.writing:write_front:after", KILL),
    ("surgery.disk.folders:_move_into_place:before", KILL),
    ("surgery.disk.folders:_discard_old:after", KILL),
    ("surgery.disk.claims:_give_back:before", KILL),
    ("surgery.pipeline.merge:prepare:after", TERM),
    ("surgery.disk.folders:_exchange:after", TERM),
    ("surgery.disk.folders:_exchange:after", INT),
]
TRAIN = [
    ("surgery.pipeline.train:save:after", KILL),
    ("surgery.training.loop.run:Run._after_generation:before", TERM),
    ("surgery.training.loop.run:Run._after_generation:before", KILL),
    ("surgery.training.loop.state:save_file:after", KILL),
    ("surgery.training.loop.state:save_file:after", INT),
    ("surgery.pipeline.train:save:before", KILL),
]
"""Where a run ends, and how; the first ones are tried each time, all of them in the slow tests."""


def some_or_all(moments, some):
    return pytest.mark.parametrize(
        "moments",
        [pytest.param(moments[:some], id="some"), pytest.param(moments, id="all", marks=pytest.mark.slow)],
    )


def run(*arguments, at=None, number=0):
    """The command in a process of its own: how it ended, and what it said."""
    (code,), said = Started(ended_runs.run, [str(each) for each in arguments], at, int(number)).wait()
    return code, said


@pytest.fixture
def place(recipe, tmp_path):  # noqa: F811
    """A place with a recipe, a target of the older seed, and hidden files of somebody else's."""
    put(tmp_path / "work" / ".joint.surgery-notes", b"mine")
    put(tmp_path / "work" / ".other.surgery" / "new-1" / "half", b"of another target")
    return tmp_path / "work"


def mine(place):
    return sorted(
        each.name for each in place.iterdir() if each.name not in (".joint.surgery-notes", ".other.surgery")
    )


@some_or_all(MERGE, 3)
def test_a_merge_leaves_old_or_new_wherever_it_ends(place, tmp_path, moments):
    joint = place / "joint"
    merge = ("merge", f"a={tmp_path}/mine.py:net", f"b={tmp_path}/mine.py:net", "--max-error", 0, "--quiet")
    assert run(*merge, "--out", joint, "--seed", 1)[0] == 0
    assert run(*merge, "--out", tmp_path / "new", "--seed", 2)[0] == 0
    old, new = contents(joint), contents(tmp_path / "new")
    assert old != new
    for at, (number, code) in moments:
        ended, said = run(*merge, "--out", joint, "--seed", 2, "--overwrite", at=at, number=number)
        assert ended == code, (at, number, said)
        assert contents(joint) in (old, new), (at, number)
        if number == signal.SIGKILL:
            with claim(joint):  # the start of the next one
                assert [each.name for each in place_of(joint).iterdir()] == ["lock"], (at, number)
        else:
            assert ("ended by SIGTERM" in said) == (number == signal.SIGTERM), said
        assert mine(place) == ["joint"] and contents(joint) in (old, new), (at, number)
    assert run(*merge, "--out", joint, "--seed", 1, "--overwrite")[0] == 0
    assert mine(place) == ["joint"] and contents(joint) == old
    assert run(*merge, "--out", place / "deep" / "er", at=MERGE[2][0], number=signal.SIGTERM)[0] == 143
    assert mine(place) == ["joint"], "folders that were made for it are gone"
    assert contents(place)[".joint.surgery-notes"] == b"mine"
    assert contents(place)[".other.surgery/new-1/half"] == b"of another target"


@some_or_all(TRAIN, 2)
def test_a_training_leaves_old_or_new_and_goes_on_wherever_it_ends(place, recipe, moments):  # noqa: F811
    train = ("train", recipe, "--out", place / "joint", "--cpu", "--quiet", "--set", "train.save_seconds=0")
    assert run(*train)[0] == 0
    for seed, (at, (number, code)) in enumerate(moments):
        again, old = (*train, "--seed", seed + 1, "--overwrite"), contents(place / "joint")
        ended, said = run(*again, at=at, number=number)
        assert ended == code, (at, number, said)
        assert contents(place / "joint") == old or (
            at == TRAIN[0][0] and not unowned_files(place / "joint")
        ), (
            at,
            number,
        )
        assert number == signal.SIGKILL or "--resume auto" in said
        ended, said = run(*again, "--resume", "auto")
        assert ended == 0, (at, number, said)
        assert mine(place) == ["joint"] and contents(place / "joint") != old, (at, number)
    assert contents(place)[".other.surgery/new-1/half"] == b"of another target"


def test_a_finished_run_is_gone_on_with_by_doing_nothing(place, recipe):  # noqa: F811
    train = ("train", recipe, "--out", place / "joint", "--cpu", "--resume", "auto")
    assert run(*train, "--fast-dev-run")[0] == 0
    ended, said = run(*train)
    assert ended == 2 and "exists and holds files" in said  # a rehearsal is no finished run
    assert run(*train, "--overwrite")[0] == 0
    before = contents(place / "joint")
    code, out, err = in_this_process(*train, "--json")
    assert code == 0, err
    assert json.loads(out)["generations"] == 2 and contents(place / "joint") == before
    ended, said = run(*train, "--seed", 5)
    assert ended == 2 and "exists and holds files" in said  # another recipe's
    assert contents(place / "joint") == before


def hold(target, held):
    """Hold a target until the process is killed."""
    with claim(target):
        held.touch()
        time.sleep(SECONDS)


def test_of_two_runs_with_one_target_the_second_is_refused_with_the_first_ones_process(tmp_path):
    target = tmp_path / "joint"
    first = Started(hold, target, tmp_path / "held")
    while not (tmp_path / "held").exists():
        assert first.processes[0].is_alive(), first.wait()
        time.sleep(0.01)
    (tmp_path / "held").unlink()
    put(place_of(target) / "new-1" / "half", b"being written")
    with pytest.raises(OutputError, match=rf"process {first.pid} on {socket.gethostname()}"), claim(target):
        pass
    assert (place_of(target) / "new-1" / "half").exists()
    with claim(tmp_path / "other"):  # no business of the first's
        pass
    first.kill()
    first.wait()
    with claim(target), claim(target):
        assert [each.name for each in place_of(target).iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_that_had_no_successor_yet_goes_back(tmp_path):
    put(place_of(tmp_path / "joint") / "old-1" / "a", b"old")
    with claim(tmp_path / "joint"):
        pass
    assert contents(tmp_path) == {"joint/a": b"old"}


def test_where_there_are_no_locks_the_owner_that_is_named_counts(tmp_path, monkeypatch):
    import errno
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    target = tmp_path / "joint"
    for owner, free in (({"pid": 1, "host": "elsewhere"}, False), ({"pid": 1, "host": socket.gethostname()}, False),
                        ({"pid": 2**22 + 1, "host": socket.gethostname()}, True), ({}, True)):  # fmt: skip
        put(place_of(target) / "lock", json.dumps(owner).encode())
        if free:
            with claim(target):
                pass
        else:
            with pytest.raises(OutputError, match="process 1 on"), claim(target):
                pass
