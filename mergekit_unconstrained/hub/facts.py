"""What a model card is rendered from: plain data, so that a card can be made again from a file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import ConfigDict, TypeAdapter

from mergekit_unconstrained.hub.licences import Verdict, is_known, named, verdict

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
    for a local folder. commit: the Hub's commit; revision: what the recipe asked for. licence,
    languages: as its own card says them. tokenizer: sha256 of the tokenizer's file. place: of a
    local folder, what the recipe beside the card calls it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    hub_id: str | None = None
    commit: str | None = None
    files: tuple[WeightFile, ...] = ()
    licence: str | None = None
    revision: str | None = None
    languages: tuple[str, ...] = ()
    made_from: tuple[str, ...] = ()
    tokenizer: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class DataSet:
    """Data that made the model what it is.

    role: what it did. sha256: of its one file, or of a folder's or split's contents, as `hashed`
    says. rows: counts by split or use. place: as of a Source.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    role: str
    hub_id: str | None = None
    sha256: str | None = None
    hashed: str = "file"
    licence: str | None = None
    rows: dict[str, int] = field(default_factory=dict)
    place: str | None = None


@dataclass(frozen=True)
class Parent:
    """A model that was merged.

    role: base or expert. weight, density: in a few words (config.grid.summary); no density where
    nothing was thinned. parameters: their number.
    adapter: what was added to `model` before merging.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    role: str
    model: Source
    adapter: Source | None = None
    weight: str = ""
    architecture: str = ""
    parameters: int | None = None
    density: str = ""

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
    """The merge method; operator and parameters as the recipe sets them.

    defaults: what the recipe left alone, which another release may choose otherwise.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    pretty_name: str
    summary: str = ""
    paper: str = ""
    url: str = ""
    operator: str | None = None
    parameters: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    defaults: dict[str, str | int | float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One result of an evaluation; stderr and n None where they are not known.

    paired: standard error of this model's difference to it, over the same examples; None where the
    scores of single examples were not at hand.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    task: str
    metric: str
    model: str
    value: float
    stderr: float | None = None
    n: int | None = None
    paired: float | None = None


@dataclass(frozen=True)
class Teacher:
    """A source of a fusion; licence: of the model itself, None for one that was merged before.

    coverage, label_consistency: shares of the pivot's positions (fusion/alignment/by_bytes.py).
    won: share of conversations whose target came from it. warnings: sentences about what speaks
    against it as a teacher of this fusion.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    licence: str | None = None
    weight: float = 1.0
    coverage: float | None = None
    label_consistency: float | None = None
    won: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Models of one architecture that were merged before the fusion; base None for a single one."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    base: str | None
    models: tuple[str, ...]


@dataclass(frozen=True)
class Fusion:
    """How the pivot was trained. left_out: rows by reason. training: settings as shown.

    target, loss, post_merge: their names in the settings; the last is empty where there was one
    target model. pairwise: a target model for each teacher. pivot_competes: its own distributions
    may be the target as well.
    """

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
    target: str = ""
    loss: str = ""
    post_merge: str = ""
    pairwise: bool = True
    pivot_competes: bool = True


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says.

    recipe, coefficients: the texts of the recipe (with pinned ids) and of the coefficient table.
    command: what was run, without paths of this machine. heatmap: the picture's file name.
    tokenizer: whose it is, or what it was made of. repo_id, tag: where the model is or will be on
    the Hub. outputs: the weight files written. fusion: for models that were trained. data: what it
    was trained or chosen on. seconds: wall time; machine: what it ran on. chosen: how the numbers
    of the recipe were found; report: the search's report, where there was one. quantised: ids of
    smaller versions. unknown: sentences about what is not known, besides those that `unknowns`
    finds out itself.
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
    machine: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    repo_id: str | None = None
    tag: str | None = None
    evaluation: tuple[Score, ...] = ()
    evaluated_on: str = ""
    fusion: Fusion | None = None
    data: tuple[DataSet, ...] = ()
    chosen: str = ""
    report: str | None = None
    quantised: tuple[str, ...] = ()
    provenance: bool = False
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
    def teachers(self) -> tuple[Parent, ...]:
        """Those whose distributions were learned, and whose weights are not in the result."""
        names = [t.name for t in self.fusion.teachers] if self.fusion is not None else []
        roles = {"source", *(f"base of {name}" for name in names)} if names else set()
        return tuple(p for p in self.parents if p.role in roles)

    @property
    def merged(self) -> tuple[Parent, ...]:
        """Those whose weights are in the result."""
        teachers = self.teachers
        return tuple(p for p in self.parents if p not in teachers)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every model and adapter once, in the order of the recipe."""
        return _sources(self.parents)

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that every merged model declares."""
        declared = [source.languages for source in _sources(self.merged)]
        first = declared[0] if declared else ()
        return tuple(one for one in first if all(one in other for other in declared))

    @property
    def verdict(self) -> Verdict:
        """What is to be said of the licence, under the name that this model has."""
        found = verdict(
            _licences(self.merged),
            _licences(self.teachers),
            [(d.name, d.licence) for d in self.data if d.role == TRAINED_ON],
        )
        return named(found, (self.repo_id or self.title).rpartition("/")[2])


TRAINED_ON = "training"
"""The role of data that a model learned from."""
CHOSEN_ON = "choosing and testing"
"""The role of data on which numbers of the recipe were chosen, and the result tested."""
TESTED_ON = "testing"
"""The role of data of which nothing but the evaluation is."""


def _sources(parents: Sequence[Parent]) -> tuple[Source, ...]:
    return tuple(dict.fromkeys(source for parent in parents for source in parent.sources))


def _licences(parents: Sequence[Parent]) -> list[tuple[str, str | None]]:
    return [(source.name, source.licence) for source in _sources(parents)]


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
    local_data = [d.name for d in facts.data if d.hub_id is None and d.place is not None]
    found = []
    if local:
        found.append(
            f"Where the files of {listed(local)} came from: they were read from local folders of "
            f"whoever made this model. Their checksums are above.{_declared(sources)}"
        )
    if unpinned:
        found.append(f"Which commit of {listed(unpinned)} was read.")
    unknown = [s for s in sources if s.licence and not is_known(s.licence)]
    declared = [f"{s.name} (declared as {s.licence!r})" for s in unknown]
    if unlicensed:
        found.append(f"The licence of {listed(unlicensed)}, and so the licence of this model.")
    if declared:
        found.append(
            f"What the licence of {listed(declared)} demands, and so the licence of this model: no "
            "rule is known for it."
        )
    if local_data:
        found.append(
            f"Where the data {listed(local_data)} came from: it was a local file of whoever made "
            "this model."
        )
    weighted = facts.fusion is None and any(expert.weight for expert in facts.experts)
    if weighted and not any(d.role == CHOSEN_ON for d in facts.data):
        found.append(
            "On which data the coefficients were chosen, if on any, and under which licence that "
            "is: only the author's comments could tell."
        )
    unlicensed = [d.name for d in facts.data if not d.licence and d.rows]
    if unlicensed:
        found.append(f"The licence of the data {listed(unlicensed)}.")
    if not facts.evaluation:
        found.append(
            "How good this model is, and what it is worse at than its parents: it has not been "
            "evaluated."
        )
    return (*found, *facts.unknown)


def _declared(sources: Sequence[Source]) -> str:
    """What the cards of local folders say of their origin, once for those of the same one."""
    said: dict[tuple[str, ...], list[str]] = {}
    for source in sources:
        if source.hub_id is None and source.made_from:
            said.setdefault(source.made_from, []).append(source.name)
    found = ""
    for origins, names in said.items():
        copies = [n for n in names if [n] == [origin.rpartition("/")[2] for origin in origins]]
        made = [n for n in names if n not in copies]
        if copies:
            found += f" {listed(copies)} declares itself to be {listed(origins)} or made from it."
        if made:
            declare = "declares itself" if len(made) == 1 else "declare themselves"
            found += f" {listed(made)} {declare} to be made from {listed(origins)}."
    return found


THIS_MODEL = "this model"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
