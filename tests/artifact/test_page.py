"""The page of an artifact or a run: its figures are the manifest's, it loads nothing, and names are no markup."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import training_nets
from artifacts import pair, rewrite
from command_line import surgery as command
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.errors import ArtifactError, OutputError
from surgery.fitting.report import FitReport
from surgery.page import charts, look, render, write_page
from surgery.page.charts import Series
from surgery.page.overview import Layer, MemberView, Overview
from surgery.training.report.runlog import find_log, read_log
from surgery.util import wording

VOID = {"meta", "br", "hr", "img", "link", "input"}
EVIL = ['<img src=x onerror="alert(1)">', '"></title><script>alert(1)</script>', "'-->]]>{{ 7*7 }}&lt;b&gt;"]


class Page(HTMLParser):
    """Tags with their attributes, cells row by row, and all text; an unbalanced tag is an error."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.words, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def check(text):
    """A page that is safe to open: one style sheet that the policy allows by its hash; nothing loads or runs."""
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "img",
        "a",
        "use",
        "image",
    }
    for tag, attributes in page.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("style", "src", "href")
        ], tag
    policies = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv")]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; style-src 'sha256-")
    assert not re.search(r"https?:|url\(|@import|expression\(|javascript:", text)
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)
    return page


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    joint = surgery.fit(pair(), max_error=0.1)
    return surgery.save(joint, tmp_path_factory.mktemp("page") / "joint"), joint.report


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    joint = training_nets.build(context=1)
    config = {"steps": 2, "burn_in": 0, "generations": 3, "final": 1}
    config["evolution"] = {"start": "random", "hypermodules": 4}
    surgery.train(joint, training_nets.tasks(), config, folder=folder / "run", cpu=True)
    log = (folder / "run" / "log.jsonl").read_bytes()
    return surgery.save(joint, folder / "joint", extras={"training/log.jsonl": log}), folder / "run"


def test_the_page_of_a_merge_has_the_figures_of_its_manifest(fitted):
    folder, report = fitted
    page = check(render(look(folder)))
    manifest = json.loads((folder / "manifest.json").read_text())["report"]
    rows = {row[0]: row[1:] for row in page.rows if row}
    after = dict.fromkeys(report.original_bytes, 0)
    for row in report.detail:
        after[row.member] += row.nbytes
    for name, before in manifest["original_bytes"].items():
        facts = next(row for row in page.rows if row[0] == name)
        assert facts[2:] == [
            wording.count(manifest["parameters"][name]),
            wording.size(before),
            wording.size(after[name]),
            wording.percent(after[name] / before),
        ]
    whole = sum(manifest["original_bytes"].values())
    assert rows["together"][2:4] == [wording.size(whole), wording.size(manifest["stored_bytes"])]
    text = " ".join(page.words)
    for error in manifest["errors"].values():
        assert wording.percent(error, digits=2) in text
    for means, amount in manifest["saved"].items():
        assert f"{wording.size(amount)} by {means}" in text
    assert "max-error 0.1" in text and "met" in text and "Training" not in text


def test_the_page_of_a_run_has_the_figures_of_its_log(trained):
    folder, run = trained
    end = read_log(find_log(run))[-1]
    page = check(render(look(folder)))
    for name in ("a", "b"):
        sizes = [end["sizes"][state][name] for state in ("alone", "start", "joint")]
        expected = [wording.count(each["parameters"]) for each in sizes]
        expected += [wording.size(each["bytes"]) for each in sizes]
        assert [name, *expected] in page.rows
    scores = end["scores"]["classes"]
    kept = next(row for row in page.rows if row[:2] == ["classes", "accuracy"])
    assert kept[3] == f"{scores['metric']:.4g}"
    assert any(word.startswith("Sharing paid") for word in page.words)
    assert {a["aria-label"] for t, a in page.tags if t == "svg" and "aria-label" in a} >= {"Losses", "Size"}
    going_on = check(render(look(run)))  # the run's own folder, without an artifact
    assert "Allocation of bits" not in going_on.words and "Training" in going_on.words


def test_names_of_an_artifact_are_no_markup(fitted, tmp_path):
    folder, _ = fitted
    copy = tmp_path / '<b onclick="x">'
    copy.mkdir()
    for path in folder.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(folder)).write_bytes(path.read_bytes())

    def spoil(manifest):
        for entry, evil in zip(manifest["members"].values(), EVIL, strict=False):
            if entry.get("origin"):
                entry["origin"].update(reference=evil, architecture=evil)
        manifest["versions"] = {evil: evil for evil in EVIL}
        manifest["report"]["target"] = EVIL[1]

    rewrite(copy, spoil)
    text = render(look(copy))
    page = check(text)
    assert "alert(1)" in " ".join(page.words) and "<script" not in text and "<b onclick" not in text


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40), st.floats(0, 32), st.sampled_from(["native", "int4/64", "shared rows", "odd"]))
def test_any_name_stays_text(name, bits, how):
    name = name.replace("\r", " ").replace("\0", " ")
    printable = "".join(c if c.isprintable() else "?" for c in name) + EVIL[0]
    layer = Layer(printable, how, bits, 5)
    member = MemberView(printable, printable, 5, 10, 5, {how: 5}, 0.5, (layer,))
    from surgery.artifact.shares import Shares

    shares = Shares((printable,), {printable: {how: 5}}, {printable: 10}, ((1,),), {printable: 2})
    page = check(render(Overview(printable, (member,), shares, {how: (1, 10, 5)}, FitReport(printable))))
    assert EVIL[0] in " ".join(page.words)


def test_hostile_logs_are_text_too(trained, tmp_path):
    _, run = trained
    text = (run / "log.jsonl").read_text().replace('"classes"', json.dumps(EVIL[1]))
    (tmp_path / "log.jsonl").write_text(text)
    page = check(render(look(tmp_path)))
    assert any(EVIL[1] in word for word in page.words)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_charts_are_drawn_of_any_numbers(values, logarithmic, bounded):
    values = [
        value if abs(value) < 1e30 and (value == 0 or abs(value) > 1e-30) else float("inf")
        for value in values
    ]
    series = [Series("x", range(1, len(values) + 1), values)]
    drawn = charts.lines(
        series, "t", "x", "y", logarithmic, 100.0 if bounded and not logarithmic else None, 1
    )
    assert not drawn or "nan" not in ElementTree.tostring(ElementTree.fromstring(str(drawn)), "unicode")


def test_a_page_replaces_a_page_and_nothing_else(fitted, tmp_path):
    folder, _ = fitted
    view = look(folder)
    path = write_page(view, tmp_path / "page.html")
    assert write_page(view, path).read_text() == render(view)
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(OutputError, match="mine"):
        write_page(view, tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "mine"
    with pytest.raises(OutputError, match="folder"):
        write_page(view, tmp_path)
    with pytest.raises(ArtifactError, match="neither"):
        look(tmp_path)


def test_the_verb_writes_the_page_beside_the_folder_or_where_it_is_told(fitted, tmp_path, monkeypatch):
    folder, _ = fitted
    monkeypatch.chdir(tmp_path)
    code, out, err = command("report", folder, "--html", "page.html", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["page"] == "page.html" and check((tmp_path / "page.html").read_text())
    assert {row["name"] for row in facts["artifact"]["members"]} == {"one", "two"}
    code, out, err = command("report", folder, "--html")
    assert code == 0 and (folder.parent / "joint.html").is_file() and "joint.html" in out, err
    code, _, err = command("report", tmp_path)
    assert code == 2 and err.startswith("surgery: ") and err.count("\n") == 1
