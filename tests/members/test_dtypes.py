"""Dtypes come from the file, tensor by tensor, whatever a configuration says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from artifacts import seeded
from safetensors.torch import load_file, save_file
from tiny_transformers import TINY, save_tiny, tiny

import surgery
from surgery.artifact.export import export
from surgery.artifact.folder import load, save
from surgery.artifact.verify import verify
from surgery.errors import LoadError
from surgery.inputs import forward_error
from surgery.members.origins.dtypes import stored_dtypes, widest
from surgery.members.references import load_member

HALF, FULL, EIGHT = torch.bfloat16, torch.float32, torch.float8_e4m3fn


def rewritten(folder: Path, change, config: str | None = None) -> Path:
    """A folder of transformers' with `change(name, tensor)` for each tensor, and `config` as dtype in its config."""
    state = {name: change(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": config, "torch_dtype": config}))
    return folder


def file_dtypes(folder: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


def as_in_file(module: torch.nn.Module, folder: Path) -> None:
    """Every tensor has the file's bytes, under the names that the file uses."""
    stored, own = load_file(folder / "model.safetensors"), module.state_dict()
    assert {*stored} <= {*own}
    for name, tensor in stored.items():
        assert own[name].dtype == tensor.dtype, name
        assert torch.equal(own[name], tensor), name


@pytest.mark.parametrize("stored, said", [(FULL, "bfloat16"), (HALF, "float32"), (torch.float16, "bfloat16")])
def test_the_file_decides_and_not_the_configuration(tmp_path: Path, stored: torch.dtype, said: str):
    folder = rewritten(save_tiny("bert", tmp_path / "text"), lambda _, t: t.to(stored), said)
    member = load_member(str(folder), name="text")
    as_in_file(member.module, folder)
    out = save(surgery.join([member], block=(8, 8)), tmp_path / "joint")
    as_in_file(load(out).extract("text"), folder)
    assert verify(out, origins=True).ok
    plain = export(out, "text", tmp_path / "plain")
    assert file_dtypes(plain) == file_dtypes(folder)
    assert json.loads((plain / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")


def norms(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(FULL if "norm" in name.lower() or ".ln_" in name else HALF)


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2"])
def test_norms_of_their_own_dtype(tmp_path: Path, kind: str):
    folder = rewritten(save_tiny(kind, tmp_path / "m"), norms, "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        member = load_member(str(folder), name="m")
    state = member.module.state_dict()
    assert {name: state[name].dtype for name in file_dtypes(folder) if name in state}.items() <= {
        **file_dtypes(folder)
    }.items()
    assert forward_error(member.module, member.inputs) is None
    assert {site.dtype for site in surgery.discover(member).sites} == {"bfloat16"}
    joint = surgery.join([member], block=(8, 8))
    out = save(joint, tmp_path / "joint")
    assert verify(out, origins=True).ok
    plain = export(out, "m", tmp_path / "plain")
    assert file_dtypes(plain) == file_dtypes(folder)
    # What loads all tensors in the dtype that the configuration says must lose none of them.
    assert json.loads((plain / "config.json").read_text())["dtype"] == "float32"


def test_dtypes_that_a_class_cannot_compute_with_are_widened_with_a_warning(tmp_path: Path):
    folder = rewritten(save_tiny("llama", tmp_path / "m"), norms, "bfloat16")
    with pytest.warns(UserWarning, match=r"bfloat16 \(.*held as float32"):
        member = load_member(str(folder), name="m")
    state = member.module.state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert state[name].dtype == FULL and torch.equal(state[name], tensor.float())
    assert forward_error(member.module, member.inputs) is None
    assert member.origin.options["dtype"] == "float32"


@pytest.mark.parametrize("eight", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_widened_with_a_warning_where_it_is_computed_with(tmp_path: Path, eight: torch.dtype):
    folder = rewritten(
        save_tiny("bert", tmp_path / "m"),
        lambda n, t: t.to(eight if "attention" in n and t.ndim == 2 else HALF),
    )
    with pytest.warns(UserWarning, match=str(eight).removeprefix("torch.")):
        member = load_member(str(folder), name="m")
    stored = load_file(folder / "model.safetensors")
    state = member.module.state_dict()
    assert all(torch.equal(state[name], stored[name].to(HALF)) for name in stored)


def test_sharded_and_pickled_folders(tmp_path: Path):
    module = tiny("bert").to(HALF)
    module.config.dtype = "float32"
    module.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    state = {name: norms(name, tensor) for name, tensor in module.state_dict().items()}
    (tmp_path / "bin").mkdir()
    module.config.save_pretrained(tmp_path / "bin")
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    shards = load_member(str(tmp_path / "shards"), name="m").module.state_dict()
    assert {t.dtype for t in shards.values()} == {HALF}
    pickled = load_member(str(tmp_path / "bin"), name="m").module.state_dict()
    assert {name: t.dtype for name, t in pickled.items()} == {name: t.dtype for name, t in state.items()}
    assert {n: d for n, (d, _) in stored_dtypes(tmp_path / "bin").items()} == {
        n: t.dtype for n, t in state.items()
    }


def test_tensors_that_are_renamed_and_merged_keep_their_sources_dtypes(tmp_path: Path):
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    module = seeded(lambda: transformers.MixtralForCausalLM(config))
    module.save_pretrained(tmp_path / "m")
    names = file_dtypes(tmp_path / "m")
    assert not {*names} <= {*module.state_dict()}  # experts are merged while they load
    folder = rewritten(tmp_path / "m", lambda n, t: t.to(FULL if "gate.weight" in n else HALF), "bfloat16")
    from surgery.members.origins.transformers_dtypes import FileDtypes

    found = FileDtypes.of(type(module), config, folder)
    assert found.common == FULL
    assert {name for name, dtype in found.tensors.items() if dtype == FULL} == {
        name for name in module.state_dict() if name.endswith("gate.weight")
    }
    assert found.tensors.keys() == module.state_dict().keys()


def test_integers_for_weights_are_refused(tmp_path: Path):
    folder = rewritten(
        save_tiny("bert", tmp_path / "m"),
        lambda n, t: t.mul(9).to(torch.int8 if "query.weight" in n else FULL),
    )
    with pytest.raises(LoadError, match=r"query\.weight \(int8 for float32\).*Dequantise"):
        load_member(str(folder), name="m")


def timm_state(change) -> dict[str, torch.Tensor]:
    state = seeded(lambda: timm.create_model("test_resnet")).state_dict()
    return {name: change(name, tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_of_timm_keep_their_dtypes(tmp_path: Path, ending: str):
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.to(torch.int32)
        return tensor.to(FULL if ".bn" in name or name.startswith("bn") else HALF)

    state, path = timm_state(change), tmp_path / f"w.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    member = load_member(f"m=timm:test_resnet={path}")
    found = member.module.state_dict()
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in state.items()}
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert forward_error(member.module, member.inputs) is None
    out = save(surgery.join([member], block=(8, 8)), tmp_path / "joint")
    assert verify(out, origins=True).ok
    plain = load_file(export(out, "m", tmp_path / "plain") / "model.safetensors")
    assert {n: t.dtype for n, t in plain.items()} == {n: t.dtype for n, t in state.items()}


def test_one_tensor_with_two_values_is_refused(tmp_path: Path):
    from surgery.members.origins.weights import load_exactly

    module = tiny("bert_mlm")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["cls.predictions.decoder.weight"] += 1
    with pytest.raises(LoadError, match=r"word_embeddings\.weight and cls\.predictions\.decoder\.weight"):
        load_exactly(tiny("bert_mlm"), state, "w")


def test_tied_names_with_two_values_in_a_folder_are_untied(tmp_path: Path):
    save_tiny("bert_mlm", tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    embedding = next(name for name in state if name.endswith("word_embeddings.weight"))
    state["cls.predictions.decoder.weight"] = state[embedding] + 1
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    member = load_member(str(tmp_path / "m"), name="m")
    own = member.module.state_dict()
    assert torch.equal(own["cls.predictions.decoder.weight"], own[embedding] + 1)
    out = save(surgery.join([member], block=(8, 8)), tmp_path / "joint")
    assert verify(out, origins=True).ok
    again = load_member(str(export(out, "m", tmp_path / "plain")), name="m").module.state_dict()
    assert torch.equal(again["cls.predictions.decoder.weight"], again[embedding] + 1)


def test_verify_names_dtypes_that_are_not_the_origins(tmp_path: Path):
    folder = save_tiny("bert", tmp_path / "m")
    out = save(surgery.join([load_member(str(folder), name="m")], block=(8, 8)), tmp_path / "joint")
    rewritten(folder, lambda _, t: t.to(HALF))
    (check,) = verify(out, origins=True).members
    assert not check.ok and "bfloat16" in " ".join(check.reasons)


def test_the_widest_dtype_holds_every_value():
    floats = [
        FULL,
        HALF,
        torch.float16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e8m0fnu,
    ]
    for one in floats:
        for other in floats:
            for dtype in (one, other):
                found = widest([one, other])
                assert found is not None
                if dtype.itemsize < 4:
                    bits = torch.arange(256**dtype.itemsize).to(torch.int32)
                    values = bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
                    back = values.to(found).to(dtype)
                    kept = back.float().eq(values.float()) | values.float().isnan()
                    assert bool(kept.all()), (dtype, found)
    assert widest([torch.int8]) is None and set(TINY)


class Scales(torch.nn.Module):
    """A net with a float8 buffer and a complex one that are carried, and that compute in float32."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        self.register_buffer("codes", torch.linspace(-3, 3, 4096).to(EIGHT))
        self.register_buffer("turn", torch.polar(torch.ones(16), torch.linspace(0, 3, 16)))
        self.register_buffer("flags", torch.arange(16) % 3 == 0)
        self.register_buffer("fine", torch.linspace(0, 1, 600, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.codes.float().mean() + self.fine.float().mean() + self.flags.float()
        return self.layers(x) * scale * self.turn.abs()


def test_tensors_of_any_dtype_go_through_a_fit_and_back(tmp_path: Path):
    module = seeded(Scales)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    joint = surgery.join([load_member(module, name="m", inputs=torch.ones(2, 16))], block=(8, 8))
    surgery.fit(joint, max_error=0.05)
    out = save(joint, tmp_path / "joint")
    after = load(out, modules={"m": Scales().eval()}).collapse("m")
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    for name in ("codes", "turn", "flags"):
        assert torch.equal(after[name].cpu(), before[name]), name
    plain = load_file(export(out, "m", tmp_path / "plain") / "model.safetensors")
    assert {n: t.dtype for n, t in plain.items()} == {n: t.dtype for n, t in before.items()}


def test_bytes_of_plain_files_know_every_dtype(tmp_path: Path):
    from surgery.safetensors.writing import aligned_file_bytes, write_aligned

    dtypes = [EIGHT, torch.float8_e5m2, torch.complex64, torch.bool, torch.uint16, HALF, torch.float64]
    for dtype in dtypes:
        state = {"a": torch.zeros(3, 5).to(dtype)}
        entries = [(name, t.dtype, tuple(t.shape)) for name, t in state.items()]
        write_aligned(tmp_path / "w", state)
        assert aligned_file_bytes(entries) == (tmp_path / "w").stat().st_size, dtype


def test_float8_with_scales_is_said_and_its_export_is_not_called_quantised(tmp_path: Path):
    folder = save_tiny("llama", tmp_path / "m")
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = tensor.mul(8).to(EIGHT) if "proj.weight" in name else tensor.to(HALF)
        if "proj.weight" in name:
            stored[f"{name}_scale_inv"] = torch.full([-(-size // 16) for size in tensor.shape], 1 / 8)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    how = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": "bfloat16", "quantization_config": how})
    )
    with pytest.warns(UserWarning, match=r"7 tensors are stored as float8_e4m3fn .* held as bfloat16"):
        member = load_member(str(folder), name="m")
    out = save(surgery.join([member], block=(8, 8)), tmp_path / "joint")
    plain = export(out, "m", tmp_path / "plain")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    as_in_file(load_member(str(plain), name="m").module, plain)


def test_what_is_in_no_state_dict_follows_the_tensors(tmp_path: Path):
    net = seeded(lambda: timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=28)).to(HALF)
    member = load_member(net, name="m")
    assert member.origin.kind == "timm" and net.blocks[0].attn.k_bias.dtype == HALF
    out = save(surgery.join([member]), tmp_path / "joint")
    again = load(out)["m"]
    assert {n: b.dtype for n, b in again.named_buffers()} == {n: b.dtype for n, b in net.named_buffers()}
    x = torch.ones(1, 3, 28, 28, dtype=HALF)
    assert torch.equal(again(x), net(x))


def test_pretrained_weights_of_timm_take_their_files_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from surgery.members.origins import timm as kind

    state = timm_state(lambda _, t: t.half() if t.is_floating_point() else t)
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr(kind, "_cached", lambda _: tmp_path / "model.safetensors")
    module = timm.create_model("test_resnet")
    module.load_state_dict(state)  # as timm does, into float32
    kind._narrow(module, "timm/test_resnet.r160_in1k")
    assert all(
        torch.equal(t, state[name]) and t.dtype == state[name].dtype
        for name, t in module.state_dict().items()
    )
