"""Render: an overview as one self-contained page, and the page as a file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import surgery.page.charts as charts
from surgery.disk.files import put
from surgery.errors import OutputError
from surgery.fitting.report import FitReport, saved_words
from surgery.page.charts import Series
from surgery.page.overview import MemberView, Overview, Run
from surgery.training.report.comparison import as_scores, share_of, total, verdict
from surgery.training.report.report import logged_phases
from surgery.util.showing import in_order, plural
from surgery.util.text import shorten
from surgery.util.wording import count, percent, size
from surgery.version import __version__

GENERATOR = "model-surgery"
STYLE, MARKUP = "page.css", "page.html.jinja"
MOST = 40  # members shown one by one
_LINES = 8  # tasks drawn in one chart
_WORDS = {"shared copies": "shared copy", "native": "own dtype"}


def render(view: Overview) -> str:
    """The page. Every string of an artifact is escaped; nothing is loaded from anywhere.

    Example:
        >>> page = render(look("joint"))  # doctest: +SKIP
    """
    style, markup = (files("surgery.page").joinpath(name).read_text("utf-8") for name in (STYLE, MARKUP))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(markup)
    return template.render(
        page=_page(view), style=Markup(style), policy=policy, generator=f"{GENERATOR} {__version__}"
    )


def write_page(view: Overview, file: str | Path, *, overwrite: bool = False) -> Path:
    """Write the page; a page that this tool wrote before is replaced.

    Raises:
        OutputError: where the file is somebody else's, or cannot be written.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        raise OutputError(
            f"`html` must be a file to write the page to, but {path} is a folder; name a file in it."
        )
    if path.exists() and not overwrite and f'content="{GENERATOR} '.encode() not in path.read_bytes()[:4000]:
        raise OutputError(
            f"`html` must be a new file, but {path} exists and is no page of this tool: choose another, or remove it."
        )
    put(path, render(view).encode())
    return path


def _page(view: Overview) -> dict[str, Any]:
    members = view.members
    facts = {
        "title": f"{view.title}: report", "heading": view.title, "lead": _lead(view), "tiles": _tiles(view),
        "verdict": _verdict(view.run), "footer": _footer(view), "run": _training(view.run) if view.run else None,
        "overlap": _overlap(view.run), "members": [], "total": None,
    }  # fmt: skip
    if not members or view.shares is None:
        return facts
    largest = max(max(member.before, member.after) for member in members)
    kinds = in_order({_kind(kind) for member in members for kind in member.kinds}, _CLASSES)
    before, after = sum(m.before for m in members), sum(m.after for m in members)
    most = max([8.0, *(layer.bits for member in members for layer in member.layers)])
    known = [member.parameters for member in members if member.parameters is not None]
    facts |= {
        "members": [_member(member, largest) for member in members[:MOST]],
        "kinds": [(kind, _class(kind), None) for kind in kinds],
        "saved": _saved(view.report),
        "errors": _errors(view), "error_words": _error_words(view), "bound": _bound(view.report),
        "ways": [
            (how.replace("native", "own dtype"), str(tensors), size(was), size(now), percent(now / was) if was else "-")
            for how, (tensors, was, now) in view.ways.items()
        ],
        "layers": [_layers(member, most) for member in members[:MOST] if member.layers],
        **_pairs(view),
    }  # fmt: skip
    if len(members) > 1:
        facts["total"] = {
            "parameters": count(sum(known)) if len(known) == len(members) else "-",
            "before": size(before), "after": size(after), "share": percent(after / before) if before else "-",
        }  # fmt: skip
    return facts


# -- what a page says --------------------------------------------------------------------------------------

_CLASSES = {
    "shared matrix": "matrix", "shared rows": "rows", "shared copy": "copy", "own dtype": "native", "bfloat16": "bf16",
    **{f"int{bits}": f"i{bits}" for bits in (12, 10, 8, 7, 6, 5, 4, 3, 2)},
}  # fmt: skip
_OTHER = "other"  # of codecs that have no colour of their own


