"""The paper's experiments on a small model, and a page with their results.

    python -m benchmarks.study                             the full grid: a night of 2 CPU cores
    python -m benchmarks.study --quick                     fewer steps, seeds and arms
    python -m benchmarks.study --only methods,tokens --jobs 4

    python -m benchmarks.study --earlier docs/study/results.json    go on with a committed part

Finished runs are kept: the same command continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.study.run import study
from opsd_train.config.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every run finished, 1 if one failed, 2 after a one-line error."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps, seeds and arms")
    parser.add_argument("--only", help="names of experiments, separated by commas")
    parser.add_argument("--jobs", type=_at_least_one, help="runs at a time (2; on a GPU 4)")
    parser.add_argument("--out", metavar="FOLDER", help="the study's folder")
    parser.add_argument("--earlier", metavar="FILE", help="results.json of an earlier part")
    options = parser.parse_args(arguments)
    try:
        return study(
            quick=options.quick,
            only=options.only.split(",") if options.only else [],
            jobs=options.jobs,
            output_dir=options.out,
            earlier=options.earlier,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _at_least_one(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("at least one")
    return count


if __name__ == "__main__":
    sys.exit(main())
