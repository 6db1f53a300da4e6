"""What a model card is rendered from: plain data, so that a card can be made again from a file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import ConfigDict, TypeAdapter

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class WeightFile:
    """One file: its name within the folder, sha256 in hex, size in bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    sha256: str
    size: int | None = None


@dataclass(frozen=True)
class Source:
    """Where weights came from.

    name: as shown, never an absolute path (names.display_name). hub_id: `org/name` on the Hub, None
    for a local folder. commit: the Hub's commit. licence: as its own card says it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    hub_id: str | None = None
    commit: str | None = None
    files: tuple[WeightFile, ...] = ()
    licence: str | None = None


@dataclass(frozen=True)
class Parent:
    """A model that was merged.

    role: base or expert. weight: in a few words (config.grid.summary). parameters: their number.
    adapter: what was added to `model` before merging.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    role: str
    model: Source
    adapter: Source | None = None
    weight: str = ""
    architecture: str = ""
    parameters: int | None = None

    @property
    def name(self) -> str:
        """What the card calls it: an adapter is told from others by its own name."""
        return (self.adapter or self.model).name

    @property
    def sources(self) -> tuple[Source, ...]:
        """The model and its adapter."""
        return (self.model,) if self.adapter is None else (self.model, self.adapter)


@dataclass(frozen=True)
class Method:
    """The merge method; operator and parameters as the recipe sets them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    pretty_name: str
    summary: str = ""
    paper: str = ""
    url: str = ""
    operator: str | None = None
    parameters: dict[str, str | int | float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One result of an evaluation; stderr and n None where they are not known."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    task: str
    metric: str
    model: str
    value: float
    stderr: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Teacher:
    """A source of a fusion.

    coverage, label_consistency: shares of the pivot's positions (fusion/alignment/by_bytes.py).
    won: share of conversations whose target came from it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    licence: str | None = None
    weight: float = 1.0
    coverage: float | None = None
    label_consistency: float | None = None
    won: float | None = None


@dataclass(frozen=True)
class Group:
    """Models of one architecture that were merged before the fusion; base None for a single one."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    base: str | None
    models: tuple[str, ...]


@dataclass(frozen=True)
class Fusion:
    """How the pivot was trained. left_out: rows by reason. training: settings as shown."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    pivot: str
    dataset: str
    conversations: int
    held_out: int
    teachers: tuple[Teacher, ...]
    training: dict[str, str | int | float]
    left_out: dict[str, int] = field(default_factory=dict)
    curves: str | None = None
    groups: tuple[Group, ...] = ()
    settings_name: str = "fuse.yml"


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says.

    recipe, coefficients: the texts of the recipe (with pinned ids) and of the coefficient table.
    command: what was run, without paths of this machine. heatmap: the picture's file name.
    tokenizer: whose it is, or what it was made of. repo_id: where the model is or will be on the
    Hub. outputs: the weight files written. fusion: for models that were trained. seconds: wall
    time. searched: how the coefficients were found, where a search found them; its report is
    report.md. unknown: sentences about what is not known, besides those that `unknowns` finds out
    itself.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    title: str
    method: Method
    parents: tuple[Parent, ...]
    recipe: str
    command: str
    versions: dict[str, str]
    outputs: tuple[WeightFile, ...] = ()
    recipe_name: str = "mergekit_config.yml"
    coefficients: str | None = None
    coefficients_name: str = "coefficients.yml"
    heatmap: str | None = None
    tokenizer: str = ""
    chat_template: bool = False
    dtype: str = ""
    seconds: float | None = None
    licence: str | None = None
    repo_id: str | None = None
    evaluation: tuple[Score, ...] = ()
    fusion: Fusion | None = None
    searched: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def base(self) -> Parent | None:
        """The base model, or the pivot of a fusion."""
        roles = ("base", "pivot")
        return next((parent for parent in self.parents if parent.role in roles), None)

    @property
    def experts(self) -> tuple[Parent, ...]:
        """Everything but the base model or pivot."""
        return tuple(p for p in self.parents if p.role not in ("base", "pivot"))

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every model and adapter once, in the order of the recipe."""
        found = [source for parent in self.parents for source in parent.sources]
        return tuple(dict.fromkeys(found))


def to_json(facts: CardFacts) -> str:
    """The facts as indented JSON."""
    return json.dumps(dataclasses.asdict(facts), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str | bytes) -> CardFacts:
    """Facts from their JSON; pydantic.ValidationError names what does not fit."""
    return TypeAdapter(CardFacts).validate_json(text)


def is_hub_id(text: str | None) -> bool:
    """Whether the Hub could know a model by this id."""
    return text is not None and len(text) <= 96 and _HUB_ID.fullmatch(text) is not None


def unknowns(facts: CardFacts) -> tuple[str, ...]:
    """Sentences about what a reader would look for and these facts do not hold."""
    sources = facts.sources
    local = [source.name for source in sources if source.hub_id is None]
    unpinned = [source.name for source in sources if source.hub_id and source.commit is None]
    unlicensed = [source.name for source in sources if not source.licence]
    found = []
    if local:
        found.append(
            f"Where the files of {listed(local)} came from: they were read from a local folder. "
            "Their checksums are above."
        )
    if unpinned:
        found.append(f"Which commit of {listed(unpinned)} was read.")
    if unlicensed:
        own = "" if facts.licence else ", and so the licence of this model"
        found.append(f"The licence of {listed(unlicensed)}{own}.")
    elif not facts.licence:
        found.append("The licence of this model, which must respect those of all its parents.")
    if not facts.evaluation:
        found.append("How good this model is: it has not been evaluated.")
    return (*found, *facts.unknown)


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
