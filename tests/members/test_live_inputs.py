"""Live modules as users have them: wrapped ones are unwrapped, others are refused by the names of their tensors."""

import copy

import accelerate
import pytest
import torch
from tiny_transformers import tiny
from torch import nn

import surgery
from surgery.errors import LoadError


def _net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


X = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))


def _compiled_layer(net):
    net[1] = torch.compile(net[1], backend="eager")
    return net


def _in_place(net):
    net.compile(backend="eager")
    return net


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda net: torch.compile(net, backend="eager"),
        lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
        _compiled_layer,
        _in_place,
    ],
)
def test_wrapped_modules_are_what_is_inside(wrap):
    net = _net()
    with torch.no_grad():
        wanted, names = net(X), list(net.state_dict())
    member = surgery.load_member(wrap(net), name="net", inputs=X)
    net.cpu()  # where there is a GPU, DataParallel moves what it wraps there
    assert member.module is net and list(net.state_dict()) == names
    joint = surgery.join([member], block=(8, 8))
    with torch.no_grad():
        assert torch.equal(joint["net"](X), wanted)


def test_distributed_data_parallel_is_unwrapped(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = _net()
        wrapped = nn.parallel.DistributedDataParallel(net)
        assert surgery.load_member(wrapped, name="net", inputs=X).module is net
        from torch.distributed.fsdp import fully_shard

        with pytest.raises(LoadError, match=r"FSDP has cut those of the module itself"):
            surgery.load_member(fully_shard(_net()), name="net", inputs=X)
    finally:
        torch.distributed.destroy_process_group()


def _lazy():
    return nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 16))


def _quantised():
    return torch.ao.quantization.quantize_dynamic(_net(), {nn.Linear}, dtype=torch.qint8)


def _sparse():
    net = _net()
    net[1].weight = nn.Parameter(net[1].weight.detach().to_sparse())
    return net


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_lazy, r"0\.weight, 0\.bias have no shape yet: run the module once"),
        (lambda: _net().to("meta"), r"0\.weight, .* are on the meta device"),
        (lambda: torch.jit.script(_net()), "TorchScript.*give the module that was scripted"),
        (lambda: torch.jit.trace(_net(), X), "TorchScript"),
        (_sparse, r"1\.weight are sparse .*to_dense"),
    ],
)
def test_what_holds_no_ordinary_weights_is_refused_by_name(make, said):
    with pytest.raises(LoadError, match=said):
        surgery.load_member(make(), name="net", inputs=X)


def test_offloaded_modules_are_refused_by_name(tmp_path):
    offloaded = {
        "disk": lambda net: accelerate.disk_offload(net, str(tmp_path), execution_device="cpu"),
        "cpu": lambda net: accelerate.cpu_offload(net, execution_device="cpu"),
    }
    for offload in offloaded.values():
        with pytest.raises(LoadError, match=r"0\.weight.*meta device.*device_map='cpu'"):
            surgery.load_member(offload(_net()), name="net", inputs=X)


def test_hooks_that_move_nothing_are_taken_off():
    net = _net()
    with torch.no_grad():
        wanted = net(X)
    accelerate.dispatch_model(net, {"": "cpu"}, force_hooks=True)
    assert any(hasattr(part, "_hf_hook") for part in net.modules())
    joint = surgery.join([surgery.load_member(net, name="net", inputs=X)], block=(8, 8))
    assert not any(hasattr(part, "_hf_hook") for part in net.modules())
    with torch.no_grad():
        assert torch.equal(joint["net"](X), wanted)
        assert torch.equal(joint.extract("net")(X), wanted)


def test_modules_with_hooks_of_the_users_own_are_loaded_with_them():
    net, seen = _net(), []
    net[2].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    joint = surgery.join([surgery.load_member(net, name="net", inputs=X)], block=(8, 8))
    seen.clear()
    joint["net"](X)
    assert len(seen) == 1


def test_tensors_of_torchao_are_refused_by_name():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(net := _net(), Int8WeightOnlyConfig())
    with pytest.raises(LoadError, match=r"0\.weight, .* are quantised or wrapped \(Int8Tensor\)"):
        surgery.load_member(net, name="net", inputs=X)


def test_tensors_of_quanto_are_refused_by_name():
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(net := _net(), weights=quanto.qint8)
    quanto.freeze(net)
    with pytest.raises(LoadError, match=r"0\.weight, .* are quantised or wrapped"):
        surgery.load_member(net, name="net", inputs=X)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("used", ["eager", "sdpa"])
def test_attention_of_a_live_model_is_kept(kind, used, tmp_path):
    net = tiny(kind)
    net.set_attn_implementation(used)
    member = surgery.load_member(net)
    with torch.no_grad():
        wanted = copy.deepcopy(net)(**member.inputs.kwargs)[0]
    joint = surgery.join([member], block=(8, 8))
    surgery.save(joint, tmp_path / "saved")
    again = surgery.load(tmp_path / "saved")
    module = again[member.name]
    assert module.config._attn_implementation == used
    assert ("attn_implementation" in member.origin.options) == (used == "eager")
    with torch.no_grad():
        assert torch.equal(module(**member.inputs.kwargs)[0], wanted)


def test_attention_of_a_reference_is_chosen_kept_and_checked(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "bert")
    for choice in ("", "?attn_implementation=eager"):
        member = surgery.load_member(f"{tmp_path}/bert{choice}")
        assert member.module.config._attn_implementation == ("eager" if choice else "sdpa")
        surgery.save(surgery.join([member], block=(8, 8)), tmp_path / "saved", overwrite=True)
        again = surgery.load(tmp_path / "saved")["bert"]
        assert again.config._attn_implementation == ("eager" if choice else "sdpa")
    with pytest.raises(LoadError, match="must be one of eager, sdpa, flex_attention, found 'org/kernel'"):
        surgery.load_member(f"{tmp_path}/bert?attn_implementation=org/kernel")
