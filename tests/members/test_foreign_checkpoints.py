"""Checkpoints that other tools wrote: wrappers' prefixes, adapters of peft, quantised folders."""

import json
import re
import shutil
import sys

import pytest
import timm
import torch
from nets import assert_same_bits
from safetensors.torch import load_file, save_file
from surgery_cli.__main__ import app
from tiny_transformers import tiny
from typer.testing import CliRunner

import surgery
from surgery.errors import LoadError
from surgery.members.origins.prefixes import WRAPPERS, find_prefix
from surgery.members.references import check_references

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.", "module._orig_mod.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_prefixes_in_transformers_folders_are_named_and_left_out(kind, prefix, tmp_path):
    net = tiny(kind)
    net.save_pretrained(tmp_path / kind)
    file = tmp_path / kind / "model.safetensors"
    state = {f"{prefix}{name}": t for name, t in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"every name begins with '{re.escape(prefix)}'"):
        member = surgery.load_member(str(tmp_path / kind))
    assert_same_bits(member.module.state_dict(), net.state_dict())
    surgery.export(surgery.join([member], block=(8, 8)), kind, tmp_path / "plain")
    assert not any(name.startswith(prefix) for name in load_file(tmp_path / "plain" / "model.safetensors"))


def test_prefixed_tensors_of_several_dtypes_keep_them(tmp_path):
    net = tiny("bert")
    net.save_pretrained(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    state = {f"module.{n}": t.half() if "query" in n else t for n, t in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning):
        member = surgery.load_member(str(tmp_path / "bert"))
    assert torch.equal(
        member.module.encoder.layer[0].attention.self.query.weight.float(),
        state["module.encoder.layer.0.attention.self.query.weight"].float(),
    )


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_prefixes_in_weight_files_are_left_out(prefix, ending, tmp_path):
    net = timm.create_model("test_vit", pretrained=False)
    state, file = {f"{prefix}{n}": t for n, t in net.state_dict().items()}, tmp_path / f"weights.{ending}"
    torch.save(state, file) if ending == "pth" else save_file(state, file)
    member = surgery.load_member(f"timm:test_vit={file}")
    assert_same_bits(member.module.state_dict(), net.state_dict())


def test_a_prefix_is_only_what_every_name_has_and_what_then_fits():
    own = ["a.weight", "b.weight"]
    assert find_prefix(["module.a.weight", "module.b.weight"], own) == "module."
    assert find_prefix(["module.a.weight", "b.weight"], own) == ""
    assert find_prefix(["model.x", "model.y"], own) == ""
    assert find_prefix(["model.a.weight", "model.b.weight"], ["model.a.weight", "model.b.weight"]) == ""
    assert all(wrapper.endswith(".") for wrapper in WRAPPERS)


def _adapter(folder, kind="gpt2", **changes):
    """A base in `base`, an adapter in `adapter`, and the merged model."""
    peft = pytest.importorskip("peft")
    tiny(kind).save_pretrained(folder / "base")
    base = type(tiny(kind)).from_pretrained(folder / "base")
    torch.manual_seed(0)
    net = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    net.save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return net.merge_and_unload()


def test_an_adapter_is_loaded_onto_its_base(tmp_path):
    merged = _adapter(tmp_path)
    member = surgery.load_member(str(tmp_path / "adapter"))
    assert type(member.module) is type(merged) and all(p.requires_grad for p in member.module.parameters())
    assert_same_bits(member.module.state_dict(), merged.state_dict())
    joint = surgery.join([member], block=(8, 8))
    surgery.save(joint, tmp_path / "saved")
    assert_same_bits(surgery.load(tmp_path / "saved").collapse("adapter"), merged.state_dict())
    assert surgery.verify(tmp_path / "saved").ok
    surgery.export(joint, "adapter", tmp_path / "plain")
    assert_same_bits(type(merged).from_pretrained(tmp_path / "plain").state_dict(), merged.state_dict())


def test_adapters_are_checked_before_anything_is_loaded(tmp_path):
    _adapter(tmp_path, base_model_name_or_path="../base")
    check_references([str(tmp_path / "adapter"), str(tmp_path / "base")])
    (tmp_path / "base" / "config.json").unlink()
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"peft adapter, whose base must be loaded first .*'\.\./base'"):
        check_references([str(tmp_path / "adapter")])


def test_an_adapter_is_merged_with_its_base_by_the_command(tmp_path, monkeypatch):
    merged = _adapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, ["merge", "base", "tuned=adapter", "--max-error", "0", "--out", "joint"])
    assert ran.exit_code == 0, ran.output
    assert_same_bits(surgery.load("joint").collapse("tuned"), merged.state_dict())


def test_a_base_beside_its_adapter_is_found(tmp_path):
    merged = _adapter(tmp_path, base_model_name_or_path="../base")
    assert_same_bits(surgery.load_member(str(tmp_path / "adapter")).module.state_dict(), merged.state_dict())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_name_or_path": None}, "must name its base as 'base_model_name_or_path'"),
        ({"base_model_name_or_path": "/no/such/base"}, "whose base must be loaded first .*'/no/such/base'"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"target_modules": ["no_such_layer"]}, "check that it was trained on this base"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_in_a_sentence(changes, said, tmp_path):
    _adapter(tmp_path, **changes)
    with pytest.raises(LoadError, match=said):
        surgery.load_member(str(tmp_path / "adapter"))


def test_adapters_without_weights_or_whose_names_do_not_fit_are_refused(tmp_path):
    _adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    save_file({f"{name}x": t for name, t in state.items()}, file)
    with pytest.raises(LoadError, match="adapter keys"):
        surgery.load_member(str(tmp_path / "adapter"))
    file.unlink()
    with pytest.raises(LoadError, match="must hold the adapter's weights"):
        surgery.load_member(str(tmp_path / "adapter"))


def test_without_peft_one_sentence_names_the_extra(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LoadError, match=r"peft adapter of 'org/base'.*pip install 'model-surgery\[peft\]'"):
        surgery.load_member(str(folder))


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("gptq", "gptqmodel"),
        ("awq", "gptqmodel"),
        ("bitsandbytes", "bitsandbytes"),
        ("compressed-tensors", "compressed-tensors"),
        ("hqq", "hqq"),
    ],
)
def test_quantised_folders_name_the_library_that_is_missing(method, package, tmp_path):
    from surgery.members.origins.quantised import LIBRARIES, _installed

    if _installed(LIBRARIES[method][0]):
        pytest.skip(f"{package} is installed")
    tiny("bert").save_pretrained(tmp_path / "bert")
    path = tmp_path / "bert" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    path.write_text(json.dumps(config))
    said = f"quant_method '{method}'.*{package}, is not installed: pip install {package}.*dequantize"
    with pytest.raises(LoadError, match=said):
        surgery.load_member(str(tmp_path / "bert"))
    shutil.rmtree(tmp_path / "bert")
