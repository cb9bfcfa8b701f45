"""The registry of methods: those that are registered, those of this package, and those of installed packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from surgery.core.method import Method, PlanRequest
from surgery.core.tensor_method import TensorMethod
from surgery.errors import PlanError
from surgery.settings.methods import known_methods, load_method, validate_settings
from surgery.settings.problems import InnerError, Strict, problems_of
from surgery.util.wording import sentence

if TYPE_CHECKING:
    from surgery.anatomy.plan import BankPlan, Plan
    from surgery.anatomy.sites import Anatomy
    from surgery.core.joint import JointModel

Kind = TypeVar("Kind", bound=Method)


@overload
def find_method(name: str) -> Method: ...
@overload
def find_method(name: str, kind: type[Kind]) -> Kind: ...
def find_method(name: str, kind: type[Method] = Method) -> Method:
    """The method of this name: registered, of this package, or of an installed one.

    Args:
        name: of a method.
        kind: which kind is needed; by default either.

    Raises:
        PlanError: where there is none, naming those that there are, or it is of another kind.

    Example:
        >>> find_method("templates", TensorMethod).name
        'templates'
    """
    found = load_method(name)
    if not isinstance(found, kind):
        (wanted, what), (does, which) = kind.does, type(found).does
        raise PlanError(f"Method '{name}' must {wanted} {what}, but it {does}s {which}.")
    return found


def settings_of(method: str, given: Mapping[str, Any]) -> Strict:
    """Settings of a method, validated by its class.

    Args:
        method: its name.
        given: what a recipe says under `settings`.

    Raises:
        PlanError: naming all that is wrong.
    """
    try:
        return validate_settings(method, given)
    except InnerError as error:
        wrong = "; ".join(problems_of(error.error, error.root, "settings"))
        raise PlanError(sentence(f"Settings of method {method} are not valid: {wrong}")) from None
    except ValueError as error:
        raise PlanError(sentence(f"Settings of method {method} are not valid: {error}")) from None


def with_settings(plan: Plan, given: Mapping[str, Any]) -> Plan:
    """The same plan with other settings of the method that it was made with; what is not given stays.

    Args:
        plan: of tensors; sites lie where they lay, so that settings which move them have no effect.
        given: settings by name.

    Raises:
        PlanError: naming all that is wrong.
    """
    if not given:
        return plan
    method = plan.method
    before = next((dict(bank.settings) for bank in plan.banks if bank.method == method), {})
    found = settings_of(method, {**before, **given}).model_dump(mode="json", exclude_unset=True)
    return replace(
        plan,
        banks=tuple(replace(bank, settings=found) if bank.method == method else bank for bank in plan.banks),
    )


def plan_with(
    anatomies: Sequence[Anatomy],
    method: str,
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    block: tuple[int, int] = (16, 16),
    context: int = 4,
) -> Plan:
    """Plan members by a method that generates tensors.

    Args:
        anatomies: of all members.
        method: its name.
        settings: its own.
        block: m x n, where it cuts sites into blocks.
        context: c, where it has hypermodules.

    Raises:
        PlanError: for settings that do not suit the method or the members.

    Example:
        >>> import surgery
        >>> found = surgery.discover(surgery.load_member("text=./text"))
        >>> plan = surgery.plan_with([found], "templates", {"templates": 1})
        >>> plan.method
        'templates'
    """
    request = PlanRequest(block, context, settings_of(method, settings))
    return find_method(method, TensorMethod).plan(anatomies, request)


def recorded_plan(plan: BankPlan) -> BankPlan:
    """The plan of a bank that was made, with those settings alone that an artifact records."""
    method = find_method(plan.method, TensorMethod)
    known = (method.recorded or method.settings).model_fields
    return replace(plan, settings={name: value for name, value in plan.settings.items() if name in known})


def methods_of(plan: Plan) -> list[TensorMethod]:
    """The methods of a plan's banks, in their order."""
    return [find_method(name, TensorMethod) for name in dict.fromkeys(bank.method for bank in plan.banks)]


def active_methods(joint: JointModel) -> list[Method]:
    """The methods that a joint model uses: of its banks, those that replaced modules, and those whose modules are
    in a member as it was written: their classes name it as `surgery_method`."""
    replaced = [each.replacement.method for member in joint.members.values() for each in member.replaced]
    written = [vars(type(part)).get("surgery_method") for part in joint.bodies.modules()]
    named = [name for name in written if isinstance(name, str) and name in known_methods()]
    found = (find_method(name) for name in dict.fromkeys((*replaced, *named)))
    return [*methods_of(joint.plan), *found]
