"""Plots, a page and the tables of README and docs from the benchmark's JSON; measures nothing.

python -m benchmarks.report                        # from benchmarks/results/*.json
python -m benchmarks.report runs/mine.json --out /tmp/report
python -m benchmarks.report --check                # exit 1 if a page is not up to date
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report.data import Case, Contender, Device, ReportError
from benchmarks.report.files import RESULTS, ROOT, load
from benchmarks.report.pages import rewrite
from benchmarks.report.tables import (
    GRADIENT_LIMIT,
    LOSS_LIMIT,
    MARK,
    NONE,
    demo_table,
    demo_text,
    dtype_text,
    environment_text,
    faster_text,
    fewer_calls,
    mib_text,
    overview_table,
    percent_text,
    ratio_text,
    settings_text,
    suspicious,
    time_text,
    train_step_table,
)

OUT = Path("runs/benchmarks/report")
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("index", "benchmarks", "demo", "gpu", "integrations")
    ),
]


@dataclass(frozen=True)
class Line:
    """A contender's line in a case's table on the page; without figures where it did not run."""

    name: str
    role: str
    wrong: bool
    fewer: str | None
    figures: tuple[str, ...]
    why_not: str | None
    remark: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        devices = load(options.paths or [RESULTS])
        changed = [page for page in options.pages if _rewrite(page, devices, options.check)]
        if options.check:
            return _verdict(changed)
        for page in changed:
            print(page)
        for path in write_report(devices, options.out):
            print(path)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="*", type=Path, help="JSON files or folders of them")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for PNGs and index.html")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=PAGES, help="Markdown files with marked tables"
    )
    parser.add_argument(
        "--check", action="store_true", help="only compare the pages; write nothing"
    )
    return parser.parse_args(arguments)


def _rewrite(path: Path, devices: list[Device], check: bool) -> bool:
    """Rewrites a page's marked parts; returns whether that changes it."""
    try:
        old = path.read_text(encoding="utf-8")
        new = rewrite(old, devices, path.name)
        if new != old and not check:
            _write(path, new)
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    return new != old


def _verdict(changed: list[Path]) -> int:
    for page in changed:
        print(f"{page} does not say what the JSON says: run python -m benchmarks.report")
    return int(bool(changed))


def write_report(devices: list[Device], folder: Path) -> list[Path]:
    """Writes the PNGs and index.html into a folder, and returns their paths."""
    try:
        # Only here: the pages and --check do without.
        import jinja2

        from benchmarks.report.plots import draw
    except ImportError as error:
        raise ReportError(f"the page needs {error.name}: pip install '.[train]'") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {device.name: draw(device, folder) for device in devices}
        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        environment = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
        )
        page = environment.get_template("page.html.j2").render(
            devices=[(device, _sections(device, pictures[device.name])) for device in devices],
            limits={"loss": LOSS_LIMIT, "gradient": GRADIENT_LIMIT},
            mark=MARK,
        )
        _write(folder / "index.html", page)
    except OSError as error:
        raise ReportError(f"{error.filename or folder}: {error.strerror}") from None
    paths = [picture.path for found in pictures.values() for picture in found]
    return [*paths, folder / "index.html"]


def _sections(device: Device, pictures: list[Any]) -> dict[str, Any]:
    """What the template shows of a device."""
    sources = [(source, environment_text(source.environment)) for source in device.sources()]
    cases = list(device.cases.values())
    return {
        "sources": sources,
        "overview": overview_table(cases) if cases else None,
        "pictures": [(p.title, _data_url(p.path)) for p in pictures],
        "steps": [
            (s, settings_text(s.settings), train_step_table(s)) for s in device.steps.values()
        ],
        "demos": [(d, demo_table(d), demo_text(d)) for d in device.demos.values()],
        "cases": [(case, _heading(case), _lines(case)) for case in cases],
        "skipped": sorted(device.skipped.items()),
    }


def _heading(case: Case) -> str:
    what = f"{case.title}, {case.head} head, {dtype_text(case)}, {case.inputs} inputs"
    return f"{what}; {case.shape}, {case.tokens:,} tokens"


def _lines(case: Case) -> list[Line]:
    return [
        Line(
            name=contender.name,
            role=contender.role,
            wrong=suspicious(contender.error),
            fewer=fewer_calls(case, contender),
            figures=_figures(case, contender) if contender.seconds else (),
            why_not=contender.why_not or "not measured",
            remark=contender.peak_why,
        )
        for contender in case.contenders
    ]


def _figures(case: Case, contender: Contender) -> tuple[str, ...]:
    times = (time_text(contender.seconds.get(p)) for p in ("forward", "backward", "both"))
    errors = [percent_text(contender.error.get("loss"), signed=True)]
    errors += [percent_text(contender.error.get(key)) for key in ("grad_hidden", "grad_weight")]
    ratio = ratio_text(case.floors(contender))
    faster = faster_text(case, contender) if contender.role == "ours" else NONE
    return (*times, ratio, faster, mib_text(case.peak(contender)), *errors)


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _write(path: Path, text: str) -> None:
    """The old file or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
