"""What is measured of whole models before a merge, and `scope: model` of `layerwise` upon it.

The references sort everything at once in NumPy, in float64.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_unconstrained import compat, jobs
from mergekit_unconstrained.engine import prepass
from mergekit_unconstrained.engine.plan import PlannedTensor
from mergekit_unconstrained.engine.prepass import Chunk, Measure
from mergekit_unconstrained.engine.source import MappedFile
from mergekit_unconstrained.errors import NonFiniteError, RecipeError
from mergekit_unconstrained.jobs import whole_model
from mergekit_unconstrained.jobs.recipes import plan_recipe
from mergekit_unconstrained.numerics.roles import role_from_name

OPTIONS = compat.MergeOptions(quiet=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepass"


# -- measures over tensors in memory --------------------------------------------------------------


def planned(name: str, models: Sequence[str], **parameters: Any) -> PlannedTensor:
    inputs = dict.fromkeys(models, name)
    return PlannedTensor(name, role_from_name(name), None, "float32", inputs, parameters=parameters)


Models = dict[str, dict[str, torch.Tensor]]


def some_models(dtype: torch.dtype, count: int = 2) -> Models:
    """A base and experts of three tensors; half of the entries moved, in few distinct steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (70, 30), "b": (41,), "c": (3, 5, 7)}
    base = {k: 0.02 * torch.randn(s, generator=generator) for k, s in shapes.items()}
    models = {"base": {k: t.to(dtype) for k, t in base.items()}}
    for i in range(count):
        models[f"expert{i}"] = {
            k: (t + 0.001 * torch.randint(-3, 4, t.shape, generator=generator)).to(dtype)
            for k, t in base.items()
        }
    return models


def take(
    measures: Sequence[Measure], models: Models, **options: Any
) -> tuple[prepass.Statistics, int]:
    """The statistics, and how often a tensor was read."""
    reads = 0

    def load(model: str, tensor: PlannedTensor) -> torch.Tensor:
        nonlocal reads
        reads += 1
        return models[model][tensor.name]

    tensors = [planned(name, list(models)) for name in models["base"]]
    return prepass.measure(measures, tensors, "base", load, **options), reads


