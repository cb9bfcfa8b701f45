"""The command line: quick help, one sentence for bad input, one JSON document, nothing half-written."""

import importlib
import importlib.util
import json
import subprocess
import sys
import textwrap

import pytest
from command_line import assert_same_files, files_in, surgery
from surgery_cli import console
from surgery_cli.__main__ import app
from typer.testing import CliRunner

FACTORY = """
    import torch
    from torch import nn

    print("a factory may print")

    def net(seed, width=48):
        torch.manual_seed(seed)
        layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)]
        return nn.Sequential(*layers).eval(), torch.randn(4, 8)

    def one():
        return net(1)

    def two():
        return net(2, 40)

    def broken():
        module, inputs = net(3)
        module[2].weight.data[0, 0] = float("nan")
        return module, inputs
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """Two small models by reference, and a working folder of one's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(textwrap.dedent(FACTORY))
    return ["a=nets.py:one", "b=nets.py:two"]


def test_help_and_version_do_not_import_torch():
    code = (
        "import sys\nfrom surgery_cli.__main__ import app\n"
        "for words in (['--help'], ['merge', '--help'], ['--version']):\n"
        "    try:\n        app(words)\n    except SystemExit as end:\n        assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'timm', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_surgery_does_not_import_torch():
    code = "import sys, surgery; assert 'torch' not in sys.modules; assert 'fit' in dir(surgery)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lazy_names_are_functions_and_own_modules_need_no_library_of_models():
    code = (
        "import sys, torch, surgery\n"
        "def load(name):\n"
        "    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))\n"
        "    return surgery.load_member(net, name=name, inputs=torch.zeros(2, 4))\n"
        "surgery.join([load('one'), load('two')], block=(4, 4))\n"
        "heavy = {'timm', 'accelerate', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import surgery.fitting.fit, surgery.pipeline.merge\n"
        "import surgery.artifact.export, surgery.artifact.verify\n"
        "from types import FunctionType\n"
        "for name in ('fit', 'merge', 'export', 'verify', 'join', 'load', 'save', 'discover'):\n"
        "    assert isinstance(getattr(surgery, name), FunctionType), name\n"
        "for name in surgery.__all__:\n    assert getattr(surgery, name) is not None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["demo", "inspect", "merge", "add", "remove", "refit", "verify", "export"])
def test_every_verb_has_help_with_examples(verb):
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    assert "Examples" in shown.output and f"surgery {verb}" in shown.output
    assert all(len(line) <= 100 for line in shown.output.splitlines())


def test_inspect_lists_every_tensor(nets):
    code, out, _ = surgery("inspect", nets[0], "--json")
    found = json.loads(out)
    assert code == 0
    assert {row["name"] for row in found["tensors"]} == {
        f"{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")
    }
    assert [row["order"] for row in found["tensors"]] == sorted(row["order"] for row in found["tensors"])
    assert sum(total["parameters"] for total in found["totals"]) == 8 * 48 + 48 + 48 * 48 + 48 + 48 * 3 + 3
    assert [row["name"] for row in found["tensors"] if row["role"] == "site"] == ["2.weight"]
    assert all(row.get("reason") for row in found["tensors"] if row["role"] != "site")


def test_inspect_on_screen(nets):
    code, out, _ = surgery("inspect", nets[0], "--sites", "0.weight")
    assert code == 0
    assert "site 1x48x8" in out and "a linear map" in out


def test_inspect_counts_buffers_and_lists_them_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norm.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), torch.randn(2, 4)\n"
    )
    _, out, _ = surgery("inspect", "norm.py:net")
    assert "3 buffers are not listed" in out and "running_mean" not in out
    _, out, _ = surgery("inspect", "norm.py:net", "--only", "skipped")
    assert "running_mean" in out


def test_the_recorded_recipe_runs_again_to_the_same_folder(nets, tmp_path):
    for options in (
        [*nets, "--budget", "0.5", "--out", "one"],
        ["--config", "one/recipe.yaml", "--out", "two", "--trust-remote-code"],
    ):
        code, _, err = surgery("merge", *options, "--quiet")
        assert code == 0, err
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_dry_run_writes_nothing(nets, tmp_path):
    before = files_in(tmp_path)
    code, out, _ = surgery("merge", *nets, "--out", "joint", "--dry-run", "--verbose")
    assert code == 0 and "nothing is written" in out and "2.weight" in out
    code, out, _ = surgery("merge", *nets, "--out", "joint", "--dry-run", "--json")
    assert code == 0 and {row["name"] for row in json.loads(out)["members"]} == {"a", "b"}
    assert files_in(tmp_path) == before


