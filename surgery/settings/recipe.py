"""Recipe: everything that decides what a merge computes, as one strict document that can be written and read back.

A recipe comes from a YAML file, from command-line options, or from Python; later sources override earlier
ones. What only concerns one run on one machine (where to write, whether to overwrite, whether remote code
may run) is not part of what an artifact records.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from surgery.disk.untrusted import shown_text
from surgery.errors import PlanError, shorten
from surgery.settings.former import renewed
from surgery.settings.methods import method_names, of_another_method, unknown_method, validate_settings
from surgery.settings.names import DEFAULT_METHOD, LEVERS, PARAMETERS_OF, TARGETS, without_target
from surgery.settings.problems import Strict, problems_of
from surgery.settings.quantities import Positive, Rate, Seed
from surgery.settings.target import MAX_ERROR, Target
from surgery.settings.training import Adaptation, Training
from surgery.util.wording import sentence

MOST_ERRORS = 20  # that one message names
NOTHING: Mapping[str, str] = MappingProxyType({})


def known_method(name: object) -> object:
    """A method's name, where there is such a method."""
    if name not in method_names():
        raise ValueError(unknown_method(name))
    return name


def method_settings(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method as JSON values, with its defaults.

    Args:
        method: its name.
        given: what a recipe says under `settings`.

    Raises:
        ValueError: saying what is wrong.
        PlanError: where the method cannot be imported.
    """
    return validate_settings(method, given).model_dump(mode="json")


class TaskSpec(Strict):
    """What a member is trained to do.

    Attributes:
        name: of the task; by default the member's.
        data: where examples come from: a function as `package.module:function` or `file.py:function`, or a
            file (see `surgery.training.tasks.sources`).
        options: arguments of that function, or of the reader of that kind of file.
        batch: examples in a batch.
        loss: a name, or names with their weights.
        labels: whether training sees targets; validation and test keep theirs.
        adaptation: what a loss that adapts without labels compares with.
        metric: a name, or one name with its arguments, such as `{f1: {average: macro}}`.
        weight: of its loss among the tasks' losses.
        lr: learning rate of the member; tasks of one member must agree on it.
    """

    data: str
    name: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    batch: Positive = 32
    loss: str | dict[str, float] = "cross_entropy"
    labels: bool = True
    adaptation: Adaptation | None = None
    metric: str | dict[str, dict[str, Any]] | None = None
    weight: Rate = 1.0
    lr: Rate | None = None


class Model(Strict):
    """One member.

    Attributes:
        model: a reference, as `surgery.load_member` takes it; relative paths start in the recipe's folder.
        name: by default from the reference.
        calibrate: a file or folder with real inputs, to measure errors of a merge on.
        tasks: what it is trained to do.
        lr: learning rate that it is trained at, in place of `train.optimizer.lr`.
    """

    model: str
    name: str | None = None
    calibrate: str | None = None
    tasks: tuple[TaskSpec, ...] = ()
    lr: Rate | None = None


class Parameters(Target):
    """The target, and the shape of the dictionary; what is not given is chosen by the fit."""


class Select(Strict):
    """Which tensors go into the dictionary, beyond the defaults, and which stacks take templates.

    Exact names, of stacks their paths such as `encoder.layer.*`, or `re:` patterns; `MEMBER:` in front limits them.

    Attributes:
        private: tensors left to their member alone.
        sites: tensors that are shared although they are private by default.
        skip: tensors that are not touched.
        stacks: stacks of layers that take templates, with method templates; all by default.
    """

    private: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()


class Recipe(Strict):
    """A complete merge.

    Attributes:
        models: the members.
        method: of sharing, `hypermodules` for all blocks, `templates` for stacks of layers and hypermodules for the
            rest, or one of an installed package.
        settings: of the method, where it has any.
        parameters: target and dictionary.
        select: which tensors.
        calibrate: files with real inputs, each used for every member that it suits.
        seed: of all that is drawn at random.
        allow_nonfinite: whether members' weights may be NaN or infinite, as rows of unused tokens are.
        device: where the fit computes; `auto` takes an accelerator where there is one. Training runs where it is
            launched, and on the CPU where this is `cpu`.
        train: settings of joint training; None for a merge.
        out: the folder to write; not recorded in artifacts.

    Example:
        >>> recipe = Recipe.of({"models": [{"model": "timm:resnet18"}], "parameters": {"budget": 0.5}})
        >>> recipe.target
        ('budget', 0.5)
    """

    models: tuple[Model, ...] = ()
    method: Annotated[str, BeforeValidator(known_method)] = DEFAULT_METHOD
    settings: dict[str, Any] = Field(default_factory=dict)
    parameters: Parameters = Parameters()
    select: Select = Select()
    calibrate: tuple[str, ...] = ()
    seed: Seed = 0
    allow_nonfinite: bool = False
    device: str = "auto"
    train: Training | None = None
    out: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _names_of_today(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        document, wrong = renewed(given)
        if wrong:
            raise ValueError("; ".join(wrong))
        return document

    @field_validator("parameters")
    @classmethod
    def _parameters_of_the_method(cls, given: Parameters, info: ValidationInfo) -> Parameters:
        for method, names in PARAMETERS_OF.items():
            found = [name for name in names if getattr(given, name)]
            if found and info.data.get("method", method) != method:
                raise ValueError(of_another_method(found[0], [method], info.data["method"]))
        return given

    @field_validator("settings")
    @classmethod
    def _settings_of_the_method(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Those that are given are all right, and what is not given has its default."""
        return method_settings(info.data["method"], given) if given and "method" in info.data else given

    @classmethod
    def of(
        cls, document: Mapping[str, Any], also: Sequence[str] = (), called: Mapping[str, str] = NOTHING
    ) -> Recipe:
        """Validate a document.

        Args:
            document: as YAML reads it.
            also: what is wrong with it besides, found elsewhere.
            called: what errors call keys that were given in another way than in a document, by their paths, such as
                `{"parameters.budget": "BUDGET in budgets.csv"}`.

        Raises:
            PlanError: naming every key and value that is wrong, in one error.
        """
        today, wrong = renewed(document)
        wrong, found = [*wrong, *also], None
        try:
            found = cls.model_validate(today)
        except ValidationError as error:
            wrong = [*problems_of(error, cls, called=called), *wrong]
        if found is None or wrong:
            broken = shorten((shown_text(each, 500) for each in wrong), MOST_ERRORS, "; ")
            # Whoever gave options alone knows of no recipe.
            flags = all(any(flag in each for flag in called.values()) for each in wrong)
            opening = "" if flags else "The recipe is not valid: "
            raise PlanError(sentence(f"{opening}{broken}"))
        return found

    @property
    def target(self) -> tuple[str, float]:
        """Name and value of the target."""
        for name in TARGETS:
            if (value := getattr(self.parameters, name)) is not None:
                return name, value
        return "max_error", MAX_ERROR

    def resolved(self, *, fixed: bool = False) -> dict[str, Any]:
        """What an artifact records: every value in force, in plain types, without where it was written.

        Args:
            fixed: whether settings of the method fix what is made, so that no error is the target by default; of the
                methods of this package that is seen.
        """
        fixed = fixed or bool(self.settings.get(LEVERS.get(self.method, "")))
        document = self.model_dump(mode="json", exclude={"out"} if self.train else {"out", "train"})
        if not self.allow_nonfinite:  # most recipes have nothing to say of it
            del document["allow_nonfinite"]
        for model in document["models"]:
            for each in (model, *model["tasks"]):
                if each["lr"] is None:
                    del each["lr"]
            if not model["tasks"]:
                del model["tasks"]
        if not self.settings:
            del document["settings"]
        if self.train is None and (self.parameters.given() or not fixed):
            name, value = self.target
            document["parameters"][name] = value
        elif self.train is not None:  # training meets no target of a fit, so that it must claim none
            document = without_target(document)
        if self.parameters.block:
            document["parameters"]["block"] = "x".join(map(str, self.parameters.block))
        return document

    def recorded(self, *, fixed: bool = False) -> Recipe:
        """The same recipe with every value in force given, as `resolved` says."""
        return Recipe.of(self.resolved(fixed=fixed))

    def document(self) -> dict[str, Any]:
        """What is given, in plain types, without where it was written.

        Example:
            >>> Recipe.of({"parameters": {"block": "8x8"}, "out": "joint"}).document()
            {'parameters': {'block': '8x8'}}
        """
        document = self.model_dump(mode="json", exclude_unset=True, exclude={"out"})
        if self.parameters.block:
            document["parameters"]["block"] = "x".join(map(str, self.parameters.block))
        return document

    def without_target(self) -> Recipe:
        """The same without the target of a fit: for weights that were not made by that fit alone."""
        given = {name: None for name in TARGETS if name in self.parameters.model_fields_set}
        return (
            self.model_copy(update={"parameters": self.parameters.model_copy(update=given)})
            if given
            else self
        )

    def of_members(self, names: Collection[str]) -> Recipe:
        """The same for some of the members; unchanged where it names none of them."""
        models = tuple(model for model in self.models if model.name in names)
        return self.model_copy(update={"models": models}) if 0 < len(models) < len(self.models) else self

    def to_yaml(self) -> str:
        """`resolved` as YAML that `read_recipe` reads."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)
