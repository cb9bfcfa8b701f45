"""On an accelerator: training in every precision, going on, templates, adaptation, the fit, packed members."""

import gc
from pathlib import Path

import adaptation_nets
import pytest
import resident_bodies as bodies
import stacked_nets as stacked
import torch
from ended_runs import stopped_at
from nets import family, originals, outside_error
from training_nets import CONFIG, build, net, tasks

import surgery
from surgery.core.joining import join
from surgery.disk.journal import Journal, kept_in
from surgery.errors import TrainingError
from surgery.fitting.fit import fit
from surgery.inputs.probes import probe_inputs
from surgery.training.loop.interruptions import Interrupted
from surgery.training.tasks.tasks import Task
from surgery.training.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ONE_PHASE = {"burn_in": 0, "generations": 0, "final": 1}


def assert_finite(joint):
    assert all(t.isfinite().all() for state in joint.collapse().values() for t in state.values())


def test_first_losses_are_those_of_the_cpu():
    """Later ones are not: a choice between alternatives turns rounding into another alignment."""
    losses = []
    for cpu in (True, False):
        joint = build(0.0)
        report = train(joint, tasks(), {**CONFIG, **ONE_PHASE, "steps": 3}, cpu=cpu)
        assert {p.device.type for p in joint.parameters()} == {"cpu" if cpu else "cuda"}
        losses.append([score.loss for score in report.scores.values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"mixed_precision": "bf16"}, {"accumulate": 2, "optimizer": {"clip": 0.5}}]
)
def test_captured_steps_end_where_others_do(changes):
    ends = []
    for capture in (False, True):
        joint = build(0.0)
        config = {**CONFIG, "steps": 12, "optimizer": {"lr": 0.01}, **changes, "capture": capture}
        report = train(joint, tasks(), config)
        ends.append((joint.collapse(), {name: score.loss for name, score in report.scores.items()}))
    assert ends[0][1] == ends[1][1]
    for name, state in ends[0][0].items():
        assert all(torch.equal(tensor, ends[1][0][name][key]) for key, tensor in state.items())


def test_captured_recurrent_members_end_where_others_do():
    """cuDNN would move the weights of recurrent layers in each pass; dropout draws on the device."""
    from surgery_recipes.nets import word_model

    ends = []
    for capture in (False, True):
        torch.manual_seed(0)
        made = {"a": word_model(50, 16), "b": word_model(50, 16)}
        members = [surgery.load_member(m, name=name, inputs=inputs) for name, (m, inputs) in made.items()]
        words = torch.randint(50, (24, 7))
        data = [(words[i : i + 4], words[i : i + 4]) for i in range(0, 24, 4)]
        joint = join(members, block=(8, 8))
        config = {"steps": 10, "generations": 2, "capture": capture}
        train(joint, [Task(name, name, data) for name in made], config)
        ends.append(joint.collapse())
    for name, state in ends[0].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, ends[1][name][key]), (name, key)


def test_members_that_look_at_values_are_not_captured():
    class Looks(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x if bool((x > 1e9).any()) else x + 0)

    def member():
        nets = torch.nn.Linear(8, 16), torch.nn.Linear(16, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3)
        return surgery.load_member(Looks(*nets), name="net", inputs=torch.randn(4, 8))

    data = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(4)]
    config = {"steps": 4, "generations": 1, "capture": True}
    with pytest.raises(TrainingError, match="`capture` needs members and losses that never look"):
        train(join([member()], block=(8, 8)), [Task("a", "net", data)], config)
    train(join([member()], block=(8, 8)), [Task("a", "net", data)], {**config, "capture": False})


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_learns_and_its_artifact_runs_on_the_cpu(precision, tmp_path):
    start, joint = build(), build()
    begun = train(start, tasks(), {**CONFIG, **ONE_PHASE, "steps": 1, "optimizer": {"lr": 1e-12}})
    report = train(
        joint, tasks(), {**CONFIG, "steps": 40, "mixed_precision": precision}, folder=tmp_path / "run"
    )
    assert all(score.loss < begun.scores[name].loss for name, score in report.scores.items())
    assert_finite(joint)
    out = surgery.save(joint, tmp_path / "artifact")
    for device in ("cpu", "cuda"):
        loaded = surgery.load(out, modules={"a": net(2), "b": net(1)}, device=device)
        assert {p.device.type for p in loaded.parameters()} == {device}
        for name, state in joint.collapse().items():
            for key, tensor in loaded.collapse()[name].items():
                torch.testing.assert_close(tensor.cpu(), state[key].cpu(), rtol=1e-5, atol=1e-6)


