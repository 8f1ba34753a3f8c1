"""Sections of the study's recipes: recipes/shared.yaml and one file per experiment."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from opsd_train.config.load import config_from, load_recipe
from opsd_train.config.section import Positive, PositiveReal, section

RECIPES = Path(__file__).parent / "recipes"
Changes = list[str]  # "key=value", as on the command line
Kind = Literal["tuning", "accuracy", "tokens", "passk", "memory", "collapse"]


@section
class Task:
    """A task of the study."""

    label: str
    """Name on the page."""
    changes: Changes
    """Changes to the base recipe for this task."""


@section
class Size:
    """The size of the full or of the quick study."""

    seeds: Annotated[list[int], Field(min_length=1)]
    """Seeds; every arm runs once with each."""
    changes: Changes
    """Changes to the base recipe for every run: steps, problems and lengths."""
    memory_tokens: Annotated[list[Positive], Field(min_length=2)]
    """Completion tokens at which the peak memory of a step is measured."""


@section
class Shared:
    """What the experiments share: recipes/shared.yaml."""

    output_dir: str
    """The study's folder; the quick study's has -quick appended."""
    recipe: str
    """The training recipe that every run starts from."""
    tasks: dict[str, Task]
    """Tasks by short name."""
    experiments: Annotated[list[str], Field(min_length=1)]
    """Names of the experiments' recipes, in the order to run them."""
    full: Size
    quick: Size


@section
class Arm:
    """One of the settings that an experiment compares."""

    name: str
    """Short name, one word; the same in two experiments only for the same settings."""
    label: str
    """Name in tables and figures."""
    changes: Changes = Field(default_factory=list)
    """Changes to the base recipe, after those of size and task."""
    read_at: Positive | None = None
    """Step whose evaluation counts, where the arm's runs go on; null: the experiment's, or the
    last. Curves of accuracy against tokens have all."""
    base_model: bool = False
    """The model before training. It needs no run: a task's first run evaluates it."""


@section
class Sampling:
    """How pass@k is sampled."""

    samples: Positive
    """Completions of each held-out problem."""
    max_new_tokens: Positive
    """Longest completion."""
    temperature: PositiveReal
    """Sampling temperature."""


@section
class Quick:
    """How the quick study reduces an experiment."""

    tasks: list[str] | None = None
    """Tasks of the quick study; null: the same tasks."""
    seeds: list[int] | None = None
    """Seeds of the quick study; null: those of its Size."""
    arms: list[str] | None = None
    """Arms of the quick study; null: all."""
    leave_out: bool = False
    """true: the quick study does not have the experiment."""


@section
class Experiment:
    """One experiment: recipes/NAME.yaml."""

    title: str
    """Heading on the page."""
    paper: str
    """Where in the paper it is."""
    paper_says: str
    """What the paper found, in a sentence or two."""
    question: str
    """The question this experiment answers."""
    kind: Kind = "accuracy"
    """tuning: rates and steps of each method; accuracy: after training; tokens: against tokens
    generated; passk: by sampling; memory; collapse: with the signals of collapse."""
    tasks: list[str] = Field(default_factory=list)
    """Short names of the tasks; empty: all tasks."""
    seeds: list[int] = Field(default_factory=list)
    """Seeds; empty: those of the size."""
    changes: Changes = Field(default_factory=list)
    """Changes to the base recipe for every arm, after those of size and task."""
    read: list[int] = Field(default_factory=list)
    """tuning: the steps that may be chosen."""
    read_at: Positive | None = None
    """The arms' read_at, where they have none of their own."""
    arms: list[Arm] = Field(default_factory=list)
    """The arms to compare."""
    contrasts: list[tuple[str, str]] = Field(default_factory=list)
    """Pairs of arms whose paired difference is reported, first minus second."""
    paper_ahead: list[tuple[str, str]] = Field(default_factory=list)
    """Pairs of arms where the first is ahead of the second in the paper."""
    sampling: Sampling | None = None
    """passk: how every trained model of the first seed, and the base model, is sampled."""
    quick: Quick = Field(default_factory=Quick)
    """How the quick study reduces it."""


def load_shared() -> Shared:
    """Read recipes/shared.yaml."""
    return config_from(load_recipe(str(RECIPES / "shared.yaml")), cls=Shared)


def load_experiments(shared: Shared) -> dict[str, Experiment]:
    """Read the experiments' recipes; by name, in the order to run them."""
    return {name: _load(name) for name in shared.experiments}


def _load(name: str) -> Experiment:
    recipe = load_recipe(str(RECIPES / f"{name}.yaml"))
    del recipe["output_dir"]  # the setting of a training run; the study has one folder
    return config_from(recipe, cls=Experiment)
