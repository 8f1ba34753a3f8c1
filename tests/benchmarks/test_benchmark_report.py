"""The page and the plots say what the JSON says; bad input ends in one line."""

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from benchmarks.report import plots as report_plots
from benchmarks.report.__main__ import main
from benchmarks.report.files import load
from benchmarks.report.tables import (
    mib_text,
    percent_text,
    ratio_text,
    suspicious,
    time_text,
    worst_gradient,
)
from tests.helpers.report_json import (
    README,
    case,
    change,
    device,
    losses,
    run,
    write,
    write_results,
)


@pytest.fixture
def folder(tmp_path):
    write_results(tmp_path)
    return tmp_path


class Page(HTMLParser):
    """Rows of cells per heading; tags must close in order and nothing may be loaded."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.images, self.rows, self.heading = [], [], {}, ""
        self.feed(text)
        assert self.tags == [] and not re.search(r"@import|url\(|<script|<link", text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            assert name not in ("src", "href") or value.startswith("data:image/png;base64,")
            self.images += [value.partition(",")[2]] if name == "src" else []
        if tag not in ("meta", "img"):
            self.tags.append(tag)
        if tag in ("h2", "h3", "summary"):
            self.heading = "" if tag == "h2" else self.heading.partition("|")[0] + "|"
        if tag == "tr":
            self.rows.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.rows[self.heading][-1].append("")

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.tags):
            self.rows[self.heading][-1][-1] += data
        elif {"h2", "h3", "summary"} & set(self.tags):
            self.heading += data

    def row(self, heading: str, name: str) -> list[str]:
        return next(row[1:] for row in self.rows[heading] if row[0] == name)


def test_the_page_holds_the_figures(folder, capsys):
    assert run(folder) == 0
    printed = capsys.readouterr().out.split("\n")[:-1]
    assert all(Path(line).is_file() for line in printed)
    text = (folder / "out" / "index.html").read_text()
    page = Page(text)
    at = "JSD, beta 0.5, frozen head, bf16, random inputs; "
    cpu, gpu = f"Test CPU|{at}small, 256 tokens", f"Test GPU|{at}small, 1,024 tokens"
    none = "\N{EN DASH}"
    # Medians by hand: ours 2 x 12.5 ms over 2 x 10 ms; the fastest peer takes 2 x 30 ms.
    times = ["12.5 ms", "12.5 ms", "25.0 ms", "1.25", "ours, 2.40\N{MULTIPLICATION SIGN}", "44 MiB"]
    assert page.row(cpu, "opsd_kernels") == [*times, "+0.1 %", "1.0 %", none]
    times = ["30.0 ms", "30.0 ms", "60.0 ms", "3.00", none, none]
    assert page.row(cpu, "Eager wrong?") == [*times, "\N{MINUS SIGN}4.8 %", "1.0 %", none]
    times = ["170 ms", "170 ms", "340 ms", "17.0", none, "1,234 MiB"]
    assert page.row(cpu, "Chunked <b> wrong?") == [*times, "nan", "1.0 %", none]
    assert page.row(cpu, "Triton") == ["needs a GPU"]
    assert page.row(cpu, "bare GEMMs")[3:6] == ["1.00", none, "11 MiB"]
    assert page.row(gpu, "opsd_kernels")[2:5] == [
        "40.0 ms",
        "2.00",
        "ours, 1.50\N{MULTIPLICATION SIGN}",
    ]
    assert page.row("Test CPU|One training step", "whole step over opsd_train's") == [
        "1.00",
        "2.50",
    ]
    for fact in (
        "Test CPU, 2 cores (1 threads), 7.5 GiB, Python 3.11.7, torch 2.13.0, "
        "commit 012345678 with local changes, 2026-01-02 03:04",
        "growth of the peak",
        "needs 99 GiB",
        "runs in a process of its own",
        "Third: not installed",
        "Plan: blocks of 64 rows",
    ):
        assert fact in html.unescape(text)
    assert len(page.images) == 3  # against tokens on both devices, against vocabulary on the CPU


def test_the_plots_are_pictures(folder):
    assert run(folder) == 0
    files = sorted((folder / "out").glob("*.png"))
    assert [file.name.removeprefix("test-") for file in files] == [
        "cpu-jsd-beta-0.5-frozen-bfloat16-random-512-tokens-by-vocab.png",
        "cpu-jsd-beta-0.5-frozen-bfloat16-random-small-by-tokens.png",
        "gpu-jsd-beta-0.5-frozen-bfloat16-random-small-by-tokens.png",
    ]
    inlined = Page((folder / "out" / "index.html").read_text()).images
    assert {base64.b64decode(i) for i in inlined} == {file.read_bytes() for file in files}
    for file in files:
        pixels = matplotlib.image.imread(io.BytesIO(file.read_bytes()), format="png")
        ours = (abs(pixels[..., :3] * 255 - [0x25, 0x63, 0xEB]) < 2).all(-1)
        assert pixels.shape[1] > 1000 and ours.sum() > 1000


def test_the_plots_hold_the_figures(folder):
    cpu = device(folder)
    tokens, vocab = report_plots.groups(cpu.cases.values())
    assert list(tokens.places.values()) == [256, 512]
    assert list(vocab.places.values()) == [1000, 9000]
    found = {
        name: [(p.x, round(p.y, 6)) for p in report_plots._points(tokens, name, value)]
        for name, value in (
            ("opsd_kernels", report_plots._milliseconds),
            ("Chunked <b>", lambda case, who: case.floors(who)),
            ("bare GEMMs", report_plots._mib),
            ("Eager", report_plots._mib),
        )
    }
    assert found == {
        "opsd_kernels": [(256, 25.0), (512, 25.0)],
        "Chunked <b>": [(256, 17.0), (512, 17.0)],
        "bare GEMMs": [(256, 11.0), (512, 11.0)],
        "Eager": [],
    }


def test_models_with_one_vocabulary_stand_side_by_side(folder):
    shapes = ("small", "larger", "large")
    write(folder, "cpu", losses(*(case(shape, 512) for shape in shapes)))
    cpu = device(folder)
    (vocab,) = report_plots.groups(cpu.cases.values())
    assert [c.shape for c in vocab.cases] == ["small", "large", "larger"]
    assert not vocab.to_scale and list(vocab.places.values()) == [0, 1, 2]


def test_a_peer_timed_less_often_is_marked(folder):
    marked = []

    def once(content):
        for found in content["cases"]:
            seconds = found["contenders"]["Eager"].get("seconds", {})
            seconds |= {phase: samples[:1] for phase, samples in seconds.items()}
            marked.append(found["id"])

    change(folder, "cpu", once)
    assert run(folder) == 0
    assert "| Eager (wrong?, timed once) | 3.00 |" in (folder / "README.md").read_text()
    assert (folder / "out" / "index.html").read_text().count(">timed once<") == len(set(marked))


def test_no_empty_plots(folder):
    write(folder, "cpu", losses(case("small", 256), case("large", 512)))
    (folder / "json" / "gpu.json").unlink()
    assert run(folder) == 0
    assert list((folder / "out").glob("*.png")) == []


def test_no_panel_of_memory_that_nobody_measured(folder):
    cases = [case(tokens=256), case(tokens=512)]
    for who in cases[1]["contenders"].values():
        who["peak_extra_mib"] = None
    write(folder, "cpu", losses(*cases))
    cpu = device(folder)
    (group,) = report_plots.groups(cpu.cases.values())
    axes = report_plots._figure(group, report_plots._looks(cpu), "Test CPU").axes
    assert [panel.get_title("left") for panel in axes] == ["time, ms", "time over bare GEMMs"]
    lines = [line for line in axes[1].lines if len(line.get_xdata()) == 2]
    drawn = {(line.get_linestyle(), *line.get_ydata().round(6)) for line in lines}
    assert {("--", 1.0, 1.0), ("-", 1.25, 1.25), ("-", 3.0, 3.0), ("-", 17.0, 17.0)} <= drawn
    assert all(list(line.get_xdata()) == [256, 512] for line in lines)
    # Two peers at two sizes have wrong answers.
    assert sum(line.get_markerfacecolor() == "white" for line in axes[1].lines) == 4


@pytest.mark.parametrize("newest", ["a", "z"])
def test_the_newest_wins(tmp_path, newest):
    for name, ours in (("a", 0.015), ("z", 0.02)):
        date = "2026-02-01 10:00" if name == newest else "2026-01-31 11:00"
        more = [case(tokens=512)] if name == "a" else []
        content = losses(case(ours=ours), *more, date=date)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "other.json").write_text(json.dumps(losses(case(ours=0.09), device="Other CPU")))
    # Named twice, read once.
    devices = load([tmp_path, tmp_path / "a.json"])
    assert [device.name for device in devices] == ["Other CPU", "Test CPU"]
    cases = devices[1].cases
    first = cases["jsd-frozen-bfloat16-small-256-random"]
    assert first.floors(first.ours) == pytest.approx({"a": 1.5, "z": 2.0}[newest])
    assert first.source.file == f"{newest}.json" and len(cases) == 2
    assert cases["jsd-frozen-bfloat16-small-512-random"].source.file == "a.json"


def test_a_skipped_case_measured_elsewhere_is_not_skipped(folder):
    skipped = [{"id": case()["id"], "why": "no time"}]
    change(folder, "cpu", lambda c: c.update(skipped=skipped))
    assert device(folder).skipped == {}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ("{", "cpu.json is not valid JSON"),
        ("[]", "cpu.json has kind None; it must be one of losses, train_step, demo, compile"),
        ('{"kind": "speed"}', "cpu.json has kind 'speed'"),
        ('{"kind": "losses"}', "cpu.json does not name the device"),
        (lambda c: c["cases"][0].pop("tokens"), "cpu.json is not as kind 'losses' should be"),
        (lambda c: c["cases"][0].update(contenders=[]), "cpu.json is not as kind"),
        (lambda c: c.update(kind="demo"), "cpu.json is not as kind 'demo' should be: no 'summary'"),
    ],
)
def test_bad_files_end_in_one_line(folder, capsys, edit, says):
    if callable(edit):
        change(folder, "cpu", edit)
    else:
        (folder / "json" / "cpu.json").write_text(edit)
    assert run(folder) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and says in captured.err
    assert (folder / "README.md").read_text() == README and not (folder / "out").exists()


def test_bad_paths_end_in_one_line(folder, capsys):
    (folder / "empty").mkdir()
    readme, out = folder / "README.md", folder / "out"
    for arguments, says in (
        ([folder / "nowhere.json"], "nowhere.json cannot be read: No such file"),
        ([folder / "empty"], "there is no .json file in"),
        ([folder / "json", "--pages", folder / "NO.md"], "NO.md: No such file"),
        ([folder / "json", "--pages", readme, "--out", readme], "README.md: File exists"),
    ):
        assert main(["--pages", str(readme), "--out", str(out), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_wrong_answers():
    right = {"loss": -0.01, "grad_hidden": 0.05, "grad_weight": None}
    assert not suspicious(right) and not suspicious({}) and not suspicious(None)
    for wrong in ({"loss": -0.0101}, {"grad_weight": 0.051}, {"grad_hidden": float("nan")}):
        assert suspicious(right | wrong)
    assert worst_gradient(right | {"grad_weight": 0.2}) == 0.2 and worst_gradient({}) is None
    assert percent_text(worst_gradient(right | {"grad_weight": float("nan")})) == "nan"


def test_figures_as_text():
    assert [time_text(t) for t in (12.345, 0.99996, 0.5612, 0.0123, 4.56e-5, None)] == [
        *("12.3 s", "1.00 s", "561 ms", "12.3 ms", "45.6 µs", "\N{EN DASH}")
    ]
    assert [ratio_text(r) for r in (1.284, 9.999, 17.04, 99.97, 1234.5)] == [
        *("1.28", "10.0", "17.0", "100", "1,234")
    ]
    assert [mib_text(m) for m in (1088.35, 43.4, 9.96, 4.25)] == [
        *("1,088 MiB", "43 MiB", "10 MiB", "4.2 MiB")
    ]
    signed = [percent_text(e, signed=True) for e in (0.0009, -0.0479, 2e-4, 4e-8, -4e-8, 0.0)]
    minus = "\N{MINUS SIGN}"
    assert signed == ["+0.1 %", f"{minus}4.8 %", "+0.02 %", "<0.001 %", "<0.001 %", "0 %"]
    assert [percent_text(e) for e in (0.0329, None)] == ["3.3 %", "\N{EN DASH}"]
