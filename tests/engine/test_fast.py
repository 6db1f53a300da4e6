"""Every fast kernel has the relation to mergekit's that the table states."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_unconstrained import _activate, compat
from mergekit_unconstrained.cli import main
from mergekit_unconstrained.compat import TensorGroup
from mergekit_unconstrained.engine import fast, streaming
from mergekit_unconstrained.engine.fast import FAST, FastMethod, markdown_table
from mergekit_unconstrained.numerics import pieces
from tests.conftest import TinyModels

README = Path(__file__).parent.parent.parent / "README.md"
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

W = [0.5, 0.3, -0.4]
TASK_VECTORS: list[dict[str, Any]] = [
    {},
    {"normalize": True},
    {"normalize": False, "lambda": 0.7},
]
SPARSE = [
    {**settings, "density": density}
    for settings in TASK_VECTORS
    for density in (0.3, [1.0, 0.5, 0.05])
]
CASES: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weight": [0.4, 0.5, 0.3, -0.4]}, {"weight": [0.5] * 4, "normalize": False}],
    "task_arithmetic": [{"weight": W, **s} for s in TASK_VECTORS],
    "ties": [{"weight": W, **s} for s in SPARSE],
    "breadcrumbs": [{"weight": W, "gamma": 0.1, **s} for s in SPARSE],
    "breadcrumbs_ties": [{"weight": W, **s} for s in SPARSE],
    "sce": [{"select_topk": 0.3}, {}],
    "slerp": [{"t": t} for t in (0.0, 0.3, 1.0)],
    "nuslerp": [{"weight": [0.3, 0.5]}, {"weight": [1.0, 1.0]}],
    "multislerp": [{"weight": [0.2, 0.5, 0.3]}, {"weight": [1, 1, 1]}],
    "karcher": [{}, {"max_iter": 3}],
    "model_stock": [{}],
    "dare_linear": [{"weight": W, "density": 0.4}, {"weight": W, "density": 0.4, "rescale": False}],
    "dare_ties": [{"weight": W, "density": 0.4}],
    "della": [{"weight": W, "density": 0.4}],
    "della_linear": [{"weight": W, "density": 0.4, "epsilon": 0.2}],
}
EACH = [(name, case) for name, cases in CASES.items() for case in cases]


def group_for(
    name: str, dtype: torch.dtype, shape: tuple[int, ...] = (251, 67), apart: float = 0.2
) -> TensorGroup:
    """A base and experts, as many as the method takes. apart: of the base's own spread."""
    experts = {"slerp": 1, "nuslerp": 2}.get(name, 3)
    generator = torch.Generator().manual_seed(len(shape))
    base = torch.randn(shape, generator=generator).to(dtype)
    others = [
        (base + apart * torch.randn(shape, generator=generator)).to(dtype) for _ in range(experts)
    ]
    return TensorGroup.from_tensors([base, *others], base_index=0, name="layers.0.weight")


def theirs(name: str, group: TensorGroup, **parameters: Any) -> torch.Tensor:
    (result,) = compat.get(name)((group,), parameters=parameters)
    return result


def ours(name: str, group: TensorGroup, **parameters: Any) -> torch.Tensor:
    (result,) = FastMethod(compat.get(name), FAST[name], 0)((group,), parameters=parameters)
    return result


def cases(*relations: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, case) for name, case in EACH if FAST[name].relation in relations]


@pytest.fixture
def stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets mergekit keep the first of equal magnitudes."""
    for name in ("argsort", "sort"):
        real = getattr(torch, name)

        def sort(values: Any, *rest: Any, _real: Any = real, **named: Any) -> Any:
            return _real(values, *rest, **{**named, "stable": True})

        monkeypatch.setattr(torch, name, sort)


def test_every_row_is_tested() -> None:
    assert CASES.keys() == FAST.keys()


@pytest.mark.parametrize("shape", [(251, 67), (1000,), (3, 5, 7), ()])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "case"), cases("bit-identical"))
def test_bit_identical(
    name: str, case: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    group = group_for(name, dtype, shape)
    assert torch.equal(ours(name, group, **case), theirs(name, group, **case))


@pytest.mark.usefixtures("stable")
@pytest.mark.parametrize("shape", [(251, 67), (1000,), (3, 5, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "case"), cases("identical but for ties"))
def test_identical_to_mergekit_with_a_stable_sort(
    name: str, case: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    group = group_for(name, dtype, shape)
    assert torch.equal(ours(name, group, **case), theirs(name, group, **case))


@pytest.mark.usefixtures("stable")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [1, 96, 1000])
@pytest.mark.parametrize("name", [n for n, row in FAST.items() if "identical" in row.relation])
def test_identical_however_a_tensor_is_cut(
    name: str, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal magnitudes lie on both sides of a cut."""
    group = group_for(name, dtype, (29, 31) if chunk > 1 else (83,))
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    for case in CASES[name]:
        assert torch.equal(ours(name, group, **case), theirs(name, group, **case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "case"), cases("identical but for ties"))
