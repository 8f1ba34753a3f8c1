"""Numbers as text, and what an interval lets one conclude, compared with the paper."""

from __future__ import annotations

import math
from typing import Literal

from benchmarks.study.comparison import ACCURACY, Comparison, Contrast
from benchmarks.study.efficiency import Ratio, geometric_mean
from benchmarks.study.statistics import Estimate

NONE, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

Verdict = Literal["agrees", "disagrees", "cannot tell", "ahead", "behind", "incomplete"]


def percent(share: float) -> str:
    """ "42.1" for 0.421."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """In points with a sign: "+3.1"; "0.0" has none."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text[1:] == "0.0" else text.replace("-", MINUS)


def share_text(estimate: Estimate | None) -> str:
    """ "42.1 [36.0, 48.3]", in percent."""
    if estimate is None:
        return NONE
    return f"{percent(estimate.value)} [{percent(estimate.low)}, {percent(estimate.high)}]"


def difference_text(estimate: Estimate | None) -> str:
    """ "+3.1 [+0.4, +5.9]", in points."""
    if estimate is None:
        return NONE
    return f"{points(estimate.value)} [{points(estimate.low)}, {points(estimate.high)}]"


def times(ratio: float) -> str:
    """A ratio as text, also "not reached" for inf and "undefined" for nan."""
    if math.isnan(ratio):
        return "undefined"
    if math.isinf(ratio):
        return "not reached"
    return f"{ratio:.1f}{TIMES}" if ratio >= 0.95 or ratio == 0 else f"{ratio:.2f}{TIMES}"


def pair_text(contrast: Contrast) -> str:
    """The two arms of a contrast, and its measure unless that is the accuracy."""
    measure = "" if contrast.measure == ACCURACY else f", {contrast.measure}"
    return f"{contrast.first.label} {MINUS} {contrast.second.label}{measure}"


def decisive(comparison: Comparison, contrast: Contrast) -> tuple[Estimate | None, str]:
    """The difference to judge, and what it covers: the mean of the tasks, or the only task run."""
    if contrast.total is not None:
        count = len(comparison.tasks)
        return contrast.total, f"mean of {count} tasks" if count > 1 else comparison.tasks[0]
    if len(contrast.tasks) == 1:
        task, estimate = next(iter(contrast.tasks.items()))
        return estimate, f"{task} only"
    return None, ""


def verdict(estimate: Estimate | None, paper: str | None) -> Verdict:
    """What the interval says; one that ends at 0 includes 0. `paper`: see Contrast."""
    if estimate is None:
        return "incomplete"
    if estimate.low <= 0 <= estimate.high:
        return "cannot tell"
    ahead = "first" if estimate.low > 0 else "second"
    if paper is None:
        return "ahead" if ahead == "first" else "behind"
    return "agrees" if ahead == paper else "disagrees"


def reading(comparison: Comparison, contrast: Contrast) -> str:
    """A contrast in words."""
    estimate, where = decisive(comparison, contrast)
    if estimate is None:
        parts = [f"{task} {difference_text(e)}" for task, e in contrast.tasks.items()]
        known = f"not on all tasks; {'; '.join(parts)}" if parts else "not measured"
        return f"{pair_text(contrast)}: {known}."
    found = verdict(estimate, contrast.paper)
    first, second = contrast.first.label, contrast.second.label
    ends = f"{points(estimate.low)}, {points(estimate.high)}"
    text = f"{pair_text(contrast)}: {points(estimate.value)} points [{ends}] ({where}); "
    if found != "cannot tell":
        side, leader = ("above", first) if estimate.low > 0 else ("below", second)
        text += f"the interval is {side} 0: {leader} is ahead"
        text += ", as in the paper." if found == "agrees" else "."
    elif estimate.low == estimate.high:
        text += "both have the very same problems right."
    else:
        text += "the interval includes 0: this study cannot tell them apart."
    if contrast.paper is None or found == "agrees":
        return text
    return f"{text} The paper has {first if contrast.paper == 'first' else second} ahead."


def ratio_readings(contrast: Contrast) -> list[str]:
    """The token ratio of each task in words, and their geometric mean."""
    lines = [f"{task}: {_ratio_text(contrast, ratio)}" for task, ratio in contrast.ratios.items()]
    if len(contrast.ratios) > 1:
        mean, interval = geometric_mean(list(contrast.ratios.values()))
        if math.isfinite(mean) and mean > 0:
            lines.append(
                f"geometric mean over tasks: {contrast.second.label} generates {times(mean)} the "
                f"tokens of {contrast.first.label}{_interval_text(interval)}."
            )
    return lines


def ratio_summary(contrast: Contrast) -> str:
    """The token ratios in one part of a sentence: their geometric mean, or each task's."""
    lines = ratio_readings(contrast)
    if len(lines) > len(contrast.ratios):
        return lines[-1].rstrip(".")
    each = ", ".join(f"{task} {_ratio_cell(ratio)}" for task, ratio in contrast.ratios.items())
    first, second = contrast.first.label, contrast.second.label
    return each and f"tokens of {second} over those of {first}, for what both reach: {each}"


def _ratio_cell(ratio: Ratio) -> str:
    if math.isnan(ratio.value) or ratio.value in (0, math.inf):
        return "none"
    return times(ratio.value) + (_interval_text(ratio.interval) if ratio.interval else "")


def _ratio_text(contrast: Contrast, ratio: Ratio) -> str:
    first, second = contrast.first.label, contrast.second.label
    tops = {first: percent(ratio.best[0]), second: percent(ratio.best[1])}
    if math.isnan(ratio.value):
        return (
            f"neither {first} nor {second} rises above the model before training, so there is no "
            "ratio."
        )
    if ratio.value in (0, math.inf):
        rises, stays = (second, first) if ratio.value == 0 else (first, second)
        return (
            f"not reached: {stays} never rises above the model before training; {rises} "
            f"reaches {tops[rises]} %."
        )
    text = (
        f"for {percent(ratio.level)} %, the highest that both reach, {second} generates "
        f"{times(ratio.value)} the tokens of {first}{_interval_text(ratio.interval)}."
    )
    if ratio.best[0] != ratio.best[1]:
        higher, lower = (first, second) if ratio.best[0] > ratio.best[1] else (second, first)
        text += f" {higher} goes on to {tops[higher]} %, which {lower} does not reach."
    return text


def _interval_text(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return ", with no interval: too many draws have no ratio"
    return f" [{times(interval[0])}, {times(interval[1])}]"
