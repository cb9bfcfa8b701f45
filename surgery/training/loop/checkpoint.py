"""Takes the state of a trainer apart and restores it, so that a resumed run equals an unbroken one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.errors import TrainingError, shorten
from surgery.storage.keys import StateKey, of_owner
from surgery.training.loop.moves import pack_moves, state_of
from surgery.training.loop.optimizers import plain, set_rates
from surgery.training.loop.state import (
    Tensors,
    model_tensors,
    of_model,
    random_state,
    restore,
    set_random_state,
)
from surgery.training.loop.state_check import EVOLUTION, scalars_of, wrong_state
from surgery.training.tasks.stateful import pack_loss, unpack_loss

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer


def pack(trainer: Trainer) -> tuple[Tensors, dict[str, Any]]:
    """Everything that `unpack` needs to go on from here: tensors, and the rest as JSON.

    Where processes hold parts, all of them call it, and the main one gets the tensors whole.
    """
    processes = trainer.processes
    model = processes.whole(model_tensors(trainer.joint))
    tensors = {key.in_model(): tensor for key, tensor in model.items()}
    own, facts = pack_moves(trainer.moves)
    tensors |= own
    steps: dict[str, Any] = {}
    for number, parameter in enumerate(trainer.parameters()):
        for name, value in plain(trainer.optimizer).state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[StateKey("optimizer", str(number), name)] = processes.whole_state(parameter, value)
            elif value is not None:
                steps[f"{number}/{name}"] = value
    for number, task in enumerate(trainer.tasks):
        state = pack_loss(trainer.losses[task.name])
        tensors |= {StateKey("loss", str(number), name): tensor for name, tensor in state.items()}
    # Every process has its own random state; all else is equal in all.
    accelerator, states, running = trainer.accelerator, [random_state()], trainer.running.sums
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        states, running = gather_object(states), accelerator.reduce(running, "mean")
    tensors |= {StateKey("running", name): value for name, value in running.items()}
    for rank, (random_tensors, _) in enumerate(states):
        tensors |= {StateKey("random", str(rank), name): value for name, value in random_tensors.items()}
    tensors[EVOLUTION] = trainer.generator.get_state()
    scaler = accelerator.scaler
    return tensors, {
        "generation": trainer.generation,
        "step": trainer.step,
        **facts,
        "optimizer": steps,
        "schedule": None if trainer.scheduler is None else trainer.scheduler.last_epoch,
        "streams": {name: stream.state() for name, stream in trainer.streams.items()},
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": [rest for _, rest in states],
    }


def unpack(trainer: Trainer, tensors: Mapping[StateKey, Tensor], document: Mapping[str, Any]) -> None:
    """Go on from what `pack` returned; where it does not fit, nothing in memory has changed.

    Raises:
        TrainingError: naming everything that does not fit this joint model and these tasks.
    """
    raise_unfit(wrong_state(trainer, tensors, document))
    for number, task in enumerate(
        trainer.tasks
    ):  # a loss of the user's own may refuse what has the right names
        unpack_loss(trainer.losses[task.name], of_owner(tensors, "loss", number), task.name)
    before = named(trainer.joint.dictionary)
    processes = trainer.processes
    restore(trainer.joint, processes.own(of_model(tensors)))
    trainer.generation, trainer.step = document["generation"], document["step"]
    after = named(trainer.joint.dictionary)
    changed = {id(p): after[name] for name, p in before.items() if after.get(name, p) is not p}
    for group in trainer.optimizer.param_groups:
        group["params"] = [changed.get(id(p), p) for p in group["params"]]
    for each in trainer.moves:
        each.unpack(*state_of(each, tensors, document))
    inner = plain(trainer.optimizer)
    for number, parameter in enumerate(trainer.parameters()):
        found: dict[str, Any] = {
            name: _as_kept(processes.own_state(parameter, value), parameter)
            for name, value in of_owner(tensors, "optimizer", number).items()
        }
        found |= scalars_of(document, number)
        if found:
            inner.state[parameter] = found
    if trainer.scheduler is not None:
        set_rates(trainer.scheduler, document["schedule"])
    if document["scaler"] is not None and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(document["scaler"])
    device = trainer.accelerator.device
    trainer.running.sums = {
        key.owner: tensor.to(device) for key, tensor in tensors.items() if key.kind == "running" and key.owner
    }
    for name, place in document["streams"].items():
        trainer.streams[name].seek(**place)
    trainer.generator.set_state(tensors[EVOLUTION])
    rank = trainer.accelerator.process_index
    rank = rank if rank < len(document["random"]) else 0  # there may be more processes now
    set_random_state(of_owner(tensors, "random", rank), document["random"][rank])


def _as_kept(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """What an optimizer keeps of a parameter, where the parameter is, with its strides: fused steps look at memory."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module, one that has several names under each."""
    return dict(module.named_parameters(remove_duplicate=False))


def raise_unfit(wrong: Iterable[str]) -> None:
    """Raise one error for everything that keeps a state from fitting, if anything does."""
    if found := list(wrong):
        raise TrainingError(
            f"The checkpoint must hold what this run trains, but {shorten(found, 8, '; ')}: it is damaged or "
            "belongs to another run; delete it to start anew, or choose another folder."
        )
