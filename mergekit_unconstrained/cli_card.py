"""`card`, `verify` and `reproduce`: what a finished folder says, and whether it is true."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

FOLDER = click.argument(
    "folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False, exists=True)
)


class Named(click.ParamType):
    """NAME=PATH."""

    name = "name=path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        """The name and the path."""
        name, equals, path = str(value).partition("=")
        if not (name and equals and path):
            self.fail(f"{value!r} is not NAME=PATH, such as base=/models/base", param, ctx)
        return name, Path(path)


PARENT = click.option(
    "--parent",
    "given",
    type=Named(),
    multiple=True,
    help="Where a local model or data file of the recipe lies; NAME as in the recipe or the card.",
)


def _print_template(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the template and end, whatever else is said."""
    if not wanted or ctx.resilient_parsing:
        return
    from mergekit_unconstrained.hub.card import packaged_template

    click.echo(packaged_template(), nl=False)
    ctx.exit()


@click.command()
@FOLDER
@click.option(
    "--print-template",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_template,
    help="Print our template, to begin a new one with, and end.",
)
@click.option(
    "--template",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A Jinja template instead of ours, in a sandbox; it may include or extend merge.md.j2.",
)
@click.option("--repo", "repo_id", metavar="ORG/NAME", help="Where the model is, for the snippet.")
@click.option("--tag", help="The tag or branch there that the snippet is pinned to.")
@click.option(
    "--quantised", metavar="ORG/NAME", multiple=True, help="A smaller version; may be repeated."
)
@click.option(
    "--scores",
    type=click.Path(path_type=Path, exists=True),
    help="What `evaluate --out` wrote of this model and its parents, to be shown from now on.",
)
def card(
    folder: Path,
    template: Path | None,
    repo_id: str | None,
    tag: str | None,
    quantised: tuple[str, ...],
    scores: Path | None,
) -> None:
    """Write the README.md of DIR again, from its own records.

    Those are its provenance.json, recipe and reports.
    """
    from mergekit_unconstrained.hub import facts, licences
    from mergekit_unconstrained.hub.folder_facts import rewrite
    from mergekit_unconstrained.hub.names import check_tag_name

    check_tag_name(tag, branch=True)
    for name in filter(None, (repo_id, *quantised)):
        if not facts.is_hub_id(name) or "/" not in name:
            raise click.BadParameter(f"{name!r} is no ORG/NAME of the Hub")
    written = rewrite(
        folder,
        template=template,
        repo_id=repo_id,
        tag=tag,
        quantised=quantised or None,
        scores=scores,
    )
    click.echo(f"wrote {folder / 'README.md'}")
    click.echo("\n".join(licences.told(written.verdict)))


@click.command()
@click.argument("target", metavar="DIR|ORG/NAME")
@click.option("--revision", help="Commit, tag or branch of a repository; its main branch if none.")
@click.option("--parents", is_flag=True, help="Check the local parents too, where they are found.")
@PARENT
def verify(
    target: str, revision: str | None, parents: bool, given: tuple[tuple[str, Path], ...]
) -> None:
    """Compare every file of DIR with its provenance.json.

    DIR may be the id of a repository on the Hub. Exit status 0 when all are as they were written, 1
    with a line for each one that is not. The card may be written again by hand and is not compared.
    The weights of a repository are not fetched: the Hub's own hashes of them are compared.
    """
    from mergekit_unconstrained.hub import provenance
    from mergekit_unconstrained.hub.facts import is_hub_id

    folder = Path(target)
    if folder.is_dir():
        if revision is not None:
            raise click.BadParameter("--revision is of a repository, and this is a folder")
        where = {}
        if parents or given:
            from mergekit_unconstrained.jobs.reproducing import found_here

            known = provenance.load(folder)
            where = found_here(known, folder, dict(given))
            local = {s.place: s.name for s in known.sources if s.place is not None}
            for place in sorted(local.keys() - where.keys()):
                click.echo(f"{local[place]} is not here, and was not checked")
        problems = provenance.verify(folder, where)
    elif is_hub_id(target) and "/" in target:
        problems = provenance.verify_repo(target, revision)
    else:
        raise click.BadParameter(f"{target} is neither a folder nor ORG/NAME of the Hub")
    for problem in problems:
        click.echo(str(problem), err=True)
    if problems:
        sys.exit(1)
    click.echo(f"{target}: every file is as {provenance.FILE} says")


@click.command(context_settings={"ignore_unknown_options": True})
@FOLDER
@click.argument("out", required=False, type=click.Path(path_type=Path))
@PARENT
@click.option("--dry-run", is_flag=True, help="See that everything is there, and stop.")
@click.option("--trust-remote-code", is_flag=True, help="Run code of the parents' repositories.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def reproduce(
    folder: Path,
    out: Path | None,
    given: tuple[tuple[str, Path], ...],
    dry_run: bool,
    trust_remote_code: bool,
    options: tuple[str, ...],
) -> None:
    """Make DIR's weights again and compare their bytes.

    Local parents and data are looked for where the recipe says: relative to the current directory,
    to DIR, or to the folder that DIR lies in, unless --parent says where. OUT keeps what was made.
    Exit status 0 when every byte is equal, 1 with a line for each tensor that differs. Further
    OPTIONS are mergekit-yaml's own (--cuda ...). A search is not repeated, only its merge.
    """
    from mergekit_unconstrained import _activate

    _activate.install()
    from mergekit_unconstrained.jobs import reproducing

    if out is not None and str(out).startswith("-"):  # an option of mergekit's, not a folder
        options, out = (str(out), *options), None
    found = reproducing.reproduce(
        folder,
        out,
        given=dict(given),
        arguments=options,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
    )
    if found.versions:
        click.echo(f"other releases than then: {', '.join(found.versions)}")
    if dry_run:
        click.echo(f"{folder}: everything that its recipe needs is here")
        return
    for difference in found.differences:
        click.echo(difference, err=True)
    if found.differences:
        click.echo(f"{folder} was not reproduced", err=True)
        sys.exit(1)
    files = "1 weight file" if found.files == 1 else f"{found.files} weight files"
    click.echo(f"{folder}: reproduced, {files} equal byte for byte")
