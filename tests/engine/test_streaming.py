"""The streaming engine writes what mergekit's executor writes, to the byte, and loses nothing."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from click.testing import CliRunner, Result

from mergekit_unconstrained import compat
from mergekit_unconstrained.cli import main
from mergekit_unconstrained.engine import journal, processes, streaming, workers, writer
from mergekit_unconstrained.engine.digest import sha256
from mergekit_unconstrained.engine.journal import Journal
from tests.conftest import TinyModels

QUIET = ("--quiet", "--no-write-model-card")


def recipe_for(models: TinyModels, **changes: Any) -> dict[str, Any]:
    parameters = changes.pop("parameters", {})
    return {
        "merge_method": "layerwise",
        "base_model": str(models.base),
        "models": [
            {"model": str(m), "parameters": {"weight": w, "density": 0.5}}
            for m, w in zip(models.experts, (0.5, 0.3, 0.2), strict=False)
        ],
        "parameters": {"operator": "dare_ties", "seed": 3, **parameters},
        **changes,
    }


def run(folder: Path, out: str, recipe: dict[str, Any], *options: str) -> Result:
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    arguments = ["yaml", str(folder / "recipe.yml"), str(folder / out), *QUIET, *options]
    return CliRunner().invoke(main, arguments)


def merged(folder: Path, out: str, recipe: dict[str, Any], *options: str) -> dict[str, bytes]:
    """Run a recipe; file name -> content of all in the output but recipe and provenance."""
    result = run(folder, out, recipe, *options)
    assert result.exit_code == 0, result.output
    files = {p.name: p.read_bytes() for p in (folder / out).iterdir()}
    for says_how in ("mergekit_config.yml", "provenance.json"):
        files.pop(says_how)
    return files


def by_mergekit(recipe: dict[str, Any]) -> dict[str, Any]:
    parameters = {**recipe.get("parameters", {}), "engine": "mergekit"}
    return {**recipe, "parameters": parameters}


def assert_same_files(folder: Path, recipe: dict[str, Any], *options: str) -> dict[str, bytes]:
    ours = merged(folder, "ours", recipe, *options)
    assert ours == merged(folder, "theirs", by_mergekit(recipe), *options)
    return ours


@pytest.fixture
def streams_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a recipe of the streaming engine fail where it would fall back."""

    def refuse(config: Any, *_: Any) -> None:
        if (config.parameters or {}).get("engine") != "mergekit":
            pytest.fail("it fell back to mergekit's executor")
        real(config, *_)

    real = compat.run_merge
    monkeypatch.setattr(compat, "run_merge", refuse)


# -- the same bytes -------------------------------------------------------------------------------


@pytest.mark.usefixtures("streams_only")
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "mixtral"]
)
def test_every_file_is_the_one_mergekit_writes(
    tmp_path: Path, make_tiny: Callable[..., TinyModels], architecture: str
) -> None:
    assert_same_files(tmp_path, recipe_for(make_tiny(architecture)))


@pytest.mark.usefixtures("streams_only")
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [("float32", None), ("float32", "float16"), (None, "float32"), ("float16", "bfloat16")],
)
def test_dtypes_are_those_mergekit_writes(
    tmp_path: Path, tiny_models: TinyModels, dtype: str | None, out_dtype: str | None
) -> None:
    assert_same_files(tmp_path, recipe_for(tiny_models, dtype=dtype, out_dtype=out_dtype))


@pytest.mark.usefixtures("streams_only")
@pytest.mark.parametrize("size", ["30K", "100K", "1B"])
def test_shards_and_index_are_those_mergekit_writes(
    tmp_path: Path, tiny_models: TinyModels, size: str
) -> None:
    files = assert_same_files(tmp_path, recipe_for(tiny_models), "--out-shard-size", size)
    shards = [name for name in files if name.endswith(".safetensors")]
    assert (len(shards) == 1) == (size == "1B")