def _kind(kind: str) -> str:
    """A kind of storage as the page names it: how values are grouped does not show."""
    return _WORDS.get(kind, kind).partition("/")[0].partition(",")[0]


def _class(kind: str) -> str:
    return _CLASSES.get(kind, _OTHER)


def _lead(view: Overview) -> str:
    if not view.members:
        return "A training run, as far as it is."
    names = shorten((member.name for member in view.members), 6)
    kind = "trained jointly" if view.run else "joined into one folder"
    return f"{plural(len(view.members), 'model')} {kind}: {names}."


def _tiles(view: Overview) -> list[tuple[str, str]]:
    tiles: list[tuple[str, str]] = []
    if view.members:
        before, after = sum(m.before for m in view.members), sum(m.after for m in view.members)
        tiles.append((size(after), f"tensors now, {size(before)} before"))
        tiles.append((percent(after / before) if before else "-", "of the bytes before"))
        errors = [member.error for member in view.members if member.error is not None]
        if errors:
            tiles.append((percent(max(errors), digits=2), "largest change of a member's output"))
    if view.run and view.run.generations:
        now, whole = share_of(view.run.generations, view.run.end)
        tiles.append(
            (percent(now / max(whole, 1)), f"of the sites' {count(whole)} parameters in the dictionary")
        )
        tiles.append((str(len(view.run.generations)), "generations of training"))
    return tiles


def _verdict(run: Run | None) -> str:
    sizes = (run.end or {}).get("sizes") if run else None
    if not run or not run.end or not sizes:
        return ""
    return verdict(sizes, as_scores(run.first), as_scores(run.end.get("scores", {})))


def _member(member: MemberView, largest: int) -> dict[str, Any]:
    parts: dict[str, int] = {}
    for kind, amount in member.kinds.items():
        parts[_kind(kind)] = parts.get(_kind(kind), 0) + amount
    ordered = [(kind, parts[kind]) for kind in in_order(parts, _CLASSES)]
    drawn = [(f"{kind}: {size(amount)}", _class(kind), float(amount)) for kind, amount in ordered]
    return {
        "name": member.name, "origin": member.origin,
        "parameters": "-" if member.parameters is None else count(member.parameters),
        "before": size(member.before), "after": size(member.after),
        "share": percent(member.after / member.before) if member.before else "-",
        "bar": charts.bar(drawn, largest, member.before),
    }  # fmt: skip


def _saved(report: FitReport) -> str:
    means = saved_words(report.saved) if report.saved else ""
    return f"Saved: {means}." if means else ""


def _bound(report: FitReport) -> str:
    return "" if report.bound is None else percent(report.bound, digits=2)


def _errors(view: Overview) -> list[tuple[str, Markup, str]]:
    found = [(m.name, m.error) for m in view.members[:MOST] if m.error is not None]
    allowed = None if view.report.added else view.report.bound  # each added member has its own
    largest = max([error for _, error in found] + ([allowed] if allowed else []), default=0.0) * 1.02
    return [
        (name, charts.bar([(name, "f0", error)], largest, mark=allowed), percent(error, digits=2))
        for name, error in found
        if largest
    ]


def _error_words(view: Overview) -> str:
    report = view.report
    if not any(member.error is not None for member in view.members):
        return (
            "No fit changed these weights, so no error was measured."
            if not view.run
            else ("Training changed these weights on purpose: its scores are below.")
        )
    given = report.given
    inputs = (
        f"real inputs for {', '.join(map(str, given))}, made-up ones for the rest"
        if given
        else "made-up inputs, which may show half of what real ones do"
    )
    if set(given) >= {member.name for member in view.members}:
        inputs = "real inputs"
    if all(member.error == 0 for member in view.members):
        return "Lossless: every member is what it was, bit for bit."
    later = "".join(
        f" {name} was added later: {each.target}, {'met' if each.met else 'not met'}."
        for name, each in report.added.items()
    )
    if not report.target:
        changed = "" if report.added else "; its target is none for weights that changed since"
        return f"Measured on {inputs}{changed}.{later}"
    faint = f" {report.faint}" * bool(report.faint)
    return (
        f"Target {report.target}: {'met' if report.met else 'not met'}, measured on {inputs}.{later}{faint}"
    )


