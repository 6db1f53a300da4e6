"""Roles by name against the division into layers of every architecture that mergekit describes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from mergekit_unconstrained.compat import ModelArchitecture
from mergekit_unconstrained.engine.context import tensor_roles
from mergekit_unconstrained.numerics.roles import (
    GROUPS,
    LAYER_KINDS,
    OUTER_KINDS,
    Role,
    role_from_name,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit.architecture.json_definitions import JSON_ARCHITECTURES

LAYERS = 3


class ThreeLayers:
    """A configuration in which every number is 3, parts of it included."""

    def __getattr__(self, key: str) -> object:
        if key.startswith("__"):
            raise AttributeError(key)
        return ThreeLayers() if key in ("text_config", "vision_config") else LAYERS


@pytest.fixture(scope="module", params=JSON_ARCHITECTURES, ids=lambda a: a.architectures[0])
def arch(request: pytest.FixtureRequest) -> ModelArchitecture:
    """Every architecture in turn."""
    return request.param


@pytest.fixture(scope="module")
def roles(arch: ModelArchitecture) -> dict[str, Role]:
    """The roles of all its tensors."""
    return tensor_roles(arch, ThreeLayers())


def own_positions(arch: ModelArchitecture) -> Iterator[tuple[str, int | None]]:
    """Every tensor's name with the layer that the architecture's own file puts it in."""
    for module in arch.modules.values():
        info, prefix = module.architecture, module.weight_prefix or ""
        inside = {
            prefix + weight.name: layer
            for layer in range(info.num_layers(ThreeLayers()))
            for weight in info.layer_weights(layer, ThreeLayers())
        }
        for weight in info.all_weights(ThreeLayers()):
            yield prefix + weight.name, inside.get(prefix + weight.name)


LAYER_IS_NOT_IN_THE_NAME = (
    # Phi-1 numbers embedding, blocks and head in one list: layers.0 is the embedding.
    "layers.0.wte.",
    f"layers.{LAYERS}.ln.",
    f"layers.{LAYERS}.linear.",
    # Qwen2-VL's merger is a list without blocks.
    "visual.merger.mlp.",
)


def test_the_layer_is_the_architectures_own(
    arch: ModelArchitecture, roles: dict[str, Role]
) -> None:
    for name, layer in own_positions(arch):
        assert roles[name].layer == layer, name
        if not name.startswith(LAYER_IS_NOT_IN_THE_NAME):
            assert role_from_name(name).layer == layer, name


def test_the_kind_belongs_where_the_tensor_is(roles: dict[str, Role]) -> None:
    for name, role in roles.items():
        kinds = OUTER_KINDS if role.layer is None else LAYER_KINDS
        assert role.kind in kinds, name


def test_the_vocabulary_is_in_embedding_or_head(
    arch: ModelArchitecture, roles: dict[str, Role]
) -> None:
    for module in arch.modules.values():
        for weight in module.architecture.all_weights(ThreeLayers()):
            if weight.vocabulary_axis is not None:
                role = roles[(module.weight_prefix or "") + weight.name]
                assert role.kind in ("embedding", "head"), weight.name


# Buffers, what is not attention or MLP, and AFMoE's gate of the attention's output.
OTHER = ("rotary", "inv_freq", "bias", "relative_pe", "act_fn", "conv", "mamba", "mixer", "pooler")
OTHER += ("visual", "vision", "multi_modal", "self_attn.gate_proj")


def test_little_is_of_no_kind(roles: dict[str, Role]) -> None:
    for name, role in roles.items():
        assert role.kind != "other" or any(word in name for word in OTHER), name


LLAMA = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.1.input_layernorm.weight": "norm",
    "model.layers.1.self_attn.q_proj.weight": "q",
    "model.layers.1.self_attn.k_proj.weight": "k",
    "model.layers.1.self_attn.v_proj.weight": "v",
    "model.layers.1.self_attn.o_proj.weight": "o",
    "model.layers.1.post_attention_layernorm.weight": "norm",
    "model.layers.1.mlp.up_proj.weight": "up",
    "model.layers.1.mlp.gate_proj.weight": "gate",
    "model.layers.1.mlp.down_proj.weight": "down",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "head",
}
QWEN2_BIASES = {
    "model.layers.1.self_attn.q_proj.bias": "q",
    "model.layers.1.self_attn.k_proj.bias": "k",
    "model.layers.1.self_attn.v_proj.bias": "v",
}
QK_NORMS = {
    "model.layers.1.self_attn.q_norm.weight": "norm",
    "model.layers.1.self_attn.k_norm.weight": "norm",
}
WITHOUT_MLP = {k: v for k, v in LLAMA.items() if ".mlp." not in k}
KINDS: dict[str, dict[str, str]] = {
    "LlamaForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA | QWEN2_BIASES,
    "Qwen3ForCausalLM": LLAMA | QK_NORMS,
    "Gemma3ForCausalLM": LLAMA
    | QK_NORMS
    | {
        "model.layers.1.pre_feedforward_layernorm.weight": "norm",
        "model.layers.1.post_feedforward_layernorm.weight": "norm",
    },
    "GPT2LMHeadModel": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "embedding",
        **{
            f"transformer.h.1.{name}.{part}": kind
            for name, kind in {
                "ln_1": "norm",
                "attn.c_attn": "qkv",
                "attn.c_proj": "o",
                "ln_2": "norm",
                "mlp.c_fc": "up",
                "mlp.c_proj": "down",
            }.items()
            for part in ("weight", "bias")
        },
        "transformer.ln_f.weight": "final_norm",
        "transformer.ln_f.bias": "final_norm",
        "lm_head.weight": "head",
    },
    "MixtralForCausalLM": WITHOUT_MLP
    | {
        "model.layers.1.mlp.gate.weight": "router",
        "model.layers.1.mlp.experts.gate_up_proj": "gate_up",
        "model.layers.1.mlp.experts.down_proj": "down",
    },
    "Phi3ForCausalLM": {k: v for k, v in LLAMA.items() if v not in ("q", "k", "v", "gate", "up")}
    | {
        "model.layers.1.self_attn.qkv_proj.weight": "qkv",
        "model.layers.1.mlp.gate_up_proj.weight": "gate_up",
    },
    "FalconForCausalLM": {
        "transformer.word_embeddings.weight": "embedding",
        "transformer.h.1.ln_attn.weight": "norm",
        "transformer.h.1.ln_attn.bias": "norm",
        "transformer.h.1.ln_mlp.weight": "norm",
        "transformer.h.1.ln_mlp.bias": "norm",
        "transformer.h.1.self_attention.query_key_value.weight": "qkv",
        "transformer.h.1.self_attention.dense.weight": "o",
        "transformer.h.1.mlp.dense_h_to_4h.weight": "up",
        "transformer.h.1.mlp.dense_4h_to_h.weight": "down",
        "transformer.ln_f.weight": "final_norm",
        "transformer.ln_f.bias": "final_norm",
        "lm_head.weight": "head",
    },
    "BertModel": {
        "embeddings.position_embeddings.weight": "embedding",
        "embeddings.token_type_embeddings.weight": "embedding",
        "embeddings.word_embeddings.weight": "embedding",
        "embeddings.LayerNorm.weight": "embedding",
        "embeddings.LayerNorm.bias": "embedding",
        "embeddings.position_ids": "embedding",
        **{
            f"encoder.layer.1.{name}.{part}": kind
            for name, kind in {
                "attention.self.query": "q",
                "attention.self.key": "k",
                "attention.self.value": "v",
                "attention.output.dense": "o",
                "attention.output.LayerNorm": "norm",
                "intermediate.dense": "up",
                "output.dense": "down",
                "output.LayerNorm": "norm",
            }.items()
            for part in ("weight", "bias")
        },
        "pooler.dense.weight": "other",
        "pooler.dense.bias": "other",
    },
}


@pytest.mark.parametrize("class_name", KINDS)
def test_kinds_of_well_known_architectures(class_name: str) -> None:
    arch = next(a for a in JSON_ARCHITECTURES if class_name in a.architectures)
    roles = tensor_roles(arch, ThreeLayers())
    first_names = [name for name, layer in own_positions(arch) if layer in (None, 1)]
    assert {name: roles[name].kind for name in first_names} == KINDS[class_name]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # Conventions that are easily confused with each other.
        ("transformer.h.0.mlp.w1.weight", "up"),  # Qwen: up and gate
        ("transformer.h.0.mlp.w2.weight", "gate"),
        ("model.layers.0.feed_forward.w1.weight", "gate"),  # InternLM2: gate, up and down
        ("model.layers.0.feed_forward.w3.weight", "up"),
        ("model.layers.0.feed_forward.w2.weight", "down"),
        ("transformer.h.0.mlp.c_fc.weight", "up"),  # Jais: up and gate
        ("transformer.h.0.mlp.c_fc2.weight", "gate"),
        ("transformer.h.0.mlp.c_fc_0.weight", "gate"),  # Exaone: gate and up
        ("transformer.h.0.mlp.c_fc_1.weight", "up"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "gate"),  # T5: gate and up
        ("encoder.block.0.layer.1.DenseReluDense.wi_1.weight", "up"),
        ("encoder.block.0.layer.1.DenseReluDense.wo.weight", "down"),
        ("encoder.block.0.layer.0.SelfAttention.o.weight", "o"),
        ("model.layers.0.attention.wo.weight", "o"),
        ("model.layers.0.attention.wqkv.weight", "qkv"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "router"),
        ("model.layers.0.mlp.shared_expert.gate_proj.weight", "gate"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", "up"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", "down"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "other"),
        ("model.embedding_norm.weight", "final_norm"),  # LFM2 calls its final norm so
        ("multi_modal_projector.norm.weight", "other"),
        ("score.weight", "head"),
        ("embed_out.weight", "head"),
        ("", "other"),
        ("a_tensor_nobody_knows", "other"),
    ],
)
def test_kinds_by_name(name: str, kind: str) -> None:
    assert role_from_name(name).kind == kind


def test_the_vocabulary_axis_makes_an_unknown_outer_tensor_an_embedding() -> None:
    assert role_from_name("strange.matrix", 0).kind == "embedding"
    assert role_from_name("lm_head.weight", 0).kind == "head"


@pytest.mark.parametrize(
    ("role", "keys"),
    [
        (Role("q", 3), ("q", "attention", "all")),
        (Role("gate_up", 3), ("gate_up", "mlp", "all")),
        (Role("norm", 3), ("norm", "all")),
        (Role("other", 3), ("other", "all")),
        (Role("other"), ("other",)),
        (Role("embedding"), ("embedding",)),
    ],
)
def test_the_words_for_a_tensor_go_from_exact_to_general(role: Role, keys: tuple[str, ...]) -> None:
    assert role.keys == keys


def test_groups_name_kinds() -> None:
    assert set(GROUPS["attention"]) | set(GROUPS["mlp"]) < set(LAYER_KINDS)
    assert not set(GROUPS) & {*LAYER_KINDS, *OUTER_KINDS}
