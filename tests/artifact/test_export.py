"""Exports: plain ones load with this package absent, compressed ones with the original absent."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import Tied, contents, fitted, hypermodules, member, modules, pair, seeded, size
from safetensors.torch import load_file
from test_artifact import same, states

import surgery
from surgery.artifact import load, save
from surgery.artifact.export import export
from surgery.artifact.verify import verify
from surgery.errors import ArtifactError, ExportError, OutputError, PlanError
from surgery.members.member import content_hash
from surgery.members.origins.licences import licence_file
from surgery.members.references import load_member
from surgery.page import look
from surgery.safetensors.reading import tensors_in_file

WITHOUT_SURGERY = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("surgery"):
            raise ImportError(name + " must not be needed")
sys.meta_path.insert(0, Block())
import torch
from safetensors.torch import save_file
"""


def run_without_surgery(modules: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    """State dicts of what a list of `modules` evaluates to, in a process that cannot import this package."""
    state = "{k: v.clone() for k, v in m.state_dict().items()}"
    write = f"[save_file({state}, f'{{i}}.safetensors') for i, m in enumerate(ms)]"
    subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_SURGERY}\nms = {modules}\n{write}"], check=True, cwd=folder
    )
    return [load_file(path) for path in sorted(folder.glob("?.safetensors"))]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tied head, as transformers saves it."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("text")
    config = BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    seeded(lambda: BertForMaskedLM(config)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    return folder


@pytest.fixture(scope="module")
def joint(text: Path, tmp_path_factory: pytest.TempPathFactory) -> surgery.JointModel:
    import timm

    weights = tmp_path_factory.mktemp("vision") / "weights.pth"
    torch.save(seeded(lambda: timm.create_model("test_resnet")).state_dict(), weights)
    return surgery.join(
        [load_member(f"text={text}"), load_member(f"vision=timm:test_resnet={weights}")], block=(8, 8)
    )


@pytest.fixture(scope="module")
def out(joint: surgery.JointModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(joint, tmp_path_factory.mktemp("joint") / "out")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("timm:vit?pretrained=false&depth=4", "`timm:vit?pretrained=false&depth=4 (vit)`"),
        ("timm:vit?depth=4=/home/me/w.pth", "`timm:vit?depth=4 (vit)`"),
        ("timm:vit=/home/me/w.pth", "`timm:vit (vit)`"),
    ],
)
def test_cards_name_a_model_with_its_options_and_no_file_of_weights(reference, said):
    from surgery.artifact.card import _cell
    from surgery.artifact.manifest import OriginEntry

    assert _cell(OriginEntry(kind="timm", reference=reference, architecture="vit")) == said


LICENSED = """---
license: other
license_name: mine
license_link: https://example.org/licence
tags: [a, b]
---
# A model of somebody's, whose card says more
"""