def test_where_it_differs_from_mergekit_magnitudes_are_equal(
    name: str, case: dict[str, Any], dtype: torch.dtype
) -> None:
    """An expert's entry that only one of the two keeps has the magnitude of the threshold."""
    group = group_for(name, dtype)
    a, b = ours(name, group, **case), theirs(name, group, **case)
    assert float((a != b).float().mean()) < (0.1 if dtype in HALF else 1e-3)


@pytest.mark.parametrize("apart", [0.2, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "case"), cases("more accurate"))
def test_at_least_as_near_to_the_truth(
    name: str, case: dict[str, Any], dtype: torch.dtype, apart: float
) -> None:
    """The truth: mergekit's own kernel on the same numbers in float64."""
    group = group_for(name, dtype, apart=apart)
    wide = TensorGroup.from_tensors([t.double() for t in group.tensors], base_index=0)
    truth = theirs(name, wide, **case)

    def error(result: torch.Tensor) -> float:
        return float((result.double() - truth).norm() / truth.norm())

    rounding = error(truth.to(dtype))
    a, b = error(ours(name, group, **case)), error(theirs(name, group, **case))
    assert a <= max(1.01 * rounding, 1.01 * b)
    # Nothing is lost beyond the last rounding; float32 has a few of its own, and sce's selection
    # may differ where two variances do.
    assert a <= (1.05 * rounding if dtype in HALF else 2e-7) or name == "sce"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "case"), cases("statistically the same"))
def test_statistically_the_same(name: str, case: dict[str, Any], dtype: torch.dtype) -> None:
    """Share of untouched entries, mean and spread of the changes: within five standard errors.

    The spread by quantiles: where agreeing weights nearly cancel, few entries decide the deviation.
    """
    torch.manual_seed(0)  # mergekit's draws
    group = group_for(name, dtype, (400, 500))
    base = group.base.tensor.double()
    a, b = (f(name, group, **case).double() - base for f in (ours, theirs))
    n = base.numel()
    untouched = [float((x == 0).double().mean()) for x in (a, b)]
    assert untouched[0] == pytest.approx(untouched[1], abs=0.006)
    assert float(a.mean()) == pytest.approx(
        float(b.mean()), abs=5 * float(b.std()) / n**0.5 * 2**0.5
    )
    for q in (0.7, 0.9, 0.97):
        spread, expected = (float(x.abs().quantile(q)) for x in (a, b))
        assert spread == pytest.approx(expected, rel=0.02), q
    large = base.abs() > 1  # and where the base is large, where mergekit's bf16 is coarsest
    rel = 0.04 if dtype in HALF else 0.02
    assert float(a[large].std()) == pytest.approx(float(b[large].std()), rel=rel)


def test_random_kernels_depend_on_seed_and_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_for("dare_ties", torch.bfloat16)
    case = CASES["dare_ties"][0]
    first = ours("dare_ties", group, **case)
    torch.manual_seed(1)
    monkeypatch.setattr(pieces, "CHUNK", 999)
    assert torch.equal(ours("dare_ties", group, **case), first)
    method = FastMethod(compat.get("dare_ties"), FAST["dare_ties"], 1)
    (other,) = method((group,), parameters=case)
    assert not torch.equal(other, first)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("nuslerp", {"weight": [0.3, 0.5], "nuslerp_flatten": False}),
        ("nuslerp", {"weight": [0.3, 0.5], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {"filter_wise": True}),
    ],
)
def test_what_is_not_covered_is_mergekits_own(name: str, case: dict[str, Any]) -> None:
    group = group_for(name, torch.bfloat16)
    assert FAST[name].not_covered
    assert torch.equal(ours(name, group, **case), theirs(name, group, **case))


@pytest.mark.usefixtures("stable")
@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_rescaled_task_vectors_are_computed_in_float32(name: str) -> None:
    group = group_for(name, torch.bfloat16)
    case = {"weight": W, "density": 0.4, "rescale": True, "normalize": False}
    wide = TensorGroup.from_tensors([t.float() for t in group.tensors], base_index=0)
    expected = theirs(name, wide, **case)
    off = (ours(name, group, **case).float() - expected).abs() > 2**-8 * expected.abs()
    assert float(off.float().mean()) < 1e-3


