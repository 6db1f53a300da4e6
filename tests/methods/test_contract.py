"""What every merge method of the catalogue must do; a new one is covered by being in it.

A method whose defaults are not enough for a merge, or that has modes that differ, gets a line in
PARAMETERS. Arithmetic of its own a method proves in its own file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner

from mergekit_unconstrained import compat
from mergekit_unconstrained.catalog import CATALOG
from mergekit_unconstrained.engine.context import MergeContext, using
from mergekit_unconstrained.errors import NonFiniteError
from mergekit_unconstrained.numerics.roles import role_from_name
from mergekit_unconstrained.numerics.settings import OPERATORS

from mergekit.architecture import arch_info_for_config  # isort: skip
from mergekit.merge_methods import merge_state_dicts, merge_tensors  # isort: skip

Parameters = Mapping[str, Any]

PARAMETERS: dict[str, list[Parameters]] = {
    "layerwise": [
        {
            "operator": name,
            "weight": 0.5,
            **{key: 0.5 for key in ("density", "select_topk") if key in operator.parameters},
        }
        for name, operator in OPERATORS.items()
    ],
    "consensus": [{"min_agreement": 2}, {"min_agreement": 1}],
    "tsvm": [{"reweight": False}, {"reweight": True}],
    "pcb": [{"variant": "language"}, {"variant": "vision"}],
    "wudi": [{"steps": 20}],
    "optmerge": [{"solver": "adam", "steps": 20}, {"solver": "exact"}],
    "doge": [{"steps": 20, "scope": "tensor"}],
    "ties_global": [{"scope": "tensor"}],
    "dare_exact": [{"combine": "linear", "drop": 0.5}, {"combine": "ties", "drop": 0.5}],
    "varm": [{"granularity": "tensor"}, {"granularity": "element"}],
    "lines": [{"alpha": 0.5, "beta": 0.3}],
    "layer_swap": [{"bottom": 1, "top": 1}],
    "opcm": [{"scope": "tensor"}],
}
"""Method -> the parameters it is tried with, one set after another; [{}] for others."""

ORDERED: frozenset[str] = frozenset({"layer_swap", "opcm"})
"""Methods for which the order of the experts means something."""

WHOLE_MATRIX = frozenset({"tsvm", "wudi", "optmerge", "doge", "pcb", "widen"})
"""Methods that cannot work around a NaN, and merge a tensor that holds one by simpler rules."""

TWO_EXPERTS: frozenset[str] = frozenset({"layer_swap"})
"""Methods that take exactly two experts."""

CASES = [
    pytest.param(name, parameters, id="-".join([name, *map(str, list(parameters.values())[:1])]))
    for name, entry in CATALOG.items()
    if entry.level == "tensor"
    for parameters in PARAMETERS.get(name, [{}])
]
every_method = pytest.mark.parametrize(("name", "parameters"), CASES)

TENSOR = "model.layers.0.mlp.up_proj.weight"


def models(
    count: int, shape: tuple[int, ...] = (9, 16), dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """One tensor of a base and of `count` experts a tenth as far from it as it is from zero."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    experts = {
        f"expert{i}": base + 0.1 * torch.randn(shape, generator=generator) for i in range(count)
    }
    return {name: t.to(dtype) for name, t in {"base": base, **experts}.items()}


def able(name: str, count: int) -> int:
    """A number of experts that a method takes, `count` where it takes that."""
    return 2 if name in TWO_EXPERTS else count