@pytest.mark.parametrize("way", ["plain", "transformers", "compressed-tensors"])
def test_exports_have_a_card(way, tmp_path: Path):
    """With the licence that the original's card names, and how far outputs moved."""
    from huggingface_hub import ModelCard
    from tiny_transformers import save_tiny

    save_tiny("bert", tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(LICENSED)
    (tmp_path / "source" / "LICENSE.txt").write_text("You may.")
    joint = surgery.fit(surgery.join([load_member(f"text={tmp_path / 'source'}")]), max_error=0.1)
    artifact = save(joint, tmp_path / "joint")
    cards = []
    for source in (joint, artifact):
        folder = export(source, "text", tmp_path / "text", format=way, overwrite=True)
        cards.append((folder / "README.md").read_text())
        plan = surgery.plan_export(source, "text", format=way)
        assert plan.files["README.md"] == len(cards[-1]) and plan.files["LICENSE.txt"] == 8
        assert (folder / "LICENSE.txt").read_text() == "You may."
        assert verify(folder).ok
    assert cards[0] == cards[1]
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "other" and data["license_name"] == "mine" and "base_model" not in data
    assert data["license_link"] == "https://example.org/licence" and data["library_name"] == "transformers"
    error = joint.report.errors["text"]
    assert f"on made-up inputs moved by {100 * error:.2f}%" in card.text and "at most 10.00%" in card.text
    assert 'BertModel.from_pretrained(".")' in card.text and str(tmp_path) not in card.content
    assert ("import surgery" in card.text) == (way == "transformers")
    assert ("packed, " in card.text) == (way == "compressed-tensors")
    assert surgery.push_to_hub(folder, "me/text", dry_run=True).card


@pytest.mark.parametrize(
    "front",
    [
        "", "---\nlicense: [a]\n---\n", "---\n- a\n---\n", "---\nlicense: 'a\x00'\n---\n", "---\n{\n---\n",
        "---\nlicense: " + "[" * 5000 + "\n---\n", "---\nlicense: 2024-99-99\n---\n",
        "---\nlicense: !!python/x y\n---\n",
        "---\nlicense: \"x\\ny\"\n---\n", "---\nlicense: " + "x" * 999 + "\n---\n",
    ],
)  # fmt: skip
def test_cards_of_others_that_say_nothing_of_a_licence(front, tmp_path: Path):
    (tmp_path / "README.md").write_bytes(front.encode() + b"# text \xff")
    assert licence_file(tmp_path) == {}


def test_an_artifact_of_two_libraries(joint, out: Path, tmp_path: Path):
    loaded = load(out)
    assert type(loaded["text"]).__name__ == "BertForMaskedLM"
    assert (
        loaded["text"].cls.predictions.decoder.weight is loaded["text"].bert.embeddings.word_embeddings.weight
    )
    assert same(states(loaded), states(joint))
    assert contents(save(loaded, tmp_path / "again")) == contents(out)
    report = verify(out, origins=True)
    assert report.ok
    assert [(c.origin, c.weight_difference, c.error) for c in report.members] == [("same", 0.0, 0.0)] * 2


def test_verify_says_what_cannot_be_compared(joint, out: Path, text: Path, tmp_path: Path):
    moved = text.rename(text.with_name("elsewhere"))
    try:
        report = verify(out, origins=True)
        assert report.ok and report.members[0].origin.startswith("not reached: ")
    finally:
        moved.rename(text)
    assert {check.origin for check in verify(out).members} == {"not asked for"}
    json.dumps(report.to_json())


def test_verify_compares_with_a_changed_origin(out: Path, text: Path):
    from safetensors.torch import save_file

    path = text / "model.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    tensors["bert.embeddings.LayerNorm.bias"] += 0.5
    save_file(tensors, path, {"format": "pt"})
    try:
        check = verify(out, origins=True).members[0]
        assert check.weight_difference == 0.5 and check.error is not None and check.error > 1e-3
        assert check.origin == "found" and check.rebuilt
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("way", ["plain", "transformers", "compressed"])
def test_files_have_the_usual_permissions(out: Path, tmp_path: Path, way):
    before = os.umask(0o027)
    try:
        folder = export(out, "text", tmp_path / "text", format=way)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}
    assert {*modes.values()} == {0o640}, modes


