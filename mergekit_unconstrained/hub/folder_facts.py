"""What the card of a finished folder says, gathered from the folder alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_unconstrained.errors import OutputError
from mergekit_unconstrained.hub import card, provenance, results
from mergekit_unconstrained.hub.facts import CardFacts
from mergekit_unconstrained.hub.provenance import WEIGHTS, Provenance

BY_HAND = (
    "The numbers of the recipe were written by its author: no search of this program chose them; "
    "the author's comments below say how they were found, if anything does."
)
FUSED_BY_HAND = (
    "The settings are the recipe's own: no search of this program chose them; the author's "
    "comments below say how they were found, if anything does."
)
HELD_OUT = " The held-out conversations were not trained on."


def card_facts(folder: Path, known: Provenance | None = None) -> CardFacts:
    """Facts from provenance.json, the recipe, the table and the reports of a folder.

    known: the provenance, where it was just written. OutputError or DataError says what is missing.
    """
    known = known or provenance.load(folder)
    return CardFacts(
        title=known.repo_id.rpartition("/")[2] if known.repo_id else known.title,
        method=known.method,
        parents=known.parents,
        recipe=_text(folder, known.recipe),
        command=_command(known),
        versions=known.versions,
        outputs=tuple(f for f in known.files if f.name.endswith(WEIGHTS)),
        recipe_name=known.recipe,
        coefficients=_text(folder, known.coefficients) if known.coefficients else None,
        coefficients_name=known.coefficients or "coefficients.yml",
        heatmap=known.heatmap,
        tokenizer=known.tokenizer,
        chat_template=known.chat_template,
        dtype=known.dtype,
        seconds=known.seconds,
        machine=known.machine,
        seeds=known.seeds | _search_seed(folder),
        repo_id=known.repo_id,
        tag=known.tag,
        evaluation=results.scores_in(folder),
        evaluated_on=_evaluated_on(folder),
        fusion=known.fusion,
        data=(*known.data, *results.data_in(folder)),
        chosen=_chosen(folder, known),
        report="report.md" if (folder / "report.md").is_file() else None,
        quantised=known.quantised,
        provenance=True,
        unknown=known.unknown,
    )


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(
            f"{folder / name} cannot be read ({error}), and the card quotes it: copy it again"
        ) from None


def _command(known: Provenance) -> str:
    """What to run, and the file that it needs beside the recipe."""
    command = shlex.join(["mergekit-yaml", known.recipe, "OUT", *known.flags])
    if known.settings is None:
        return command
    needed = f"# {known.recipe} needs {known.settings} of this folder in the current directory"
    return f"{needed}\n{command}"


def _chosen(folder: Path, known: Provenance) -> str:
    """How the numbers of the recipe were found, and on which data."""
    report = results.report_in(folder, results.SEARCH)
    if report is None or not report.get("found_by"):
        if known.fusion is None:
            return BY_HAND
        return FUSED_BY_HAND + (HELD_OUT if known.fusion.held_out else "")
    tasks = "; ".join(
        f"{task}: {', '.join(f'{n} {split}' for split, n in splits.items())}"
        for task, splits in report.get("splits", {}).items()
    )
    return (
        f"{report['found_by']} Candidates were compared on the search split, the best of them on "
        f"the development split; the test split was scored once, when all was chosen. Examples: "
        f"{tasks}. Scoring the candidates took {_seconds(report)}."
    )


def _seconds(report: Mapping[str, Any]) -> str:
    """Of the search and its baselines together."""
    return f"{sum(float(study['seconds']) for study in report['studies']):.0f} s"


def _search_seed(folder: Path) -> dict[str, int]:
    seed = (results.report_in(folder, results.SEARCH) or {}).get("seed")
    return {"search": seed} if isinstance(seed, int) else {}


def _evaluated_on(folder: Path) -> str:
    """Which data the figures are of."""
    said = []
    scores = results.report_in(folder, results.SCORES)
    if scores is not None:
        said.append(f"Scored with one harness on the {scores.get('split')} split of each task.")
    search = results.report_in(folder, results.SEARCH)
    if search is not None:
        said.append("The searched tasks are of the test split, on which nothing was chosen.")
        meanings = search.get("meanings") or {}
        said += [f"{k}: {v}." for k, v in meanings.items() if k != search.get("this_model")]
    if (folder / results.FUSION).is_file():
        said.append("Bits per byte are of conversations that were held out of the training.")
    return " ".join(said)


def rewrite(
    folder: Path,
    *,
    template: Path | None = None,
    repo_id: str | None = None,
    tag: str | None = None,
    quantised: Sequence[str] | None = None,
    scores: Path | None = None,
) -> CardFacts:
    """Write a folder's card again from what lies in it; gives what the card says.

    repo_id, tag, quantised: where the model is or will be on the Hub, kept in provenance.json from
    then on; None leaves what is there. scores: of `evaluate`, to be shown from then on.
    """
    known = before = provenance.load(folder)
    named = {"repo_id": repo_id, "tag": tag, "quantised": quantised}
    known = known.model_copy(update={k: v for k, v in named.items() if v is not None})
    if scores is not None:
        results.bring_scores(scores, folder, [p.name for p in known.parents], known.repo_id)
        known = provenance.amended(folder, known, results.SCORES)
    facts = card_facts(folder, known)
    card.write(folder, facts, template)
    if known != before:
        provenance.save(folder, known)
    return facts
