"""The command `space`; cli.py adds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

_WHAT_PIP_INSTALLS = "What pip installs there, one line; the release of this version by default."


@click.group(invoke_without_command=True, short_help="Merge in a browser; export or deploy it.")
@click.option("--port", type=click.IntRange(1, 65535), help="The first free one from 7860 on.")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("space-work"),
    show_default=True,
    help="Where jobs run; their results stay in WORK_DIR/results.",
)
@click.option(
    "--models-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with your models, WORK_DIR/models by default.",
)
@click.option(
    "--max-gib",
    type=click.FloatRange(min=0.01),
    default=16.0,
    show_default=True,
    help="Largest merge that is run: models and result together.",
)
@click.option("--browser", is_flag=True, help="Open the page in a browser.")
@click.pass_context
def space(
    ctx: click.Context,
    port: int | None,
    work_dir: Path,
    models_dir: Path | None,
    max_gib: float,
    browser: bool,
) -> None:
    """Serve the page on this machine, for this machine alone, until Ctrl-C.

    Pick models, see whether and how they can be merged, weigh them by sliders, merge small ones,
    get commands for big ones, push with your token. Results go to WORK_DIR/results/NAME and stay
    there when the page is closed (NAME-2 where NAME is taken). Needs the extra `space`.
    """
    if ctx.invoked_subcommand is not None:
        return
    if importlib.util.find_spec("gradio") is None:
        from mergekit_unconstrained.errors import MissingExtraError

        raise MissingExtraError("the page", "space")
    from mergekit_unconstrained.space.app import serve
    from mergekit_unconstrained.space.desk import Settings

    models = models_dir or work_dir / "models"
    serve(Settings(work_dir, models, int(max_gib * 2**30)), port, browser)


@space.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--title", default="mergekit-unconstrained", show_default=True)
@click.option("--requirement", help=_WHAT_PIP_INSTALLS)
def export(folder: Path, title: str, requirement: str | None) -> None:
    """Write a Space that can be deployed into FOLDER: README.md, requirements.txt, app.py."""
    from mergekit_unconstrained.space import export as exporting

    names = exporting.write(folder, title, requirement or exporting.RELEASE)
    click.echo(f"wrote {', '.join(names)} to {folder}")


@space.command()
@click.argument("repository", metavar="REPO")
@click.option("--public", is_flag=True, help="Everybody may use it; private by default.")
@click.option("--requirement", help=_WHAT_PIP_INSTALLS)
def deploy(repository: str, public: bool, requirement: str | None) -> None:
    """Make or update the Space REPO (owner/name) on the Hub with your token."""
    from mergekit_unconstrained.space import export as exporting

    wanted = requirement or exporting.RELEASE
    click.echo(exporting.deploy(repository, private=not public, requirement=wanted))
