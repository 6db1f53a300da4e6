"""Putting text from elsewhere into Markdown so that it stays text.

Names, recipes and metadata come from people we do not know; a card is read in browsers. Nothing
here depends on where a renderer differs from CommonMark: what could be markup becomes an HTML
entity, and code gets a fence longer than any inside it.
"""

from __future__ import annotations

import re

_URL = re.compile(r"https?://[^\s<>()\[\]\\\"'`|]+", re.ASCII)
_PLAIN_CODE = re.compile(r"[\w .,:;@/+=()%-]+")
_ENTITIES = {ord(c): f"&#{ord(c)};" for c in "&<>|$\\`[]{}#"}
_BACKSLASHED = {ord(c): f"\\{c}" for c in "*~"}
_EMPHASIS = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
"""Underscores that may open or close emphasis; within a word they are text."""
_BIDI = dict.fromkeys([0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")


def visible(text: object) -> str:
    """Lines of text without control characters and without those that reorder what is read."""
    lines = str(text).translate(_BIDI).splitlines()
    return "\n".join(
        "".join(c if c.isprintable() or c in " \t\u200d" else "\ufffd" for c in line)
        for line in lines
    )


def one_line(text: object) -> str:
    """Visible text without line breaks."""
    return " ".join(visible(text).split())


def md(text: object) -> str:
    """Text for a heading, a sentence, a list or a table cell."""
    line = _EMPHASIS.sub(lambda _: "\0", one_line(text))  # visible text holds no such character
    escaped = line.translate(_ENTITIES | _BACKSLASHED | {0: "\\_"})
    # At the start of a line these would begin a list or draw a rule: "- x", "1. x", "---".
    escaped = re.sub(r"^[-+](?=[ -]|$)", lambda match: f"&#{ord(match[0])};", escaped)
    return re.sub(r"^(\d+)([.)])(?= |$)", lambda match: f"{match[1]}&#{ord(match[2])};", escaped)


def code(text: object) -> str:
    """Inline code, in a sentence or a table cell."""
    line = one_line(text)
    if not line or _PLAIN_CODE.fullmatch(line):
        return f"`{line}`" if line else ""
    # Backticks cannot quote a pipe in a table, so the hard cases are HTML.
    entities = _ENTITIES | {ord(c): f"&#{ord(c)};" for c in "*_~"}
    return f"<code>{line.translate(entities)}</code>"


def fence(text: object, language: str = "") -> str:
    """A block of code; the fence is longer than any run of backticks inside."""
    body = visible(text).strip("\n")
    longest = max((len(run) for run in re.findall(r"`+", body)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{body}\n{ticks}"


def link(text: object, url: object) -> str:
    """A link, or the bare text where the address is none."""
    address = str(url)
    return f"[{md(text)}]({address})" if _URL.fullmatch(address) else md(text)


def without_empty_columns(table: str) -> str:
    """A Markdown table less the columns that are empty in every row; the cells hold no pipes."""
    lines = [line.strip()[1:-1].split("|") for line in table.strip().splitlines()]
    header, rule, *rows = ([cell.strip() for cell in line] for line in lines)
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[row[i] for i in kept] for row in (header, ["---"] * len(rule), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