@pytest.mark.usefixtures("streams_only")
@pytest.mark.parametrize("size", ["30K", "1B"])
def test_slices_may_take_layers_from_anywhere(
    tmp_path: Path, tiny_models: TinyModels, size: str
) -> None:
    """The order of the output follows the inputs' names, so it is dealt out to other shards."""

    def sources(*ranges: tuple[int, int]) -> list[dict[str, Any]]:
        models = (tiny_models.base, *tiny_models.experts[:1])
        return [
            {"model": str(m), "layer_range": list(r)} for m, r in zip(models, ranges, strict=True)
        ]

    recipe = recipe_for(tiny_models, parameters={"weight": 0.5})
    del recipe["models"]
    recipe["slices"] = [
        {"sources": sources((0, 2), (2, 4))},
        {"sources": sources((1, 2), (0, 1))},
    ]
    assert_same_files(tmp_path, recipe, "--out-shard-size", size)


@pytest.mark.usefixtures("streams_only")
@pytest.mark.parametrize("source", ["union", "base"])
def test_a_built_tokenizer_permutes_the_vocabulary(
    tmp_path: Path, tiny_models: TinyModels, source: str
) -> None:
    tokenizer = {"source": source, "pad_to_multiple_of": 48}
    assert_same_files(tmp_path, recipe_for(tiny_models, tokenizer=tokenizer))


@pytest.mark.usefixtures("streams_only")
def test_unsafe_truncation_cuts_the_vocabulary(
    tmp_path: Path, make_tiny: Callable[..., TinyModels]
) -> None:
    small, large = make_tiny(experts=1), make_tiny(experts=1, vocab_size=300)
    models = TinyModels(small.base, (small.experts[0], large.experts[0]))
    assert_same_files(
        tmp_path, recipe_for(models), "--unsafe-truncate-embeddings", "--allow-crimes"
    )


@pytest.mark.usefixtures("streams_only")
def test_sharded_parents_of_several_dtypes(
    tmp_path: Path, tiny_models: TinyModels, make_tiny: Callable[..., TinyModels]
) -> None:
    """One parent in two files, one of them float32, stored in another order."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    source = tiny_models.experts[0]
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    names = sorted(tensors, reverse=True)
    parts = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    weight_map = {}
    for file, keys in parts.items():
        dtype = torch.float32 if file.startswith("a") else torch.bfloat16
        safetensors.torch.save_file({k: tensors[k].to(dtype) for k in keys}, folder / file)
        weight_map |= dict.fromkeys(keys, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_files(tmp_path, recipe_for(TinyModels(tiny_models.base, (folder,))))


def test_pickled_parents_fall_back_and_say_so(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    source = tiny_models.experts[0]
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save(
        safetensors.torch.load_file(source / "model.safetensors"), folder / "pytorch_model.bin"
    )
    ours = merged(tmp_path, "out", recipe_for(TinyModels(tiny_models.base, (folder,))))
    assert "is a .bin file, which is only read as a whole" in caplog.text
    plain = merged(tmp_path, "plain", recipe_for(TinyModels(tiny_models.base, (source,))))
    assert (
        safetensors.torch.load(ours["model.safetensors"]).keys()
        == safetensors.torch.load(plain["model.safetensors"]).keys()
    )


def test_a_result_that_was_not_planned_falls_back(
    tmp_path: Path,
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = streaming._output

    def wrong(task: Any, *rest: Any) -> Any:
        output = real(task, *rest)
        if "layers.2.mlp.up" in output.name:
            return type(output)(output.name, output.shape, torch.float64, output.label)
        return output

    expected = merged(tmp_path, "expected", recipe_for(tiny_models))
    monkeypatch.setattr(streaming, "_output", wrong)
    found = merged(tmp_path, "out", recipe_for(tiny_models))
    assert "the method gave [128, 64] torch.bfloat16" in caplog.text
    assert found == expected


def test_tensors_come_through_the_interface_of_mergekits_lazy_loader(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit's LoadTensor tasks ask LoaderCache, and get a LazyTensorLoader's subclass."""
    asked = []
    real = streaming.MappedLoader.get_tensor

    def get_tensor(self: Any, key: str, *rest: Any, **named: Any) -> Any:
        asked.append(key)
        return real(self, key, *rest, **named)

    monkeypatch.setattr(streaming.MappedLoader, "get_tensor", get_tensor)
    merged(tmp_path, "out", recipe_for(tiny_models))
    assert issubclass(streaming.MappedLoader, compat.LazyTensorLoader)
    assert len(asked) == 4 * 39
    assert not compat.LoaderCache.loaders  # nothing stays open


