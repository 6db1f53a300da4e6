"""A training step with a fusion loss beside one with the stock loss (`make bench`).

Forward and backward of a random 23 M parameter Llama with 49,152 tokens, 4 x 128 tokens, all of
them learnt, targets of k = 10. Each loss has a process of its own, so that peaks of memory compare;
they take turns. CPU seconds of a step are the least of all, memory is the whole process's, and once
more without what it held before the first step. Prints a table and asserts nothing about time.
MERGEKIT_UNCONSTRAINED_BENCH_REPEATS sets how often everything runs.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.bench

REPEATS = int(os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH_REPEATS", "3"))
STEPS = 4
VOCABULARY, BATCH, LENGTH, K = 49_152, 4, 128, 10
STOCK = "stock"
LOSSES = {
    STOCK: "transformers' loss",
    "sft": "ours, lm_loss_weight 1",
    "fused_ce": "fused_ce",
    "bucket": "fused_ce, rest bucket",
    "smoothed": "fused_ce, smoothed",
    "uld": "uld",
    "gld": "gld",
}


def test_a_step(capsys: pytest.CaptureFixture) -> None:
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
    for _ in range(REPEATS):
        for name, found in seen.items():
            said = subprocess.run(
                [sys.executable, __file__, name],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                check=True,
            )
            found.append(json.loads(said.stdout))
    # Other processes make a step slower, never faster: the least is what it takes.
    least = {
        name: {key: min(run[key] for run in found) for key in found[0]}
        for name, found in seen.items()
    }
    stock = least[STOCK]
    lines = [
        f"forward and backward, {BATCH} x {LENGTH} tokens, vocabulary {VOCABULARY}, k = {K}; "
        f"least of {REPEATS * STEPS}",
        f"{'':24} {'CPU s':>8}{'ratio':>8} {'MiB':>8}{'ratio':>8} {'of it steps':>12}{'ratio':>8}",
    ]
    for name, label in LOSSES.items():
        found = least[name]
        lines.append(
            f"{label:24} {found['seconds']:8.2f}{found['seconds'] / stock['seconds']:8.2f} "
            f"{found['peak']:8.0f}{found['peak'] / stock['peak']:8.2f} "
            f"{found['steps']:12.0f}{found['steps'] / stock['steps']:8.2f}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def run(name: str) -> dict[str, float]:
    """Some steps with one loss: least CPU seconds of a step, peak MiB, and of it by the steps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mergekit_unconstrained.fusion.training.losses import combined

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=880,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).train()
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    predicting = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)[:, :-1].reshape(-1)
    gold = tokens[:, 1:].reshape(-1)
    ids = torch.stack([torch.randperm(VOCABULARY)[:K] for _ in range(len(gold))])
    probs = torch.rand(len(gold), K + 1)
    probs /= probs.sum(dim=1, keepdim=True)
    rest = probs[:, K] * (name == "bucket")
    used = torch.ones(len(gold), dtype=torch.bool)
    groups = torch.arange(BATCH).repeat_interleave(LENGTH - 1)

    def step() -> None:
        model.zero_grad()
        if name == STOCK:
            loss = model(input_ids=tokens, labels=tokens).loss
        else:
            parts = combined(
                model(input_ids=tokens).logits.view(-1, VOCABULARY),
                gold,
                ids,
                probs[:, :K],
                rest,
                used,
                loss=name if name in ("uld", "gld") else "fused_ce",
                lm_loss_weight=1.0 if name == "sft" else 0.9,
                label_smoothing=0.1 if name == "smoothed" else 0.0,
                groups=groups,
                rows=predicting,
            )
            loss = parts.loss / parts.count
        loss.backward()

    before = peak_mib()
    step()  # memory is found, and held from here on
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return {"seconds": min(seconds), "peak": peak_mib(), "steps": peak_mib() - before}


def peak_mib() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
