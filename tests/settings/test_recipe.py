"""A recipe is strict, complete, and the same however it was written."""

import pytest
import yaml

from surgery.anatomy.selectors import share_selectors
from surgery.errors import PlanError
from surgery.settings.documents import override, read_document, recipe_names
from surgery.settings.recipe import Recipe

TWO = {"models": [{"model": "a"}, {"model": "b", "name": "second"}]}


@pytest.mark.parametrize(
    ("parameters", "target"),
    [
        ({}, ("max_error", 0.05)),
        ({"max_error": 0}, ("max_error", 0)),
        ({"budget": 0.4}, ("budget", 0.4)),
        ({"hypermodules": 7}, ("hypermodules", 7)),
    ],
)
def test_one_target_is_in_force(parameters, target):
    assert Recipe.of({**TWO, "parameters": parameters}).target == target


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_error": -0.1},
        {"max_error": float("nan")},
        {"max_error": float("inf")},
        {"budget": 0},
        {"budget": 1.01},
        {"hypermodules": 0},
        {"hypermodules": 2.5},
        {"block": "16"},
        {"block": "0x4"},
        {"block": "axb"},
        {"block": [1, 2, 3]},
        {"context": 0},
        {"max_error": 0.1, "budget": 0.5},
    ],
)
def test_values_out_of_range_are_errors(parameters):
    with pytest.raises(PlanError):
        Recipe.of({**TWO, "parameters": parameters})


@pytest.mark.parametrize(
    ("document", "hint"),
    [
        ({"modles": []}, "did you mean 'models'"),
        ({"parameters": {"max_eror": 1}}, "did you mean 'max_error'"),
        ({"models": [{"model": "a", "nmae": "x"}]}, "did you mean 'name'"),
        ({"select": {"zzz": []}}, "known are private, sites, skip"),
        ({"method": "magic"}, "method"),
        ({"models": [{"name": "a"}]}, "models.0.model"),
    ],
)
def test_unknown_and_missing_keys_are_named(document, hint):
    with pytest.raises(PlanError, match=hint):
        Recipe.of(document)


def test_all_mistakes_come_in_one_error():
    with pytest.raises(PlanError) as caught:
        Recipe.of({"seeed": 1, "parameters": {"budget": 2, "blok": "4x4"}})
    assert all(word in str(caught.value) for word in ("seed", "budget", "block"))


ALL = {"templates": 4, "mixture": "softmax", "mix_norms": True}
NONE = {"templates": None, "mixture": "linear", "mix_norms": False}
RECORDED = {"parameters": NONE}
IDLE = {"templates": {"count": None, "mixing": "softmax"}}


@pytest.mark.parametrize(
    ("method", "document", "settings"),
    [
        ("templates", {"parameters": {**ALL, "budget": 0.5}}, ALL),
        ("templates", {"parameters": ALL, "train": IDLE}, ALL),
        ("templates", {"parameters": ALL, "train": {"templates": {"count": 4, "mixing": "softmax"}}}, ALL),
        ("templates", {**RECORDED, "train": IDLE}, NONE),
        ("templates", {"train": {"templates": {"count": 3}}}, {**NONE, "templates": 3}),
        ("templates", {"train": {"templates": {"mixing": "one-hot"}}}, {**NONE, "mixture": "one-hot"}),
        ("hypermodules", {**RECORDED, "train": IDLE}, {}),
        ("hypermodules", {"parameters": {"mixture": "softmax"}, "train": {"templates": {"count": 3}}}, {}),
        ("hypermodules", {"select": {"adapters": ["a"]}, "train": {"precision": "bf16"}}, {}),
    ],
)  # fmt: skip
def test_former_names_are_read(method, document, settings):
    recipe = Recipe.of({**TWO, "method": method, **document})
    assert recipe.settings == settings
    assert not {*recipe.resolved()["parameters"]} & {*ALL}
    if "select" in document:
        assert recipe.select.private == ("a",) and recipe.train.mixed_precision == "bf16"


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (
            {"settings": {"templates": 4}, "parameters": {"templates": 3}},
            "settings.templates has two values, 4 and, by its former name parameters.templates, 3: give "
            "settings.templates alone",
        ),
        (
            {"parameters": {"mixture": "linear"}, "train": {"templates": {"mixing": "one-hot"}}},
            "settings.mixture has two values, 'linear' and, by its former name train.templates.mixing, 'one-hot'",
        ),
        ({"settings": {"templats": 4}}, "'settings.templats' is not a known key, did you mean 'templates'?"),
        ({"method": "hypermodules", "parameters": {"templates": 4}}, "`settings.templates` needs `method=templates`"),
        ({"method": "hypermodules", "settings": {"mixture": "linear"}}, "found method hypermodules"),
        ({"parameters": {"hypermodules": 4}}, "parameters.hypermodules needs `method=hypermodules`, found method"),
        ({"settings": {"templates": 0}}, "settings.templates: must be 1 or more, found 0"),
        ({"train": {"budget": 0.5}}, "'train.budget' is not a known key, did you mean 'parameters.budget'?"),
        ({"parameters": {"harden": True}}, "did you mean 'train.templates.harden'?"),
        ({"max_eror": 0.5}, "did you mean 'parameters.max_error'?"),
    ],
)  # fmt: skip
def test_two_values_of_one_setting_and_wrong_names_are_errors(document, words):
    with pytest.raises(PlanError) as caught:
        Recipe.of({**TWO, "method": "templates", **document, "seeed": 1})
    assert words in str(caught.value) and "'seed'" in str(caught.value)


