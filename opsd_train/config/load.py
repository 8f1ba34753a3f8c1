"""Read YAML recipes and command-line overrides into one checked Config."""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import yaml
from pydantic import TypeAdapter, ValidationError

from opsd_train.config.errors import UserError, explain, suggest, yaml_reason
from opsd_train.config.schema import Config

RECIPES = Path(__file__).parents[1] / "recipes"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number; YAML 1.1 requires 3.0e-4."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes multi-line prompts as literal blocks."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


RecipeKind = Literal["train", "eval"]
"""The command that a recipe is for."""

ConfigClass = TypeVar("ConfigClass")


def recipe_names(kind: RecipeKind = "train") -> list[str]:
    """Names of the package's recipes of this kind, such as "demo/opsd", sorted."""
    files = [file.relative_to(RECIPES) for file in RECIPES.rglob("*.yaml")]
    return sorted(f.with_suffix("").as_posix() for f in files if _kind(f) == kind)


def _kind(file: Path) -> RecipeKind:
    return "eval" if file.stem == "eval" else "train"


def recipe_description(name: str) -> str:
    """The first line of a packaged recipe, without its comment mark."""
    with open(RECIPES / f"{name}.yaml", encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def load_recipe(name: str, kind: RecipeKind = "train") -> dict[str, Any]:
    """Read a recipe by the name of a packaged one or by the path of a YAML file.

    A recipe with the key `base` is merged over the recipe of that name. `output_dir` defaults to
    runs/NAME. Raises UserError if there is no such recipe, or if it cannot be read.
    """
    path = _recipe_path(name, kind)
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {yaml_reason(error)}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is not a recipe: it has no keys")
    if "base" in recipe:
        base = str(recipe.pop("base"))
        if base not in recipe_names(kind):
            near = suggest(base, recipe_names(kind))
            raise UserError(f"{path}: base {base!r} is not a packaged recipe{near}")
        default = {"output_dir": _default_output_dir(name, kind)}
        recipe = merge(load_recipe(base, kind), default | recipe)
    recipe.setdefault("output_dir", _default_output_dir(name, kind))
    return recipe


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`: sections are merged key by key, the values inside them replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = {**base[key], **value} if both else value
    return merged


@overload
def config_from(recipe: dict[str, Any], overrides: Sequence[str] = ()) -> Config: ...


@overload
def config_from(
    recipe: dict[str, Any], overrides: Sequence[str] = (), cls: type[ConfigClass] = ...
) -> ConfigClass: ...


def config_from(
    recipe: dict[str, Any], overrides: Sequence[str] = (), cls: type[Any] = Config
) -> Any:
    """Apply overrides such as "optim.lr=3e-4" to a recipe and check the result.

    `cls`: Config, or another dataclass made with config.section. Raises UserError with one line
    about the first mistake.
    """
    merged, text_keys = json.loads(_as_json(recipe)), _text_keys(cls)
    for override in overrides:
        _apply(merged, override, text_keys)
    try:
        # As JSON: in Python mode, strict validation rejects a dict where a section is expected.
        return TypeAdapter(cls).validate_json(_as_json(merged), strict=True)
    except ValidationError as error:
        raise UserError(explain(error, list(known_keys(cls)))) from None


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, a recipe that gives the same configuration again."""
    return yaml.dump(
        dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def known_keys(cls: type[Any] = Config, prefix: str = "") -> dict[str, str]:
    """Every key with its description, sections flattened: {"optim.lr": "Peak learning rate.", …}"""
    keys: dict[str, str] = {}
    texts = descriptions(cls)
    for name, field in cls.__pydantic_fields__.items():
        # "Section | None" is a section too; its own description says what null means.
        section = _section(alternatives(field.annotation))
        if section is None or texts[name]:
            keys[prefix + name] = texts[name]
        if section is not None:
            keys |= known_keys(section, f"{prefix}{name}.")
    return keys


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that a key may have."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def descriptions(cls: type[Any]) -> dict[str, str]:
    """Each key's description; pydantic has those of a section's own keys, not of inherited ones."""
    texts: dict[str, str] = {}
    for section in reversed(cls.__mro__):
        for name, field in getattr(section, "__pydantic_fields__", {}).items():
            texts[name] = field.description or texts.get(name, "")
    return texts


def _section(kinds: Sequence[Any]) -> type[Any] | None:
    """The section among the alternatives of a key's type; None if there is none."""
    sections = (k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k))
    return next(sections, None)


def _default_output_dir(name: str, kind: RecipeKind) -> str:
    stem = name if name in recipe_names(kind) else Path(name).stem
    return "runs/" + stem.replace("/", "-")


def _recipe_path(name: str, kind: RecipeKind) -> Path:
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
    """The value of a text key: the text as it stands, or the content of its quotes."""
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


def _text_keys(cls: type[Any], prefix: str = "") -> dict[str, bool]:
    """The keys whose value is text, with whether it may be null."""
    keys: dict[str, bool] = {}
    for name, field in cls.__pydantic_fields__.items():
        kinds = alternatives(field.annotation)
        if (section := _section(kinds)) is not None:
            keys |= _text_keys(section, f"{prefix}{name}.")
        if str in kinds:
            keys[prefix + name] = type(None) in kinds
    return keys


def _as_json(value: Any) -> str:
    # YAML also has dates; as text they give the same "wrong type" error as other text.
    return json.dumps(value, default=str)
