"""The format `lora`: a member as a base model and an adapter of peft, the form in which servers run many models.

What a member differs by from a base is, at a linear layer, a product of low rank as far as an error bound allows: the
rank of each layer is the smallest whose remainder is below one share of the difference, and that share is the largest
with which the member's outputs stay within the bound, as measured. How much else an adapter has is tried in turn:
nothing, which is what servers run; biases, norms and other vectors; everything that differs, of tables the rows that
do. The adapter is written by peft, opened again on its base, and measured once more.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.artifact.adaptercard import Base, make_adapter_card
from surgery.artifact.formats.differences import Difference, Other, differences_of, is_linear, is_transposed
from surgery.errors import ExportError, LoadError
from surgery.fitting.variation import between_inputs, warn_of_faint
from surgery.inputs.probes import outputs_of, outputs_over, over_all, probe_inputs, relative_error
from surgery.members.member import Inputs, Member, shapes_of
from surgery.members.references import check_references, load_member, local_path
from surgery.util.quiet import quiet
from surgery.util.showing import plural
from surgery.util.text import one_line, shorten
from surgery.util.wording import percent, size

SHARES = (0.9, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01, 3e-3, 1e-3, 1e-4, 1e-6)
"""Of a difference, in the Frobenius norm, that may be left out."""
LEVELS = (0, 1, 2)
"""What an adapter has beside products: nothing, vectors, everything that differs."""
SERVED = 2.0
"""Times the bytes of the smallest adapter that one of products alone may take."""
ROUNDING = 1e-5
"""Errors up to this are those of float32, in which a base and its adapter are added."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter has.

    Attributes:
        ranks: of linear layers, by name.
        whole: modules that are saved whole.
        biased: whether products have a bias.
        rows: those of tables that are saved, by the table's name.
        elements: of all of it.
        left: what else differs and stays as the base has it, in words.
    """

    ranks: Mapping[str, int]
    whole: tuple[str, ...]
    biased: bool
    rows: Mapping[str, list[int]]
    elements: int
    left: tuple[str, ...]

    @property
    def alone(self) -> bool:
        """Whether it has products and nothing else."""
        return not (self.whole or self.biased or self.rows)


def write_lora(
    folder: Path,
    member: Member,
    module: nn.Module,
    base: str,
    max_error: float,
    trust: bool = False,
    say: Callable[[str], None] | None = None,
    calibrate: Sequence[str | Path] = (),
) -> None:
    """Write the adapter that makes a member of a base.

    Args:
        folder: in which it is written.
        member: whose example inputs and origin it has.
        module: of the member, with ordinary weights.
        base: reference to the base model, which the adapter names.
        max_error: how far outputs may move, relative.
        trust: whether Python files that come with the base may run.
        say: is given what the adapter is, and the measured error.
        calibrate: files with real inputs to measure on; without any, inputs are made up.

    Raises:
        LoadError: where such a file cannot be read or does not suit the member.
        ExportError: where peft is not installed, the base is another architecture, or no adapter is within the bound.
    """
    peft = _peft()
    module, origin = module.eval(), _load_base(base, member, trust).eval()
    _check_layers(member.name, module)
    _check_alike(member.name, base, module, origin)
    differences, others = differences_of(module, origin)
    if not differences and not others:
        raise ExportError(f"Member '{member.name}' is {base}: there is nothing for an adapter to say.")
    differences = differences or _none(module, others)
    probes, on = _measured_on(member, calibrate)
    outputs = [outputs_of(module, batch) for batch in probes]
    reference = over_all(outputs)

    def error_of(net: nn.Module) -> float:
        return relative_error(reference, outputs_over(net, probes))

    levels = [[_adapter(module, differences, others, level, share) for share in SHARES] for level in LEVELS]
    candidates, least = _candidates(
        levels, lambda each: error_of(_changed(origin, module, differences, each)), max_error
    )
    if not candidates:
        raise _none_within(max_error, least, member.name, base)

    def write(adapter: Adapter) -> nn.Module:
        with _by_peft(member.name), quiet():
            net = _with_adapter(peft, copy.deepcopy(origin), module, differences, adapter, _anywhere(base))
            # Its tables are the base's: what an adapter changes of them is among its own tensors.
            net.save_pretrained(str(folder), save_embedding_layers=False)
            return peft.PeftModel.from_pretrained(
                copy.deepcopy(origin), str(folder), autocast_adapter_dtype=False
            )

    adapter, error = _first_that_opens(member.name, candidates, write, error_of, max_error)
    differing = between_inputs(probes, outputs)
    warn_of_faint({member.name: error}, {} if differing is None else {member.name: differing})
    library = "transformers" if hasattr(module, "save_pretrained") else None
    changes = _lines(adapter, folder, _plain_bytes(module), served=library is not None)
    card = make_adapter_card(Base.of(base), type(module).__name__, library, changes, error, max_error, on)
    (folder / "README.md").write_text(card, encoding="utf-8")  # peft's is a form to fill in
    if say is not None:
        moved = f"output moved by {percent(error, 2)} of the member's on {on}"
        asked = f"at most {percent(max_error, 2)} was asked for"
        for line in (f"adapter of {base}: {changes[0]}", *changes[1:], f"{moved}, {asked}"):
            say(line)


def _none_within(bound: float, least: float, member: str, base: str) -> ExportError:
    return ExportError(
        f"An adapter of member '{member}' must move its outputs by at most {_share(bound)} of the "
        f"member's, but the nearest that was tried for {base} moves them by {_share(least)}{_of_rounding(least)}; "
        f"ask for no less (`max_error` of {_above(least)}), take a base that is related, or export the member as "
        "plain."
    )


def _first_that_opens(
    name: str,
    candidates: Sequence[Adapter],
    write: Callable[[Adapter], nn.Module],
    error_of: Callable[[nn.Module], float],
    bound: float,
) -> tuple[Adapter, float]:
    """Of some adapters the first that is within a bound as peft opens it, and its error; it is the one written last.

    Raises:
        ExportError: where none of them is.
    """
    least = math.inf
    for adapter in candidates:
        error = error_of(write(adapter).eval())
        if error <= bound:
            return adapter, error
        least = min(least, error)
    raise ExportError(
        f"What peft opens must move the outputs of member '{name}' by at most {_share(bound)}, but "
        f"moves them by {_share(least)}{_of_rounding(least)}; tied tensors and modules that peft does not adapt "
        f"are exported as plain; else ask for no less (`max_error` of {_above(least)})."
    )


def _measured_on(member: Member, calibrate: Sequence[str | Path]) -> tuple[Sequence[Inputs], str]:
    """The inputs that errors are measured on, and what they are in words."""
    given = [batch for file in calibrate for batch in probe_inputs(member, calibrate=Path(file).expanduser())]
    return (given, "real inputs") if given else (probe_inputs(member), "made-up inputs")


def _load_base(base: str, member: Member, trust: bool) -> nn.Module:
    """The base, on a member's inputs where no library makes some for it.

    Raises:
        ExportError: where it cannot be loaded.
    """
    inputs = member.inputs if member.origin.kind in ("module", "factory") else None
    try:
        return load_member(base, name="base", inputs=inputs, trust_remote_code=trust).module
    except LoadError as error:
        raise ExportError(f"`base` must be a model that can be loaded, but {error}") from error


def check_base(base: str) -> None:
    """Whether adapters can be written, and the base of one is there, before anything is loaded.

    Raises:
        ExportError: where peft is not installed, or there is no such model.
    """
    _peft()
    try:
        check_references([base])
    except LoadError as error:
        raise ExportError(f"`base` must be a model that can be loaded, but {error}") from error


def _anywhere(base: str) -> tuple[str, str | None]:
    """The base as the adapter names it, and its revision.

    A folder and a file have their whole path, which no hub takes for a name of its own.
    """
    named = Base.of(base)
    if named.kind == "hub":
        return named.name, named.revision or None
    path = local_path(base)
    if path is None:
        return base, None
    if named.kind == "folder":
        return str(path.resolve()), None
    return base.replace(str(path), str(path.resolve()), 1), None


def _peft() -> Any:
    try:
        with quiet():
            import peft
    except ImportError as error:
        raise ExportError(
            "Adapters are written by peft, which is not installed: pip install 'model-surgery[peft]'."
        ) from error
    return peft


@contextmanager
def _by_peft(member: str) -> Iterator[None]:
    """What peft raises as one of this package's errors."""
    try:
        yield
    except Exception as error:  # of another library, on layers that it does not take
        raise ExportError(
            f"peft must write the adapter of member '{member}' and open it, but raises {one_line(error)}; export the "
            "member as plain."
        ) from error


