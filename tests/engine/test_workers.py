"""Tensors merged by parts, and pages given back behind a kernel: the same bytes, less memory."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from click.testing import CliRunner, Result

from mergekit_unconstrained import compat
from mergekit_unconstrained.catalog import CATALOG
from mergekit_unconstrained.cli import main
from mergekit_unconstrained.config.recipe import JobOptions
from mergekit_unconstrained.engine import workers
from mergekit_unconstrained.engine.fast import FAST, FastMethod
from mergekit_unconstrained.engine.layout import Output
from mergekit_unconstrained.engine.source import MappedFile
from mergekit_unconstrained.engine.workers import Workers
from mergekit_unconstrained.numerics import pieces
from tests.conftest import TinyModels

PART = 500
"""Entries: a norm of 64 is merged as a whole, the matrices in up to 33 parts."""


@pytest.fixture
def by_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors of which a part is merged, once for each."""
    names: list[str] = []
    real = Workers._merged

    def merged(self: Any, job: workers.Job, tensors: Any, rows: slice | None = None) -> Any:
        if rows is not None:
            assert all(t.shape[0] == rows.stop - rows.start for t in tensors.values())
            names.append(job.output.name)
        return real(self, job, tensors, rows)

    monkeypatch.setattr(workers, "PART", PART)
    monkeypatch.setattr(Workers, "_merged", merged)
    return names


def recipe_of(models: TinyModels, **parameters: Any) -> dict[str, Any]:
    experts = zip(models.experts, (0.5, 0.3, 0.2), strict=False)
    own = {k: parameters.pop(k) for k in ("density",) if k in parameters}
    return {
        "merge_method": "layerwise",
        "base_model": str(models.base),
        "models": [{"model": str(m), "parameters": {"weight": w, **own}} for m, w in experts],
        "parameters": parameters,
    }


def run(folder: Path, out: str, recipe: dict[str, Any], *options: str) -> Result:
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    arguments = ["yaml", str(folder / "recipe.yml"), str(folder / out), "--quiet"]
    return CliRunner().invoke(main, [*arguments, "--no-write-model-card", *options])