def test_verify_compares_the_files_of_exports(out: Path, tmp_path: Path):
    whats = {
        export(out, "text", tmp_path / "plain"): "a model of transformers: ",
        export(out, "vision", tmp_path / "vision"): "a model of timm: |a state dict: ",
        export(
            out, "text", tmp_path / "small", format="transformers"
        ): "a compressed checkpoint of transformers: ",
    }
    for folder, what in whats.items():
        found = verify(folder)
        assert found.ok and not found.members and re.match(what, found.what or ""), found.what
        for ask in (load, look):
            with pytest.raises(
                ArtifactError, match=re.escape(f"but {folder} is {found.what}") + ".*surgery verify"
            ):
                ask(folder)
        with pytest.raises(ArtifactError, match="Origins are recorded in artifacts, but"):
            verify(folder, origins=True)
        path = next(folder.glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        (folder / "more.txt").write_text("mine")  # which is nobody's business
        assert verify(folder).files == {path.name: "is not what was written: its SHA-256 is another one"}
        path.unlink()
        assert verify(folder).files == {path.name: "is missing"}
        json.dumps(verify(folder).to_json())


@pytest.mark.parametrize("way", ["plain", "transformers", "compressed"])
def test_a_dry_run_says_what_is_written(out: Path, joint, tmp_path: Path, way):
    plan = surgery.plan_export(out, "text", format=way)
    assert plan == surgery.plan_export(joint, "text", format=way)
    assert not [*tmp_path.iterdir()]
    folder = export(out, "text", tmp_path / "text", format=way)
    handles = {}
    for path in folder.rglob("*.safetensors"):
        handles |= tensors_in_file(path)
    assert plan.nbytes == sum(each.nbytes for each in handles.values())
    if way == "plain":
        assert {each.name for each in plan.tensors} == {*handles}
    card = {} if way == "compressed" else {"README.md": (folder / "README.md").stat().st_size}
    assert {"config.json", "vocab.txt", *card} == {*plan.files} and card.items() <= plan.files.items()
    assert json.loads(json.dumps(plan.to_json()))["nbytes"] == plan.nbytes
    assert plan.member in repr(plan) and "<table" in plan._repr_html_()
    with pytest.raises(PlanError, match="`member` must be one of text, vision"):
        surgery.plan_export(out, "other", format=way)
    if way == "transformers":
        with pytest.raises(ExportError, match="is for models of transformers as they are"):
            surgery.plan_export(out, "vision", format=way)


def test_a_dry_run_on_the_command_line(out: Path, tmp_path: Path):
    from command_line import surgery as command

    call = ["export", str(out), "--member", "text", "--out", str(tmp_path / "new"), "--dry-run"]
    code, said, _ = command(*call)
    assert code == 0 and "as it is (" in said and "would be written" in said and not [*tmp_path.iterdir()]
    code, said, _ = command(*call, "--json")
    assert code == 0 and json.loads(said)["tensors"][0]["becomes"] == "as it is"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    assert command(*call)[0] == 2


def test_an_origin_that_moved_is_not_looked_for_on_the_hub(tmp_path: Path, text: Path, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(text, tmp_path / "sub" / "model")
    save(surgery.join([load_member("text=sub/model")]), "sub/joint")
    assert verify("sub/joint", origins=True).members[0].origin == "same"
    shutil.rmtree(tmp_path / "sub" / "model")
    monkeypatch.setattr(
        "surgery.members.origins.transformers.split_revision", lambda *a, **k: pytest.fail("asked")
    )
    for here in (tmp_path, tmp_path / "sub", tmp_path.parent):
        monkeypatch.chdir(here)
        (check,) = verify(tmp_path / "sub" / "joint", origins=True).members
        assert check.ok and re.search(r"'(\./)?(.*/)?model', which is not there", check.origin), check.origin


def test_files_of_one_size_that_were_exchanged_are_not_exported(tmp_path: Path):
    """Else the export, which has hashes of its own, would be found to be as it was written."""
    from tiny_transformers import tiny

    for seed, name in enumerate("ab"):
        tiny("bert", seed).save_pretrained(tmp_path / name)
    out = save(surgery.join([load_member(str(tmp_path / name)) for name in "ab"]), tmp_path / "joint")
    one, other = (out / "members" / name / "weights.safetensors" for name in "ab")
    assert one.stat().st_size == other.stat().st_size
    one.rename(tmp_path / "kept")
    other.rename(one)
    (tmp_path / "kept").rename(other)
    for way in ("plain", "transformers", "compressed-tensors", "compressed"):
        with pytest.raises(ArtifactError, match=r"weights\.safetensors must have the SHA-256"):
            export(out, "a", tmp_path / way, format=way)
        assert not (tmp_path / way).exists()


@pytest.mark.slow  # every library anew in a process of its own
def test_plain_exports_need_no_surgery(joint, out: Path, tmp_path: Path):
    words, pictures = export(out, "text", tmp_path / "text"), export(out, "vision", tmp_path / "vision")
    assert (words / "vocab.txt").read_text() == "[PAD]\n[UNK]\na\n"
    assert contents(export(joint, "text", tmp_path / "text2")) == contents(words)
    assert contents(export(joint, "vision", tmp_path / "vision2")) == contents(pictures)
    found = run_without_surgery(
        "[__import__('transformers').AutoModelForMaskedLM.from_pretrained('text'), "
        "__import__('timm').create_model('test_resnet', checkpoint_path='vision/model.safetensors')]",
        tmp_path,
    )
    assert [content_hash(state) for state in found] == [
        content_hash(joint.collapse(n)) for n in ("text", "vision")
    ]


def test_compressed_exports_need_no_original(joint, out: Path, tmp_path: Path):
    for source in (out, joint):
        alone = export(source, "text", tmp_path / f"text-{source is out}", format="compressed")
        loaded = load(alone)
        assert loaded.names == ("text",)
        assert same({"text": loaded.collapse("text")}, {"text": joint.collapse("text")})
        assert contents(save(loaded, tmp_path / f"again-{source is out}")) == contents(alone)
        assert verify(alone).ok
    assert contents(tmp_path / "text-True") == contents(tmp_path / "text-False")
    assert size(alone) < size(out)


@pytest.mark.parametrize("make", [pair, fitted, hypermodules])
def test_live_modules_are_exported_without_their_class(tmp_path: Path, make):
    joint = make()
    folder = save(joint, tmp_path / "joint")
    for source in (folder, joint):
        plain = export(source, "two", tmp_path / "plain", overwrite=True)
        torch.testing.assert_close(load_file(plain / "model.safetensors"), dict(joint.collapse("two")))
        alone = export(source, "two", tmp_path / "alone", format="compressed", overwrite=True)
        own = {"two": modules()["two"]}
        torch.testing.assert_close(load(alone, modules=own).collapse("two"), joint.collapse("two"))


def test_tied_weights_of_live_modules(tmp_path: Path):
    module = seeded(Tied)
    state = {key: each.clone() for key, each in module.state_dict().items()}
    joint = surgery.join([member(module, "net", torch.zeros(2, 6, dtype=torch.long))], block=(8, 8))
    plain = export(save(joint, tmp_path / "joint"), "net", tmp_path / "plain")
    fresh = seeded(Tied, 4)
    fresh.load_state_dict(load_file(plain / "model.safetensors"), strict=True)
    assert content_hash(fresh.state_dict()) == content_hash(state)


def test_bad_requests(joint, out: Path, tmp_path: Path):
    for source in (joint, out):
        for format in ("plain", "compressed"):
            with pytest.raises(PlanError, match="must be one of text, vision, found 'other'"):
                export(source, "other", tmp_path / "x", format=format)
    with pytest.raises(PlanError, match=r"plain, compressed, .*found 'zip'"):
        export(joint, "text", tmp_path / "x", format="zip")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_an_export_and_nothing_else(joint, tmp_path: Path):
    plain = export(joint, "text", tmp_path / "text")
    with pytest.raises(OutputError, match="exists and holds files"):
        export(joint, "text", tmp_path / "text")
    export(joint, "text", plain, overwrite=True)
    (plain / "thesis.txt").write_text("mine")
    before = contents(plain)
    with pytest.raises(OutputError, match=r"also holds thesis\.txt"):
        export(joint, "text", plain, overwrite=True)
    assert contents(plain) == before
