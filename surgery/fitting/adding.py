"""Adding: one member fitted to a stored joint model that stays as it is.

Each of its tensors is stored apart, as one that is stored already, or, where it resembles what a bank's sites have in
common, as that and what is its own. The member is fitted by itself, with what is there at no cost, so neither time nor
memory depends on how many members there are; what comes of it is then grafted on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Plan
from surgery.anatomy.sites import Site
from surgery.core.registry import find_method
from surgery.core.sizes import bytes_alone, parameters_of_module
from surgery.core.tensor_method import TensorMethod
from surgery.fitting.groups import make_groups
from surgery.fitting.learning import inputs_to_learn_from, warn_of_few
from surgery.fitting.related import least_cosine, samples
from surgery.fitting.report import Added, FitReport, Probes
from surgery.fitting.scene import Scene, as_asked, key_of
from surgery.fitting.search import Outcome, search
from surgery.fitting.trial import Trial
from surgery.fitting.units import Arrangement, Group, Key, Unit
from surgery.fitting.variation import warn_of_faint
from surgery.inputs.probes import probe_inputs
from surgery.members.extra_state import extra_state_of
from surgery.members.member import Inputs, Member, content_hash, owners_of, state_tensors, whole_state
from surgery.settings.names import RELATED
from surgery.settings.target import Target
from surgery.storage.codecs import Encoded, decode, take_rows, unpacked
from surgery.storage.grafting import graft
from surgery.storage.keys import PlainKey
from surgery.storage.stored import Stored
from surgery.storage.trim import on_cpu, trim_plain
from surgery.util import progress
from surgery.util.devices import pick_device

NEAR = 0.1  # largest relative difference of a few rows from those of a tensor that is as good as the same
FEW = 16  # rows that are compared
CANDIDATES = 4  # stored tensors that one is compared with: those that most members use
ALIAS = 80.0  # bytes of a line in the manifest that says where a tensor is stored
LENDING = RELATED[0]  # the method whose banks are made of tensors that were stored alone
LEAST_LENT = 4096  # elements of a matrix that is worth a bank
LEAST = 512  # bytes of a tensor that is worth it


@dataclass(frozen=True)
class Addition:
    """A member that was fitted to a stored joint model.

    Attributes:
        stored: of the member alone, each of its banks with what the bank that it joins has in common.
        whole: of all members, the new one last.
        report: of the new member alone.
        sites: how many of its sites are stored as what a bank has in common and what is their own.
        same: how many of its tensors are stored already.
    """

    stored: Stored
    whole: Stored
    report: FitReport
    sites: int
    same: int

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that the member adds."""
        (added,) = self.report.added.values()
        return added.stored_bytes


def fit_addition(
    member: Member,
    plan: Plan,
    stored: Stored,
    target: Target,
    *,
    seed: int = 0,
    probes: Sequence[Inputs] = (),
    device: str = "auto",
    was: str | None = None,
) -> Addition:
    """Fit one member to what is stored of others.

    Args:
        member: with ordinary weights; its module is used up.
        plan: of the member alone, with all of its sites.
        stored: of the others; none of it changes.
        target: an error bound or a budget.
        seed: of everything random here.
        probes: inputs to measure on; seeded made-up ones where there are none.
        device: `auto`, `cpu`, `cuda`, ...
        was: content hash of the member, where it is known.

    Raises:
        PlanError: where the budget cannot be met, or the member's outputs cannot be measured.
    """
    name, place, owners = member.name, pick_device(device), owners_of(member.module)
    state = state_tensors(member.module)
    originals = {first: state[first].detach() for first in owners}
    was, parameters = was or content_hash(whole_state(member.module)), parameters_of_module(member.module)
    extra = extra_state_of(member.module)
    inputs = list(probes) or probe_inputs(member, seed=seed)
    others = inputs_to_learn_from(member, originals, seed, probes)
    trials = {name: Trial(member, originals, owners, inputs, place, others)}
    given = frozenset({name} if probes else ())
    scene = Scene(trials, as_asked(plan), target, seed, calibrated=given, beside=True)
    tied = {first: names for first, names in owners.items() if len(names) > 1}
    known = Known(stored, place)
    groups = known.groups(scene)
    outcome = search(scene, {name: tied} if tied else {}, groups, known.present)
    alone = trim_plain(on_cpu(known.in_place(outcome.stored)))
    alone = replace(alone, extra={name: extra} if extra else {})
    banks = {p.bank: known.banks[key_of(p.site)] for p in alone.plan.placements}
    whole = graft(stored, alone, banks)
    size, errors = bytes_alone(alone)[name], {name: float(outcome.errors[0])}
    variation = trials[name].variation()
    variations = {} if variation is None else {name: variation}
    warn_of_faint(errors, variations)
    warn_of_few({name: probes})
    report = FitReport(
        original_bytes={name: size},
        errors=errors,
        hashes={name: was} if member.original else {},
        parameters={name: parameters},
        added={name: _added(outcome, size, whole.nbytes - stored.nbytes, Probes(seed, tuple(given)))},
        variations=variations,
    )
    sites = sum(p.site.member == name for p in whole.plan.placements)
    same = sum(key.member == name and first.member != name for key, first in whole.aliases.items())
    return Addition(alone, whole, report, sites, same)


