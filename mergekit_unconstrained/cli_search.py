"""`mergekit-unconstrained search`: find the coefficients of a merge, alone or with many workers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from mergekit_unconstrained.errors import MissingExtraError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType):
    """90, 90s, 45m, 8h or 2d, as seconds."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Seconds."""
        text = str(value).strip().lower()
        unit = UNITS.get(text[-1:], 0)
        try:
            seconds = float(text[:-1]) * unit if unit else float(text)
        except ValueError:
            seconds = 0.0
        if not seconds > 0:
            self.fail(f"{value!r} is no time: write 90s, 45m, 8h or 2d", param, ctx)
        return seconds


class SearchGroup(click.Group):
    """`search FILE OUT` runs a search; `search worker FILE OUT` helps with one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """What is no subcommand is a search file."""
        if args and args[0] not in self.commands:
            return "run", self.commands["run"], args
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Options before the file belong to `run`."""
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=SearchGroup, name="search")
def search() -> None:
    """Search a merge's coefficients by development scores.

    `search SEARCH.yml OUT` writes the merged model with its recipe, card and report into OUT, and
    keeps its state in OUT.search: the same command goes on after whatever ended it.
    """


FILE = click.argument("file", metavar="SEARCH.yml", type=click.Path(path_type=Path))
OUT = click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
STORAGE = click.option(
    "--storage", metavar="URL", help="Any Optuna storage; by default a journal file in OUT.search."
)
ALLOW_CODE = click.option(
    "--allow-code", is_flag=True, default=None, help="Run Python that the models write."
)


@search.command(context_settings={"ignore_unknown_options": True})
@FILE
@OUT
@click.option("--budget", type=click.IntRange(min=1), help="Candidates, instead of the file's.")
@click.option("--time", "limit", type=Duration(), help="End the search after 45m, 8h, 2d ...")
@STORAGE
@ALLOW_CODE
@click.option(
    "--allow-test-split",
    is_flag=True,
    default=None,
    help="Optimise on benchmarks' test splits; no score on them says anything afterwards.",
)
@click.option("--dry-run", is_flag=True, help="Print genome, tasks and cost, and stop.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def run(
    file: Path,
    out: Path,
    budget: int | None,
    limit: float | None,
    storage: str | None,
    allow_code: bool | None,
    allow_test_split: bool | None,
    dry_run: bool,
    options: tuple[str, ...],
) -> None:
    """Run a search, or go on with it. Further OPTIONS are mergekit-yaml's own."""
    changes = {
        "budget": budget,
        "time": limit,
        "allow_code": allow_code,
        "allow_test_split": allow_test_split,
    }
    _check(file, changes)
    jobs, made = _jobs(), _merge_options(options, "search")
    jobs.search(file, out, made, storage=storage, dry_run=dry_run, **changes)


@search.command(context_settings={"ignore_unknown_options": True})
@FILE
@OUT
@STORAGE
@ALLOW_CODE
@click.option("--budget", type=click.IntRange(min=1), help="As the leading process has it.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def worker(
    file: Path,
    out: Path,
    storage: str | None,
    allow_code: bool | None,
    budget: int | None,
    options: tuple[str, ...],
) -> None:
    """Score candidates for a search that runs elsewhere on the same storage."""
    changes = {"budget": budget, "allow_code": allow_code}
    _check(file, changes)
    jobs, made = _jobs(), _merge_options(options, "search worker")
    jobs.work_along(file, out, made, storage=storage, **changes)


@search.command()
def settings() -> None:
    """Print every setting of a search file with its default and what it means."""
    _jobs()
    from mergekit_unconstrained.config.explain import explained
    from mergekit_unconstrained.search.settings import SearchSettings

    click.echo("# A search file; `tasks` (a tasks file, or tasks as there) is required too.")
    click.echo(explained(SearchSettings), nl=False)


@click.command(
    context_settings={"ignore_unknown_options": True},
    short_help="Compare merge methods on the models and tasks of SEARCH.yml.",
)
@FILE
@OUT
@click.option(
    "--methods",
    default="all",
    show_default=True,
    metavar="A,B,...",
    help="Methods by name, ours and mergekit's.",
)
@click.option(
    "--budget", type=click.IntRange(min=2), help="Candidates that each method may tune with."
)
@ALLOW_CODE
@click.option("--dry-run", is_flag=True, help="Print what would be tuned and its cost, and stop.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def compare(
    file: Path,
    out: Path,
    methods: str,
    budget: int | None,
    allow_code: bool | None,
    dry_run: bool,
    options: tuple[str, ...],
) -> None:
    """Compare merge methods on the models and tasks of SEARCH.yml.

    Every method gets the same number of candidates to tune its own numbers on the search split
    (16 unless told otherwise); the winners are scored on the test split once, and their merges
    measured. OUT gets compare.md with the table, compare.json, scores.csv, a plot, and the recipe
    of every method; the same command goes on after whatever ended it. Further OPTIONS are
    mergekit-yaml's own.
    """
    _check(file, {"budget": budget, "allow_code": allow_code})
    _jobs()
    from mergekit_unconstrained.jobs import comparing

    comparing.compare(
        file,
        out,
        _merge_options(options, "compare"),
        methods=methods,
        budget=budget,
        dry_run=dry_run,
        allow_code=allow_code,
    )


def _check(file: Path, changes: dict[str, Any]) -> None:
    """Refuse a wrong file before torch and mergekit are imported, which takes seconds."""
    from mergekit_unconstrained.search.settings import read_file

    read_file(file, changes)


def _jobs() -> Any:
    for package in ("optuna", "cmaes"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"a search (no {package} here)", "search")
    from mergekit_unconstrained.jobs import searching

    return searching


def _merge_options(options: tuple[str, ...], usage: str) -> Any:
    from mergekit_unconstrained.compat import parse_options

    return parse_options(list(options), usage)
