"""A settings class as a file that explains itself: every setting with its default and meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def explained(
    settings: type[BaseModel], indent: str = "", values: Mapping[str, Any] | None = None
) -> str:
    """YAML text. Descriptions are the docstrings of the fields; what has no default is commented
    out as required, and choices are listed.

    values: JSON values to be written instead of the defaults.
    """
    lines: list[str] = []
    for name, field in settings.model_fields.items():
        nested = field.annotation
        words = _words(field)
        lead = f"{indent}# "
        lines += textwrap.wrap(words, 96, initial_indent=lead, subsequent_indent=lead)
        if values is not None and name in values:
            lines.append(f"{indent}{name}: {_written(values[name])}")
        elif isinstance(nested, type) and issubclass(nested, BaseModel):
            lines += [f"{indent}{name}:", explained(nested, indent + "  ").rstrip("\n")]
        elif field.is_required():
            lines.append(f"{indent}# {name}:   (required)")
        else:
            lines.append(
                f"{indent}{name}: {_written(field.get_default(call_default_factory=True))}"
            )
    return "\n".join(lines) + "\n"


def _words(field: FieldInfo) -> str:
    words = " ".join((field.description or "").split())
    choices = ", ".join(str(choice) for choice in _choices(field.annotation))
    return f"{words} One of {choices}.".strip() if choices else words


def _choices(annotation: Any) -> Iterator[Any]:
    """The values of every Literal in an annotation; yes and no beside the words of one."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        yield from parts
        return
    if get_origin(annotation) is dict:
        parts = parts[1:]  # its keys are not what it may be
    for part in parts:
        yield from _choices(part)
    if bool in parts and len(parts) > 1:
        yield from ("true", "false")


def _written(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump([plain], default_flow_style=True, width=1000).strip()
    return text[1:-1]