def deltas(models: Models, expert: str) -> np.ndarray:
    """All d_i of an expert in float64, rounded once to float32 as the arithmetic is."""
    d = [
        models[expert][k].double().numpy().ravel() - t.double().numpy().ravel()
        for k, t in models["base"].items()
    ]
    return np.concatenate(d).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantiles_sums_and_extremes_are_those_of_all_tensors_together(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepass, "PIECE", 64)  # many pieces, of which some are short
    models = some_models(dtype)
    wanted = Measure("m", ranks=lambda _, count: [0, count // 2, count - 7, count - 1])
    found, reads = take([wanted], models)
    assert reads == 2 * 3 * 3  # two passes, three tensors, three models
    for expert in ("expert0", "expert1"):
        d = np.abs(deltas(models, expert))
        n, s = len(d), found["m"][expert]
        assert s.count == n
        assert s.entries == {r: np.sort(d)[r] for r in (0, n // 2, n - 7, n - 1)}
        assert (s.least, s.greatest) == (d.min(), d.max())
        np.testing.assert_allclose([s.total, s.absolute, s.squares], [d.sum()] * 2 + [d @ d], 1e-12)


def test_signed_scores_of_a_method_are_ranked_too() -> None:
    models = some_models(torch.float32)

    def scores(chunk: Chunk) -> prepass.Rows:
        return {"product": chunk.d.prod(dim=0)}

    found, _ = take([Measure("p", scores, lambda _, count: range(0, count, 100))], models)
    product = np.sort((deltas(models, "expert0") * deltas(models, "expert1")).astype(np.float32))
    assert found["p"]["product"].entries == {r: product[r] for r in range(0, len(product), 100)}


def test_a_later_measure_uses_what_an_earlier_one_found() -> None:
    models = some_models(torch.bfloat16)

    first = Measure("first", ranks=lambda _, count: [count // 2])

    def above(chunk: Chunk) -> prepass.Rows:
        (limit,) = chunk.earlier["first"]["expert0"].entries.values()
        return {"above": (chunk.d[0].abs() > limit).float()}

    found, reads = take([first, Measure("second", above)], models)
    d = np.abs(deltas(models, "expert0"))
    assert found["second"]["above"].total == (d > np.sort(d)[len(d) // 2]).sum()
    assert reads == (2 + 1) * 9  # sums alone take one pass


def test_float64_files_are_measured_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    models: Models = {
        "base": {k: t.double() for k, t in some_models(torch.float32)["base"].items()}
    }
    models["expert0"] = {
        k: t + 1e-12 * torch.randn(t.shape, generator=generator).double()
        for k, t in models["base"].items()
    }
    (wanted,) = prepass.widened(
        [Measure("m", ranks=lambda _, count: range(0, count, 50))], torch.float64
    )
    found, _ = take([wanted], models)
    d = np.concatenate([
        np.abs(models["expert0"][k].numpy() - t.numpy()).ravel() for k, t in models["base"].items()
    ])  # fmt: skip
    assert found["m"]["expert0"].entries == {r: np.sort(d)[r] for r in range(0, len(d), 50)}


def test_only_covered_tensors_take_part_and_whole_ones_come_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepass, "PIECE", 2000)
    models = some_models(torch.float32)
    seen = []

    def numbers(chunk: Chunk) -> prepass.Rows:
        seen.append((chunk.tensor.name, chunk.shape, chunk.d.shape, chunk.models))
        return {}

    take([Measure("m", numbers, covers=lambda t: t.name == "a", whole=prepass.everything)], models)
    assert seen == [("a", (70, 30), (2, 2100), ("expert0", "expert1"))]
    seen.clear()
    take([Measure("m", numbers, whole=lambda t: t.name != "a")], models)
    assert [shape[1] for name, _, shape, _ in seen if name == "a"] == [2000, 100]
    assert all(shape[1] == math.prod(s) for name, s, shape, _ in seen if name != "a")


def test_a_tensor_that_some_experts_lack_counts_for_the_others() -> None:
    models = some_models(torch.float32, count=1)
    tensors = [planned(name, list(models)) for name in models["base"]]
    lacking = dataclasses.replace(tensors[0], inputs={"base": "a", "expert0": "a", "expert1": None})
    none = dataclasses.replace(tensors[1], inputs={"base": None, "expert0": "b"})

    def load(model: str, tensor: PlannedTensor) -> torch.Tensor:
        return models[model][tensor.name]

    found = prepass.measure([Measure("m")], [lacking, none], "base", load)
    assert {k: s.count for k, s in found["m"].items()} == {"expert0": 2100}


@pytest.mark.parametrize("culprit", ["base", "expert1"])
def test_nan_is_found_before_a_merge_begins(culprit: str) -> None:
    models = some_models(torch.bfloat16)
    models[culprit]["b"][[3, 5]] = torch.nan
    with pytest.raises(NonFiniteError, match=f"b of {culprit} .* in 2 of 41 entries"):
        take([Measure("m")], models)
    found, _ = take([Measure("m", ranks=lambda _, n: [0])], models, allow_nan=True)
    assert found["m"]["expert0"].entries == {0: 0.0}


def test_what_is_put_together_on_loading_is_refused() -> None:
    tensor = dataclasses.replace(planned("a", ["base", "expert0"]), converted=("expert0",))
    with pytest.raises(RecipeError, match=r"a of expert0 .* set `scope: tensor`"):
        prepass.measure([Measure("m")], [tensor], "base", lambda *_: torch.zeros(1))


# -- jobs -----------------------------------------------------------------------------------------


Tiny = Any


def recipe_of(tiny: Tiny, folder: Path, **parameters: Any) -> Path:
    experts = [
        {"model": str(e), "parameters": {"weight": w}}
        for e, w in zip(tiny.experts[:2], (0.7, 0.5), strict=True)
    ]
    data = {
        "merge_method": "layerwise",
        "base_model": str(tiny.base),
        "models": experts,
        "parameters": {"operator": "ties", "density": 0.3, "scope": "model", **parameters},
        "dtype": "float32",
    }
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump(data))
    return file


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: t.double().numpy()
        for shard in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(shard).items()
    }


def run(recipe: Path, out: Path) -> dict[str, np.ndarray]:
    jobs.run_recipe(str(recipe), str(out), OPTIONS)
    return tensors_of(out)


def kept_by_magnitude(d: dict[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
    """The largest share of all entries of an expert, by one sort of all of them."""
    flat = np.sort(np.concatenate([np.abs(t).ravel() for t in d.values()]))
    limit = flat[len(flat) - int(density * len(flat))]
    return {k: np.where(np.abs(t) >= limit, t, 0.0) for k, t in d.items()}


def without_outliers(d: dict[str, np.ndarray], density: float, gamma: float) -> dict[str, Any]:
    flat = np.sort(np.concatenate([np.abs(t).ravel() for t in d.values()]))
    n = len(flat)
    low, high = flat[n - int(density * n) - int(gamma * n)], flat[n - int(gamma * n) - 1]
    return {k: np.where((np.abs(t) >= low) & (np.abs(t) <= high), t, 0.0) for k, t in d.items()}


def by_sign(terms: list[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """TIES' election and weighted mean, entry by entry."""
    merged = np.zeros(terms[0].size)
    for j, entries in enumerate(zip(*(t.ravel() for t in terms), strict=True)):
        sign = 1.0 if sum(entries) >= 0 else -1.0
        agreeing = [(x, w) for x, w in zip(entries, weights, strict=True) if np.sign(x) == sign]
        if agreeing:
            merged[j] = sum(x for x, _ in agreeing) / sum(w for _, w in agreeing)
    return merged.reshape(terms[0].shape)


@pytest.mark.parametrize("operator", ["ties", "breadcrumbs"])
def test_a_density_of_the_model_is_a_share_of_all_its_entries(
    operator: str, tiny_models: Tiny, tmp_path: Path
) -> None:
    own = {"gamma": 0.05} if operator == "breadcrumbs" else {}
    merged = run(recipe_of(tiny_models, tmp_path, operator=operator, **own), tmp_path / "out")
    base, *experts = [tensors_of(m) for m in (tiny_models.base, *tiny_models.experts[:2])]
    d = [{k: e[k] - base[k] for k in base} for e in experts]
    weights = (0.7, 0.5)
    if operator == "ties":
        kept = [kept_by_magnitude(one, 0.3) for one in d]
    else:
        kept = [without_outliers(one, 0.3, 0.05) for one in d]
    shares = []
    for name in base:
        terms = [w * k[name] for w, k in zip(weights, kept, strict=True)]
        expected = base[name] + (by_sign(terms, weights) if operator == "ties" else sum(terms))
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=2e-7)
        shares.append(np.count_nonzero(kept[0][name]) / base[name].size)
    assert max(shares) - min(shares) > 0.01  # a threshold a tensor would have given equal ones


def test_densities_of_a_table_are_each_a_share_of_the_whole(
    tiny_models: Tiny, tmp_path: Path
) -> None:
    cells = {e.name: {"default": {"weight": 1.0, "density": 0.9},
                      "layers": {1: {"attention": {"weight": 1.0, "density": 0.1}}}}
             for e in tiny_models.experts[:2]}  # fmt: skip
    (tmp_path / "table.yml").write_text(yaml.safe_dump({"layers": 4, "experts": cells}))
    recipe = recipe_of(tiny_models, tmp_path, coefficients=str(tmp_path / "table.yml"))
    data = yaml.safe_load(recipe.read_text())
    del data["parameters"]["density"]
    recipe.write_text(yaml.safe_dump(data))
    merged = run(recipe, tmp_path / "out")
    base, *experts = [tensors_of(m) for m in (tiny_models.base, *tiny_models.experts[:2])]
    for name, t0 in base.items():
        inside = name.startswith("model.layers.1.self_attn")
        kept = [
            kept_by_magnitude({k: e[k] - base[k] for k in base}, 0.1 if inside else 0.9)[name]
            for e in experts
        ]
        np.testing.assert_allclose(merged[name], t0 + by_sign(kept, (1, 1)), rtol=0, atol=2e-7)


def test_what_was_measured_is_kept_until_a_file_changes(
    tiny_models: Tiny, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(tiny_models.experts[0], folder)
    tiny = tiny_models._replace(experts=(folder, tiny_models.experts[1]))
    recipe = recipe_of(tiny, tmp_path)
    taken = []
    measure = prepass.measure
    monkeypatch.setattr(prepass, "measure", lambda *a, **k: taken.append(1) or measure(*a, **k))
    first = whole_model.statistics(plan_recipe(str(recipe)), OPTIONS)
    assert whole_model.statistics(plan_recipe(str(recipe)), OPTIONS) == first
    again = recipe_of(tiny, tmp_path, **{"lambda": 0.5})
    assert whole_model.statistics(plan_recipe(str(again)), OPTIONS) == first
    assert (len(taken), len(list(cache.glob("*.json")))) == (1, 1)

    (file,) = cache.glob("*.json")
    file.write_text(file.read_text()[:50])  # cut short by something: measured again
    assert whole_model.statistics(plan_recipe(str(recipe)), OPTIONS) == first
    assert len(taken) == 2

    other = recipe_of(tiny, tmp_path, density=0.4)
    assert whole_model.statistics(plan_recipe(str(other)), OPTIONS) != first
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    compat.forget_loaders()
    assert whole_model.statistics(plan_recipe(str(recipe)), OPTIONS) != first
    assert len(taken) == 4


def test_the_kept_numbers_are_plain_json(tiny_models: Tiny, tmp_path: Path, cache: Path) -> None:
    found = whole_model.statistics(plan_recipe(str(recipe_of(tiny_models, tmp_path))), OPTIONS)
    (file,) = cache.glob("*.json")
    (rows,) = json.loads(file.read_text()).values()
    assert set(rows) == {str(e) for e in tiny_models.experts[:2]}
    assert prepass._read(file) == found


def test_the_pages_of_a_tensor_are_given_back_when_the_next_is_read(
    tiny_models: Tiny, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, str]] = []
    real = MappedFile.advise

    def advise(self: MappedFile, key: str, advice: int, *share: float) -> None:
        assert (advice, share) == (mmap.MADV_DONTNEED, ())
        given.append((self.path.parent.name, key))
        real(self, key, advice)

    monkeypatch.setattr(MappedFile, "advise", advise)
    plan = plan_recipe(str(recipe_of(tiny_models, tmp_path)))
    whole_model.statistics(plan, OPTIONS)
    passes = sum(m.passes for m in whole_model.measures_of(plan))
    names = [t.name for t in plan.tensors]
    for folder in (tiny_models.base, *tiny_models.experts[:2]):
        mine = [key for name, key in given if name == folder.name]
        assert mine == (names * passes)[:-1]


def test_scope_tensor_measures_nothing(tiny_models: Tiny, tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of(tiny_models, tmp_path, scope="tensor")
    assert whole_model.statistics(plan_recipe(str(recipe)), OPTIONS) is None
    assert not cache.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operator": "task_arithmetic", "density": None}, "'scope' means nothing to operator"),
        ({"scope": [{"filter": "mlp", "value": "model"}, {"value": "tensor"}]}, "without `filter`"),
    ],
)
def test_a_scope_that_cannot_be_is_refused_early(
    change: dict[str, Any], message: str, tiny_models: Tiny, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_models, tmp_path)
    data = yaml.safe_load(recipe.read_text())
    data["parameters"] = {
        k: v for k, v in {**data["parameters"], **change}.items() if v is not None
    }
    recipe.write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match=message):
        jobs.check(str(recipe), OPTIONS)


def test_vocabularies_that_are_brought_together_are_refused(
    tiny_models: Tiny, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_models, tmp_path)
    recipe.write_text(recipe.read_text() + "tokenizer: {source: union}\n")
    with pytest.raises(RecipeError, match=r"tokenizer: .*one tokenizer"):
        jobs.check(str(recipe), OPTIONS)


def test_one_tensor_alone_has_no_scope_model(make_tiny: Callable[..., Tiny]) -> None:
    from mergekit.merge_methods import merge_tensors

    parameters = {"weight": 1.0, "operator": "ties", "density": 0.5, "scope": "model"}
    with pytest.raises(RecipeError, match=r"mergekit-yaml.* or set `scope: tensor`"):
        merge_tensors([torch.zeros(3), torch.ones(3)], "layerwise", base_index=0, name="w",
                      parameters=parameters)  # fmt: skip


def test_mergekit_pytorch_says_what_scope_model_needs(tmp_path: Path) -> None:
    from click.testing import CliRunner
    from mergekit.scripts.merge_raw_pytorch import main

    for name, value in (("base", 0.0), ("expert", 1.0)):
        save_file({"w": torch.full((4,), value)}, tmp_path / f"{name}.safetensors")
    data = {
        "merge_method": "layerwise",
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [{"model": str(tmp_path / "expert.safetensors"), "parameters": {"weight": 1.0}}],
        "parameters": {"operator": "ties", "density": 0.5, "scope": "model"},
    }
    (tmp_path / "raw.yml").write_text(yaml.safe_dump(data))
    result = CliRunner().invoke(main, [str(tmp_path / "raw.yml"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "set `scope: tensor`" in result.output
