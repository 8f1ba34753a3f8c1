"""The configuration: recipes in YAML, overrides from the command line, one checked Config."""

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from opsd_train.errors import UserError
from opsd_train.sections import (
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Positive,
    PromptsConfig,
    ReportConfig,
    RolloutConfig,
    section,
)

RECIPES = Path(__file__).parent / "recipes"


@section
class Config:
    """Everything a run is made of."""

    method: Literal["opsd"] = "opsd"
    """Training method."""
    seed: int = 0
    """Seed of everything random but the data."""
    output_dir: str
    """The run folder."""
    steps: Positive
    """Optimizer steps."""
    problems_per_step: Positive
    """Problems, and so completions, in one optimizer step."""
    micro_batch_tokens: Positive
    """Most tokens, padding included, that one forward pass takes."""
    model: ModelConfig
    lora: LoraConfig
    data: DataConfig
    prompts: PromptsConfig
    rollout: RolloutConfig
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig
    evaluation: EvaluationConfig
    report: ReportConfig = Field(default_factory=ReportConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.evaluation.problems > self.data.heldout_size:
            raise ValueError(
                f"evaluation.problems={self.evaluation.problems} is more than "
                f"data.heldout_size={self.data.heldout_size}"
            )
        if self.optim.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} is more than steps={self.steps}"
            )
        return self


class _Loader(yaml.SafeLoader):
    """yaml.safe_load that reads 3e-4 as a number; YAML 1.1 wants 3.0e-4."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """yaml.safe_dump that writes long prompts as readable blocks."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    files = RECIPES.rglob("*.yaml")
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in files)


def recipe_description(name: str) -> str:
    """The first line of a recipe's comment."""
    with open(_recipe_path(name), encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def load_recipe(name: str) -> dict[str, Any]:
    """Reads a recipe by name or path. One that names another as `base` is laid over it."""
    path = _recipe_path(name)
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_yaml_reason(error)}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is not a recipe: it holds no keys")
    if "base" in recipe:
        base = str(recipe.pop("base"))
        if base not in recipe_names():
            raise UserError(f"{path}: base {base!r} is not a recipe{suggest(base, recipe_names())}")
        recipe = merge(load_recipe(base), {"output_dir": _default_output_dir(name)} | recipe)
    recipe.setdefault("output_dir", _default_output_dir(name))
    return recipe


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lays `changes` over `base`: sections key by key, everything inside a section as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = {**base[key], **value} if both else value
    return merged


def config_from(recipe: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Applies overrides ("optim.lr=3e-4") to a recipe and checks the result."""
    merged = json.loads(_as_json(recipe))
    for override in overrides:
        _apply(merged, override)
    try:
        # As JSON, because strict types and nested sections do not go together otherwise.
        return TypeAdapter(Config).validate_json(_as_json(merged), strict=True)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def to_yaml(config: Config) -> str:
    """The resolved configuration, as a recipe that gives it again."""
    return yaml.dump(
        dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def known_keys(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """Every key with its description, sections flattened: {"optim.lr": "Peak learning rate.", …}"""
    keys = {}
    for name, field in cls.__pydantic_fields__.items():
        if dataclasses.is_dataclass(field.annotation):
            keys |= known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field.description
    return keys


def suggest(word: str, known: list[str]) -> str:
    """A tail for an error message: the known word nearest to a wrong one, or nothing."""
    tails = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(word, known, n=1) or [
        tails[tail] for tail in difflib.get_close_matches(word, tails, n=1)
    ]
    return f"; did you mean {near[0]}?" if near else ""


def _default_output_dir(name: str) -> str:
    stem = name if name in recipe_names() else Path(name).stem
    return "runs/" + stem.replace("/", "-")


def _recipe_path(name: str) -> Path:
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise UserError(f"there is no recipe file {name}")
        return Path(name)
    raise UserError(f"unknown recipe {name!r}{suggest(name, recipe_names())}")


def _apply(recipe: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"expected key=value, got {override!r}")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: cannot read {text!r}: {_yaml_reason(error)}; quote it") from None
    *parents, last = key.split(".")
    node = recipe
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"{key}: {parent} is a value, not a section")
    node[last] = value


def _as_json(value: Any) -> str:
    # YAML also knows dates; as text they give the same "wrong type" error as any other text.
    return json.dumps(value, default=str)


def _yaml_reason(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _explain(error: ValidationError) -> str:
    """One line about the first problem; an unknown key goes first, since it explains the others."""
    problems = sorted(error.errors(), key=lambda p: p["type"] != "unexpected_keyword_argument")
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].replace("Input should be", "should be")
    if first["type"] == "unexpected_keyword_argument":
        line = f"unknown key {key}{suggest(key, list(known_keys()))}"
    elif first["type"] == "missing":
        line = f"missing key {key}"
    elif first["type"] == "value_error":
        line = reason.removeprefix("Value error, ")
    elif first["type"] == "dataclass_type":
        line = f"{key}: should be a section of keys, got {first['input']!r}"
    else:
        line = f"{key}: {reason}, got {first['input']!r}"
    more = len(problems) - 1
    return line + (f" (and {more} more)" if more else "")
