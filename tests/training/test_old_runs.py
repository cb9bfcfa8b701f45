"""Runs that older versions began end as unbroken ones do; their states were written by the code of 2026-11-26."""

import zipfile

import old_runs
import pytest
import torch
from places import DATA

from surgery.training.report.runlog import read_log


@pytest.mark.parametrize("kind", old_runs.KINDS)
def test_a_run_of_an_older_version_goes_on_to_the_end_of_an_unbroken_one(kind, tmp_path):
    with zipfile.ZipFile(DATA / "runs_1.zip") as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith(f"{kind}/")])
    before = read_log(tmp_path / kind / "log.jsonl")
    config = {**old_runs.KINDS[kind]}
    defaults = {"scale": "contexts", "fraction": 0.5, "alpha": 0.5}  # of its version
    config["evolution"] = {**defaults, **config.get("evolution", {})}
    unbroken, wanted = old_runs.run(kind, config=config)
    resumed, found = old_runs.run(kind, tmp_path / kind, resume=True)
    events = [line["event"] for line in read_log(tmp_path / kind / "log.jsonl")]
    assert read_log(tmp_path / kind / "log.jsonl")[:3] == before[:3] and events.count("start") == 1
    assert (found.generations, found.best) == (wanted.generations, wanted.best)
    for name in unbroken.names:
        one, other = resumed.collapse(name), unbroken.collapse(name)
        assert list(one) == list(other)
        for key, tensor in other.items():
            # Older versions took losses and soft weights in float32, also of members in float64.
            torch.testing.assert_close(one[key], tensor, rtol=0, atol=1e-7, msg=f"{name}: {key}")
