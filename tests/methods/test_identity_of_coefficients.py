"""Every coefficient of a table reaches its tensor, and no other: proved in a few lines of NumPy.

The reference below reads safetensors and bf16 by itself and shares no code with the package.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mergekit_unconstrained import compat

from mergekit.merge import run_merge  # isort: skip  (compat first: it silences mergekit's imports)

LAYERS = 4
KINDS = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "layernorm": "norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
OUTSIDE = {"embed_tokens": "embedding", "model.norm": "final_norm", "lm_head": "head"}

Table = dict[str, dict[str, Any]]


# -- the reference --------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder as the 16 bits of their bf16 numbers."""
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        raw = shard.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16"
                start, end = entry["data_offsets"]
                tensors[name] = np.frombuffer(data[start:end], "<u2").reshape(entry["shape"])
    return tensors


def widen(bf16: np.ndarray) -> np.ndarray:
    return (bf16.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """To the nearest bf16, to even at the middle."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def coefficient(table: Table, expert: str, name: str) -> float:
    for part, kind in OUTSIDE.items():
        if part in name:
            return table[expert][kind]
    kind = next(kind for part, kind in KINDS.items() if part in name)
    return table[expert]["layers"][int(name.split(".")[2])][kind]


def expected(base: Path, experts: list[Path], table: Table) -> dict[str, np.ndarray]:
    inputs = {expert.name: read(expert) for expert in experts}
    result = {}
    for name, bits in read(base).items():
        t0 = widen(bits)
        d = np.zeros_like(t0)
        for expert, tensors in inputs.items():
            d += (widen(tensors[name]) - t0) * np.float32(coefficient(table, expert, name))
        result[name] = narrow(t0 + d)
    return result


# -- the merge ------------------------------------------------------------------------------------


def distinct_table(experts: list[str]) -> Table:
    """No two coefficients are equal."""
    numbers = iter(0.011 * i - 0.4 for i in range(10_000))
    return {
        expert: {
            **{kind: next(numbers) for kind in OUTSIDE.values()},
            "layers": {
                layer: {kind: next(numbers) for kind in KINDS.values()} for layer in range(LAYERS)
            },
        }
        for expert in experts
    }


def merge(base: Path, experts: list[Path], table: Table, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    path = folder / "table.yml"
    path.write_text(yaml.safe_dump({"layers": LAYERS, "experts": table}))
    recipe = {
        "merge_method": "layerwise",
        "base_model": str(base),
        "models": [{"model": str(expert)} for expert in experts],
        "parameters": {"operator": "task_arithmetic", "coefficients": str(path)},
    }
    options = compat.MergeOptions(
        write_model_card=False, copy_tokenizer=False, out_shard_size=60_000, quiet=True
    )
    config = compat.MergeConfiguration.model_validate(recipe)
    run_merge(config, str(folder / "out"), options, config_source=yaml.safe_dump(recipe))
    assert len(list((folder / "out").glob("*.safetensors"))) > 1
    return read(folder / "out")


@pytest.fixture(scope="module")
def sharded_models(
    make_tiny: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Path]]:
    """A tiny Qwen2 in bf16 and two experts of it, each in several files."""
    import transformers

    tiny = make_tiny("qwen2", experts=2, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("sharded")
    for path in (tiny.base, *tiny.experts):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        model.save_pretrained(folder / path.name, max_shard_size="70KB")
        assert len(list((folder / path.name).glob("*.safetensors"))) > 1
    return folder / "base", [folder / path.name for path in tiny.experts]


@pytest.fixture(scope="module")
def merged(
    sharded_models: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Table, dict[str, np.ndarray]]:
    """A table without equal coefficients, and what it merges to."""
    base, experts = sharded_models
    table = distinct_table([expert.name for expert in experts])
    return table, merge(base, experts, table, tmp_path_factory.mktemp("merged") / "distinct")


def test_numpy_reproduces_every_tensor_exactly(
    sharded_models: tuple[Path, list[Path]], merged: tuple[Table, dict[str, np.ndarray]]
) -> None:
    table, result = merged
    reference = expected(*sharded_models, table)
    assert result.keys() == reference.keys()
    assert len(result) == 3 + 12 * LAYERS
    for name, bits in reference.items():
        assert np.array_equal(result[name], bits), name


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {name for name in before if not np.array_equal(before[name], after[name])}


def swap(mapping: dict[Any, Any], one: Any, other: Any) -> None:
    mapping[one], mapping[other] = mapping[other], mapping[one]


@pytest.mark.parametrize("permutation", ["layers", "kinds", "experts", "outside"])
def test_permuting_the_table_changes_the_permuted_tensors_and_no_others(
    sharded_models: tuple[Path, list[Path]],
    merged: tuple[Table, dict[str, np.ndarray]],
    permutation: str,
    tmp_path: Path,
) -> None:
    table, before = merged
    table = copy.deepcopy(table)
    first, second = table
    layers = table[first]["layers"]
    if permutation == "layers":
        swap(layers, 1, 2)
        concerned = {name for name in before if ".layers.1." in name or ".layers.2." in name}
    elif permutation == "kinds":
        swap(layers[3], "q", "down")
        concerned = {
            name for name in before if ".layers.3." in name and ("q_" in name or "down_" in name)
        }
    elif permutation == "experts":
        swap(table, first, second)
        concerned = set(before)
    else:
        swap(table[second], "embedding", "head")
        concerned = {"model.embed_tokens.weight", "lm_head.weight"}
    base, experts = sharded_models
    after = merge(base, experts, table, tmp_path / "permuted")
    assert changed(before, after) == concerned
    assert not changed(expected(base, experts, table), after)
