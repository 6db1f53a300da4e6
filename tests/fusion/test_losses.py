"""The losses against dense float64 arithmetic, their gradients, and what they must survive."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.fusion.training import losses, readout
from mergekit_unconstrained.fusion.training.losses import combined, fused_ce, fused_kl, gld, uld

MATCHED = ["fused_ce", "fused_kl"]
RANKED = ["uld", "gld"]
SETTINGS = [
    pytest.param(1.0, 0.0, False, id="plain"),
    pytest.param(2.5, 0.0, False, id="temperature"),
    pytest.param(1.0, 0.2, False, id="smoothing"),
    pytest.param(1.0, 0.0, True, id="bucket"),
    pytest.param(0.5, 0.3, True, id="all"),
]


class Batch:
    """N positions of a vocabulary of V with targets of up to K entries, all of it float64."""

    def __init__(self, n: int = 7, v: int = 23, k: int = 4, *, bucket: bool = False, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.logits = 3 * torch.randn(n, v, generator=g, dtype=torch.float64)
        self.gold = torch.randint(0, v, (n,), generator=g)
        self.ids = torch.stack([torch.randperm(v, generator=g)[:k] for _ in range(n)])
        self.probs = torch.rand(n, k, generator=g, dtype=torch.float64) + 0.05
        self.ids[:, -1][::3] = -1  # some rows have fewer entries
        self.ids[0, 0] = 0  # -1 and 0 in one row: neither may be taken for the other
        self.ids[0, 1:-1] = torch.arange(1, k - 1)
        self.probs[self.ids < 0] = 0
        self.rest = torch.rand(n, generator=g, dtype=torch.float64) * bucket
        self.rest[1] = 0
        total = self.probs.sum(1) + self.rest
        self.probs /= total[:, None]
        self.rest /= total
        self.used = torch.ones(n, dtype=torch.bool)
        self.groups = torch.arange(n) // 3

    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.gold, self.ids, self.probs, self.rest, self.used


def by_hand(
    batch: Batch, name: str, temperature: float, smoothing: float
) -> tuple[list[float], list[list[float]]]:
    """Values and gradients of (3) and (4), position by position, from the probabilities.

    The target is made dense; `rest` is one more class, its probability added up token by token.
    """
    values, gradients = [], []
    for z, ids, probs, rest in zip(
        batch.logits.numpy(),
        batch.ids.numpy(),
        batch.probs.numpy(),
        batch.rest.numpy(),
        strict=True,
    ):
        e = np.exp(z / temperature)
        q = e / e.sum()
        dense = np.zeros_like(q)
        for i, p in zip(ids, probs, strict=True):
            if i >= 0:
                dense[i] += p
        out = np.array([v not in ids for v in range(len(q))])
        parts = [(1 - smoothing, dense, rest), (smoothing, np.full_like(q, 1 / len(q)), 0.0)]
        value, gradient = 0.0, np.zeros_like(q)
        for share, target, left in parts:
            mass = q[out].sum()
            value -= share * ((target * np.log(q)).sum() + left * math.log(mass))
            if name == "fused_kl":
                every = [*target, left]
                value += share * sum(p * math.log(p) for p in every if p > 0)
            # d log(sum of some q) / dz is their share of that sum, less q.
            gradient += share * (target.sum() * q - target)
            gradient += share * left * (q - np.where(out, q / mass, 0))
        values.append(temperature**2 * value)
        gradients.append(list(temperature * gradient))
    return values, gradients


@pytest.mark.parametrize(("temperature", "smoothing", "bucket"), SETTINGS)
@pytest.mark.parametrize("name", MATCHED)
def test_values_and_gradients_are_those_of_a_dense_target(
    name: str, temperature: float, smoothing: float, bucket: bool
) -> None:
    for seed in range(3):
        batch = Batch(bucket=bucket, seed=seed)
        logits = batch.logits.clone().requires_grad_()
        rows = getattr(losses, name)(
            logits,
            batch.ids,
            batch.probs,
            batch.rest,
            temperature=temperature,
            label_smoothing=smoothing,
        )
        rows.sum().backward()
        values, gradients = by_hand(batch, name, temperature, smoothing)
        assert rows.tolist() == pytest.approx(values, rel=1e-12, abs=1e-12)
        torch.testing.assert_close(
            logits.grad, torch.tensor(gradients, dtype=torch.float64), rtol=1e-10, atol=1e-13
        )


def test_torch_agrees_on_soft_labels_and_smoothing() -> None:
    """Its own dense losses: cross_entropy with probabilities, kl_div, label_smoothing."""
    batch = Batch()
    dense = torch.zeros_like(batch.logits).scatter_add_(1, batch.ids.clamp(min=0), batch.probs)
    soft = functional.cross_entropy(batch.logits, dense, reduction="none")
    torch.testing.assert_close(fused_ce(batch.logits, batch.ids, batch.probs), soft)
    kl = functional.kl_div(batch.logits.log_softmax(1), dense, reduction="none").sum(1)
    torch.testing.assert_close(fused_kl(batch.logits, batch.ids, batch.probs), kl)
    one = torch.ones(7, 1, dtype=torch.float64)
    smooth = functional.cross_entropy(
        batch.logits, batch.gold, label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(
        fused_ce(batch.logits, batch.gold[:, None], one, label_smoothing=0.1), smooth
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_fusion_it_is_the_stock_loss(dtype: torch.dtype) -> None:
    batch = Batch(40, 301)
    ours, theirs = ((batch.logits / 3).to(dtype).requires_grad_() for _ in range(2))
    parts = combined(ours, *batch.arguments(), loss="fused_ce", lm_loss_weight=1.0)
    stock = functional.cross_entropy(theirs.float(), batch.gold, reduction="sum")
    parts.loss.backward()
    stock.backward()
    assert parts.loss.dtype == torch.float32
    assert parts.loss.item() == pytest.approx(stock.item(), rel=1e-6)
    assert parts.gold.item() == parts.loss.item()
    assert parts.fusion.item() == 0
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("name", MATCHED + RANKED)
def test_the_parts_add_up(name: str) -> None:
    batch = Batch(bucket=name in MATCHED)
    batch.used[2:4] = False
    extra: dict[str, Any] = {"groups": batch.groups} if name == "gld" else {}
    parts = combined(batch.logits, *batch.arguments(), loss=name, lm_loss_weight=0.9, **extra)  # type: ignore[arg-type]
    gold = functional.cross_entropy(batch.logits, batch.gold, reduction="sum")
    used = batch.used
    logits, ids, probs = batch.logits[used], batch.ids[used], batch.probs[used]
    if name in MATCHED:
        fusion = getattr(losses, name)(logits, ids, probs, batch.rest[used])
    else:
        fusion = uld(logits, probs)
        if name == "gld":
            fusion = fusion + gld(logits, ids, probs, batch.groups[used])
    assert parts.gold.item() == pytest.approx(float(gold))
    assert parts.fusion.item() == pytest.approx(float(fusion.sum()))
    assert parts.loss.item() == pytest.approx(0.9 * float(gold) + 0.1 * float(fusion.sum()))
    assert (int(parts.count), int(parts.used)) == (7, 5)


@pytest.mark.parametrize(("temperature", "smoothing", "bucket"), SETTINGS)
@pytest.mark.parametrize("name", MATCHED + RANKED)
def test_gradients_are_the_numerical_ones(
    name: str, temperature: float, smoothing: float, bucket: bool
) -> None:
    batch = Batch(5, 9, bucket=bucket)
    batch.used[1] = False
    batch.gold[2] = -100
    rows = torch.tensor([5, 0, 3, 2, 4])
    logits = torch.zeros(6, 9, dtype=torch.float64)
    logits[rows] = batch.logits
    if name in RANKED:
        temperature, smoothing = 1.0, 0.0

    def loss(z: torch.Tensor) -> torch.Tensor:
        return combined(
            z,
            *batch.arguments(),
            loss=name,  # type: ignore[arg-type]
            lm_loss_weight=0.6,
            temperature=temperature,
            label_smoothing=smoothing,
            groups=batch.groups,
            rows=rows,
        ).loss

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


# -- what the matched losses mean -----------------------------------------------------------------


def test_a_target_of_the_gold_token_alone_is_the_gold_loss() -> None:
    batch = Batch()
    one = torch.ones(7, 1, dtype=torch.float64)
    for weight in (0.0, 0.3, 1.0):
        parts = combined(
            batch.logits, batch.gold, batch.gold[:, None], one, None, batch.used,
            loss="fused_ce", lm_loss_weight=weight,
        )  # fmt: skip
        assert parts.loss.item() == pytest.approx(
            float(functional.cross_entropy(batch.logits, batch.gold, reduction="sum"))
        )


def test_the_divergence_from_its_own_distribution_is_nothing() -> None:
    logits = Batch(5, 8).logits.requires_grad_()
    probs, ids = logits.detach().softmax(1).sort(1, descending=True)
    rows = fused_kl(logits, ids, probs)
    torch.testing.assert_close(rows, torch.zeros_like(rows), rtol=0, atol=1e-14)
    top = probs[:, :3]
    rest = 1 - top.sum(1)
    bucket = fused_kl(logits, ids[:, :3], top, rest)
    torch.testing.assert_close(bucket, torch.zeros_like(bucket), rtol=0, atol=1e-14)
    (rows + bucket).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-14)


def test_the_bucket_is_one_class_of_all_other_tokens() -> None:
    """As cross-entropy over k + 1 classes whose logits are those of the summed probabilities."""
    batch = Batch(bucket=True)
    for row in range(7):
        listed = batch.ids[row][batch.ids[row] >= 0]
        q = batch.logits[row].softmax(0)
        classes = torch.cat([q[listed], (1 - q[listed].sum())[None]]).log()
        target = torch.cat([batch.probs[row][batch.ids[row] >= 0], batch.rest[row][None]])
        expected = functional.cross_entropy(classes[None], target[None])
        found = fused_ce(
            *(t[row : row + 1] for t in (batch.logits, batch.ids, batch.probs, batch.rest))
        )
        assert found.item() == pytest.approx(float(expected))


def test_at_a_high_temperature_gradients_match_logits_as_hinton_says() -> None:
    """Hinton et al. 2015, Eq. (4): (z - v) / V for logits of mean zero; T^2 keeps that size."""
    g = torch.Generator().manual_seed(0)
    z, v = (torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    z, v = (x - x.mean(1, keepdim=True) for x in (z, v))
    ids = torch.arange(6).expand(4, 6)
    z.requires_grad_()
    for temperature, tolerance in ((1e2, 3e-2), (1e4, 3e-4)):
        (gradient,) = torch.autograd.grad(
            fused_ce(z, ids, (v / temperature).softmax(1), temperature=temperature).sum(), z
        )
        torch.testing.assert_close(gradient, (z - v).detach() / 6, rtol=0, atol=tolerance)


# -- what they must survive -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_extreme_logits_lose_nothing(shift: float, dtype: torch.dtype) -> None:
    """Also where the listed tokens hold nearly all mass, or nearly none."""
    z = torch.tensor(
        [
            [60.0, 0.0, -60.0, 5.0, 0.0],
            [-80.0, 70.0, 70.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 90.0],
            [400.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    logits = (z + shift).to(dtype)
    ids = torch.tensor([[0, 3], [0, -1], [4, 2], [0, -1]])
    probs = torch.tensor([[0.5, 0.3], [0.6, 0.0], [0.7, 0.1], [0.5, 0.0]])
    rest = torch.tensor([0.2, 0.4, 0.2, 0.5])
    exact = logits.double().requires_grad_()
    expected = fused_ce(exact, ids, probs.double(), rest.double())
    leaf = logits.clone().requires_grad_()
    found = fused_ce(leaf, ids, probs, rest)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    expected.sum().backward()
    found.sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=1e-8)


@pytest.mark.parametrize("name", MATCHED + RANKED)
def test_what_an_unused_entry_or_position_holds_does_not_matter(name: str) -> None:
    batch = Batch(bucket=name in MATCHED)
    batch.used[3] = False
    batch.gold[5] = -100

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        logits = batch.logits.clone().requires_grad_()
        parts = combined(
            logits, *batch.arguments(), loss=name, lm_loss_weight=0.5, groups=batch.groups  # type: ignore[arg-type]
        )  # fmt: skip
        parts.loss.backward()
        return torch.stack([parts.loss.detach(), parts.gold, parts.fusion]), logits.grad

    before, gradient = run()
    if name in MATCHED:
        batch.probs[batch.ids < 0] = 7.0
    batch.probs[3] = torch.rand(4)
    batch.rest[3] = 0.5
    batch.ids[5] = 1
    batch.logits[5] = torch.nan  # as attention gives where everything is masked
    after, other = run()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(other, gradient, rtol=0, atol=0)
    assert not gradient[5].any()


def test_an_impossible_token_without_mass_is_harmless_and_with_mass_infinitely_bad() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]] * 2).requires_grad_()
    ids = torch.tensor([[1, 0], [1, 0]])
    probs = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    rows = fused_ce(logits, ids, probs)
    assert rows[0].item() == pytest.approx(math.log(1 + math.e))
    assert rows[1].item() == math.inf
    rows[0].backward()
    assert bool(torch.isfinite(logits.grad).all())  # type: ignore[arg-type]


def test_a_target_without_mass_and_one_of_the_bucket_alone() -> None:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.full((2, 3), -1)
    rows = fused_ce(logits, ids, torch.zeros(2, 3), torch.tensor([0.0, 1.0]))
    assert rows.tolist() == [0, 0]  # all tokens together are certain
    rows.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(2, 5), rtol=0, atol=1e-6)


def test_a_bucket_without_a_possible_token_is_no_harm_where_it_has_no_mass() -> None:
    """All tokens listed, or the others impossible."""
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    logits[2, 2] = -torch.inf
    logits.requires_grad_()
    ids = torch.tensor([[0, 1, 2], [0, 1, -1], [0, 1, -1]])
    probs = torch.tensor([[0.2, 0.3, 0.5], [0.4, 0.3, 0.0], [0.4, 0.6, 0.0]])
    rows = fused_ce(logits, ids, probs, torch.tensor([0.0, 0.3, 0.0]))
    rows.sum().backward()
    assert bool(torch.isfinite(rows).all())
    assert bool(torch.isfinite(logits.grad).all())  # type: ignore[arg-type]
    impossible = fused_ce(logits[2:], ids[2:], probs[2:] / 2, torch.tensor([0.5]))
    assert impossible.item() == math.inf


@pytest.mark.parametrize("name", MATCHED + RANKED)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_logit_is_seen(name: str, bad: float) -> None:
    batch = Batch()
    batch.logits[4, 2] = bad
    parts = combined(batch.logits, *batch.arguments(), loss=name, lm_loss_weight=0.5)  # type: ignore[arg-type]
    assert not math.isfinite(parts.loss.item())


@pytest.mark.parametrize("name", MATCHED + RANKED)
@pytest.mark.parametrize("case", ["no position", "all masked", "no entries", "none used"])
def test_batches_with_nothing_to_learn(name: str, case: str) -> None:
    batch = Batch(n=0 if case == "no position" else 4, k=4) if case != "no position" else None
    if batch is None:
        logits = torch.zeros(0, 9).requires_grad_()
        arguments: tuple[torch.Tensor, ...] = (
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, 3, dtype=torch.long),
            torch.zeros(0, 3),
            torch.zeros(0),
            torch.zeros(0, dtype=torch.bool),
        )
    else:
        logits = batch.logits.clone().requires_grad_()
        gold, ids, probs, rest, used = batch.arguments()
        if case == "all masked":
            gold = torch.full_like(gold, -100)
        elif case == "no entries":
            ids, probs = ids[:, :0], probs[:, :0]
        else:
            used = torch.zeros_like(used)
        arguments = (gold, ids, probs, rest, used)
    parts = combined(logits, *arguments, loss=name, lm_loss_weight=0.25)  # type: ignore[arg-type]
    parts.loss.backward()
    assert parts.fusion.item() == 0
    assert parts.loss.item() == pytest.approx(0.25 * parts.gold.item())
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    if case in ("no position", "all masked"):
        assert (parts.loss.item(), int(parts.count)) == (0, 0)
        assert not logits.grad.any()


@pytest.mark.parametrize("name", MATCHED + RANKED)
def test_rows_pick_positions_without_a_copy(name: str) -> None:
    batch = Batch(bucket=name in MATCHED)
    batch.gold[1] = -100
    rows = torch.tensor([8, 2, 3, 11, 0, 5, 6])
    whole = torch.full((12, 23), torch.nan, dtype=torch.float64)
    whole[rows] = batch.logits
    settings: dict[str, Any] = {"loss": name, "lm_loss_weight": 0.5, "groups": batch.groups}
    picked, gathered = whole.requires_grad_(), batch.logits.clone().requires_grad_()
    there = combined(picked, *batch.arguments(), rows=rows, **settings)
    here = combined(gathered, *batch.arguments(), **settings)
    torch.testing.assert_close(there.loss, here.loss, rtol=0, atol=0)
    there.loss.backward()
    here.loss.backward()
    expected = torch.zeros_like(whole)
    expected[rows] = gathered.grad
    torch.testing.assert_close(picked.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MATCHED + RANKED)
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(bucket=name in MATCHED)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        logits = batch.logits.clone().requires_grad_()
        loss = combined(logits, *batch.arguments(), loss=name, lm_loss_weight=0.5).loss  # type: ignore[arg-type]
        (loss / 3).backward()
        return loss.detach(), logits.grad

    whole = run()
    for size in (1, 23, 24, 60):
        monkeypatch.setattr(readout, "CHUNK_CPU", size)
        torch.testing.assert_close(run(), whole, rtol=1e-12, atol=1e-14)


class Largest(TorchDispatchMode):
    """Counts, by operation, the results of at least `size` entries that own their memory."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.numel() >= self.size:
                self.found[str(func)] += t.data_ptr() not in inputs
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MATCHED + RANKED)
def test_the_gradient_is_the_only_tensor_of_tokens_times_vocabulary(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout, "CHUNK_CPU", 500)
    batch = Batch(50, 100, bucket=name in MATCHED)
    batch.gold[::4] = -100
    logits = batch.logits.to(dtype).requires_grad_()
    with Largest(50 * 100 // 4) as largest:
        combined(
            logits, *batch.arguments(), loss=name, lm_loss_weight=0.9, groups=batch.groups  # type: ignore[arg-type]
        ).loss.backward()  # fmt: skip
    assert sum(largest.found.values()) == 1, dict(largest.found)


def test_backward_can_be_run_twice() -> None:
    batch = Batch()
    logits = batch.logits.requires_grad_()
    loss = combined(logits, *batch.arguments(), loss="fused_ce", lm_loss_weight=0.5).loss
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


# -- by rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [13, 640, 1279, 1280, 1300, 5000])
def test_the_largest_are_found_among_blocks(size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(9, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    logits[0] = 1.0  # nothing but ties
    logits[1, -3:] = 9.0  # in the columns that fill no block
    logits[2, :12] = torch.arange(12).to(dtype) + 9  # all in one
    for k in (0, 1, 5, 7):
        columns = readout.top_columns(logits, k)
        assert all(len(set(row)) == k for row in columns.tolist())
        assert torch.equal(logits.gather(1, columns), logits.topk(k, dim=1).values)
    rows = torch.tensor([4, 2])
    assert torch.equal(readout.top_columns(logits, 3, rows), readout.top_columns(logits[rows], 3))


def standardized(x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in x) / (len(x) - 1))
    return [(value - mean) / deviation for value in x]


def uld_by_hand(logits: torch.Tensor, probs: torch.Tensor) -> list[float]:
    found = []
    for z, p in zip(logits.tolist(), probs.tolist(), strict=True):
        source = sorted((math.log(x) for x in p if x > 0), reverse=True)
        pivot = sorted(z, reverse=True)[: len(source)]
        pairs = zip(standardized(pivot), standardized(source), strict=True)
        found.append(sum(abs(a - b) for a, b in pairs) / len(source))
    return found


def graph(entries: list[dict[int, float]]) -> list[float]:
    """Sorted row sums of the mean outer product of activations, through the dense graph."""
    channels = sorted({c for position in entries for c in position})
    total = np.zeros((len(channels), len(channels)))
    for position in entries:
        values = standardized(list(position.values()))
        standard = dict(zip(position, values, strict=True))
        a = np.array(
            [(standard[c] - min(values)) / len(values) if c in standard else 0 for c in channels]
        )
        total += np.outer(a, a) / len(entries)
    return sorted(total.sum(axis=1), reverse=True)


def gld_by_hand(batch: Batch) -> list[float]:
    rows = range(len(batch.gold))
    found = [0.0] * len(rows)
    for name in set(batch.groups.tolist()):
        members = [n for n in rows if int(batch.groups[n]) == name]
        pivot, source = [], []
        for n in members:
            theirs = {
                int(i): math.log(p)
                for i, p in zip(batch.ids[n], batch.probs[n].tolist(), strict=True)
                if p > 0
            }
            z = batch.logits[n].tolist()
            best = sorted(range(len(z)), key=lambda c, z=z: -z[c])[: len(theirs)]
            pivot.append({c: z[c] for c in best})
            source.append(theirs)
        f, g = graph(pivot), graph(source)
        size = max(len(f), len(g))
        f, g = (x + [0.0] * (size - len(x)) for x in (f, g))
        distance = sum(abs(a - b) for a, b in zip(f, g, strict=True))
        for n in members:
            found[n] = distance
    return found


@pytest.mark.parametrize("seed", range(4))
def test_ranked_losses_equal_the_graphs_and_ranks_written_out(seed: int) -> None:
    batch = Batch(8, 30, 5, seed=seed)
    assert uld(batch.logits, batch.probs).tolist() == pytest.approx(
        uld_by_hand(batch.logits, batch.probs), abs=1e-9
    )
    found = gld(batch.logits, batch.ids, batch.probs, batch.groups)
    assert found.tolist() == pytest.approx(gld_by_hand(batch), abs=1e-9)


@pytest.mark.parametrize(
    "loss", [uld, lambda z, p: gld(z, torch.arange(p.shape[1]).expand_as(p), p)]
)
def test_ranks_are_blind_to_scale_shift_and_order(loss: Callable[..., torch.Tensor]) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 12, generator=g, dtype=torch.float64)
    probs = torch.rand(6, 5, generator=g, dtype=torch.float64).softmax(1)
    before = loss(logits, probs)
    assert float(before.min()) > 0
    torch.testing.assert_close(loss(3 * logits - 7, probs / 2), before, rtol=1e-6, atol=1e-9)
    shuffled = logits[:, torch.randperm(12, generator=g)]
    torch.testing.assert_close(loss(shuffled, probs), before, rtol=1e-9, atol=1e-12)


def test_the_same_model_under_other_names_is_at_no_distance() -> None:
    logits = torch.randn(9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top, ids = logits.topk(5, dim=1)
    probs = (2 * top).softmax(1) / 4  # another temperature, and truncated
    names = torch.randperm(500)[:12]  # the source's vocabulary is larger than the pivot's
    leaf = logits.clone().requires_grad_()
    rows = uld(leaf, probs) + gld(leaf, names[ids], probs)
    torch.testing.assert_close(rows, torch.zeros_like(rows), rtol=0, atol=1e-6)


def test_the_order_in_which_the_source_lists_its_entries_does_not_matter() -> None:
    batch = Batch(8, 30, 5)
    turned = torch.arange(4, -1, -1)
    torch.testing.assert_close(
        uld(batch.logits, batch.probs[:, turned]), uld(batch.logits, batch.probs)
    )
    torch.testing.assert_close(
        gld(batch.logits, batch.ids[:, turned], batch.probs[:, turned], batch.groups),
        gld(batch.logits, batch.ids, batch.probs, batch.groups),
    )


def test_the_graph_sees_what_ranks_alone_do_not() -> None:
    """Two sources with the same numbers everywhere, one of them on the same channels throughout."""
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = torch.tensor([[0.5, 0.3, 0.1]], dtype=torch.float64).expand(6, 3)
    same, other = torch.arange(3).expand(6, 3), torch.arange(18).reshape(6, 3)
    assert not torch.allclose(gld(logits, same, probs), gld(logits, other, probs), rtol=0.1)


def test_a_channel_that_enters_the_top_moves_the_graph_smoothly() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.9999, 0.0], [1.0, 4.0, 0.0, 2.0, 3.0]])
    other = logits.clone()
    other[0, 3] = 1.0001
    probs = torch.tensor([[0.5, 0.3, 0.1]] * 2)
    ids = torch.tensor([[0, 1, 2], [4, 5, 6]])
    before, after = gld(logits.double(), ids, probs), gld(other.double(), ids, probs)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)


