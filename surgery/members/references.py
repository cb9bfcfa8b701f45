"""References: what the user typed becomes a `Member`, and a member's architecture can be built again.

A reference is `[name=]REF`, with REF one of

- a transformers folder, or a hub id `org/name[@revision]` (`?class=NAME` chooses the class);
- `timm:NAME` (pretrained), `timm:NAME=weights.safetensors` (or `.pth`, `.bin`), `timm:NAME?num_classes=10`;
- a folder in timm's hub format;
- `path/module.py:factory`, a function that returns an `nn.Module` or `(nn.Module, example inputs)`.

Each kind lives in its own file in `surgery.members.origins`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from surgery.disk.records import artifact_files
from surgery.disk.untrusted import shown, shown_text
from surgery.errors import LoadError, SurgeryError, SurgeryWarning
from surgery.inputs import as_inputs, check_runs, example_inputs, forward_error
from surgery.members.member import Inputs, Member, Origin, shapes_of, state_tensors
from surgery.members.origins import KINDS, kind_for, origin_kind
from surgery.members.origins.base import READ, Loaded, Request
from surgery.members.origins.bounded import MOST_ELEMENTS, bounded
from surgery.members.origins.dtypes import mixed, widen
from surgery.members.origins.live import check_ordinary, unwrap
from surgery.members.origins.module import live_module
from surgery.members.origins.weights import check_finite
from surgery.permission import SHIPPED, Permission
from surgery.settings.quantities import check_seed
from surgery.util.alignment import align_module
from surgery.util.randomness import all_seeded, member_seed
from surgery.util.text import one_line

EXAMPLE_ELEMENTS = 1 << 28  # of a tensor that is made while inputs are tried: a GiB in float32
_NAME = re.compile(r"(?=[.]*[A-Za-z0-9_-])[A-Za-z0-9_.-]{1,200}")
"""As the manifest has it."""
_FROM_FILES = ("timm", "transformers")  # kinds whose tensors have the dtypes of a file


def parse_reference(reference: str) -> tuple[str | None, str]:
    """Split `name=REF`; a reference without a name, or a folder that happens to hold a `=`, is left whole.

    Returns:
        the name, or None, and REF.

    Raises:
        LoadError: where nothing follows the name, the text is empty, or longer than a path may be.

    Example:
        >>> parse_reference("net=timm:resnet18=weights.pth"), parse_reference("timm:resnet18=weights.pth")
        (('net', 'timm:resnet18=weights.pth'), (None, 'timm:resnet18=weights.pth'))
    """
    name, equals, rest = reference.partition("=")
    try:
        there = Path(reference).expanduser().exists()
    except OSError as error:  # longer than a path may be
        raise LoadError(f"the reference {shown(reference)} must be one: {error.strerror}") from error
    named = bool(equals) and bool(_NAME.fullmatch(name)) and not there
    if equals and not named and not there:
        plain = not set(name) & set("/:?@\\")
        if plain or (_is_reference(rest) and not _is_reference(reference)):
            check_name(name)
    if not reference.strip() or (named and not rest.strip()):
        raise LoadError(
            f"a reference is [name=]REF, but '{reference}' has no REF: give a folder, a hub id or timm:NAME"
        )
    return (name, rest) if named else (None, reference)


def _is_reference(text: str) -> bool:
    """Whether a text is a reference for sure: one word is a hub id, or ends a folder's name as in `runs/lr=0.1`."""
    sure = bool(set(text) & set("/:")) or Path(text).expanduser().exists()
    return sure and any(origin_kind(kind).claims(text) for kind in KINDS)


def local_path(reference: str) -> Path | None:
    """The file or folder on this machine that a reference reads; None where it reads none, or none that is there.

    Example:
        >>> local_path("net=timm:resnet18"), local_path("net=surgery/members/references.py:load_member")
        (None, PosixPath('surgery/members/references.py'))
    """
    rest = parse_reference(reference)[1]
    head = rest.partition("?")[0]
    weights = rest.rpartition("=")[2] if rest.startswith("timm:") else ""
    for text in (head, weights, head.rpartition(":")[0]):
        if text and Path(text).expanduser().exists():
            return Path(text).expanduser()
    return None


