"""One study: candidates are drawn, scored and told to an Optuna storage until the budget is spent.

What is in the storage is never computed again. A trial whose process died is marked as abandoned
and drawn again under the same index, which gives the same candidate.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from mergekit_unconstrained.errors import OutputError, UnconstrainedError
from mergekit_unconstrained.search.genome import Values
from mergekit_unconstrained.search.objective import Outcome, Scores
from mergekit_unconstrained.search.samplers import FAILURE, VALUE, Sampler, counted, running

SCORES = "scores"
EXAMPLES = "examples"
SECONDS = "seconds"
JOB = "job"
"""Study attribute: the hash of what the scores depend on."""
CLOSED = "closed"
"""Study attribute: whether the leading process begins no further candidate."""
LOCKED_SECONDS = 5.0
"""No write takes as long: a lock that is older has no owner."""
ATTEMPTS = 4
RACES = ("IntegrityError", "OperationalError", "ProgrammingError")
HOPELESS = 5
"""So many candidates failing, and none that did not, end a study."""

Evaluate = Callable[[Values, Scores | None], Outcome]
"""A candidate and the scores of the best so far -> what came of it."""


@dataclass(frozen=True)
class Finished:
    """A finished trial, as the rest of the search sees it."""

    number: int
    values: dict[str, float]
    value: float
    scores: dict[str, list[float]]
    dropped: bool
    failure: str
    examples: int
    seconds: float

    @classmethod
    def of(cls, trial: FrozenTrial) -> Finished:
        """From the storage."""
        found = trial.user_attrs
        return cls(
            number=trial.number,
            values=dict(trial.params),
            value=float(found.get(VALUE, math.nan)),
            scores=found.get(SCORES, {}),
            dropped=trial.state == TrialState.PRUNED,
            failure=str(found.get(FAILURE, "")),
            examples=int(found.get(EXAMPLES, 0)),
            seconds=float(found.get(SECONDS, 0.0)),
        )


def open_storage(url: str | None, journal: Path) -> BaseStorage:
    """Any Optuna storage by its URL, or the journal file; a line torn by a crash is cut off."""
    if url is not None:
        return _by_url(url)
    journal.parent.mkdir(parents=True, exist_ok=True)
    left = Path(f"{journal}.lock")
    if left.is_file() and time.time() - left.stat().st_mtime > LOCKED_SECONDS:
        left.unlink(missing_ok=True)  # of a killed process; Optuna would wait half a minute for it
    lock = JournalFileOpenLock(str(journal))
    if journal.is_file():
        lock.acquire()  # a line that another process is writing is not torn
        try:
            _mend(journal)
        finally:
            lock.release()
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))


def _by_url(url: str) -> BaseStorage:
    for attempt in range(ATTEMPTS):
        try:
            found: BaseStorage = optuna.storages.get_storage(url)
        except Exception as error:
            # Two workers that create the tables at one moment: the second finds them.
            if attempt + 1 < ATTEMPTS and type(error).__name__ in RACES:
                time.sleep(1 + attempt)
                continue
            shown = _without_secret(url)
            reason = str(error).replace(url, shown)
            raise OutputError(f"cannot open the storage {shown}: {reason}") from error
        return found
    raise AssertionError


def _without_secret(url: str) -> str:
    """A storage's URL without the user and password in it."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


def _mend(journal: Path) -> None:
    text = journal.read_bytes()
    lines = text.splitlines(keepends=True)
    while lines and not _whole(lines[-1]):
        lines.pop()
    if sum(map(len, lines)) != len(text):
        with journal.open("r+b") as file:
            file.truncate(sum(map(len, lines)))


def _whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


