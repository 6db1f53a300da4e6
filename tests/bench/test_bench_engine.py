"""The engine and the fast kernels beside mergekit's executor and kernels (`make bench`).

Every piece (a method, a dtype, ours or mergekit's) runs in a process forked from one that has
imported everything, so that its CPU seconds and peak memory are those of the work: planning,
reading, merging, writing. Results are kept in a JSON file as they come, and a second run does only
what is missing: MERGEKIT_UNCONSTRAINED_BENCH_RESULTS names it (engine-SIZE.json in the current
directory by default). MERGEKIT_UNCONSTRAINED_BENCH chooses the size, ..._METHODS and ..._DTYPES a
comma-separated list, ..._THREADS how many of ours work side by side (mergekit's --num-threads;
as many as there are cores by default), ..._REPEATS how often everything runs; who begins changes
from one round to the next, since memory that was in use a moment ago costs less. `layerwise ties`
is our method in float32 arithmetic, its sha256 included, beside mergekit's ties. Nothing is
asserted about time.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family
import measure
import pytest
import yaml

pytestmark = pytest.mark.bench

SIZE = os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH", "84M")
REPEATS = int(os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH_REPEATS", "3"))
THREADS = int(os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH_THREADS", "0")) or None
RESULTS = Path(os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH_RESULTS", f"engine-{SIZE}.json"))
DTYPES = os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH_DTYPES", "bfloat16,float32").split(",")

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.3},
    "task_arithmetic": {"weight": 0.3},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.3},
    "model_stock": {},
    "karcher": {},
    "ties": {"weight": 0.3, "density": 0.2},
    "layerwise ties": {"weight": 0.3, "density": 0.2},
    "breadcrumbs": {"weight": 0.3, "density": 0.7},
    "breadcrumbs_ties": {"weight": 0.3, "density": 0.7},
    "sce": {"select_topk": 0.5},
    "dare_linear": {"weight": 0.3, "density": 0.5},
    "dare_ties": {"weight": 0.3, "density": 0.5},
    "della": {"weight": 0.3, "density": 0.5},
    "della_linear": {"weight": 0.3, "density": 0.5},
}
TOUCHED = (6 if SIZE == "270M" else 2) << 30
"""Bytes of memory that are used once before every run: what mergekit's merges take at most."""
EXPERTS = {"slerp": 1, "nuslerp": 2}
PASSES = {"linear": 1, "task_arithmetic": 1, "slerp": 2}
"""How often what is bound by memory must read its inputs; what that takes is measured by itself."""
CHOSEN = os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH_METHODS", ",".join(METHODS)).split(",")


def recipe_of(method: str, base: Path, experts: list[Path]) -> dict[str, Any]:
    own = {k: v for k, v in METHODS[method].items() if k in ("weight", "density")}
    shared = {k: v for k, v in METHODS[method].items() if k not in own}
    models = [
        {"model": str(e), **({"parameters": own} if own else {})}
        for e in experts[: EXPERTS.get(method, len(experts))]
    ]
    recipe = {"merge_method": method.split()[-1], "models": models, "parameters": shared}
    if method not in ("linear", "karcher"):
        recipe["base_model"] = str(base)
    return recipe


def by_layers(recipe: dict[str, Any]) -> dict[str, Any]:
    """The same by `layerwise`; mergekit's ties divides by default, and so does that operator."""
    operator = {"operator": recipe["merge_method"]}
    return {**recipe, "merge_method": "layerwise", "parameters": operator}


class Results:
    """Lists of measurements by name, on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, list[Any]] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, name: str) -> list[Any]:
        return self._held.get(name, [])

    def add(self, name: str, value: Any) -> None:
        self._held.setdefault(name, []).append(value)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._held, indent=1))
        partial.replace(self._path)


def forked(work: Callable[[], Any], warm: Callable[[], Any], *, watch: bool) -> dict[str, float]:
    """What `work` takes in a process of its own: CPU seconds, wall seconds, peak MiB.

    warm: does the same on little, so that what forking puts off is not counted. watch: whether the
    memory of processes that it forks is counted, which takes time itself.
    """
    touch_memory()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            warm()
            cpu, wall = cpu_seconds(), time.monotonic()
            work()
            took = {"cpu": cpu_seconds() - cpu, "wall": time.monotonic() - wall}
            os.write(writing, json.dumps(took).encode())
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(writing)
    most, done = 0, 0
    while watch and not done:
        most = max(most, family.memory(child)[0])
        done, status, usage = os.wait4(child, os.WNOHANG)
    if not done:
        _, status, usage = os.wait4(child, 0)
    with os.fdopen(reading, "rb") as stream:
        took = stream.read()
    assert status == 0
    return {**json.loads(took), "mib": max(most, usage.ru_maxrss) / 2**10}


def cpu_seconds() -> float:
    """Of this process and of those that it forked and waited for."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in found)


