"""The configuration: recipes in YAML, overrides from the command line, one checked Config."""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from opsd_train.config.errors import UserError
from opsd_train.config.schema import (
    CheckpointConfig,
    CurriculumConfig,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    GrpoConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OpsdConfig,
    OptimConfig,
    Positive,
    PromptsConfig,
    ReportConfig,
    RolloutConfig,
    WatchConfig,
    section,
)

RECIPES = Path(__file__).parents[1] / "recipes"

# What transformers, TRL and peft call a key; for suggestions only.
ELSEWHERE = {
    "adam_weight_decay": "optim.weight_decay",
    "attn_implementation": "model.attention",
    "bf16": "model.dtype",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "eval_steps": "evaluation.every",
    "learning_rate": "optim.lr",
    "logging_steps": "report.sample_every",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lora_target_modules": "lora.target_modules",
    "lr_scheduler_type": "optim.schedule",
    "max_completion_length": "rollout.max_new_tokens",
    "max_grad_norm": "optim.grad_clip",
    "max_prompt_length": "prompts.max_prompt_tokens",
    "max_steps": "steps",
    "model_name_or_path": "model.name_or_path",
    "num_generations": "rollout.samples_per_prompt",
    "per_device_train_batch_size": "problems_per_step",
    "r": "lora.rank",
    "report_to": "report.trackers",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "torch_dtype": "model.dtype",
    "warmup_ratio": "optim.warmup_steps",
}

METHODS = ("opsd", "sft", "grpo", "distill", "star", "context_distill")


@section
class Config:
    """Everything a run is made of."""

    method: Literal[METHODS] = "opsd"
    """Training method."""
    seed: int = 0
    """Seed of everything random but the data."""
    output_dir: str
    """The run folder."""
    steps: Positive
    """Steps: each one draws problems, and takes one optimizer step (grpo.updates may ask more)."""
    problems_per_step: Positive
    """Problems in one step, over all processes."""
    micro_batch_tokens: Positive
    """Most tokens, padding included, that one forward pass of one process takes."""
    model: ModelConfig
    lora: LoraConfig | None = None
    """null: all weights are trained."""
    data: DataConfig
    prompts: PromptsConfig
    rollout: RolloutConfig
    loss: LossConfig = Field(default_factory=LossConfig)
    opsd: OpsdConfig | None = None
    """Settings of method opsd; null: their defaults."""
    distill: DistillConfig | None = None
    """Settings of method distill, which needs them."""
    grpo: GrpoConfig | None = None
    """Settings of method grpo; null: their defaults."""
    curriculum: CurriculumConfig | None = None
    """Draw problems near the student's success rate; null: shuffled passes over all of them."""
    optim: OptimConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    watch: WatchConfig = Field(default_factory=WatchConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        for reason in self._misfits():
            raise ValueError(reason)
        return self

    def _misfits(self) -> Iterator[str]:
        """What does not go together, each a line for the user."""
        if self.evaluation.problems > self.data.heldout_size:
            yield (
                f"evaluation.problems={self.evaluation.problems} is more than "
                f"data.heldout_size={self.data.heldout_size}"
            )
        if self.optim.warmup_steps > self.steps:
            yield f"optim.warmup_steps={self.optim.warmup_steps} is more than steps={self.steps}"
        for name in ("opsd", "distill", "grpo"):
            if getattr(self, name) is not None and self.method != name:
                yield f"{name}.* are settings of method {name}; this recipe's is {self.method}"
        if self.method == "distill" and self.distill is None:
            yield "method=distill needs distill.teacher"
        if self.method not in ("opsd", "distill") and self.loss != LossConfig():
            yield f"loss.* shapes the divergence of opsd and distill, not {self.method}"
        solutions = self.method == "sft" or (self.distill and not self.distill.on_policy)
        if solutions and self.curriculum:
            yield "curriculum needs rollouts of the student, and this recipe trains on solutions"
        if solutions and self.rollout.samples_per_prompt > 1:
            yield "rollout.samples_per_prompt: this recipe trains on solutions, one a problem"
        if self.method == "grpo":
            yield from self._grpo_misfits(self.grpo or GrpoConfig())

    def _grpo_misfits(self, grpo: GrpoConfig) -> Iterator[str]:
        if self.rollout.samples_per_prompt < 2:
            yield "grpo compares samples of a problem: rollout.samples_per_prompt must be 2 or more"
        if grpo.importance_cap and (self.rollout.top_p < 1 or self.rollout.top_k > 0):
            yield (
                "grpo.importance_cap: with rollout.top_p or top_k the sampler's probabilities are "
                "not those of the policy; set it to null or sample from all tokens"
            )


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


Kind = Literal["train", "eval", "study"]  # what a recipe is for
Recipe = TypeVar("Recipe")


def recipe_names(kind: Kind = "train") -> list[str]:
    """Names of the recipes of a kind that come with the package."""
    files = [file.relative_to(RECIPES) for file in RECIPES.rglob("*.yaml")]
    return sorted(f.with_suffix("").as_posix() for f in files if _kind(f) == kind)


def _kind(file: Path) -> Kind:
    if file.parts[0] == "study":
        return "study"
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
        raise UserError(f"{path} is not valid YAML: {_yaml_reason(error)}") from None
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
        raise UserError(_explain(error, list(known_keys(cls)))) from None


def to_yaml(config: Any) -> str:
    """The resolved configuration, as a recipe that gives it again."""
    return yaml.dump(
        dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def known_keys(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """Every key with its description, sections flattened: {"optim.lr": "Peak learning rate.", …}"""
    keys = {}
    for name, field in cls.__pydantic_fields__.items():
        # "Section | None" is a section too; its own text says what null means.
        section_type = next(filter(dataclasses.is_dataclass, _alternatives(field.annotation)), None)
        if section_type is None or field.description:
            keys[prefix + name] = field.description
        if section_type is not None:
            keys |= known_keys(section_type, f"{prefix}{name}.")
    return keys


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) or (annotation,)


def suggest(word: str, known: list[str]) -> str:
    """A tail for an error message: the known word nearest to a wrong one, or nothing."""
    tails = {name.rpartition(".")[2]: name for name in known}
    elsewhere = ELSEWHERE.get(word.rpartition(".")[2])
    near = (
        [elsewhere]
        if elsewhere in known
        else [tails[word]]
        if word in tails  # the right key without its section
        else difflib.get_close_matches(word, known, n=1)
        or [tails[tail] for tail in difflib.get_close_matches(word, tails, n=1)]
    )
    return f"; did you mean {near[0]}?" if near else ""


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
        raise UserError(f"{key}: cannot read {text!r}: {_yaml_reason(error)}; quote it") from None


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


def _yaml_reason(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _explain(error: ValidationError, known: list[str]) -> str:
    """One line about the first problem; an unknown key goes first, since it explains the others."""
    problems = sorted(error.errors(), key=lambda p: p["type"] != "unexpected_keyword_argument")
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].replace("Input should be", "should be")
    if first["type"] == "unexpected_keyword_argument":
        line = f"unknown key {key}{suggest(key, known)}"
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
