"""Replaced modules in artifacts: stored, verified and loaded, said in reports, and plain again in exports."""

import json

import pytest
import timm
import torch
import transformers
from command_line import surgery as command
from module_methods import (
    NAME,
    Net,
    joined,
    layer,
    member,
    net,
    run,
    same,
    save_fitted,
    scaled_copy,
    with_replacement,
)
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery.artifact.verify import verify
from surgery.errors import ArtifactError, ConsentError, ExportError, MissingMethodError
from surgery.settings import methods as registry

pytestmark = pytest.mark.filterwarnings("error:.*saved as a live module.*")


# -- stored ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A fitted joint model and its artifact."""
    return save_fitted(tmp_path_factory.mktemp("saved") / "joint")


def test_an_artifact_says_what_was_replaced_and_loads(saved, tmp_path):
    joint, folder = saved
    entry = json.loads((folder / "manifest.json").read_text())["members"]["net"]
    assert entry["replacements"] == [
        {"path": "layers.3", "method": NAME, "settings": {"of": "layers.1"}, "package": NAME}
    ]
    loaded = surgery.load(folder, modules={"net": Net()})
    assert torch.equal(run(loaded["net"]), run(joint["net"]))
    assert same(loaded.collapse("net"), joint.collapse("net"))
    again = surgery.save(loaded, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in again.iterdir() if p.is_file()} == {
        p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()
    }
    plain = surgery.save(surgery.join([member()], block=(8, 8)), tmp_path / "plain")
    assert b"replacements" not in (plain / "manifest.json").read_bytes()


def test_members_of_an_artifact_are_joined_anew_with_their_replacements(saved, tmp_path):
    loaded = surgery.load(saved[1], modules={"net": Net()})
    joint = surgery.join([loaded.copy_member("net")], block=(8, 8))
    assert torch.equal(run(joint["net"]), run(loaded["net"]))
    folder = surgery.save(surgery.fit(joint, max_error=0), tmp_path / "joint")
    assert joint.report.errors == {"net": 0.0} and joint.report.met
    assert surgery.load(folder, modules={"net": Net()}).collapse("net").keys() == Net().state_dict().keys()


def test_a_module_that_was_given_is_as_it_was_where_it_does_not_fit(saved):
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(16, 7)

    given = Wider()
    with pytest.raises(ArtifactError, match=r"out\.weight"):
        surgery.load(saved[1], modules={"net": given})
    assert type(layer(given, 3)) is nn.Linear


@pytest.fixture
def uninstalled(monkeypatch):
    monkeypatch.delitem(registry.REGISTERED, NAME)


def test_without_the_method_the_error_names_it_and_its_package(saved, uninstalled):
    needed = "method 'scaled_copy' of package 'scaled_copy', which replaced layers.3 and is not installed"
    with pytest.raises(MissingMethodError, match=needed):
        surgery.load(saved[1], modules={"net": Net()})
    (check,) = verify(saved[1], modules={"net": net()}).members
    assert not check.ok and check.rebuilt and needed in check.reasons[0] and check.not_built is None


def test_the_verb_verify_says_in_one_sentence_that_the_method_is_not_installed(
    reference, tmp_path, monkeypatch
):
    one = surgery.load_member(f"net={reference}", trust_remote_code=True)
    plan = surgery.plan_modules([one], NAME, {"copies": {"layers.3": "layers.1"}}, block=(8, 8))
    folder = surgery.save(surgery.join([one], plan), tmp_path / "joint")
    monkeypatch.delitem(registry.REGISTERED, NAME)
    code, said, _ = command("verify", str(folder), "--trust-remote-code")
    said = " ".join(said.split())
    assert code == 1 and "import it before loading." in said and ".." not in said.replace(str(folder), "")


def test_verify_compares_with_the_origin_whose_replacements_are_made_again(reference, tmp_path):
    one = surgery.load_member(f"net={reference}", trust_remote_code=True)
    plan = surgery.plan_modules([one], NAME, {"copies": {"layers.3": "layers.1"}}, block=(8, 8))
    folder = surgery.save(surgery.fit(surgery.join([one], plan), max_error=0.8), tmp_path / "joint")
    (check,) = verify(folder, origins=True, trust_remote_code=True).members
    assert (
        check.ok and check.origin == "same" and check.error == pytest.approx(check.recorded_error, rel=1e-3)
    )
    assert check.weight_difference is not None and 0 < check.weight_difference < 1
    with pytest.raises(ConsentError, match="trust_remote_code"):
        surgery.export(folder, "net", tmp_path / "plain")
    plain = surgery.export(folder, "net", tmp_path / "plain", trust_remote_code=True)
    net().load_state_dict(load_file(next(plain.glob("*.safetensors"))))
    with_replacement(folder, {"settings": {"of": "into"}})
    (check,) = verify(folder, origins=True, trust_remote_code=True).members
    assert not check.ok and any("scaled" in r or "tensors" in r for r in check.reasons)