def check_references(references: Iterable[str]) -> None:
    """What can be found wrong with references before anything is loaded: a file, a folder or a model that is not there.

    Raises:
        LoadError: for all of them together.
    """
    bad = []
    for reference in references:
        rest = parse_reference(reference)[1]
        if artifact_files(Path(rest).expanduser()):  # its manifest is checked when it is read
            continue
        try:
            check = getattr(kind_for(rest), "check", None)
            if check is not None:
                check(rest)
        except LoadError as error:
            bad.append(str(error))
    if bad:
        raise LoadError("; ".join(dict.fromkeys(bad)))


def load_member(
    reference: str | nn.Module,
    *,
    name: str | None = None,
    inputs: Inputs | tuple | dict | Tensor | Callable[[Member], Inputs | None] | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    allow_nonfinite: bool = False,
    read: bool = True,
) -> Member:
    """Load one model to be joined with others, its *member* of a joint model.

    Args:
        reference: a transformers folder or hub id (`./bert`, `org/name`), `timm:NAME`, a function that returns a
            module (`nets.py:make`), each with a name in front where it shall have another (`text=./bert`); or a live
            `nn.Module`, which is put into eval mode. All forms are listed in `surgery.members.references`.
        name: of the member; by default that in the reference, or else one derived from it.
        inputs: example inputs of one forward pass: positional arguments as a tuple, keyword arguments as a dict, or one
            tensor. By default they are made up from the model's own configuration. A function is called with the
            member, whose `inputs` are the default ones, or empty; it returns others, or None to keep these.
        trust_remote_code: whether Python files that come with a transformers model may run.
        seed: of all that is drawn at random: example inputs, and weights where the reference has no stored ones. These
            depend on the seed and the member's name alone; no global generator is moved.
        allow_nonfinite: whether NaN and infinite weights are accepted.
        read: whether all weights are read once, to see that they are finite. Without it those of large models stay on
            the disk until they are used, and parameters may be on the meta device.

    Returns:
        the member in eval mode, every tensor in the dtype in which its file holds it, whatever the configuration says.
        Where the class cannot compute with a file's several dtypes, or with float8, all are held in the narrowest one
        that has every value, with a warning; modules that transformers keeps in float32 are in float32.

    Raises:
        LoadError: where there is no such model, its weights do not fit or are not finite, or it does not run.
        ConsentError: where it needs Python code that may not run.
        PlanError: where `seed` is no whole number from 0 on.

    Example:
        >>> import surgery, torch
        >>> member = surgery.load_member(torch.nn.Linear(3, 5), name="probe", inputs=torch.randn(2, 3))
        >>> member.name, member.origin.kind
        ('probe', 'module')
    """
    check_seed(seed)
    if isinstance(reference, nn.Module):
        module = unwrap(reference)
        check_ordinary(module)
        loaded = _adopt(module)
        chosen = name or default_name(loaded.origin)
        check_name(chosen)
    else:
        typed, rest = parse_reference(reference)
        kind = kind_for(rest)
        chosen = name or typed or reference_name(rest)
        check_name(chosen)
        request = Request(Permission.of_user(trust_remote_code), read)
        loaded = _load(kind, rest, request, member_seed(seed, chosen))
        align_module(loaded.module)  # tensors that are mapped lie where their file has them
        if any(p.is_meta for p in loaded.module.parameters()):
            try:
                return _member(chosen, loaded, inputs, seed, True)
            except LoadError:  # some models compute with values of their weights
                return load_member(
                    reference,
                    name=name,
                    inputs=inputs,
                    trust_remote_code=trust_remote_code,
                    seed=seed,
                    allow_nonfinite=allow_nonfinite,
                )
    unread = not read and sum(p.numel() for p in loaded.module.parameters()) > READ
    return _member(
        chosen, loaded, inputs, seed, allow_nonfinite or unread, live=isinstance(reference, nn.Module)
    )


