"""Configuration files of mergekit-evolve, read unchanged.

Its keys are those of mergekit 0.1.5 (`mergekit.evo.config`, deprecated there). What differs in the
search: bounds instead of absolute values (a weight lies between 0 and 1.5, a density between 0.05
and 1), and no task has a test split, so that the result is only as good as the data it was tuned
on says; benchmarks need `allow_test_split`, as mergekit-evolve asks for a switch of its own.
"""

from __future__ import annotations

from typing import Any

from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.words import suggest

GENOME = (
    "models",
    "merge_method",
    "base_model",
    "tokenizer_source",
    "layer_granularity",
    "normalize",
    "allow_negative_weights",
    "filters",
    "smooth",
)
TOP = (
    "genome",
    "tasks",
    "limit",
    "num_fewshot",
    "shuffle",
    "random_init",
    "apply_chat_template",
    "fewshot_as_multiturn",
)
NORMALIZED = ("ties", "dare_ties", "linear")
"""Methods whose weights mergekit-evolve normalises unless told otherwise."""
BUDGET = 100
"""mergekit-evolve's own default."""


def is_evolve(data: Any) -> bool:
    """Whether a parsed file is a configuration of mergekit-evolve."""
    genome = data.get("genome") if isinstance(data, dict) else None
    return isinstance(genome, dict) and "merge_method" in genome and "recipe" not in data


def translated(document: Document) -> dict[str, Any]:
    """The same as one of our search files, as plain data; RecipeError names a wrong key."""
    data = document.data
    genome = data["genome"]
    for place, given, known in (((), data, TOP), (("genome",), genome, GENOME)):
        for key in given:
            if key not in known:
                document.fail((*place, key), f"no such key. {suggest(key, known)}")
    models = genome.get("models")
    if not isinstance(models, list) or not models:
        document.fail(("genome", "models"), "must list the models")
    method = genome["merge_method"]
    if method == "slerp" and len(models) > 2:
        document.fail(
            ("genome", "models"),
            "slerp takes two models here; mergekit-evolve would choose two for every group",
        )
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": genome.get("base_model"),
        "models": [{"model": str(m)} for m in models],
        "dtype": "bfloat16",
    }
    if method == "slerp" and recipe["base_model"] is None:
        recipe["base_model"] = str(models[0])
    if method in NORMALIZED:
        normalize = genome.get("normalize")
        recipe["parameters"] = {"normalize": True if normalize is None else normalize}
    if genome.get("tokenizer_source"):
        recipe["tokenizer_source"] = genome["tokenizer_source"]
    ours: dict[str, Any] = {
        "recipe": {k: v for k, v in recipe.items() if v is not None},
        "genome": {
            "layers": genome.get("layer_granularity") or 0,
            "kinds": genome.get("filters") or [],
            "negative_weights": bool(genome.get("allow_negative_weights")),
            "smooth": bool(genome.get("smooth")),
        },
        "budget": BUDGET,
        "tasks": _tasks(document),
    }
    return ours


def _tasks(document: Document) -> dict[str, Any]:
    data = document.data
    given = data.get("tasks")
    if not isinstance(given, list) or not given:
        document.fail(("tasks",), "must list the tasks")
    tasks: dict[str, Any] = {}
    for index, one in enumerate(given):
        entry = {"name": one} if isinstance(one, str) else one
        if not isinstance(entry, dict) or "name" not in entry:
            document.fail(("tasks", index), "is a name, or {name, weight, metric}")
        for key in entry:
            if key not in ("name", "weight", "metric"):
                known = ("name", "weight", "metric")
                document.fail(("tasks", index, key), f"no such key. {suggest(key, known)}")
        metric, _, kept = str(entry.get("metric", "acc,none")).partition(",")
        limit = data.get("limit")
        task: dict[str, Any] = {
            "kind": "harness",
            "task": entry["name"],
            "splits": {"search": f"0:{limit}" if limit else ":"},
            "metric": metric,
            "weight": entry.get("weight", 1.0),
            "chat": "auto" if data.get("apply_chat_template", True) else False,
        }
        if kept:
            task["filter"] = kept
        if data.get("num_fewshot") is not None:
            task["fewshot"] = data["num_fewshot"]
        tasks[str(entry["name"])] = task
    return tasks