def _share(error: float) -> str:
    """An error in percent, in figures where it is too small for that."""
    return percent(error, 2) if error >= 1e-4 else f"{error:.1e}"


def _above(error: float) -> str:
    """A bound that is just above an error, in two digits."""
    if not math.isfinite(error):
        return "more"
    step = 10.0 ** (math.floor(math.log10(error)) - 1)
    return f"{(math.floor(error / step) + 1) * step:.2g}"


def _of_rounding(error: float) -> str:
    """What an error is of that no adapter is free of."""
    return ", which is rounding" if error <= ROUNDING else ""


def _check_layers(name: str, module: nn.Module) -> None:
    """Refuse a member at which peft has no place for a product.

    Raises:
        ExportError: where none of its layers is linear, as peft knows them.
    """
    if is_linear(module):
        raise ExportError(
            f"An adapter changes layers of a model, but member '{name}' is a single layer; export it as plain."
        )
    if any(is_linear(each) for each in module.modules()):
        return
    kinds = Counter(type(each).__name__ for each in module.modules() if [*each.parameters(recurse=False)])
    found = shorten([kind for kind, _ in kinds.most_common()], 5) or "no tensors"
    raise ExportError(
        f"An adapter needs a linear layer (torch's Linear, transformers' Conv1D), but member '{name}' has none; it has "
        f"{found}; export it as plain."
    )


