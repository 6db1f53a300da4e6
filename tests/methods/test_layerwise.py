"""`layerwise` against mergekit's own methods: bit for bit where both are exact, else in law."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_unconstrained import compat
from mergekit_unconstrained.errors import RecipeError

from mergekit.merge import run_merge  # isort: skip  (compat first: it silences mergekit's imports)
from mergekit.merge_methods import merge_tensors  # isort: skip

SHAPE = (64, 128)


def upstream(tensors: list[torch.Tensor], method: str, **parameters: Any) -> torch.Tensor:
    """mergekit's method; `dtype` is that of its arithmetic."""
    dtype = parameters.pop("dtype", None)
    if method == "linear":  # knows no base
        return merge_tensors(tensors[1:], method, parameters=parameters, dtype=dtype)
    return merge_tensors(tensors, method, base_index=0, parameters=parameters, dtype=dtype)


def ours(tensors: list[torch.Tensor], operator: str, **parameters: Any) -> torch.Tensor:
    """`layerwise` with an operator, of a tensor called `w`."""
    parameters = {"weight": 1.0, "operator": operator, **parameters}
    return merge_tensors(tensors, "layerwise", base_index=0, parameters=parameters, name="w")


def without_ties(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A base and experts whose task vectors are exact and have no two equal magnitudes."""
    generator = torch.Generator().manual_seed(count)
    n = math.prod(SHAPE)
    tensors = [torch.randint(-(2**22), 2**22, (n,), generator=generator)]
    for _ in range(count):
        size = torch.randperm(n, generator=generator) + 1
        sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
        tensors.append(tensors[0] + sign * size)
    # Integers below 2^23 and a power of two: every float32 here is exact.
    return [(t.double() / 2**20).reshape(SHAPE).to(dtype) for t in tensors]


def with_ties(count: int) -> list[torch.Tensor]:
    """Task vectors of a few distinct magnitudes, as bf16 files give them."""
    generator = torch.Generator().manual_seed(count)
    base = torch.randint(-256, 257, SHAPE, generator=generator) / 128
    return [
        base,
        *(base + torch.randint(-20, 21, SHAPE, generator=generator) / 128 for _ in range(count)),
    ]


def checkpoint_like(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights of deviation 0.02 and task vectors of deviation 0.002, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(count)
    base = 0.02 * torch.randn(SHAPE, generator=generator)
    deltas = (0.002 * torch.randn(SHAPE, generator=generator) for _ in range(count))
    return [base.to(dtype), *((base.to(dtype).float() + d).to(dtype) for d in deltas)]


WEIGHTS = [0.3, 0.7, -0.2, 1.1, 0.45]
DENSITIES = [0.2, 0.5, 1.0, 0.77, 0.0]

# (mergekit's method, our operator, which of weight and density are per model, shared parameters)
SAME: list[tuple[str, str, str, dict[str, Any]]] = [
    ("task_arithmetic", "task_arithmetic", "w", {}),
    ("task_arithmetic", "task_arithmetic", "w", {"normalize": True, "lambda": 0.7}),
    ("ties", "ties", "wd", {}),
    ("ties", "ties", "wd", {"normalize": False, "lambda": -0.5}),
    ("ties", "ties", "wd", {"rescale": True}),
    ("ties", "ties", "w", {}),
    ("breadcrumbs", "breadcrumbs", "wd", {}),
    ("breadcrumbs", "breadcrumbs", "wd", {"gamma": 0.2}),
    ("breadcrumbs", "breadcrumbs", "wd", {"normalize": True, "rescale": True}),
    ("breadcrumbs", "breadcrumbs", "w", {}),
    ("sce", "sce", "", {}),
    ("sce", "sce", "", {"select_topk": 0.3}),
    ("sce", "sce", "", {"select_topk": 0.0}),
    ("linear", "linear", "w", {}),
    ("linear", "linear", "w", {"normalize": False}),
]


def per_model(which: str, count: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    if "w" in which:
        parameters["weight"] = WEIGHTS[:count]
    if "d" in which:
        parameters["density"] = DENSITIES[:count]
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("method", "operator", "which", "shared"), SAME)
def test_bit_identical_to_mergekit_without_ties(
    method: str,
    operator: str,
    which: str,
    shared: dict[str, Any],
    count: int,
    dtype: torch.dtype,
) -> None:
    tensors = without_ties(count, dtype)
    parameters = per_model(which, count) | shared
    expected = upstream(tensors, method, **parameters)
    assert torch.equal(ours(tensors, operator, **parameters), expected)


@pytest.mark.parametrize("shape", [(1,), (7,), (1023,), (5, 7, 11), (129, 257)])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("method", "operator", "which", "shared"), SAME)
def test_bit_identical_to_mergekit_in_any_shape(
    method: str,
    operator: str,
    which: str,
    shared: dict[str, Any],
    count: int,
    shape: tuple[int, ...],
    stable_sorting: None,
) -> None:
    """Up to four experts; from the fifth on mergekit's sum has another order in odd corners."""
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(shape, generator=generator) for _ in range(count + 1)]
    parameters = per_model(which, count) | shared
    expected = upstream(tensors, method, **parameters)
    assert torch.equal(ours(tensors, operator, **parameters), expected)


