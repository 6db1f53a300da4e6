"""A layer-wise merge said in mergekit's own words, for people who have mergekit alone.

mergekit's conditional parameters choose by parts of a tensor's name, so a table of coefficients
becomes a list of names with their values. Only for operators whose arithmetic is mergekit's own and
draws nothing at random; the result is the same in float32 (in bf16 mergekit rounds more often).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from mergekit_unconstrained.engine.plan import VARIES, Plan

SAME_IN_MERGEKIT = ("task_arithmetic", "ties", "breadcrumbs", "linear")
PASSED_ON = ("lambda", "normalize")
HEADER = """\
# The same merge for mergekit alone: mergekit-yaml stock_merge.yml OUT
# Every tensor has its line, since mergekit's filters know parts of names only.
"""


def stock_recipe(plan: Plan) -> str | None:
    """The recipe's text; None where mergekit has no such method or would draw other masks."""
    operator = plan.shared.get("operator")
    if operator not in SAME_IN_MERGEKIT or VARIES in plan.shared.values():
        return None
    wanted = ("weight", "density") if operator in ("ties", "breadcrumbs") else ("weight",)
    models = []
    for expert in plan.experts:
        cells = plan.coefficients[expert.name]
        parameters = {
            name: _conditional({t: float(getattr(c, name)) for t, c in cells.items()})
            for name in wanted
            if all(getattr(c, name) is not None for c in cells.values())
        }
        models.append({"model": expert.name, "parameters": parameters})
    shared = {k: plan.shared[k] for k in PASSED_ON if plan.shared.get(k) not in (None, "auto")}
    shared = {k: {"true": True, "false": False}.get(str(v), v) for k, v in shared.items()}
    recipe: dict[str, Any] = {
        "merge_method": operator,
        "base_model": plan.base.name,
        "models": models,
        "parameters": shared,
    }
    for key in ("dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template"):
        if plan.document.data.get(key) is not None:
            recipe[key] = plan.document.data[key]
    return HEADER + yaml.safe_dump({k: v for k, v in recipe.items() if v}, sort_keys=False)


def _conditional(values: dict[str, float]) -> Any:
    """Values by tensor, the commonest for what is not listed; longer names come first, since a
    name may be part of another."""
    (common, _), *_ = Counter(values.values()).most_common(1)
    listed = sorted(((n, v) for n, v in values.items() if v != common), key=lambda p: -len(p[0]))
    if not listed:
        return common
    return [*({"filter": n, "value": v} for n, v in listed), {"value": common}]
