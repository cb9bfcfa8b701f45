"""A method of tensors from outside of the package: what docs/add_a_method.md says, and nothing else."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import artifacts
import nets
import numpy as np
import pytest
import torch
import yaml
from command_line import surgery as command
from ended_runs import stopped_at
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DOCS

import surgery
from surgery.core.registry import find_method
from surgery.core.tensor_method import TensorMethod
from surgery.errors import ArtifactError, MissingMethodError, PlanError
from surgery.fitting.arranging import arrange_made
from surgery.fitting.assembly import Assembler
from surgery.fitting.decoding import Decodings
from surgery.fitting.scene import Scene, key_of
from surgery.fitting.tabulated import Choice
from surgery.fitting.trial import Trial
from surgery.fitting.units import tabulate
from surgery.page.overview import look
from surgery.page.render import render
from surgery.settings.methods import REGISTERED, installed, method_names
from surgery.settings.recipe import Recipe
from surgery.settings.target import Target
from surgery.storage.codecs import NATIVE
from surgery.storage.stored import store
from surgery.training.loop.interruptions import Interrupted
from surgery.training.report.runlog import read_log

PAGE = DOCS / "add_a_method.md"
OWN = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5)), torch.randn(4, 6)
"""
DATA = """
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator)
    y = torch.stack([x.sum(1)] * 5, 1)
    return {"train": [(x, y)], "validation": [(x, y)]}
"""


def blocks(language: str) -> list[str]:
    """The page's blocks of code about methods that generate tensors."""
    if not PAGE.is_file():
        pytest.skip("docs are not part of an installed package")
    section = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The page's method as an installed package: a module, and metadata with its entry point."""
    place = tmp_path_factory.mktemp("packages")
    (place / "low_rank.py").write_text(blocks("python")[0])
    about = place / "low_rank-1.0.dist-info"
    about.mkdir()
    name, value = re.findall(r'^(\w+) = "(\w+)"$', blocks("toml")[0], re.MULTILINE)[0]
    (about / "entry_points.txt").write_text(f"[surgery.methods]\n{name} = {value}\n")
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: low-rank\nVersion: 1.0\nSummary: two factors\n"
    )
    sys.path.insert(0, str(place))
    installed.cache_clear()
    yield place
    sys.path.remove(str(place))
    installed.cache_clear()
    REGISTERED.pop("low_rank", None)
    sys.modules.pop("low_rank", None)


def members():
    return [nets.member("mlp"), nets.member("mlp", "other", seed=1)]


def modules():
    """Architectures, with other weights."""
    return {name: nets.member("mlp", name, seed=7).module for name in ("mlp", "other")}


@pytest.fixture
def joint(package, tmp_path, monkeypatch):
    """Two members fitted and saved as `joint` by the page's code."""
    monkeypatch.chdir(tmp_path)
    names = {"members": members()}
    exec(blocks("python")[1], names)
    return names["joint"]


def planned(rank=3, **target):
    found = [surgery.discover(each) for each in members()]
    return surgery.fit(
        surgery.join(members(), surgery.plan_with(found, "low_rank", {"rank": rank})), **target
    )


def test_a_joint_model_of_it_is_exact_until_it_is_fitted(package):
    found = [surgery.discover(each) for each in members()]
    joint = surgery.join(members(), surgery.plan_with(found, "low_rank", {"rank": 2}))
    for each in members():
        nets.assert_same_bits(joint.collapse(each.name), each.module.state_dict())
    whole = surgery.plan_with(found, "low_rank", {"rank": 32})
    lossless = surgery.fit(surgery.join(members(), whole), max_error=1e-4)
    assert max(lossless.report.errors.values()) <= 1e-4