@pytest.fixture
def stable_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit's sorts, made to keep the order of equal magnitudes."""
    for name in ("argsort", "sort"):
        monkeypatch.setattr(torch, name, functools.partial(getattr(torch, name), stable=True))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("method", "operator", "which", "shared"), [row for row in SAME if row[0] != "sce"]
)
def test_bit_identical_to_mergekit_with_ties_once_its_sort_is_stable(
    method: str,
    operator: str,
    which: str,
    shared: dict[str, Any],
    count: int,
    stable_sorting: None,
) -> None:
    tensors = with_ties(count)
    parameters = per_model(which, count) | shared
    expected = upstream(tensors, method, **parameters)
    assert torch.equal(ours(tensors, operator, **parameters), expected)


# -- random methods: equal in law -----------------------------------------------------------------


def kept_and_factors(merged: torch.Tensor, tensors: list[torch.Tensor]) -> tuple[Any, Any]:
    """Of one expert at weight 1: which entries were kept, and by what each was multiplied."""
    delta, change = tensors[1] - tensors[0], merged - tensors[0]
    kept = change.abs() > delta.abs() / 2
    return kept, (change / delta)[kept]


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_random_methods_keep_the_fraction_and_the_l1_norm_of_mergekits(
    method: str, density: float
) -> None:
    tensors = without_ties(1, torch.float64)
    torch.manual_seed(0)
    both = {
        "mergekit": upstream(tensors, method, weight=1.0, density=density),
        "ours": ours(tensors, method, density=density),
    }
    norm = (tensors[1] - tensors[0]).abs().sum()
    bound = 5 * math.sqrt(density * (1 - density) / norm.new_ones(SHAPE).numel())
    for who, merged in both.items():
        kept, factors = kept_and_factors(merged, tensors)
        assert abs(float(kept.double().mean()) - density) < bound, who
        assert float(factors.max() - factors.min()) < 1e-4, who  # one factor for all
        change = (merged - tensors[0]).abs().sum()
        assert float(change / norm) == pytest.approx(1, rel=1e-5), who


def test_della_keeps_by_rank_as_mergekit_does() -> None:
    tensors = without_ties(1, torch.float64)
    order = (tensors[1] - tensors[0]).abs().argsort(dim=1).argsort(dim=1)
    torch.manual_seed(0)
    for merged in (
        upstream(tensors, "della", weight=1.0, density=0.5, epsilon=0.3),
        ours(tensors, "della", density=0.5, epsilon=0.3),
    ):
        kept, _ = kept_and_factors(merged, tensors)
        for low in range(0, SHAPE[1], 32):
            band = (order >= low) & (order < low + 32)
            expected = 0.2 + 0.6 * (low + 15.5) / (SHAPE[1] - 1)
            bound = 5 * math.sqrt(0.25 / int(band.sum()))
            assert abs(float(kept[band].double().mean()) - expected) < bound


