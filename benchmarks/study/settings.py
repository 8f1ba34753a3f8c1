"""The study's recipes: what its experiments share, and each experiment."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from opsd_train.config.load import config_from, load_recipe
from opsd_train.config.schema import Positive, PositiveReal, section

RECIPES = Path(__file__).parent / "recipes"
Changes = list[str]  # "key=value", as on the command line
Kind = Literal["accuracy", "tokens", "passk", "memory"]


@section
class Task:
    label: str
    """What the page calls it."""
    changes: Changes
    """What makes the base recipe one for this task."""


@section
class Size:
    seeds: Annotated[list[int], Field(min_length=1)]
    """Every arm runs once with each."""
    changes: Changes
    """Steps, problems and lengths of every run, over the base recipe."""
    memory_tokens: Annotated[list[Positive], Field(min_length=2)]
    """Completion tokens at which the peak memory of a step is measured."""


@section
class Shared:
    output_dir: str
    """The study's folder; the quick one's ends in -quick."""
    recipe: str
    """The training recipe that every run starts from."""
    tasks: dict[str, Task]
    """By short name."""
    experiments: Annotated[list[str], Field(min_length=1)]
    """Their recipes, in the order they are run."""
    full: Size
    quick: Size


@section
class Arm:
    name: str
    """Short name, one word; the same in two experiments only for the same settings."""
    label: str
    """What tables and figures call it."""
    changes: Changes = Field(default_factory=list)
    """Over base recipe, task and size."""
    base_model: bool = False
    """The model before training: not a run, but what the first run of a task evaluates first."""


@section
class Sampling:
    samples: Positive
    """Completions of each held-out problem."""
    max_new_tokens: Positive
    """Longest completion."""
    temperature: PositiveReal
    """Sampling temperature."""


@section
class Quick:
    tasks: list[str] | None = None
    """Tasks of the quick study; null: the same."""
    seeds: list[int] | None = None
    """Seeds of the quick study; null: those of all its experiments."""
    arms: list[str] | None = None
    """Arms of the quick study; null: all."""


@section
class Experiment:
    title: str
    """Heading on the page."""
    paper: str
    """Where the paper shows it."""
    paper_says: str
    """What the paper found, in a sentence or two."""
    question: str
    """What is asked here."""
    kind: Kind = "accuracy"
    """accuracy: after training; tokens: against tokens generated; passk: by sampling; memory."""
    tasks: list[str] = Field(default_factory=list)
    """Short names; none: all."""
    arms: list[Arm] = Field(default_factory=list)
    """What is compared."""
    contrasts: list[tuple[str, str]] = Field(default_factory=list)
    """Pairs of arms whose paired difference is reported, first minus second."""
    paper_ahead: list[tuple[str, str]] = Field(default_factory=list)
    """Pairs of arms of which the paper has the first ahead of the second."""
    sampling: Sampling | None = None
    """passk: how every trained model of the first seed, and the base model, is sampled."""
    quick: Quick = Field(default_factory=Quick)
    """What the quick study leaves out."""


def load_shared() -> Shared:
    """recipes/shared.yaml."""
    return config_from(load_recipe(str(RECIPES / "shared.yaml")), cls=Shared)


def load_experiments(shared: Shared) -> dict[str, Experiment]:
    """The experiments by name, in their order."""
    return {name: _load(name) for name in shared.experiments}


def _load(name: str) -> Experiment:
    recipe = load_recipe(str(RECIPES / f"{name}.yaml"))
    del recipe["output_dir"]  # a run's; the study has one folder
    return config_from(recipe, cls=Experiment)
