"""What is said of publishing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape

from mergekit_unconstrained.present import console, duration, size

if TYPE_CHECKING:
    from mergekit_unconstrained.hub.access import Access
    from mergekit_unconstrained.hub.local_files import LocalFile
    from mergekit_unconstrained.hub.push import Pushed


def tell(sentence: str) -> None:
    """A sentence while something is waited for."""
    console.print(escape(sentence), highlight=False, soft_wrap=True)


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:  # noqa: ARG001
    """A bar that shows nothing."""
    yield lambda _: None


def print_pushed(done: Pushed) -> None:
    """What was published, and where it is."""
    seen = "private" if done.private else "public"
    sent = f"{size(done.sent)} of it sent" if done.sent < done.bytes else "all of it sent"
    if not done.sent:
        sent = "all of it was there already"
    told = f"{done.files} files, {size(done.bytes)}, {sent} in {duration(done.seconds)}"
    went_on = ", going on with an interrupted push" if done.resumed else ""
    tagged = f", tag {done.tag}" if done.tag else ""
    kind = "pull request on " if done.pull_request else ""
    console.print(
        f"[bold]{escape(kind + done.repo_id)}[/] ({seen}): {escape(told + went_on)}; commit "
        f"{done.commit[:12]}{escape(tagged)}, checked against the Hub's hashes\n"
        f"{escape(done.url)}",
        highlight=False,
        soft_wrap=True,
    )


def print_dry_run(access: Access, files: Sequence[LocalFile], licence: Sequence[str]) -> None:
    """What a push would do."""
    there = f"is there, at {access.head[:12]}" if access.head else "would be made"
    total = sum(file.size for file in files)
    lines = [f"{access.repo_id} {there}; {len(files)} files, {size(total)}:"]
    lines += [f"  {size(file.size):>10}  {file.name}" for file in files]
    console.print(escape("\n".join([*lines, *licence])), highlight=False, soft_wrap=True)