def _added(outcome: Outcome, size: int, marginal: int, probes: Probes) -> Added:
    """What is reported of a member whose `size` bytes take `marginal` ones beside the others."""
    sharing = min(outcome.sharing, size - marginal)
    saved = {"sharing": sharing, "precision": size - marginal - sharing}
    return Added(outcome.target, outcome.met, marginal, saved, probes)


class Known:
    """What is stored already, as what a new member can be stored as.

    Attributes:
        banks: by site of the new member, the bank that it may join, or a plain tensor that may become one.
        present: units that are stored already, as they are.
    """

    def __init__(self, stored: Stored, device: torch.device):
        self.stored, self.device = stored, device
        self.banks: dict[Key, str | PlainKey] = {}
        self.present: list[tuple[Unit, Encoded]] = []
        self._users = Counter(stored.aliases.values())
        self._order = {key: number for number, key in enumerate(stored.tensors)}
        self._named: dict[str, list[PlainKey]] = defaultdict(list)
        for key in stored.tensors:
            if isinstance(key, PlainKey):
                self._named[key.name].append(key)
        self._at_home: dict[int, Encoded] = {}  # by what stands for it on the device

    def groups(self, scene: Scene) -> list[Group]:
        """Each tensor of a new member as one thing to decide on."""
        if scene.target.max_error != 0:  # what is stored with few bits is never exact
            scene.expect(self._likely(scene))
        found = []
        groups = [
            Group((Arrangement((unit,)),)) for g in make_groups(scene) for unit in g.arrangements[0].units
        ]
        if scene.target.max_error != 0:
            self.banks = self._alike(scene)
        with progress.task("Comparing with what is stored", len(groups)) as task:
            for group in groups:
                (unit,) = group.arrangements[0].units
                found.append(Group((*group.arrangements, *self._ways(scene, unit))))
                task.advance()
        return found

    def in_place(self, stored: Stored) -> Stored:
        """The same with the tensors that were there already in place of what stood for them on the device."""
        tensors = {key: self._at_home.get(id(each), each) for key, each in stored.tensors.items()}
        return replace(stored, tensors=tensors)

    def _ways(self, scene: Scene, unit: Unit) -> Iterator[Arrangement]:
        """How the tensors of a unit can be stored with what is there already."""
        keys = [(key.member, key.name) for key in unit.tensors]
        if (same := self._same(scene, unit)) is not None:
            yield same
        for key in keys[:1] if len(keys) == 1 else ():
            if key not in self.banks and (lent := self._lent(scene, key)) is not None:
                self.banks[key] = lent
            if key not in self.banks:
                continue
            at = self.banks[key]
            if isinstance(at, PlainKey):
                method, common = find_method(LENDING, TensorMethod), self.stored.tensors[at]
            else:
                bank = self.stored.plan.bank(at)
                method, common = find_method(bank.method, TensorMethod), self._common(bank)
            assert common is not None  # the site resembles it
            moved = self._moved(common)
            made = method.addition(scene, scene.sites[key], moved)
            self.present.append((made.units[0], moved))
            yield made

    def _same(self, scene: Scene, unit: Unit) -> Arrangement | None:
        """The tensors of a unit as one that is stored already; None where none is as good as the same."""
        tensor = next(iter(unit.tensors.values()))
        if tensor.numel() * tensor.element_size() < LEAST:
            return None
        names = dict.fromkeys(key.name for key in unit.tensors)
        held = [key for name in names for key in self._held(name, tuple(tensor.shape), tensor.dtype)]
        held = sorted(held, key=lambda key: (-self._users[key], self._order[key]))[:CANDIDATES]
        distances = {key: _distance(self.stored.tensors[key], tensor) for key in held}
        at = min(distances, key=distances.__getitem__, default=None)
        if at is None or not distances[at] <= NEAR:
            return None
        encoded = self._moved(self.stored.tensors[at])
        lost = float((decode(encoded).double() - tensor.double()).square().sum())
        own = Unit(unit.tensors, unit.weight, (encoded.precision,), (ALIAS,), (lost,))
        self.present.append((own, encoded))
        return Arrangement((own,))

    def _lent(self, scene: Scene, key: Key) -> PlainKey | None:
        """The plain tensor of another member that a site resembles most and that can be what both have in common."""
        if key not in scene.sites or key not in scene.sensitivity or scene.target.max_error == 0:
            return None
        site, own = scene.sites[key], scene.originals[key]
        held = self._held(site.name, site.shape, own.dtype)
        # What several share already stays so.
        held = [at for at in held if at not in self._users][:CANDIDATES]
        able = own.numel() >= LEAST_LENT and held
        if (
            not able
            or find_method(LENDING, TensorMethod).lend("", site, self.stored.tensors[held[0]]) is None
        ):
            return None
        sample, *theirs = samples(
            [own, *(decode(self.stored.tensors[at]).to(own.device) for at in held)], scene.seed
        )
        cosines = [float(each @ sample) for each in theirs]
        best = max(range(len(held)), key=cosines.__getitem__)
        return held[best] if cosines[best] > least_cosine(len(sample)) else None

    def _held(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[PlainKey]:
        """Tensors of a name that members have to themselves, of one shape and dtype."""
        stored = self.stored.tensors
        return [at for at in self._named[name] if stored[at].shape == shape and stored[at].dtype == dtype]

    def _alike(self, scene: Scene) -> dict[Key, str | PlainKey]:
        """The bank that each site resembles most, among those that it resembles at all."""
        kinds: dict[object, list[BankPlan]] = defaultdict(list)
        for bank in self.stored.plan.banks:
            first = next(p.site for p in self.stored.plan.placements if p.bank == bank.key)
            kinds[_kind(first)].append(bank)
        found: dict[Key, str | PlainKey] = {}
        sites: dict[object, list[Key]] = defaultdict(list)
        for key, site in scene.sites.items():
            if key in scene.sensitivity:
                sites[_kind(site)].append(key)
        for kind, keys in sites.items():
            commons = {bank.key: common for bank in kinds[kind] if (common := self._common(bank)) is not None}
            having = dict(zip(commons, samples(map(decode, commons.values()), scene.seed), strict=True))
            if not having:
                continue
            stack, names = torch.stack([*having.values()]), list(having)
            for key in keys:
                matrix = scene.sites[key].view.to_matrices(scene.originals[key])
                (sample,) = samples([matrix], scene.seed)
                cosines = stack @ sample
                best = int(cosines.argmax())
                if float(cosines[best]) > least_cosine(len(sample)):
                    found[key] = names[best]
        return found

    def _likely(self, scene: Scene) -> list[Site]:
        """Sites that may resemble what is stored: those of a kind that a bank has, and of a name that a tensor has."""
        kinds = {_kind(p.site) for p in self.stored.plan.placements}
        names = {key.name for key in self.stored.tensors if isinstance(key, PlainKey)}
        return [site for site in scene.sites.values() if _kind(site) in kinds or site.name in names]

    def _common(self, bank: BankPlan) -> Encoded | None:
        return find_method(bank.method, TensorMethod).common(bank, self.stored.parts(bank.key))

    def _moved(self, encoded: Encoded) -> Encoded:
        """A stored form on the device of the fit."""
        if self.device.type == "cpu":
            return encoded
        moved = replace(encoded, parts={name: part.to(self.device) for name, part in encoded.parts.items()})
        self._at_home[id(moved)] = encoded
        return moved


def _kind(site: Site) -> object:
    return site.kind, site.shape, site.dtype, site.view


def _distance(encoded: Encoded, tensor: Tensor) -> float:
    """Relative difference of a few rows of a stored tensor from those of another one."""
    if len(encoded.shape) > 1 and encoded.shape[0] > FEW:
        rows = torch.linspace(0, encoded.shape[0] - 1, FEW).long()
        encoded, tensor = take_rows(unpacked(encoded), rows), tensor[rows.to(tensor.device)]
    theirs, own = decode(encoded).double().cpu(), tensor.double().cpu()
    size = float(own.square().sum())
    return (float((theirs - own).square().sum()) / size) ** 0.5 if size > 0 else float(bool(theirs.any()))
