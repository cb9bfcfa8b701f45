"""Damaged states and logs of training runs: one error that says what is wrong, and nothing in memory changes."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from command_line import surgery as command
from fuzzing import RUN, fingerprint, interrupted_run, run_tasks
from safetensors import safe_open
from special_files import special
from training_nets import build

from surgery.errors import TrainingError
from surgery.storage.keys import StateKey
from surgery.training.loop.run import BEST, STATE
from surgery.training.loop.state import read_state, write_state
from surgery.training.loop.state_document import BestDocument
from surgery.training.report.runlog import NAME, read_log
from surgery.training.train import train

BANK = "8x8-float32"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    interrupted_run(folder)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def refused(folder, said):
    """Going on is refused, and the members are what they were."""
    joint = build()
    before = fingerprint(joint.collapse())
    psi = {key: joint.dictionary[key].psi.clone() for key in joint.dictionary}
    with pytest.raises(TrainingError, match=said) as caught:
        train(joint, run_tasks(), RUN, folder=folder, resume=True, cpu=True)
    assert fingerprint(joint.collapse()) == before and len(str(caught.value)) < 4100
    assert all(len(joint.dictionary[key].psi) == len(psi[key]) for key in psi)


def without(*names):
    return lambda tensors, document: [tensors.pop(StateKey.parse(name)) for name in names]


def put(name, value):
    return lambda tensors, document: tensors.update({StateKey.parse(name): value})


def say(key, value):
    return lambda tensors, document: document.update({key: value})


def changed(name, change):
    return lambda tensors, document: tensors.update(
        {StateKey.parse(name): change(tensors[StateKey.parse(name)])}
    )


MODEL, CONTEST = f"model/bank/{BANK}", f"contest/{BANK}"


@pytest.mark.parametrize(("change", "said"), [
    (changed(f"{MODEL}/psi", lambda t: t + 10**6), "must align locations to 0 to .* found 1000"),
    (changed(f"{MODEL}/psi", lambda t: t - 1), "must align locations to 0"),
    (changed(f"{MODEL}/psi", lambda t: t[:-1]), "must have psi of"),
    (changed(f"{MODEL}/psi", lambda t: t.float()), "must have psi of torch.int64"),
    (changed(f"{MODEL}/rows", lambda t: t[:, :-1].clone()), "must have rows of 64 elements"),
    (changed(f"{MODEL}/contexts", lambda t: t.double()), "must have contexts of torch.float32"),
    (without(f"{MODEL}/rows"), "has no rows"),
    (changed("model/member/a/0.weight", lambda t: t.T.contiguous()), "0.weight' must be"),
    (put("model/member/c/x", torch.zeros(1)), "'member/c/x' is none of its tensors"),
    (put("anything", torch.zeros(1)), "'anything' is none of a state's tensors"),
    (without(f"{CONTEST}/soft"), "a contest must have candidates, chosen, soft"),
    (changed(f"{CONTEST}/soft", lambda t: t[:, :-1].clone()), "a soft weight for each candidate"),
    (changed(f"{CONTEST}/chosen", lambda t: t.flip(0)), "in their order"),
    (changed(f"{CONTEST}/chosen", lambda t: t + 10**6), "in their order"),
    (changed(f"{CONTEST}/candidates", lambda t: t + 10**6), "among hypermodules 0 to"),
    (changed(f"{CONTEST}/candidates", lambda t: t.flip(1)), "own hypermodule as its first"),
    (changed(f"{CONTEST}/contexts", lambda t: t[..., :-1].clone()), "challengers must have contexts"),
    (changed(f"identity/{BANK}", lambda t: t[:-1]), "hypermodules of bank .* must be numbered"),
    (changed(f"identity/{BANK}", lambda t: t + 10**6), "numbers below"),
    (changed("optimizer/0/exp_avg", lambda t: t[:-1]), "'exp_avg' of the optimizer's parameter 0"),
    (changed("optimizer/0/step", lambda t: -t), "'step' of the optimizer's parameter 0"),
    (without("optimizer/0/exp_avg_sq"), "of parameter 0 the optimizer must keep"),
    (put("optimizer/99/exp_avg", torch.zeros(1)), "something is kept of .'99'"),
    (without("running/classes"), "running losses must be of all tasks"),
    (changed("random/evolution", lambda t: t[:-1]), "'random/evolution' must be the state of a generator"),
    (without("random/0/torch"), "'random/0/torch' must be"),
    (changed("random/0/numpy", lambda t: -t - 1), "624 words"),
    (say("generation", 10**59), "generation"),
    (say("generation", 1000), "within 4 generations of 3 steps, found generation 1000"),
    (say("step", None), "step"),
    (say("born", {}), "must be numbered"),
    (say("streams", {}), "its tasks must be classes, product"),
    (say("streams", {"classes": {"epoch": 2**40, "position": 0}}), "streams.classes.epoch"),
    (say("schedule", 10**9), "schedule cannot be"),
    (say("optimizer", [1]), "optimizer"),
    (say("random", []), "random"),
    (say("keep", None), "keep"),
    (say("hardened", True), r"methods that this run does not use: \['hardened'\]"),
    (say("moved", 2), "must lie between 0 and 1, found 2"),
    (say("born", {"x": -1}), "must be counted"),
    (say("plan", {"x" * 10**6: 1}), "belongs to another plan"),
])  # fmt: skip
def test_a_state_that_does_not_fit(copy, change, said):
    tensors, document = read_state(copy / STATE)
    change(tensors, document)
    write_state(copy / STATE, tensors, document)
    refused(copy, said)


@pytest.mark.parametrize("name", [STATE, BEST])
@pytest.mark.parametrize("at", [3, 200, -5])
def test_a_flipped_bit_of_a_state_is_found(copy, name, at):
    data = bytearray((copy / name).read_bytes())
    data[at] ^= 4
    (copy / name).write_bytes(data)
    refused(copy, rf"checkpoint .*{name}")


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
@pytest.mark.parametrize("name", [STATE, BEST, NAME])
def test_no_file_of_a_run_is_waited_for(copy, name, kind):
    (copy / name).unlink()
    special(kind, copy / name)
    refused(copy, name)


def test_the_best_state_may_not_get_lost(copy):
    tensors, _ = read_state(copy / BEST, BestDocument)
    psi = StateKey("bank", BANK, "psi")
    write_state(copy / BEST, tensors, {"generation": -1})
    refused(copy, "is of generation -1, not")
    write_state(copy / BEST, {**tensors, psi: tensors[psi] + 10**6}, {"generation": 3})
    refused(copy, f"in {BEST} bank .* must align")
    (copy / BEST).unlink()
    refused(copy, "the best state so far, is missing")


def test_states_of_before_have_no_digest(run, copy):
    """What earlier versions wrote goes on, to the same weights."""
    from safetensors.torch import save_file

    ends = []
    for folder, old in ((copy, False), (shutil.copytree(run, copy.with_name("old")), True)):
        for name in (STATE, BEST) if old else ():
            with safe_open(folder / name, framework="pt") as file:
                document = json.loads(file.metadata()["document"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            document.get("keep", {}).pop("file", None)
            save_file(tensors, folder / name, metadata={"document": json.dumps(document)})
        joint = build()
        train(joint, run_tasks(), RUN, folder=folder, resume=True, cpu=True)
        ends.append(fingerprint(joint.collapse()))
    assert ends[0] == ends[1]


# Logs -------------------------------------------------------------------------------------------------------


def edit(change):
    def apply(lines):
        change(lines)
        return "".join(json.dumps(line) + "\n" for line in lines)

    return apply


@pytest.mark.parametrize(("change", "said"), [
    (edit(lambda lines: lines.insert(1, None)), "line 2: must say its event, but is None"),
    (edit(lambda lines: lines.insert(1, [1, 2])), "line 2: must say its event"),
    (edit(lambda lines: lines.insert(1, {})), "line 2: must say its event"),
    (edit(lambda lines: lines.pop(0)), "no line says what is trained"),
    (edit(lambda lines: lines[1].pop("losses")), "line 2: losses: Field required"),
    (edit(lambda lines: lines[1]["losses"].pop("classes")), r"generation 0 has no loss of \['classes'\]"),
    (edit(lambda lines: lines[1]["losses"].update(classes=float("nan"))), "line 2: losses.classes"),
    (edit(lambda lines: lines[1].update(share="0.5")), "line 2: share"),
    (edit(lambda lines: lines[1]["alignment"][BANK].pop()), "generation .* aligns .* locations of"),
    (edit(lambda lines: lines[1].update(alignment={})), "do not align the same banks"),
    (edit(lambda lines: lines[0]["sites"][0].__setitem__(4, 10**9)), "reaches beyond the locations"),
    (edit(lambda lines: lines[1].update(mixtures={"x": [[1.0]]})), "mixtures of"),
    (lambda lines: "[" * 5000 + "\n", "line 1 must nest at most"),
    (lambda lines: "null\n" * 50, "and 45 more"),
    (lambda lines: "\ud800\n", "line 1 is not UTF-8"),
])  # fmt: skip
def test_a_log_that_is_none(copy, change, said):
    text = change([json.loads(line) for line in (copy / NAME).read_text().splitlines()])
    (copy / NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(TrainingError, match=said) as caught:
        read_log(copy / NAME)
    assert len(str(caught.value)) < 2500
    code, _, err = command("report", copy)
    assert code == 2 and "must be the log" in err


def test_half_a_line_at_the_end_is_what_a_kill_left(copy):
    before = read_log(copy / NAME)
    with (copy / NAME).open("a") as file:
        file.write('{"event": "gener')
    assert read_log(copy / NAME) == before


def test_a_log_of_a_terabyte_is_refused(copy):
    os.truncate(copy / NAME, 1 << 40)
    with pytest.raises(TrainingError, match="at most"):
        read_log(copy / NAME)


def test_what_a_log_says_is_printed_as_it_is(copy):
    """Rich reads markup in square brackets, where nobody stops it."""
    text = (copy / NAME).read_text().replace('"classes"', '"[/red] [bold]classes"')
    (copy / NAME).write_text(text)
    code, out, err = command("report", copy)
    assert code == 0 and "[/red] [bold]classes" in out, err
