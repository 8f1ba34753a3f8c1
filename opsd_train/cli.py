"""The command line: parse a command, load its recipe with overrides, and run it.

This module does not import torch at the top, so that help, lists and errors appear at once.
"""

import argparse
import errno
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from opsd_train.config.errors import UserError
from opsd_train.config.load import (
    RecipeKind,
    config_from,
    known_keys,
    load_recipe,
    recipe_description,
    recipe_names,
)
from opsd_train.config.schema import Config

DEFAULT_RECIPE = "demo/opsd"
PROGRAM = "python -m opsd_train"
# Errors of a path that cannot be written to; other OSErrors are bugs.
BAD_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
# Read by tqdm, datasets and huggingface_hub when they are imported: no loading bars in a log.
NO_LOADING_BARS = dict.fromkeys(
    ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"), "1"
)
TRAINING = "RECIPE"  # training has no command word: the recipe takes its place
EVAL_USAGE = "python -m opsd_train eval MODEL_OR_RUN --set SET,SET"
KINDS: dict[RecipeKind, str] = {
    "train": "Training:",
    "eval": "Evaluation (eval --recipe):",
}

USAGE = """\
python -m opsd_train                          run the demo, recipe demo/opsd
python -m opsd_train RECIPE KEY=VALUE ...     run a recipe (a name or a .yaml file) with overrides
python -m opsd_train RECIPE --dry-run         print the resolved config and the plan, run nothing
python -m opsd_train RECIPE --dry-run --ranks N --device h100|a100
                                              and each rank's memory and a step's time on N of them
python -m opsd_train RECIPE ... --resume      continue after the newest checkpoint in output_dir
torchrun --nproc_per_node N -m opsd_train RECIPE ... [--shard full|none]
                                              N processes: weights sharded (FSDP2) or copied to each
python -m opsd_train cache-teacher RECIPE KEY=VALUE ...
                                              write what the recipe's teacher predicts of the
                                              solutions to distill.cache; continues if interrupted
python -m opsd_train eval MODEL_OR_RUN --set SET,SET [--recipe RECIPE] KEY=VALUE ...
                                              generate, grade and score; continues if interrupted
    SET: aime24 aime25 hmmt25 amo-bench math-500, heldout (of the run) or a run's folder, a task of
    reasoning_gym, a file (.jsonl .json .csv .parquet); RECIPE: paper/eval, demo/eval or a .yaml
python -m opsd_train eval ... --against FOLDER        and the difference to another evaluation
python -m opsd_train eval ... --regrade               grade saved completions again, without a model
python -m opsd_train recipes                  list the recipes
python -m opsd_train report RUN_DIR           write RUN_DIR/report.html again
python -m opsd_train export RUN_DIR [OUT]     write the newest checkpoint's adapter (PEFT)
python -m opsd_train export RUN_DIR [OUT] --merged
                                              write the whole model (transformers)
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({PROGRAM} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; bad input prints one line on stderr and gives 2."""
    if not sys.stderr.isatty():
        os.environ.update(NO_LOADING_BARS)
    try:
        name, options = _parse(sys.argv[1:] if argv is None else argv)
        if not options.help:
            return COMMANDS[name].run(options) or 0
        print(_help())
        return 0
    except UserError as error:
        return _fail(error)
    except OSError as error:
        if error.errno in BAD_PATH and error.filename:
            return _fail(
                f"cannot write {error.filename}: {error.strerror}; choose another output_dir"
            )
        if error.errno != errno.ENOSPC:
            raise
        # If the checkpoint failed first and then the report, the checkpoint's error says more.
        first: BaseException = error
        while isinstance(first, OSError) and first.__context__ is not None:
            first = first.__context__
        full = "the disk of the run folder is full; make room and continue with --resume"
        return _fail(first if isinstance(first, UserError) else full)
    except KeyboardInterrupt:  # before training starts; from then on run.py handles signals
        print("interrupted", file=sys.stderr)
        return 130


def _fail(reason: UserError | str) -> int:
    label = "error:" if _is_main() else f"error (rank {os.environ['RANK']}):"
    print(label, " ".join(str(reason).split()), file=sys.stderr)
    return 2


