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
    Kind,
    config_from,
    known_keys,
    load_recipe,
    recipe_description,
    recipe_names,
)
from opsd_train.errors import UserError

DEFAULT_RECIPE = "demo/opsd"
EVAL_USAGE = "python -m opsd_train eval MODEL_OR_RUN --set SET,SET"
STUDY_USAGE = "python -m opsd_train study [--quick] [--only EXPERIMENT,...] [output_dir=FOLDER]"
KINDS: dict[Kind, str] = {
    "train": "Training:",
    "eval": "Evaluation (eval --recipe):",
    "study": "The study:",
}

USAGE = """\
python -m opsd_train                          run the demo, recipe demo/opsd
python -m opsd_train RECIPE KEY=VALUE ...     run a recipe (a name or a .yaml file) with changes
python -m opsd_train RECIPE --dry-run         print the resolved config and the plan, run nothing
python -m opsd_train RECIPE ... --resume      go on after the newest checkpoint in its output_dir
torchrun --nproc_per_node N -m opsd_train RECIPE ... [--shard full|none]
                                              N processes: weights sharded (FSDP2) or a copy on each
python -m opsd_train eval MODEL_OR_RUN --set SET,SET [--recipe RECIPE] KEY=VALUE ...
                                              answers, checks and scores; goes on where it was left
    SET: aime24 aime25 hmmt25 amo-bench math-500, heldout (of the run) or a run's folder, a task of
    reasoning_gym, a file (.jsonl .json .csv .parquet); RECIPE: paper/eval, demo/eval or a .yaml
python -m opsd_train eval ... --against FOLDER        and the difference to another evaluation
python -m opsd_train eval ... --regrade               check what is kept again, without a model
python -m opsd_train study [--quick] [--only EXPERIMENT,...] [--jobs N] [output_dir=FOLDER]
                                              the paper's experiments on a small model, and a page
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
    parser.add_argument("--set")
    parser.add_argument("--recipe", default="paper/eval")
    parser.add_argument("--against")
    parser.add_argument("--regrade", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--jobs", type=int)
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
    elif words[:1] == ["eval"]:
        _eval(words, options)
    elif words[:1] == ["study"]:
        return _study(words, options)
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


def _eval(words: list[str], options: argparse.Namespace) -> None:
    if len(words) < 2 or "=" in words[1] or not (options.set or options.regrade):
        raise UserError(f"usage: {EVAL_USAGE} [KEY=VALUE ...]")
    from opsd_train.evaluation.settings import EvalConfig, default_folder

    source, sets = words[1], options.set.split(",") if options.set else []
    recipe = load_recipe(options.recipe, "eval")
    if recipe["output_dir"] is None:
        recipe["output_dir"] = default_folder(source, options.recipe, sets)
    config = config_from(recipe, words[2:], EvalConfig)
    from opsd_train.evaluation.evaluate import evaluate, print_difference, regrade

    if options.regrade:
        folder = regrade(config, source)
    else:
        evaluate(config, source, sets)
        folder = config.output_dir
    if options.against and os.environ.get("RANK", "0") == "0":
        print_difference(folder, options.against)


def _study(words: list[str], options: argparse.Namespace) -> int:
    folder = words[1].removeprefix("output_dir=") if len(words) == 2 else None
    if len(words) > 2 or (folder is not None and folder == words[1]):
        raise UserError(f"usage: {STUDY_USAGE}")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: at least one")
    from opsd_train.study.run import study

    only = options.only.split(",") if options.only else []
    return study(quick=options.quick, only=only, jobs=options.jobs, output_dir=folder)


def _expect_words(words: list[str], usage: str, count: int) -> None:
    if len(words) != count + 1:
        raise UserError(f"usage: python -m opsd_train {usage}")


def _recipe_list() -> str:
    parts = []
    for kind, heading in KINDS.items():
        names = recipe_names(kind)
        width = max(map(len, names))
        parts += [heading, *(f"{n:{width}}  {recipe_description(n)}" for n in names), ""]
    return "\n".join(parts[:-1])


def _key_list(cls: type) -> str:
    keys = known_keys(cls)
    width = max(map(len, keys)) + 4
    return "\n".join(
        textwrap.fill(
            description, 100, initial_indent=f"  {key:{width - 2}}", subsequent_indent=" " * width
        )
        for key, description in keys.items()
    )


def _help() -> str:
    from opsd_train.evaluation.settings import EvalConfig

    parts = {
        "Usage:": textwrap.indent(USAGE, "  "),
        "Recipes:": textwrap.indent(_recipe_list(), "  ") + "\n",
        "Keys:": _key_list(Config) + "\n",
        "Keys of eval:": _key_list(EvalConfig),
    }
    return "\n".join(f"{heading}\n{text}" for heading, text in parts.items())
