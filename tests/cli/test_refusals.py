"""What is wrong is said before anything slow, with what to do, and also where little is asked to be printed."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from artifacts import member, numbers, seeded, stack
from command_line import surgery as command

import surgery
from surgery.errors import ArtifactError, ExportError, LoadError, PlanError, SurgeryWarning
from surgery.members.references import load_member, parse_reference


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.artifact.writing.draw_sharing", numbers)
        joint = surgery.join([member(seeded(stack, n), f"m{n}", torch.zeros(2, 8)) for n in range(2)])
        surgery.save(joint, place / "joint")
    return place / "joint"


@pytest.fixture
def joint(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path / "joint")


def test_a_mismatch_is_said_on_stderr_where_nothing_is_to_be_printed(joint):
    assert command("verify", "joint", "--quiet") == (0, "", "")
    path = joint / "members/m1/weights.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    code, out, err = command("verify", "joint", "--quiet")
    assert code == 1 and not out and "members/m1/weights.safetensors: must have" in err and "m0" not in err
    code, out, err = command("verify", "joint", "--quiet", "--json")
    assert code == 1 and "must have" in out


@pytest.mark.parametrize(
    "lost", [("manifest.json",), ("manifest.json", "README.md"), ("manifest.json", "members")]
)
def test_an_artifact_without_its_manifest_is_known_by_its_tensors(joint, lost):
    (joint / "dictionary.safetensors").touch()
    for name in lost:
        path = joint / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for read in (surgery.load, surgery.verify):
        with pytest.raises(
            ArtifactError, match=r"has files of an artifact, such as .*, but not its manifest\.json"
        ):
            read(joint)
    assert "has files of an artifact" in command("report", "joint")[2]


def test_a_part_of_an_artifact_names_the_whole(joint, tmp_path):
    for part in ("members", "members/m0"):
        with pytest.raises(
            ArtifactError, match=rf"{part} is a part of the artifact {joint}; give that folder"
        ):
            surgery.load(joint / part)
    (tmp_path / "manifest.json").write_text('{"name": "of something else"}')
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtifactError, match="has none"):
        surgery.load(tmp_path / "other")


def test_an_error_that_allows_anything_is_doubted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    joint = surgery.join([member(seeded(stack), "m", torch.randn(2, 8))])
    with pytest.warns(
        SurgeryWarning, match="is a fraction: 2 lets outputs move by 200.0%.* For 2% give 0.02"
    ):
        surgery.fit(joint, max_error=2)
    for more in (("--out", "j2"), ("--dry-run",)):
        (tmp_path / "n.py").write_text(
            "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.zeros(2, 8)\n"
        )
        err = command("merge", f"a={tmp_path}/n.py:net", "--max-error", 2, *more)[2]
        assert err.count("--max-error is a fraction") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.fit(joint, max_error=0.5)


@pytest.mark.parametrize(("budget", "scale", "most"), [(1e-6, 0.0, 0.009), (0.01, 1.0, 1.0)])
def test_a_budget_that_cannot_be_met_names_one_that_can(budget, scale, most):
    net = seeded(lambda: stack(256))
    with torch.no_grad():
        for each in net.parameters():
            each.mul_(scale)
    joint = surgery.join([member(net, "m", torch.zeros(2, 8))])
    with pytest.raises(PlanError) as found:
        surgery.fit(joint, budget=budget)
    enough = float(str(found.value).partition("`budget=")[2].partition("`")[0])
    assert budget < enough <= most
    assert surgery.fit(joint, budget=enough).report.met


@pytest.mark.parametrize("file", ["net.pth", "net.safetensors", "./net.bin", "notes.txt"])
def test_a_file_of_weights_is_no_model(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).touch()
    with pytest.raises(
        LoadError, match=rf"give timm:NAME={file} where timm has the model, else path/module.py:factory"
    ):
        load_member(file)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").touch()
    with pytest.raises(LoadError, match="which its folder says how to use: give "):
        load_member(str(tmp_path / "model.safetensors"))
    with pytest.raises(LoadError, match=r"nowhere\.pth does not exist"):
        load_member("nowhere.pth")


@pytest.mark.parametrize("name", ["a/b", "a:b", "a b", "a/b c"])
def test_a_name_that_is_none_is_answered_with_one(name):
    with pytest.raises(LoadError, match=r"member's name is of letters .* such as a-b\S*=REF"):
        parse_reference(f"{name}=timm:test_vit")
    from surgery.pipeline.merge import check
    from surgery.settings.recipe import Recipe

    with pytest.raises(LoadError, match="such as a-b"):
        check(Recipe.of({"models": [{"model": "timm:test_vit", "name": name}]}))


def test_references_that_hold_an_equals_sign_are_whole():
    for text in ("timm:resnet18=a/b.pth", "nets.py:net?width=3", "org/name?class=BertModel", "a/b.py:f?x=1"):
        assert parse_reference(text) == (None, text)


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"format": "transformers"}, ExportError, "is for models of transformers as they are"),
        ({"format": "compressed-tensors"}, ExportError, "is for models of transformers as they are"),
        ({"format": "lora", "base": "./nowhere"}, ExportError, "nowhere"),
        ({"format": "plain", "member": "m7"}, PlanError, "must be one of m0, m1, found 'm7'"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_weights_are_read(joint, asked, error, words, monkeypatch):
    for name in ("check_hashes", "read_stored", "load"):
        monkeypatch.setattr(
            f"surgery.artifact.export.{name}", lambda *_, **__: pytest.fail("weights were read")
        )
    if asked["format"] == "lora":
        pytest.importorskip("peft")
    given = {"member": "m0", **asked}
    for call in (
        lambda: surgery.export(joint, out=joint.parent / "out", **given),
        lambda: surgery.plan_export(joint, **given),
    ):
        with pytest.raises(error, match=words):
            call()