def test_compiled_members_train():
    joint = build()
    train(joint, tasks(), {**CONFIG, "compile": True})
    assert_finite(joint)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("step", [3, 12, 30])
def test_interrupted_and_resumed_it_ends_as_an_unbroken_run(tmp_path, monkeypatch, step, precision):
    settings, whole, joint = {**CONFIG, "mixed_precision": precision}, build(), build()
    report = train(whole, tasks(), settings)
    with stopped_at(step), pytest.raises(Interrupted):
        train(build(), tasks(), settings, folder=tmp_path)
    again = train(joint, tasks(), settings, folder=tmp_path, resume=True)
    assert again.hypermodules == report.hypermodules
    for name, state in whole.collapse().items():
        for key, tensor in joint.collapse()[name].items():
            torch.testing.assert_close(tensor, state[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_templates_train(precision):
    joint = stacked.build()
    report = train(joint, [stacked.task()], {**stacked.CONFIG, "mixed_precision": precision})
    assert report.templates == {"stack0": 2}
    assert_finite(joint)


def test_adaptation_runs_and_goes_on(tmp_path, monkeypatch):
    def run(**more):
        joint = adaptation_nets.twins("batch")
        task = adaptation_nets.task(joint, {"moments": 1.0, "adversary": 0.5})
        train(joint, [task], adaptation_nets.CONFIG, **more)
        return joint.collapse("target")

    whole = run()
    with stopped_at(7), pytest.raises(Interrupted):
        run(folder=tmp_path)
    found = run(folder=tmp_path, resume=True)
    for key, tensor in whole.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5)


def test_a_fit_on_the_device_keeps_its_bound_on_the_cpu():
    members = family("mlp", 3)
    before = originals(members)
    joint = fit(join(members), max_error=0.1, device="cuda")
    joint.to("cpu").bodies.eval()
    for one in members:
        probes = probe_inputs(one)
        assert (
            outside_error(before[one.name], joint[one.name], probes) <= 0.1 * 1.01
        )  # rounding of the device


@pytest.mark.parametrize("kept", [False, True])
def test_relatives_are_fitted_on_the_device_with_a_journal_and_without(kept, tmp_path):
    """What a merge keeps for going on lies in files, on the CPU."""
    journal = Journal(tmp_path / "journal", {}, tmp_path / "out") if kept else None
    with kept_in(journal):
        joint = fit(join(family("mlp", 3)), budget=0.2, device="cuda")
    assert all(error < 0.5 for error in joint.report.errors.values())
    assert_finite(joint)


@pytest.mark.parametrize("asked", [{"templates": 2}, {"max_error": 0.2}, {"max_error": 2.0, "templates": 2}])
def test_templates_are_fitted_on_the_device_as_on_the_cpu(asked):
    plans = [stacked.build(hidden=400, templates=asked.get("templates")) for _ in range(2)]
    found = [fit(each, **asked, device=device) for each, device in zip(plans, ("cpu", "cuda"), strict=True)]
    errors = [joint.report.errors["net"] for joint in found]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    sizes = [joint.report.stored_bytes for joint in found]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_a_bank_of_hypermodules_is_fitted_on_the_device():
    joint = fit(join(family("mlp", 2)), hypermodules=6, device="cuda")
    assert_finite(joint)


CUDA = torch.device("cuda")


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for artifacts, made when what libraries keep for themselves on the device is there."""
    with torch.no_grad():
        bodies.seeded(bodies.Many).cuda()(bodies.IDS.cuda())
        bodies.seeded(bodies.Wide).cuda()(bodies.draw(4, 32).cuda())
    return tmp_path_factory.mktemp("artifacts")


@pytest.mark.parametrize("way, cache", [("packed", 0), ("shared", 0), ("shared", 1 << 20)])
@pytest.mark.parametrize("how", ["load", "to", "module"])
@pytest.mark.parametrize("kind", bodies.CASES)
def test_packed_members_compute(kind, how, way, cache, artifacts, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    bodies.moved_members_compute(kind, way, cache, how, CUDA, artifacts, allocated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_of_packed_members(dtype, artifacts):
    bodies.casts_stay_packed(dtype, CUDA, artifacts)


def test_packed_members_take_turns(artifacts):
    bodies.members_take_turns(CUDA, artifacts)


def test_what_is_extracted_of_packed_members_trains(artifacts):
    bodies.extracted_trains(CUDA, artifacts)


def test_a_packed_layer_allocates_one_weight_at_a_time(artifacts):
    def peak(run):
        before = allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    bodies.one_weight_at_a_time(CUDA, artifacts, peak)
