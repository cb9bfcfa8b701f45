"""Recipe: everything that decides what a merge computes, as one strict document that can be written and
read back.

A recipe comes from a YAML file, from command-line options, or from Python; later sources override earlier
ones. What only concerns one run on one machine (where to write, whether to overwrite, whether remote code
may run) is not part of what an artifact records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from surgery.disk.untrusted import shown, shown_text
from surgery.errors import PlanError
from surgery.settings.names import Mixing, without_target
from surgery.settings.problems import Strict, problems_of
from surgery.settings.quantities import Context, NotNegative, Positive, Rate, Seed, Share
from surgery.settings.training import Adaptation, Training
from surgery.util.wording import sentence

MAX_ERROR = 0.05
MOST_ERRORS = 20  # that one message names
TARGETS = ("max_error", "budget", "hypermodules", "templates")


def parse_block(value: Any) -> Any:
    """`"16x16"` -> `(16, 16)`; anything else is left for validation to judge."""
    if isinstance(value, str):
        sides = value.lower().split("x")
        if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
            raise ValueError(f"a block is written MxN, for example 16x16, not {shown(value)}")
        return tuple(int(side) for side in sides)
    return value


Block = Annotated[tuple[Positive, Positive], BeforeValidator(parse_block)]


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


class Model(Strict):
    """One member.

    Attributes:
        model: a reference, as `surgery.load_member` takes it; relative paths start in the recipe's folder.
        name: by default from the reference.
        calibrate: a file or folder with real inputs, to measure errors of a merge on.
        tasks: what it is trained to do.
    """

    model: str
    name: str | None = None
    calibrate: str | None = None
    tasks: tuple[TaskSpec, ...] = ()


class Parameters(Strict):
    """The target, and the shape of the dictionary; what is not given is chosen by the fit.

    At most one of the four targets is given, or `templates` with `max_error` or `budget`; with none, `max_error` is
    0.05.

    Attributes:
        max_error: the smallest artifact whose members' outputs move by at most this much.
        budget: the most exact artifact of this share of the members' bytes.
        hypermodules: a bank of so many.
        templates: so many for each stack, with method templates: at the members' precision, or in the precisions that
            `max_error` or `budget` asks for.
        block: sides of the blocks that are shared, such as `16x16`.
        context: basis blocks of a hypermodule (c).
        mixture: of templates: `linear`, positive ones that sum to 1 (`softmax`), or one template a layer (`one-hot`).
        mix_norms: whether scale and shift of norms are mixed too; running statistics never are.
    """

    max_error: NotNegative | None = None
    budget: Share | None = None
    hypermodules: Positive | None = None
    templates: Context | None = None
    block: Block | None = None
    context: Context | None = None
    mixture: Mixing = "linear"
    mix_norms: bool = False

    @model_validator(mode="after")
    def _one_target(self) -> Parameters:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        # With templates given, an error or a budget decides their precisions.
        if len(given) > (1 if self.templates is None or self.hypermodules is not None else 2):
            raise ValueError(
                f"only one of {', '.join(TARGETS)} can be the target, or templates with max_error or budget, "
                f"found {' and '.join(given)}"
            )
        return self


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

    @model_validator(mode="before")
    @classmethod
    def _former_name(cls, given: Any) -> Any:
        """Recipes that older artifacts record say `adapters`."""
        if isinstance(given, Mapping) and "adapters" in given and "private" not in given:
            return {"private" if key == "adapters" else key: value for key, value in given.items()}
        return given


class Recipe(Strict):
    """A complete merge.

    Attributes:
        models: the members.
        method: of sharing, `hypermodules` for all blocks, or `templates` for stacks of layers and hypermodules
            for the rest.
        parameters: target and dictionary.
        select: which tensors.
        calibrate: files with real inputs, each used for every member that it suits.
        seed: of all that is drawn at random.
        allow_nonfinite: whether members' weights may be NaN or infinite, as rows of unused tokens are.
        device: where the fit computes; `auto` takes an accelerator where there is one.
        train: settings of joint training; None for a merge.
        out: the folder to write; not recorded in artifacts.

    Example:
        >>> recipe = Recipe.of({"models": [{"model": "timm:resnet18"}], "parameters": {"budget": 0.5}})
        >>> recipe.target
        ('budget', 0.5)
    """

    models: tuple[Model, ...] = ()
    method: Literal["hypermodules", "templates"] = "hypermodules"
    parameters: Parameters = Parameters()
    select: Select = Select()
    calibrate: tuple[str, ...] = ()
    seed: Seed = 0
    allow_nonfinite: bool = False
    device: str = "auto"
    train: Training | None = None
    out: str | None = None

    @model_validator(mode="after")
    def _method_suits(self) -> Recipe:
        own = {"templates": ("templates", "mix_norms"), "hypermodules": ("hypermodules",)}
        for method, names in own.items():
            given = [name for name in names if getattr(self.parameters, name)]
            if given and self.method != method:
                raise ValueError(f"parameters.{given[0]} needs method {method}, found method {self.method}")
        return self

    @classmethod
    def of(cls, document: Mapping[str, Any], also: Sequence[str] = ()) -> Recipe:
        """Validate a document.

        Args:
            document: as YAML reads it.
            also: what is wrong with it besides, found elsewhere.

        Raises:
            PlanError: naming every key and value that is wrong, in one error.
        """
        wrong, found = list(also), None
        try:
            found = cls.model_validate(dict(document))
        except ValidationError as error:
            wrong = [*problems_of(error, cls), *wrong]
        if found is None or wrong:
            more = f"; and {len(wrong) - MOST_ERRORS} more" if len(wrong) > MOST_ERRORS else ""
            broken = "; ".join(shown_text(each, 500) for each in wrong[:MOST_ERRORS])
            raise PlanError(sentence(f"The recipe is not valid: {broken}{more}"))
        return found

    @property
    def target(self) -> tuple[str, float]:
        """Name and value of the target; of templates where nothing else is given."""
        for name in TARGETS:
            if (value := getattr(self.parameters, name)) is not None:
                return name, value
        return "max_error", MAX_ERROR

    def resolved(self) -> dict[str, Any]:
        """What an artifact records: every value in force, in plain types, without where it was written."""
        document = self.model_dump(mode="json", exclude={"out"} if self.train else {"out", "train"})
        if not self.allow_nonfinite:  # most recipes have nothing to say of it
            del document["allow_nonfinite"]
        for model in document["models"]:
            if not model["tasks"]:
                del model["tasks"]
        if self.train is None:
            name, value = self.target
            document["parameters"][name] = value
        else:  # training meets no target of a fit, so that it must claim none
            document = without_target(document)
        if self.parameters.block:
            document["parameters"]["block"] = "x".join(map(str, self.parameters.block))
        return document

    def to_yaml(self) -> str:
        """`resolved` as YAML that `read_recipe` reads."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)
