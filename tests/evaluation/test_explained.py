"""Every setting is listed as the code has it: kinds of tasks, and a fusion's settings file."""

from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner
from pydantic_core import to_jsonable_python

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.evaluation.explained import kinds_text
from mergekit_unconstrained.evaluation.kinds import KINDS, kind_class
from mergekit_unconstrained.fusion import settings as fusion

NEEDED = {"data": "rows.jsonl", "generator": "leg_counting", "task": "gsm8k"}


def plain(text: str) -> str:
    """A text without the marks of comments and the breaks of lines."""
    return " ".join(text.replace("#", " ").split())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_listed_with_its_defaults(kind):
    text = kinds_text()
    listed = yaml.safe_load(text)["tasks"][kind]
    made = kind_class(kind).settings_class
    needed = {name for name, field in made.model_fields.items() if field.is_required()} - {"kind"}
    assert listed.keys() == made.model_fields.keys() - needed
    for field in made.model_fields.values():
        assert plain(field.description) in plain(text)
    for name in needed:
        assert f"    # {name}:   (required)\n" in text
    own = made.model_validate({"kind": kind, **{name: NEEDED[name] for name in needed}})
    for name in listed:
        assert listed[name] == to_jsonable_python(getattr(own, name)), name


def test_the_command_prints_them_and_needs_no_model():
    result = CliRunner().invoke(main, ["evaluate", "--settings"])
    assert (result.exit_code, result.output) == (0, kinds_text())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("target", fusion.TargetName),
        ("loss", fusion.LossName),
        ("alignment", fusion.AlignmentName),
        ("vocabulary_map", fusion.MapName),
        ("post_merge", fusion.MergeName),
    ],
)
def test_the_alternatives_of_a_fusion_are_listed(setting, words):
    text = fusion.settings_text(fusion.FusionSettings())
    before, _, _ = text.partition(f"\n{setting}: ")
    assert plain(before).endswith(f"One of {', '.join(words.__args__)}.")
    assert yaml.safe_load(text) == fusion.FusionSettings().model_dump(mode="json")


def test_the_alternatives_of_a_task_are_listed():
    text = plain(kinds_text())
    assert "as a fusion trains" in text
    assert "where it has one. Without it, the messages are joined by newlines, " in text
    assert "earlier answers end as the model ends a text. One of auto," in text
    assert "One of bytes, tokens, none." in text
    assert "a plain string is the test split. data:" in text  # the keys of a mapping are no choice