def test_resolved_recipe_reads_back_as_itself():
    recipe = Recipe.of({**TWO, "parameters": {"block": "1x16", "budget": 0.3}, "out": "there", "seed": 3})
    again = Recipe.of(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe.model_copy(update={"out": None})
    assert again.parameters.block == (1, 16)
    assert "out" not in recipe.resolved()


def test_resolved_recipe_states_the_default_target():
    assert Recipe.of(TWO).resolved()["parameters"]["max_error"] == 0.05


def test_override_sets_nested_and_numbered_values():
    document = override(TWO, ["parameters.block=8x8", "models.1.name=other", "seed=5", "select.skip=[x, y]"])
    recipe = Recipe.of(document)
    assert (recipe.parameters.block, recipe.models[1].name, recipe.seed) == ((8, 8), "other", 5)
    assert recipe.select.skip == ("x", "y")
    assert TWO["models"][1]["name"] == "second", "the document given is left as it was"


@pytest.mark.parametrize(
    "change", ["seed", "=3", "models.7.name=x", "models.x.name=x", "seed.more=1", "a..b=1"]
)
def test_override_that_leads_nowhere_is_an_error(change):
    with pytest.raises(PlanError):
        override({**TWO, "seed": 1}, [change])


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words", ""])
def test_recipe_file_must_be_a_mapping(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(PlanError, match=r"r\.yaml"):
        read_document(tmp_path / "r.yaml")


def test_missing_recipe_names_the_installed_ones():
    with pytest.raises(PlanError, match="demo"):
        read_document("no-such-recipe")


@pytest.mark.parametrize("name", recipe_names())
def test_installed_recipes_are_valid(name):
    assert len(Recipe.of(read_document(name)).models) >= 1


NAMES = {"a": ["fc.weight", "fc.bias"], "b": ["head.weight", "fc.bias"]}


def test_selectors_go_to_every_member_they_match():
    assert share_selectors(["fc.bias", "re:head.*"], NAMES) == {
        "a": ["fc.bias"],
        "b": ["fc.bias", "re:head.*"],
    }


def test_member_in_front_limits_a_selector():
    assert share_selectors(["b:fc.bias"], NAMES) == {"a": [], "b": ["fc.bias"]}


def test_selectors_that_match_nowhere_are_all_named():
    with pytest.raises(PlanError) as caught:
        share_selectors(["fc.wieght", "a:head.weight", "re:("], NAMES, what="--skip")
    message = str(caught.value)
    assert all(word in message for word in ("--skip", "fc.wieght", "fc.weight", "a:head.weight", "re:("))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("soft_ordr", "'soft_ordr' is neither: did you mean 'soft_order'?"),
        ("nonsense", "'nonsense' is neither: known are adaptation, "),
        ("soft_ordr.yaml", "The recipe soft_ordr.yaml does not exist; .*: did you mean 'soft_order'?"),
    ],
)
def test_a_recipe_that_does_not_exist_is_answered_by_the_nearest_name(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=said.replace("?", r"\?")):
        read_document(given)