def test_a_fit_makes_what_settings_fix_and_an_artifact_holds_it(joint):
    report, stored = joint.report, store(joint)
    assert report.target == "rank 4" and report.met and report.saved["precision"] == 0
    assert {bank.method for bank in joint.plan.banks} == {"low_rank"}
    assert all(dict(bank.settings) == {"rank": 4} for bank in joint.plan.banks)
    assert all(each.precision == NATIVE for each in stored.tensors.values())
    for each in members():
        after, before = joint.collapse(each.name), each.module.state_dict()
        for p in joint.plan.of(each.name):
            left, size, right = torch.linalg.svd(before[p.site.name])
            torch.testing.assert_close(after[p.site.name], (left[:, :4] * size[:4]) @ right[:4])
        others = {key for key in before} - {p.site.name for p in joint.plan.of(each.name)}
        assert others and all(torch.equal(after[key], before[key]) for key in others)
    again = surgery.load("joint", modules=modules())
    for name in joint.names:
        nets.assert_same_bits(again.collapse(name), joint.collapse(name))
    surgery.save(again, "again")
    assert artifacts.contents(Path("again")) == artifacts.contents(Path("joint"))
    verified = surgery.verify("joint", modules=modules())
    assert not verified.files and all(check.rebuilt for check in verified.members)
    assert sum(row.nbytes for row in report.detail) == stored.nbytes
    assert {row.how for row in report.detail} == {"low_rank", "native"} and "low_rank" in render(
        look("joint")
    )


def test_one_member_takes_its_own_factors_along(joint):
    whole, modules_of = store(joint), modules()
    alone = surgery.load("joint", members=["other"], modules={"other": modules_of["other"]})
    nets.assert_same_bits(alone.collapse("other"), joint.collapse("other"))
    assert store(alone).nbytes < 0.51 * whole.nbytes
    for form in ("plain", "compressed"):
        surgery.export("joint", "other", form, format=form)
    small = surgery.load("compressed", modules={"other": modules()["other"]})
    nets.assert_same_bits(small.collapse("other"), joint.collapse("other"))


def test_errors_and_budgets_decide_precisions_and_nothing_else(package):
    exact = planned().report
    bound = 1.1 * max(exact.errors.values())
    rounded = planned(max_error=bound)
    assert max(rounded.report.errors.values()) <= bound and rounded.report.met
    assert rounded.report.stored_bytes < 0.6 * exact.stored_bytes
    assert {bank.method for bank in rounded.plan.banks} == {"low_rank"}
    assert rounded.report.target == f"max-error {bound:g} with rank 3"
    small = planned(budget=0.15)
    assert store(small).nbytes <= 0.15 * sum(small.report.original_bytes.values())
    with pytest.raises(PlanError, match=r"An error of 0\.001 cannot be met with rank 3: .* `settings`"):
        planned(max_error=0.001)
    with pytest.raises(PlanError, match=r"A budget of 0\.01 cannot be met with rank 3"):
        planned(budget=0.01)
    with pytest.raises(PlanError, match=r"`hypermodules` needs `method=hypermodules`, but .* low_rank"):
        planned(hypermodules=3)


def test_a_method_that_may_be_left_unused_is_weighed_against_tensors_apart(package, monkeypatch):
    monkeypatch.setattr(type(find_method("low_rank")), "asks", lambda self, plan, target: "")
    apart = planned(rank=31, max_error=0.02)  # two factors of 31 are larger than the matrix
    assert not apart.plan.banks and apart.report.target == "max-error 0.02"
    torch.manual_seed(0)
    small = [nets.plain_copy(each) for each in members()]
    for each in small:
        for p in each.module.parameters():
            if p.shape == (32, 32):
                p.data = torch.randn(32, 1) @ torch.randn(1, 32) / 6
    plan = surgery.plan_with([surgery.discover(each) for each in small], "low_rank", {"rank": 1})
    joint = surgery.fit(surgery.join(small, plan), max_error=0.02)
    assert {bank.method for bank in joint.plan.banks} == {"low_rank"} and joint.report.saved["sharing"] > 0