def merge(name: str, parameters: Parameters, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Merge one named tensor."""
    return merge_tensors(
        list(tensors.values()),
        compat.get(name),
        ids=list(tensors),
        base_index=list(tensors).index("base"),
        name=TENSOR,
        parameters=parameters,
    )


@every_method
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_experts_gives_a_finite_tensor(
    name: str, parameters: Parameters, count: int
) -> None:
    tensors = models(able(name, count))
    merged = merge(name, parameters, tensors)
    assert merged.shape == tensors["base"].shape
    assert bool(torch.isfinite(merged).all())
    # One expert alone varies nowhere, so what selects by variance keeps the base.
    assert count == 1 or not torch.equal(merged, tensors["base"])


@every_method
@pytest.mark.parametrize("count", [1, 2, 5])
def test_experts_equal_to_the_base_give_the_base(
    name: str, parameters: Parameters, count: int
) -> None:
    base = models(0)["base"]
    tensors = {"base": base} | {f"expert{i}": base.clone() for i in range(able(name, count))}
    torch.testing.assert_close(merge(name, parameters, tensors), base, rtol=1e-6, atol=0)


@every_method
@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_frozen_tensors_do_no_harm(name: str, parameters: Parameters, frozen: int) -> None:
    tensors = models(able(name, 3))
    for i in range(min(frozen, len(tensors) - 1)):
        tensors[f"expert{i}"] = tensors["base"].clone()
    assert bool(torch.isfinite(merge(name, parameters, tensors)).all())


@every_method
def test_tensors_of_nothing_but_zeros_stay_so(name: str, parameters: Parameters) -> None:
    tensors = {key: torch.zeros_like(value) for key, value in models(2).items()}
    assert not bool(merge(name, parameters, tensors).any())


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_models(
    name: str, parameters: Parameters, dtype: torch.dtype
) -> None:
    merged = merge(name, parameters, models(2, dtype=dtype))
    assert merged.dtype == dtype
    assert bool(torch.isfinite(merged).all())


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_of_half_precision_are_merged_in_single(
    name: str, parameters: Parameters, dtype: torch.dtype
) -> None:
    tensors = models(2, dtype=dtype)
    exact = merge(name, parameters, {k: t.float() for k, t in tensors.items()})
    assert torch.equal(merge(name, parameters, tensors), exact.to(dtype))


@every_method
@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (1, 1), (1, 9), (9, 1), (5, 7), (3, 4, 5), (2, 3, 4, 5)], ids=str
)
def test_any_shape_is_merged(name: str, parameters: Parameters, shape: tuple[int, ...]) -> None:
    merged = merge(name, parameters, models(2, shape))
    assert merged.shape == shape
    assert bool(torch.isfinite(merged).all())


@every_method
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
def test_an_empty_tensor_stays_empty(
    name: str, parameters: Parameters, shape: tuple[int, ...]
) -> None:
    assert merge(name, parameters, models(2, shape)).shape == shape


@every_method
def test_strides_do_not_matter(name: str, parameters: Parameters) -> None:
    tensors = models(able(name, 3), (16, 10))
    strided = {k: t.t().contiguous().t() for k, t in tensors.items()}
    strided["base"] = torch.stack([tensors["base"], tensors["base"]], dim=-1)[..., 0]
    assert not any(t.is_contiguous() for t in strided.values())
    merged = merge(name, parameters, strided)
    torch.testing.assert_close(merged, merge(name, parameters, tensors), rtol=1e-6, atol=1e-7)


@every_method
def test_the_inputs_are_not_written_to(name: str, parameters: Parameters) -> None:
    tensors = models(able(name, 3))
    copies = {k: t.clone() for k, t in tensors.items()}
    merge(name, parameters, tensors)
    assert all(torch.equal(tensors[k], copies[k]) for k in tensors)


@every_method
def test_the_same_inputs_give_the_same_result(name: str, parameters: Parameters) -> None:
    torch.manual_seed(1)
    first = merge(name, parameters, models(able(name, 3)))
    torch.manual_seed(2)
    merge(name, parameters, models(2, seed=5))  # what is merged before must not matter
    assert torch.equal(merge(name, parameters, models(able(name, 3))), first)


@every_method
def test_the_order_of_the_experts_does_not_matter(name: str, parameters: Parameters) -> None:
    if name in ORDERED:
        pytest.skip("the order of the experts is a parameter of this method")
    tensors = models(4)
    per_model = {
        p.name: {k: 0.3 + 0.1 * i for i, k in enumerate(tensors)}
        for p in compat.get(name).spec.parameters
        if p.name == "weight" and p.scope == compat.ParameterScope.NON_BASE
    }
    parameters = {**parameters, **per_model}
    turned = dict(reversed(tensors.items()))
    torch.testing.assert_close(
        merge(name, parameters, turned), merge(name, parameters, tensors), rtol=1e-5, atol=1e-6
    )


@every_method
def test_without_a_base_there_is_an_error(name: str, parameters: Parameters) -> None:
    with pytest.raises(ValueError, match="base"):
        merge_tensors(list(models(2).values()), compat.get(name), parameters=parameters)


@every_method
def test_without_an_expert_there_is_an_error(name: str, parameters: Parameters) -> None:
    with pytest.raises(ValueError, match=f"at least {able(name, 1)}"):
        merge(name, parameters, models(0))


@every_method
@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_experts_than_a_method_takes_is_an_error(
    name: str, parameters: Parameters, count: int
) -> None:
    if name not in TWO_EXPERTS:
        pytest.skip("takes any number of experts")
    with pytest.raises(ValueError, match=f"(at least|exactly) 2 non-base .* got {count}"):
        merge(name, parameters, models(count))


@every_method
def test_an_unknown_parameter_is_an_error(name: str, parameters: Parameters) -> None:
    with pytest.raises(TypeError, match="wieght"):
        merge(name, {**parameters, "wieght": 1.0}, models(2))


@every_method
def test_state_dicts_are_merged_tensor_by_tensor(name: str, parameters: Parameters) -> None:
    state_dicts = {
        key: {
            TENSOR: tensor,
            "lm_head.weight": models(2, (5, 4), seed=1)[key],
            "position_ids": torch.arange(4),
        }
        for key, tensor in models(2).items()
    }
    merged = merge_state_dicts(
        state_dicts, compat.get(name), base="base", parameters=dict(parameters)
    )
    assert torch.equal(merged[TENSOR], merge(name, parameters, models(2)))
    assert merged["lm_head.weight"].shape == (5, 4)
    assert torch.equal(merged["position_ids"], torch.arange(4))


@every_method
def test_modules_are_merged_without_gradients(name: str, parameters: Parameters) -> None:
    modules = {key: torch.nn.Linear(4, 3) for key in models(2)}
    merged = merge_state_dicts(modules, compat.get(name), base="base", parameters=dict(parameters))
    assert set(merged) == {"weight", "bias"}
    assert not any(tensor.requires_grad for tensor in merged.values())


def recipe(name: str, parameters: Parameters, base: Path, *experts: Path) -> dict[str, Any]:
    return {
        "merge_method": name,
        "base_model": str(base),
        "models": [{"model": str(expert)} for expert in experts],
        "parameters": dict(parameters),
    }


def run_yaml(text: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """`mergekit-yaml recipe.yml out` in this process; the tensors it wrote."""
    from mergekit.scripts.run_yaml import main

    (folder / "recipe.yml").write_text(yaml.safe_dump(text))
    arguments = [str(folder / "recipe.yml"), str(folder / "out"), "--quiet"]
    result = CliRunner().invoke(main, [*arguments, "--no-write-model-card", "--no-copy-tokenizer"])
    assert result.exit_code == 0, result.output or result.exception
    return load(folder / "out")


def load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


@every_method
def test_mergekit_yaml_writes_what_the_tensors_merge_to(
    name: str, parameters: Parameters, tiny_models: Any, tmp_path: Path
) -> None:
    paths = [tiny_models.base, *tiny_models.experts[:2]]
    merged = run_yaml(recipe(name, parameters, *paths), tmp_path)
    inputs = [load(path) for path in paths]
    assert merged.keys() == inputs[0].keys()
    layers = 4
    for tensor in merged:
        role = dataclasses.replace(role_from_name(tensor), depth=layers)
        with using(MergeContext({tensor: role})):
            expected = merge_tensors(
                [tensors[tensor] for tensors in inputs],
                compat.get(name),
                ids=[str(path) for path in paths],  # names key the random masks
                base_index=0,
                name=tensor,
                parameters=parameters,
            )
        assert torch.equal(merged[tensor], expected), tensor


@every_method
def test_a_tensor_that_one_expert_alone_has_is_passed_through(
    name: str, parameters: Parameters, tmp_path: Path
) -> None:
    """As an untied head where the others share theirs with the embedding."""
    from safetensors.torch import save_file

    config = transformers.CohereConfig(num_hidden_layers=2, architectures=["CohereForCausalLM"])
    names = {weight.name for weight in arch_info_for_config(config).all_weights(config)}
    for folder in ("base", "untied", "tied"):
        config.save_pretrained(tmp_path / folder)
        generator = torch.Generator().manual_seed(len(folder))
        own = names if folder == "untied" else names - {"lm_head.weight"}
        tensors = {key: torch.randn(8, 8, generator=generator) for key in sorted(own)}
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    paths = [tmp_path / folder for folder in ("base", "untied", "tied")]
    merged = run_yaml(recipe(name, parameters, *paths), tmp_path)
    assert torch.equal(merged["lm_head.weight"], load(paths[1])["lm_head.weight"])
    assert merged.keys() == names


# -- hard inputs ----------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("count", [2, 5])
def test_equal_experts_move_the_base_along_what_they_share(
    name: str, parameters: Parameters, count: int
) -> None:
    """Where they agree to leave an entry alone it stays, and nothing is turned around."""
    tensors = models(1)
    tensors["expert0"][3:, :] = tensors["base"][3:, :]
    one = tensors.pop("expert0")
    merged = merge(
        name, parameters, tensors | {f"expert{i}": one.clone() for i in range(able(name, count))}
    )
    d, moved = one - tensors["base"], merged - tensors["base"]
    assert bool(torch.isfinite(merged).all())
    assert float((d * moved).sum()) >= 0
    assert float(moved[3:].abs().max()) < 1e-5


@every_method
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 2), (2, 1)], ids=str)
def test_more_experts_than_a_matrix_has_rows(
    name: str, parameters: Parameters, shape: tuple[int, ...]
) -> None:
    assert bool(torch.isfinite(merge(name, parameters, models(able(name, 5), shape))).all())


@every_method
def test_experts_of_wildly_different_scales(name: str, parameters: Parameters) -> None:
    tensors = models(able(name, 4))
    for i, scale in zip(range(len(tensors) - 1), (1e-7, 1e7, 1e-2, 1e3), strict=False):
        tensors[f"expert{i}"] = tensors["base"] + scale * (tensors[f"expert{i}"] - tensors["base"])
    assert bool(torch.isfinite(merge(name, parameters, tensors)).all())


@every_method
def test_fractions_may_be_zero_and_one(name: str, parameters: Parameters) -> None:
    for spec in compat.get(name).spec.parameters:
        if spec.name not in ("density", "top", "rank_fraction", "select_topk", "drop"):
            continue
        if name == "layerwise" and spec.name not in parameters:
            continue
        for fraction in (0.0, 1.0):
            if spec.name == "rank_fraction" and not fraction:
                continue  # a rank of at least one
            merged = merge(name, {**parameters, spec.name: fraction}, models(able(name, 3)))
            assert bool(torch.isfinite(merged).all()), (spec.name, fraction)


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_entry_is_named_or_let_through_where_that_is_allowed(
    name: str, parameters: Parameters, bad: float
) -> None:
    tensors = models(able(name, 3))
    tensors["expert0"][2, 5] = bad
    if "dare" not in name + str(parameters):  # which may drop it
        with pytest.raises(NonFiniteError, match=r"expert0 holds NaN or infinity in 1 of 144"):
            merge(name, parameters, tensors)
    with using(MergeContext(allow_nan=True)):
        merged = merge(name, parameters, tensors)
    if name in WHOLE_MATRIX:
        assert not bool(torch.isfinite(merged[2, 5]))
        merged[2, 5] = 0
        assert bool(torch.isfinite(merged).all())


FIRST = [case for i, case in enumerate(CASES) if case.values[0] not in
         {c.values[0] for c in CASES[:i]}]  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), FIRST)
def test_lambda_and_weight_may_differ_from_layer_to_layer(
    name: str, parameters: Parameters, make_tiny: Any, tmp_path: Path
) -> None:
    """Zero in the first layer, which keeps the base; one in the last, as without a gradient."""
    specs = {p.name: p for p in compat.get(name).spec.parameters}
    tiny = make_tiny("llama", experts=2, num_hidden_layers=2)
    base = load(tiny.base)
    plain = recipe(name, parameters, tiny.base, *tiny.experts)
    usual = run_yaml({**plain, "dtype": "float32"}, tmp_path)
    for key in {"lambda", "weight"} & specs.keys():
        merged = dict(plain["parameters"]) | {key: [0.0, parameters.get(key, 1.0)]}
        folder = tmp_path / key
        folder.mkdir()
        found = run_yaml({**plain, "dtype": "float32", "parameters": merged}, folder)
        default = specs[key].default
        for tensor, value in found.items():
            if "layers.0" in tensor:
                assert torch.equal(value, base[tensor].float()), (key, tensor)
            elif "layers.1" in tensor and (key == "weight" or default == 1 or name == "layerwise"):
                torch.testing.assert_close(value, usual[tensor], msg=f"{key} {tensor}")