@pytest.fixture
def reference(tmp_path):
    source = tmp_path / "models.py"
    source.write_text(
        "import torch\nfrom module_methods import net\n"
        "def make():\n    return net(), (torch.linspace(-1, 1, 48).reshape(8, 6),)\n"
    )
    return f"{source}:make"


# -- plain again -----------------------------------------------------------------------------------------------


def test_collapse_gives_the_class_and_the_state_dict_that_were_there():
    joint, before = joined(), net()
    layer(joint["net"], 3).scale.data.fill_(0.25)
    plain = joint.extract("net")
    assert type(layer(plain, 3)) is nn.Linear
    assert list(plain.state_dict()) == list(before.state_dict()) == list(joint.collapse("net"))
    assert torch.equal(layer(plain, 3).weight, 0.25 * layer(before, 1).weight)
    assert torch.allclose(run(plain), run(joint["net"]), atol=1e-6)
    assert len({p.data_ptr() for p in plain.parameters()}) == len(list(before.parameters()))
    assert isinstance(layer(joint["net"], 3), scaled_copy.ScaledCopy)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert") / "bert"
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


def with_copies(reference, copies, folder):
    one = surgery.load_member(f"one={reference}")
    plan = surgery.plan_modules([one], NAME, {"copies": copies}, block=(8, 8))
    joint = surgery.fit(surgery.join([one], plan))
    return joint, surgery.save(joint, folder)


def test_a_plain_export_of_transformers_is_read_without_this_package(bert, tmp_path):
    query = "encoder.layer.{}.attention.self.query"
    joint, folder = with_copies(bert, {query.format(2): query.format(0)}, tmp_path / "joint")
    assert torch.equal(
        surgery.load(folder)["one"](torch.arange(8)[None]).last_hidden_state,
        joint["one"](torch.arange(8)[None]).last_hidden_state,
    )
    assert verify(folder, origins=True).ok
    plain = transformers.AutoModel.from_pretrained(surgery.export(folder, "one", tmp_path / "plain"))
    assert list(plain.state_dict()) == list(transformers.AutoModel.from_pretrained(bert).state_dict())
    with torch.no_grad():
        found, expected = (each(torch.arange(8)[None]).last_hidden_state for each in (plain, joint["one"]))
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_block_has_no_plain_form_and_nothing_is_written(bert, tmp_path):
    copies = {"encoder.layer.2": "encoder.layer.0"}
    joint, folder = with_copies(bert, copies, tmp_path / "joint")
    for source in (joint, folder):
        with pytest.raises(
            ExportError, match="scaled copy of a BertLayer, into which no factor can be folded: save"
        ):
            surgery.export(source, "one", tmp_path / "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["joint"]
    compressed = surgery.export(folder, "one", tmp_path / "small", format="compressed")
    x = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(
            surgery.load(compressed)["one"](x).last_hidden_state, joint["one"](x).last_hidden_state
        )
    assert sum(p.stat().st_size for p in folder.rglob("*.safetensors")) < 0.85 * sum(
        p.stat().st_size for p in bert.rglob("*.safetensors")
    )


def test_a_plain_export_of_timm_is_read_without_this_package(tmp_path):
    copies = {"blocks.2.mlp.fc1": "blocks.0.mlp.fc1"}
    joint, folder = with_copies("timm:test_vit?pretrained=false", copies, tmp_path / "joint")
    plain = surgery.export(folder, "one", tmp_path / "plain")
    module = timm.create_model(f"local-dir:{plain}", pretrained=True).eval()
    x = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run(module, x), run(joint["one"], x), atol=1e-5)
    with pytest.raises(ExportError, match="live module"):
        surgery.export(surgery.save(joined(), tmp_path / "live"), "net", tmp_path / "no")


# -- shown -----------------------------------------------------------------------------------------------------


def test_reports_cards_and_pages_say_what_was_replaced(saved, tmp_path):
    code, said, _ = command("report", str(saved[1]), "--html", str(tmp_path / "page.html"))
    assert code == 0 and "layers.3" in said and NAME in said
    code, said, _ = command("report", str(saved[1]), "--json")
    shown = json.loads(said)["artifact"]["members"][0]
    assert shown["replaced"] == {"layers.3": NAME}
    assert {"net": shown["bytes_before"]} == saved[
        0
    ].report.original_bytes  # with what stood there, as `merge` says
    words = "1 module replaced by scaled_copy"
    assert words in (tmp_path / "page.html").read_text() and words in repr(saved[0])
    assert f"- net: {words}, which package scaled_copy registers" in (saved[1] / "README.md").read_text()
