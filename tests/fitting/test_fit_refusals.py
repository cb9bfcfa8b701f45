"""Fit: what cannot be done is refused in one sentence, and the joint model stays as it was."""

import math
import re

import pytest
import torch
from nets import Scores, assert_same_bits, family, loss_of, made, member, originals, run

from surgery.core.joining import join
from surgery.errors import PlanError
from surgery.fitting.fit import fit


def test_a_budget_that_cannot_be_met_says_the_least_and_changes_nothing():
    members = family("mlp", 3)
    joint = join(members).open(2)
    before = {name: {k: t.clone() for k, t in joint.collapse(name).items()} for name in joint}
    private = {name: next(joint[name].parameters()).requires_grad for name in joint}
    with pytest.raises(
        PlanError, match=r"budget of 0.001 cannot be met: .* use `budget=(0\.\d+)` or more"
    ) as caught:
        fit(joint, budget=0.001)
    for name, state in before.items():
        assert_same_bits(joint.collapse(name), state)
        assert next(joint[name].parameters()).requires_grad == private[name]
    with joint.step():
        loss_of(run(joint["mlp"], members[0])).backward()
    assert all(p.grad is not None for p in joint.dictionary.parameters())
    least = float(str(caught.value).split("`budget=")[1].split("`")[0])
    assert fit(joint, budget=least).report.met


@pytest.mark.parametrize(("kind", "number"), [("mlp", 1), ("mlp", 2), ("tied", 1)])
def test_numbers_of_a_budget_that_cannot_be_met_differ_and_what_is_proposed_can_be(kind, number):
    def tried(budget):
        """What is least and what is enough, where a budget is refused; None where it is met."""
        try:
            report = fit(join(family(kind, number), block=(8, 8)), budget=budget).report
        except PlanError as error:
            asked, least, enough = map(float, re.findall(r"0\.\d+|\d+e-\d+", str(error)))
            assert asked == budget < least <= enough
            return least, enough
        assert report.met and report.stored_bytes <= budget * sum(report.original_bytes.values())
        return None

    least, enough = tried(1e-4)
    assert tried(enough) is None
    near = tried(least)  # which is rounded, so that it may be too small
    assert near is None or tried(near[1]) is None


class Argmax(Scores):
    def forward(self, x):
        return super().forward(x).argmax(-1)


class Broken(Scores):
    def forward(self, x):
        return super().forward(x) / 0.0


@pytest.mark.parametrize(("build", "words"), [(Argmax, "no floating-point tensor"), (Broken, "NaN or inf")])
def test_members_whose_error_cannot_be_measured_are_refused_and_unchanged(build, words):
    torch.manual_seed(0)
    members = [member("mlp"), made("odd", build(), torch.randn(2, 6))]
    before = originals(members)
    joint = join(members)
    for target in ({"max_error": 0.1}, {"budget": 0.5}):
        with pytest.raises(PlanError, match=f"Member 'odd' returns {words}.*`max_error=0`"):
            fit(joint, **target)
        for name, module in before.items():
            assert_same_bits(joint.collapse(name), module.state_dict())
    assert fit(joint, max_error=0).report.met


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"max_error": 0.1, "budget": 0.5}, "`max_error` and `budget`"),
        ({"max_error": -1.0}, "0 or more, found -1"),
        ({"max_error": math.nan}, "`max_error`: must be .*, found nan"),
        ({"budget": 0.0}, "`budget`: must be above 0, found 0"),
        ({"budget": 1.5}, "at most 1, found 1.5"),
        ({"hypermodules": 0}, "`hypermodules`: must be 1 or more, found 0"),
        ({"hypermodules": 10**6, "block": (8, 8)}, "found 1000000"),
        ({"hypermodules": 4, "block": (8, 8), "context": 65}, "at most 64 .* found 65"),
        ({"hypermodules": 4, "block": (999, 8)}, "fill a block of 999x8"),
        ({"max_error": 0.1, "device": "nonsense"}, "Device 'nonsense' is not available"),
        ({"max_error": 0.1, "probes": {"other": []}}, "members, found other; the members are mlp"),
        ({"max_error": 0.1, "block": (0, 4)}, "block.*: must be 1 or more, found 0"),
    ],
)
def test_impossible_targets_are_refused_and_change_nothing(target, words):
    one = member("mlp")
    before = originals([one])["mlp"]
    joint = join([one])
    with pytest.raises(PlanError, match=words):
        fit(joint, **target)
    assert_same_bits(joint.collapse("mlp"), before.state_dict())
