"""A page's marked parts say what the JSON says, and nothing else in it changes."""

import json
import subprocess
import sys

import pytest

from benchmarks.report import pages
from benchmarks.report.data import ReportError
from benchmarks.report.files import load
from benchmarks.report.results import results_table
from benchmarks.report.tables import headline
from tests.helpers.report_json import (
    README,
    ROOT,
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


def rows(readme: str) -> dict[str, list[str]]:
    """Cells by the first cell; of rows that begin alike, the first."""
    found = {}
    for line in readme.split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|"):
            found.setdefault(cells[0], cells[1:])
    return found


def test_the_readme_is_rewritten_between_its_markers(folder, capsys):
    readme = folder / "README.md"
    assert run(folder, "--check") == 1 and readme.read_text() == README
    assert "does not say what the JSON says" in capsys.readouterr().out
    assert not (folder / "out").exists()
    assert run(folder) == 0
    text = readme.read_text()
    assert "123.456" not in text
    assert text.startswith("# Title\n<!-- benchmark: losses -->\n")
    assert "\n<!-- /benchmark: losses -->\nbetween\n<!--" in text and text.endswith("-->\nend\n")
    assert run(folder, "--check") == 0
    assert run(folder) == 0 and readme.read_text() == text
    change(folder, "cpu", lambda c: c["cases"][2].update(rounds=4))
    assert run(folder, "--check") == 1 and readme.read_text() == text


def test_the_readme_holds_the_figures(folder):
    assert run(folder) == 0
    text = (folder / "README.md").read_text()
    plain = " ".join(text.split())
    assert "JSD, beta 0.5, forward and backward; large: 512 tokens, hidden size 128," in plain
    assert "Medians of 3 rounds. Figures: `cpu.json`." in plain
    assert "small: 2,048 tokens" in plain and "Figures: `gpu.json`." in plain
    found = rows(text)
    dash, minus, times = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
    assert found["**opsd_kernels**"] == ["**1.25**", "**44 MiB**", "**+0.1 %**", "**1.0 %**"]
    assert found["Eager (wrong?)"] == ["3.00", dash, f"{minus}4.8 %", "1.0 %"]
    assert found["Triton: needs a GPU"] == [dash] * 4
    # Sorted by vocabulary and tokens; the close inputs come before the random ones.
    overview = [line for line in text.split("\n") if line.startswith("| JSD, beta 0.5, frozen")]
    where = [line.split(" | ")[1] for line in overview]
    assert where[:4] == [
        *("small, 256, close", "small, 256, random", "small, 512, random", "large, 512, random")
    ]
    figures = ["Eager (wrong?)", "1.25", "3.00", f"ours, 2.40{times}", "44 MiB", dash]
    assert overview[0].strip("| ").split(" | ")[2:] == [
        *(*figures, "+0.1 % / 1.0 %", f"{minus}4.8 % / 1.0 %")
    ]
    step = "prompts 16, micro batch 8; `python -m benchmarks.train_step`. Test CPU, 2 cores"
    assert f"medians: {step}" in plain
    assert found["rollout"] == ["2.00 s", "2.00 s"] and found["loss"] == ["250 ms", dash]
    assert found["**whole step**"] == ["**5.00 s**", "**12.5 s**"]
    assert found["all but the rollout"] == ["3.00 s", "10.5 s"]
    assert found["all but the rollout over opsd_train's"] == ["1.00", "3.50"]
    assert found["peak extra memory"] == ["700 MiB", dash] and found["mean loss"] == ["1.5", "1.5"]
    assert found["**student after 40 steps**"] == ["**29.5 %**", "**23.6 to 36.2 %**"]
    gain = f"**{minus}1.8 to +24.2 (44 gained, 9 lost)**"
    assert found["**paired difference**"] == ["**+17.5 points**", gain]
    assert "0.0997 before, 0.0874 after; 11,456 tokens generated" in plain
    assert "peak memory 2,957 MiB, 14 minutes in all." in plain


def test_the_readme_needs_no_drawing_and_no_torch(folder):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'matplotlib', 'jinja2']));"
        "from benchmarks.report.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["json", "--pages", "README.md", "--out", "out"]
    command = [sys.executable, "-c", code, *arguments]
    process = {"cwd": folder, "env": {"PYTHONPATH": str(ROOT)}, "capture_output": True}
    written = subprocess.run(command, **process, text=True)
    assert written.returncode == 2 and "the page needs" in written.stderr
    assert subprocess.run([*command, "--check"], **process).returncode == 0


