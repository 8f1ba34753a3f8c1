"""Recipes in YAML with overrides from the command line, read into one checked Config."""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from opsd_train.config.errors import UserError, explain, suggest, yaml_reason
from opsd_train.config.schema import Config

RECIPES = Path(__file__).parents[1] / "recipes"


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


Kind = Literal["train", "eval"]  # what a recipe is for
Recipe = TypeVar("Recipe")


def recipe_names(kind: Kind = "train") -> list[str]:
    """Names of the recipes of a kind that come with the package."""
    files = [file.relative_to(RECIPES) for file in RECIPES.rglob("*.yaml")]
    return sorted(f.with_suffix("").as_posix() for f in files if _kind(f) == kind)


def _kind(file: Path) -> Kind:
    return "eval" if file.stem == "eval" else "train"


def recipe_description(name: str) -> str:
    """The first line of a recipe's comment."""
    with open(RECIPES / f"{name}.yaml", encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def load_recipe(name: str, kind: Kind = "train") -> dict[str, Any]:
    """Reads a recipe by name or path. One that names another as `base` is laid over it."""
    path = _recipe_path(name, kind)
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {yaml_reason(error)}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is not a recipe: it holds no keys")
    if "base" in recipe:
        base = str(recipe.pop("base"))
        if base not in recipe_names(kind):
            near = suggest(base, recipe_names(kind))
            raise UserError(f"{path}: base {base!r} is not a recipe{near}")
        default = {"output_dir": _default_output_dir(name, kind)}
        recipe = merge(load_recipe(base, kind), default | recipe)
    recipe.setdefault("output_dir", _default_output_dir(name, kind))
    return recipe


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lays `changes` over `base`: sections key by key, everything inside a section as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = {**base[key], **value} if both else value
    return merged


def config_from(
    recipe: dict[str, Any], overrides: Sequence[str] = (), cls: type[Recipe] = Config
) -> Recipe:
    """Applies overrides ("optim.lr=3e-4") to a recipe and checks the result."""
    merged, text_keys = json.loads(_as_json(recipe)), _text_keys(cls)
    for override in overrides:
        _apply(merged, override, text_keys)
    try:
        # As JSON, because strict types and nested sections do not go together otherwise.
        return TypeAdapter(cls).validate_json(_as_json(merged), strict=True)
    except ValidationError as error:
        raise UserError(explain(error, list(known_keys(cls)))) from None


def to_yaml(config: Any) -> str:
    """The resolved configuration, as a recipe that gives it again."""
    return yaml.dump(
        dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def known_keys(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """Every key with its description, sections flattened: {"optim.lr": "Peak learning rate.", …}"""
    keys = {}
    texts = _descriptions(cls)
    for name, field in cls.__pydantic_fields__.items():
        # "Section | None" is a section too; its own text says what null means.
        section_type = next(filter(dataclasses.is_dataclass, _alternatives(field.annotation)), None)
        if section_type is None or texts[name]:
            keys[prefix + name] = texts[name]
        if section_type is not None:
            keys |= known_keys(section_type, f"{prefix}{name}.")
    return keys


def _descriptions(cls: type) -> dict[str, str]:
    """Each key's text; pydantic knows those of a section's own keys, not of those it inherits."""
    found: dict[str, str] = {}
    for section in reversed(cls.__mro__):
        for name, field in getattr(section, "__pydantic_fields__", {}).items():
            found[name] = field.description or found.get(name, "")
    return found


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) or (annotation,)


def _default_output_dir(name: str, kind: Kind) -> str:
    stem = name if name in recipe_names(kind) else Path(name).stem
    return "runs/" + stem.replace("/", "-")


def _recipe_path(name: str, kind: Kind) -> Path:
    if name in recipe_names(kind):
        return RECIPES / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise UserError(f"there is no recipe file {name}")
        return Path(name)
    raise UserError(f"unknown recipe {name!r}{suggest(name, recipe_names(kind))}")


def _apply(recipe: dict[str, Any], override: str, text_keys: dict[str, bool]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"expected key=value, got {override!r}")
    value = _text_value(text, text_keys[key]) if key in text_keys else _yaml_value(key, text)
    *parents, last = key.split(".")
    node = recipe
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"{key}: {parent} is a value, not a section")
    node[last] = value


def _text_value(text: str, nullable: bool) -> str | None:
    """What a key of type text gets: the text as it stands, or what a quoted one says."""
    if nullable and text in ("", "null"):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        with suppress(yaml.YAMLError):
            return str(yaml.load(text, _Loader))
    return text


def _yaml_value(key: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: cannot read {text!r}: {yaml_reason(error)}; quote it") from None


def _text_keys(cls: type, prefix: str = "") -> dict[str, bool]:
    """The keys whose value is text, and whether null is one of their values."""
    keys = {}
    for name, field in cls.__pydantic_fields__.items():
        union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
        kinds = typing.get_args(field.annotation) if union else (field.annotation,)
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                keys |= _text_keys(kind, f"{prefix}{name}.")
        if str in kinds:
            keys[prefix + name] = type(None) in kinds
    return keys


def _as_json(value: Any) -> str:
    # YAML also knows dates; as text they give the same "wrong type" error as any other text.
    return json.dumps(value, default=str)
