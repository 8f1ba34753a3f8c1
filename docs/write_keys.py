"""Writes docs/keys.md: every key of a recipe with its default and meaning."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from opsd_train.config.load import alternatives, descriptions
from opsd_train.config.schema import Config
from opsd_train.evaluation.settings import EvalConfig

PAGE = Path(__file__).with_name("keys.md")
INTRO = """\
# Keys

Every key of a recipe, as `python -m opsd_train --help` lists them; `key=value` on the command line
changes one. "required" is what a recipe must have (`output_dir` is then `runs/` and its name). This
page is written by `python docs/write_keys.py`.
"""


def page() -> str:
    parts = [INTRO, "## Training", _table(Config), "## Evaluation", _table(EvalConfig)]
    return "\n".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def _table(config: type) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|", *_rows(config, "")]
    return "\n".join(lines) + "\n"


def _rows(section: type, prefix: str) -> list[str]:
    """A row for each key; a section has one too if it says something of itself."""
    rows, texts = [], descriptions(section)
    for name, field in section.__pydantic_fields__.items():
        inner = next(filter(dataclasses.is_dataclass, alternatives(field.annotation)), None)
        if inner is None or texts[name]:
            meaning = " ".join(texts[name].split()).replace("|", "\\|")
            rows.append(f"| `{prefix}{name}` | {_default(field)} | {meaning}{_choices(field)} |")
        if inner is not None:
            rows += _rows(inner, f"{prefix}{name}.")
    return rows


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default_factory() if field.default_factory else field.default
    return "" if dataclasses.is_dataclass(value) else f"`{json.dumps(value)}`"


def _choices(field: Any) -> str:
    if typing.get_origin(field.annotation) is not typing.Literal:
        return ""
    return f" One of {', '.join(f'`{choice}`' for choice in typing.get_args(field.annotation))}."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