def test_the_headline_has_two_peers(folder):
    alone = case("large", 4096)
    del alone["contenders"]["Eager"]
    content = losses(alone, case("large", 2048, dtype="float32"), case("large", 1024), case())
    write(folder, "cpu", content)
    assert headline(device(folder)).tokens == 1024


def test_the_headline_is_the_case_with_most_complete_peers(folder):
    hurried = case("large", 4096)
    seconds = hurried["contenders"]["Eager"]["seconds"]
    seconds |= {phase: samples[:1] for phase, samples in seconds.items()}
    write(folder, "cpu", losses(hurried, case("large", 1024), case()))
    assert headline(device(folder)).tokens == 1024


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- benchmark: speed -->", "line 1: unknown marker 'speed'; there are losses,"),
        ("<!-- benchmark: demo -->", "marker 'demo' is never closed"),
        ("a\n<!-- /benchmark: demo -->", "line 2: marker '/demo', but nothing is open"),
        (
            "<!-- benchmark: demo -->\n<!-- /benchmark: losses -->",
            "line 2: marker '/losses', but 'demo' is still open",
        ),
    ],
)
def test_bad_markers_end_in_one_line(folder, capsys, text, says):
    (folder / "README.md").write_text(text)
    assert run(folder, "--check") == 2
    assert says in capsys.readouterr().err
    assert (folder / "README.md").read_text() == text


@pytest.mark.parametrize("kind", ["losses", "train_step", "demo"])
def test_a_marker_without_results_is_named(folder, capsys, kind):
    for file in (folder / "json").glob("*.json"):
        if json.loads(file.read_text())["kind"] == kind:
            file.unlink()
    assert run(folder) == 2
    assert f"marker '{kind}'" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == README


def test_cells_do_not_break_the_table():
    table = pages.Table(("a", "b"), (("x|y", "1"), ("z", "")), bold=frozenset([1]))
    expected = "| a | b |\n|---|---:|\n| x\\|y | 1 |\n| **z** |  |"
    assert pages.markdown(table) == expected


def test_the_readme_has_a_row_of_each_measurement(folder):
    """The first of ours beside the fastest of the others, the study's figures as committed."""
    settings = {"model": "smol", "tokens": 128, "gradient_checkpointing": False}
    change(folder, "train_step", lambda c: c["settings"].update(settings))
    shorter = json.loads((folder / "json" / "train_step.json").read_text())
    shorter["settings"]["tokens"] = 64
    write(folder, "train_step_64", shorter)
    table = results_table(load([folder / "json"]))
    gpu, cpu, step, demo, study = table.rows
    times, minus = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
    assert gpu[0].endswith("small's head, 2,048 tokens; Test GPU")
    assert gpu[1] == f"2.00{times} the bare GEMMs, 44 MiB"
    assert gpu[2] == f"Eager: 3.00{times}, \N{EN DASH}"
    assert gpu[3] == "`python -m benchmarks.gpu_report second --out FOLDER`"
    assert cpu[0].endswith("large's head, 512 tokens; Test CPU, 2 cores")
    assert cpu[1].startswith("1.25") and cpu[3].startswith(
        "`pytest benchmarks --benchmark --full -k jsd-"
    )
    assert step[0] == "OPSD step, smol, 16 prompts, 64 tokens each; Test CPU, 2 cores"
    assert step[3] == "`python -m benchmarks.train_step --model smol`"
    assert step[1:3] == ("5.00 s, 700 MiB", "Their trainer: 12.5 s, \N{EN DASH}")
    assert demo[1:3] == ("29.5 % [23.6, 36.2]", "before training: 12.0 % [8.2, 17.2]")
    assert study[3] == "`python -m benchmarks.study`"
    assert minus not in study[1] and study[1].startswith("OPSD: ")
    block = (ROOT / "docs" / "benchmarks.md").read_text()
    for figures in (study[1].removeprefix("OPSD: "), study[2].split(": ")[1].split(";")[0]):
        assert figures in block


def test_the_readme_needs_the_study(folder, tmp_path):
    (folder / "json" / "train_step.json").unlink()
    with pytest.raises(ReportError, match=r"results\.json"):
        results_table(load([folder / "json"]), tmp_path / "nowhere")