# -- nothing is lost ------------------------------------------------------------------------------


def _killed_after(folder: Path, recipe: dict[str, Any], tensors: int) -> None:
    """Merge in this process and kill it, without a word, when so many tensors are noted."""
    real = Journal.add
    count = 0

    def add(self: Journal, *rest: Any) -> None:
        nonlocal count
        real(self, *rest)
        count += 1
        if count == tensors:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.add = add  # type: ignore[method-assign]
    run(folder, "out", recipe)


def kill(folder: Path, recipe: dict[str, Any], tensors: int) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_after, args=(folder, recipe, tensors)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "out").exists()
    assert [p.name for p in (folder / "out.partial").glob("*.safetensors*")] == [
        "model.safetensors" + writer.UNFINISHED
    ]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are merged from now on."""
    names: list[str] = []
    real = workers.Workers.work

    def work(self: Any, job: workers.Job) -> str:
        names.append(job.output.name)
        return real(self, job)

    monkeypatch.setattr(workers.Workers, "work", work)
    return names


@pytest.fixture
def stopped(tmp_path: Path, tiny_models: TinyModels) -> dict[str, Any]:
    """A recipe whose merge was stopped by a full disk after twenty tensors."""
    return stop(tmp_path, recipe_for(tiny_models))


def stop(tmp_path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    result = run_until(tmp_path, recipe, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert "the disk is full; what is finished is kept" in result.output
    return recipe


def run_until(tmp_path: Path, recipe: dict[str, Any], error: BaseException) -> Result:
    """Run a recipe whose merge meets an error after twenty tensors that can be gone on from."""
    real = Journal.add
    count = 0

    def add(self: Journal, *rest: Any) -> None:
        nonlocal count
        if count == 20:
            raise error
        real(self, *rest)
        count += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", add)
        result = run(tmp_path, "out", recipe)
    assert result.exit_code == 1
    assert (tmp_path / "out.partial" / journal.NAME).exists()
    return result


def test_a_killed_merge_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, tiny_models: TinyModels, computed: list[str]
) -> None:
    recipe = recipe_for(tiny_models)
    expected = merged(tmp_path, "whole", recipe)
    kill(tmp_path, recipe, 5)
    kill(tmp_path, recipe, 20)
    (tmp_path / "out.partial" / ".half-a-picture.png").write_text("left by the kill")
    computed.clear()
    assert merged(tmp_path, "out", recipe) == expected
    assert len(computed) <= 39 - 25
    assert not (tmp_path / "out.partial").exists()


def test_after_a_full_disk_only_the_rest_is_computed(
    tmp_path: Path, stopped: dict[str, Any], computed: list[str]
) -> None:
    computed.clear()
    found = merged(tmp_path, "out", stopped)
    assert len(computed) == 19
    assert found == merged(tmp_path, "whole", stopped)


def test_an_interrupted_merge_goes_on(
    tmp_path: Path, tiny_models: TinyModels, computed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run_until(tmp_path, recipe_for(tiny_models), KeyboardInterrupt())
    assert "the same command goes on from there" in caplog.text
    computed.clear()
    found = merged(tmp_path, "out", recipe_for(tiny_models))
    assert len(computed) == 19
    assert found == merged(tmp_path, "whole", recipe_for(tiny_models))


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync"])
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    expected = merged(tmp_path, "whole", recipe_for(tiny_models))
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, call, fail)
        result = run(tmp_path, "out", recipe_for(tiny_models))
    assert result.exit_code == 1
    assert result.output.startswith("Error: the disk is full")
    assert not (tmp_path / "out").exists()
    assert merged(tmp_path, "out", recipe_for(tiny_models)) == expected


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: text.replace(b'"hash":"', b'"hash":"0', 1), "of its journal is damaged"),
        (lambda text: b"x" + text, "line 1 of its journal is damaged"),
        (lambda text: b"", "its journal is empty"),
    ],
)
def test_a_damaged_journal_is_named_and_the_merge_starts_over(
    tmp_path: Path,
    stopped: dict[str, Any],
    computed: list[str],
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[bytes], bytes],
    reason: str,
) -> None:
    path = tmp_path / "out.partial" / journal.NAME
    path.write_bytes(spoil(path.read_bytes()))
    found = merged(tmp_path, "out", stopped)
    assert reason in caplog.text
    assert "starting over" in caplog.text
    assert len(computed) == 39
    assert found == merged(tmp_path, "whole", stopped)


def test_a_line_that_was_cut_short_is_a_tensor_that_was_not_finished(
    tmp_path: Path, stopped: dict[str, Any], computed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "out.partial" / journal.NAME
    path.write_bytes(path.read_bytes()[:-5])
    found = merged(tmp_path, "out", stopped)
    assert len(computed) == 20
    (record,) = caplog.records
    assert "going on with an unfinished merge, of which 19 of 39 tensors" in record.message
    assert found == merged(tmp_path, "whole", stopped)


def test_bytes_that_were_lost_are_computed_anew(
    tmp_path: Path, stopped: dict[str, Any], computed: list[str]
) -> None:
    """What a power failure may do: the journal is on the disk, the weights are not."""
    path = tmp_path / "out.partial" / ("model.safetensors" + writer.UNFINISHED)
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size // 4)
        stream.truncate(size)
    found = merged(tmp_path, "out", stopped)
    assert 19 < len(computed) < 39
    assert found == merged(tmp_path, "whole", stopped)


def test_a_parent_that_changed_is_named_and_the_merge_starts_over(
    tmp_path: Path,
    tiny_models: TinyModels,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expert = tmp_path / "expert"
    expert.mkdir()
    for file in tiny_models.experts[0].iterdir():
        (expert / file.name).write_bytes(file.read_bytes())
    models = TinyModels(tiny_models.base, (expert,))
    stop(tmp_path, recipe_for(models))
    tensors = safetensors.torch.load_file(expert / "model.safetensors")
    tensors["model.norm.weight"] += 1
    safetensors.torch.save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    found = merged(tmp_path, "out", recipe_for(models))
    assert f"{expert / 'model.safetensors'} has changed (its time): starting over" in caplog.text
    assert found == merged(tmp_path, "whole", recipe_for(models))


def test_another_layout_is_named_and_the_merge_starts_over(
    tmp_path: Path, stopped: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = merged(tmp_path, "out", stopped, "--out-shard-size", "100K")
    assert "the layout of the output is not what it was" in caplog.text
    assert found == merged(tmp_path, "whole", stopped, "--out-shard-size", "100K")


def test_another_recipe_leaves_an_unfinished_merge_alone(
    tmp_path: Path, stopped: dict[str, Any]
) -> None:
    other = {**stopped, "dtype": "float32"}
    result = run(tmp_path, "out", other)
    assert "left by another recipe" in result.output
    assert (tmp_path / "out.partial" / journal.NAME).exists()


def test_a_bad_parent_leaves_nothing_behind(tmp_path: Path, tiny_models: TinyModels) -> None:
    expert = tmp_path / "expert"
    expert.mkdir()
    for file in tiny_models.experts[0].iterdir():
        (expert / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.torch.load_file(expert / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_for(TinyModels(tiny_models.base, (expert,)))
    result = run(tmp_path, "out", recipe)
    assert "holds NaN or infinity in 1 of 64 entries" in result.output
    assert not (tmp_path / "out.partial").exists()


# -- job options ----------------------------------------------------------------------------------


def test_verify_reads_the_output_again(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tiny_models, parameters={"verify": True})
    assert run(tmp_path, "good", recipe).exit_code == 0
    real = writer.Writer.finish

    def finish(self: writer.Writer) -> dict[str, str]:
        digests = real(self)
        with (self._folder / "model.safetensors").open("r+b") as stream:
            stream.seek(-3, os.SEEK_END)
            stream.write(b"x")
        return digests

    monkeypatch.setattr(writer.Writer, "finish", finish)
    result = run(tmp_path, "bad", recipe)
    assert "model.safetensors does not read back as it was written" in result.output
    assert not (tmp_path / "bad").exists()


def test_the_card_gets_the_hashes_the_engine_computed(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_for(tiny_models)))
    arguments = [str(tmp_path / name) for name in ("recipe.yml", "out")]
    result = CliRunner().invoke(main, ["yaml", *arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    assert sha256(tmp_path / "out/model.safetensors") in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("memory_budget", "lots", "must be a size such as `8GiB`"),
        ("memory_budget", 0, "must be a size such as `8GiB`"),
        ("engine", "fast", "must be `streaming` or `mergekit`"),
        ("verify", "yes", "must be true or false"),
    ],
)
def test_job_options_are_strict(
    tmp_path: Path, tiny_models: TinyModels, option: str, value: Any, reason: str
) -> None:
    result = run(tmp_path, "out", recipe_for(tiny_models, parameters={option: value}))
    assert reason in " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("forked", [False, True])
def test_fifty_kills_at_random_moments_lose_nothing(
    tmp_path: Path,
    tiny_models: TinyModels,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    forked: bool,
) -> None:
    """Each kill comes after a random number of tensors, in a merge that is gone on with."""
    import random

    if forked:
        monkeypatch.setattr(processes, "WORTH_A_PROCESS", 1)
        monkeypatch.setattr(processes, "BATCH_BYTES", 1)
    recipe = recipe_for(tiny_models)
    expected = merged(tmp_path, "whole", recipe)
    moments = random.Random(0)
    context = multiprocessing.get_context("fork")
    for _ in range(50):
        left = 39 - len(list(finished(tmp_path)))
        if left <= 1:
            assert merged(tmp_path, "out", recipe) == expected
            shutil.rmtree(tmp_path / "out")
            left = 39
        process = context.Process(
            target=_killed_after, args=(tmp_path, recipe, moments.randint(1, min(left - 1, 6)))
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    computed.clear()
    left = 39 - len(list(finished(tmp_path)))
    monkeypatch.setattr(processes, "LINUX", False)  # where they are counted
    assert merged(tmp_path, "out", recipe) == expected
    assert len(computed) == left


def finished(folder: Path) -> set[str]:
    """The tensors that the journal of OUT.partial names."""
    path = folder / "out.partial" / journal.NAME
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return {json.loads(line.partition(" ")[2])["tensor"] for line in lines}


@pytest.mark.slow
def test_a_model_larger_than_the_budget_merges_within_it(tmp_path: Path) -> None:
    """Parents of 4 x 84 MB, a budget of 64 MiB; what a merge of two layers takes is taken off."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    import measure

    measure.SIZES["many"] = {"hidden_size": 256, "num_hidden_layers": 50, "vocab_size": 500}
    measure.SIZES["few"] = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 500}
    peaks = {}
    for size in ("few", "many"):
        folder = tmp_path / size
        folder.mkdir()
        base, experts = measure.random_llamas(folder, size)
        recipe = recipe_for(TinyModels(base, tuple(experts)), parameters={"memory_budget": "64MiB"})
        (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
        entry = "from mergekit_unconstrained.cli import main; main()"
        arguments = ["yaml", "recipe.yml", "out", *QUIET, "--no-copy-tokenizer"]
        command = [sys.executable, "-c", entry, *arguments]
        peaks[size] = measure.usage_of(command, folder=folder).peak_mib
    size = sum(f.stat().st_size for f in (tmp_path / "many").glob("*/model.safetensors")) / 2**20
    assert size > 300
    assert peaks["many"] - peaks["few"] < 64


def test_a_budget_below_the_largest_tensor_merges_one_at_a_time(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    recipe = recipe_for(tiny_models)
    expected = merged(tmp_path, "whole", recipe)
    recipe["parameters"]["memory_budget"] = "100KB"
    assert merged(tmp_path, "out", recipe) == expected
    assert "more than memory_budget" in caplog.text
