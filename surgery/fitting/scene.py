"""Scene: what is being fitted, as methods see it: members, their tensors, and how sensitive outputs are to each."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgery.anatomy.plan import Placement, Plan, leave_alone
from surgery.anatomy.sites import BY_REQUEST, LeftAlone, Site
from surgery.core.generation import to_blocks
from surgery.core.registry import find_method, methods_of
from surgery.core.tensor_method import TensorMethod
from surgery.disk.journal import Made, keeps, made_once
from surgery.fitting.metric import WIDEST, Metric
from surgery.fitting.moments import gather, unfolded
from surgery.fitting.pieces import in_pieces
from surgery.fitting.related import related_sites
from surgery.fitting.sensitivity import measured_sensitivities, metrics
from surgery.fitting.tables import TABLE, by_rows, look_ups, row_weights
from surgery.fitting.trial import Trial
from surgery.fitting.units import ROUGH, SAMPLE, Arrangement, Key, Unit, fed_back, measure
from surgery.geometry.views import CanonicalView
from surgery.members.replacement import count_replaced
from surgery.settings.names import DEFAULT_METHOD, RELATED
from surgery.settings.target import Target
from surgery.storage.codecs import Statistics
from surgery.storage.keys import PlainKey

T = TypeVar("T")

SHARED_FROM = 4096  # elements of a private tensor; of smaller ones a bank's records outweigh what is saved
WIDEST_INPUT = (
    4096  # columns of a matrix whose inputs are worth knowing: their second moment takes the square of it
)
LEAST = 512  # bytes of a tensor that is stored once where others are equal to it
LOOKED_AT = 1024  # about as many values tell most tensors apart, so that few are read whole
AGAIN = "private; stored together with its relatives by an earlier fit"


@dataclass(frozen=True)
class Scene:
    """What is being fitted.

    Attributes:
        trials: members that run, by name.
        plan: where their tensors go.
        target: what is asked for.
        seed: of everything random.
        replaced: methods of the modules that were replaced, one for each, where members are compared with what stood
            there.
        calibrated: members whose trials run on inputs that were given, so that what these look like is known.
        beside: whether other members are stored already, with which these may share.
    """

    trials: Mapping[str, Trial]
    plan: Plan
    target: Target
    seed: int
    replaced: Sequence[str] = ()
    calibrated: frozenset[str] = frozenset()
    beside: bool = False

    @cached_property
    def originals(self) -> dict[Key, Tensor]:
        """Every tensor of every member, as it was."""
        return {
            (name, tensor): value
            for name, trial in self.trials.items()
            for tensor, value in trial.originals.items()
        }

    @cached_property
    def sensitivity(self) -> dict[Key, float]:
        """Relative squared output error per squared error of each tensor that a gradient reaches."""
        return {
            (name, tensor): value
            for name, (found, *_) in self._measured.items()
            for tensor, value in found.items()
        }

    def metric(self, site: Site) -> Metric:
        """What any error in a site that no method decides on costs; where no gradient tells, as if independent."""
        views, found = self._views[site.member], self._measured[site.member][1].get(site.name)
        if found is None and site.name not in views:
            views |= {
                name: each.view for (member, name), each in self.unclaimed.items() if member == site.member
            }
            sensitive, more = metrics(self.trials[site.member], self.seed, views)
            self._measured[site.member] = sensitive, more, self._measured[site.member][2]
            found = more.get(site.name)
        if found is None:
            stack, out, into = site.view.shape
            found = Metric.independent(
                self.sensitivity[key_of(site)], stack * out, into, self.trials[site.member].device
            )
        return found

    def expect(self, sites: Iterable[Site]) -> None:
        """Take the metrics of sites in the pass that measures sensitivities; called before either is asked for."""
        for site in sites:
            self._views[site.member].setdefault(site.name, site.view)

    def forget_metrics(self, sites: Iterable[Site]) -> None:
        """Let go of the metrics of sites that are arranged: those of a layer take as much memory as its weights."""
        for site in sites:
            self._measured[site.member][1].pop(site.name, None)

    def inputs_of(self, key: Key) -> Statistics | None:
        """What is known of the inputs of a matrix that no method decides on, and of its outputs; None where errors of
        the member are not fed back.
        """
        known = None if key in self.claimed else self._inputs.get(key[0], {}).get(key[1])
        if known is None:
            return None
        _, found, outputs = self._measured[key[0]]
        metric = found.get(key[1]) or outputs.get(key[1])
        # Of a metric's rows, which are those of a stack's matrices, codecs make use where they are the tensor's.
        return known if metric is None else replace(known, outputs=metric.outputs)

    def uses_of(self, key: Key) -> Tensor | None:
        """How often calibration data look up each row of a table, `[o]`; None where that is not known."""
        found = self._uses.get(key[0], {}).get(key[1])
        return found if found is None else found.to(self.trials[key[0]].device)

    @cached_property
    def fed(self) -> frozenset[str]:
        """Members whose inputs say how errors are fed back: given ones, or others than errors are measured on."""
        return self.calibrated | {name for name, t in self.trials.items() if t.calibration is not t.probes}

    @cached_property
    def _uses(self) -> dict[str, dict[str, Tensor]]:
        """By calibrated member, look-ups of its tables."""
        found: dict[str, dict[str, Tensor]] = {}
        for member in self.calibrated:
            if tables := [name for owner, name in self._tables if owner == member]:
                trial = self.trials[member]
                given = ((tuple(each.args), dict(each.kwargs)) for each in trial.probes)
                found[member] = look_ups(trial.module, tables, given)
        return found

    @cached_property
    def _inputs(self) -> dict[str, dict[str, Statistics]]:
        """By member whose errors are fed back, statistics of the inputs of its matrices."""
        found: dict[str, dict[str, Statistics]] = {}
        for member in self.fed:
            trial = self.trials[member]
            batches = trial.calibration
            if len(batches) == 1:  # of halves of which one learns how far to trust the other
                batches = in_pieces(trial, batches)
            calls = ((tuple(each.args), dict(each.kwargs)) for each in batches)
            seen = gather(trial.module, self._fed(member), calls)
            known = {name: each.statistics for name, each in seen.items()}
            found[member] = {name: each for name, each in known.items() if each is not None}
        return found

    def _fed(self, member: str) -> list[Site]:
        """Matrices of a member that are rounded with error feedback, where they are seen to be used."""
        every = {**matrices_alone(self.plan.left_alone), **self.unclaimed}
        mine = [site for site in every.values() if site.member == member]
        return [site for site in mine if unfolded(site).shape[2] <= WIDEST_INPUT]

    @cached_property
    def _views(self) -> dict[str, dict[str, CanonicalView]]:
        """By member, the views of sites that have relatives: with these sensitivities and metrics take one pass."""
        views: dict[str, dict[str, CanonicalView]] = {name: {} for name in self.trials}
        for keys in self.kin:
            for member, name in keys:
                views[member][name] = self.sites[member, name].view
        for (member, name), site in self._tables.items():
            views[member].setdefault(name, site.view)
        return views

    @cached_property
    def _tables(self) -> dict[Key, Site]:
        """Tables of calibrated members: which of their rows matter is known."""
        sites = {**private_sites(self.plan.left_alone), **self.unclaimed}
        return {key: s for key, s in sites.items() if s.kind == TABLE and s.member in self.calibrated}

    @cached_property
    def _measured(self) -> dict[str, tuple[dict[str, float], dict[str, Metric], dict[str, Metric]]]:
        """By member, sensitivities, metrics of sites, and of other matrices those of which the outputs are known."""
        return {
            name: _measured_once(trial, self.seed, self._views[name], self._flat_views(name))
            for name, trial in self.trials.items()
        }

    def _flat_views(self, member: str) -> dict[str, CanonicalView]:
        """Of a member whose errors are fed back, the views of matrices that have no other: rows are the tensors'."""
        if member not in self.fed:
            return {}
        views = {site.name: unfolded(site) for site in self._fed(member) if site.kind != TABLE}
        coupled = {
            name: view for name, view in views.items() if view.shape[0] == 1 and 1 < view.shape[1] <= WIDEST
        }
        return {name: view for name, view in coupled.items() if name not in self._views[member]}

    @cached_property
    def kin(self) -> list[list[Key]]:
        """Sites and large private tensors that no method decides on and that resemble one another."""
        tensors = {key: self.originals[key] for key in self.sites}
        tame = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
        return related_sites(self.sites, tame, equal_tensors(tame), self.seed)

    @cached_property
    def sites(self) -> dict[Key, Site]:
        """What can be stored together: sites that no method decides on, and beside other members private tensors."""
        several = self.beside or len(self.trials) > 1
        return self.unclaimed | (private_sites(self.plan.left_alone) if several else {})

    @cached_property
    def claims(self) -> tuple[tuple[TensorMethod, Plan], ...]:
        """Methods that decide on the sites of their banks, each with the plan of these."""
        methods = [method for method in methods_of(self.plan) if method.claims]
        return tuple((method, self.plan.of_method(method.name)) for method in methods)

    @cached_property
    def claimed(self) -> frozenset[Key]:
        """Sites that a method decides on."""
        return frozenset(key_of(p.site) for _, plan in self.claims for p in plan.placements)

    @cached_property
    def unclaimed(self) -> dict[Key, Site]:
        """Sites that no method decides on."""
        sites = {key_of(p.site): p.site for p in self.plan.placements}
        return {key: site for key, site in sites.items() if key not in self.claimed}

    @cached_property
    def asked(self) -> dict[str, str]:
        """What settings fix, in words, by the method that makes it."""
        return asked_of(self.plan, self.target)

    @property
    def given(self) -> str:
        """All that settings fix, in words: what methods make, and modules that were replaced."""
        return ", ".join(asked_of(self.plan, self.target, self.replaced).values())

    def sensitive_to(self, keys: Iterable[Key]) -> dict[Key, float]:
        """The sensitivity to some tensors, measured by rounding where no gradient reaches them."""
        keys = list(keys)
        missing: dict[str, list[str]] = defaultdict(list)
        for member, tensor in sorted(set(keys)):
            if (member, tensor) not in self.sensitivity:
                missing[member].append(tensor)
        for member, tensors in missing.items():
            found = measured_sensitivities(self.trials[member], tensors)
            self.sensitivity.update({(member, tensor): value for tensor, value in found.items()})
        return {key: self.sensitivity[key] for key in keys}

    def blocks(self, placements: Sequence[Placement]) -> Tensor:
        """The original blocks `[L, m*n]` of one bank's placements, in their order."""
        return torch.cat([to_blocks(self.originals[key_of(p.site)], p) for p in placements])

    def again(self, make: Callable[[], T]) -> T:
        """What `make` gives, kept until something else is asked for: its parts are wanted one after another."""
        if self._latest[:1] != [make]:
            self._latest.clear()
            self._latest.extend((make, make()))
        return self._latest[1]

    @cached_property
    def _latest(self) -> list[Any]:
        return []

    def alone(self, keys: Sequence[Key]) -> Unit:
        """Equal tensors by themselves, stored once."""
        tensor, weight = self.originals[keys[0]], defaultdict[str, float](float)
        for key in keys:
            weight[key[0]] += self.sensitivity.get(key, 0.0)
        plain = {PlainKey(*key): tensor for key in keys}
        sample = ROUGH if self.beside else SAMPLE
        unit = measure(plain, dict(weight), key=f"precisions/{'/'.join(keys[0])}", sample=sample)
        if (known := self.inputs_of(keys[0])) is not None:
            return fed_back(unit, known)
        metrics = {key: each for key in keys if (each := self._metric_of_table(key)) is not None}
        if not metrics:
            return unit
        statistics = next(iter(metrics.values())).statistics
        unit = unit if statistics is None else fed_back(unit, statistics)
        rows = [
            row_weights(each.rows, torch.zeros_like(each.rows), self.uses_of(key))
            for key, each in metrics.items()
        ]
        return by_rows(unit, torch.stack(rows).mean(0))

    def _metric_of_table(self, key: Key) -> Metric | None:
        """What is known of a table of a calibrated member; None of any other tensor."""
        return self._measured[key[0]][1].get(key[1]) if key in self._tables else None

    def apart(self, keys: Iterable[Key]) -> Arrangement:
        """Tensors each by itself, equal ones once."""
        equal = equal_tensors({key: self.originals[key] for key in keys})
        return Arrangement(tuple(self.alone(each) for each in equal))


