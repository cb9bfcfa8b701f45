"""Saves and restores losses that have a trained state of their own.

A loss is any function of a member's output and the batch. One that learns or counts, as a discriminator does, says so
like PyTorch's modules and optimizers: `state_dict` gives its tensors by name, `load_state_dict` takes them back. Then a
run that was interrupted goes on to the same result; `nn.Module`s as losses do so without more. What a loss needs but
does not change, such as features of a source, is no state: it is made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from surgery.errors import TrainingError
from surgery.training.tasks.tasks import Batch, Loss
from surgery.util.text import one_line


@runtime_checkable
class Stateful(Protocol):
    """What a loss offers whose state belongs to the run."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its tensors by name."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any:
        """Go on from what `state_dict` returned."""
        ...


def pack_loss(loss: Loss) -> dict[str, Tensor]:
    """The state of a loss; nothing for most."""
    return dict(loss.state_dict()) if isinstance(loss, Stateful) else {}


def unpack_loss(loss: Loss, tensors: Mapping[str, Tensor], task: str) -> None:
    """Go on from what `pack_loss` returned.

    Raises:
        TrainingError: where it is the state of another loss.
    """
    known = set(pack_loss(loss))
    if known != set(tensors):
        raise TrainingError(
            f"The checkpoint must hold the state of the loss of {task}, {', '.join(sorted(known)) or 'none'}, but has "
            f"{', '.join(sorted(tensors)) or 'none'}: it belongs to another run; choose another folder, or delete it."
        )
    if isinstance(loss, Stateful):
        try:
            loss.load_state_dict(tensors)
        except TrainingError:
            raise
        except Exception as error:  # of a loss of the user's own
            raise TrainingError(
                f"The checkpoint must hold a state that the loss of {task} takes, but it says {one_line(error)}: it is "
                "damaged or belongs to another run; delete it to start anew, or choose another folder."
            ) from error


def close_loss(loss: Loss) -> None:
    """Let go of what a loss holds on to in members, where it does."""
    if (close := getattr(loss, "close", None)) is not None:
        close()


class Sum:
    """Losses added with weights; their states are its own, each under its loss's name.

    Args:
        terms: weight and loss by name.
    """

    def __init__(self, terms: Mapping[str, tuple[float, Loss]]):
        self.terms = dict(terms)

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        """The weighted sum."""
        return torch.stack([weight * loss(output, batch) for weight, loss in self.terms.values()]).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """Of all losses that have a state."""
        return {
            f"{name}.{key}": tensor
            for name, (_, loss) in self.terms.items()
            for key, tensor in pack_loss(loss).items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned."""
        for name, (_, loss) in self.terms.items():
            own = {
                key.removeprefix(f"{name}."): t for key, t in state_dict.items() if key.startswith(f"{name}.")
            }
            unpack_loss(loss, own, name)

    def close(self) -> None:
        """Of all losses."""
        for _, loss in self.terms.values():
            close_loss(loss)
