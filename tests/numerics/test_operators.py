"""Every operator against exact rational arithmetic, and the properties of the arithmetic itself."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from exact_reference import ExactExpert, merged

from mergekit_unconstrained.numerics import keeping, pieces, sparsify
from mergekit_unconstrained.numerics.operators import merge
from mergekit_unconstrained.numerics.settings import OPERATORS, Expert, Settings

NAMES = list(OPERATORS)
SHAPES = [(33,), (7, 5), (2, 3, 4)]
# They and 1 / density are exact in binary, so that sums that cancel do so in float32 as on paper.
WEIGHTS = [0.75, -0.5, 1.25, 0.25, 2.0]
DENSITIES = [0.5, 1.0, 0.25, 0.0, 0.5]


def on_a_grid(shape: tuple[int, ...], count: int, seed: int = 0) -> list[torch.Tensor]:
    """A base and experts, their differences exact in float32 and full of ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-128, 129, shape, generator=generator) / 64
    return [
        base,
        *(base + torch.randint(-16, 17, shape, generator=generator) / 256 for _ in range(count)),
    ]


def rationals(tensor: torch.Tensor) -> list[Fraction]:
    return [Fraction(x) for x in tensor.double().reshape(-1).tolist()]


def make_experts(tensors: list[torch.Tensor], **changes: Any) -> list[Expert]:
    return [
        Expert(
            **{
                "tensor": tensor,
                "weight": weight,
                "density": density,
                "gamma": 0.1,
                "epsilon": 0.15 if 0.15 < density < 0.85 else 0.05,
                "model": f"model-{i}",
                **changes,
            }
        )
        for i, (tensor, weight, density) in enumerate(
            zip(tensors, WEIGHTS, DENSITIES, strict=False)
        )
    ]


def random_keeping(
    operator: str, base: torch.Tensor, expert: Expert, settings: Settings
) -> list[bool] | None:
    """The mask of a random operator, as sparsify draws it; None for the others."""
    key = {"seed": settings.seed, "tensor": settings.name, "model": expert.model}
    if operator in ("dare_linear", "dare_ties"):
        mask = sparsify.random_mask(base.shape, expert.density, **key)
    elif operator == "della":
        size = (expert.tensor - base).abs()
        mask = sparsify.magprune_mask(size, expert.density, expert.epsilon, **key)
    else:
        return None
    return mask.reshape(-1).tolist()


def exactly(base: torch.Tensor, experts: list[Expert], settings: Settings) -> torch.Tensor:
    """The reference, as a float64 tensor."""
    result = merged(
        settings.operator,
        rationals(base),
        [
            ExactExpert(
                values=rationals(e.tensor),
                weight=Fraction(e.weight),
                density=e.density,
                gamma=e.gamma,
                mask=random_keeping(settings.operator, base, e, settings),
            )
            for e in experts
        ],
        normalize=settings.normalize,
        rescale=settings.rescale,
        lambda_=Fraction(settings.lambda_),
        select_topk=settings.select_topk,
    )
    values = torch.tensor([float(x) for x in result], dtype=torch.float64)
    return values.reshape(base.shape)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", NAMES)
