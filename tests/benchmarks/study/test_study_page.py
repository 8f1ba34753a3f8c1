"""The page, the tables and the readings of made-up results, whole and with runs missing."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study.comparison import Comparison, compare
from benchmarks.study.efficiency import Ratio
from benchmarks.study.outcomes import base_outcomes, run_outcomes
from benchmarks.study.page import write_page
from benchmarks.study.reading import (
    MINUS,
    NONE,
    TIMES,
    points,
    ratio_readings,
    ratio_summary,
    reading,
    share_text,
    times,
    verdict,
)
from benchmarks.study.statistics import Estimate
from benchmarks.study.tables import accuracy_table, main_comparison, rewrite, summary
from opsd_train.config.errors import UserError
from tests.helpers import study_results as made_up


@pytest.fixture(scope="module")
def whole() -> dict:
    return made_up.made_up(problems=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study's folder with a page; one run failed, one is missing."""
    folder = tmp_path_factory.mktemp("study")
    results = made_up.broken(made_up.made_up(problems=60))
    results["notes"]["methods"] += " <script>alert(1)</script>"
    (folder / "results.json").write_text(json.dumps(results))
    assert write_page(folder) == folder / "study.html"
    return folder


def named(results: dict, name: str) -> Comparison:
    return compare(results, next(e for e in results["experiments"] if e["name"] == name))


@pytest.mark.parametrize(
    ("low", "high", "paper", "expected"),
    [
        (0.01, 0.05, "first", "agrees"),
        (0.01, 0.05, "second", "disagrees"),
        (0.01, 0.05, None, "ahead"),
        (-0.05, -0.01, "first", "disagrees"),
        (-0.05, -0.01, "second", "agrees"),
        (-0.05, -0.01, None, "behind"),
        (-0.02, 0.08, "first", "cannot tell"),
        (0.0, 0.08, "first", "cannot tell"),
        (-0.08, 0.0, None, "cannot tell"),
    ],
)
def test_verdicts(low, high, paper, expected):
    assert verdict(Estimate((low + high) / 2, low, high), paper) == expected
    assert verdict(None, paper) == "incomplete"


def test_readings_say_what_the_interval_allows(whole):
    comparison = named(whole, "methods")
    contrast = comparison.contrasts[2]  # OPSD and GRPO, with OPSD ahead in the paper

    def read(value, low, high):
        object.__setattr__(contrast, "total", Estimate(value, low, high))
        return reading(comparison, contrast)

    start = f"OPSD, 1 sample {MINUS} GRPO, 8 samples: "
    assert read(0.031, -0.02, 0.082) == (
        f"{start}+3.1 points [{MINUS}2.0, +8.2] (mean of 3 tasks); the interval includes 0: "
        "this study cannot tell them apart. The paper has OPSD, 1 sample ahead."
    )
    assert read(0.05, 0.01, 0.09).endswith("above 0: OPSD, 1 sample is ahead, as in the paper.")
    assert read(-0.05, -0.09, -0.01).endswith(
        "below 0: GRPO, 8 samples is ahead. The paper has OPSD, 1 sample ahead."
    )
    assert "the very same problems right" in read(0, 0, 0)


def test_numbers_as_text():
    assert [points(x) for x in (0.0312, -0.2, 0.0001, -0.0004)] == [
        "+3.1",
        f"{MINUS}20.0",
        "0.0",
        "0.0",
    ]
    assert share_text(Estimate(0.5, 0.25, 0.75)) == "50.0 [25.0, 75.0]"
    assert share_text(None) == NONE
    assert [times(x) for x in (12.34, 0.5, math.inf, 0)] == [
        f"12.3{TIMES}",
        f"0.50{TIMES}",
        "not reached",
        f"0.0{TIMES}",
    ]


