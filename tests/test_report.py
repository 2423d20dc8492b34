"""The page: well-formed, escaped, self-contained, honest about what is missing."""

import csv
import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest
from helpers.synthetic_records import diverge, edit_json, write_records

pytest.importorskip("matplotlib")

from bs_jax.errors import UserError
from bs_jax.records.results import load_results
from bs_jax.report import style
from bs_jax.report.page import Section, html, page, tag
from bs_jax.report.terminal import verdict_table
from bs_jax.report.write import write_report
from bs_jax.statistics.analysis import analyse

_VOID = {"meta", "br", "hr", "img", "link", "input", "col"}


class Checker(HTMLParser):
    """Checks that every element is closed in order, and collects text and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.links, self.ids = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def report_on(workdir, *, png=False):
    """The figures are drawn for the page; as files once more where a test looks at those."""
    results = load_results(workdir)
    with pytest.MonkeyPatch.context() as patch:
        if not png:
            patch.setattr(style, "to_png", lambda figure: b"not drawn")
        return write_report(results, analyse(results))


def check(path):
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return checker, " ".join(" ".join(checker.text).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    arms = ("none", "linear", "invariant")
    workdir = write_records(tmp_path_factory.mktemp("records"), arms, seeds=6, sd=0.003)
    diverge(workdir / "runs/b256-s0-linear-1.0")
    (workdir / "runs/b16-s1-none-1.0/DONE").unlink()
    (workdir / "runs/holiday").mkdir()
    edit_json(workdir / "sweep.json", warnings=["ghost batches differ"])
    return report_on(workdir)


def test_the_page_is_well_formed_light_and_asks_the_network_for_nothing(written):
    checker, _ = check(written)
    assert checker.tags.count("svg") == 2 * 2 + 3 * 3  # these records hold no evaluations
    assert not {"script", "link", "iframe", "img"} & set(checker.tags)
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(re.fullmatch(r"#[\w-]+|(\.\./runs/)?[\w.-]+/?", link) for link in checker.links)
    content = written.read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)", content)
    assert len(content) < 1_000_000
    for link in checker.links:
        if link.startswith("#"):
            assert link[1:] in checker.ids
        else:
            assert (written.parent / link).stat().st_size > 0


def test_the_verdict_comes_first_in_words(written):
    _, text = check(written)
    assert "invariant: the batch size does not matter" in text
    assert "none and linear: it matters (margin ±1.00 points)." in text
    assert "Use “invariant” from batch size 16 to 256" in text
    assert text.index("k is that batch size over 64") < text.index("(k = 1/4 to 4)")
    assert "Final accuracy stays within ±1.00 points of the base from batch size 16 to 256" in text
    assert text.index("does not matter") < text.index("Final accuracy against batch size")
    for verdict in ("✓ equivalent", "✗ different"):
        assert verdict in text


def test_nothing_missing_is_hidden(written):
    _, text = check(written)
    assert "256 (1 of 6 diverged)" in text
    assert "runs/b256-s0-linear-1.0: linear at batch size 256, seed 0, at step 99" in text
    assert "1 of 78 runs have no usable result yet" in text
    assert "runs/b16-s1-none-1.0: none at batch size 16, seed 1" in text
    assert "holiday" in text
    assert "ghost batches differ" in text


def test_origin_and_hyperparameters_are_there(written):
    _, text = check(written)
    assert "python main.py --mode=report --workdir=" in text
    for fact in ("jax 0.10.2", "cpu (2 devices)", "0123456789abcdef", "Fashion-MNIST 10k part"):
        assert fact in text
    assert "Learning rate × k, decays to the power k (Goyal et al. 2017)." in text
    assert "0.9741" in text or "0.974" in text  # 0.9 ** (1/4)


def test_every_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&amp;\u202e\x00'
    workdir = write_records(tmp_path, ("x",), (32, 64), effects={"x": lambda k: 0.0}, rows=3)
    points = json.loads((workdir / "sweep.json").read_text())["points"]
    edit_json(
        workdir / "sweep.json",
        points=[point | {"arm": evil} for point in points],
        **dict.fromkeys(("title", "name", "command", "data", "model", "config_name"), evil),
        warnings=[evil],
        accuracy_metric="eval/accuracy",
    )
    folder = workdir / "runs/b32-s0-x-1.0"
    edit_json(folder / "summary.json", device=evil, git_revision=evil, versions={evil: evil})
    hparams = json.loads((folder / "hparams.json").read_text())
    edit_json(folder / "hparams.json", scaled=hparams["scaled"] | {evil: 1.0}, warnings=[evil])
    (workdir / "runs" / "<script>1").mkdir()
    checker, text = check(report_on(workdir))
    assert "script" not in checker.tags
    assert text.count('<script>alert("x")</script>&amp;') > 10


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("nothing finished", "No run away from the base batch size has finished yet."),
        ("no base", "Without a finished run at the base batch size there is nothing to compare"),
        ("one seed", "No seed noise could be measured"),
        ("only base", "Has no point away from the base batch size"),
        ("no curves", "The numbers"),
    ],
)
def test_a_thin_sweep_gives_a_thin_report_in_clear_words(tmp_path, change, expected):
    sizes = {"no base": (32, 128), "only base": (64,)}.get(change, (32, 64))
    seeds = 1 if change == "one seed" else 2
    workdir = write_records(tmp_path, ("noise_aware",), sizes, seeds=seeds, rows=3)
    for folder in (workdir / "runs").iterdir():
        if change == "nothing finished":
            shutil.rmtree(folder)
        if change == "no curves":
            (folder / "metrics.jsonl").unlink()
    _, text = check(report_on(workdir))
    assert expected in text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    varies = "“varies” marks what the rule measures while it trains."
    assert (varies in text) == (change in ("one seed", "no base", "no curves"))


def test_a_contents_list_names_every_section_and_rows_lead_to_their_runs(written):
    checker, text = check(written)
    for title in re.findall(r"<h2>([^<]+)</h2>", written.read_text(encoding="utf-8")):
        assert text.count(html_text(title)) >= 2
    runs = {link for link in checker.links if link.startswith("../runs/")}
    assert runs == {f"../runs/{path.name}/" for path in (written.parents[1] / "runs").iterdir()} - {
        "../runs/holiday/"
    }


def html_text(title):
    return title.replace("&#x27;", "'")


def test_costs_and_gains_are_counted_by_batch_size_and_rule(written):
    _, text = check(written)
    # 24,000 examples in 4.2 s, whatever the batch size.
    assert "256 4 93 4.2 s 5,714 1.00" in text
    assert "examples to the base's loss, × the base's" in text
    rows = list(csv.DictReader((written.parent / "points.csv").read_text().splitlines()))
    found = {(row["arm"], row["batch_size"]): row for row in rows}
    assert len(rows) == 1 + 3 * 4
    assert found["", "64"]["updates"] == "375.0"
    assert found["invariant", "16"]["verdict"] == "equivalent"
    base, follows, lags = (
        float(found[point]["share_to_base_loss"])
        for point in (("", "64"), ("invariant", "16"), ("none", "256"))
    )
    assert 0.5 < base <= 0.75
    assert follows == pytest.approx(base, abs=0.15)
    assert lags == math.inf
    assert found["none", "256"]["inside_noise_scale"] == ""


def test_writing_again_replaces_every_file_and_leaves_no_others(tmp_path):
    written = report_on(write_records(tmp_path, ("none",), (32, 64), seeds=2, rows=4), png=True)
    before = {path.name: path.read_bytes() for path in written.parent.iterdir()}
    assert report_on(tmp_path, png=True) == written
    after = {path.name: path.read_bytes() for path in written.parent.iterdir()}
    assert after == before
    figures = {"metric.png", "curves.png", "deviation.png"}
    assert {"index.html", *figures} <= set(after)
    assert all(after[name].startswith(b"\x89PNG") for name in figures)
    assert {"results.csv", "points.csv"} <= set(after)


def test_a_report_that_cannot_be_written_is_a_one_line_error(tmp_path):
    workdir = write_records(tmp_path / "a b", ("none",), (32, 64), seeds=1, rows=2)
    (workdir / "report").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*report") as caught:
        report_on(workdir)
    assert "\n" not in str(caught.value)
    command = str(caught.value).split("`")[1]
    assert shlex.split(command)[2:] == ["--mode=report", f"--workdir={workdir}"]


def test_the_terminal_table_has_a_line_a_rule_and_takes_names_literally(tmp_path):
    from rich.console import Console

    workdir = write_records(tmp_path, ("x",), (16, 64), effects={"x": lambda k: 0.0}, rows=2)
    points = json.loads((workdir / "sweep.json").read_text())["points"]
    points = [point | {"arm": name} for name in ("[red]a[/red]", "b") for point in points]
    edit_json(workdir / "sweep.json", points=points)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(verdict_table(analyse(load_results(workdir))))
    text = console.export_text()
    assert "[red]a[/red]" in text
    assert "64 (base)" in text
    assert len(re.findall(r"\b8\d\.\d\d\b", text)) == 4


def test_plain_text_is_escaped_and_made_html_is_not():
    assert tag("b", "<i>", tag("i", "&")) == "<b>&lt;i&gt;<i>&amp;</i></b>"
    assert html("a\x00b") == "a b"
    assert page("<t>", "x & y", [Section("<u>", "<v>")]).count("&lt;t&gt;") == 1