def _measured_once(
    trial: Trial, seed: int, views: Mapping[str, CanonicalView], flat: Mapping[str, CanonicalView]
) -> tuple[dict[str, float], dict[str, Metric], dict[str, Metric]]:
    """Sensitivities and metrics of a member, found by this run or by the one that it goes on with.

    Args:
        trial: the member.
        seed: of the draws.
        views: of sites.
        flat: of those of which outputs are wanted alone.
    """

    def apart(sensitive: dict[str, float], found: Mapping[str, Metric]) -> Any:
        whole = {name: each for name, each in found.items() if name in views}
        return sensitive, whole, {name: each for name, each in found.items() if name in flat}

    if not keeps():
        return apart(*metrics(trial, seed, {**views, **flat}, outputs=flat))

    def made() -> Made:
        sensitive, found = metrics(trial, seed, {**views, **flat}, outputs=flat)
        sides = {
            (name, side): t for name, each in found.items() for side, t in (("o", each.out), ("i", each.into))
        }
        return sensitive, {f"{side}/{name}": tensor for (name, side), tensor in sides.items()}

    sensitive, sides = made_once(f"sensitivities/{trial.name}", made, trial.device)
    names = [name.removeprefix("o/") for name in sides if name.startswith("o/")]
    return apart(dict(sensitive), {name: Metric(sides[f"o/{name}"], sides[f"i/{name}"]) for name in names})


