"""The file of a search: recipe, genome, tasks, and how the search goes about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.evaluation.configured import ConfiguredTask
from mergekit_unconstrained.evaluation.settings import load_tasks, read_tasks
from mergekit_unconstrained.search.evolve import is_evolve, translated

SamplerName = Literal["cma", "tpe", "random", "grid", "nsga2"]
Baseline = Literal["uniform_grid", "uniform_random", "random"]
BASELINES: tuple[Baseline, ...] = ("uniform_grid", "uniform_random", "random")


class Strict(BaseModel):
    """A part of the file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Range(Strict):
    """The bounds of a parameter; what is not said comes from the method's specification."""

    low: float | None = None
    high: float | None = None
    start: float | None = None


class GenomeSettings(Strict):
    """Which numbers of the recipe are searched, and how finely (ours)."""

    parameters: dict[str, Range] | None = None
    """Name -> {low, high, start}, each optional. null: what the method takes per model, as far as
    it is a number and means something."""
    layers: int = Field(default=1, ge=0)
    """So many layers share their values; 0: all of them."""
    kinds: tuple[str, ...] = ("attention", "mlp")
    """Kinds of tensor with values of their own; everything else shares one. () for none. For
    methods without a coefficient table: parts of tensor names, as in mergekit's filters."""
    models: Literal["free", "tied"] = "free"
    """Whether every expert has values of its own."""
    outer: Literal["free", "tied"] = "tied"
    """Whether embedding, final norm and head have values each (layerwise only)."""
    negative_weights: bool = False
    """Weights from -1.5 instead of from 0."""
    smooth: bool = False
    """One value a group, and straight lines in between (mergekit's gradients); not layerwise."""


class Racing(Strict):
    """Dropping candidates that cannot win before all examples are scored (ours)."""

    enabled: bool = True
    """Whether any candidate is dropped."""
    slices: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of the examples after which a candidate is looked at."""
    z: float = Field(default=2.0, gt=0)
    """Dropped when so many standard errors below the best, example by example."""
    least: int = Field(default=16, ge=2)
    """Examples that a decision needs at least."""


class SearchSettings(Strict):
    """Everything a search file may say; tasks are read by evaluation/settings.py."""

    recipe: dict[str, Any]
    """As mergekit reads it, without what is searched."""
    genome: GenomeSettings = GenomeSettings()
    """Which of its numbers are searched."""
    sampler: SamplerName = "cma"
    """What draws the candidates; nsga2 keeps the tasks apart."""
    budget: int = Field(default=200, ge=1)
    """Candidates of the search, and of each baseline."""
    time: float | None = Field(default=None, gt=0)
    """Seconds after which no further candidate is begun, baselines apart."""
    population: int | None = Field(default=None, ge=2)
    """null: 4 + floor(3 ln n) (cma), 50 (nsga2)."""
    sigma: float = Field(default=1 / 6, gt=0)
    """First step of CMA-ES as a share of every gene's range."""
    uniform_first: int | None = Field(default=None, ge=0)
    """So many candidates of CMA-ES are uniform: one value a model for all layers and kinds. The
    strategy starts at the best of them (ours). They count as any other. 0: it starts at `start`.
    null: 30, or a third of a budget below 90."""
    separable_above: int = Field(default=64, ge=1)
    """More genes than that: CMA-ES with a diagonal covariance (ours)."""
    seed: int = 0
    """Of every draw: with one process the same seed and budget give the same result."""
    racing: Racing = Racing()
    """Candidates that cannot win are dropped on a part of the examples."""
    finalists: int = Field(default=5, ge=1)
    """So many best candidates are scored in full on the development split."""
    baselines: tuple[Baseline, ...] = ("uniform_grid", "uniform_random")
    """Searched too, with as many candidates, to be compared with."""
    batch_size: int = Field(default=16, ge=1)
    """Examples at a time; halved when memory runs out."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the live model; null: bfloat16 on an accelerator, else float32."""
    device: str | None = None
    """As torch names it; null: an accelerator where there is one."""
    memory: float = Field(default=0.5, gt=0, le=0.95)
    """Share of this machine's memory that parents and what is prepared of them may take."""
    allow_test_split: bool = False
    """Let benchmarks' test splits be optimised; mergekit-evolve's files cannot say so."""
    allow_code: bool = False
    """Run Python that the models write (tasks of kind `code` and `tools`)."""


def load_settings(path: Path) -> tuple[SearchSettings, Document]:
    """Settings and document of a search file; RecipeError names the key and the nearest word."""
    document = Document.read(str(path), "search file")
    if is_evolve(document.data):
        document = dataclasses.replace(document, data=translated(document), lines={}, spans={})
    data = document.data
    if not isinstance(data, dict):
        document.fail((), "a search file is a mapping with `recipe` and `tasks`")
    for key in ("recipe", "tasks"):
        if key not in data:
            document.fail((), f"has no `{key}`")
    own = {k: v for k, v in data.items() if k != "tasks"}
    if isinstance(own["recipe"], str):
        own["recipe"] = Document.read(str(path.parent / own["recipe"]), "recipe").data
    return validated(SearchSettings, own, document), document


def tasks_of(
    document: Document, path: Path, settings: SearchSettings
) -> tuple[ConfiguredTask, ...]:
    """The tasks of a search file, or of the file that it names; none of their examples is read."""
    given = document.data["tasks"]
    if isinstance(given, str):
        return load_tasks(path.parent / given, allow_code=settings.allow_code)
    return read_tasks(document, path.parent, allow_code=settings.allow_code)


def read_file(
    path: Path, changes: Mapping[str, Any]
) -> tuple[SearchSettings, Document, tuple[ConfiguredTask, ...]]:
    """Everything that a search file says; RecipeError. Imports neither torch nor mergekit.

    changes: settings that the command line overrides; None says nothing.
    """
    settings, document = load_settings(path)
    settings = settings.model_copy(update={k: v for k, v in changes.items() if v is not None})
    return settings, document, tasks_of(document, path, settings)


def validated(
    model: type[SearchSettings], data: Mapping[str, Any], document: Document
) -> SearchSettings:
    """Settings from plain data; RecipeError for the first thing that is wrong with it."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        place = tuple(problem["loc"])
        if problem["type"] == "extra_forbidden":
            fields: Any = model
            for part in place[:-1]:
                fields = fields.model_fields[str(part)].annotation
            document.fail(place, f"no such key. {suggest(str(place[-1]), fields.model_fields)}")
        document.fail(place, f"{problem['msg'].lower()}, not {problem['input']!r}")