def test_every_setting_equals_exact_arithmetic(
    operator: str, shape: tuple[int, ...], count: int
) -> None:
    base, *tensors = on_a_grid(shape, count)
    experts = make_experts(tensors)
    for normalize, rescale, lambda_, topk in itertools.product(
        (None, True, False), (None, "none", "inverse", "l1"), (1.0, 0.5, -2.0), (1.0, 0.4)
    ):
        if not operator.startswith("sce") and topk != 1:
            continue
        settings = Settings(
            operator,  # type: ignore[arg-type]
            lambda_=lambda_,
            normalize=normalize,
            rescale=rescale,  # type: ignore[arg-type]
            select_topk=topk,
            seed=3,
            name="w",
        )
        result = merge(base, experts, settings)
        assert result.shape == base.shape
        torch.testing.assert_close(
            result.double(), exactly(base, experts, settings), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("operator", NAMES)
def test_double_precision_is_exact_to_its_last_digits(operator: str) -> None:
    base, *tensors = on_a_grid((9, 11), 3)
    experts = make_experts(tensors)
    settings = Settings(operator, dtype=torch.float64, lambda_=0.5)  # type: ignore[arg-type]
    result = merge(base.double(), experts, settings)
    torch.testing.assert_close(result, exactly(base, experts, settings), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("chunk", [7, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", NAMES)
def test_one_rounding_to_the_dtype_of_the_files(
    operator: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is rounded on the way: the error is half a unit in the last place of the result."""
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    base, *tensors = (t.to(dtype) for t in on_a_grid((9, 11), 3))
    experts = make_experts(tensors)
    settings = Settings(operator)  # type: ignore[arg-type]
    result = merge(base, experts, settings)
    assert result.dtype == dtype
    expected = exactly(base.float(), [_widened(e) for e in experts], settings)
    unit = torch.finfo(dtype).eps * expected.abs().clamp(min=2**-6)
    assert bool(((result.double() - expected).abs() <= 1.02 * unit / 2).all())


def _widened(expert: Expert) -> Expert:
    return Expert(**{**vars(expert), "tensor": expert.tensor.float()})


@pytest.mark.parametrize("operator", NAMES)
def test_the_pieces_fit_together(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(23, 31, generator=generator)
    tensors = [base + 0.01 * torch.randn(23, 31, generator=generator) for _ in range(3)]
    settings = Settings(operator, select_topk=0.5, lambda_=0.7)  # type: ignore[arg-type]
    if operator.startswith("dare"):  # whose norms are summed by pieces
        settings = dataclasses.replace(settings, rescale="inverse")
    experts = make_experts(tensors)
    whole = merge(base, experts, settings)
    for chunk in (1, 7, 64, 712, 713, 714):
        monkeypatch.setattr(pieces, "CHUNK", chunk)
        torch.testing.assert_close(merge(base, experts, settings), whole, rtol=1e-6, atol=0)
        if chunk % 16 == 0:  # below a vector's length torch may fuse multiply and add
            assert torch.equal(merge(base, experts, settings), whole)


@pytest.mark.parametrize("operator", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("chunk", [1, 64, 713])
def test_norms_are_summed_over_all_pieces(
    operator: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tensors = on_a_grid((23, 31), 3)
    experts = make_experts(tensors, density=0.5)
    settings = Settings(operator, seed=3, name="w")  # type: ignore[arg-type]
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    torch.testing.assert_close(
        merge(base, experts, settings).double(),
        exactly(base, experts, settings),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("operator", NAMES)
def test_the_inputs_are_left_alone(operator: str) -> None:
    tensors = on_a_grid((6, 7), 3)
    copies = [t.clone() for t in tensors]
    merge(tensors[0], make_experts(tensors[1:]), Settings(operator))  # type: ignore[arg-type]
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("operator", NAMES)
def test_the_result_is_new_memory(operator: str) -> None:
    base, *tensors = on_a_grid((6, 7), 2)
    experts = make_experts(tensors)
    for chosen in (experts, []):
        result = merge(base, chosen, Settings(operator))  # type: ignore[arg-type]
        inputs = {t.data_ptr() for t in (base, *tensors)}
        assert result.data_ptr() not in inputs


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("operator", NAMES)
def test_a_bad_entry_of_any_input_reaches_the_result(operator: str, bad: float) -> None:
    """Also an entry that is dropped: `context.finish` relies on it."""
    for place in range(1 if operator == "linear" else 0, 3):  # linear does not read the base
        tensors = on_a_grid((40, 40), 2)
        tensors[place].view(-1)[::7] = bad
        result = merge(tensors[0], make_experts(tensors[1:]), Settings(operator))  # type: ignore[arg-type]
        assert not bool(torch.isfinite(result.sum()))


@pytest.mark.parametrize("operator", NAMES)
def test_gradients_are_not_recorded(operator: str) -> None:
    base, *tensors = (t.requires_grad_() for t in on_a_grid((6, 7), 2))
    result = merge(base, make_experts(tensors), Settings(operator))  # type: ignore[arg-type]
    assert not result.requires_grad


# -- rules that only some operators have ----------------------------------------------------------


def one(operator: str, base: float, deltas: list[float], **changes: Any) -> float:
    """D of one entry, by weights of 1 unless said."""
    weights = changes.pop("weights", [1.0] * len(deltas))
    experts = [Expert(torch.tensor([base + d]), w) for d, w in zip(deltas, weights, strict=True)]
    settings = Settings(operator, **changes)  # type: ignore[arg-type]
    return float(merge(torch.tensor([base]), experts, settings)) - base


@pytest.mark.parametrize(
    ("deltas", "weights", "expected"),
    [
        ([2.0, -1.0], [1, 1], 2.0),  # the larger sum wins
        ([2.0, -3.0], [1, 1], -3.0),
        ([2.0, -3.0], [1, 0.5], 2.0),  # by weight
        ([1.0, -1.0], [1, 1], 1.0),  # a sum of zero elects +
        ([0.0, 0.0], [1, 1], 0.0),
        ([3.0, 0.0], [1, 1], 3.0),  # a zero entry agrees with nobody: not averaged in
        ([3.0, 1.0, -1.0], [1, 1, 1], 2.0),  # the mean of those who agree
        ([3.0, 1.0], [1, 3], 1.5),  # weighted
        ([4.0, 2.0], [-1, -1], 3.0),  # a negative weight turns the vote, and the mean back
    ],
)
def test_ties_elects_a_sign(deltas: list[float], weights: list[float], expected: float) -> None:
    assert one("ties", 0.0, deltas, weights=weights) == pytest.approx(expected)


def test_weights_that_cancel_are_not_divided_by() -> None:
    assert one("task_arithmetic", 0.0, [3.0, 1.0], weights=[1, -1], normalize=True) == 2.0
    assert one("ties", 0.0, [3.0, -3.0], weights=[1, -1], normalize=True) == 6.0


def test_weights_of_a_negative_sum_are() -> None:
    assert one("task_arithmetic", 0.0, [3.0, 0.5], weights=[-1, -2], normalize=True) == (
        pytest.approx(4 / 3)
    )


def test_sce_weighs_by_energy() -> None:
    base = torch.zeros(2)
    experts = [Expert(torch.tensor([3.0, 1.0]), 1.0), Expert(torch.tensor([1.0, -0.5]), 1.0)]
    eta = [10 / 11.25, 1.25 / 11.25]
    expected = [3 * eta[0] + 1 * eta[1], 1.0]
    result = merge(base, experts, Settings("sce"))
    torch.testing.assert_close(result, torch.tensor(expected))


@pytest.mark.parametrize(
    ("small", "expected"),
    [
        (0.1, 0.1),  # a share of 1 % is divided by itself
        (1e-4, 1e-6),  # one of 1e-8 by 1e-6, mergekit's floor
    ],
)
def test_sce_gives_an_expert_its_way_where_it_is_alone(small: float, expected: float) -> None:
    experts = [Expert(torch.tensor([1.0, 0.0]), 1.0), Expert(torch.tensor([0.0, small]), 1.0)]
    result = merge(torch.zeros(2), experts, Settings("sce"))
    torch.testing.assert_close(result, torch.tensor([1.0, expected]), rtol=1e-5, atol=0)


def test_sce_selects_by_variance_over_the_experts() -> None:
    base = torch.zeros(4)
    experts = [
        Expert(torch.tensor([5.0, 1.0, 2.0, 0.0]), 1.0),
        Expert(torch.tensor([5.0, 3.0, 2.5, 0.0]), 1.0),
    ]
    # Two entries vary; half of them is one: the second. The large but equal first one is dropped.
    result = merge(base, experts, Settings("sce", select_topk=0.5))
    assert result.nonzero().reshape(-1).tolist() == [1]


def test_published_sce_merges_what_was_not_selected_too() -> None:
    """As above, but the shares alone come from the entry selected; signs are erased everywhere."""
    base = torch.zeros(3)
    experts = [
        Expert(torch.tensor([5.0, 1.0, 2.0]), 1.0),
        Expert(torch.tensor([5.0, 3.0, -1.0]), 1.0),
    ]
    # Variances 0, 1, 2.25: the last is half of the two that vary, and its squares are 4 and 1.
    result = merge(base, experts, Settings("sce_dense", select_topk=0.5))
    torch.testing.assert_close(result, torch.tensor([5.0, 0.8 * 1 + 0.2 * 3, 2.0]))
    everything = merge(base, experts, Settings("sce_dense"))
    eta = [30 / 65, 35 / 65]
    torch.testing.assert_close(everything, torch.tensor([5.0, eta[0] * 1 + eta[1] * 3, 2.0]))


def test_published_sce_has_no_floor_under_small_changes() -> None:
    """The task vectors of fine-tuning square to less than mergekit's 1e-6."""
    base = torch.zeros(2)
    experts = [Expert(torch.tensor([3e-4, 0.0]), 1.0), Expert(torch.tensor([1e-4, 0.0]), 1.0)]
    result = merge(base, experts, Settings("sce_dense"))
    torch.testing.assert_close(result, torch.tensor([0.9 * 3e-4 + 0.1 * 1e-4, 0.0]))
    alone = [Expert(torch.tensor([1.0, 0.0]), 1.0), Expert(torch.tensor([0.0, 1e-4]), 1.0)]
    result = merge(base, alone, Settings("sce_dense"))
    torch.testing.assert_close(result, torch.tensor([1.0, 1e-4]), rtol=1e-5, atol=0)


def test_published_sce_selects_nothing_and_weighs_alike() -> None:
    base = torch.zeros(2)
    experts = [Expert(torch.tensor([2.0, 4.0]), 1.0), Expert(torch.tensor([4.0, 4.0]), 1.0)]
    result = merge(base, experts, Settings("sce_dense", select_topk=0.0))
    torch.testing.assert_close(result, torch.tensor([3.0, 4.0]))


def test_varm_weighs_by_the_squared_change_of_the_tensor() -> None:
    base = torch.tensor([1.0, 1.0])
    experts = [Expert(torch.tensor([2.0, 1.0]), 1.0), Expert(torch.tensor([1.0, 4.0]), 1.0)]
    result = merge(base, experts, Settings("varm"))  # squares 1 and 9
    torch.testing.assert_close(result, torch.tensor([1 + 0.1, 1 + 0.9 * 3]))
    tiny = [Expert(1 + (e.tensor - 1) * 2.0**-20, 1.0) for e in experts]
    torch.testing.assert_close(
        (merge(base, tiny, Settings("varm")) - base) * 2.0**20,
        torch.tensor([0.1, 2.7]),
        atol=0.1,
        rtol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sce_weighs_alike_what_hardly_moved(dtype: torch.dtype) -> None:
    """By the mean of the squares: their sum is above 1e-6 here."""
    base = torch.zeros(100, dtype=dtype)
    experts = [Expert(torch.full_like(base, x), 1.0) for x in (3e-4, 1e-4)]
    result = merge(base, experts, Settings("sce"))
    torch.testing.assert_close(result, torch.full_like(base, 2e-4), rtol=2**-7, atol=0)


@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize("operator", ["dare_linear", "dare_ties", "della"])
def test_a_seed_and_a_name_choose_the_entries(operator: str, rescale: str) -> None:
    base, *tensors = on_a_grid((20, 20), 2)
    experts = make_experts(tensors, density=0.5)

    def run(**changes: Any) -> torch.Tensor:
        return merge(base, experts, Settings(operator, rescale=rescale, **changes))  # type: ignore[arg-type]

    assert torch.equal(run(), run())
    assert not torch.equal(run(), run(seed=1))
    assert not torch.equal(run(), run(name="another"))


@pytest.mark.parametrize("operator", ["dare_linear", "della"])
def test_inverse_rescaling_keeps_the_expectation(operator: str) -> None:
    """DARE's 1 / (1 - p): over many seeds the mean is that of task arithmetic.

    DELLA's probabilities average to the density over a row only, so its rows hold one value.
    """
    base, tensor = torch.zeros(8, 50), torch.arange(1.0, 9.0)[:, None].expand(8, 50)
    expert = Expert(tensor, 0.5, density=0.4, epsilon=0.2, model="m")
    draws = 300
    mean = (
        sum(
            merge(base, [expert], Settings(operator, rescale="inverse", normalize=False, seed=s))  # type: ignore[arg-type]
            for s in range(draws)
        ).mean(dim=1)
        / draws
    )
    expected = 0.5 * tensor[:, 0]
    error = expected * (0.6 / 0.4 / (50 * draws)) ** 0.5
    assert bool(((mean - expected).abs() <= 5 * error).all())


def test_population_variance_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(-9, 10, (40,), generator=generator) / 8 for _ in range(5)]
    for count in (1, 2, 3, 5):
        expected = []
        for entry in zip(*(rationals(r) for r in rows[:count]), strict=True):
            mean = sum(entry) / count
            expected.append(float(sum((x - mean) ** 2 for x in entry) / count))
        found = keeping.population_variance(rows[:count])
        torch.testing.assert_close(
            found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-17
        )


@pytest.mark.parametrize("chunk", [64, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_variances_of_files_have_the_digits_of_float32(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch.var of float64 numbers."""
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    base, *tensors = (torch.randn(23, 31, generator=generator).to(dtype) for _ in range(4))
    experts = make_experts(tensors)
    rows = torch.stack([e.weight * (e.tensor.double() - base.double()) for e in experts])
    found = keeping.variances(base, experts, torch.float32)
    torch.testing.assert_close(
        found.double(), rows.var(dim=0, unbiased=False).reshape(-1), rtol=1e-4, atol=1e-9
    )


def test_equal_experts_have_no_variance_at_all() -> None:
    rows = [torch.randn(1000, generator=torch.Generator().manual_seed(0))] * 7
    assert not keeping.population_variance(rows).any()


@pytest.mark.gpu
@pytest.mark.parametrize("operator", NAMES)
def test_an_accelerator_gives_the_same(operator: str) -> None:
    base, *tensors = on_a_grid((60, 70), 3)
    settings = Settings(operator, select_topk=0.5)  # type: ignore[arg-type]
    expected = merge(base, make_experts(tensors), settings)
    result = merge(base.cuda(), make_experts([t.cuda() for t in tensors]), settings)
    assert result.device.type == "cuda"
    torch.testing.assert_close(result.cpu(), expected)