def _layers(member: MemberView, most: float) -> tuple[str, Markup, str]:
    """Bits for each value of a member's matrices, each a column."""
    values = [
        (
            f"{layer.name}: {layer.how}, {layer.bits:.2f} bits for each value, {size(layer.nbytes)}",
            _class(_kind(layer.how)),
            layer.bits,
        )
        for layer in member.layers
    ]
    drawn = charts.columns(
        values, f"Bits for each value of {member.name}, matrix by matrix", "matrices in the order of their names",
        "bits for each value", most,
    )  # fmt: skip
    first, last = member.layers[0].name, member.layers[-1].name
    return member.name, drawn, f"{len(values)} matrices, from {first} to {last}."


def _pairs(view: Overview) -> dict[str, Any]:
    assert view.shares is not None
    names, blocks = view.shares.members[:MOST], view.shares.blocks
    across = sum(blocks[i][j] for i in range(len(blocks)) for j in range(len(blocks)) if i != j)
    within = sum(blocks[i][i] for i in range(len(blocks)))
    if not across and not within:
        words = "Nothing is stored once for several layers or members: what was saved was saved by precision."
        return {"sharing_words": words, "pairs": [], "pair_names": []}
    modules = {subset: number for subset, number in view.shares.modules.items() if subset}
    several = sum(number for subset, number in modules.items() if "+" in subset)
    words = (
        "Blocks and tensors that are stored once are counted pair by pair, on the diagonal within a member."
    )
    if modules:
        words = f"{several:,} of {sum(modules.values()):,} hypermodules are used by several members. {words}"
    rows = [(name, [f"{blocks[i][j]:,}" for j in range(len(names))]) for i, name in enumerate(names)]
    return {"sharing_words": words, "pairs": rows, "pair_names": names}


def _overlap(run: Run | None) -> list[tuple[Markup, str]]:
    import math

    found = []
    for each in ((run.end or {}).get("overlap", {}) if run else {}).values():
        layers = each["layers"]
        if len(layers) < 2:
            continue
        ratio = [
            [math.log2((o + 0.5) / (e + 0.5)) for o, e in zip(seen, chance, strict=True)]
            for seen, chance in zip(each["observed"], each["expected"], strict=True)
        ]
        limit = max(1.0, max(abs(value) for row in ratio for value in row))
        scaled = [[value / limit for value in row] for row in ratio]
        words = "Rows and columns: layers of each member, in execution order. "
        words += f"Orange: more than by chance, blue: less; darkest: {2**limit:.3g} times."
        found.append((charts.grid(scaled, [layer[0] for layer in layers], "Sharing between layers"), words))
    return found


# -- training ----------------------------------------------------------------------------------------------


def _training(run: Run) -> dict[str, Any]:
    end = run.end or {}
    state = "finished" if run.end else "still going on, or interrupted"
    stopped = f" ({end['stopped']})" if end.get("stopped") not in (None, "done") else ""
    words = f"{logged_phases(run.generations)}, {state}{stopped}"
    if run.end:
        words += f" after {end['seconds']:.0f} s; kept is generation {end['best'] + 1}"
    sizes = end.get("sizes") or {}
    return {
        "words": f"{words}.",
        "sizes": _sizes(sizes) if sizes else [],
        "scores": _scores(run),
        "charts": [chart for chart in (_losses(run), _share(run), *_curves(run)) if chart],
    }


