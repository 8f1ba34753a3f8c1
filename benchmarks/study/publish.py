"""A finished study's results, page and pictures in docs/study/, its summary in docs/benchmarks.md.

    python -m benchmarks.study.publish STUDY_FOLDER [docs/benchmarks.md]

They go into study/ beside the page, whose part between the study's markers is written again.
`python -m benchmarks.report` then writes the README's row of the study.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.outcomes import load_results
from benchmarks.study.page import write_page
from benchmarks.study.tables import rewrite
from opsd_train.config.errors import UserError
from opsd_train.reporting.metrics_log import replace_file


def publish(folder: Path, page: Path) -> Path:
    """Returns the folder that was written."""
    results = load_results(folder)
    text = rewrite(page.read_text(encoding="utf-8"), results)
    target = page.parent / "study"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copy2(folder / "results.json", target)
    write_page(target)
    replace_file(page, text)
    return target


def main(arguments: Sequence[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        usage = "python -m benchmarks.study.publish STUDY_FOLDER [docs/benchmarks.md]"
        print(f"usage: {usage}", file=sys.stderr)
        return 2
    folder, *rest = map(Path, arguments)
    try:
        print(publish(folder, rest[0] if rest else Path("docs/benchmarks.md")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