def weights(folder: Path, out: str, recipe: dict[str, Any], *options: str) -> bytes:
    result = run(folder, out, recipe, *options)
    assert result.exit_code == 0, result.output
    return (folder / out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("parameters", "changes"),
    [
        ({"operator": "linear"}, {}),
        ({"operator": "task_arithmetic", "lambda": 0.7, "normalize": True}, {}),
        ({"operator": "task_arithmetic"}, {"dtype": "float32"}),
        ({"operator": "linear"}, {"dtype": "float32", "out_dtype": "float16"}),
        ({"operator": "ties", "scope": "model", "density": 0.3}, {}),
        ({"operator": "breadcrumbs", "scope": "model", "density": 0.8}, {}),
    ],
)
def test_a_tensor_merged_by_parts_has_the_same_bytes(
    tmp_path: Path,
    tiny_models: TinyModels,
    by_parts: list[str],
    parameters: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    recipe = {**recipe_of(tiny_models, **parameters), **changes}
    found = weights(tmp_path, "parts", recipe)
    assert by_parts.count("model.embed_tokens.weight") == -(-256 // (PART // 64))
    assert "model.norm.weight" not in by_parts
    recipe["parameters"]["engine"] = "mergekit"
    assert found == weights(tmp_path, "whole", recipe)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_fast_kernels_that_merge_entry_by_entry_work_by_parts(
    tmp_path: Path, tiny_models: TinyModels, by_parts: list[str], method: str
) -> None:
    recipe = {**recipe_of(tiny_models), "merge_method": method}
    if method == "linear":
        del recipe["base_model"]
    found = weights(tmp_path, "parts", recipe, "--fast")
    assert len(by_parts) > 100
    assert found == weights(tmp_path, "whole", recipe)


@pytest.mark.parametrize(
    "parameters",
    [
        {"operator": "ties", "density": 0.3},
        {"operator": "dare_linear", "density": 0.3},
        {"operator": "varm"},
        {"operator": "sce"},
        {"operator": "ties", "scope": "model", "density": 0.3, "rescale": "l1"},
    ],
)
def test_what_looks_at_the_whole_tensor_gets_it(
    tmp_path: Path, tiny_models: TinyModels, by_parts: list[str], parameters: dict[str, Any]
) -> None:
    found = weights(tmp_path, "out", recipe_of(tiny_models, **parameters))
    assert by_parts == []
    parameters["engine"] = "mergekit"
    assert found == weights(tmp_path, "whole", recipe_of(tiny_models, **parameters))


MATRICES = ("q_proj", "o_proj", "gate_proj", "down_proj")


def assert_parts_change_nothing(
    folder: Path, models: TinyModels, method: str, parameters: dict[str, Any]
) -> None:
    found = weights(folder, "parts", recipe_for_two(models, method, parameters))
    whole = recipe_for_two(models, method, {**parameters, "engine": "mergekit"})
    assert found == weights(folder, "whole", whole)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("consensus", {}),
        ("lines", {}),
        ("layer_swap", {"bottom": 1, "top": 1}),
        ("varm", {"granularity": "element"}),
        ("pcb", {"scope": "model"}),
        ("ties_global", {}),
    ],
)
def test_methods_that_merge_entry_by_entry_work_by_parts(
    tmp_path: Path,
    tiny_models: TinyModels,
    by_parts: list[str],
    method: str,
    parameters: dict[str, Any],
) -> None:
    assert_parts_change_nothing(tmp_path, tiny_models, method, parameters)
    assert by_parts.count("model.embed_tokens.weight") == -(-256 // (PART // 64))
    assert all(any(kind in name for name in by_parts) for kind in MATRICES)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("tsvm", {}),
        ("wudi", {"steps": 2}),
        ("doge", {"steps": 2}),
        ("optmerge", {"steps": 2}),
        ("opcm", {}),
    ],
)
def test_methods_of_matrices_merge_everything_else_by_parts(
    tmp_path: Path,
    tiny_models: TinyModels,
    by_parts: list[str],
    method: str,
    parameters: dict[str, Any],
) -> None:
    assert_parts_change_nothing(tmp_path, tiny_models, method, parameters)
    assert set(by_parts) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("varm", {}),
        ("pcb", {"scope": "tensor"}),
        ("ties_global", {"scope": "tensor"}),
        ("opcm", {"scope": "tensor"}),
        ("sce_dense", {}),
        ("dare_exact", {}),
        ("widen", {}),
    ],
)
def test_methods_that_look_at_the_whole_tensor_get_it(
    tmp_path: Path,
    tiny_models: TinyModels,
    by_parts: list[str],
    method: str,
    parameters: dict[str, Any],
) -> None:
    weights(tmp_path, "out", recipe_for_two(tiny_models, method, parameters))
    assert by_parts == []


def recipe_for_two(models: TinyModels, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(models.base),
        "models": [{"model": str(m)} for m in models.experts[:2]],
        "parameters": parameters,
    }


def test_a_permuted_vocabulary_is_merged_as_a_whole(
    tmp_path: Path, tiny_models: TinyModels, by_parts: list[str]
) -> None:
    tokenizer = {"source": "union", "pad_to_multiple_of": 48}
    recipe = {**recipe_of(tiny_models, operator="linear"), "tokenizer": tokenizer}
    found = weights(tmp_path, "out", recipe)
    assert by_parts != []
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(by_parts)
    recipe["parameters"]["engine"] = "mergekit"
    assert found == weights(tmp_path, "whole", recipe)


