import pytest
import timm
import torch
from tiny_transformers import TINY, tiny
from torch import nn

from surgery.errors import LoadError
from surgery.inputs import CANDIDATES, as_inputs, example_inputs, forward_error
from surgery.inputs.sample import Sample, find
from surgery.inputs.text import token_ids, vocabulary
from surgery.members.member import Inputs, Origin

BATCH_OF_ONE = {"gpt2_classifier"}


def origin(kind: str, name: str) -> Origin:
    return Origin(kind, name, name)


def leaves(inputs: Inputs) -> dict:
    return {**dict(enumerate(inputs.args)), **inputs.kwargs}


@pytest.mark.parametrize("kind", TINY)
def test_transformers_inputs_work_and_repeat(kind):
    net = tiny(kind)
    inputs = example_inputs(net, origin("transformers", kind), seed=3)
    assert forward_error(net, inputs) is None
    again = example_inputs(net, origin("transformers", kind), seed=3)
    assert leaves(inputs).keys() == leaves(again).keys()
    assert all(torch.equal(value, leaves(again)[name]) for name, value in leaves(inputs).items())
    batches = {len(value) for value in leaves(inputs).values()}
    assert batches == ({1} if kind in BATCH_OF_ONE else {3} if kind == "t5" else {2})


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("test_vit", {}, (2, 3, 160, 160)),
        ("test_vit", {"img_size": 96}, (2, 3, 96, 96)),
        ("test_resnet", {"in_chans": 1}, (2, 1, 160, 160)),
    ],
)
def test_timm_inputs(name, options, shape):
    net = timm.create_model(name, **options).eval()
    inputs = example_inputs(net, origin("timm", name))
    assert inputs.args[0].shape == shape
    assert inputs.source == "timm input_size"


def test_inputs_take_the_weights_dtype():
    net = timm.create_model("test_vit").eval().to(torch.bfloat16)
    assert example_inputs(net, origin("timm", "test_vit")).args[0].dtype == torch.bfloat16


def test_global_random_state_is_left_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    example_inputs(tiny("clip"), origin("transformers", "clip"))
    assert torch.equal(state, torch.get_rng_state())


def test_large_models_are_tried_without_data(monkeypatch):
    monkeypatch.setattr("surgery.inputs.candidates._CPU_LIMIT", 0)
    for kind in ("bert", "llama", "t5", "wav2vec2"):
        inputs = example_inputs(tiny(kind), origin("transformers", kind))
        assert all(value.device.type == "cpu" for value in leaves(inputs).values())
        assert forward_error(tiny(kind), inputs) is None


def test_what_users_give():
    x = torch.ones(2)
    given = Inputs((x,))
    assert as_inputs(given) is given
    assert as_inputs(x).args == as_inputs((x,)).args == (x,)
    assert as_inputs({"a": x}).kwargs == {"a": x}
    with pytest.raises(LoadError, match="not int"):
        as_inputs(5)  # type: ignore[arg-type]


def test_nothing_known_about_the_inputs():
    with pytest.raises(LoadError, match="give example inputs"):
        example_inputs(nn.Linear(2, 2), origin("module", "Linear"))


def test_every_failed_candidate_is_named(monkeypatch):
    net = tiny("bert")
    monkeypatch.setattr(type(net), "forward", lambda self, input_ids: 1 / 0)
    with pytest.raises(LoadError, match=r"main_input_name: ZeroDivisionError.*Give example inputs"):
        example_inputs(net, origin("transformers", "bert"))


def test_an_error_that_names_an_argument_is_repaired(monkeypatch):
    def forward(self, input_ids, **more):
        if "bbox" not in more:
            raise ValueError("You have to specify bbox as well")
        return more["bbox"].float()

    def strict(self, input_ids, bbox=None):
        return forward(self, input_ids, **({} if bbox is None else {"bbox": bbox}))

    net = tiny("bert")
    monkeypatch.setattr(type(net), "forward", strict)
    inputs = example_inputs(net, origin("transformers", "bert"))
    assert inputs.source == "main_input_name, repaired"


def test_ids_are_ordinary():
    config = tiny("gpt2").config
    assert 98 not in vocabulary(config)
    ids = token_ids(Sample(config, torch.Generator().manual_seed(0), torch.float32, 4, 64))
    assert ids.shape == (4, 64)
    assert ids.max() < 98


def test_nested_configurations_are_searched_by_preference():
    config = tiny("clip").config
    assert find(config, "image_size", None, "vision") == 32
    assert find(config, "vocab_size", None, "text") == 99
    assert find(config, "no_such_thing", "default") == "default"


def test_every_kind_of_candidate_is_documented():
    assert all(candidate.__doc__ for ways in CANDIDATES.values() for candidate in ways)
