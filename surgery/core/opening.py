"""Replaces the banks of a dictionary by trainable ones that generate the same blocks."""

from __future__ import annotations

from dataclasses import replace

from surgery.anatomy.plan import Plan
from surgery.core.dictionary import Dictionary
from surgery.core.method import Opening
from surgery.core.registry import methods_of


def open_dictionary(plan: Plan, dictionary: Dictionary, how: Opening) -> Plan:
    """Open the banks of a dictionary in place, each by its method; the plan of the banks as they are then.

    Args:
        plan: what the dictionary generates.
        dictionary: its banks are replaced where they cannot be trained as they are.
        how: generator and options.
    """
    for method in methods_of(plan):
        mine = {key: dictionary[key] for key in plan.keys_of(method.name)}
        dictionary.banks.update(method.open(plan, mine, how))
    return replace(plan, banks=tuple(dictionary[each.key].planned(each) for each in plan.banks))
