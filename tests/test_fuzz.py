"""A bounded fuzz in the default run; `tests/support/fuzzing.py` says what is mutated and runs more by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest

SEED = 0


@pytest.mark.parametrize("cases", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_files_end_in_an_error_or_as_they_were(tmp_path, cases):
    script = Path(fuzzing.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "corpus"), str(SEED), str(cases)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]),
        },
    )
    tail = f"seed {SEED}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, tail
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["faults"], "\n".join(found["faults"])
    assert sum(found["ends"].values()) == cases, tail
    # Mutations that nothing notices, or that everything refuses at once, would show nothing.
    assert found["ends"]["works"] > cases // 10 and found["ends"]["refused"] > cases // 3, tail
