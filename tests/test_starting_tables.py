"""Starting tables against an independent float64 computation in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.table import Table, parse_table
from mergekit_unconstrained.engine.starting_tables import dump_table, explain, starting_table
from mergekit_unconstrained.errors import ModelError, NonFiniteError, RecipeError
from mergekit_unconstrained.numerics.roles import Role, role_from_name

LAYERS = 5
SHAPES = {
    "self_attn.q_proj.weight": (6, 4),
    "self_attn.q_norm.weight": (4,),
    "input_layernorm.weight": (8,),
    "mlp.experts.0.up_proj.weight": (3, 4),
    "mlp.experts.1.up_proj.weight": (3, 4),
}
NAMES = {
    "model.embed_tokens.weight": (7, 4),
    **{f"model.layers.{i}.{n}": s for i in range(LAYERS) for n, s in SHAPES.items()},
    "model.norm.weight": (4,),
    "lm_head.weight": (7, 4),
}
ROLES = {name: role_from_name(name) for name in NAMES}

Models = dict[str, dict[str, torch.Tensor]]


def models(experts: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Models:
    """A base and experts whose changes differ in size from layer to layer."""
    rng = np.random.default_rng(seed)
    base = {name: torch.tensor(rng.normal(size=shape)) for name, shape in NAMES.items()}
    made: Models = {"base": {name: t.to(dtype) for name, t in base.items()}}
    for i in range(experts):
        made[f"/models/expert-{i}"] = {
            name: (t + torch.tensor(rng.normal(size=t.shape) * rng.uniform(0.01, 1))).to(dtype)
            for name, t in base.items()
        }
    return made


def table(kind: str, made: Models, **options: object) -> dict:
    base, *experts = made
    load = lambda model, name: made[model].get(name)  # noqa: E731
    return starting_table(kind, base, experts, ROLES, load, **options)


def read(data: dict, comment: str = "") -> Table:
    return parse_table(Document.parse(dump_table(data, comment), "start.yml"))


def numpy_energy(made: Models, layer: int | None, kind: str) -> np.ndarray:
    """mean(d^2) over the tensors of a place, normalised: by hand, from the stored numbers."""
    base, *experts = (
        np.concatenate(
            [
                tensors[name].double().numpy().ravel()
                for name, role in ROLES.items()
                if (role.layer, role.kind) == (layer, kind)
            ]
        )
        for tensors in made.values()
    )
    means = np.array([np.mean((expert - base) ** 2) for expert in experts])
    return means / means.sum()


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_energy_is_the_normalised_mean_square_of_the_change(experts, dtype):
    made = models(experts, dtype)
    data = table("energy", made)
    for role in set(ROLES.values()):
        expected = numpy_energy(made, role.layer, role.kind)
        for i, expert in enumerate(data["experts"].values()):
            row = expert if role.layer is None else expert["layers"][role.layer]
            assert row[role.kind] == pytest.approx(expected[i], rel=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "energy"])
@pytest.mark.parametrize("experts", [1, 2, 3, 5])
def test_weights_add_up_to_one_in_every_place(kind, experts):
    written = read(table(kind, models(experts)))
    for role in ROLES.values():
        weights = [expert.lookup(role).weight for expert in written.experts.values()]
        assert sum(weights) == pytest.approx(1, abs=0.5e-4 * experts + 1e-12)


def test_a_frozen_tensor_is_shared_evenly_and_a_frozen_expert_gets_nothing():
    made = models(2)
    frozen = "model.layers.1.self_attn.q_proj.weight"
    made["/models/expert-1"] = dict(made["base"])
    made["/models/expert-0"][frozen] = made["base"][frozen].clone()
    data = table("energy", made)["experts"]
    assert data["expert-0"]["layers"][1]["q"] == data["expert-1"]["layers"][1]["q"] == 0.5
    assert data["expert-0"]["layers"][2]["q"] == 1.0
    assert data["expert-1"]["layers"][2]["q"] == 0.0


def test_depth_rises_in_a_straight_line_and_takes_alpha_outside():
    data = table("depth", models(2))["experts"]["expert-0"]
    assert data["default"] == data["embedding"] == data["final_norm"] == data["head"] == 0.5
    rows = [data["layers"][layer] for layer in range(LAYERS)]
    expected = np.linspace(0.5, 1.0, LAYERS)
    assert [row["q"] for row in rows] == pytest.approx(expected)
    assert all(len(set(row.values())) == 1 for row in rows)


def test_depth_takes_its_settings_and_one_layer_takes_alpha():
    data = table("depth", models(4), alpha=0.3, beta=-0.2)["experts"]["expert-3"]
    assert data["layers"][LAYERS - 1]["up"] == pytest.approx(0.1)
    roles = {"model.layers.0.mlp.up_proj.weight": Role("up", 0, 1)}
    single = starting_table("depth", "b", ["e"], roles, lambda *_: None, alpha=0.3, beta=0.2)
    assert single["experts"]["e"]["layers"] == {0: {"up": 0.3}}


@pytest.mark.parametrize("kind", ["uniform", "depth"])
def test_only_energy_reads_weights(kind):
    def load(model: str, name: str) -> torch.Tensor:
        raise AssertionError(name)

    starting_table(kind, "base", ["a", "b"], ROLES, load)


def test_tables_are_the_same_twice_and_bytes_are_counted():
    made = models(3)
    read_bytes: list[int] = []
    first = table("energy", made, progress=read_bytes.append)
    assert dump_table(first) == dump_table(table("energy", made))
    assert sum(read_bytes) == sum(t.nbytes for ts in made.values() for t in ts.values())


@pytest.mark.parametrize("kind", ["uniform", "energy", "depth"])
def test_a_written_table_reads_back_to_four_decimals(kind):
    data = table(kind, models(3))
    written = read(data, explain(kind, 3, LAYERS) + "\nby: mergekit-unconstrained init --from x")
    assert written.layers == LAYERS
    assert set(written.experts) == {"expert-0", "expert-1", "expert-2"}
    for i, expert in enumerate(data["experts"].values()):
        for role in ROLES.values():
            exact = expert if role.layer is None else expert["layers"][role.layer]
            found = written.lookup(f"/models/expert-{i}", role).weight
            assert found == pytest.approx(exact[role.kind], abs=0.51e-4)


def test_equal_layers_become_ranges_and_equal_kinds_one_word():
    cell = {"weight": 0.3, "density": 0.5}
    row = {"q": 0.25, "k": 0.25, "gate": 1, "up": cell}
    data = {"layers": 4, "experts": {"e": {"layers": {0: row, 1: row, 3: row, 2: {"q": -1e-9}}}}}
    text = dump_table(data)
    assert "0-1: {attention: 0.25, gate: 1.00, up: {weight: 0.30, density: 0.50}}" in text
    assert "2:   {q: 0.00}" in text
    assert read(data).experts["e"].inner[3, "attention"].weight == 0.25
    uniform = dump_table(table("uniform", models(2)))
    assert f"0-{LAYERS - 1}: {{all: 0.5}}" in uniform


@pytest.mark.parametrize("name", ["true", "1e5", "a: b", "#x", "- y", "é\u2028z", "🙂", "", "a\nb"])
def test_any_expert_name_and_comment_can_be_written(name):
    data = {"layers": 1, "experts": {name: {"default": 0.5, "layers": {0: {"q": 0.5}}}}}
    assert list(read(data, f"from {name}\r\x85experts: {{}}\x00").experts) == [name]


def test_experts_of_the_same_short_name_keep_their_whole_names():
    data = starting_table("uniform", "b", ["x/math", "y/math"], ROLES, lambda *_: None)
    assert list(data["experts"]) == ["x/math", "y/math"]
    data = starting_table("uniform", "b", ["b+lora/math", "b+lora/code"], ROLES, lambda *_: None)
    assert list(data["experts"]) == ["math", "code"]


def test_tensors_that_cannot_be_compared_leave_their_place_uniform():
    made = models(2)
    made["/models/expert-1"]["model.embed_tokens.weight"] = torch.zeros(9, 4)
    del made["/models/expert-0"]["lm_head.weight"]
    data = table("energy", made)["experts"]
    assert {expert[kind] for expert in data.values() for kind in ("embedding", "head")} == {0.5}


def test_errors_name_the_tensor_and_the_model():
    made = models(2)
    name = "model.layers.2.self_attn.q_proj.weight"
    made["/models/expert-1"][name] = torch.zeros(3, 3)
    with pytest.raises(ModelError, match=r"q_proj\.weight is \(3, 3\) in /models/expert-1"):
        table("energy", made)
    made = models(2)
    made["/models/expert-0"][name][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"2\.self_attn\.q_proj\.weight of /models/expert-0"):
        table("energy", made)
    with pytest.raises(RecipeError, match="Did you mean 'energy'"):
        table("enrgy", models(1))
    with pytest.raises(RecipeError, match="at least one expert"):
        table("uniform", {"base": {}})
    with pytest.raises(ModelError, match="no layers"):
        starting_table("uniform", "b", ["e"], {"w": Role("other")}, lambda *_: None)
