"""The command `evaluate`; cli.py adds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


def _print_settings(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from mergekit_unconstrained.evaluation.explained import kinds_text

        click.echo(kinds_text(), nl=False)
        ctx.exit()


LIMIT = click.option(
    "--limit", type=click.IntRange(min=1), help="The first so many examples of a task."
)
CACHE = click.option(
    "--cache", type=click.Path(path_type=Path), help="Keep scores here and take them."
)
BATCH_SIZE = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Prompts at once.",
)
ALLOW_CODE = click.option(
    "--allow-code", is_flag=True, help="Run Python that a model writes, in a sandbox."
)


def split(default: str, told: str) -> Any:
    """The option --split."""
    choice = click.Choice(["search", "development", "test"])
    return click.option("--split", type=choice, default=default, show_default=True, help=told)


@click.command(short_help="Score MODELS on the tasks of a file.")
@click.argument("models", nargs=-1, required=True, metavar="MODELS...")
@click.option("--tasks", required=True, type=click.Path(), help="The tasks file (YAML).")
@split("test", "Which examples.")
@LIMIT
@click.option("--out", type=click.Path(path_type=Path), help="Save table and examples here.")
@CACHE
@BATCH_SIZE
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: bfloat16 on an accelerator, float32 on a CPU.",
)
@click.option("--device", default="auto", show_default=True, help="As torch names it: cuda:1, cpu.")
@ALLOW_CODE
@click.option("--overwrite", is_flag=True, help="Drop other models' and tasks' scores in --out.")
@click.option(
    "--settings",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_settings,
    help="Print every kind of task with all its settings, their defaults and meaning; stop.",
)
def evaluate(models: tuple[str, ...], tasks: str, **options: Any) -> None:
    """Score MODELS on the tasks of a file, with n and standard errors.

    MODELS are folders or names on the Hub (owner/name@revision), with an adapter as MODEL+ADAPTER.
    Only safetensors are read, and no code of a model is run. --out saves scores.json, scores.csv,
    table.md and, for every model and task, what was asked, wanted, said and scored.
    """
    from mergekit_unconstrained.evaluation.settings import load_tasks

    load_tasks(
        tasks, allow_code=options["allow_code"]
    )  # a wrong file is refused before torch comes
    from mergekit_unconstrained.jobs.evaluating import evaluate_models

    evaluate_models(models, tasks, **options)


@click.command(short_help="Rank MODELS by family, pick the experts, write the recipe.")
@click.argument("models", nargs=-1, required=True, metavar="MODELS...")
@click.option(
    "--families", required=True, type=click.Path(path_type=Path), help="The families file (YAML)."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("selected.yml"),
    show_default=True,
    help="Where the recipe is written.",
)
@split("development", "Which examples rank the candidates.")
@LIMIT
@CACHE
@BATCH_SIZE
@ALLOW_CODE
def select(models: tuple[str, ...], families: Path, out: Path, **options: Any) -> None:
    """Rank MODELS on families of tasks and write the recipe that merges the best of them.

    The recipe is a search of layer-wise coefficients where the picked experts share an
    architecture, a fusion where they do not, and both where some do.
    """
    from mergekit_unconstrained.jobs.selecting import select as run

    run(models, families, out, **options)