@pytest.mark.usefixtures("by_parts")
def test_a_bad_entry_is_counted_in_the_whole_tensor(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    expert = tmp_path / "expert"
    expert.mkdir()
    for file in tiny_models.experts[0].iterdir():
        (expert / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.torch.load_file(expert / "model.safetensors")
    tensors["lm_head.weight"][[0, 100, 255], 3] = float("inf")
    safetensors.torch.save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    result = run(tmp_path, "out", recipe_of(TinyModels(tiny_models.base, (expert,))))
    assert "holds NaN or infinity in 3 of 16,384 entries" in " ".join(result.output.split())


@pytest.mark.usefixtures("by_parts")
def test_a_tensor_larger_than_the_budget_is_merged_by_parts_within_it(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    """An embedding takes 5 times 32 KB and as much for the work, a part of it a thirtieth."""
    recipe = recipe_of(tiny_models, operator="linear", memory_budget="30KB")
    weights(tmp_path, "out", recipe)
    assert caplog.text == ""
    weights(tmp_path, "whole", recipe_of(tiny_models, operator="varm", memory_budget="30KB"))
    assert "more than memory_budget" in caplog.text


# -- pages ----------------------------------------------------------------------------------------


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(file, tensor) -> the shares of it whose pages the system may have, in order."""
    shares: dict[tuple[str, str], list[tuple[float, float]]] = {}
    real = MappedFile.advise

    def advise(self: MappedFile, key: str, advice: int, first: float = 0, last: float = 1) -> None:
        if advice == mmap.MADV_DONTNEED:
            shares.setdefault((str(self.path), key), []).append((first, last))
        real(self, key, advice, first, last)

    monkeypatch.setattr(MappedFile, "advise", advise)
    monkeypatch.setattr(workers, "PART", PART)
    monkeypatch.setattr(pieces, "CHUNK", 200)
    return shares


@pytest.mark.parametrize(
    ("operator", "passes"), [("linear", 1), ("sce", 2), ("ties", 2), ("dare_ties", 2)]
)
def test_the_pages_behind_every_pass_over_an_input_are_given_back(
    tmp_path: Path,
    tiny_models: TinyModels,
    given_back: dict[tuple[str, str], list[tuple[float, float]]],
    operator: str,
    passes: int,
) -> None:
    """All but linear look at the experts first, at least once, and then merge."""
    density = {"density": 0.5} if "ties" in operator else {}
    weights(tmp_path, "out", recipe_of(tiny_models, operator=operator, **density))
    for folder in (tiny_models.base, *tiny_models.experts):
        shares = given_back[(str(folder / "model.safetensors"), "lm_head.weight")]
        if operator != "linear":
            assert shares.pop() == (0, 1)  # in the end once more as a whole
        assert len([s for s in shares if s[0] == 0]) >= passes
        assert len(shares) > 20 * passes
        for (_, end), (start, _) in itertools.pairwise(shares):
            assert start in (end, 0)
        assert shares[-1][1] == 1
    assert pieces.BEHIND.tell is None


def test_only_whole_pages_of_the_share_are_given_back(tmp_path: Path) -> None:
    """advise never reaches beyond the tensor, or into the rest of it."""
    size = 5 * mmap.PAGESIZE
    tensors = {"a": torch.zeros(100, dtype=torch.uint8), "b": torch.zeros(size, dtype=torch.uint8)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    file = MappedFile(tmp_path / "x.safetensors")
    asked: list[tuple[int, int, int]] = []

    class Map:
        def madvise(self, *advice: int) -> None:
            asked.append(advice)  # type: ignore[arg-type]

    file._map = Map()  # type: ignore[assignment]
    start, end = file.span("b")
    assert (start, end) == (file.span("a")[1], file.span("a")[1] + size)
    file.advise("b", mmap.MADV_DONTNEED)
    file.advise("b", mmap.MADV_DONTNEED, 0.5, 1)
    file.advise("b", mmap.MADV_DONTNEED, 0, 0.1)
    file.advise("a", mmap.MADV_DONTNEED)
    page = mmap.PAGESIZE
    assert asked == [
        (mmap.MADV_DONTNEED, page, 4 * page),
        (mmap.MADV_DONTNEED, 3 * page, 2 * page),
    ]
    assert json.loads((tmp_path / "x.safetensors").read_bytes()[8:end][: start - 100 - 8])


# -- what is under way at a time ------------------------------------------------------------------


class Counting:
    """Workers that only count: what is under way at most, and which jobs are given at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.peak = self.together = 0
        self.most = 0
        self.given: list[list[str]] = []
        self.writer = SimpleNamespace(hashes=False)

    def start(self) -> None:
        pass

    def work_all(self, jobs: Any) -> list[str]:
        taken = max(job.footprint for job in jobs)
        with self._lock:
            self.given.append([job.output.name for job in jobs])
            self.now, self.together = self.now + taken, self.together + 1
            self.peak, self.most = max(self.peak, self.now), max(self.most, self.together)
        time.sleep(0.01)
        with self._lock:
            self.now, self.together = self.now - taken, self.together - 1
        return []

    def note(self, jobs: Any, digests: Any) -> None:
        pass


def jobs_of(*footprints: int, size: int = workers.BATCH_BYTES) -> list[Any]:
    return [
        SimpleNamespace(
            footprint=footprint, inputs={}, output=SimpleNamespace(name=str(i), bytes=size)
        )
        for i, footprint in enumerate(footprints)
    ]


def under(budget: int | None, *footprints: int, size: int = workers.BATCH_BYTES) -> Counting:
    counting = Counting()
    settings = JobOptions(memory_budget=budget)
    options = compat.MergeOptions(num_threads=3)
    workers.merge_all(jobs_of(*footprints, size=size), counting, settings, options)  # type: ignore[arg-type]
    return counting


def test_tensors_under_way_stay_within_the_budget_and_use_it() -> None:
    found = under(100, *[30] * 12)
    assert (found.peak, found.most) == (90, 3)
    assert [name for few in found.given for name in few] == [str(i) for i in range(12)]
    found = under(100, *[60] * 6)
    assert (found.peak, found.most) == (60, 1)
    assert under(100, 80, 10, 10, 80, 10, 10, 80).peak <= 100
    assert under(100, 100, *[30] * 6).most == 3  # the room of what is done is used again


def test_what_others_finish_after_an_error_is_noted() -> None:
    noted: list[str] = []
    begun = threading.Event()

    class Failing(Counting):
        def work_all(self, jobs: Any) -> list[str]:
            (job,) = jobs
            if job.output.name == "0":
                assert begun.wait(10)
                raise ValueError(job.output.name)
            begun.set()
            return super().work_all(jobs)

        def note(self, jobs: Any, digests: Any) -> None:
            noted.extend(job.output.name for job in jobs)

    options = compat.MergeOptions(num_threads=3)
    with pytest.raises(ValueError, match="0"):
        workers.merge_all(jobs_of(1, 1), Failing(), JobOptions(), options)  # type: ignore[arg-type]
    assert noted == ["1"]


def test_what_is_larger_than_the_budget_is_merged_alone() -> None:
    found = under(100, 10, 10, 500, 10, 10)
    assert found.peak == 500


def test_without_a_budget_half_of_the_memory_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert under(None, *[1 << 20] * 6).most == 3
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    assert under(None, *[half] * 3).most == 1


def test_small_tensors_are_given_out_together_and_count_once() -> None:
    found = under(100, *[50, 40, 30, 20] * 4, size=workers.BATCH_BYTES // 4)
    assert [len(few) for few in found.given] == [4] * 4
    assert found.peak == 100


def test_a_footprint_covers_inputs_copies_output_and_work() -> None:
    def job(work: Any = None, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> workers.Job:
        like = torch.empty((4, 8), dtype=dtype, device="meta")
        one = {"like": like, "has_rows": True, "is_copied": False, **changes}
        weight = SimpleNamespace(name="x", vocabulary_axis=None)
        own = SimpleNamespace(**({} if work is None else {"work": work}))
        task = SimpleNamespace(
            tokenizer=None, truncates=False, method=own, output=weight, parameters={}
        )
        inputs = {name: SimpleNamespace(**one) for name in "ab"}
        return workers.Job(task, inputs, Output("x", (4, 8), torch.float32))  # type: ignore[arg-type]

    work = 32 * (workers.WORK_BYTES + 2 * workers.WORK_BYTES_EXPERT)
    assert job().footprint == 2 * 64 + 128 + work
    assert job(is_copied=True).footprint == 4 * 64 + 128 + work
    assert job(dtype=torch.float64).footprint == 2 * 256 + 128 + 2 * work
    assert job(lambda one: 100 * one.experts + one.shape[1]).footprint == 2 * 64 + 128 + 108
    assert job(lambda _: None).footprint == job().footprint


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="all cores are everybody's here")
def test_the_cores_are_those_that_may_be_used() -> None:
    everywhere = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everywhere)})
        assert workers.cores() == 1
    finally:
        os.sched_setaffinity(0, everywhere)
    assert workers.cores() == len(everywhere)


def test_tensors_are_merged_in_the_order_of_the_bases_files(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((tiny_models.base / "config.json").read_bytes())
    tensors = safetensors.torch.load_file(tiny_models.base / "model.safetensors")
    names = sorted(tensors)
    files = {"b.safetensors": names[:20], "a.safetensors": names[20:]}
    for file, some in files.items():
        safetensors.torch.save_file({name: tensors[name] for name in some}, base / file)
    where = {name: file for file, some in files.items() for name in some}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    merged: list[str] = []
    real = Workers.work

    def work(self: Workers, job: workers.Job) -> str:
        merged.append(job.output.name)
        return real(self, job)

    monkeypatch.setattr(Workers, "work", work)
    recipe = recipe_of(TinyModels(base, tiny_models.experts))
    weights(tmp_path, "out", recipe, "--num-threads", "1")
    assert merged == [*names[20:], *names[:20]]


@pytest.mark.parametrize(("by_pieces", "together"), [(True, 1), (False, 2)])
def test_methods_that_go_by_pieces_compute_in_turns(
    tmp_path: Path,
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    by_pieces: bool,
    together: int,
) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(workers, "BATCH_BYTES", 1)
    monkeypatch.setattr(compat.get("layerwise"), "by_pieces", by_pieces)
    lock, computing, most = threading.Lock(), 0, 0
    real = compat.PlannedTask.compute

    def compute(self: compat.PlannedTask, *given: Any) -> Any:
        nonlocal computing, most
        with lock:
            computing += 1
            most = max(most, computing)
        time.sleep(0.005)
        try:
            return real(self, *given)
        finally:
            with lock:
                computing -= 1

    monkeypatch.setattr(compat.PlannedTask, "compute", compute)
    weights(tmp_path, "out", recipe_of(tiny_models))
    assert most == together


def test_who_computes_in_turns() -> None:
    """Those of which two threads took more time than one (recipes/LOG.md)."""
    alone = {name for name in CATALOG if getattr(compat.get(name), "by_pieces", False)}
    long = {"doge", "opcm", "optmerge", "pcb", "tsvm", "wudi"}
    assert alone == CATALOG.keys() - long - {"distribution_fusion", "unconstrained"}
    assert {n for n, row in FAST.items() if not row.by_pieces} == {"della", "della_linear"}


def test_who_may_be_merged_by_processes() -> None:
    """All but those of matrices, which draw bars and compute in long calls."""
    assert all(FastMethod(compat.get(n), row, 0).in_processes for n, row in FAST.items())
    forked = {name for name in CATALOG if getattr(compat.get(name), "in_processes", False)}
    matrices = {"doge", "opcm", "optmerge", "tsvm", "wudi"}
    assert forked == CATALOG.keys() - matrices - {"distribution_fusion", "unconstrained"}


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        ({}, True),
        ({"num_threads": 2}, False),
        ({"device": "cuda"}, False),
        ({"device": "cpu"}, True),
    ],
)
def test_threads_that_are_asked_for_and_devices_know_no_turns(
    options: dict[str, Any], turns: bool
) -> None:
    held = Workers(None, None, None, compat.MergeOptions(**options), lambda _: None)  # type: ignore[arg-type]
    job = SimpleNamespace(task=SimpleNamespace(method=SimpleNamespace(by_pieces=True)))
    assert held._takes_turns(job) == turns  # type: ignore[arg-type]
