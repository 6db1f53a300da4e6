"""What happens when somebody does something on the page, without the page.

app.py hands over what was typed and draws what comes back. `owner` is whoever acts: a signed-in
user, or one browser tab. `token` is theirs, None where they have none; it is kept nowhere.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from mergekit_unconstrained.errors import HubError, OutputError, UnconstrainedError
from mergekit_unconstrained.hub.facts import CardFacts
from mergekit_unconstrained.hub.licences import Verdict as Licence
from mergekit_unconstrained.space import commands, confine, hub_models, inspect, own_recipe
from mergekit_unconstrained.space.inspect import Cost, Model, Verdict
from mergekit_unconstrained.space.runner import Job, Jobs, Progress
from mergekit_unconstrained.space.state import Curve, Expert, State, recipe_text, start

TICK = "tick “I have checked the licences” when you know that it may be public"
SLIDERS = 8
"""Numbers of one expert: attention and MLP at three depths each, the rest, the density."""
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Settings:
    """Where a Space works and what it allows.

    limit: bytes of models and result together that are merged here. hosted: whether strangers use
    it, as on the Hub.
    """

    work_dir: Path
    models_dir: Path
    limit: int = 8 * 2**30
    hosted: bool = False

    @property
    def results(self) -> Path | None:
        """Where results stay when the page is closed; None where strangers would leave theirs."""
        return None if self.hosted else self.work_dir.resolve() / "results"


@dataclass(frozen=True)
class View:
    """What the page shows of a state. picture: the heat map as PNG, None where nothing is weighed.

    problem: why it cannot be run at all, "" otherwise. here: whether it may run here.
    """

    recipe: str
    picture: bytes | None
    cost: Cost | None
    problem: str
    here: bool
    why_not_here: str = ""


class Desk:
    """One Space: its folders and its jobs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.models_dir.mkdir(parents=True, exist_ok=True)
        self.jobs = Jobs(
            settings.work_dir / "jobs", separate=settings.hosted, results=settings.results
        )

    # -- parents -----------------------------------------------------------------------------------

    def choices(self) -> list[str]:
        """The models that lie here."""
        return confine.local_models(self.settings.models_dir)

    def model(self, name: str, owner: str, token: str | None) -> Model:
        """A model by name: a folder here, or one of the Hub."""
        name = confine.checked_name(name)
        folder = confine.local_model(self.settings.models_dir, name)
        if folder is None:
            if not confine.is_hub_id(name):
                raise OutputError(f"{confine.shown(name)} is no folder in the list of models here")
            # What a token may see is not for everybody: each person has shadows of their own.
            own = hashlib.sha256(owner.encode()).hexdigest()[:16] if token else "public"
            folder = hub_models.shadow(
                name, self.settings.work_dir / "shadows" / own, client(token)
            )
        return inspect.look(name, folder)

    def verdict(
        self,
        base: str | None,
        experts: Sequence[str],
        bases: Sequence[str] = (),
        owner: str = "",
        token: str | None = None,
    ) -> Verdict | None:
        """Whether and how models can be merged; None while too few are chosen."""
        if not base or not experts:
            return None
        if len(experts) + len(bases) + 1 > confine.MAX_MODELS:
            raise OutputError(f"more than {confine.MAX_MODELS} models: use a terminal for that")
        found = [self.model(n, owner, token) for n in (base, *experts, *bases)]
        count = 1 + len(experts)
        return inspect.verdict(found[0], found[1:count], found[count:])

    def own(self, text: str, owner: str, token: str | None) -> tuple[Verdict, State]:
        """A recipe that somebody typed, with its models, when it may be run here."""
        document = own_recipe.checked(text)
        base, experts = own_recipe.runnable(document)
        found = self.verdict(base, experts, (), owner, token)
        assert found is not None
        if found.way != "layerwise":
            raise OutputError(" ".join(found.reasons) or "these models cannot be merged")
        return found, replace(start(base, "layerwise", found.groups), own=text)

    # -- weights -----------------------------------------------------------------------------------

    def view(self, state: State, found: Verdict) -> View:
        """Recipe, heat map and cost of a state; everything is read back from the recipe's text."""
        text = recipe_text(state)
        cost, picture = None, None
        try:
            if found.problems:
                return View(text, None, None, found.problems[0], False)
            own_recipe.checked(text)
            if state.way == "layerwise":
                made = inspect.plan(state, found)
                picture = draw(inspect.grid(made, found))
                cost = inspect.cost_of_merge(made)
            else:
                cost = inspect.cost_of_fusion(state, found)
                grids = inspect.group_grids(state, found)
                picture = draw(grids) if grids is not None else None
        except UnconstrainedError as error:
            return View(text, None, None, str(error), False)
        why = self._why_not_here(state, cost)
        return View(text, picture, cost, "", not why, why)

    def _why_not_here(self, state: State, cost: Cost) -> str:
        if state.way != "layerwise":
            return "A fusion trains a model: run it where there is a GPU, with the commands below."
        if cost.limit_bytes > self.settings.limit:
            from mergekit_unconstrained import present

            return (
                f"Models and result are {present.size(cost.limit_bytes)}, and "
                f"{present.size(self.settings.limit)} are merged here at most: use the commands "
                "below."
            )
        return ""

    # -- merging -----------------------------------------------------------------------------------

    def run(
        self, state: State, found: Verdict, name: str, owner: str, token: str | None
    ) -> Iterator[tuple[Job, Progress]]:
        """Merge here, and give what is seen of it until it ends."""
        view = self.view(state, found)
        if not view.here:
            raise OutputError(view.problem or view.why_not_here)
        job = self.jobs.start(
            owner, view.recipe, checked_result(name), self.settings.models_dir.resolve(), token
        )
        for seen in self.jobs.follow(job):
            yield job, seen

    def commands(self, state: State, name: str, repository: str = "") -> tuple[str, str, str]:
        """For a terminal, for a job of the Hub's, and the script of that job."""
        name = checked_result(name)
        repository = confine.checked_repository(repository) if repository.strip() else ""
        script = commands.job_script(recipe_text(state), name, repository or f"owner/{name}")
        return commands.terminal(name, repository), commands.job(state.way), script

    # -- the card, and the push --------------------------------------------------------------------

    def card(self, owner: str, repository: str = "", tag: str = "") -> str:
        """The card of this person's result as Markdown, less its metadata and its pictures.

        With the name and tag that a push would write into it, where owner/name is given.
        """
        from mergekit_unconstrained.hub import card

        job = self._finished(owner)
        text = (job.out / "README.md").read_text(encoding="utf-8")
        if text == card.render(self._facts(job, "", "")):  # else somebody edited it, and it stays
            text = card.render(self._facts(job, repository, tag))
        return card_body(text)

    def licence(self, owner: str, repository: str) -> Licence:
        """What may be done with this person's result under the name that it is pushed to."""
        name = confine.checked_repository(repository)
        return self._facts(self._finished(owner), name, "").verdict

    @staticmethod
    def _facts(job: Job, repository: str, tag: str) -> CardFacts:
        """What the card tells; repository and tag are left out where they are not whole."""
        from mergekit_unconstrained.hub import folder_facts, provenance

        known = provenance.load(job.out)
        try:
            name = confine.checked_repository(repository)
        except OutputError:
            name = ""
        if name:
            given = {"repo_id": name, "tag": tag.strip() or known.tag}
            known = known.model_copy(update=given)
        return folder_facts.card_facts(job.out, known)

    def push(
        self,
        repository: str,
        owner: str,
        token: str | None,
        *,
        private: bool = True,
        tag: str = "",
        acknowledged: bool = False,
    ) -> str:
        """Push this person's result with their own rights; gives its address."""
        from mergekit_unconstrained.hub import gate, push

        job = self._finished(owner)
        name = confine.checked_repository(repository)
        if not private:
            gate.refuse(self.licence(owner, name), acknowledged)
        try:
            pushed = push.push(
                job.out,
                name,
                private=private,
                tag=tag.strip() or None,
                checked_licences=acknowledged,
                api=_signed_in(token),
                quiet=True,
            )
        except HubError as error:  # the gate names what is said in a terminal
            raise HubError(str(error).replace(gate.ANSWERED, TICK)) from error
        return str(pushed.url)

    def check_access(self, repository: str, token: str | None, *, private: bool = True) -> None:
        """Whether a push to this repository would be allowed: asked before a merge begins."""
        from mergekit_unconstrained.hub import access

        access.check_access(
            confine.checked_repository(repository), private=private, api=_signed_in(token)
        )

    def _finished(self, owner: str) -> Job:
        job = self.jobs.of(owner)
        if job is None or not job.succeeded:
            raise OutputError("there is no finished merge of yours: run step 4 first")
        return job