def _sizes(sizes: Mapping[str, Any]) -> list[list[str]]:
    states = ("alone", "start", "joint")
    rows = [
        [
            name,
            *(count(sizes[s][name]["parameters"]) for s in states),
            *(size(sizes[s][name]["bytes"]) for s in states),
        ]
        for name in list(sizes["alone"])[:MOST]
    ]
    if len(sizes["alone"]) > 1:
        parts = [count(total(sizes[s], "parameters")) for s in states]
        rows.append(["together", *parts, *(size(total(sizes[s], "bytes")) for s in states)])
    return rows


def _scores(run: Run) -> list[list[str]]:
    end = run.end or {}
    last = run.generations[-1].get("validation", {}) if run.generations else {}
    parts = (run.first, end.get("scores", last), end.get("tests", {}))
    rows = []
    for name in dict.fromkeys(task for part in parts for task in part):
        scores = [part.get(name) or {} for part in parts]
        measure = next((score["measure"] for score in scores if score.get("measure")), None) or "metric"
        for title, key in (("loss", "loss"), (measure, "metric")):
            values = [score.get(key) for score in scores]
            if any(value is not None for value in values):
                rows.append([name, title, *("-" if value is None else f"{value:.4g}" for value in values)])
    return rows


Chart = tuple[str, Markup, list[tuple[str, str, bool | None]]]


def _losses(run: Run) -> Chart | None:
    series: list[Series] = []
    steps = [line["generation"] + 1 for line in run.generations]
    tasks = list(run.start["tasks"])[:_LINES]
    for k, task in enumerate(tasks):
        values = [line["losses"].get(task, float("nan")) for line in run.generations]
        first = abs(values[0]) if values and values[0] else 1.0
        series.append(Series(f"{task}, training", steps, [value / first for value in values], k))
        judged = [
            (line["generation"] + 1, line["validation"][task]["loss"])
            for line in run.generations
            if line.get("validation", {}).get(task, {}).get("loss") is not None
        ]
        if judged:
            scale = abs(judged[0][1]) or 1.0
            series.append(
                Series(f"{task}, validation", [x for x, _ in judged], [y / scale for _, y in judged], k, True)
            )
    positive = all(y > 0 for each in series for y in each.y if y == y)
    drawn = charts.lines(
        series, "Losses", "generation", "loss, first = 1", logarithmic=positive, mark=_kept(run)
    )
    return ("Loss of each task", drawn, _entries(series)) if drawn else None


def _share(run: Run) -> Chart | None:
    steps = [line["generation"] + 1 for line in run.generations]
    series = [
        Series("parameters of the dictionary", steps, [100 * line["share"] for line in run.generations])
    ]
    drawn = charts.lines(
        series, "Size", "generation", "% of the sites' parameters", most=100.0, mark=_kept(run)
    )
    return ("Size", drawn, _entries(series)) if drawn else None


def _curves(run: Run) -> list[Chart]:
    """What the methods of a run draw of it."""
    from surgery.training.report.pictures import methods_trained

    steps, found = [line["generation"] + 1 for line in run.generations], []
    for each in (each for method in methods_trained(run.start) for each in method.curves(run.generations)):
        names = list(each.lines)[:_LINES]
        series = [Series(name, steps, each.lines[name], k) for k, name in enumerate(names)]
        most = float(max((y for one in series for y in one.y), default=0))
        if most > 0:
            title = each.unit[:1].upper() + each.unit[1:]
            drawn = charts.lines(series, title, "generation", each.unit, most=most, mark=_kept(run))
            found.append((each.title, drawn, _entries(series)))
    return found


def _kept(run: Run) -> float | None:
    return None if run.end is None else run.end["best"] + 1


def _entries(series: Iterable[Series]) -> list[tuple[str, str, bool | None]]:
    return [(each.label, f"s{each.colour % charts.COLOURS}", each.dashed) for each in series]


def _footer(view: Overview) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in view.versions.items())
    return f"Written with {versions}." if versions else f"Written with surgery {__version__}."