def as_asked(plan: Plan) -> Plan:
    """A plan in which what an earlier fit stored together by itself is as open to choices as any other tensor."""
    freed = (replace(b, method=DEFAULT_METHOD, settings={}) if b.method in RELATED else b for b in plan.banks)
    plan = replace(plan, banks=tuple(freed))
    own = {key_of(p.site) for p in plan.placements if p.site.view == private_view(p.site.shape)}
    stacked = {bank.key for bank in plan.banks if bank.stack or bank.method != DEFAULT_METHOD}
    own -= {key_of(p.site) for p in plan.placements if p.bank in stacked}
    plan = leave_alone(plan, own, AGAIN)
    alone = (replace(e, role="private") if (e.member, e.name) in own else e for e in plan.left_alone)
    return replace(plan, left_alone=tuple(alone))


def private_view(shape: tuple[int, ...]) -> CanonicalView | None:
    """The view of a private tensor as a matrix, which no linear map has; None of a vector."""
    if len(shape) < 2:
        return None
    axes = [f"p{i}" for i in range(len(shape))]
    return CanonicalView.of(f"{' '.join(axes)} -> 1 {axes[0]} ({' '.join(axes[1:])})", shape)


def private_sites(entries: Iterable[LeftAlone]) -> dict[Key, Site]:
    """Tensors that are private by nature and so large that storing them together may pay, as matrices.

    Args:
        entries: of a plan.
    """
    own = (each for each in entries if each.role == "private" and each.reason != BY_REQUEST)
    return matrices_alone(each for each in own if math.prod(each.shape) >= SHARED_FROM)


