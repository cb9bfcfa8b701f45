"""Repairs: each kind of sentence that names what a forward wants, on a small model that says it."""

import types

import pytest
import torch
from torch import nn

from surgery.inputs import ROUNDS, example_inputs, inputs_for_part
from surgery.inputs.complaint import read
from surgery.inputs.sample import Sample, TooLargeError
from surgery.members.member import Origin

ORIGIN = Origin("transformers", "m", "M")


class Model(nn.Module):
    """As much of a transformers model as making up inputs looks at."""

    main_input_name = "pixel_values"

    def __init__(self, body, **config):
        super().__init__()
        self.body = body
        self.config = types.SimpleNamespace(
            to_dict=dict, **{"num_channels": 3, "image_size": 32, "vocab_size": 99, **config}
        )

    def forward(self, pixel_values, input_features=None, input_ids=None, attention_mask=None, use_cache=True):
        return self.body(self, pixel_values, input_features, input_ids, attention_mask, use_cache)


def needs_channels(model, pixels, *rest):
    return nn.Conv2d(4, 2, 1)(pixels)


def needs_width(model, pixels, *rest):
    return pixels @ torch.zeros(48, 2)


def needs_norm(model, pixels, *rest):
    return nn.LayerNorm(40)(pixels)


def needs_rows(model, pixels, *rest):
    return pixels.view(-1, 3, 2, 7, 7)


def needs_pairs(model, pixels, *rest):
    if pixels.ndim != 5 or pixels.shape[1] != 2:
        raise ValueError("Input must be a 5D tensor of shape (batch_size, 2, num_channels, height, width)")
    return pixels


def needs_clips(model, pixels, *rest):
    _, _, _, _, _ = pixels.shape
    return pixels


def needs_size(model, pixels, *rest):
    height, width = pixels.shape[-2:]
    assert (height, width) == (24, 40), f"Input size ({height}*{width}) doesn't match model (24*40)."
    return pixels


def needs_no_cache(model, pixels, features, ids, mask, use_cache):
    if use_cache:
        raise ValueError("`get_seq_length` can only be called on Attention layers")
    return pixels


def needs_features(model, pixels, features, *rest):
    if features is None:
        raise ValueError("You have to specify input_features")
    return features


def needs_something(model, pixels, features, ids, mask, use_cache):
    return pixels.sum() + mask.sum()  # None has no sum


def needs_tokens(model, pixels, features, ids, *rest):
    if ids is None:
        raise ValueError("You must specify input_ids")
    found = int((ids == 7).sum())
    if found != 10:
        raise ValueError(f"Image features and image tokens do not match, tokens: {found}, features: 10")
    return pixels


def needs_small_ids(model, pixels, features, ids, *rest):
    if ids is None:
        raise ValueError("You must specify input_ids")
    return nn.Embedding(9, 2)(ids)


def needs_equal_sides(model, pixels, features, *rest):
    """The first proposal for a width that both inputs have is the wrong input: the search has to come back."""
    if features is None:
        raise ValueError("You have to specify input_features")
    if pixels.shape[-1] != 32:
        raise ValueError("nothing that a rule reads")
    return features.flatten(0, 1)[:, :32] @ torch.zeros(48, 2) if features.shape[-1] != 48 else features


def needs_windows(model, pixels, *rest):
    return pixels.reshape(2, 3, 2, 40, 2, 40)


def needs_taller(model, pixels, *rest):
    height, width = pixels.shape[-2:]
    if height < 100:
        raise ValueError(f"Image size {height}x{width} is too small to be scaled")
    return pixels


BODIES = (
    needs_channels, needs_width, needs_norm, needs_rows, needs_pairs, needs_clips, needs_size, needs_no_cache,
    needs_features, needs_something, needs_tokens, needs_small_ids, needs_equal_sides, needs_windows, needs_taller,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _named(monkeypatch):
    """`dummy_inputs` asks the library's base class, which this is none of."""
    monkeypatch.setattr("surgery.inputs.candidates.CANDIDATES", {"transformers": _without_dummies()})


def _without_dummies():
    from surgery.inputs import CANDIDATES

    return tuple(way for way in CANDIDATES["transformers"] if way.__name__ != "dummy_inputs")


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_what_an_error_asks_for_is_given(body):
    model = Model(body, image_token_id=7, patch_size=20, num_mel_bins=32)
    inputs = example_inputs(model, ORIGIN)
    model(*inputs.args, **inputs.kwargs)
    assert inputs.source.endswith(", repaired")
    assert inputs_for_part(model) is not None


def test_a_model_that_runs_at_once_is_run_once():
    calls = []
    inputs = example_inputs(Model(lambda *args: calls.append(args) or args[1]), ORIGIN)
    assert len(calls) == 1 and "repaired" not in inputs.source


def test_a_complaint_names_what_was_none_and_the_table_that_was_too_small():
    def forward(pixel_values=None, other=None):
        return pixel_values.shape

    with pytest.raises(AttributeError) as caught:
        forward()
    assert (
        read(caught.value).empty == ("pixel_values",) and "pixel_values.shape" in read(caught.value).lines[-1]
    )
    with pytest.raises(IndexError) as caught:
        nn.Embedding(9, 2)(torch.tensor([3, 12]))
    assert read(caught.value).rows == 9


def test_no_argument_takes_gigabytes():
    sample = Sample(types.SimpleNamespace(to_dict=dict), torch.Generator(), torch.float32)
    with pytest.raises(TooLargeError):
        sample.normal(1 << 14, 1 << 14)

    def shouts(model, pixels, *rest):
        raise RuntimeError("shape '[-1, 3, 2, 90000, 90000]' is invalid for input of size 6144")

    assert inputs_for_part(Model(shouts)) is None


def test_repairs_come_to_an_end():
    calls = []

    def never(model, *args):
        calls.append(1)
        raise ValueError(f"expected length {len(calls) * 5} of length {len(calls) * 5}, but found 32")

    assert inputs_for_part(Model(never)) is None
    assert len(calls) <= (ROUNDS + 1) * 5
