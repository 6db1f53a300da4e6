"""Candidates merged into a live model against the files that the same recipe writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergekit_unconstrained import compat, jobs
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.engine.plan import make_plan
from mergekit_unconstrained.errors import ModelError, NonFiniteError
from mergekit_unconstrained.jobs.searching import merge_plan, plan_search, prepare, write_candidate
from mergekit_unconstrained.jobs.weights import merge_into
from mergekit_unconstrained.numerics.settings import OPERATORS
from mergekit_unconstrained.search.memory import LiveMerge
from mergekit_unconstrained.search.run import Searcher
from mergekit_unconstrained.search.space import Candidate
from tests.conftest import TinyModels, _byte_tokenizer

Weights = dict[str, torch.Tensor]
OPTIONS = compat.MergeOptions(quiet=True)
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    # Its tokenizer knows a token more than the others'.
    "qwen2": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "vocab_size": 257,
    },
    "gpt2": {"n_embd": 16, "n_layer": 2},
}
UNTOUCHED = {"llama": "layers.1.mlp", "qwen2": "layers.1.mlp", "gpt2": "h.1.mlp"}
"""Tensors in which no expert differs from the base."""


class Parents(NamedTuple):
    base: Path
    experts: tuple[Path, ...]


@pytest.fixture(scope="module")
def parents(
    make_tiny: Callable[..., TinyModels], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Parents]:
    """`parents(architecture, dtype)`: three models that agree in some tensors."""
    made: dict[tuple[str, str], Parents] = {}

    def make(architecture: str = "llama", dtype: str = "bfloat16") -> Parents:
        if (architecture, dtype) not in made:
            tiny = make_tiny(architecture, 2, **SMALL[architecture])
            folder = tmp_path_factory.mktemp(f"{architecture}-{dtype}")
            base = load_file(tiny.base / "model.safetensors")
            generator = torch.Generator().manual_seed(0)
            for source in (tiny.base, *tiny.experts):
                target = folder / source.name
                shutil.copytree(source, target)
                tensors = load_file(source / "model.safetensors")
                for name, tensor in tensors.items():
                    tensors[name] = tensor.to(getattr(torch, dtype))
                    if UNTOUCHED[architecture] in name:
                        tensors[name] = base[name].to(getattr(torch, dtype))
                    elif dtype == "float32":  # all 24 bits of them
                        tensors[name] += 1e-3 * torch.randn(tensor.shape, generator=generator)
                if dtype == "float32":  # of the untouched too, equal for all
                    for name in (n for n in tensors if UNTOUCHED[architecture] in n):
                        tensors[name] *= 1.0 + 2.0**-20
                save_file(tensors, target / "model.safetensors", {"format": "pt"})
                config = json.loads((target / "config.json").read_text())
                config["dtype"] = dtype
                (target / "config.json").write_text(json.dumps(config))
            experts = tuple(folder / e.name for e in tiny.experts)
            made[architecture, dtype] = Parents(folder / "base", experts)
        return made[architecture, dtype]

    return make


@pytest.fixture
def search(tmp_path: Path) -> Callable[..., Searcher]:
    """`search(recipe, genome, **settings)`: a prepared search."""

    def make(recipe: dict[str, Any], genome: dict[str, Any], **settings: Any) -> Searcher:
        (tmp_path / "search.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
        tasks = {"likely": {"kind": "likelihood", "data": {"search": "search.jsonl"}}}
        file = tmp_path / "search.yml"
        given = {"recipe": recipe, "genome": genome, "tasks": tasks, **settings}
        file.write_text(yaml.safe_dump(given))
        return prepare(plan_search(file, OPTIONS), OPTIONS)

    return make


def recipe_of(models: Parents, method: str = "layerwise", **changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {"merge_method": method, "base_model": str(models.base)}
    recipe["models"] = [{"model": str(e)} for e in models.experts]
    if method in ("slerp", "linear"):  # the base is one of the models
        recipe["base_model"] = str(models.experts[0])
    return {**recipe, **changes}


def layerwise(models: Parents, operator: str, **changes: Any) -> dict[str, Any]:
    parameters = {"operator": operator, **changes.pop("parameters", {})}
    return recipe_of(models, parameters=parameters, **changes)


def draw(searcher: Searcher, seed: int = 0) -> dict[str, float]:
    genome = searcher.spaces.searched.genome
    return genome.from_unit(np.random.default_rng(seed).random(len(genome)))


def candidate(searcher: Searcher, values: dict[str, float]) -> Candidate:
    return searcher.spaces.searched.candidate(values)


def weights_of(model: Any) -> Weights:
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def loaded(folder: Path, dtype: torch.dtype) -> Weights:
    return weights_of(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def written(found: Candidate, folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    """What the job writes for a candidate, without the card."""
    document = write_candidate(found, folder)
    config = compat.MergeConfiguration.model_validate(document.data)
    plan = make_plan(document, config, compat.get(config.merge_method), OPTIONS)
    merge_into(folder / "out", compat.run_merge, plan, OPTIONS)
    return loaded(folder / "out", dtype)


def differing(found: Weights, expected: Weights) -> list[str]:
    assert found.keys() == expected.keys()
    return [k for k, v in found.items() if not torch.equal(v, expected[k])]


def rebuilt(searcher: Searcher, budget: int) -> LiveMerge:
    """Another live merge of the same plan, in the same model."""
    live = searcher.live
    return LiveMerge(live.plan, searcher.subject.model, live._load, live._planner, budget)


PARAMETERS: dict[str, dict[str, Any]] = {
    "sce": {"select_topk": 0.4},
    "sce_dense": {"select_topk": 0.4},
    "task_arithmetic": {"lambda": 0.7},
    "dare_linear": {"seed": 5},
}
DELLA = {"weight": {}, "density": {"low": 0.2, "high": 0.8, "start": 0.5}, "epsilon": {"high": 0.1}}
CASES = [
    *(("llama", "bfloat16", operator, {}) for operator in OPERATORS),
    *(("gpt2", "float32", operator, {}) for operator in ("ties", "dare_ties")),
    *(("qwen2", "bfloat16", operator, {}) for operator in ("breadcrumbs", "della")),
    ("llama", "bfloat16", "ties", {"dtype": "float32"}),
    ("llama", "bfloat16", "breadcrumbs", {"dtype": "float32", "out_dtype": "bfloat16"}),
    ("llama", "float32", "ties", {"dtype": "bfloat16"}),
    ("llama", "float32", "task_arithmetic", {"out_dtype": "bfloat16"}),
    ("gpt2", "float32", "ties", {"parameters": {"rescale": "inverse", "normalize": False}}),
    ("qwen2", "float32", "ties", {"parameters": {"rescale": "l1", "precision": "float64"}}),
    ("llama", "bfloat16", "ties", {"parameters": {"scope": "model"}}),
    ("qwen2", "float32", "breadcrumbs", {"parameters": {"scope": "model"}, "dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("architecture", "files", "operator", "changes"), CASES)
def test_a_table_is_written_bit_for_bit_as_the_job_does(
    parents: Callable[..., Parents],
    search: Callable[..., Searcher],
    tmp_path: Path,
    architecture: str,
    files: str,
    operator: str,
    changes: dict[str, Any],
) -> None:
    parameters = {**PARAMETERS.get(operator, {}), **changes.get("parameters", {})}
    models = parents(architecture, files)
    recipe = layerwise(models, operator, **{**changes, "parameters": parameters})
    kinds = ["qkv" if architecture == "gpt2" else "q", "mlp"]
    genome: dict[str, Any] = {"kinds": kinds, "negative_weights": operator != "linear"}
    genome["outer"] = "free" if architecture == "llama" else "tied"  # the others tie their heads
    if operator == "della":
        genome["parameters"] = DELLA
    searcher = search(recipe, genome)
    found = candidate(searcher, draw(searcher))
    expected = written(found, tmp_path / "job")

    searcher.live.write(candidate(searcher, draw(searcher, 1)))
    searcher.live.write(found)
    assert differing(weights_of(searcher.subject.model), expected) == []

    poor = rebuilt(searcher, budget=0)
    assert poor.read_anew == len(poor.held) > 0
    poor.write(found)
    assert differing(weights_of(searcher.subject.model), expected) == []


UPSTREAM = [
    ("llama", "bfloat16", "task_arithmetic", {"parameters": {"normalize": True}}),
    ("gpt2", "float32", "ties", {}),
    ("qwen2", "bfloat16", "linear", {}),
    ("llama", "float32", "slerp", {"dtype": "bfloat16"}),
    ("gpt2", "bfloat16", "nuslerp", {"dtype": "float32"}),
    ("llama", "bfloat16", "ties_global", {"dtype": "float32"}),
    ("qwen2", "float32", "ties_global", {}),
]


@pytest.mark.parametrize(("architecture", "files", "method", "changes"), UPSTREAM)
def test_slices_are_written_bit_for_bit_as_the_job_does(
    parents: Callable[..., Parents],
    search: Callable[..., Searcher],
    tmp_path: Path,
    architecture: str,
    files: str,
    method: str,
    changes: dict[str, Any],
) -> None:
    recipe = recipe_of(parents(architecture, files), method, **changes)
    searcher = search(recipe, {"kinds": ["attn", "mlp"]})
    found = candidate(searcher, draw(searcher))
    assert "slices" in found.recipe
    expected = written(found, tmp_path / "job")
    for live in (searcher.live, rebuilt(searcher, budget=0)):
        live.write(candidate(searcher, draw(searcher, 1)))
        live.write(found)
        assert differing(weights_of(searcher.subject.model), expected) == []


def test_our_own_command_writes_the_same(
    parents: Callable[..., Parents], search: Callable[..., Searcher], tmp_path: Path
) -> None:
    searcher = search(layerwise(parents(), "ties"), {})
    found = candidate(searcher, draw(searcher))
    write_candidate(found, tmp_path / "job")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(found.text(str(tmp_path / "job" / "coefficients.yml")))
    jobs.run_recipe(str(recipe), str(tmp_path / "out"), OPTIONS)
    searcher.live.write(found)
    expected = loaded(tmp_path / "out", torch.float32)
    assert differing(weights_of(searcher.subject.model), expected) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_live_model_holds_the_rounded_weights(
    parents: Callable[..., Parents], search: Callable[..., Searcher], tmp_path: Path, dtype: str
) -> None:
    searcher = search(layerwise(parents(dtype="float32"), "ties"), {}, dtype=dtype)
    found = candidate(searcher, draw(searcher))
    searcher.live.write(found)
    expected = written(found, tmp_path / "job", getattr(torch, dtype))
    assert differing(weights_of(searcher.subject.model), expected) == []


# -- what is computed -----------------------------------------------------------------------------


def test_only_what_changed_is_computed(
    parents: Callable[..., Parents], search: Callable[..., Searcher]
) -> None:
    searcher = search(layerwise(parents(), "ties"), {"parameters": {"weight": {}}})
    live, values = searcher.live, draw(searcher)
    assert live.fixed == 3  # gate, up and down of the last layer
    assert live.write(candidate(searcher, values)) == len(live.held) == 18
    assert live.write(candidate(searcher, values)) == 0
    other = {**values, "expert1 weight layer 0 attention": 0.25}
    assert live.write(candidate(searcher, other)) == 4  # q, k, v, o
    assert live.write(candidate(searcher, {**other, "expert2 weight layer 1 attention": 0.5})) == 4
    assert live.write(candidate(searcher, values)) == 8
    other = {**values, "expert1 weight elsewhere": 0.25}  # norms, embedding and head
    assert live.write(candidate(searcher, other)) == 4 + 3


def test_only_slices_that_changed_are_computed(
    parents: Callable[..., Parents], search: Callable[..., Searcher]
) -> None:
    searcher = search(recipe_of(parents(), "ties"), {"kinds": [], "parameters": {"weight": {}}})
    live, values = searcher.live, draw(searcher)
    assert live.write(candidate(searcher, values)) == 21
    assert live.write(candidate(searcher, values)) == 0
    # A layer, with what lies behind the last one: mergekit takes it from the last slice.
    assert live.write(candidate(searcher, {**values, "expert1 weight layer 1": 0.25})) == 9 + 2


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_numbers_of_mergekits_methods_that_change_nothing_are_found(
    parents: Callable[..., Parents], search: Callable[..., Searcher], method: str
) -> None:
    genome = {"kinds": ["mlp"], "parameters": {"weight": {}}}
    searcher = search(recipe_of(parents(), method), genome)
    found = searcher.spaces.searched.genome
    names = {f"expert{i} weight layer 1 mlp" for i in (1, 2)}  # no expert differs there
    assert {gene.name for gene in found.fixed} == names
    assert len(found) == 2 * 2 * 2 - 2
    assert searcher.spaces.free.genome.fixed == ()


@pytest.mark.parametrize("method", ["layerwise", "ties"])
def test_the_order_of_candidates_does_not_matter(
    parents: Callable[..., Parents], search: Callable[..., Searcher], method: str
) -> None:
    searcher = search(recipe_of(parents(), method), {"kinds": []})
    one, two = (candidate(searcher, draw(searcher, seed)) for seed in (1, 2))
    found = []
    for order in ((one, two), (two, one)):
        live = rebuilt(searcher, budget=1 << 30)
        states = {}
        for each in order:
            live.write(each)
            states[each is one] = weights_of(searcher.subject.model)
        found.append(states)
    for which in (True, False):
        assert differing(found[0][which], found[1][which]) == []
    assert differing(found[0][True], found[0][False]) != []


def test_a_failed_candidate_leaves_nothing_behind(
    parents: Callable[..., Parents], search: Callable[..., Searcher]
) -> None:
    searcher = search(layerwise(parents(), "linear"), {"negative_weights": True})
    found = candidate(searcher, draw(searcher))
    searcher.live.write(found)
    expected = weights_of(searcher.subject.model)
    nothing = candidate(searcher, dict.fromkeys(draw(searcher), 0.0))
    with pytest.raises(Exception, match="sum of the weights"):
        searcher.live.write(nothing)
    searcher.live.write(found)
    assert differing(weights_of(searcher.subject.model), expected) == []


def test_an_overflow_is_mended_by_the_next_candidate(
    parents: Callable[..., Parents], search: Callable[..., Searcher]
) -> None:
    wide = {"kinds": [], "parameters": {"weight": {"low": 0, "high": 1e9, "start": 0.5}}}
    searcher = search(layerwise(parents(), "task_arithmetic"), wide, dtype="float16")
    found = candidate(searcher, searcher.spaces.searched.genome.start)
    searcher.live.write(found)
    expected = weights_of(searcher.subject.model)
    with pytest.raises(NonFiniteError):
        searcher.live.write(candidate(searcher, dict.fromkeys(draw(searcher), 1e9)))
    searcher.live.write(found)
    assert differing(weights_of(searcher.subject.model), expected) == []


# -- parents --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "changes", "method"),
    [
        ("bfloat16", {}, "layerwise"),
        ("float32", {"dtype": "bfloat16"}, "layerwise"),
        ("float32", {"out_dtype": "bfloat16"}, "task_arithmetic"),
    ],
)
def test_a_parent_is_put_back_bit_for_bit(
    parents: Callable[..., Parents],
    search: Callable[..., Searcher],
    files: str,
    changes: dict[str, Any],
    method: str,
) -> None:
    models = parents(dtype=files)
    searcher = search(recipe_of(models, method, **changes), {"kinds": []})
    found = candidate(searcher, draw(searcher))
    searcher.live.write(found)
    expected = weights_of(searcher.subject.model)
    folders = (models.base, *models.experts)
    originals = [loaded(folder, torch.float32) for folder in folders]
    for live in (searcher.live, rebuilt(searcher, budget=0)):
        for folder, original in zip(folders, originals, strict=True):
            live.write_parent(str(folder))
            assert differing(weights_of(searcher.subject.model), original) == []
        live.write(found)
        assert differing(weights_of(searcher.subject.model), expected) == []


def broken(models: Parents, folder: Path, name: str, value: float) -> Parents:
    """The models, the second expert with one bad entry."""
    bad = folder / "bad"
    shutil.copytree(models.experts[1], bad)
    tensors = load_file(bad / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    return Parents(models.base, (models.experts[0], bad))


@pytest.mark.parametrize("method", ["layerwise", "task_arithmetic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parent_that_is_not_finite_is_an_error(
    parents: Callable[..., Parents],
    search: Callable[..., Searcher],
    tmp_path: Path,
    method: str,
    value: float,
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    searcher = search(recipe_of(broken(parents(), tmp_path, name, value), method), {"kinds": []})
    with pytest.raises(NonFiniteError, match=name):
        searcher.live.write(candidate(searcher, draw(searcher)))


def test_a_sum_that_overflows_is_no_overflow(
    parents: Callable[..., Parents], search: Callable[..., Searcher], tmp_path: Path
) -> None:
    models = []
    for index, source in enumerate((parents().base, *parents().experts)):
        target = tmp_path / str(index)
        shutil.copytree(source, target)
        tensors = load_file(source / "model.safetensors")
        tensors["model.norm.weight"] += 10_000.0 + 100 * index
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        models.append(target)
    recipe = layerwise(Parents(models[0], tuple(models[1:])), "task_arithmetic")
    searcher = search(recipe, {"kinds": []}, dtype="float16")
    searcher.live.write(candidate(searcher, draw(searcher)))
    norm = searcher.subject.model.model.norm.weight
    assert norm.isfinite().all()
    assert not norm.sum().isfinite()


def test_a_live_model_of_another_architecture_is_an_error(
    parents: Callable[..., Parents], search: Callable[..., Searcher]
) -> None:
    searcher = search(layerwise(parents(), "ties"), {})
    other = AutoModelForCausalLM.from_pretrained(parents("gpt2").base)
    live = searcher.live
    with pytest.raises(ModelError, match="cannot be merged in memory: no merged tensor belongs to"):
        LiveMerge(live.plan, other, live._load, live._planner, 0)


def test_a_tied_head_is_written_once(
    parents: Callable[..., Parents], search: Callable[..., Searcher]
) -> None:
    recipe = layerwise(parents("qwen2"), "task_arithmetic")
    searcher = search(recipe, {"kinds": []})
    targets: Sequence[int] = [one.target.data_ptr() for one in searcher.live.held]
    assert len(set(targets)) == len(targets)


def test_the_plan_of_the_start_is_the_plan_of_every_candidate(
    parents: Callable[..., Parents], search: Callable[..., Searcher], tmp_path: Path
) -> None:
    searcher = search(recipe_of(parents(), "task_arithmetic"), {})
    document = Document.read(tmp_path / "search.yml")
    plan = merge_plan(document, searcher.spaces.searched, OPTIONS)
    assert [t.name for t in plan.tensors] == [t.name for t in searcher.live.plan.tensors]


def test_a_mixture_whose_experts_are_fused_on_loading_is_refused_in_a_sentence(
    search: Callable[..., Searcher], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {**SMALL["llama"], **heads, "vocab_size": 256, "num_local_experts": 2}
    config = AutoConfig.for_model("mixtral", **sizes)
    folders = tuple(tmp_path / name for name in ("base", "one", "two"))
    for folder in folders:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        _byte_tokenizer().save_pretrained(folder)
    files = load_file(folders[0] / "model.safetensors")
    assert any("experts.1.w1" in name for name in files)  # on the disk every expert has its own
    with pytest.raises(
        ModelError, match=r"experts.gate_up_proj is put together of several tensors"
    ):
        search(layerwise(Parents(folders[0], folders[1:]), "task_arithmetic"), {})
