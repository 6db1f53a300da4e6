"""`push`: publish a finished folder on the Hub."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument(
    "folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False, exists=True)
)
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private/--public", default=True, help="Who may see it; private by default.")
@click.option("--tag", help="Tag the commit, as in --tag v1. A tag is never moved.")
@click.option("--pr", is_flag=True, help="As a pull request, on a repository that you may read.")
@click.option("--dry-run", is_flag=True, help="Check everything, list the files, send nothing.")
@click.option(
    "--i-checked-the-licences",
    "checked",
    is_flag=True,
    help="Publish openly although the licences are unknown, or do not obviously fit together.",
)
@click.option("-q", "--quiet", is_flag=True, help="No bars and no summary.")
def push(
    folder: Path,
    repo: str,
    private: bool,
    tag: str | None,
    pr: bool,
    dry_run: bool,
    checked: bool,
    quiet: bool,
) -> None:
    """Publish DIR, a finished output, as ORG/NAME on the Hub.

    DIR is of a merge, a fusion or a search. Token, rights and name are checked first; all files
    arrive in one commit, whose hashes are compared with those here. Nothing is ever deleted.
    Whatever ends a push, the same command goes on with it. The token is that of `hf auth login` or
    HF_TOKEN, the Hub that of HF_ENDPOINT.
    """
    from mergekit_unconstrained.hub.access import check_ready
    from mergekit_unconstrained.hub.names import check_tag_name

    check_tag_name(tag)
    check_ready()  # before what takes seconds to import
    from mergekit_unconstrained.jobs import publishing

    publishing.push_folder(
        folder,
        repo,
        private=private,
        tag=tag,
        pr=pr,
        dry_run=dry_run,
        checked=checked,
        quiet=quiet,
    )
