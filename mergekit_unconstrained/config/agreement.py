"""Whether models of one architecture mean the same by their weights.

Two checkpoints of equal shapes can still compute different functions: another rotary base, another
epsilon, another number of heads. Averaging their weights then gives neither. Fields of config.json
that change what a weight means are compared; the list is ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.errors import ModelError

MEANING = (
    # positions
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct",
    "position_embedding_type", "sliding_window", "use_sliding_window", "layer_types",
    # normalisation and activation
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon",
    "hidden_act", "hidden_activation", "activation_function",
    # shapes that a weight's own shape does not show
    "hidden_size", "n_embd", "intermediate_size", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "query_pre_attn_scalar",
    # mixtures of experts
    "num_experts_per_tok", "num_local_experts", "num_experts", "norm_topk_prob",
    # scales and caps
    "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling",
    "final_logit_softcapping", "attn_logit_softcapping", "scale_attn_by_inverse_layer_idx",
    "attention_bias", "mlp_bias", "tie_word_embeddings",
)  # fmt: skip


def check_agreement(base: Parent, expert: Parent, *, tokenizer_given: bool) -> None:
    """Raise ModelError for the first way in which an expert cannot be merged with the base."""
    one, two = _architecture(base), _architecture(expert)
    if one != two:
        raise ModelError(
            f"{expert.name} is a {two}, but the base {base.name} is a {one}: this method merges "
            "models of one architecture (or pass --allow-crimes)"
        )
    ours, theirs = _fields(base.config), _fields(expert.config)
    for field in dict.fromkeys((*ours, *theirs)):
        if ours.get(field) == theirs.get(field):
            continue
        if field == "tie_word_embeddings":
            tied, untied = (base, expert) if ours.get(field) else (expert, base)
            raise ModelError(
                f"{tied.name} ties its head to its embedding, {untied.name} does not: save both "
                "the same way before merging (or pass --allow-crimes)"
            )
        raise ModelError(
            f"{field} is {theirs.get(field)!r} in {expert.name} but {ours.get(field)!r} in the "
            f"base {base.name}: their weights do not mean the same (to merge them all the same, "
            "pass --allow-crimes)"
        )
    if not tokenizer_given:
        _check_vocabulary(base, expert)


def _architecture(parent: Parent) -> str:
    names = getattr(parent.config, "architectures", None) or []
    return str(names[0]) if names else str(getattr(parent.config, "model_type", "unknown"))


def _fields(config: Any) -> dict[str, Any]:
    """The meaningful fields of a config, those of a nested text model too."""
    values: Mapping[str, Any] = config.to_dict()
    found = {key: values[key] for key in MEANING if key in values}
    nested = values.get("text_config")
    if isinstance(nested, Mapping):
        found |= {f"text_config.{key}": nested[key] for key in MEANING if key in nested}
    return found


HOW_TO_MERGE_VOCABULARIES = (
    "say in the recipe how to bring them together, for example `tokenizer: {source: base}` "
    "or `tokenizer: {source: union}`"
)


def _check_vocabulary(base: Parent, expert: Parent) -> None:
    sizes = [getattr(p.config, "vocab_size", None) for p in (base, expert)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{expert.name} has a vocabulary of {sizes[1]}, the base {base.name} one of "
            f"{sizes[0]}: " + HOW_TO_MERGE_VOCABULARIES
        )
    ours, theirs = _vocabulary(base), _vocabulary(expert)
    known = {index: token for token, index in ours.items()}
    added = _added_tokens(base) | _added_tokens(expert)
    for token, index in (theirs if ours else {}).items():
        # A fine-tune may give a reserved place a name of its own; a word's place it may not take.
        there = known.get(index, token)
        if ours.get(token, index) != index or (there != token and not {there, token} & added):
            raise ModelError(
                f"the tokenizers differ: {index} is {token!r} in {expert.name} but {there!r} in "
                f"the base {base.name}; {HOW_TO_MERGE_VOCABULARIES}"
            )


def _vocabulary(parent: Parent) -> dict[str, int]:
    """Token -> id, added tokens included; empty without a tokenizer.json of a known kind."""
    content = _tokenizer(parent)
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram models: [[piece, score], ...]
        vocabulary = {piece[0]: index for index, piece in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {**vocabulary, **added}


def _added_tokens(parent: Parent) -> set[str]:
    return {token["content"] for token in _tokenizer(parent).get("added_tokens", [])}


def _tokenizer(parent: Parent) -> dict[str, Any]:
    # An adapter's tokenizer is not read: mergekit applies the adapter to the model's own embedding.
    path = (parent.folder or Path("/nonexistent")) / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
