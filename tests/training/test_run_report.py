"""Records of a training run: sharing against chance, statistics, pictures, and the verb that draws them."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
import training_nets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from surgery_cli.__main__ import app
from typer.testing import CliRunner

from surgery.disk.records import RECORD
from surgery.errors import OutputError, TrainingError
from surgery.methods.hypermodules.analysis import STATISTICS, kinds_of_modules, layer_overlap
from surgery.settings.training import Evolution, Training
from surgery.training.loop.starting import start
from surgery.training.report.pictures import draw_run, pictures_of, write_pictures
from surgery.training.report.report import TrainReport, logged_phases
from surgery.training.report.runlog import find_log, read_log
from surgery.training.tasks.score import Score
from surgery.training.train import train


def opened(psi=None, seed=0, scale="balanced"):
    """Two small members with one bank, their alignment as it starts or as given."""
    joint = training_nets.build()
    start(joint, Training(evolution=Evolution(scale=scale)), seed)
    if psi is not None:
        key = next(iter(joint.dictionary))
        joint.dictionary[key].psi = torch.tensor(psi)
    return joint


def test_every_location_for_itself_shares_nothing_and_chance_knows():
    joint = opened()
    key = next(iter(joint.dictionary))
    overlap = layer_overlap(joint, key)
    observed, expected = np.array(overlap["observed"]), np.array(overlap["expected"])
    sizes = [
        p.grid.locations for m in joint.names for p in sorted(joint.plan.of(m), key=lambda p: p.site.order)
    ]
    assert [layer[0] for layer in overlap["layers"]] == ["a"] * (len(sizes) // 2) + ["b"] * (len(sizes) // 2)
    assert (observed == np.diag(sizes)).all()
    assert np.allclose(
        expected, observed, atol=1e-3
    )  # a hypermodule used once is in one layer, whoever deals


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 16))
def test_chance_is_the_mean_over_dealt_alignments(seed, hypermodules):
    joint = opened()
    key = next(iter(joint.dictionary))
    bank = joint.dictionary[key]
    generator = torch.Generator().manual_seed(seed)
    psi = torch.randint(hypermodules, (bank.locations,), generator=generator)
    bank.psi = psi
    overlap = layer_overlap(joint, key)
    places = [p for m in joint.names for p in sorted(joint.plan.of(m), key=lambda p: p.site.order)]
    deals = [psi, *(psi[torch.randperm(len(psi), generator=generator)] for _ in range(400))]
    used = torch.stack(
        [
            torch.zeros(len(deals), hypermodules).scatter_(1, torch.stack(deals)[:, p.start : p.stop], 1)
            for p in places
        ],
        1,
    )
    observed = used @ used.mT  # [deals, layers, layers]
    assert observed[0].tolist() == overlap["observed"]
    mean, expected = observed[1:].mean(0).numpy(), np.array(overlap["expected"])
    assert np.abs(mean - expected).max() < 5 * 0.5 * hypermodules**0.5 / 400**0.5 + 1e-3


def test_generic_and_specific_hypermodules_are_told_apart():
    joint = opened(scale="contexts")
    key = next(iter(joint.dictionary))
    bank = joint.dictionary[key]
    owner = torch.zeros(bank.locations, dtype=torch.long)
    for p in joint.plan.placements:
        owner[p.start : p.stop] = joint.names.index(p.site.member)
    # Hypermodules 0 and 1 are used by both members and made ten times as large, all others by one.
    psi = torch.arange(bank.locations)
    for number, (one, other) in enumerate(
        zip((owner == 0).nonzero()[:2, 0], (owner == 1).nonzero()[:2, 0], strict=True)
    ):
        psi[one] = psi[other] = number
    bank.psi = psi
    with torch.no_grad():
        bank.rows[: 2 * bank.context] *= 10
    rows = {(r["tensor"], r["statistic"]): r for r in kinds_of_modules(joint)}
    assert set(rows) == set(itertools.product("Hz", STATISTICS))
    used = torch.unique(psi)
    assert rows["H", "norm"]["counts"] == [2, len(used) - 2]
    norms = bank.rows.detach().view(bank.hypermodules, -1).norm(dim=1)
    assert rows["H", "norm"]["generic"] == pytest.approx(float(norms[:2].mean()), rel=1e-5)
    assert rows["H", "norm"]["specific"] == pytest.approx(float(norms[used[used > 1]].mean()), rel=1e-5)
    assert rows["H", "max"]["p"] < 0.05 < rows["z", "max"]["p"]  # contexts stayed as they were


def test_without_two_kinds_there_are_no_statistics():
    assert kinds_of_modules(opened()) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with its log, and the artifact."""
    folder = tmp_path_factory.mktemp("run")
    joint = training_nets.build()
    train(joint, training_nets.tasks(), training_nets.CONFIG, folder=folder, cpu=True)
    return folder


OF_OTHERS = {
    "mixtures.png",
    "allocation.png",
    "routes.png",
    "likeness.png",
}  # the run has no templates and no routes


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).reshape(-1, 3)


def test_every_picture_is_drawn_and_shows_something(run):
    drawn = draw_run(find_log(run))
    assert set(drawn) == set(pictures_of({})) - OF_OTHERS
    for content in drawn.values():
        assert len(np.unique(pixels(content), axis=0)) > 8
    assert drawn == draw_run(find_log(run)), "the same log gives the same bytes"


def test_a_run_that_still_goes_on_is_drawn_as_far_as_it_is(run, tmp_path):
    lines = [json.dumps(line) for line in read_log(find_log(run)) if line["event"] != "end"]
    (tmp_path / "log.jsonl").write_text("\n".join(lines[:3]) + '\n{"event": "gener')
    assert set(draw_run(tmp_path / "log.jsonl")) == {"losses.png", "modules.png", "alignment.png"}
    (tmp_path / "log.jsonl").write_text(lines[0] + "\n")
    assert draw_run(tmp_path / "log.jsonl") == {}


def test_the_verb_draws_and_tells(run, tmp_path):
    found = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "pictures"), "--json"])
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["finished"] and facts["generations"] == 6 and facts["members"] == ["a", "b"]
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {*pictures_of({}), RECORD} - OF_OTHERS
    shown = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "pictures")])
    assert (
        "6 generations (1 burn-in + 4 + 1 final), finished" in shown.output and "layers.png" in shown.output
    )


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"no log\.jsonl in it"):
        find_log(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="could not be written"):
        write_pictures(find_log(run), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_report_is_read_again_as_it_was_written():
    score = Score(0.5, 0.9, 8, "accuracy")
    report = TrainReport(
        generations=1, best=0, scores={"a": score}, tests={"a": score}, first={"a": score}, hypermodules={},
        numbers=(1, 2), trained=3, stopped="done", seconds=1.0,
    )  # fmt: skip
    assert TrainReport.of(json.loads(json.dumps(report.document()))) == report


def test_generations_are_counted_as_the_settings_count_them():
    assert "TrainReport: 4 generations (1 burn-in + 2 + 1 final) in" in repr(
        TrainReport(4, burn_in=1, final=1)
    )
    lines = [{"phase": phase} for phase in ("burn-in", "evolution", "evolution", "final")]
    assert logged_phases(lines) == "4 generations (1 burn-in + 2 + 1 final)"
    assert logged_phases(lines[1:3]) == "2 generations"