def test_without_a_base_the_sphere_is_centred_on_zero() -> None:
    group = group_for("multislerp", torch.float32)
    bare = TensorGroup.from_tensors(list(group.tensors))
    for name, case in (
        ("multislerp", {"weight": [0.1, 0.2, 0.3, 0.4]}),
        ("karcher", {}),
        ("linear", {"weight": [0.1, 0.2, 0.3, 0.4]}),
    ):
        torch.testing.assert_close(ours(name, bare, **case), theirs(name, bare, **case))


@pytest.mark.parametrize("chunk", [1, 96, 1000])
@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"])
def test_inner_products_are_summed_over_all_pieces(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_for(name, torch.float32, (29, 31))
    whole = ours(name, group, **CASES[name][0])
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    torch.testing.assert_close(ours(name, group, **CASES[name][0]), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e18, 1e22, 1e30])
def test_entries_whose_squares_leave_float32(size: float) -> None:
    group = group_for("slerp", torch.float32)
    large = TensorGroup.from_tensors([t * size for t in group.tensors], base_index=0)
    expected = size * ours("slerp", group, t=0.3)
    torch.testing.assert_close(ours("slerp", large, t=0.3), expected, rtol=1e-5, atol=0)


def test_collinear_and_zero_vectors() -> None:
    base = torch.zeros(50)
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for name, tensors, case in (
        ("slerp", [x, 2 * x], {"t": 0.3}),
        ("slerp", [x, base], {"t": 0.3}),
        ("karcher", [x, base, 2 * x], {}),
        ("karcher", [base, base], {}),
        ("nuslerp", [base, x, -x], {"weight": [0.3, 0.5]}),
        ("multislerp", [base, x, -x], {"weight": [0.5, 0.5]}),
        ("model_stock", [base, x, -x], {}),
    ):
        group = TensorGroup.from_tensors(tensors, base_index=0)
        torch.testing.assert_close(ours(name, group, **case), theirs(name, group, **case))


def test_the_readme_shows_the_table() -> None:
    assert markdown_table() in README.read_text(encoding="utf-8")


# -- whole merges ---------------------------------------------------------------------------------


def recipe_of(models: TinyModels, name: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": name,
        "base_model": str(models.base),
        "models": [
            {"model": str(m), "parameters": {"weight": w}}
            for m, w in zip(models.experts, (0.5, 0.3, 0.2), strict=True)
        ],
        "parameters": parameters,
    }