def _given(inputs: Any, name: str, loaded: Loaded, seed: int) -> Inputs | None:
    """The example inputs that somebody gives; None where they are to be made up."""
    if not callable(inputs):
        return loaded.inputs if inputs is None else as_inputs(inputs)
    usual = loaded.inputs
    if usual is None:
        with suppress(LoadError):
            usual = example_inputs(loaded.module, loaded.origin, seed=seed)
    give = cast("Callable[[Member], Inputs | None]", inputs)
    return give(Member(name, loaded.module, usual or Inputs(), loaded.origin, loaded.files)) or usual


def _any(inputs: Inputs) -> bool:
    return bool(inputs.args or inputs.kwargs)


def _that_computes(loaded: Loaded, given: Inputs | None, name: str, seed: int) -> Loaded:
    """A model of several dtypes as it is where its class computes with them; else in one, with a warning."""
    try:
        inputs = given or example_inputs(loaded.module, loaded.origin, seed=seed)
        error = forward_error(loaded.module, inputs)
    except LoadError as failure:
        error = failure
    if error is None:
        return loaded
    warnings.warn(widen(loaded.module, name), SurgeryWarning, stacklevel=4)
    if loaded.origin.kind != "transformers":
        return loaded
    dtype = str(next(t.dtype for t in state_tensors(loaded.module).values() if t.is_floating_point()))
    options = {**loaded.origin.options, "dtype": dtype.removeprefix("torch.")}
    return replace(loaded, origin=replace(loaded.origin, options=options))


def build_architecture(
    origin: Origin,
    files: Mapping[str, bytes],
    *,
    permission: Permission = Permission.NONE,
) -> nn.Module:
    """The module that `origin` describes, again, without weights: parameters on meta, buffers real.

    Args:
        origin: of the member; it is read as its kind says, whatever its reference looks like.
        files: the member's small files by relative path.
        permission: of the text that the origin was read from.

    Returns:
        the module in eval mode, its parameters tied the way its class ties them. Fill it with
        `load_state_dict(..., assign=True)`.

    Raises:
        ConsentError: where building it runs code that the permission does not cover.
        LoadError: where the architecture cannot be built.
    """
    # What a constructor draws besides weights is as it was.
    with _explained(origin.reference), all_seeded(origin.seed or 0):
        return origin_kind(origin.kind).build(origin, files, Request(permission)).eval()


def ships(origin: Origin) -> bool:
    """Whether a member came from a function that ships with this package, so that nothing outside is needed for it."""
    return origin.kind == "factory" and origin.reference.partition("?")[0] in SHIPPED


def load_origin(
    origin: Origin, *, name: str, permission: Permission, seed: int = 0, inputs: Inputs | None = None
) -> Member:
    """The member that an artifact's origin describes, with its weights, from where it came.

    The reference is read as the origin's kind says: a text from an artifact does not choose how it is read.

    Args:
        origin: as it was recorded.
        name: of the member.
        permission: of the text that the origin was read from.
        seed: of made-up example inputs; weights that were drawn at random follow the seed that the origin records.
        inputs: for a model that has none of its own and for which none can be made up.

    Raises:
        ConsentError: where loading it runs code that the permission does not cover.
        LoadError: where it is a live module, or its reference cannot be read or is no reference of that kind.
    """
    handler = origin_kind(origin.kind)
    if not handler.claims(origin.reference):
        here = origin.reference.startswith((".", "/", "~")) or origin.reference.count("/") > 1
        what = "which is not there" if here else f"which is no reference of kind {origin.kind}"
        raise LoadError(f"the origin is '{origin.reference}', {what}")
    drawn = member_seed(seed, name) if origin.seed is None else origin.seed
    loaded = _load(handler, origin.reference, Request(permission), drawn)
    # It runs as it was accepted.
    return _member(name, loaded, lambda has: None if _any(has.inputs) else inputs, seed, True)