def test_merge_verify_export(nets, tmp_path):
    code, out, err = surgery("merge", *nets, "--out", "joint", "--max-error", "0.1", "--json")
    assert code == 0, err
    made = json.loads(out)
    assert made["report"]["met"] and made["disk_bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "joint").rglob("*") if path.is_file()
    )
    assert all(0 <= row["output_error"] <= 0.1 for row in made["members"])
    code, out, _ = surgery("verify", "joint", "--json")
    assert code == 0 and json.loads(out)["ok"]
    code, out, err = surgery(
        "export", "joint", "--member", "a", "--format", "compressed", "--out", "a", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["member"] == "a" and (tmp_path / "a").is_dir()


def test_same_seed_same_artifact(nets, tmp_path):
    for name in ("one", "two"):
        code, _, err = surgery("merge", *nets, "--out", name, "--quiet", "--budget", "0.5", "--seed", "3")
        assert code == 0, err
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_quiet_merge_prints_nothing_on_stdout(nets):
    code, out, _ = surgery("merge", *nets, "--out", "joint", "--max-error", "0", "--quiet")
    assert code == 0 and out.replace("a factory may print\n", "") == ""


def test_config_options_and_set_override_in_this_order(nets, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "models: [{model: 'a=nets.py:one'}, {model: 'b=nets.py:two'}]\nparameters: {budget: 0.9}\nseed: 1\n"
    )
    code, out, err = surgery(
        "merge", "--config", "r.yaml", "--max-error", "0.2", "--set", "seed=5", "--dry-run", "--json"
    )
    assert code == 0, err
    recipe = json.loads(out)["recipe"]
    assert (recipe["seed"], recipe["parameters"]["max_error"], recipe["parameters"]["budget"]) == (
        5,
        0.2,
        None,
    )


@pytest.mark.parametrize(
    ("option", "value", "target"), [("--max-error", "0", "max_error"), ("--seed", "0", "seed")]
)
def test_a_zero_is_a_value(nets, tmp_path, option, value, target):
    (tmp_path / "r.yaml").write_text("seed: 4\nparameters: {budget: 0.9}\n")
    _, out, err = surgery("merge", *nets, "--config", "r.yaml", option, value, "--dry-run", "--json")
    recipe = json.loads(out)["recipe"]
    assert {**recipe, **recipe["parameters"]}[target] == 0, err


BAD = {
    "two targets": (["--budget", "0.5", "--max-error", "0.1"], "only one of"),
    "negative error": (["--max-error", "-1"], "--max-error"),
    "budget above 1": (["--budget", "1.5"], "--budget"),
    "no budget": (["--budget", "0"], "--budget"),
    "no hypermodule": (["--hypermodules", "0"], "--hypermodules"),
    "block that is none": (["--block", "16by16"], "16x16"),
    "block larger than every site": (["--block", "512x512"], "512"),
    "unknown method": (["--set", "method=magic"], "method"),
    "unknown key": (["--set", "parameters.bugdet=1"], "did you mean 'budget'"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "missing calibration file": (["--calibrate", "nowhere.txt"], "nowhere.txt"),
    "calibration for an unknown member": (["--calibrate", "c=nets.py"], "c"),
    "selector without a match": (["--skip", "9.weight"], "9.weight"),
    "no such device": (["--device", "abacus"], "abacus"),
    "existing folder": (["--out", "taken"], "taken"),
    "a file in the way": (["--out", "nets.py"], "nets.py"),
    "below a file": (["--out", "nets.py/joint"], "nets.py"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_merge_ends_in_one_sentence_and_writes_nothing(nets, tmp_path, case):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    options, words = BAD[case]
    before = files_in(tmp_path)
    code, out, err = surgery("merge", *nets, *([] if "--out" in options else ["--out", "joint"]), *options)
    assert code == 2, err
    assert words in err and "Traceback" not in err
    assert err.startswith("surgery: ") and err.count("\n") == 1, err
    assert "joint" not in out
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("references", "words"),
    [
        ([], "at least one model"),
        (["a=nets.py:one", "a=nets.py:two"], "more than once"),
        (["nets.py:one", "nets.py:one"], "more than once"),
        (["a=nets.py:three", "nets.py:one"], "three"),
        (["a=nets.py:broken"], "finite"),
        (["a=./nowhere", "nets.py:one"], "nowhere"),
        (["timm:no_such_network"], "no_such_network"),
    ],
)
def test_bad_references_end_in_one_sentence(nets, tmp_path, references, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = surgery("merge", *references, "--out", "joint")
    assert code == 2 and words in err and "Traceback" not in err
    assert not (tmp_path / "joint").exists()


def test_usage_errors_end_with_code_2(nets):
    assert surgery("merge", *nets)[0] == 2
    assert surgery("merge", *nets, "--out")[0] == 2
    assert surgery("export", "joint", "--member", "a", "--format", "zip", "--out", "x")[0] == 2
    assert surgery("nonsense")[0] == 2


def test_debug_shows_the_traceback_and_keeps_the_exit_code(nets):
    code, _, err = surgery("merge", *nets, "--out", "joint", "--set", "x=1", "--debug")
    assert code == 2 and "Traceback" in err


def test_verify_of_a_damaged_folder_ends_with_code_1_or_2(nets, tmp_path):
    assert surgery("merge", *nets, "--out", "joint", "--quiet", "--max-error", "0")[0] == 0
    weights = next((tmp_path / "joint").rglob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, _, err = surgery("verify", "joint")
    assert code in (1, 2) and "Traceback" not in err


def test_interrupt_ends_with_130_and_leaves_nothing(nets, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("surgery.fitting.fit"), "fit", interrupted)
    code, _, err = surgery("merge", *nets, "--out", "joint")
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert not (tmp_path / "joint").exists()


def test_sizes_and_fractions_for_people():
    assert [console.size(n) for n in (0, 999, 1000, 90_868_376, 2.5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "90.9 MB",
        "2.5 TB",
    ]
    assert [console.count(n) for n in (384, 9984, 21_120, 22_713_216)] == ["384", "9984", "21.1k", "22.7M"]
    assert [console.percent(x) for x in (0, 1e-7, 0.26)] == ["0%", "<0.1%", "26.0%"]


def test_json_holds_null_for_what_is_no_number(capsys):
    console.emit({"a": float("nan"), "b": [1.5, float("inf")], "c": (1, "x", None)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": [1, "x", None]}