@pytest.mark.parametrize("operator", ["dare_linear", "dare_ties"])
def test_inverse_rescaling_divides_by_the_density(operator: str) -> None:
    """The paper's rule, which keeps the expectation; mergekit has the norm instead."""
    tensors = without_ties(1, torch.float64)
    merged = ours(tensors, operator, density=0.2, rescale="inverse")
    _, factors = kept_and_factors(merged, tensors)
    torch.testing.assert_close(factors, torch.full_like(factors, 5.0))
    draws = [
        ours(tensors, operator, density=0.2, rescale="inverse", seed=seed) for seed in range(100)
    ]
    delta = tensors[1] - tensors[0]
    mean = torch.stack(draws).mean(dim=0) - tensors[0]
    error = delta.abs() * math.sqrt(0.8 / 0.2 / 100)
    outside = ((mean - delta).abs() > 3 * error).double().mean()
    assert float(outside) < 0.006  # 0.27 % of a normal distribution, with room for a binomial's


# -- bf16: closer to the truth than mergekit ------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "which"),
    [("task_arithmetic", "w"), ("ties", "wd"), ("breadcrumbs", "wd"), ("sce", ""), ("linear", "w")],
)
def test_bf16_is_at_least_as_close_to_float64_as_mergekits(
    method: str, which: str, stable_sorting: None
) -> None:
    tensors = checkpoint_like(3, torch.bfloat16)
    parameters = per_model(which, 3)
    if "weight" in parameters:  # no weighted sum is nearly zero, whose sign rounding would decide
        parameters["weight"] = [0.3141592, 0.7182818, -0.5772156]
    truth = upstream(tensors, method, dtype=torch.float64, **parameters)
    theirs = upstream(tensors, method, **parameters)
    merged = ours(tensors, method, **parameters)
    assert theirs.dtype == merged.dtype == torch.bfloat16
    our_error = float((merged.double() - truth).abs().mean())
    their_error = float((theirs.double() - truth).abs().mean())
    assert our_error <= their_error
    # Nothing but the last rounding: that of the truth itself.
    floor = float((truth.bfloat16().double() - truth).abs().mean())
    assert our_error == pytest.approx(floor, rel=1e-3)


# -- per-layer coefficients: the table against mergekit's gradients and filters -------------------

ATTENTION = [0.9, 0.1, 0.5, -0.25]
MLP = [0.0, 0.4, 1.5, 0.7]


