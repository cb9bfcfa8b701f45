"""An open contest in a run's state: its tensors, what cannot be true of them, and the contest made of them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from surgery.core.bank import Parts
from surgery.disk.untrusted import shown
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.contest import Contest
from surgery.methods.hypermodules.rewards import POPULATION
from surgery.util.dtypes import master_dtype


def pack_contest(contest: Contest | None) -> Parts:
    """An open contest's tensors."""
    if contest is None:
        return {}
    found = {"chosen": contest.chosen, "candidates": contest.candidates, "soft": contest.soft.detach()}
    if contest.group is not None:
        found["group"] = contest.group
    if len(contest.tried):
        found |= {"tried": contest.tried, "costs": contest.costs}
    return found if contest.contexts is None else {**found, "contexts": contest.contexts.detach()}


def unpack_contest(bank: HypermoduleBank, tensors: Mapping[str, Tensor]) -> Contest | None:
    """The contest that `pack_contest` took apart, in the bank that it belongs to."""
    if not tensors:
        return None
    device = bank.rows.device
    candidates = tensors["candidates"].to(device)
    own, chosen, group = tensors.get("contexts"), tensors["chosen"].to(device), tensors.get("group")
    contest = Contest(
        bank.psi,
        bank.hypermodules,
        chosen,
        candidates[:, 1:],
        bank.context,
        0.5,  # where soft weights began no longer matters
        None if own is None else own.to(device, copy=True),
        bank.factors_of(chosen, candidates),
        None if group is None else group.to(device),
        master_dtype(
            tensors["soft"].dtype
        ),  # float32 in runs of older versions, as their optimizer's state is
    )
    with torch.no_grad():
        contest.soft.copy_(tensors["soft"])
    if "tried" in tensors:
        contest.tried = tensors["tried"].to(device, copy=True)
        contest.costs = tensors["costs"].to(device, copy=True)
    return contest


def wrong_contest(parts: Mapping[str, Tensor], psi: Tensor, count: int, context: int) -> Iterator[str]:
    """What cannot be true of a contest among `count` hypermodules of `context` basis blocks, aligned by psi `[L]`."""
    names = {"chosen", "candidates", "soft"}
    more = {"contexts", "group", "tried", "costs"}
    if not names <= set(parts) <= names | more or ("tried" in parts) != ("costs" in parts):
        needed, found = ", ".join(sorted(names)), shown(sorted(parts))
        yield f"a contest must have {needed} and maybe contexts, group, or what was tried at what costs, found {found}"
        return
    chosen, candidates, soft = parts["chosen"], parts["candidates"], parts["soft"]
    contexts = parts.get("contexts")
    whole = chosen.dtype == candidates.dtype == torch.int64 and soft.is_floating_point()
    flat = chosen.ndim == 1 and len(chosen) and candidates.ndim == 2 and candidates.shape[1] > 1
    if not whole or not flat or len(candidates) != len(chosen) or soft.shape != candidates.shape:
        shapes = {name: [str(t.dtype), *t.shape] for name, t in parts.items()}
        yield f"a contest must have a soft weight for each candidate of each location chosen, found {shown(shapes)}"
        return
    if int(chosen[0]) < 0 or int(chosen[-1]) >= len(psi) or not bool((chosen[1:] > chosen[:-1]).all()):
        yield f"a contest must be of some of the {len(psi)} locations in their order"
    elif int(candidates.min()) < 0 or int(candidates.max()) >= count or int(psi.max()) >= count:
        yield f"a contest must be among hypermodules 0 to {count - 1}, found up to {int(candidates.max())}"
    elif not torch.equal(candidates[:, 0].cpu(), psi.cpu()[chosen.cpu()]):
        yield "a contest must have each location's own hypermodule as its first candidate"
    elif "group" in parts and (wrong := _wrong_group(parts["group"], psi[chosen.to(psi.device)], candidates)):
        yield wrong
    if "tried" in parts and (wrong := _wrong_trials(parts["tried"], parts["costs"], candidates)):
        yield wrong
    shape = (len(chosen), candidates.shape[1] - 1, context)
    if contexts is not None and (tuple(contexts.shape) != shape or not contexts.is_floating_point()):
        yield f"challengers must have contexts of {list(shape)}, found {list(contexts.shape)}"


def _wrong_trials(tried: Tensor, costs: Tensor, candidates: Tensor) -> str:
    """What cannot be true of a contest's draws `[P, N]` and their costs; empty where nothing."""
    count, columns = candidates.shape
    fits = tried.dtype == torch.int64 and costs.is_floating_point() and tried.ndim == 2
    if not fits or tried.shape != costs.shape or tried.shape[1] != count or not 0 < len(tried) < POPULATION:
        found = [[str(t.dtype), *t.shape] for t in (tried, costs)]
        return f"a contest must have tried less than {POPULATION} draws of its {count} locations, found {shown(found)}"
    if int(tried.min()) < 0 or int(tried.max()) >= columns:
        return f"a contest's draws must be among its {columns} alternatives, found up to {int(tried.max())}"
    return ""


def _wrong_group(group: Tensor, incumbent: Tensor, candidates: Tensor) -> str:
    """What cannot be true of the locations `group [N]` of a contest that are decided together; empty where nothing."""
    if group.dtype != torch.int64 or group.shape != incumbent.shape:
        return f"a contest must have a group for each location chosen, found {shown(list(group.shape))}"
    count = len(group)
    together = group >= 0
    if int(group.min()) < -1 or int(group.max()) >= count:
        return f"a contest's groups must be numbered from 0 to {count - 1}, -1 for none, found up to {int(group.max())}"
    mine = torch.cat([group.unsqueeze(1), candidates.to(group)], 1)[together]
    if len(mine) and len(torch.unique(mine, dim=0)) != len(torch.unique(mine[:, 0])):
        return "locations of a contest that are decided together must have the same candidates"
    return ""