def _check_alike(name: str, base: str, module: nn.Module, origin: nn.Module) -> None:
    """Refuse a base that is no model of the member's architecture."""
    mine, theirs = shapes_of(module), shapes_of(origin)
    if mine == theirs:
        return
    common = [each for each in mine if each in theirs and mine[each] != theirs[each]]
    wrong = [f"{each} {list(mine[each])} for {list(theirs[each])}" for each in common]
    wrong += [f"{each} of one of them alone" for each in sorted(mine.keys() ^ theirs.keys())]
    these = f"member '{name}' ({type(module).__name__}) and {base} ({type(origin).__name__})"
    raise ExportError(
        f"An adapter needs a base of the member's architecture, but {these} differ: {shorten(wrong, 5, '; ')}; give "
        "the base with ?class=NAME, or another one."
    )


def _none(module: nn.Module, others: Mapping[str, Other]) -> dict[str, Difference]:
    """No difference at the smallest linear layer: peft has no adapter without a product."""
    linear = [(name, each) for name, each in module.named_modules() if is_linear(each) and name not in others]
    sizes = {name: tuple(each.get_parameter("weight").shape) for name, each in linear}
    name = min(sizes, key=lambda each: sizes[each][0] * sizes[each][1])
    out, into = sizes[name][::-1] if is_transposed(module.get_submodule(name)) else sizes[name]
    return {name: Difference(torch.zeros(out, 1), torch.zeros(1, into), torch.zeros(1), None)}