def test_one_entry_has_no_spread_and_counts_nothing() -> None:
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    probs = torch.tensor([[0.9, 0.0], [0.0, 0.0]])
    rows = uld(logits, probs) + gld(logits, torch.tensor([[1, -1], [-1, -1]]), probs)
    assert rows.tolist() == [0, 0]
    rows.sum().backward()
    assert not logits.grad.any()  # type: ignore[union-attr]


def test_a_position_of_one_entry_is_not_of_its_graph() -> None:
    batch = Batch(6, 20, 4)
    expected = gld(batch.logits[1:], batch.ids[1:], batch.probs[1:])
    batch.probs[0, 1:] = 0
    found = gld(batch.logits, batch.ids, batch.probs)
    torch.testing.assert_close(found, torch.cat([torch.zeros(1).double(), expected]))


def test_equal_logits_have_a_finite_gradient() -> None:
    logits = torch.zeros(1, 6).requires_grad_()
    (uld(logits, torch.tensor([[0.6, 0.3, 0.1]])) + 0).sum().backward()
    assert bool(torch.isfinite(logits.grad).all())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RANKED)
def test_smoothing_ranks_is_refused(name: str) -> None:
    batch = Batch()
    with pytest.raises(RecipeError, match=f"means nothing to the loss {name}.*label_smoothing: 0"):
        combined(
            batch.logits, *batch.arguments(), loss=name, lm_loss_weight=0.5, label_smoothing=0.1  # type: ignore[arg-type]
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", MATCHED + RANKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accelerator_gives_the_same(name: str, dtype: torch.dtype) -> None:
    batch = Batch(60, 500, bucket=name in MATCHED)
    batch.gold[::7] = -100
    found = []
    for device in ("cpu", "cuda"):
        logits = batch.logits.to(device, dtype).requires_grad_()
        arguments = [t.to(device) for t in batch.arguments()]
        groups = batch.groups.to(device)
        loss = combined(logits, *arguments, loss=name, lm_loss_weight=0.5, groups=groups).loss  # type: ignore[arg-type]
        loss.backward()
        assert logits.grad is not None
        found.append((loss.detach().cpu(), logits.grad.float().cpu()))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