@pytest.mark.parametrize(
    ("value", "best", "expected"),
    [
        (math.inf, (0.6, 0.2), "not reached: GRPO, 8 samples never rises"),
        (0.0, (0.2, 0.6), "not reached: OPSD, 1 sample never rises"),
        (math.nan, (0.2, 0.2), "neither OPSD, 1 sample nor GRPO, 8 samples rises"),
        (
            12.0,
            (0.6, 0.5),
            f"12.0{TIMES} the tokens of OPSD, 1 sample [10.0{TIMES}, not reached]. OPSD",
        ),
        (12.0, (0.5, 0.5), f"12.0{TIMES} the tokens of OPSD, 1 sample [10.0{TIMES}, not reached]."),
    ],
)
def test_ratios_in_words(whole, value, best, expected):
    contrast = named(whole, "tokens").contrasts[0]
    contrast.ratios.clear()
    draws = np.full(9, value)
    contrast.ratios["sums"] = Ratio(value, (10.0, math.inf), min(best), best, draws)
    (line,) = ratio_readings(contrast)
    assert line.startswith("sums: ") and expected in line


def test_the_summary_of_ratios_is_of_every_task(whole):
    contrast = named(whole, "tokens").contrasts[0]
    first, second = contrast.first.label, contrast.second.label
    contrast.ratios.clear()
    assert ratio_summary(contrast) == ""
    for task, value in (("sums", 2.0), ("products", 8.0)):
        draws = np.full(9, value)
        contrast.ratios[task] = Ratio(value, (value, value), 0.5, (0.5, 0.5), draws)
    assert ratio_summary(contrast) == (
        f"geometric mean over tasks: {second} generates 4.0{TIMES} the tokens of {first} "
        f"[4.0{TIMES}, 4.0{TIMES}]"
    )
    contrast.ratios["letters"] = Ratio(math.inf, None, 0.5, (0.6, 0.2), np.full(9, math.inf))
    assert ratio_summary(contrast) == (
        f"tokens of {second} over those of {first}, for what both reach: sums 2.0{TIMES} "
        f"[2.0{TIMES}, 2.0{TIMES}], products 8.0{TIMES} [8.0{TIMES}, 8.0{TIMES}], letters none"
    )


def test_the_numbers_are_those_of_the_runs(whole):
    comparison = named(whole, "methods")
    arm = next(arm for arm in comparison.arms if arm.name == "opsd")
    rows = [whole["runs"][f"sums-opsd-s{seed}"]["evaluations"] for seed in range(3)]
    assert arm.final["sums"].value == pytest.approx(np.mean([r[-1]["accuracy"] for r in rows]))
    best = [max(row["accuracy"] for row in r[1:]) for r in rows]
    assert arm.best["sums"].value == pytest.approx(np.mean(best))
    assert arm.cost["tokens"] == 12400
    assert arm.cost["seconds"] == pytest.approx(4 + 40 * 310 / 60 / 40 + 60)
    base = comparison.arms[0]
    assert base.final["sums"].value == pytest.approx(rows[0][0]["accuracy"])
    contrast = comparison.contrasts[0]
    assert contrast.tasks["sums"].value == pytest.approx(
        arm.final["sums"].value - base.final["sums"].value
    )
    assert contrast.total.value == pytest.approx(
        np.mean([e.value for e in contrast.tasks.values()])
    )


def test_the_base_model_is_what_most_runs_start_from():
    results = made_up.made_up(problems=20, seeds=1)
    other = results["runs"]["sums-sft-s0"]["evaluations"][0]  # as with a prompt of its own
    usual, other["correct"] = other["correct"], "1" * 20
    base = base_outcomes(results, results["experiments"][0], "sums")
    assert "".join("01"[int(v)] for v in base.values[0, 0]) == usual


def test_there_is_no_token_ratio_without_the_evaluation_before_training():
    results = made_up.made_up(problems=20, seeds=2)
    assert named(results, "tokens").contrasts[0].ratios.keys() == made_up.TASKS.keys()
    for seed in range(2):  # as if the run that had to make it had failed
        del results["runs"][f"sums-grpo-s{seed}"]["evaluations"][0]
    comparison = named(results, "tokens")
    assert comparison.contrasts[0].ratios.keys() == {"products", "letters"}
    assert comparison.contrasts[0].tasks.keys() == made_up.TASKS.keys()


