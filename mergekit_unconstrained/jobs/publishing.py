"""Publishing the result of a job: `push_to_hub`, `hub_private` and `hub_tag` in a recipe.

Whether the Hub will have it is asked before the work; the push is behind the rename of OUT. A
finished OUT remembers its job, so that the same command goes on with a push that failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.config.recipe import HUB_KEYS, JobOptions
from mergekit_unconstrained.errors import HubError, RecipeError
from mergekit_unconstrained.hub import publication, sources
from mergekit_unconstrained.hub.access import check_access
from mergekit_unconstrained.hub.gate import private_only
from mergekit_unconstrained.hub.licences import NOT_LEGAL_ADVICE, Verdict, kept_private, verdict
from mergekit_unconstrained.hub.names import display_name
from mergekit_unconstrained.hub.push import look, push
from mergekit_unconstrained.hub.retry import Patience
from mergekit_unconstrained.present import byte_progress, hub, status


def without_keys(document: Document) -> Document:
    """A recipe without what only concerns publishing: whoever repeats it publishes nothing."""
    return document.without(("parameters", key) for key in HUB_KEYS)


def push_folder(
    folder: Path,
    repo: str,
    *,
    private: bool = True,
    tag: str | None = None,
    pr: bool = False,
    dry_run: bool = False,
    checked: bool = False,
    quiet: bool = False,
) -> None:
    """Publish a finished folder, or say what that would do. checked: the licences, by the user."""
    patience = Patience(tell=hub.tell)
    if dry_run:
        found = look(
            folder, repo, private=private, tag=tag, pr=pr, checked=checked, patience=patience
        )
        hub.print_dry_run(*found)
        return
    warning = private_only(folder, repo) if private else None
    if warning is not None:
        hub.tell(warning)
    done = push(
        folder,
        repo,
        private=private,
        tag=tag,
        pr=pr,
        checked_licences=checked,
        patience=patience,
        progress=hub.no_bar if quiet else byte_progress,
        quiet=quiet,
    )
    if not quiet:
        hub.print_pushed(done)


@dataclass(frozen=True)
class Publication:
    """What a recipe asks for; nothing where it names no repository.

    key: what makes two jobs the same. merged, teachers: models that go into the result.
    """

    job: JobOptions
    key: str
    merged: tuple[Parent, ...] = ()
    teachers: tuple[Parent, ...] = ()
    quiet: bool = False

    def check(self, card: bool = True) -> None:
        """Everything that can be known before the work; HubError or RecipeError.

        card: whether one will be written. Says on the console what may not be given away.
        """
        self.warn()
        if self.job.push_to_hub is None:
            given = [key for key in HUB_KEYS if key in self.job.model_fields_set]
            if given:
                raise RecipeError(f"`{given[0]}` needs `push_to_hub: org/name` beside it")
            return
        if not card:
            raise RecipeError(
                "`push_to_hub` publishes the model with its card: leave out --no-write-model-card"
            )
        with status(f"asking the Hub about {self.job.push_to_hub}", self.quiet):
            check_access(
                self.job.push_to_hub,
                private=self.job.hub_private,
                tag=self.job.hub_tag,
                parents=self._still_on_the_hub(),
            )
        if not self.job.hub_private:
            self._check_licences()

    def goes_on(self, out: Path) -> bool:
        """Whether OUT is the finished result of this very job."""
        noted = publication.read(out).get("job")
        return self.job.push_to_hub is not None and noted is not None and noted == self.key

    def note(self, folder: Path) -> None:
        """Let a finished folder remember its job, before it gets its name."""
        if self.job.push_to_hub is not None:
            publication.write(folder, job=self.key)

    def push(self, out: Path) -> None:
        """Publish OUT; it stays as it is, whatever comes of it."""
        if self.job.push_to_hub is None:
            return
        try:
            push_folder(
                out,
                self.job.push_to_hub,
                private=self.job.hub_private,
                tag=self.job.hub_tag,
                quiet=self.quiet,
            )
        except HubError as error:
            raise HubError(f"{out} is complete and stays, but: {error.message}") from error

    def _still_on_the_hub(self) -> Iterable[str]:
        parents = (*self.merged, *self.teachers)
        return [p.reference.model.path for p in parents if p.folder is None]

    def warn(self) -> None:
        """One line where the parents' licences forbid to share the result, or conflict."""
        if (warning := self.warning) is not None:
            hub.tell(f"the result is {warning}")

    @property
    def warning(self) -> str | None:
        """What `warn` says."""
        found = self._verdict()
        return kept_private(found) if found is not None else None

    def _verdict(self) -> Verdict | None:
        """As far as the parents' own cards are here; the push looks again, at all that went in."""
        parents = (*self.merged, *self.teachers)
        if any(p.folder is None for p in parents) or not self.merged:
            return None
        merged, teachers = (
            [(display_name(p.name, p.commit is None), sources.licence(p.folder)) for p in some]
            for some in (self.merged, self.teachers)
        )
        return verdict(merged, teachers)

    def _check_licences(self) -> None:
        found = self._verdict()
        if found is None or found.may_be_public:
            return
        why = " ".join(found.reasons)
        if found.status == "refused":
            raise HubError(
                f"`hub_private: false`: the licences forbid to publish this: {why} Leave it "
                f"private. {NOT_LEGAL_ADVICE}"
            )
        raise HubError(
            f"`hub_private: false`: the licences need a look before this is public "
            f"({found.status}): {why} Leave it private, and when it is made, "
            f"`mergekit-unconstrained push OUT {self.job.push_to_hub} --public "
            "--i-checked-the-licences` if you know that it may be"
        )
