"""Files of texts and Hugging Face datasets as a task's data."""

import csv
import json
import re

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import ConsentError, LoadError, PlanError
from surgery.permission import Permission
from surgery.settings.recipe import Recipe, TaskSpec
from surgery.training.tasks.sources import check_sources, load_data
from surgery.training.tasks.sources_text import load_tokenizer
from surgery.training.tasks.tasks import as_batch

TEXTS = ["good", "a very long and tedious film that I would not see again", "bad", "fine, all in all"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: n for n, word in enumerate(["[PAD]", "[UNK]", *sorted({w for t in TEXTS for w in t.split()})])
    }
    inner = Tokenizer(models.WordLevel(words, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def member(tokenizer_folder):
    plain = surgery.load_member(nn.Linear(4, 4), name="reader", inputs=torch.zeros(2, 4))
    files = {path.name: path.read_bytes() for path in tokenizer_folder.iterdir()}
    return surgery.Member(plain.name, plain.module, plain.inputs, plain.origin, files)


@pytest.fixture
def bare():
    return surgery.load_member(nn.Linear(4, 4), name="bare", inputs=torch.zeros(2, 4))


def write(path, labels, column="label"):
    rows = [{"text": text, column: label} for text, label in zip(TEXTS, labels, strict=True)]
    with path.open("w", newline="", encoding="utf-8") as stream:
        if path.suffix == ".jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(stream, ["text", column], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def spec(data, **options):
    return TaskSpec(data=data, options=options, batch=2)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_texts_are_tokenised_by_the_members_own_tokenizer(member, tmp_path, ending):
    data = write(tmp_path / f"texts.{ending}", [1, 0, 0, 1])
    parts = load_data(spec(data), member, 0, Permission.OWN)
    assert parts.validation is None and parts.test is None
    wanted = {
        tuple(load_tokenizer(member)(t)["input_ids"]): label
        for t, label in zip(TEXTS, [1, 0, 0, 1], strict=True)
    }
    seen = {}
    for raw in parts.train:
        batch = as_batch(raw)
        assert batch.target.dtype == torch.long
        ids, mask = batch.kwargs["input_ids"], batch.kwargs["attention_mask"]
        assert bool(mask.any(0).all()), "a batch is no longer than its longest text"
        for row, kept, label in zip(ids, mask, batch.target, strict=True):
            seen[tuple(row[kept.bool()].tolist())] = int(label)
    assert seen == wanted


def test_columns_lengths_and_parts_are_options(member, tmp_path):
    data = write(tmp_path / "texts.csv", [0.5, -1.5, 2, 1], "score")
    parts = load_data(
        spec(data, target="score", length=3, validation=1, test=0.25), member, 0, Permission.OWN
    )
    found = [as_batch(raw) for part in (parts.train, parts.validation, parts.test) for raw in part]
    assert sum(batch.size for batch in found) == 4
    assert all(
        batch.target.dtype == torch.float32 and batch.kwargs["input_ids"].shape[1] <= 3 for batch in found
    )


def test_without_a_target_the_tokens_are_it(member, tmp_path):
    data = write(tmp_path / "texts.csv", [0, 0, 0, 0])
    for raw in load_data(spec(data, target=None), member, 0, Permission.OWN).train:
        batch = as_batch(raw)
        mask = batch.kwargs["attention_mask"].bool()
        assert torch.equal(batch.target[mask], batch.kwargs["input_ids"][mask])
        assert bool((batch.target[~mask] == -100).all())


def test_what_is_wrong_with_a_file_is_said(member, bare, tokenizer_folder, tmp_path):
    data = write(tmp_path / "texts.csv", [0, 1, 1, 0])
    with pytest.raises(LoadError, match=r"lack rating.*text, label"):
        load_data(spec(data, target="rating"), member, 0, Permission.OWN)
    with pytest.raises(LoadError, match="'bare' has none"):
        load_data(spec(data), bare, 0, Permission.OWN)
    assert load_data(spec(data, tokenizer=str(tokenizer_folder)), bare, 0, Permission.OWN).train
    with pytest.raises(PlanError, match=r"found .*colour"):
        load_data(spec(data, colour="red"), member, 0, Permission.OWN)
    with pytest.raises(LoadError, match="does not exist"):
        load_data(spec(str(tmp_path / "none.csv")), member, 0, Permission.OWN)
    with pytest.raises(LoadError, match="must hold numbers"):
        load_data(spec(data, target="text"), member, 0, Permission.OWN)
    (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(LoadError, match="cannot be read"):
        load_data(spec(str(tmp_path / "bad.jsonl")), member, 0, Permission.OWN)
    with pytest.raises(LoadError, match="datasets:NAME"):
        load_data(spec("somewhere"), member, 0, Permission.OWN)


def test_datasets_is_an_optional_extra(member, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(LoadError, match=r"model-surgery\[datasets\]"):
        load_data(spec("datasets:imdb"), member, 0, Permission.OWN)


def test_datasets_in_a_folder(member, bare, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 0, 1], "numbers": [[1.0, 2.0]] * 4})
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "texts")
    data = f"datasets:{tmp_path / 'texts'}"
    parts = load_data(spec(data, validation=1), member, 0, Permission.OWN)
    sizes = [sum(as_batch(raw).size for raw in part) for part in (parts.train, parts.validation, parts.test)]
    assert sizes == [3, 1, 1]
    parts = load_data(spec(data, inputs="numbers"), bare, 0, Permission.OWN)
    assert as_batch(next(iter(parts.train))).args[0].shape == (2, 2)
    with pytest.raises(LoadError, match="lacks rating"):
        load_data(spec(data, target="rating"), member, 0, Permission.OWN)


SOURCES = ("evil.module:function", "evil.py:function", "surgery_recipes.zoo/evil.py:function", "datasets:user/name",
           "surgery_recipes.fetch:fetch", "~/secret.npz", "texts.csv")  # fmt: skip


@pytest.mark.parametrize("data", SOURCES)
def test_a_recipe_from_elsewhere_names_what_ships_with_the_package_alone(data):
    def recipe(**task):
        return Recipe.of({"models": [{"model": "timm:resnet18", "tasks": [task]}], "train": {}})

    shipped = "surgery_recipes.mnist:mnist"
    check_sources(recipe(data=shipped), Permission.NONE)
    for wrong in (
        recipe(data=data),
        recipe(data=shipped, options={"folder": data}),
        recipe(data=shipped, adaptation={"part": "stem", "data": data}),
    ):
        with pytest.raises(ConsentError, match=re.escape(data)):
            check_sources(wrong, Permission.NONE)
        check_sources(wrong, Permission.OWN)
    with pytest.raises(ConsentError):
        load_data(spec(data), None, 0, Permission.NONE)
