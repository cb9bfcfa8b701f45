"""A bounded fuzz in the default run; `tests/support/fuzzing.py` says what is mutated and runs more by hand."""

import json

import fuzzing
import pytest
from processes import Started, forks

SEED = 0


@forks
@pytest.mark.parametrize("cases", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_files_end_in_an_error_or_as_they_were(tmp_path, cases):
    run = Started(fuzzing.main, tmp_path / "corpus", SEED, cases, environment={"HF_HUB_OFFLINE": "1"})
    codes, said = run.wait()
    tail = f"seed {SEED}\n{said[-8000:]}"
    assert codes == [0], tail
    found = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith('{"ends"')))
    assert not found["faults"], "\n".join(found["faults"])
    assert sum(found["ends"].values()) == cases, tail
    # Mutations that nothing notices, or that everything refuses at once, would show nothing.
    assert found["ends"]["works"] > cases // 10 and found["ends"]["refused"] > cases // 3, tail