def _adapter(
    module: nn.Module,
    differences: Mapping[str, Difference],
    others: Mapping[str, Other],
    level: int,
    share: float,
) -> Adapter:
    """What of a member is a product, a row or saved whole, if a share of each difference is left out."""
    ranks, whole = {}, []
    for name, each in differences.items():
        rank = max(each.rank(share), 1)
        if level == 0 or each.pays(rank):
            ranks[name] = rank
        else:
            whole.append(name)
    if not ranks:  # peft has no adapter without a product
        smallest = min(differences, key=lambda name: differences[name].left.numel())
        ranks[smallest] = max(differences[smallest].rank(share), 1)
        whole.remove(smallest)
    kept = [name for name, each in others.items() if level == 2 or (level == 1 and each.vectors)]
    rows = {name: found for name in kept if (found := others[name].rows(share)) is not None}
    whole += [name for name in kept if name not in rows]
    # peft saves all modules whose names end like one that is named.
    ending = (
        [name for name, _ in module.named_modules() if name and name.endswith(tuple(whole))] if whole else []
    )
    ranks = {name: rank for name, rank in ranks.items() if name not in ending}
    rows = {name: each for name, each in rows.items() if name not in ending}
    biased = level > 0 and any(differences[name].bias is not None for name in ranks)
    elements = sum(differences[name].elements(rank) for name, rank in ranks.items())
    elements += sum(
        len(each) * module.get_parameter(f"{name}.weight").shape[1] for name, each in rows.items()
    )
    elements += sum(t.numel() for name in ending for t in module.get_submodule(name).state_dict().values())
    elements += sum(len(differences[name].left) for name in ranks) if biased else 0
    left = [name for name in others if name not in ending and name not in rows]
    if not biased and any(differences[name].bias is not None for name in ranks):
        left.append("biases of linear layers")
    return Adapter(ranks, tuple(ending), biased, rows, elements, tuple(left))


def _candidates(
    levels: Sequence[Sequence[Adapter]], error: Callable[[Adapter], float], bound: float
) -> tuple[list[Adapter], float]:
    """Of each level the first adapter within a bound, and the least error of all that were tried last.

    Products alone come first where they take at most `SERVED` times the smallest, then the smaller ones.
    """
    tried = [_first_within(adapters, error, bound) for adapters in levels]
    found = [adapter for adapter, _ in tried if adapter is not None]
    smallest = min((each.elements for each in found), default=0)
    found.sort(key=lambda each: (not (each.alone and each.elements <= SERVED * smallest), each.elements))
    return found, min(each for _, each in tried)


def _first_within(
    adapters: Sequence[Adapter], error: Callable[[Adapter], float], bound: float
) -> tuple[Adapter | None, float]:
    """The first that is within a bound, and its error; None, and the last one's error, where the last one is not."""
    low, high, found = -1, len(adapters) - 1, error(adapters[-1])
    if not found <= bound:
        return None, found
    while high - low > 1:
        middle = (low + high) // 2
        now = error(adapters[middle])
        low, high, found = (low, middle, now) if now <= bound else (middle, high, found)
    return adapters[high], found


@torch.no_grad()
def _changed(
    origin: nn.Module, module: nn.Module, differences: Mapping[str, Difference], adapter: Adapter
) -> nn.Module:
    """The base with what an adapter changes."""
    net = copy.deepcopy(origin)
    for name, rank in adapter.ranks.items():
        layer, each = net.get_submodule(name), differences[name]
        change = each.left[:, :rank] @ each.right[:rank]
        layer.weight += (change.T if is_transposed(layer) else change).to(layer.weight)  # pyright: ignore
        if adapter.biased and each.bias is not None:
            layer.bias += each.bias.to(layer.bias)  # pyright: ignore
    for name, rows in adapter.rows.items():
        net.get_parameter(f"{name}.weight")[rows] = module.get_parameter(f"{name}.weight")[rows]
    for name in adapter.whole:
        net.get_submodule(name).load_state_dict(module.get_submodule(name).state_dict())
    return net