def matrices_alone(entries: Iterable[LeftAlone]) -> dict[Key, Site]:
    """Tensors that are left alone, as matrices where they have rows.

    Args:
        entries: of a plan.
    """
    views = ((each, private_view(each.shape)) for each in entries)
    return {
        (e.member, e.name): Site(e.member, e.name, e.owners, e.kind, e.shape, e.dtype, view, e.order)
        for e, view in views
        if view is not None
    }


def fitted_by(plan: Plan) -> list[TensorMethod]:
    """The methods of a plan's banks; that of all sites where there is none."""
    return methods_of(as_asked(plan)) or [find_method(DEFAULT_METHOD, TensorMethod)]


def asked_of(plan: Plan, target: Target, replaced: Sequence[str] = ()) -> dict[str, str]:
    """What settings fix, in words, by the method that makes it.

    Args:
        plan: of a joint model.
        target: what is asked of its fit.
        replaced: methods of modules that were replaced, one for each.
    """
    found = {each.name: each.asks(as_asked(plan).of_method(each.name), target) for each in fitted_by(plan)}
    found |= {name: count_replaced([each for each in replaced if each == name]) for name in replaced}
    return {name: words for name, words in found.items() if words}


def key_of(site: Site) -> Key:
    """Member and name."""
    return site.member, site.name


def equal_tensors(tensors: Mapping[Key, Tensor]) -> list[list[Key]]:
    """Tensors by their bytes: equal ones are decided on and stored once."""
    looks = {key: _look(tensor) for key, tensor in tensors.items()}
    alike = Counter(looks.values())
    found: dict[object, list[Key]] = defaultdict(list)
    for key, tensor in tensors.items():
        digest: object = key
        if (look := looks[key]) is not None and alike[look] > 1:
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data
            digest = (tuple(tensor.shape), tensor.dtype, hashlib.sha256(raw).digest())
        found[digest].append(key)
    return list(found.values())


def _look(tensor: Tensor) -> object:
    """What equal tensors have in common and few others; None of one that is too small to be stored with another."""
    if tensor.nbytes < LEAST:
        return None
    some = tensor.reshape(-1)[:: max(1, tensor.numel() // LOOKED_AT)].contiguous()
    return tuple(tensor.shape), tensor.dtype, some.view(torch.uint8).cpu().numpy().tobytes()