def run(folder: Path, out: str, recipe: dict[str, Any], *options: str) -> dict[str, bytes]:
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    arguments = ["yaml", str(folder / "recipe.yml"), str(folder / out), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return {p.name: p.read_bytes() for p in (folder / out).iterdir()}


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that the engine was asked to merge by."""
    names: list[str] = []
    real = streaming.merge

    def merge(work: streaming.Work, *rest: Any, **named: Any) -> Any:
        names.append(work.tasks[0].merge.method_name)
        return real(work, *rest, **named)

    monkeypatch.setattr(streaming, "merge", merge)
    return names


def test_a_fast_merge_writes_what_mergekit_writes(
    tmp_path: Path, tiny_models: TinyModels, streamed: list[str]
) -> None:
    recipe = recipe_of(tiny_models, "task_arithmetic", **{"lambda": 0.8})
    quick = run(tmp_path, "merged", recipe, "--fast")
    assert streamed == ["mku_fast_task_arithmetic"]
    (tmp_path / "merged").rename(tmp_path / "quick")
    slow = run(tmp_path, "merged", recipe)
    assert streamed == ["mku_fast_task_arithmetic"]
    card = quick.pop("README.md").decode()
    said = "Merged with the fast kernel (bit-identical) of mergekit-unconstrained"
    assert said in card
    assert card.partition(f"\n{said}")[0] == slow.pop("README.md").decode()
    assert quick == slow


def test_the_environment_asks_mergekits_own_command(
    tmp_path: Path, tiny_models: TinyModels, streamed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _activate.install()
    from mergekit.merge import run_merge

    options = compat.MergeOptions(quiet=True, write_model_card=False)

    def merge(out: str) -> bytes:
        config = compat.MergeConfiguration.model_validate(
            recipe_of(tiny_models, "ties", density=0.5)
        )
        run_merge(config, str(tmp_path / out), options)
        return (tmp_path / out / "model.safetensors").read_bytes()

    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_FAST", "0")
    plain = merge("plain")
    assert streamed == []
    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_FAST", "1")
    quick = merge("quick")
    assert streamed == ["mku_fast_ties"]
    assert len(quick) == len(plain)


def test_a_method_without_a_fast_kernel_runs_as_ever(
    tmp_path: Path, tiny_models: TinyModels, streamed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = {
        "merge_method": "nearswap",
        "base_model": str(tiny_models.base),
        "models": [{"model": str(tiny_models.experts[0])}],
        "parameters": {"t": 0.001},
    }
    assert "model.safetensors" in run(tmp_path, "out", recipe, "--fast")
    assert "there is no fast kernel for 'nearswap'" in caplog.text
    assert streamed == []


def test_a_fast_merge_takes_the_job_options(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = streaming.merge

    def merge(work: streaming.Work, *rest: Any) -> Any:
        seen.append(work.job)
        return real(work, *rest)

    monkeypatch.setattr(streaming, "merge", merge)
    recipe = recipe_of(tiny_models, "task_arithmetic")
    plain = run(tmp_path, "plain", recipe, "--fast")
    found = run(tmp_path, "out", recipe, "--fast", "--memory-budget", "2GiB", "--verify")
    assert [(job.memory_budget, job.verify) for job in seen] == [(None, False), (2 << 30, True)]
    assert found["model.safetensors"] == plain["model.safetensors"]
    digest = hashlib.sha256(found["model.safetensors"]).hexdigest()
    assert f"* `model.safetensors`: sha256 `{digest}`, read back" in found["README.md"].decode()
    assert "sha256" not in plain["README.md"].decode()
    assert found["mergekit_config.yml"] == plain["mergekit_config.yml"]
    # The same by the recipe, which mergekit itself reads without a word.
    recipe["parameters"] = {"memory_budget": "2GiB", "verify": True}
    run(tmp_path, "again", recipe, "--fast")
    assert seen[-1] == seen[-2]
    run(tmp_path, "stock", recipe)
    assert len(seen) == 3


def test_a_recipe_may_ask_for_mergekits_executor(
    tmp_path: Path, tiny_models: TinyModels, streamed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, "out", recipe_of(tiny_models, "task_arithmetic", engine="mergekit"), "--fast")
    assert streamed == []
    assert "the recipe's `engine` asks for them" in caplog.text


def test_the_hub_is_not_asked_about_folders_that_are_here(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit's card asks it whether `models/base` is a repository, and dies where it cannot."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.repo_exists", unreachable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in (tiny_models.base, *tiny_models.experts):
        (tmp_path / "models" / path.name).symlink_to(path)
    short = TinyModels(
        Path("models") / tiny_models.base.name,
        [Path("models") / e.name for e in tiny_models.experts],  # type: ignore[arg-type]
    )
    found = run(tmp_path, "out", recipe_of(short, "ties"), "--fast")
    assert "models/base" in found["README.md"].decode()


def test_parameters_that_mergekit_passes_over_are_named(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tiny_models, "ties", densty=0.5, verify=False)
    recipe["models"][1]["parameters"]["wait"] = 3
    run(tmp_path, "out", {**recipe, "parameters": {**recipe["parameters"], "density": 1}}, "--fast")
    said = [r.message for r in caplog.records if "does nothing" in r.message]
    assert len(said) == 2
    assert "'ties' has no parameter 'densty', so it does nothing" in said[0]
    assert "density" in said[0].partition("nothing")[2]
    assert "'wait'" in said[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fast", "--memory-budget", "much"], "must be a size such as `8GiB`, not 'much'"),
        (["--memory-budget", "1GiB"], "--memory-budget is for our methods only, or with --fast"),
        (["--fast", "--allow-nan"], "--allow-nan is for our methods only, and"),
    ],
)
def test_job_options_that_cannot_be(
    tmp_path: Path, tiny_models: TinyModels, options: list[str], said: str
) -> None:
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_of(tiny_models, "linear")))
    arguments = ["yaml", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), *options]
    result = CliRunner().invoke(main, arguments)
    assert said in (result.output + str(result.exception))
    assert not (tmp_path / "out").exists()


def test_the_config_of_a_model_is_read_once_a_merge(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = compat.ModelReference.config

    def config(self: compat.ModelReference, trust_remote_code: bool = False) -> Any:
        read.append(str(self))
        return real(self, trust_remote_code)

    monkeypatch.setattr(compat.ModelReference, "config", config)
    run(tmp_path, "out", recipe_of(tiny_models, "task_arithmetic"), "--fast")
    assert sorted(read) == sorted({str(tiny_models.base), *map(str, tiny_models.experts)})
    assert compat.ModelReference.config is config


def test_who_changes_a_config_changes_no_other_readers(tiny_models: TinyModels) -> None:
    reference = compat.ModelReference.parse(str(tiny_models.base))
    with compat.configs_read_once():
        first = reference.config()
        first.vocab_size += 1
        assert reference.config().vocab_size == first.vocab_size - 1


def test_fast_variants_have_names_of_their_own() -> None:
    method = fast.fast_method("linear", 3)
    assert fast.fast_method("linear", 4) is method
    assert compat.get("linear") is not method
    assert method.seed == 4
