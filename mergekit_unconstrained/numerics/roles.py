"""What a tensor is for: its layer and its kind.

The layer comes from mergekit's architecture information where a merge runs as a job
(`compat.tensor_roles`); a name alone is read by the conventions of the common architectures. The
kind is read from the name in both cases, since architecture files do not say it.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

LAYER_KINDS = (
    "q",
    "k",
    "v",
    "o",
    "qkv",
    "norm",
    "gate",
    "up",
    "down",
    "gate_up",
    "router",
    "other",
)
"""Kinds inside a layer; `qkv` and `gate_up` are the fused matrices that some architectures use."""

OUTER_KINDS = ("embedding", "final_norm", "head", "other")
"""Kinds outside the layers."""

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o", "qkv"),
    "mlp": ("gate", "up", "down", "gate_up", "router"),
    "all": LAYER_KINDS,
}
"""Coarser names for kinds inside a layer, the more exact first."""


@dataclass(frozen=True)
class Role:
    """The place of one tensor in a model.

    kind: one of LAYER_KINDS when `layer` is set, else one of OUTER_KINDS.
    layer: index of the block in the output model, 0-based; None outside the blocks.
    depth: number of blocks, 0 when unknown.
    """

    kind: str
    layer: int | None = None
    depth: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The words a table may use for this tensor, the most exact first."""
        if self.layer is None:
            return (self.kind,)
        return (self.kind, *(group for group, kinds in GROUPS.items() if self.kind in kinds))


_ATTENTION = r"(?:attn|attention|selfattention|encdecattention|mixer)\.(?:.*\.)?"
_IN_LAYER: tuple[tuple[str, str], ...] = (
    # Order matters: `q_norm` is a norm, `mlp.gate` a router, `gate_up_proj` no `up_proj`.
    ("norm", r"norm|(?:^|\.)ln(?:_|\d|\.|$)"),
    ("router", r"router|expert_bias|shared_expert_gate|(?:mlp|moe|feed_forward)\.gate\."),
    ("qkv", r"qkv|query_key_value|c_attn|w_pack"),
    ("q", r"(?:^|\.)(?:q_proj|q_lin|query|wq|q)\."),
    ("k", r"(?:^|\.)(?:k_proj|k_lin|key|wk|k)\."),
    ("v", r"(?:^|\.)(?:v_proj|v_lin|value|wv|v)\."),
    ("o", _ATTENTION + r"(?:o_proj|out_proj|out_lin|output\.dense|dense|c_proj|proj|wo|o)\."),
    ("other", r"(?:attn|attention|mamba|mixer|conv)\."),
    ("gate_up", r"gate_up_proj|input_linear"),
    # Qwen (the first) calls its up projection w1 and its gate w2, Jais c_fc and c_fc2.
    ("up", r"mlp\.w1\."),
    ("gate", r"mlp\.w2\.|c_fc2\."),
    ("gate", r"gate_proj|(?:^|\.)(?:w1|wi_0|c_fc_0)(?:\.|$)"),
    ("up", r"up_proj|fc1|lin1|dense_h_to_4h|intermediate\.dense"),
    ("up", r"(?:^|\.)(?:w3|wi|wi_1|c_fc_1|c_fc)(?:\.|$)"),
    ("down", r"down_proj|fc2|lin2|dense_4h_to_h|output\.dense|output_linear|c_proj"),
    ("down", r"(?:^|\.)(?:w2|wo)(?:\.|$)"),
)
_OUTSIDE: tuple[tuple[str, str], ...] = (
    # What joins a vision tower to a language model is neither head nor final norm.
    ("other", r"multi_modal|merger|vision_adapter"),
    ("head", r"lm_head|embed_out|output_layer|(?:^|\.)output\.|score\.|classifier|cls\."),
    ("head", r"vocab_(?:transform|layer_norm|projector)|^layers\.\d+\.linear\."),
    ("embedding", r"embeddings\.layernorm"),
    ("final_norm", r"norm|(?:^|\.)ln(?:_|\d|\.|$)"),
    ("embedding", r"embed|embd|wte|wpe|(?:^|\.)shared\."),
)
_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)\.")


@functools.lru_cache(maxsize=1 << 17)
def role_from_name(
    name: str, vocabulary_axis: int | None = None, in_layer: bool | None = None
) -> Role:
    """The role of a tensor by the conventional names.

    name: the tensor's full name, "" for an unnamed tensor (kind `other`).
    vocabulary_axis: the axis indexed by token ids, as mergekit's architecture files say it.
    in_layer: whether the architecture puts it inside a block; None reads that from the name.
    """
    match = _LAYER_INDEX.search(name)
    layer = int(match[1]) if match and in_layer is not False else None
    inside = layer is not None if in_layer is None else in_layer
    tail = name[match.end() :] if inside and match else name
    rules = _IN_LAYER if inside else _OUTSIDE
    kind = next((k for k, pattern in rules if re.search(pattern, tail.lower())), "other")
    if not inside and vocabulary_axis is not None and kind != "head":
        kind = "embedding"
    return Role(kind=kind, layer=layer)
