"""The coverage command: bounded processes, resuming, and a page whose totals are those of its rows."""

import faulthandler
import os
import time
from pathlib import Path

import pytest

from benchmarks.coverage import __main__ as command
from benchmarks.coverage import row, table
from benchmarks.coverage.catalogue import Entry
from benchmarks.coverage.check import try_model
from benchmarks.coverage.pool import Limits, run_each
from benchmarks.coverage.row import Row


def _misbehave(how):
    if how == "hangs":
        time.sleep(600)
    if how == "crashes":
        faulthandler.disable()  # nobody wants to read the trace of a crash that was asked for
        os.kill(os.getpid(), 11)
    if how == "eats memory":
        eaten = []
        while True:
            eaten.append(bytearray(b"x" * (1 << 24)))
            time.sleep(0.001)
    if how == "raises":
        raise RuntimeError("never seen by the one who waits")
    if how == "exits":
        os._exit(3)
    return {"how": how}


@pytest.mark.slow
def test_one_bad_model_costs_only_itself():
    every = ["good", "hangs", "crashes", "eats memory", "raises", "exits", "good too"]
    began = time.monotonic()
    found = {o.item: o for o in run_each(_misbehave, every, Limits(seconds=3, memory=0.5), jobs=2)}
    assert time.monotonic() - began < 120
    assert found["good"].result == {"how": "good"} and found["good too"].result == {"how": "good too"}
    assert found["hangs"].failure == "took more than 3 s"
    assert found["crashes"].failure == "its process ended with SIGSEGV"
    assert found["eats memory"].failure == "took more than 0.5 GiB of memory"
    assert found["raises"].failure == "its process ended with exit code 1"
    assert found["exits"].failure == "its process ended with exit code 3"


@pytest.mark.slow
def test_what_hangs_does_not_leave_its_children(tmp_path):
    pid = tmp_path / "pid"

    def work(_):
        child = os.fork()
        if child == 0:
            time.sleep(600)
        pid.write_text(str(child))
        time.sleep(600)

    list(run_each(work, ["it"], Limits(seconds=2)))
    child = Path(f"/proc/{pid.read_text()}")
    deadline = time.monotonic() + 20  # reaped by whoever adopted it, soon
    while (
        child.exists() and "Z" not in (child / "stat").read_text().split()[2] and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not child.exists() or (child / "stat").read_text().split()[2] == "Z"


def test_the_command_writes_a_row_for_each_model_and_resumes(tmp_path, capsys):
    arguments = ["--library", "timm", "--out", str(tmp_path), "--seconds", "120"]
    assert command.main([*arguments, "--only", "test_vit", "no_such_model"]) == 0
    first = {r.model: r for r in row.read(tmp_path / "coverage.csv")}
    assert first["test_vit"].status == "exact" and "meta" in first["test_vit"].tier
    assert first["no_such_model"].status == "failed" and "no_such_model" in first["no_such_model"].cause
    assert "| timm | 2 |" in (tmp_path / "coverage.md").read_text()

    marked = [Row(**{**vars(r), "seconds": 123.0}) for r in first.values()]
    row.write(tmp_path / "coverage.csv", marked)
    command.main([*arguments, "--resume", "--only", "test_vit", "no_such_model", "test_resnet"])
    resumed = {r.model: r for r in row.read(tmp_path / "coverage.csv")}
    assert resumed["test_vit"].seconds == resumed["no_such_model"].seconds == 123.0, "tried again"
    assert resumed["test_resnet"].status == "exact"

    command.main([*arguments, "--resume", "--retry", "--only", "test_vit", "no_such_model"])
    retried = {r.model: r for r in row.read(tmp_path / "coverage.csv")}
    assert retried["test_vit"].seconds == 123.0 and retried["no_such_model"].seconds == 0.0
    assert "Trying models" in capsys.readouterr().out


def test_a_row_survives_the_file(tmp_path):
    facts = Row(
        "timm", "a", "A", 7, "meta", "in", 0.5, 0.25, 0.5, 0.25, 'odd, "quoted"\ntext', status="exact"
    )
    row.write(tmp_path / "c.csv", [facts])
    row.append(tmp_path / "c.csv", facts)
    assert row.read(tmp_path / "c.csv") == [facts, facts]


def test_totals_count_what_was_built():
    rows = [
        Row(
            "timm", "a", "A", 100, "meta", "", 1.0, 0.9, 0.1, 0.0, status="exact", outputs="yes", state="yes"
        ),
        Row("timm", "b", "B", 300, "meta", "", 3.0, 0.5, 0.1, 0.4, outputs="no", cause="outputs differ"),
        Row("timm", "c", "C", 0, status="failed", cause="build: ValueError: no"),
        Row("timm", "d", "D", 0, status="absent", cause="build: LookupError: d: needs a package"),
    ]
    t = table.totals(rows)
    assert (t["tried"], t["built"], t["exact"]) == (3, 2, 1)
    assert t["accounted"] == pytest.approx((100 * 1.0 + 300 * 0.6) / 400)
    assert t["least"] == pytest.approx(0.6) and t["median"] == 2.0 and t["p95"] == 3.0
    page = table.page(rows, "the command")
    assert "- `b` (B): outputs differ" in page and "- `c` (C): build: ValueError: no" in page
    assert "needs a package (1): `d`" in page


def test_a_changed_model_is_caught(monkeypatch):
    """The check itself: a joint model that is off in one bit is not called exact."""
    from benchmarks.coverage import check

    digest = check.digest
    assert try_model(Entry("timm", "test_vit")).status == "exact"
    calls = iter(range(10**6))
    monkeypatch.setattr(check, "digest", lambda t: digest(t) + ("x" if next(calls) == 0 else ""))
    found = try_model(Entry("timm", "test_vit"))
    assert found.status == "failed" and found.cause == "state dict differs"