@given(st.sampled_from([4, 32]), st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_predicted_errors_are_those_of_the_weights_that_members_get(package, rank, seed):
    """One part is rounded; at full rank that is all there is, and at a lower one, all or nothing."""
    found = members()
    plan = surgery.plan_with([surgery.discover(each) for each in found], "low_rank", {"rank": rank})
    trials = {}
    for each in found:
        state = dict(each.module.state_dict())
        owners = {name: (name,) for name in state}
        trials[each.name] = Trial(each, state, owners, [each.inputs], torch.device("cpu"))
    scene = Scene(trials, plan, Target(), seed)
    groups = arrange_made(find_method("low_rank", TensorMethod), scene, plan)
    assert all(group.shared and group.claimed for group in groups)
    table, units, arrangements = tabulate(groups, list(trials))
    generator = torch.Generator().manual_seed(seed)
    parts = [u for u, unit in enumerate(units) if set(unit.tensors) & {"left", "right"}]
    picked = np.zeros(len(units), int)
    chosen = parts[int(torch.randint(len(parts), (), generator=generator))]
    if rank == 32:
        picked[chosen] = int(torch.randint(1, len(units[chosen].options), (), generator=generator))
    taken = np.array([bool(each.banks) for each in arrangements])
    stored = Assembler(plan, {}, units, arrangements).assemble(Choice(picked, taken, 0.0, np.zeros(2)))
    active = taken[table.arrangement]
    predicted = (table.weight * table.error[np.arange(len(units)), picked][:, None])[active].sum(0)
    moved = {}
    for name in trials:
        after = Decodings().weights_of(stored, name)
        changes = [(scene.sensitivity[key_of(p.site)], p.site.name) for p in plan.of(name)]
        moved[name] = sum(
            weight * float((after[key] - scene.originals[name, key]).double().square().sum())
            for weight, key in changes
        )
    assert sum(moved.values()) == pytest.approx(predicted.sum(), rel=1e-3)
    assert [*moved.values()] == pytest.approx(
        predicted.tolist(), rel=0.5
    )  # shares are those of all precisions


def test_recipes_know_it_without_importing_it(package):
    code = (
        "import sys; from surgery.settings.recipe import Recipe; from surgery.settings.methods import summary_of;"
        "Recipe.of({'models': [{'model': 'a'}], 'method': 'low_rank'}); assert 'torch' not in sys.modules;"
        "print(summary_of('low_rank'))"
    )
    words = os.pathsep.join([str(package), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": words}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "two factors", done.stderr
    assert method_names()[-1] == "low_rank" or "low_rank" in REGISTERED


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (
            {"method": "low_rnk"},
            "method: must be one of .*low_rank, found 'low_rnk', did you mean 'low_rank'?",
        ),
        ({"settings": {"rnk": 4}}, "'settings.rnk' is not a known key, did you mean 'rank'?"),
        (
            {"settings": {"rank": 0}, "seeed": 1},
            "settings.rank: must be 1 or more, found 0; 'seeed' is not a known",
        ),
        ({"settings": {"rank": "four"}}, "settings.rank: input should be a valid integer.*, found 'four'"),
        ({"settings": [4]}, "settings: input should be a valid dictionary"),
        (
            {"method": "templates", "settings": {"rank": 4}},
            "'settings.rank' is not a known key, known are templates, mixture, mix_norms|`settings.rank` needs "
            "`method=low_rank`, found method templates",  # where it is registered
        ),
        (
            {"parameters": {"templates": 4}},
            "`settings.templates` needs `method=templates`, found method low_rank",
        ),
    ],
)
def test_wrong_settings_get_the_same_messages_as_all_else(package, document, words):
    with pytest.raises(PlanError, match=words):
        Recipe.of({"models": [{"model": "a"}], "method": "low_rank", **document})


def test_missing_settings_are_named_before_anything_is_joined(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    code, _, err = command("merge", "own.py:net", "--method", "low_rank", "--out", "joint")
    assert code == 2 and "settings.rank: field required" in err and not Path("joint").exists()


def test_the_command_line_runs_the_page(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    code, out, err = command("merge", "--help")
    assert code == 0 and re.search(r"low_rank:\s*[\w│ \n]*two\s", out.replace("│", "")), err
    for line in blocks("bash")[0].splitlines():
        code, _, err = command(*shlex.split(line)[1:], *(["--quiet"] if "merge" in line else []))
        assert code == 0, err
    recipe = yaml.safe_load(Path("joint/recipe.yaml").read_text())
    assert (recipe["method"], recipe["settings"]) == ("low_rank", {"rank": 4})
    assert recipe["parameters"]["max_error"] is None
    joint, smaller = (
        surgery.load("joint", trust_remote_code=True),
        surgery.load("smaller", trust_remote_code=True),
    )
    assert [int(torch.linalg.matrix_rank(each.collapse("net")["2.weight"])) for each in (joint, smaller)] == [
        4,
        2,
    ]
    code, out, err = command(
        "merge", "own.py:net", "--method", "low_rank", "--set", "settings.rank=4", "--dry-run"
    )
    assert code == 0 and "Would be fitted: rank 4, everything else as it is" in " ".join(out.split()), err
    code, _, err = command(
        "merge", "--config", "joint/recipe.yaml", "--trust-remote-code", "--out", "same", "-q"
    )
    assert code == 0, err
    one, other = artifacts.contents(Path("joint")), artifacts.contents(Path("same"))
    assert one == other, [name for name in one if one[name] != other.get(name)]


def test_a_recipe_trains_it_and_what_came_of_it_is_evaluated(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN + DATA)
    recipe = {
        "models": [
            {"model": "own.py:net", "tasks": [{"data": "own.py:data", "loss": "mse", "metric": "mse"}]}
        ],
        "method": "low_rank",
        "settings": {"rank": 4},
        "train": {"steps": 4, "burn_in": 0, "generations": 2, "final": 0},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = " ".join(command("train", "recipe.yaml", "--dry-run")[1].split())
    assert "Would be trained: 2 generations of 4 steps, " in said
    assert "burn-in" not in said and "evolution" not in said and "blocks chosen" not in said
    code, _, err = command("train", "recipe.yaml", "--out", "trained", "--cpu", "--quiet")
    assert code == 0, err
    trained = surgery.load("trained", trust_remote_code=True)
    assert int(torch.linalg.matrix_rank(trained.collapse("net")["2.weight"])) == 4
    assert {bank.method for bank in trained.plan.banks} == {"low_rank"}
    assert yaml.safe_load(Path("trained/recipe.yaml").read_text())["settings"] == {"rank": 4}
    for verb in ("evaluate", "verify"):
        code, _, err = command(verb, "trained", "--trust-remote-code")
        assert code == 0, err
    code, _, err = command("train", "trained", "--out", "further", "--cpu", "--quiet", "--trust-remote-code")
    assert code == 0, err
    further = surgery.load("further", trust_remote_code=True)
    assert int(torch.linalg.matrix_rank(further.collapse("net")["2.weight"])) == 4


def test_an_artifact_of_a_method_that_is_not_there_names_it(joint, monkeypatch):
    monkeypatch.delitem(REGISTERED, "low_rank")
    monkeypatch.setattr("surgery.settings.methods.installed", dict)
    needs = "needs method 'low_rank' of package 'low_rank', which generates its blocks and is not installed here: "
    needs += "install "
    with pytest.raises(MissingMethodError, match=f"Bank 32x32-float32 of joint {needs}that package"):
        surgery.load("joint", modules=modules())
    report = surgery.verify("joint", modules=modules())
    assert not report.ok and all(needs in each.reasons[0] for each in report.members)
    code, said, _ = command("verify", "joint")
    assert code == 1 and needs in " ".join(said.split())


def test_parts_from_a_stranger_are_refused(joint):
    def longer(manifest):
        next(iter(manifest["banks"].values()))["locations"] += 1

    def another(**changes):
        return lambda manifest: next(iter(manifest["banks"].values())).update(changes)

    for change, words in (
        (another(settings={"rank": 4, "more": 1}), "'settings.more' is not a known key"),
        (another(settings={"rank": -4}), "settings.rank: must be 1 or more, found -4"),
        (
            another(settings={"rank": 4}, method="none"),
            "'none' .*, which generates its blocks and is not installed",
        ),
        (another(method="low_rank"), None),
        (longer, r"must have \d+ locations, found \d+"),
    ):
        artifacts.rewrite(Path("joint"), change)
        if words is None:
            surgery.load("joint", modules=modules())
            continue
        with pytest.raises(ArtifactError, match=words):
            surgery.load("joint", modules=modules())


@pytest.mark.parametrize(
    ("part", "cut", "words"),
    [
        ("left", lambda left: left[:, :, :-1], "RuntimeError: .* size"),  # other ranks cannot be multiplied
        (
            "right",
            lambda right: right[:, :, :-1],
            r"must generate blocks \[\d+, 1024\] .*, found \[\d+, 992\]",
        ),
        (
            "right",
            lambda right: right[:-1],
            "cannot be made of its parts: RuntimeError",
        ),  # the last has no partner
    ],
)
def test_parts_that_do_not_suit_one_another_are_refused(joint, part, cut, words):
    name = f"32x32-float32/{part}"
    artifacts.rewrite_tensors(
        Path("joint"), "dictionary.safetensors", lambda held: {**held, name: cut(held[name]).contiguous()}
    )
    with pytest.raises(ArtifactError, match=words):
        surgery.load("joint", modules=modules())
    assert not surgery.verify("joint", modules=modules()).ok


def test_a_method_with_training_of_its_own_trains_and_goes_on(package, tmp_path, monkeypatch):
    (package / "bounded_rank.py").write_text(blocks("python")[2])
    monkeypatch.delitem(sys.modules, "bounded_rank", raising=False)
    importlib.import_module("bounded_rank")
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    task = surgery.Task("sums", "mlp", [(part, part[:, :5]) for part in x.split(8)], "mse")
    config = {"steps": 3, "generations": 3, "burn_in": 0, "final": 0, "save_seconds": 0}

    def joined():
        one = nets.member("mlp")
        settings = {"rank": 4, "bound": 0.25, "lr": 0.05}
        return surgery.join([one], surgery.plan_with([surgery.discover(one)], "bounded_rank", settings))

    whole = joined()
    surgery.train(whole, [task], config, folder=tmp_path / "whole", cpu=True)
    lines = [line["methods"]["bounded_rank"]["cut"] for line in read_log(tmp_path / "whole/log.jsonl")[1:-1]]
    assert lines == sorted(lines) and lines[0] > 0
    for bank in whole.dictionary.banks.values():
        assert 0.2 < float(bank.left.detach().abs().max()) <= 0.25
        assert float(bank.right.detach().abs().max()) <= 0.25
    with stopped_at(5), pytest.raises(Interrupted):
        surgery.train(joined(), [task], config, folder=tmp_path / "run", cpu=True)
    resumed = joined()
    surgery.train(resumed, [task], config, folder=tmp_path / "run", resume=True, cpu=True)
    nets.assert_same_bits(resumed.collapse("mlp"), whole.collapse("mlp"))
    again = surgery.load(surgery.save(resumed, tmp_path / "joint"), modules={"mlp": modules()["mlp"]})
    nets.assert_same_bits(again.collapse("mlp"), whole.collapse("mlp"))
    REGISTERED.pop("bounded_rank")


def test_nothing_of_the_package_knows_its_name():
    root = Path(surgery.__file__).parent
    texts = [*root.rglob("*.py"), *root.with_name("cli").rglob("*.py")]
    named = [path for path in texts if re.search(r"\blow_rank\b", path.read_text(encoding="utf-8"))]
    assert {path.name for path in named} <= {"method.py", "registry.py"}
    assert replace(surgery.make_plan([]), members=()) == surgery.make_plan([])
