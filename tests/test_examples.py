"""Examples in the docstrings of the Python API: each runs as it stands there, beside the folders that it names."""

import doctest
import shutil
from copy import deepcopy

import pytest
import torch
import transformers
from artifacts import numbers, seeded

import surgery

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def examples():
    """Those of the package, of every public name, and of the methods of public classes."""
    finder = doctest.DocTestFinder()
    found = [test for name in surgery.__all__ for test in finder.find(getattr(surgery, name), name)]
    package = doctest.DocTestParser().get_doctest(surgery.__doc__, {}, "surgery", surgery.__file__, 0)
    return [test for test in (package, *found) if test.examples]


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """In place of a picture, which takes longer than most examples, the numbers that it is drawn from."""
    monkeypatch.setattr("surgery.artifact.writing.draw_sharing", numbers)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A text and a picture model of transformers, a fine-tune of the first, and an artifact of the first two."""
    place = tmp_path_factory.mktemp("examples")
    text = seeded(lambda: transformers.BertModel(transformers.BertConfig(vocab_size=100, **SIZE)))
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=2, **SIZE)
    vision = seeded(lambda: transformers.ViTForImageClassification(config))
    new = deepcopy(text)
    with torch.no_grad():
        new.encoder.layer[0].output.dense.weight.mul_(1.01)
    for name, module in (("text", text), ("vision", vision), ("text-new", new)):
        module.save_pretrained(place / name)
    members = [surgery.load_member(f"{name}={place / name}") for name in ("text", "vision")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.artifact.writing.draw_sharing", numbers)
        surgery.save(surgery.fit(surgery.join(members), max_error=0), place / "joint")
    return place


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_an_example_runs(example, folders, tmp_path, monkeypatch):
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    said = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not said, "".join(said)