def _load(kind: Any, reference: str, request: Request, drawn: int) -> Loaded:
    """What a reference turns into; weights that no file holds are drawn from the seed `drawn`, which is recorded."""
    with _explained(reference), all_seeded(drawn) as draws:
        loaded: Loaded = kind.load(reference, request)
        if not loaded.stored and draws.any:
            loaded = replace(loaded, origin=replace(loaded.origin, seed=drawn))
    return loaded


@contextmanager
def _explained(reference: str, elements: int = MOST_ELEMENTS) -> Iterator[None]:
    """A library's own words about a configuration that it cannot take, as one of this package's errors."""
    what = f"'{shown_text(reference)}'"
    try:
        with bounded(what, elements=elements):
            yield
    except SurgeryError:
        raise
    except Exception as error:  # of a library or a model's class, on numbers of somebody else's
        raise LoadError(
            f"{what} must be a model that its library can build and run, but with its config.json it raises "
            f"{one_line(error)}: check the file, or the versions of the libraries"
        ) from error


def write_plain(module: nn.Module, origin: Origin, files: Mapping[str, bytes], directory: str | Path) -> None:
    """Write a module with ordinary weights as a folder that its own library reads, without this package.

    Args:
        module: with all its weights in place.
        origin: of the member.
        files: the member's small files by relative path.
        directory: target folder, made where it does not exist.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    origin_kind(origin.kind).save_plain(module, origin, files, target)


def check_name(name: str) -> None:
    """Refuse what is no member's name.

    Raises:
        LoadError: with the rule, and a name that is one.
    """
    if not _NAME.fullmatch(name):
        raise LoadError(
            f"a member's name is of letters A to z, digits, '_', '-' and '.', at most 200 and not dots alone, found "
            f"{shown(name)}: give another one, such as {_legal(name)[:40]}=REF"
        )


def _legal(text: str) -> str:
    """A name made of any text."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:200] or "member"


def reference_name(reference: str) -> str:
    """The name of a member whose reference has none in front.

    Example:
        >>> reference_name("timm:resnet18?num_classes=5")
        'resnet18'
    """
    return default_name(Origin(kind_for(reference).__name__.rpartition(".")[2], reference, ""))


def default_name(origin: Origin) -> str:
    """A legal name from the reference: the folder's, the model's, the factory's or the class's own name."""
    text = origin.reference.partition("?")[0]
    if origin.kind == "timm" and not Path(text).is_dir():
        text = text.removeprefix("timm:").partition("=")[0]
    elif origin.kind == "factory":
        text = text.rpartition(":")[2]
    base = Path(text.partition("@")[0]).name or Path(text).resolve().name
    return _legal(base)


def _member(
    name: str, loaded: Loaded, inputs: Any, seed: int, allow_nonfinite: bool, live: bool = False
) -> Member:
    """What a reference turned into, as a member in eval mode with example inputs."""
    loaded.module.eval()
    if not allow_nonfinite:
        check_finite(loaded.module, name)
    given = _given(inputs, name, loaded, seed)
    if not live and loaded.origin.kind in _FROM_FILES and mixed(loaded.module):
        loaded = _that_computes(loaded, given, name, seed)
    if given is not None:
        check_runs(loaded.module, given, name)
    with nullcontext() if live else _explained(loaded.origin.reference, EXAMPLE_ELEMENTS):
        examples = given or example_inputs(loaded.module, loaded.origin, seed=seed)
    return Member(name, loaded.module, examples, loaded.origin, loaded.files)


def _adopt(module: nn.Module) -> Loaded:
    """A live module, as the library's model that it is where it can be built again from its configuration."""
    for kind in KINDS:
        adopt = getattr(origin_kind(kind), "adopt", None)
        loaded = adopt(module) if adopt else None
        if loaded is not None and _same_shapes(module, loaded):
            return loaded
    return live_module(module)


def _same_shapes(module: nn.Module, loaded: Loaded) -> bool:
    """Whether the architecture built again has the live module's tensors: a layer may have been changed."""
    try:
        again = build_architecture(loaded.origin, loaded.files)
    except LoadError:
        return False
    return shapes_of(module) == shapes_of(again)
