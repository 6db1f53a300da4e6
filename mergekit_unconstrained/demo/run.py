"""`mergekit-unconstrained demo`: two experts, a uniform and a layer-wise merge, one table.

Finished merges and scores are kept beside a hash of all they depend on (OUT/state), so that a
second run, after Ctrl-C or for another look, does what is missing only.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mergekit_unconstrained.demo.assets import fetch_smollm2
from mergekit_unconstrained.demo.merging import concrete_recipe, merge_command, run_merge
from mergekit_unconstrained.demo.notes import Scores, digest, recall, remember
from mergekit_unconstrained.demo.tasks import GENERATED, TASKS, TEST_SIZE
from mergekit_unconstrained.engine.staging import check_space
from mergekit_unconstrained.errors import MissingExtraError, OutputError
from mergekit_unconstrained.resources import resource

# layer-wise first: that run puts the adapted models into the cache whole or not at all
MERGES = ("layerwise", "uniform")
SAMPLE_QUESTION = "What is the capital of France?"
_NEEDED_BYTES = 1_500_000_000  # two merges and two models with their adapter applied, 269 MB each

_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja")
_STEPS = len(TASKS) * (TEST_SIZE + GENERATED)  # examples scored for one model


@dataclass(frozen=True)
class Subject:
    """One row of the table: a model folder, perhaps with an adapter."""

    label: str
    folder: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured: scores[label][task], a sample of text, wall seconds of this run."""

    scores: dict[str, Scores]
    sample: str
    seconds: float
    versions: dict[str, str]


def run_demo(out: Path, console: Console) -> DemoReport:
    """Fetch, merge, evaluate, print and write OUT/report.json."""
    started = time.monotonic()
    for package in ("gguf", "accelerate", "peft", "reasoning_gym"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"the demo (no {package} here)", "demo")
    out = out.resolve()
    try:
        for folder in ("models", "state"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}") from error
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress, _quiet():
        base = fetch_smollm2(progress)
        adapters = {name: resource(f"recipes/demo/experts/{name}") for name in TASKS}
        merged = {name: _merge(name, base, out, progress) for name in MERGES}
        subjects = [
            Subject("base", base),
            *(Subject(f"LoRA {name}", base, path) for name, path in adapters.items()),
            Subject("uniform merge", merged["uniform"]),
            Subject("layer-wise merge", merged["layerwise"]),
        ]
        scores = {subject.label: _score(subject, out, progress) for subject in subjects}
        sample = _sample(merged["layerwise"], progress)
    seconds = time.monotonic() - started
    packages = ("mergekit", "torch", "transformers", "peft", "reasoning-gym")
    report = DemoReport(scores, sample, seconds, {name: version(name) for name in packages})
    (out / "report.json").write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    console.print(Panel(escape(sample), title="the layer-wise merge says", title_align="left"))
    console.print(_table(report))
    console.print(f"{seconds:.0f} s in all; the merged models lie in {escape(str(out / 'models'))}")
    return report


def _merge(name: str, base: Path, out: Path, progress: Progress) -> Path:
    """One merge through mergekit-yaml, unless a finished one of the same inputs is there."""
    task = progress.add_task(f"merging: {name}", total=100)
    folder = out / "recipes" / name
    folder.mkdir(parents=True, exist_ok=True)
    recipe = concrete_recipe(resource(f"recipes/demo/{name}.yml"), base, folder)
    experts = resource("recipes/demo/experts")
    parents = digest(base, experts)
    target, note = out / "models" / name, out / "state" / f"merge-{name}.json"
    packages = [version("mergekit"), version("mergekit-unconstrained")]
    inputs = digest(folder, parents, *packages)
    if recall(note, inputs) is None or not (target / "config.json").is_file():
        for old in (target, target.with_name(f"{name}.partial")):
            shutil.rmtree(old, ignore_errors=True)
        check_space(target, _NEEDED_BYTES)
        # mergekit knows an applied adapter by its path alone, hence the contents in the name
        cache = out / "adapters" / parents[:12]
        cache.mkdir(parents=True, exist_ok=True)
        command = merge_command(recipe, target, cache)
        log = out / "state" / f"merge-{name}.log"
        # one of several bars is at 100, the merge is not done yet
        run_merge(command, log, lambda percent: progress.update(task, completed=min(percent, 99)))
        remember(note, inputs, {})
    progress.update(task, completed=100)
    return target


def _score(subject: Subject, out: Path, progress: Progress) -> Scores:
    """Scores of one model on every task, unless noted for the same model, tasks and code."""
    from mergekit_unconstrained.demo import evaluate, tasks

    task = progress.add_task(f"evaluating: {subject.label}", total=_STEPS)
    note = out / "state" / f"score-{subject.label.replace(' ', '-')}.json"
    code = [Path(str(module.__file__)) for module in (evaluate, tasks)]
    # a merge's card tells times, which change nothing here
    model_files = sorted(p for p in subject.folder.iterdir() if p.suffix in _MODEL_SUFFIXES)
    packages = [version("reasoning-gym"), version("torch")]
    inputs = digest(*model_files, subject.adapter or "", *code, *packages)
    scores = recall(note, inputs)
    if scores is None:
        model, tokenizer = evaluate.load(subject.folder, subject.adapter)
        found = evaluate.evaluate(
            model, tokenizer, TASKS, done=lambda count: progress.advance(task, count)
        )
        scores = {name: asdict(value) for name, value in found.items()}
        remember(note, inputs, scores)
    progress.update(task, completed=_STEPS)
    return scores


def _sample(folder: Path, progress: Progress) -> str:
    """Greedy answers of the merged model: one question of each task, and one of neither."""
    from mergekit_unconstrained.demo.evaluate import greedy, load
    from mergekit_unconstrained.demo.tasks import Example, prompt

    task = progress.add_task("generating a sample", total=1)
    model, tokenizer = load(folder)
    examples = [chosen.examples("test", 1)[0] for chosen in TASKS.values()]
    examples.append(Example(SAMPLE_QUESTION, ""))
    answers = greedy(model, tokenizer, [prompt(tokenizer, one) for one in examples], 24)
    progress.update(task, completed=1)
    right = [f"   (right: {one.answer})" if one.answer else "" for one in examples]
    return "\n\n".join(
        f"> {one.question}\n{answer}{note}"
        for one, answer, note in zip(examples, answers, right, strict=True)
    )


def _table(report: DemoReport) -> Table:
    title = f"{TEST_SIZE} held-out questions a task, exact match on the first {GENERATED}"
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    table.add_column("model")
    for name in TASKS:
        table.add_column(f"{name}\nnats/token ± se", justify="right")
        table.add_column("exact\nmatch ± se", justify="right")
    for label, tasks in report.scores.items():
        cells = []
        for score in tasks.values():
            cells.append(f"{score['log_likelihood']:.3f} ± {score['log_likelihood_se']:.3f}")
            cells.append(f"{score['exact_match']:.2f} ± {score['exact_match_se']:.2f}")
        table.add_row(label, *cells)
    return table


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own bars and notices, which would break the display."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