def _parse(argv: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """The command's name and its options."""
    arguments = list(argv)
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name in COMMANDS:
        arguments.remove(name)
    else:  # a recipe, an override, or the value of an option
        name = TRAINING
    _refuse_other_commands_options(name, arguments)
    return name, _parser(name).parse_intermixed_args(arguments)


def _parser(name: str) -> _Parser:
    parser = _Parser(prog=f"{PROGRAM} {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    for option, settings in COMMANDS[name].options.items():
        parser.add_argument(option, **settings)
    return parser


def _refuse_other_commands_options(name: str, arguments: Sequence[str]) -> None:
    """Raise UserError for an option of another command, naming the command."""
    for argument in arguments:
        option = argument.partition("=")[0]
        owners = [other for other, command in COMMANDS.items() if option in command.options]
        if owners and name not in owners:
            raise UserError(f"{option} is an option of {PROGRAM} {owners[0]}, not of {name}")


def _train(options: argparse.Namespace) -> int:
    name, config = _config(options.words)
    if not options.dry_run:
        for option in ("ranks", "device"):
            if getattr(options, option) is not None:
                raise UserError(f"--{option} is for predictions; add --dry-run")
        if not sys.stdout.isatty() and _is_main():  # a log begins before torch is imported
            print(_plan(name, config), flush=True)
        from opsd_train.run import train

        return train(config, resume=options.resume, shard=options.shard)
    from opsd_train.dry_run.plan import dry_run

    print(dry_run(config, options.shard, options.ranks, options.device))
    return 0


def _cache_teacher(options: argparse.Namespace) -> None:
    _, config = _config(options.words)
    from opsd_train.cache_teacher import cache_teacher

    cache_teacher(config)


def _recipes(options: argparse.Namespace) -> None:
    _expect_words(options.words, "recipes", 0)
    print(_recipe_list())


def _report(options: argparse.Namespace) -> None:
    _expect_words(options.words, "report RUN_DIR", 1)
    from opsd_train.reporting.html import write_report

    print(write_report(options.words[0]))


def _config(words: list[str]) -> tuple[str, Config]:
    """The recipe's name, and what it says with the overrides."""
    has_recipe = bool(words) and "=" not in words[0]
    name = words[0] if has_recipe else DEFAULT_RECIPE
    return name, config_from(load_recipe(name), words[1:] if has_recipe else words)


def _plan(name: str, config: Config) -> str:
    """What a run is about to do, in a line."""
    model = config.model
    return (
        f"{name}: {config.steps} steps of {config.method} with {model.name_or_path} "
        f"({model.dtype}, device {model.device}); loading"
    )


def _is_main() -> bool:
    """Whether this is the only process, or rank 0 of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def _export(options: argparse.Namespace) -> None:
    words = options.words
    if not 1 <= len(words) <= 2:
        raise UserError("usage: python -m opsd_train export RUN_DIR [OUT] [--merged]")
    from opsd_train.checkpoint.export import export

    out = Path(words[1]) if len(words) > 1 else None
    print(export(Path(words[0]), out, merged=options.merged))


def _eval(options: argparse.Namespace) -> None:
    words = options.words
    if not words or "=" in words[0] or not (options.set or options.regrade):
        raise UserError(f"usage: {EVAL_USAGE} [KEY=VALUE ...]")
    from opsd_train.evaluation.settings import EvalConfig, default_folder

    source, sets = words[0], options.set.split(",") if options.set else []
    recipe = load_recipe(options.recipe, "eval")
    if recipe["output_dir"] is None:
        recipe["output_dir"] = default_folder(source, options.recipe, sets)
    config = config_from(recipe, words[1:], EvalConfig)
    from opsd_train.evaluation.evaluate import evaluate, print_difference, regrade

    folder: str | Path = config.output_dir
    if options.regrade:
        folder = regrade(config, source)
    else:
        evaluate(config, source, sets)
    if options.against and _is_main():
        print_difference(folder, options.against)


def _positive(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"should be a whole number, got {text!r}")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, got {text}")
    return int(text)


@dataclass(frozen=True)
class Command:
    """The function that runs a command, and its options with their argparse settings."""

    run: Callable[[argparse.Namespace], int | None]
    options: dict[str, dict[str, Any]]


_FLAG = {"action": "store_true"}
COMMANDS = {
    TRAINING: Command(
        _train,
        {
            "--dry-run": _FLAG,
            "--ranks": {"type": _positive},
            "--device": {"choices": ("h100", "a100")},
            "--resume": _FLAG,
            "--shard": {"choices": ("full", "none"), "default": "full"},
        },
    ),
    "cache-teacher": Command(_cache_teacher, {}),
    "eval": Command(
        _eval,
        {"--set": {}, "--recipe": {"default": "paper/eval"}, "--against": {}, "--regrade": _FLAG},
    ),
    "recipes": Command(_recipes, {}),
    "report": Command(_report, {}),
    "export": Command(_export, {"--merged": _FLAG}),
}


def _expect_words(words: list[str], usage: str, count: int) -> None:
    if len(words) != count:
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
