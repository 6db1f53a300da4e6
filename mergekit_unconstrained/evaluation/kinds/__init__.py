"""The kinds of tasks, one file a kind, and where each is found.

A kind is a subclass of `evaluation.configured.ConfiguredTask`. Its file also holds the pydantic
class of its settings, derived from `evaluation.settings.TaskSettings` (or one of the classes there
that add a prompt, data files, a generation), and names it:

    class ExactTask(SpokenTask[ExactSettings], FileTask[ExactSettings]):
        settings_class = ExactSettings

`settings.read_tasks` validates a task's part of the YAML by `settings_class` and constructs
`ExactTask(name, settings, folder)`; folder: what relative paths are relative to. A settings class
with a field `allow_code` has it set by the command's `--allow-code`. A kind whose examples may be
those of a published benchmark overrides `benchmark(split)`, see splits.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_unconstrained.evaluation.configured import ConfiguredTask

_HERE = "mergekit_unconstrained.evaluation.kinds"

KINDS: Mapping[str, str] = {
    "exact": f"{_HERE}.answers:ExactTask",
    "numeric": f"{_HERE}.answers:NumericTask",
    "regex": f"{_HERE}.answers:RegexTask",
    "choice": f"{_HERE}.choice:ChoiceTask",
    "likelihood": f"{_HERE}.likelihood:LikelihoodTask",
    "gym": f"{_HERE}.gym:GymTask",
    "code": f"{_HERE}.code:CodeTask",
    "tools": f"{_HERE}.tools:ToolsTask",
    "harness": f"{_HERE}.harness:HarnessTask",
}
"""`kind:` of the tasks file -> "module:Class", imported when a task of it is read."""


def kind_class(kind: str) -> type[ConfiguredTask]:
    """The class of a kind of KINDS."""
    module, _, name = KINDS[kind].partition(":")
    found: type[ConfiguredTask] = getattr(importlib.import_module(module), name)
    return found