@torch.no_grad()
def _with_adapter(
    peft: Any,
    net: nn.Module,
    module: nn.Module,
    differences: Mapping[str, Difference],
    adapter: Adapter,
    base: tuple[str, str | None],
) -> Any:
    """The base as peft's model, with the adapter's values."""
    ranks = dict(adapter.ranks)
    most = max(ranks.values(), default=1)
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    config = peft.LoraConfig(
        r=most, lora_alpha=most, rank_pattern=patterns, alpha_pattern=patterns, lora_bias=adapter.biased,
        target_modules=_targets(net, ranks), modules_to_save=list(adapter.whole) or None, inference_mode=True,
        trainable_token_indices=dict(adapter.rows) or None,
        base_model_name_or_path=base[0], revision=base[1],
        fan_in_fan_out=any(is_transposed(net.get_submodule(name)) for name in ranks),
    )  # fmt: skip
    found = peft.get_peft_model(net, config, autocast_adapter_dtype=False)
    found.peft_config["default"].base_model_name_or_path = base[0]
    for name, layer in _adapted(found):
        each, rank = differences[name], ranks[name]
        layer.lora_A["default"].weight.copy_(each.right[:rank])
        layer.lora_B["default"].weight.copy_(each.left[:, :rank])
        if adapter.biased:
            bias = layer.lora_B["default"].bias
            bias.copy_(torch.zeros_like(bias) if each.bias is None else each.bias)
    for name, rows in adapter.rows.items():
        layer = found.base_model.model.get_submodule(name).token_adapter
        layer.trainable_tokens_delta["default"].copy_(module.get_parameter(f"{name}.weight")[rows])
    for name in adapter.whole:
        saved = found.base_model.model.get_submodule(name).modules_to_save["default"]
        saved.load_state_dict(module.get_submodule(name).state_dict())
    return found


def _targets(net: nn.Module, ranks: Mapping[str, int]) -> list[str] | str:
    """The layers that get products: peft takes all for one whose names end like a listed one, a pattern as it is."""
    ends = tuple(f".{name}" for name in ranks)
    others = [name for name, _ in net.named_modules() if name not in ranks and name.endswith(ends)]
    return "|".join(map(re.escape, ranks)) if others else list(ranks) or "^$"


def _adapted(found: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in found.base_model.model.named_modules():
        if "default" in getattr(layer, "lora_A", ()):
            yield name, layer


def _plain_bytes(module: nn.Module) -> int:
    return sum(
        tensor.nbytes for tensor in {id(t): t for t in module.state_dict(keep_vars=True).values()}.values()
    )


def _lines(adapter: Adapter, folder: Path, plain: int, served: bool) -> list[str]:
    """What an adapter is, for people; of a class that servers run, whether they run it."""
    ranks = sorted(adapter.ranks.values())
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    between = (
        f"{ranks[0]}" if ranks and ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}" if ranks else ""
    )
    of_rank = (
        f"products of rank {between} at {plural(len(ranks), 'linear layer')}" if ranks else "no products"
    )
    rows = "".join(f", {plural(len(each), 'row')} of {name}" for name, each in adapter.rows.items())
    whole = f", whole: {shorten(adapter.whole, 6)}" if adapter.whole else ""
    biases = "; biases by lora_bias" if adapter.biased else ""
    nothing = " and nothing else, which servers run" if served else " and nothing else"
    rest = nothing if adapter.alone else f"{biases}{rows}{whole}"
    better = "a base that is nearer, or another format, takes less"
    large = (
        [f"it is larger than the member's plain weights ({size(plain)}): {better}"] if stored >= plain else []
    )
    left = [f"as the base has them: {shorten(adapter.left, 6)}"] if adapter.left else []
    return [f"{of_rank}{rest} ({size(stored)})", *left, *large]
