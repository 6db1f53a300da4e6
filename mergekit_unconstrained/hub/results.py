"""Scores out of the reports that lie in a finished folder, as rows of its card.

report.json    a search: this model, its parents and the baselines on the test split
fusion.json    a fusion: bits per byte on the held-out conversations
scores.json    `evaluate`, brought in by `card --scores`
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_unconstrained.config.table import short_name
from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.hub.facts import TESTED_ON, THIS_MODEL, DataSet, Score
from mergekit_unconstrained.hub.names import display_name

SEARCH, FUSION, SCORES = "report.json", "fusion.json", "scores.json"
WIDTH = 2 * statistics.NormalDist().inv_cdf(0.975)
"""Standard errors in the width of an interval of 95 %, which report.json has of differences."""
HELD_OUT = ("held-out responses", "bits per byte")


def scores_in(folder: Path) -> tuple[Score, ...]:
    """Every score that the folder's reports hold; DataError for a report that cannot be read."""
    found: list[Score] = []
    for name, read in ((SCORES, _scores), (SEARCH, _search), (FUSION, _fusion)):
        report = report_in(folder, name)
        if report is None:
            continue
        try:
            found += read(report)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{folder / name} is not the report that this program writes "
                f"({type(error).__name__}: {error}); restore it, or remove it"
            ) from None
    return tuple(found)


def data_in(folder: Path) -> tuple[DataSet, ...]:
    """The data that nothing but `evaluate` used; none where scores.json does not name them."""
    report = report_in(folder, SCORES) or {}
    try:
        return tuple(
            DataSet(
                name=str(one["name"]),
                role=TESTED_ON,
                sha256=str(one["sha256"]),
                hashed=str(one["hashed"]),
                licence=None if one["licence"] is None else str(one["licence"]),
                rows={str(report["split"]): int(one["n"])},
            )
            for one in report.get("data", {}).values()
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{folder / SCORES} is not the report that this program writes "
            f"({type(error).__name__}: {error}); restore it, or remove it"
        ) from None


def report_in(folder: Path, name: str) -> dict[str, Any] | None:
    """A report by its file name, None where there is none."""
    file = folder / name
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    return report


def bring_scores(
    path: Path, folder: Path, parents: Sequence[str], repo_id: str | None = None
) -> None:
    """Copy the scores that `evaluate --out` wrote into a finished folder, without paths.

    path: scores.json, or the folder that it lies in. parents: what the card calls them; a model of
    the same last name is taken for one. DataError when no scores are of `folder`.
    """
    file = path / SCORES if path.is_dir() else path
    report = report_in(file.parent, file.name)
    if report is None:
        raise DataError(f"{file} does not exist: `evaluate --out DIR` writes it")
    try:
        named = _public(list(report["models"]), folder, parents, repo_id)
        models = {named[model]: found for model, found in report["models"].items()}
        kept = {"split": report["split"], "tasks": report["tasks"], "models": models}
        if isinstance(report.get("data"), dict):
            kept["data"] = report["data"]
        kept["paired"] = _paired(report, named)
        _scores(kept)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{file} is no file of `evaluate --out` ({error!r})") from None
    if THIS_MODEL not in models:
        raise DataError(
            f"{file} holds scores of {', '.join(named.values())}, and none of {folder}: evaluate "
            "it together with its parents"
        )
    with replacing(folder / SCORES) as stream:
        stream.write((json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode())


def _paired(report: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """By task and model, the standard error of this model's difference to it."""
    own = next((model for model, name in named.items() if name == THIS_MODEL), None)
    return {
        str(task): {named[model]: float(error) for model, error in errors.get(own, {}).items()}
        for task, errors in report.get("paired", {}).items()
    }


def _public(
    models: Sequence[str], folder: Path, parents: Sequence[str], repo_id: str | None
) -> dict[str, str]:
    """Model as evaluated -> what the card calls it; no two alike."""
    ends = [short_name(model) for model in models]
    named = {}
    for model, end in zip(models, ends, strict=True):
        path = Path(model)
        if model == repo_id or (path.is_dir() and path.resolve() == folder.resolve()):
            named[model] = THIS_MODEL
        elif end in parents and ends.count(end) == 1:
            named[model] = end
        else:
            named[model] = display_name(model, local=path.is_dir())
        if list(named.values()).count(named[model]) > 1:
            named[model] = f"{named[model]} ({len(named)})"
    return named


def _search(report: Mapping[str, Any]) -> list[Score]:
    own = report.get("this_model")
    return [
        Score(
            task=str(task["name"]),
            metric=str(task["unit"]),
            model=THIS_MODEL if model == own else str(model),
            value=float(mean),
            stderr=_known(error),
            n=int(n),
            paired=_from_interval(task["differences"].get(model)),
        )
        for task in report["tasks"]
        for model, (mean, error, n) in task["means"].items()
    ]


def _fusion(report: Mapping[str, Any]) -> list[Score]:
    return [
        Score(
            *HELD_OUT,
            str(model),
            float(s["bits_per_byte"]),
            _known(s["stderr"]),
            int(s["n"]),
            float(s["paired"]) if "paired" in s else None,
        )
        for model, s in report["held_out_bits_per_byte"].items()
    ]


def _from_interval(interval: Sequence[float] | None) -> float | None:
    """A standard error from the bounds of a difference, as if it were normally distributed."""
    if interval is None:
        return None
    _, low, high = interval
    return (float(high) - float(low)) / WIDTH


def _scores(report: Mapping[str, Any]) -> list[Score]:
    return [
        Score(
            task=str(task),
            metric=str(about["unit"]),
            model=str(model),
            value=float(scores["tasks"][task]["mean"]),
            stderr=_known(scores["tasks"][task]["standard_error"]),
            n=int(scores["tasks"][task]["n"]),
            paired=report.get("paired", {}).get(task, {}).get(model),
        )
        for task, about in report["tasks"].items()
        for model, scores in report["models"].items()
    ]


def _known(error: float) -> float | None:
    """A standard error, None where one example gave none."""
    return float(error) if math.isfinite(error) else None
