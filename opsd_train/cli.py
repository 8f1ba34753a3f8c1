"""The command line: picks a recipe, applies overrides, starts the run.

Nothing here imports torch, so that help, lists and errors come at once.
"""

import argparse
import errno
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from opsd_train.config import (
    Config,
    config_from,
    known_keys,
    load_recipe,
    recipe_description,
    recipe_names,
)
from opsd_train.errors import UserError

DEFAULT_RECIPE = "demo/opsd"

USAGE = """\
python -m opsd_train                          run the demo, recipe demo/opsd
python -m opsd_train RECIPE KEY=VALUE ...     run a recipe (a name or a .yaml file) with changes
python -m opsd_train RECIPE --dry-run         print the resolved config and the plan, run nothing
python -m opsd_train RECIPE ... --resume      go on after the newest checkpoint in its output_dir
torchrun --nproc_per_node N -m opsd_train RECIPE ... [--shard full|none]
                                              N processes: weights sharded (FSDP2) or a copy on each
python -m opsd_train recipes                  list the recipes
python -m opsd_train report RUN_DIR           write RUN_DIR/report.html again
python -m opsd_train export RUN_DIR [OUT]     write the newest checkpoint's adapter (PEFT)
python -m opsd_train export RUN_DIR [OUT] --merged
                                              write the whole model (transformers)
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (python -m opsd_train --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; bad input gives one line on stderr and 2."""
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _fail(error)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # A checkpoint that did not fit says more than the report that did not fit after it.
        first: BaseException = error
        while isinstance(first, OSError) and first.__context__ is not None:
            first = first.__context__
        full = "the disk of the run folder is full; make room and go on with --resume"
        return _fail(first if isinstance(first, UserError) else full)
    except KeyboardInterrupt:  # before the run folder exists; later the trainer takes it
        print("interrupted", file=sys.stderr)
        return 130


def _fail(reason: UserError | str) -> int:
    rank = os.environ.get("RANK", "0")
    label = "error:" if rank == "0" else f"error (rank {rank}):"
    print(label, " ".join(str(reason).split()), file=sys.stderr)
    return 2


def _dispatch(argv: Sequence[str]) -> int:
    parser = _Parser(prog="opsd_train", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--shard", choices=("full", "none"), default="full")
    parser.add_argument("--merged", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    options = parser.parse_intermixed_args(argv)
    words = options.words
    if options.help:
        print(_help())
    elif words[:1] == ["recipes"]:
        _expect_words(words, "recipes", 0)
        print(_recipe_list())
    elif words[:1] == ["report"]:
        _expect_words(words, "report RUN_DIR", 1)
        from opsd_train.report import write_report

        print(write_report(words[1]))
    elif words[:1] == ["export"]:
        print(_export(words, options.merged))
    else:
        config = _config(words)
        if not options.dry_run:
            from opsd_train.run import train

            return train(config, resume=options.resume, shard=options.shard)
        from opsd_train.dry_run import dry_run

        print(dry_run(config, options.shard))
    return 0


def _config(words: list[str]) -> Config:
    named = bool(words) and "=" not in words[0]
    recipe = load_recipe(words[0] if named else DEFAULT_RECIPE)
    return config_from(recipe, words[1:] if named else words)


def _export(words: list[str], merged: bool) -> Path:
    if not 2 <= len(words) <= 3:
        raise UserError("usage: python -m opsd_train export RUN_DIR [OUT] [--merged]")
    from opsd_train.export import export

    return export(Path(words[1]), Path(words[2]) if len(words) > 2 else None, merged=merged)


def _expect_words(words: list[str], usage: str, count: int) -> None:
    if len(words) != count + 1:
        raise UserError(f"usage: python -m opsd_train {usage}")


def _recipe_list() -> str:
    width = max(map(len, recipe_names()))
    return "\n".join(f"{name:{width}}  {recipe_description(name)}" for name in recipe_names())


def _help() -> str:
    keys = known_keys()
    width = max(map(len, keys)) + 4
    lines = [
        textwrap.fill(
            description, 100, initial_indent=f"  {key:{width - 2}}", subsequent_indent=" " * width
        )
        for key, description in keys.items()
    ]
    recipes = textwrap.indent(_recipe_list(), "  ")
    usage = textwrap.indent(USAGE, "  ")
    return f"Usage:\n{usage}\nRecipes:\n{recipes}\n\nKeys:\n" + "\n".join(lines)
