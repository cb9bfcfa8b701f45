"""Settings of learned routes, as a recipe has them under `settings`, and what an artifact records of a routed layer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from surgery.settings.problems import Strict
from surgery.settings.quantities import NotNegative, Positive, Rate, Share

Probability = Annotated[float, Field(gt=0, lt=1)]
Names = Annotated[tuple[str, ...], Field(max_length=4096)]


class Settings(Strict):
    """Which components tasks use, at which depth and how much.

    Attributes:
        routing: `gumbel`, components of one depth are on or off (Gumbel-Matrix); `soft`, all components in shares
            at every depth (soft layer ordering); `parallel`, component d at depth d; `permuted`, an order for each
            task, by chance or by hand.
        members: whether a task may use the layers of other members with stacks of the same structure too.
        adapters: whether, with `members`, layers of stacks of another width or structure are components as well, each
            between two linear maps of its own, which are learned.
        branches: whether the residual branches of layers, such as attention and MLP, are components in place of whole
            layers; for `gumbel`.
        identity: whether passing on is a component: layers can then be left out.
        tasks: by member, the names of tasks that have routes of their own; by default a member has one route.
        orders: by member and task, the layer at each depth, from 0; for `permuted`.
        p_init: probability of being on at first; in pretrained stacks of a task's own layer.
        layers: how many layers of a stack a task keeps, or as many branches as these have; for `gumbel`, in place of a
            budget of components.
        component_budget: share of the components that a task may have on, on average; for `gumbel`.
        measure: batches of each task on which layers are left out one by one before routes are learned, which then
            begin with those that are missed least off; 4 times as many where they hardly differ, up to 16 times for
            the last one; 0 for none. With `layers`.
        trials: steps that each choice is trained for, from the start and for itself, where measuring the last layer to
            leave out hardly tells choices apart; what it then loses on other batches decides. 0 for none.
        penalty: lambda, the weight of what exceeds the budget.
        temperature: of the softmax backward, at first: it falls with the square root of the number of batches.
        least_temperature: what it falls to.
        sure: share of a task's own layer at first; for `soft` in pretrained stacks.
        rate: learning rate of logits and scores, as a multiple of the optimizer's.
        harden: whether the final generations train with one route for each task, which is then kept.
        seed: of orders by chance.
    """

    routing: Literal["gumbel", "soft", "parallel", "permuted"] = "gumbel"
    members: bool = False
    adapters: bool = False
    branches: bool = False
    identity: bool = True
    tasks: Annotated[dict[str, Names], Field(max_length=4096)] = Field(default_factory=dict)
    orders: dict[str, dict[str, tuple[int, ...]]] = Field(default_factory=dict)
    p_init: Probability = 0.97
    layers: Positive | None = None
    component_budget: Share | None = None
    measure: Annotated[int, Field(ge=0, le=4096)] = 2
    trials: Annotated[int, Field(ge=0, le=4096)] = 0
    penalty: NotNegative = 1.0
    temperature: Rate = 50.0
    least_temperature: Rate = 0.5
    sure: Probability = 0.9
    rate: Rate = 20.0
    harden: bool = True
    seed: Annotated[int, Field(ge=0, le=(1 << 32) - 1)] = 0

    @field_validator("tasks")
    @classmethod
    def _distinct(cls, given: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for member, names in given.items():
            if not names or len(set(names)) != len(names):
                raise ValueError(f"the tasks of '{member}' must be distinct names, found {list(names)}")
        return given

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.routing != "gumbel" and (self.layers is not None or self.component_budget is not None):
            raise ValueError(f"layers and component_budget need routing gumbel, found {self.routing}")
        if self.layers is not None and self.component_budget is not None:
            raise ValueError("layers and component_budget say the same: give one of them")
        if self.layers is not None and not self.identity:
            raise ValueError("layers can be left out only where the identity is a component: identity true")
        if self.adapters and not self.members:
            raise ValueError("adapters serve layers of other members: set members to true as well")
        if self.branches and (self.routing != "gumbel" or self.members or not self.identity):
            raise ValueError("branches need routing gumbel, identity true and members false")
        if self.orders and self.routing != "permuted":
            raise ValueError(f"orders need routing permuted, found {self.routing}")
        return self

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn of a route."""
        return self.routing in ("gumbel", "soft")