class Study:
    """A named study in a storage. objectives: 1, or one for every task that is kept apart.

    job: hash of models, genome, tasks and settings; OutputError when the storage holds another's.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        sampler: Sampler,
        job: str,
        objectives: int = 1,
    ) -> None:
        self.name = name
        self.objectives = objectives
        self._storage = storage
        self._known: dict[int, Finished] = {}
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=sampler,
            directions=["maximize"] * objectives,
            load_if_exists=True,
        )
        found = self._study.user_attrs.get(JOB)
        if found is None:
            self._study.set_user_attr(JOB, job)
        elif found != job:
            raise OutputError(
                f"the storage holds a study {name!r} of other models, tasks or settings: name "
                "another output folder, or remove its work folder"
            )

    def open(self) -> None:
        """Let candidates be begun, whatever an earlier run left behind."""
        if self.closed:
            self._study.set_user_attr(CLOSED, False)

    def close(self) -> None:
        """No process begins another candidate, until `open`."""
        self._study.set_user_attr(CLOSED, True)

    @property
    def closed(self) -> bool:
        """Whether the leading process has ended the study."""
        return bool(self._study.user_attrs.get(CLOSED, False))

    def abandon(self, dead: Callable[[FrozenTrial], bool] = lambda _: True) -> int:
        """Give up the running trials whose process is dead; their indices are drawn again."""
        lost = [t.number for t in self._trials() if running(t) and dead(t)]
        for number in lost:
            self._study.tell(number, state=TrialState.FAIL)
        return len(lost)

    def stale(self, trial: FrozenTrial) -> bool:
        """Whether a trial runs for so long that its process must be dead (ours).

        Ten minutes, and twenty times the longest evaluation so far.
        """
        longest = max((f.seconds for f in self.finished), default=math.inf)
        begun = trial.datetime_start
        age = (datetime.now() - begun).total_seconds() if begun is not None else 0.0
        return age > max(600.0, 20 * longest)

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    @property
    def trials(self) -> list[FrozenTrial]:
        """Counted trials, those that are running included."""
        return counted(self._trials())

    @property
    def raw_trials(self) -> list[FrozenTrial]:
        """As the storage has them."""
        return self._trials()

    @property
    def unfinished(self) -> int:
        """Candidates that are being scored at this moment."""
        return sum(map(running, self._trials()))

    @property
    def finished(self) -> list[Finished]:
        """Every finished evaluation, by number."""
        return [self._of(t) for t in self.trials if t.state.is_finished()]

    def _of(self, trial: FrozenTrial) -> Finished:
        """A finished trial, which no longer changes, is read once."""
        if trial.number not in self._known:
            self._known[trial.number] = Finished.of(trial)
        return self._known[trial.number]

    @property
    def best(self) -> Finished | None:
        """The best candidate that was scored in full."""
        return best_of(self.finished)

    @property
    def front(self) -> list[int]:
        """Numbers of the candidates that no other one beats in every objective."""
        return [t.number for t in self._study.best_trials]

    def run(
        self,
        budget: int,
        evaluate: Evaluate,
        *,
        deadline: float = math.inf,
        done: Callable[[Finished], Any] = lambda _: None,
    ) -> None:
        """Go on until `budget` candidates were begun, or the clock (time.monotonic) or `close`
        says so.

        UnconstrainedError when the first candidates all fail.
        """
        while len(self.trials) < budget and time.monotonic() < deadline and not self.closed:
            trial = self._study.ask()
            if sum(t.number < trial.number for t in self.trials) >= budget:
                self._study.tell(trial, state=TrialState.FAIL)  # others were faster
                return
            try:
                finished = self._evaluate(trial, evaluate)
            except BaseException:
                self._study.tell(trial, state=TrialState.FAIL)
                raise
            done(finished)
            self._stop_if_hopeless()

    def _evaluate(self, trial: Trial, evaluate: Evaluate) -> Finished:
        values = self._store_values(trial)
        started = time.monotonic()
        finished = self.finished
        same = next((f for f in finished if f.values == values and not f.dropped), None)
        if same is not None:
            outcome = Outcome(same.value, same.scores, failure=same.failure)
            spent = 0
        else:
            best = best_of(finished) if self.objectives == 1 else None
            outcome = evaluate(values, best.scores if best is not None else None)
            spent = outcome.examples
        trial.set_user_attr(SCORES, outcome.scores)
        trial.set_user_attr(EXAMPLES, spent)
        trial.set_user_attr(SECONDS, time.monotonic() - started)
        if outcome.failure:
            trial.set_user_attr(FAILURE, outcome.failure)
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr(VALUE, outcome.value)
            if outcome.dropped:
                self._study.tell(trial, state=TrialState.PRUNED)
            elif self.objectives == 1:
                self._study.tell(trial, outcome.value)
            else:
                self._study.tell(trial, [mean(v) for v in outcome.scores.values()])
        return self._of(next(t for t in self._trials() if t.number == trial.number))

    def _store_values(self, trial: Trial) -> dict[str, float]:
        """What the sampler drew, written down.

        `suggest_float` does the same and copies all values for every one of them: a tenth of a
        second for fifty.
        """
        drawn = trial.relative_params
        study = self._storage.get_study_id_from_name(self.name)
        number = self._storage.get_trial_id_from_study_id_trial_number(study, trial.number)
        for name, distribution in self._space().items():
            internal = distribution.to_internal_repr(drawn[name])
            self._storage.set_trial_param(number, name, internal, distribution)
        return {name: float(drawn[name]) for name in self._space()}

    def _space(self) -> Mapping[str, Any]:
        sampler = self._study.sampler
        assert isinstance(sampler, Sampler)
        return sampler.space

    def _stop_if_hopeless(self) -> None:
        finished = self.finished
        if len(finished) >= HOPELESS and all(f.failure for f in finished):
            reasons = "; ".join(dict.fromkeys(f.failure for f in finished))
            raise UnconstrainedError(f"every candidate of {self.name} failed: {reasons}")


def best_of(finished: Sequence[Finished]) -> Finished | None:
    """The first of the best among those that were scored in full."""
    whole = [f for f in finished if not f.dropped and not f.failure]
    return max(whole, key=lambda f: (f.value, -f.number)) if whole else None


def ranked(finished: Sequence[Finished], count: int) -> list[Finished]:
    """The best `count` different candidates that were scored in full."""
    whole = [f for f in finished if not f.dropped and not f.failure]
    found: list[Finished] = []
    for one in sorted(whole, key=lambda f: (-f.value, f.number)):
        if all(one.values != other.values for other in found):
            found.append(one)
    return found[:count]


def mean(values: Sequence[float]) -> float:
    """Of a task's examples."""
    return math.fsum(values) / len(values)
