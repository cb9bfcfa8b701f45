"""The moves of all methods of a trainer, as one: what they say, and their states in that of the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from surgery.core.bank import Parts
from surgery.core.moves import Facts, Moves
from surgery.core.registry import active_methods
from surgery.storage.keys import StateKey, of_owner

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer

__all__ = ["Facts", "Moves", "gather", "is_read", "moves_of", "pack_moves", "state_of", "unread"]


def moves_of(trainer: Trainer) -> tuple[Moves, ...]:
    """The moves of all methods of a trainer's joint model."""
    return tuple(method.moves(trainer) for method in active_methods(trainer.joint))


def gather(moves: tuple[Moves, ...], what: str) -> Facts:
    """What all methods say, each at the top or under `methods` and its name.

    Args:
        moves: of all methods.
        what: the function of `Moves` that says it.
    """
    found: Facts = {}
    below: Facts = {}
    for each in moves:
        said = getattr(each, what)()
        if each.top:
            found |= said
        elif said:
            below[each.name] = said
    return {**found, "methods": below} if below else found


def pack_moves(moves: tuple[Moves, ...]) -> tuple[dict[StateKey, Tensor], Facts]:
    """The states of all methods in one."""
    tensors: dict[StateKey, Tensor] = {}
    facts: Facts = {}
    below: Facts = {}
    for each in moves:
        mine, said = each.pack()
        tensors |= {_key(each, name): tensor for name, tensor in mine.items()}
        if each.top:
            facts |= said
        elif said:
            below[each.name] = said
    return tensors, {**facts, "methods": below} if below else facts


def state_of(
    move: Moves, tensors: Mapping[StateKey, Tensor], document: Mapping[str, Any]
) -> tuple[Parts, Facts]:
    """A method's part of what `pack_moves` put together: of those at the top, all."""
    if move.top:
        return {str(key): tensor for key, tensor in tensors.items() if not key.model}, dict(document)
    mine = of_owner(tensors, "method", move.name)
    return mine, dict(document.get("methods", {}).get(move.name, {}))


def is_read(move: Moves, key: StateKey) -> bool:
    """Whether a tensor of a run's state is a method's."""
    return move.reads(str(key)) if move.top else (key.kind, key.owner) == ("method", move.name)


def unread(moves: tuple[Moves, ...], document: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """What a state says of methods that this run does not use.

    Args:
        moves: of all methods.
        document: of the state.
        known: names in it that are of no method.
    """
    top = {name for name, value in document.items() if value and name not in known}
    found = {name for name in top if not any(each.reads(name) for each in moves if each.top)}
    return sorted(found | set(document.get("methods", {})) - {each.name for each in moves if not each.top})


def _key(move: Moves, name: str) -> StateKey:
    return StateKey.parse(name) if move.top else StateKey("method", move.name, name)