def run(recipe: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Run a recipe as mergekit-yaml does and read what it wrote."""
    from safetensors.torch import load_file

    config = compat.MergeConfiguration.model_validate(recipe)
    options = compat.MergeOptions(write_model_card=False, copy_tokenizer=False, quiet=True)
    run_merge(config, str(folder), options, config_source=yaml.safe_dump(recipe))
    merged: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        merged |= load_file(shard)
    return merged


def gradients(first: list[float], second: list[float], otherwise: float) -> list[dict[str, Any]]:
    """mergekit's spelling of a value for every layer, apart for attention and MLP."""
    return [
        {"filter": "self_attn", "value": first},
        {"filter": "mlp", "value": second},
        {"value": otherwise},
    ]


DENSITY = [0.25, 0.5, 1.0, 0.75]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_table_does_what_gradients_and_filters_do(
    method: str, make_tiny: Any, tmp_path: Path
) -> None:
    models = make_tiny("llama", experts=2)
    weights = {
        "expert1": {"attention": ATTENTION, "mlp": MLP, "default": 0.3},
        "expert2": {"attention": MLP, "mlp": ATTENTION, "default": 0.6},
    }
    densities = {"expert1": {"attention": DENSITY, "mlp": DENSITY[::-1], "default": 0.9}}
    if method == "task_arithmetic":  # drops nothing
        densities = {}

    def stock_parameters(expert: str) -> dict[str, Any]:
        return {
            key: gradients(*values[expert].values())
            for key, values in (("weight", weights), ("density", densities))
            if expert in values
        }

    def cell(expert: str, word: str, layer: int | None = None) -> dict[str, float]:
        """The same, as a table has it."""
        found = {}
        for key, values in (("weight", weights), ("density", densities)):
            if expert in values:
                value = values[expert][word]
                found[key] = value if layer is None else value[layer]
        return found

    stock: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(models.base),
        "dtype": "float32",
        "models": [
            {"model": str(expert), "parameters": stock_parameters(expert.name)}
            for expert in models.experts
        ],
    }
    table = {
        "layers": 4,
        "experts": {
            expert: {
                "default": cell(expert, "default"),
                "layers": {
                    layer: {word: cell(expert, word, layer) for word in ("attention", "mlp")}
                    for layer in range(4)
                },
            }
            for expert in weights
        },
    }
    path = tmp_path / "table.yml"
    path.write_text(yaml.safe_dump(table))
    with_table = {
        **stock,
        "merge_method": "layerwise",
        "models": [{"model": str(expert)} for expert in models.experts],
        "parameters": {"operator": method, "coefficients": str(path)},
    }
    with_gradients = {
        **stock,
        "merge_method": "layerwise",
        "parameters": {"operator": method},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("argsort", "sort"):
            patch.setattr(torch, name, functools.partial(getattr(torch, name), stable=True))
        expected = run(stock, tmp_path / "stock")
    for kind, recipe in (("table", with_table), ("gradients", with_gradients)):
        merged = run(recipe, tmp_path / kind)
        assert merged.keys() == expected.keys()
        for name, tensor in expected.items():
            assert merged[name].dtype == torch.float32
            assert torch.equal(merged[name], tensor), (kind, name)


# -- parameters -----------------------------------------------------------------------------------


def test_the_alias_is_the_same_method() -> None:
    tensors = without_ties(2)
    parameters = {"weight": WEIGHTS[:2], "operator": "ties", "density": 0.5}
    alias = merge_tensors(tensors, "mku_layerwise", base_index=0, parameters=parameters)
    assert torch.equal(alias, ours(tensors, **parameters))


@pytest.mark.parametrize(("spelling", "same"), [(True, "l1"), (False, "none")])
def test_rescale_may_be_spelt_as_mergekit_does(spelling: bool, same: str) -> None:
    tensors = without_ties(2)
    settings = {"operator": "ties", "density": 0.3}
    assert torch.equal(
        ours(tensors, rescale=spelling, **settings), ours(tensors, rescale=same, **settings)
    )


def test_a_table_beats_the_recipe_and_the_recipe_fills_its_gaps(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    cells = {"default": {"density": 0.5}, "layers": {"0": {"up": 0.25}}}
    path.write_text(json.dumps({"layers": 1, "experts": {"math": cells}}))
    tensors = without_ties(2)

    def merge(name: str) -> torch.Tensor:
        return merge_tensors(
            tensors,
            "layerwise",
            base_index=0,
            ids=["base", "org/math", "code"],
            name=name,
            parameters={
                "operator": "breadcrumbs",
                "coefficients": str(path),
                "weight": [0.7, 0.1],
                "density": [1.0, 0.9],
            },
        )

    def direct(weight: list[float], density: list[float]) -> torch.Tensor:
        return ours(tensors, "breadcrumbs", weight=weight, density=density)

    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(merge(up), direct([0.25, 0.1], [0.5, 0.9]))
    assert torch.equal(merge(down), direct([0.7, 0.1], [0.5, 0.9]))


def test_a_weight_that_nobody_gives_is_asked_for() -> None:
    with pytest.raises(RecipeError, match=r"no weight for code in lm_head\.weight.*coefficient"):
        merge_tensors(
            [torch.zeros(3)] * 2,
            "layerwise",
            base_index=0,
            ids=["base", "code"],
            name="lm_head.weight",
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": math.nan},
        {"weight": math.inf},
        {"weight": "much"},
        {"density": 1.5},
        {"density": -0.1},
        {"gamma": 2},
        {"epsilon": -1},
        {"operator": "tie"},
        {"rescale": "l2"},
        {"normalize": "perhaps"},
        {"select_topk": 1.01},
        {"lambda": math.nan},
        {"scope": "layer"},
        {"seed": 0.5},
        {"precision": "bfloat16"},
        {"no_such_parameter": 1},
    ],
)
def test_an_impossible_parameter_is_refused(wrong: dict[str, Any]) -> None:
    tensors = without_ties(1)
    operator = wrong.pop("operator", "task_arithmetic")
    with pytest.raises((ValueError, TypeError)):
        ours(tensors, operator, **wrong)


def test_double_precision_is_a_setting() -> None:
    tensors = checkpoint_like(3, torch.float32)
    truth = upstream(tensors, "ties", dtype=torch.float64, weight=0.3, density=0.4)
    merged = ours(tensors, "ties", weight=0.3, density=0.4, precision="float64")
    assert torch.equal(merged, truth.float())