def touch_memory() -> None:
    """Take memory from the host of a virtual machine and give it back to the system.

    Memory that the host has taken away costs whoever asks for it first, by chance one side or the
    other, up to a second a GiB.
    """
    child = os.fork()
    if child == 0:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        held = mmap.mmap(-1, min(TOUCHED, free * 9 // 10), flags=flags)
        for at in range(0, len(held), mmap.PAGESIZE):
            held[at] = 1
        os._exit(0)
    os.waitpid(child, 0)


def merge(recipe: dict[str, Any], out: Path, *, ours: bool) -> None:
    import torch

    from mergekit_unconstrained import _activate, compat
    from mergekit_unconstrained.jobs import fast

    _activate.install()
    torch.set_num_threads(1)  # more would wait for each other on two busy cores
    options = compat.MergeOptions(
        quiet=True,
        write_model_card=False,
        copy_tokenizer=False,
        device="cpu",
        num_threads=THREADS if ours else None,
    )
    config = compat.MergeConfiguration.model_validate(recipe)
    if recipe["merge_method"] == "layerwise":
        merge_by_layers(recipe, out, options)
    elif ours:
        fast.run(compat.run_merge, config, out, options, None)
    else:
        compat.run_merge(config, str(out), options)


def merge_by_layers(recipe: dict[str, Any], out: Path, options: Any) -> None:
    """Job A's weights: the plan, the merge and its sha256, without card and provenance."""
    from mergekit_unconstrained import compat
    from mergekit_unconstrained.config.document import Document
    from mergekit_unconstrained.engine.plan import make_plan
    from mergekit_unconstrained.jobs import weights

    document = Document.parse(yaml.safe_dump(recipe), "recipe.yml")
    config = compat.MergeConfiguration.model_validate(recipe)
    method = compat.get("layerwise")
    plan = make_plan(document, config, method, options)
    weights.merge_into(out, compat.run_merge, plan, options)


def move_bytes(recipe: dict[str, Any], passes: int, out: Path) -> None:
    """Nothing but the bytes of a merge: every input to a cache in float32, `passes` times, and as
    many bytes as one model has into a file, from memory that is in the cache."""
    import mmap

    import torch

    torch.set_num_threads(1)
    models = [m["model"] for m in recipe["models"]]
    models += [recipe["base_model"]] if "base_model" in recipe else []
    dtype = {2: torch.bfloat16, 4: torch.float32}
    wide = torch.empty(1 << 16)
    out.mkdir()
    for model in models:
        path = Path(model) / "model.safetensors"
        config = json.loads((Path(model) / "config.json").read_text())
        count = sum(math.prod(shape) for shape in measure.llama_shapes(config).values())
        size = path.stat().st_size
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY)
        width = (size - 8) // count
        numbers = torch.frombuffer(mapped, dtype=dtype[width], offset=size - width * count)
        for _ in range(passes):
            for piece in numbers.split(len(wide)):
                wide[: len(piece)].copy_(piece)
    block = memoryview(bytes(1 << 18))
    with (out / "model.safetensors").open("wb", buffering=0) as stream:
        for _ in range(size >> 18):
            stream.write(block)


def difference(ours: Path, theirs: Path) -> dict[str, float]:
    """The share of entries that differ, and the norm of the difference by that of the result."""
    from safetensors import safe_open

    entries = differ = 0
    square = total = 0.0
    with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
        for name in a.keys():  # noqa: SIM118
            x, y = a.get_tensor(name), b.get_tensor(name)
            entries += x.numel()
            differ += int((x != y).sum())
            square += float((x.double() - y.double()).square().sum())
            total += float(y.double().square().sum())
    return {"differ": differ / entries, "relative": (square / total) ** 0.5}


@pytest.mark.parametrize("dtype", DTYPES)
def test_methods(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = measure.random_llamas(tmp_path / _made(tmp_path, "small"), "tiny", dtype=dtype)
    for who in (True, False):
        merge(recipe_of("linear", *small), tmp_path / f"warm{who}", ours=who)
    results = Results(RESULTS)
    models = None
    for repeat in range(REPEATS):
        for method in CHOSEN:
            name = f"{dtype} {method}"
            if len(results.of(f"{name} theirs")) > repeat:
                continue
            models = models or made_aside(tmp_path / _made(tmp_path, "models"), SIZE, dtype=dtype)
            measured = {}
            for who in ("ours", "theirs")[:: -1 if repeat % 2 else 1]:
                out = tmp_path / who
                shutil.rmtree(out, ignore_errors=True)
                recipe = recipe_of(method, *models)
                little = {**recipe_of(method, *small), "dtype": dtype}
                if who == "ours" and method.startswith("layerwise"):
                    recipe, little = by_layers(recipe), by_layers(little)
                measured[who] = forked(
                    lambda recipe=recipe, out=out, who=who: merge(recipe, out, ours=who == "ours"),
                    lambda little=little, who=who: merge(
                        little, tmp_path / "warm" / f"{time.monotonic_ns()}", ours=who == "ours"
                    ),
                    watch=who == "ours" and not repeat,
                )
            if method in PASSES:
                out = tmp_path / "bytes"
                shutil.rmtree(out, ignore_errors=True)
                measured["bytes"] = forked(
                    lambda recipe=recipe, out=out, method=method: move_bytes(
                        recipe, PASSES[method], out
                    ),
                    lambda: None,
                    watch=False,
                )
            if not results.of(f"{name} difference"):
                files = [tmp_path / who / "model.safetensors" for who in ("ours", "theirs")]
                results.add(f"{name} difference", difference(*files))
            for who, usage in measured.items():
                results.add(f"{name} {who}", usage)
            with capsys.disabled():
                print(f"\n{name}: {measured}", flush=True)
    with capsys.disabled():
        print("\n" + table(results, dtype))


def made_aside(folder: Path, size: str, **options: Any) -> tuple[Path, list[Path]]:
    """random_llamas by a process of its own, for what is forked has the memory of who forks it."""
    child = os.fork()
    if child == 0:
        try:
            measure.random_llamas(folder, size, **options)
            os._exit(0)
        except BaseException as error:  # or the child would go on as pytest
            print(repr(error), file=sys.stderr)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    return folder / "base", sorted(folder.glob("expert*"))


def _made(parent: Path, name: str) -> str:
    (parent / name).mkdir()
    return name


def table(results: Results, dtype: str) -> str:
    lines = [
        f"{SIZE} parameters, {dtype}, work only (forked after imports), medians",
        f"{'':18}{'CPU s':>18}{'':7}{'wall s':>16}{'':7}{'peak MiB':>14}{'entries':>9}"
        f"{'relative':>10}",
        f"{'':18}{'mergekit':>10}{'ours':>8}{'ratio':>7}{'theirs':>8}{'ours':>8}{'ratio':>7}"
        f"{'theirs':>7}{'ours':>7}{'differ':>9}{'distance':>10}",
    ]
    for method in METHODS:
        sides = [results.of(f"{dtype} {method} {who}") for who in ("theirs", "ours")]
        if not all(sides):
            continue
        cpu, wall = (
            [statistics.median(u[key] for u in found) for found in sides] for key in ("cpu", "wall")
        )
        mib = [max(u["mib"] for u in found) for found in sides]
        (apart,) = results.of(f"{dtype} {method} difference")[:1]
        lines.append(
            f"{method:18}{cpu[0]:10.2f}{cpu[1]:8.2f}{cpu[0] / cpu[1]:7.1f}"
            f"{wall[0]:8.2f}{wall[1]:8.2f}{wall[0] / wall[1]:7.1f}{mib[0]:7.0f}{mib[1]:7.0f}"
            f"{apart['differ']:9.2%}{apart['relative']:10.1e}"
        )
        if alone := results.of(f"{dtype} {method} bytes"):
            least = statistics.median(u["cpu"] for u in alone)
            lines.append(f"{'  bytes alone':18}{'':10}{least:8.2f}{cpu[0] / least:7.1f}")
    return "\n".join(lines)


# -- what the kernels have to do with mergekit's -----------------------------------------------


def test_relations(capsys: pytest.CaptureFixture) -> None:
    """The figures of the README's table: one 2048 x 2048 tensor, as in the models above, bf16."""
    import torch

    from mergekit_unconstrained import compat
    from mergekit_unconstrained.compat import TensorGroup
    from mergekit_unconstrained.engine.fast import FAST, FastMethod

    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(2048, 2048, generator=generator)).bfloat16()
    experts = [
        (base + 0.002 * torch.randn(2048, 2048, generator=generator)).bfloat16() for _ in range(3)
    ]
    lines = []
    for name, row in FAST.items():
        tensors = [base, *experts[: EXPERTS.get(name, 3)]]
        weight = METHODS[name].get("weight")
        own = [weight] * len(tensors) if name == "linear" else [weight] * (len(tensors) - 1)
        parameters = {**METHODS[name], **({"weight": own} if weight is not None else {})}

        def run(method: Any, dtype: Any, tensors: Any = tensors, given: Any = parameters) -> Any:
            group = TensorGroup.from_tensors([t.to(dtype) for t in tensors], base_index=0, name="x")
            (result,) = method((group,), parameters=given)
            return result.double()

        upstream = compat.get(name)
        a, b = run(FastMethod(upstream, row, 0), base.dtype), run(upstream, base.dtype)
        said = f"{float((a != b).double().mean()):.2%} of the entries differ"
        if row.relation == "more accurate":
            truth = run(upstream, torch.float64)
            errors = [float((x - truth).norm() / truth.norm()) for x in (a, b)]
            said = f"relative error {errors[0]:.1e}, mergekit's {errors[1]:.1e}"
        elif row.relation == "statistically the same":
            moved = [float((x - base.double()).norm()) for x in (a, b)]
            said = f"distance from the base {moved[0] / moved[1]:.4f} of mergekit's"
        lines.append(f"{name:18}{row.relation:26}{said}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))


# -- many small tensors ---------------------------------------------------------------------------

LAYERS = {"1,000": 111, "4,000": 444, "16,000": 1_777}


def test_many_small_tensors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Growth with the number of tensors: nine of 16 x 16 a layer. mergekit's 16,000: 15 minutes."""
    merge(
        recipe_of("linear", *measure.random_llamas(tmp_path / _made(tmp_path, "small"), "tiny")),
        tmp_path / "warm",
        ours=True,
    )
    results = Results(RESULTS)
    for count, layers in LAYERS.items():
        measure.SIZES[count] = {"hidden_size": 16, "num_hidden_layers": layers, "vocab_size": 16}
        models = None
        for who in ("ours", "theirs"):
            if results.of(f"tensors {count} {who}"):
                continue
            models = models or made_aside(tmp_path / _made(tmp_path, count), count, experts=2)
            recipe = recipe_of("linear", *models)
            usage = forked(
                lambda recipe=recipe, who=who, count=count: merge(
                    recipe, tmp_path / f"{who}{count}", ours=who == "ours"
                ),
                lambda: None,
                watch=False,
            )
            results.add(f"tensors {count} {who}", usage)
    lines = [f"{'tensors':>10}{'ours, CPU s':>14}{'mergekit, CPU s':>18}"]
    for count in LAYERS:
        found = [results.of(f"tensors {count} {who}") for who in ("ours", "theirs")]
        lines.append(
            f"{count:>10}" + "".join(f"{f[0]['cpu']:14.1f}    " if f else " not run" for f in found)
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))


# -- the whole command ----------------------------------------------------------------------------


def test_whole_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Start-up included: our front door with --fast, and mergekit-yaml without the hook."""
    models = measure.random_llamas(tmp_path / _made(tmp_path, "models"), SIZE)
    options = ["--quiet", "--no-write-model-card", "--no-copy-tokenizer"]
    results = Results(RESULTS)
    entry = "from mergekit_unconstrained.cli import main; main()"
    commands = {
        "theirs": [sys.executable, "-m", "mergekit.scripts.run_yaml", "recipe.yml", "out"],
        "ours": [sys.executable, "-c", entry, "yaml", "recipe.yml", "out", "--fast"],
    }
    lines = ["whole command, bf16, CPU s (median) and peak MiB: mergekit-yaml, ours, ratios"]
    for method in (m for m in ("linear", "ties") if m in CHOSEN):
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_of(method, *models)))
        for repeat in range(REPEATS):
            for who, command in commands.items():
                if len(results.of(f"whole {method} {who}")) > repeat:
                    continue
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
                usage = measure.usage_of(
                    [*command, *options], plugins=who == "ours", folder=tmp_path
                )
                results.add(f"whole {method} {who}", vars(usage))
        cpu, mib = (
            [
                statistics.median(u[key] for u in results.of(f"whole {method} {who}"))
                for who in commands
            ]
            for key in ("cpu_seconds", "peak_mib")
        )
        lines.append(
            f"{method:18}{cpu[0]:8.2f}{cpu[1]:8.2f}{cpu[0] / cpu[1]:7.2f}"
            f"{mib[0]:8.0f}{mib[1]:8.0f}{mib[1] / mib[0]:7.2f}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))


# -- one large merge ------------------------------------------------------------------------------

LARGE = {"hidden_size": 2048, "num_hidden_layers": 28, "vocab_size": 32_000}


def large_llamas(folder: Path, experts: int = 3) -> list[Path]:
    """Llamas of 1.57 B random numbers in files of four layers each."""
    import torch
    from safetensors.torch import save_file

    measure.SIZES["large"] = LARGE
    config = measure.llama_config("large")
    shapes = measure.llama_shapes(config)
    noise = 0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    paths = [folder / f"expert{i + 1}" for i in range(experts)]
    for number, path in enumerate(paths):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        where, held, size = {}, {}, 0
        for place, (name, shape) in enumerate(shapes.items()):
            count = math.prod(shape)
            turned = noise.roll(7919 * place + 104_729 * number)
            values = turned.repeat(-(-count // len(noise)))[:count]
            held[name] = values.reshape(shape).bfloat16()
            where[name] = f"part{size >> 29}.safetensors"
            size += count * 2
        for file in sorted(set(where.values())):
            save_file({n: t for n, t in held.items() if where[n] == file}, path / file)
        index = {"metadata": {}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def test_one_large_linear(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whole commands on 3 x 1.57 B numbers in bf16, 13 GB of disk: ours, mergekit's, cat and cp."""
    models = large_llamas(tmp_path)
    weighted = [{"model": str(m), "parameters": {"weight": 0.3}} for m in models]
    (tmp_path / "recipe.yml").write_text(
        yaml.safe_dump({"merge_method": "linear", "models": weighted})
    )
    options = ["--quiet", "--no-write-model-card", "--no-copy-tokenizer"]
    entry = "from mergekit_unconstrained.cli import main; main()"
    copying = "cat expert*/part* > /dev/null && mkdir out && cp expert1/part* out"
    commands = {
        "ours": [sys.executable, "-c", entry, "yaml", "recipe.yml", "out", "--fast", *options],
        "theirs": [
            sys.executable,
            "-m",
            "mergekit.scripts.run_yaml",
            "recipe.yml",
            "out",
            *options,
        ],
        "cat, cp": ["sh", "-c", copying],
    }
    results = Results(RESULTS)
    for repeat in range(REPEATS):
        for who, command in commands.items():
            if len(results.of(f"large {who}")) > repeat:
                continue
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            started = time.monotonic()
            usage = measure.usage_of(command, plugins=who == "ours", folder=tmp_path)
            wall = time.monotonic() - started
            results.add(f"large {who}", {**vars(usage), "wall": wall})
            with capsys.disabled():
                print(f"\n{who}: {usage.cpu_seconds:.1f} CPU s, {wall:.1f} s", flush=True)
    lines = [f"{'':10}{'CPU s':>8}{'wall s':>8}{'MiB':>8}"]
    for who in commands:
        found = results.of(f"large {who}")
        middle = [statistics.median(u[k] for u in found) for k in ("cpu_seconds", "wall")]
        most = max(u["peak_mib"] for u in found)
        lines.append(f"{who:10}{middle[0]:8.1f}{middle[1]:8.1f}{most:8.0f}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