def test_runs_on_other_problems_are_refused():
    results = made_up.made_up(problems=20, seeds=2)
    results["runs"]["sums-opsd-s1"]["evaluations"][0]["correct"] += "1"
    arm = results["experiments"][0]["arms"][-1]
    with pytest.raises(UserError, match="on 20 to 21 problems; they must be on the same"):
        run_outcomes(results, arm, "sums")


def test_the_page_needs_nothing_but_itself(folder):
    page = (folder / "study.html").read_text()
    HTMLParser().feed(page)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "<script>" not in page
    assert page.count('src="data:image/svg+xml') == len(list((folder / "figures").iterdir()))


def test_the_page_says_what_is_not_there(folder):
    page = (folder / "study.html").read_text()
    assert "2 failed (letters-star-s1, length-sums-length-5); 1 missing (products-jsd-s2)" in page
    assert "79 of 81" in page
    assert "RuntimeError: out of memory" in page
    assert "not on all tasks; products" in page  # pass@8 without the failed sampling


def test_the_page_has_every_command(folder):
    results = json.loads((folder / "results.json").read_text())
    page = (folder / "study.html").read_text()
    for part in (*results["runs"].values(), *results["samplings"].values(), results["memory"]):
        assert part["command"] in page
    for experiment in results["experiments"]:
        assert experiment["command"] in page
        assert experiment["command"] in (folder / "study.md").read_text()


def test_pictures_are_small_and_whole(folder):
    files = list((folder / "figures").iterdir())
    assert sum(file.stat().st_size for file in files) < 600_000
    assert {file.name.split("-")[0] for file in files} == {
        "methods", "tokens", "objectives", "memory", "length", "diagnostics",
    }  # fmt: skip
    for file in files:
        assert file.read_text().rstrip().endswith("</svg>")
    links = re.findall(r"\(figures/(.*?)\)", (folder / "study.md").read_text())
    assert set(links) == {file.name for file in files if not file.name.startswith("diagnostics")}


def test_a_study_without_any_run(tmp_path):
    results = made_up.made_up(problems=20)
    for run in results["runs"].values():
        run |= {"status": "missing", "evaluations": [], "seconds": None, "tokens": None}
        run |= {"steps": 0, "peak_memory_mib": None, "teacher": None, "diagnostics": None}
    for sampling in results["samplings"].values():
        sampling |= {"status": "missing", "scores": None, "correct": None}
    results |= {"memory": None, "commit": None, "seconds": 0}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_page(tmp_path).read_text()
    assert "0 of 81" in page and "not measured" in page


def test_the_part_of_the_page_is_replaced(whole):
    text = "before\n<!-- study -->\nold\n<!-- /study -->\nafter\n"
    whole = whole | {"experiments": whole["experiments"][:1]}
    new = rewrite(text, whole)
    assert new.startswith("before\n<!-- study -->\n") and new.endswith("<!-- /study -->\nafter\n")
    assert "old" not in new
    assert rewrite(new, whole) == new
    for bad in ("no part", text * 2):
        with pytest.raises(UserError, match="it needs one"):
            rewrite(bad, whole)


def test_the_summary_has_the_table_and_a_line_an_experiment(whole):
    block = summary(whole)
    comparison = main_comparison([compare(whole, e) for e in whole["experiments"]])
    _, rows = accuracy_table(whole, comparison)
    assert [row[0] for row in rows] == [
        *(made_up.ARMS[name][0] for name in ("base", "sft", "grpo", "star", "context-distill")),
        "OPSD, 1 sample",
        "always the most frequent answer",
    ]
    for row in rows:
        assert f"| {' | '.join(row)} |" in block
    flat = " ".join(block.split())
    assert whole["device"] in flat and "`python -m benchmarks.study`" in flat
    for paper in ("Table 2", "Figure 3", "Table 3", "Figure 4"):
        assert f"({paper}), points: " in flat
    assert "step of 2,048 tokens: 6,225 MiB with plain logits, 1,617 MiB" in flat


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match=r"has no results\.json"):
        write_page(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        write_page(tmp_path)


def test_the_page_needs_no_torch():
    modules = "sys, benchmarks.study.page, benchmarks.study.diagnostics"
    code = f"import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
