"""docs/train_your_own.md: its commands and code run as they stand, and its tables are those of the settings."""

import csv
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from command_line import surgery as command
from places import DOCS

PAGE = DOCS / "train_your_own.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def page():
    if not PAGE.is_file():
        pytest.skip("docs are not part of an installed package")
    return PAGE.read_text(encoding="utf-8")


def prepare(folder):
    """What the page supposes to be there: a classifier of texts, texts, pictures, weights."""
    import timm
    import transformers
    from PIL import Image
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    texts = ["good", "bad", "quite good", "rather bad"] * 4
    with (folder / "reviews.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerows([("text", "label"), *((text, int("good" in text)) for text in texts)])
    words = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(["[PAD]", "[UNK]", "good", "bad"])}, "[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(
        folder / "my-bert"
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=40, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "my-bert")
    for place, name in enumerate(("aster", "daisy", "rose")):
        (folder / "flowers" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), (80 * place, 40 * number, 90)).save(
                folder / f"flowers/{name}/{number}.png"
            )
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), folder / "weights.safetensors")


@pytest.mark.slow
def test_every_block_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    prepare(tmp_path)
    blocks = BLOCK.findall(page)
    assert {kind for kind, _ in blocks} == {"python", "yaml", "bash"}
    for kind, text in blocks:
        head = text.partition("\n")[0]
        if kind == "bash":
            for line in text.splitlines():
                run(shlex.split(line, comments=True))
        elif re.fullmatch(r"# \w+\.(py|yaml)", head):
            (tmp_path / head.removeprefix("# ")).write_text(text)
        else:
            exec(compile(text, str(PAGE), "exec"), {"__name__": "page"})
    for name in ("mine", "pictures", "make_wave"):
        sys.modules.pop(name, None)
    assert torch.load is not None and (tmp_path / "rings-plain" / "model.safetensors").is_file()


def run(words):
    if words[0] == "python":
        exec(compile(Path(words[1]).read_text(), words[1], "exec"), {"__name__": "__main__"})
    else:
        assert words[0] == "surgery"
        code, shown, said = command(*words[1:])
        assert (code, said) == (0, ""), f"{words}: {shown[-500:]}{said}"


def test_the_tables_are_those_of_the_settings(page):
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.page_with_tables(page) == page, "run `python docs/tables.py`"


def test_every_key_is_said_once(page):
    from surgery.methods.templates.settings import Settings
    from surgery.settings.problems import paths_in
    from surgery.settings.recipe import Recipe

    found = re.findall(
        r"^\| (`[\w.]+`) \|", page.partition("### Losses")[0].partition("### Keys of a recipe")[2], re.M
    )
    known = [*paths_in(Recipe), *paths_in(Settings, "settings")]
    assert sorted(found) == sorted(f"`{path}`" for path in known)
