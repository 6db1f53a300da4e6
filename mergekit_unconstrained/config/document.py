"""A YAML text whose every value knows its line."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mergekit_unconstrained.errors import RecipeError

Place = tuple[str | int, ...]
"""The way to a value: ("models", 1, "parameters", "weight")."""


@dataclass(frozen=True)
class Document:
    """Parsed YAML (or JSON, which is YAML) with the line and span of every value.

    name: what messages call it. text: None when only the parsed data survived, as in the front ends
    that parse recipes themselves; messages then name the place without a line. file_lines: those of
    the user's file, where the text is another one.
    """

    name: str
    data: Any
    text: str | None = None
    lines: dict[Place, int] = field(default_factory=dict)
    spans: dict[Place, tuple[int, int]] = field(default_factory=dict)
    file_lines: dict[Place, int] | None = None

    @classmethod
    def parse(cls, text: str, name: str) -> Document:
        """Read one YAML document; RecipeError with the line for bad syntax and repeated keys."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            data = yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            line = f"{name}:{mark.line + 1}" if mark else name
            raise RecipeError(f"{line}: this is not YAML: {error.problem}") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"{name}: this is not YAML: {error}") from None
        document = cls(name=name, data=data, text=text)
        try:
            if node is not None:
                document._walk(node, ())
        except RecursionError:
            raise RecipeError(f"{name}: an alias refers to what it is part of") from None
        return document

    @classmethod
    def read(cls, path: str | Path, what: str = "recipe") -> Document:
        """Read a YAML file; RecipeError when it is not there or not text."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(
                f"{what} {str(path)!r} does not exist (paths are relative to the current directory)"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{what} {str(path)!r} cannot be read: {error}") from None
        if Path(path).suffix == ".json":
            text = text.expandtabs(2)  # JSON may be indented by tabs, YAML may not
        return cls.parse(text, str(path))

    def without(self, places: Iterable[Place]) -> Document:
        """The same without some keys of mappings; comments and layout of the rest stay if they can.

        They cannot where such a key shares its line with another one.
        """
        there = [p for p in places if p[-1] in (_at(self.data, p[:-1]) or ())]
        if not there:
            return self
        data = copy.deepcopy(self.data)
        for place in there:
            del _at(data, place[:-1])[place[-1]]
        if self.text is None:
            return Document(self.name, data)
        lines = self.text.splitlines(keepends=True)
        for place in sorted(there, key=lambda p: self.lines[p], reverse=True):
            last = self.text.count("\n", 0, self.spans[place][1])
            del lines[self.lines[place] - 1 : last + 1]
        with contextlib.suppress(RecipeError):
            found = Document.parse("".join(lines), self.name)
            if found.data == data:
                return found
        return Document.parse(yaml.safe_dump(data, sort_keys=False), self.name)

    def _walk(self, node: yaml.Node, place: Place) -> None:
        self.lines[place] = node.start_mark.line + 1
        self.spans[place] = (node.start_mark.index, node.end_mark.index)
        if isinstance(node, yaml.MappingNode):
            seen: dict[str | int, int] = {}
            for key, value in node.value:
                word = _key(key)
                line = key.start_mark.line + 1
                if word in seen:
                    self.fail((*place, word), f"appears twice (first on line {seen[word]})", line)
                seen[word] = line
                self._walk(value, (*place, word))
                self.lines[(*place, word)] = line
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._walk(value, (*place, index))

    def where(self, place: Place, line: int | None = None) -> str:
        """`recipe.yml:7: models[1].parameters.weight`, as exactly as can be said."""
        path = ""
        for part in place:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        lines = self.lines if self.file_lines is None else self.file_lines
        known = line or next(
            (lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in lines), None
        )
        file = f"{self.name}:{known}" if known else self.name
        return f"{file}: {path}" if path else file

    def fail(self, place: Place, message: str, line: int | None = None) -> NoReturn:
        """Raise the one error for a place."""
        raise RecipeError(f"{self.where(place, line)}: {message}")


def _at(data: Any, place: Place) -> Any:
    """The mapping at a place, None where there is none."""
    for part in place:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else None


def _key(node: yaml.Node) -> Any:
    """A mapping's key as YAML reads it (0x3 is 3)."""
    try:
        key = yaml.SafeLoader("").construct_object(node, deep=True)
        hash(key)
    except (yaml.YAMLError, TypeError):
        return str(node.value)
    return key


def walk(data: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value of parsed YAML with its place, from the outside in."""
    yield place, data
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(data, Mapping):
        items = data.items()
    elif isinstance(data, list):
        items = enumerate(data)
    for key, value in items:
        yield from walk(value, (*place, key))
