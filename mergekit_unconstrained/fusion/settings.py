"""The settings file of a fusion: every knob, its default and where the default comes from.

Strict: an unknown key or an impossible value is one error that names the place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.explain import explained
from mergekit_unconstrained.config.words import suggest

AlignmentName = Literal["bytes", "dtw_fusechat", "dtw_fusellm"]
MapName = Literal["bytes", "em", "mined", "ms"]
TargetName = Literal["min_ce", "avg_ce", "weighted", "max_margin", "teacher"]
LossName = Literal["fused_ce", "fused_kl", "uld", "gld"]
MergeName = Literal[
    "none", "sce_dense", "varm", "sce", "ties", "task_arithmetic", "linear", "layerwise"
]
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""transformers' ways to share out a model; any device of torch will do as well."""


class Columns(BaseModel):
    """Names of the data's columns; what is left out is recognised by the usual names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instruction: str | None = None
    input: str | None = None
    response: str | None = None
    messages: str | None = None
    system: str | None = None


class FusionSettings(BaseModel):
    """Everything about a fusion that the recipe itself does not say."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    # -- data
    columns: Columns = Columns()
    """Which columns hold what; recognised by their usual names where not given."""
    split: str = "train"
    """Split of a data set that has several."""
    max_rows: int | None = Field(default=None, ge=1)
    """Use the first so many rows only."""
    max_length: int = Field(default=2048, ge=8)
    """Longest conversation in tokens, for every model alike (FuseChat: 2048)."""

    # -- distributions
    top_k: int = Field(default=10, ge=1, le=1000)
    """Entries kept of each distribution (FuseChat: 10)."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the teachers' distributions, applied to all logits before the top k is taken."""
    collect_tokens: int = Field(default=4096, ge=8)
    """Padded tokens in one forward pass of a teacher."""
    collect_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the teachers' weights; auto: bfloat16 on an accelerator, float32 on the CPU."""
    device_map: str | None = None
    """As in transformers, for teachers that do not fit one device."""

    # -- alignment
    alignment: AlignmentName = "bytes"
    """How positions of two tokenisations are matched (ours: bytes; FuseLLM, FuseChat: dtw_*)."""
    vocabulary_map: MapName = "bytes"
    """How a source token becomes a pivot token (FuseLLM: em, mined; FuseChat: ms)."""
    inside: bool = True
    """bytes: transfer to positions inside a source token, conditioned on the bytes consumed."""
    chain: bool = True
    """bytes: give a pivot token that spans several source tokens its mass by the chain rule."""
    published_defects: bool = False
    """dtw_*: reproduce what FuseLLM's and FuseChat's code is known to get wrong."""
    min_coverage: float = Field(default=0.3, ge=0, le=1)
    """Refuse to train when fewer of the pivot's positions receive a distribution."""

    # -- targets
    target: TargetName = "min_ce"
    """Which distribution wins where (FuseChat: min_ce)."""
    per: Literal["sequence", "token"] = "sequence"
    """Whether it wins a whole sequence (published) or each token for itself (ours)."""
    compare: Literal["bits_per_byte", "nats_per_token"] = "bits_per_byte"
    """Measure of min_ce and avg_ce; the published one favours the finer tokenizer."""
    include_pivot: bool = True
    """Whether the pivot's own distribution competes (published)."""
    rest: Literal["renormalize", "gold", "bucket"] = "renormalize"
    """Mass outside the top k or without a counterpart: spread over the kept entries in proportion
    (as published; where more was without a counterpart than kept: no distribution), given to the
    gold token, or matched as one class of all other tokens."""
    unaligned: Literal["gold", "skip"] = "gold"
    """Positions without a distribution: one-hot on gold (published) or no fusion loss."""
    pairing: Literal["pairwise", "joint"] = "pairwise"
    """One target model per source, merged afterwards (FuseChat), or all in one (FuseLLM)."""
    shuffle_source: bool = False
    """Control: give each conversation the source distributions of another one."""

    # -- loss
    loss: LossName = "fused_ce"
    """How the pivot's distribution is compared with the target."""
    lm_loss_weight: float = Field(default=0.9, ge=0, le=1)
    """lambda: weight of the gold cross-entropy; the fusion loss has the rest (FuseChat: 0.9)."""
    label_smoothing: float = Field(default=0.0, ge=0, le=1)
    """Control: spread so much of the fusion target over the whole vocabulary."""

    # -- training
    schedule: str = "cosine"
    """Learning-rate schedule, by transformers' names (FuseChat: cosine)."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps in which the rate rises (FuseChat: 0.03)."""
    batch_size: int = Field(default=128, ge=1)
    """Conversations per optimiser step, over all processes (FuseChat: 128)."""
    device_batch_size: int = Field(default=4, ge=1)
    """Conversations per forward pass of one process."""
    weight_decay: float = Field(default=0.0, ge=0)
    """As in AdamW."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """Of the adapter where lora_rank is not 0; twice the rank when not given."""
    eval_share: float = Field(default=0.02, ge=0, lt=1)
    """Share of the rows held out to measure development bits per byte."""
    save_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints, from which a killed run continues."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the trained weights; auto: float32, with bfloat16 autocast on an accelerator."""
    sft_baseline: bool = False
    """Also train on the same data, schedule and seed with lm_loss_weight 1."""
    training: dict[str, Any] = {}
    """Any further transformers TrainingArguments (FSDP, DeepSpeed, precision, reporting)."""

    # -- running
    post_merge: MergeName = "sce_dense"
    """How several targets become one model (FuseChat: sce_dense); layerwise weighs every kind of
    layer by the energy of the targets' changes to it (ours)."""
    post_merge_topk: float = Field(default=0.1, gt=0, le=1)
    """sce, sce_dense: share of the entries kept, those that vary most (FuseChat's code: 0.1)."""
    post_merge_density: float = Field(default=0.2, gt=0, le=1)
    """ties: share of each target's changes kept, the largest (TIES: 0.2)."""
    processes: int = Field(default=1, ge=1)
    """Processes for collecting and training, started by accelerate's launcher."""
    work_dir: str | None = None
    """Where the stages keep their results; OUT.fusion when not given."""
    resume: bool = True
    """Continue what the work_dir holds; false refuses a work_dir that is not empty."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything random."""

    @field_validator("device_map")
    @classmethod
    def _is_a_device(cls, value: str | None) -> str | None:
        if value is None or value in DEVICE_MAPS:
            return value
        import torch

        try:
            torch.device(value)
        except RuntimeError:
            raise ValueError(
                f"it is no device of torch (cuda, cuda:0, cpu ...) and none of "
                f"{', '.join(DEVICE_MAPS)}"
            ) from None
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> FusionSettings:
        if self.alignment == "bytes" and self.vocabulary_map == "ms":
            raise ValueError(
                "`vocabulary_map: ms` counts what dynamic time warping aligned: use it with "
                "`alignment: dtw_fusechat`, or leave the map at bytes"
            )
        if self.loss in ("uld", "gld"):
            if self.pairing == "joint":
                raise ValueError(
                    f"`loss: {self.loss}` compares with one source at a time: use `pairing: "
                    "pairwise`"
                )
            if self.label_smoothing:
                raise ValueError(f"`loss: {self.loss}` compares ranks: it has no label_smoothing")
        if self.target == "max_margin" and not self.include_pivot:
            raise ValueError(
                "`target: max_margin` measures the distance from the pivot's own distributions: it "
                "needs `include_pivot: true`"
            )
        return self


def settings_document(path: str | Path | None) -> Document:
    """The settings file with its lines; an empty one for None. RecipeError for what is no YAML."""
    return Document("settings", None) if path is None else Document.read(path, "settings file")


def load_settings(path: str | Path | None) -> FusionSettings:
    """Read a settings file; all defaults for None. RecipeError names file, line and key."""
    document = settings_document(path)
    if document.data is None:
        return FusionSettings()
    if not isinstance(document.data, dict):
        document.fail((), "a settings file maps names to values")
    known = FusionSettings.model_fields
    for key in document.data:
        if key not in known:
            document.fail((key,), f"no such setting. {suggest(key, known)}")
    try:
        return FusionSettings.model_validate(document.data)
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(part for part in first["loc"] if isinstance(part, str | int))
        if place not in document.lines:
            place = place[:1]
        message = first["msg"].removeprefix("Value error, ")
        document.fail(place, f"{first['input']!r} will not do: {message}" if place else message)


def settings_text(settings: FusionSettings) -> str:
    """A settings file with every value written out, each below what it means and may be."""
    return explained(FusionSettings, values=settings.model_dump(mode="json"))