def chosen(found: Verdict, settings: Sequence[Any], sliders: Sequence[float]) -> State:
    """The state that the page's inputs stand for.

    settings: operator, lambda, dtype, data set, training steps. sliders: SLIDERS numbers for each
    expert; the uniform merge where there are none yet.
    """
    operator, strength, dtype, dataset, max_steps = settings
    state = start(found.models[0].name, found.way, found.groups)
    experts = {}
    for index, name in enumerate(state.weighed):
        n = [float(x) for x in sliders[index * SLIDERS : (index + 1) * SLIDERS]]
        if len(n) == SLIDERS:
            experts[name] = Expert(name, Curve(*n[0:3]), Curve(*n[3:6]), n[6], n[7])
    return replace(
        state,
        experts={**state.experts, **experts},
        operator=str(operator),
        strength=float(strength),
        dtype=str(dtype),
        dataset=str(dataset).strip()[: confine.MAX_NAME],
        max_steps=int(max_steps or 0),
    )


def client(token: str | None) -> HfApi:
    """The Hub with a person's own rights; with nobody's where they have not signed in."""
    return HfApi(token=token or False, library_name="mergekit-unconstrained")


def _signed_in(token: str | None) -> HfApi:
    if not token:
        raise OutputError("sign in first: a push is made with your own rights")
    return client(token)


def checked_result(name: str) -> str:
    """The name of a result's folder; OutputError for what cannot be one."""
    text = name.strip()
    if not _NAME.fullmatch(text) or text.endswith(".partial") or ".." in text:
        raise OutputError(
            f"{confine.shown(text)} is no name for a result: letters, digits, . _ and -, 96 at most"
        )
    return text


def draw(grid: inspect.Grid) -> bytes:
    """The heat map as PNG."""
    from mergekit_unconstrained.hub import heatmap

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coefficients.png"
        heatmap.draw(grid, path)
        return path.read_bytes()


def as_data_url(png: bytes) -> str:
    """A PNG within a page, so that no file has to be served."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def card_body(text: str) -> str:
    """A card's Markdown without metadata and without pictures, which are shown beside it."""
    lines = text.splitlines()
    if lines[:1] == ["---"] and "---" in lines[1:]:
        lines = lines[lines.index("---", 1) + 1 :]
    kept, fence = [], ""
    for line in lines:
        ticks = re.match(r"`{3,}", line)
        if ticks:
            fence = "" if fence and line == fence else fence or ticks[0]
        if fence or not re.fullmatch(r"!\[[^\]]*\]\([^)]*\)", line.strip()):
            kept.append(line)
    return "\n".join(kept).strip() + "\n"
