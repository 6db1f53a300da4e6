"""Every error a user can meet, as one tree.

    UnconstrainedError          something the user can mend; the message says how
    ├── RecipeError             a recipe or coefficient table says something impossible
    ├── UnknownMethodError      no merge method of that name (a RuntimeError, as mergekit's own)
    ├── ModelError              a parent cannot be read, or does not fit the others
    │   └── NonFiniteError      NaN or infinity in a weight
    ├── DataError               a data file or one of its rows cannot be used
    ├── OutputError             the output folder cannot be used, or the disk is full
    ├── WorkerKilledError       a process of a merge was killed, most likely for want of memory
    ├── HubError                the Hub refuses, cannot be reached, or may not be given something
    └── MissingExtraError       a feature needs packages that are not installed

The root is a `click.ClickException`, so that mergekit's own commands (which are click commands)
print one line and exit with status 1 instead of a traceback; from Python it is an ordinary
exception whose `str` is the message.
"""

from __future__ import annotations

import click


class UnconstrainedError(click.ClickException):
    """Something the user can mend; the message says what and how."""


class RecipeError(UnconstrainedError):
    """A recipe or a coefficient table says something that cannot be meant."""


class UnknownMethodError(UnconstrainedError, RuntimeError):
    """No merge method of that name. mergekit raises RuntimeError here, so this is one too."""


class ModelError(UnconstrainedError):
    """A parent model cannot be read, or does not fit the other parents."""


class NonFiniteError(ModelError):
    """A weight holds NaN or infinity."""


class DataError(UnconstrainedError):
    """A data set, a file of it or one of its rows cannot be used."""


class OutputError(UnconstrainedError):
    """The output folder cannot be used, or the disk is full."""


class WorkerKilledError(UnconstrainedError, MemoryError):
    """A process of a merge was killed, most likely by a system that had no memory left."""


class HubError(UnconstrainedError):
    """The Hub refuses, cannot be reached, or may not be given something."""


class MissingExtraError(UnconstrainedError):
    """A feature needs packages of an extra that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs packages that are not installed: "
            f'pip install "mergekit-unconstrained[{extra}]"'
        )
