"""FSDP: two processes of which each holds a part give the result of one, also when killed; what is refused."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fsdp_nets
import nets
import pytest
import torch
import training_nets
from processes import ALONE, SECONDS, Started, forks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from surgery.errors import PlanError
from surgery.methods.hypermodules.explanation import explained, explained_pairs, fit_contexts, scale_contexts
from surgery.settings.training import Training
from surgery.training.distributed.columns import SomeColumns
from surgery.training.distributed.fsdp import Sharding, read_sharding, uncut
from surgery.training.distributed.sharded import ShardedModel
from surgery.training.distributed.shards import ChunkPart
from surgery.training.loop.run import STATE
from surgery.training.report.runlog import read_log
from surgery.training.train import train

PROGRAM = Path(fsdp_nets.__file__)


FSDP2 = ("--fsdp_version", "2")


def free_port():
    """Below the range from which systems give ports to whoever asks, so that nobody takes it until it is used."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("localhost", port))
            return port


def flags_of(*more):
    """Those of `accelerate launch`."""
    known = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", str(free_port())]
    known += ["--num_cpu_threads_per_process", "1"]
    return [*known, "--dynamo_backend", "no", "--mixed_precision", "no", "--use_fsdp", *(more or FSDP2)]


def launch(out, *flags, **arguments):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *flags_of(*flags)]
    return subprocess.Popen(
        [*command, str(PROGRAM), json.dumps({"out": str(out), **arguments})],
        env={**os.environ, **ALONE}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(process):
    said = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0, said[-8000:]


def environment_of(*flags):
    """What `accelerate launch` gives to the processes that it starts."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = launch_command_parser().parse_args([*flags_of(*flags), str(PROGRAM)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "environ", {})
        return prepare_multi_gpu_env(given)


def facts(out, rank=0):
    return json.loads((out / f"{rank}.json").read_text())


def assert_alike(out, expected, ranks=(0, 1)):
    """Weights within the rounding of float64 as Adam makes it larger, decisions the same, in every process."""
    wanted, weights = facts(expected), load_file(expected / "0.safetensors")
    for rank in ranks:
        assert facts(out, rank)["decided"] == wanted["decided"]
        assert facts(out, rank)["scores"] == pytest.approx(wanted["scores"], rel=1e-9)
        found = load_file(out / f"{rank}.safetensors")
        assert list(found) == list(weights)
        for name, tensor in weights.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    fsdp_nets.main(str(out))
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    Started(fsdp_nets.main, str(out), ranks=2, environment=environment_of()).succeed()
    return out


@forks
def test_two_sharded_processes_give_the_result_of_one(alone, sharded):
    assert_alike(sharded, alone)
    psi = facts(alone)["decided"]["psi"]
    assert any(len(set(own)) < len(own) for own in psi.values())  # hypermodules were removed


@forks
@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_holds_its_share(alone, sharded, rank):
    whole, part = facts(alone)["bytes"], facts(sharded, rank)["bytes"]
    assert set(part) == {"dictionary", "members", "gradients", "optimizer"}
    for what, size in part.items():
        assert 0.45 < size / whole[what] < 0.55, what


@pytest.mark.slow
def test_killed_and_resumed_it_ends_as_an_unbroken_run_in_two_processes_and_in_one(alone, tmp_path):
    out, folder = tmp_path / "two", tmp_path / "run"
    process = launch(out, folder=str(folder), slow=0.15)
    for _ in range(2400):
        if (folder / STATE).exists() and len(read_log(folder / "log.jsonl")) >= 3:
            break
        time.sleep(0.05)
    time.sleep(0.2)  # somewhere within a generation
    for pid in [process.pid, *(int((out / f"{rank}.pid").read_text()) for rank in (0, 1))]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "0.json").exists() and (folder / STATE).exists()
    state = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags = ["--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    flags += ["--fsdp_transformer_layer_cls_to_wrap", "TransformerEncoderLayer"]
    flags += ["--fsdp_reshard_after_forward", "false"]
    finished(launch(out, *flags, folder=str(folder)))  # what is gathered at once changes no result
    assert_alike(out, alone)
    again = tmp_path / "again"  # a state does not depend on how many processes wrote it
    again.mkdir()
    for name, content in state.items():
        (again / name).write_bytes(content)
    fsdp_nets.main(str(tmp_path / "one"), folder=str(again))
    assert_alike(tmp_path / "one", alone, ranks=(0,))


# What is refused ------------------------------------------------------------------------------------------


def processes(way="MULTI_CPU", count=2, precision="no", **more):
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=way), state=SimpleNamespace(), num_processes=count,
        mixed_precision=precision, device=torch.device("cpu"), process_index=0, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("accelerator", "environment", "config", "said"),
    [
        (processes("DEEPSPEED"), {}, {}, r"DEEPSPEED splits members .*MULTI_GPU.*FSDP.*fsdp_version: 2"),
        (processes("MEGATRON_LM"), {}, {}, "MEGATRON_LM splits members"),
        (processes("TP"), {}, {}, "TP splits members"),
        (processes(), {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "set `fsdp_offload_params: false`"),
        (processes(precision="fp16"), {}, {}, "use `mixed_precision: bf16`"),
        (processes(), {}, {"compile": True}, "set train.compile=false"),
        (processes(), {"FSDP_IGNORED_MODULES": "head"}, {}, "leave fsdp_ignored_modules away"),
        (processes(parallelism_config=SimpleNamespace(tp_size=2)), {}, {}, "leave the other sizes at 1"),
    ],
)  # fmt: skip
def test_what_training_cannot_take_is_refused_with_what_to_do(
    monkeypatch, accelerator, environment, config, said
):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlanError, match=f"Joint training cannot take.*{said}"):
        read_sharding(accelerator, Training.model_validate(config))


@pytest.mark.parametrize("version", ["1", None])
def test_the_first_version_of_fsdp_is_refused(monkeypatch, version):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(PlanError, match="launch it with `fsdp_version: 2`"):
        train(fsdp_nets.build(), fsdp_nets.tasks(), cpu=True)


def test_one_process_has_nothing_to_shard(monkeypatch):
    assert read_sharding(processes(), Training()) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert read_sharding(processes(count=1), Training()) is None


# Parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "world"), [(12, 3), (7, 2), (2, 4), (1, 1)])
def test_columns_put_together_are_the_whole(width, world):
    whole = torch.randn(5, width)
    columns = [SomeColumns(width, rank, world) for rank in range(world)]
    parts = torch.stack([each.cut(whole) for each in columns])
    assert torch.equal(columns[0].join(parts), whole)
    assert parts.shape[-1] == -(-width // world)


@pytest.mark.parametrize(("length", "world"), [(6, 2), (7, 3), (2, 4)])
def test_chunks_are_those_of_pytorch(length, world):
    whole = torch.randn(length, 3)
    own = [ChunkPart(whole.shape, rank, world).own(whole) for rank in range(world)]
    assert torch.equal(torch.cat(own), whole)
    for found, wanted in zip(own, whole.chunk(world), strict=False):
        assert torch.equal(found, wanted)


def test_what_is_told_from_sums_over_columns_is_what_whole_blocks_tell():
    draw = torch.Generator().manual_seed(0)
    blocks, rows = torch.randn(9, 12, generator=draw), torch.randn(4, 3, 12, generator=draw)
    rows[1, 2] = rows[1, 0] - 2 * rows[1, 1]  # adds nothing
    rows[2] = 0
    which = torch.randint(4, (9, 2), generator=draw)
    contexts = fit_contexts(blocks, rows, which)

    def alike(function, *args):
        torch.testing.assert_close(function(*args, total=torch.clone), function(*args), rtol=1e-4, atol=1e-5)

    alike(explained, blocks, rows)
    alike(explained_pairs, blocks, rows[which[:, 0]])
    alike(fit_contexts, blocks, rows, which)
    alike(scale_contexts, contexts, blocks, rows, which)


def cut(**options):
    return Sharding(None, torch.device("cpu"), 0, 2, **options)


def test_units_are_the_layers_that_a_member_repeats():
    net = fsdp_nets.Reader()
    assert cut().units(net) == list(reversed(net.layers))
    assert cut(root=True).units(net) == []
    assert cut(classes=("LSTM",)).units(net) == [net.recur]
    assert net.embed not in cut(least=0).units(net)  # shares its weight with what lies outside
    assert net.recur in cut(least=0).units(net) and net not in cut(least=0).units(net)


def test_numbers_alone_and_other_dtypes_stay_whole():
    net = fsdp_nets.Reader()
    net.embed.bfloat16()
    assert uncut(net) == {net.shift, net.embed.weight}
    assert uncut(nn.ReLU()) == set()


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_gradients_are_handed_over_once_and_those_of_a_penalty_are_added(one_process):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    plain, joint = (training_nets.build(0.0).open(2) for _ in range(2))
    with plain.step():
        plain["a"](x).square().mean().backward()
    wanted = {name: p.grad for name, p in plain.private("a").items()}
    model = ShardedModel(joint, Sharding(one_process, torch.device("cpu"), 0, 1))
    with model.step():
        model["a"](x).square().mean().backward()
    private = {name: model["a"].get_parameter(name) for name in wanted}
    held = {name: model.stepped(p) for name, p in private.items()}
    assert all(held[name] is not p and p.grad is None for name, p in private.items())
    for name, gradient in wanted.items():
        torch.testing.assert_close(held[name].grad, gradient)
    sum(p.square().sum() for p in private.values()).backward()  # what a method's penalty adds
    for _ in range(2):  # the second time there is nothing left
        model.hand_over()
        for name, gradient in wanted.items():
            torch.testing.assert_close(held[name].grad, gradient + 2 * held[name].detach())
            assert private[name].grad is None
    assert all(local.grad is None for p, local in model._private if not any(p is q for q in private.values()))
    whole = model.give_back()
    nets.assert_same_bits(whole.collapse("a"), training_nets.build(0.0).open(2).collapse("a"))
