"""Searching in memory against searching through files, candidate by candidate.

pytest -m bench tests/bench/test_bench_search.py -s
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.bench

CANDIDATES = 6
LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 29 M parameters, two experts and 48 short prompts with answers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.conftest import _byte_tokenizer

    folder = tmp_path_factory.mktemp("bench-search")
    tokenizer = _byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **LLAMA), dtype=torch.bfloat16
    )
    for name in ("base", "first", "second"):
        if name != "base":
            for parameter in model.parameters():
                parameter.data.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = "".join(f'{{"prompt": "what is {i}?", "target": "it is {i}"}}\n' for i in range(48))
    (folder / "search.jsonl").write_text(rows)
    return folder


def search_file(folder: Path, operator: str) -> Path:
    content = {
        "recipe": {
            "merge_method": "layerwise",
            "base_model": str(folder / "base"),
            "models": [{"model": str(folder / name)} for name in ("first", "second")],
            "parameters": {"operator": operator},
        },
        "tasks": {"said": {"kind": "likelihood", "data": {"search": "search.jsonl"}}},
        "sampler": "random",
        "racing": {"enabled": False},
        "budget": CANDIDATES,
    }
    path = folder / f"{operator}.yml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties"])
def test_candidates_in_memory_and_through_files(files: Path, operator: str) -> None:
    import numpy as np
    import torch

    from mergekit_unconstrained import compat
    from mergekit_unconstrained.compat import MergeConfiguration, parse_options
    from mergekit_unconstrained.evaluation.subject import Subject
    from mergekit_unconstrained.jobs import searching

    torch.set_num_threads(1)
    options = parse_options(["--quiet"], "bench")
    plan = searching.plan_search(search_file(files, operator), options)
    started = time.process_time()
    searcher = searching.prepare(plan, options)
    prepared = time.process_time() - started
    space = searcher.spaces.searched
    evaluate = searcher.evaluate("search")
    generator = np.random.default_rng(0)
    values = [
        space.genome.from_unit(generator.random(len(space.genome))) for _ in range(CANDIDATES)
    ]

    def through_files(one: dict[str, float]) -> float:
        """What mergekit-evolve does without its in-memory mode: merge, load, score."""
        document = searching.write_candidate(space.candidate(one), files / "candidate")
        out = files / "merged"
        shutil.rmtree(out, ignore_errors=True)
        config = MergeConfiguration.model_validate(document.data)
        searching.run_job(
            compat.run_merge, plan.merge.method, config, out,
            options.model_copy(update={"write_model_card": False}), document,
        )  # fmt: skip
        subject = Subject.load(str(out), dtype="float32", device="cpu")
        return float(searcher.objective.score(subject, plan.settings.racing).value)

    def timed(score: Any) -> tuple[float, float, list[float]]:
        cpu, wall, found = [], [], []
        for one in values:
            before = (time.process_time(), time.perf_counter())
            found.append(score(one))
            cpu.append(time.process_time() - before[0])
            wall.append(time.perf_counter() - before[1])
        return float(np.median(cpu)), float(np.median(wall)), found

    memory = timed(lambda one: evaluate(one, None).value)
    files_ = timed(through_files)
    searcher.live.write(space.candidate(values[0]))
    writes = timed(lambda one: searcher.live.write(space.candidate(one)))
    print(
        f"\n{operator}, 29 M parameters, bf16, 2 experts, {len(space.genome)} numbers, one thread"
    )
    print(f"{'':24}{'CPU s':>8}{'wall s':>8}{'a minute':>10}")
    for name, (cpu, wall, _) in (("in memory", memory), ("through files", files_)):
        print(f"{name:24}{cpu:8.2f}{wall:8.2f}{60 / wall:10.1f}")
    print(f"of it the merge in memory {writes[0]:.2f}; preparing, once, {prepared:.2f} CPU s")
    print(f"ratio of CPU times {files_[0] / memory[0]:.1f}")
    assert memory[2] == pytest.approx(files_[2], abs=1e-5)  # the same candidates, the same scores


EVALUATIONS = 150


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo of stories; made (minutes) unless STORIES names a folder that holds it."""
    made = os.environ.get("STORIES")
    if made:
        return Path(made)
    folder = tmp_path_factory.mktemp("stories")
    command = [sys.executable, "-m", "mergekit_unconstrained.demo.stories", str(folder)]
    subprocess.run(command, check=True)
    return folder


def test_quality_at_equal_evaluations(stories: Path, tmp_path: Path) -> None:
    """Ours against pycma on mergekit-evolve's genome: slices of a layer, self_attn, mlp, rest.

    One objective for both, in memory; pycma starts and steps as mergekit-evolve has it (weights
    1/N, densities 1, sigma 1/6, absolute values). mergenetic pins mergekit 0.0.6 and cannot be
    installed beside this one.
    """
    cma = pytest.importorskip("cma")
    import numpy as np
    import torch

    from mergekit_unconstrained.compat import parse_options
    from mergekit_unconstrained.jobs import searching
    from mergekit_unconstrained.search.settings import Racing
    from mergekit_unconstrained.search.study import open_storage

    torch.set_num_threads(1)
    tasks: dict[str, Any] = {}
    for name in ("composed", "base_skill"):
        data = {s: str(stories / f"data/{name}.{s}.jsonl") for s in ("search", "development")}
        tasks[name] = {"kind": "likelihood", "target": "response", "data": data}
    recipe = {
        "base_model": str(stories / "base"),
        "models": [{"model": str(stories / name)} for name in ("expert_a", "expert_b")],
        "dtype": "float32",
    }
    options = parse_options(["--quiet"], "bench")
    ties = {"merge_method": "layerwise", "parameters": {"operator": "ties"}}
    ways = {
        "ours": (ties, ["attention", "mlp"]),
        "evolve": ({"merge_method": "ties"}, ["self_attn", "mlp"]),
    }
    found = {}
    for seed in range(3):
        for name, (method, kinds) in ways.items():
            path = tmp_path / f"{name}{seed}.yml"
            content = {
                "recipe": {**recipe, **method}, "tasks": tasks, "genome": {"kinds": kinds},
                "racing": {"enabled": False}, "budget": EVALUATIONS, "seed": seed,
            }  # fmt: skip
            path.write_text(yaml.safe_dump(content))
            plan = searching.plan_search(path, options)
            searcher = searching.prepare(plan, options)
            space = searcher.spaces.searched
            started = time.process_time()
            if name == "ours":
                storage = open_storage(None, tmp_path / f"{name}{seed}" / "journal.log")
                study = searcher.study("search", storage, "bench", EVALUATIONS)
                study.run(EVALUATIONS, searcher.evaluate("search"))
                assert study.best is not None
                best = study.best.values
            else:
                genes = space.genome.genes
                dense = np.array([g.address[1] == "density" for g in genes])

                def values(x: Any, dense: Any = dense, space: Any = space) -> dict[str, float]:
                    x = np.abs(np.asarray(x))
                    x = np.where(dense, np.clip(x, 0, 1), x)
                    return {
                        g.name: round(float(v), 4)
                        for g, v in zip(space.genome.genes, x, strict=True)
                    }

                start = np.where(dense, 1.0, 0.5)
                evolution = cma.CMAEvolutionStrategy(
                    start, 1 / 6, {"seed": seed + 1, "verbose": -9, "maxfevals": EVALUATIONS}
                )
                evaluate, seen = searcher.evaluate("search"), []
                while len(seen) < EVALUATIONS:
                    asked = evolution.ask()
                    losses = [-evaluate(values(x), None).value for x in asked]
                    evolution.tell(asked, losses)
                    seen += list(zip(losses, asked, strict=True))
                best = values(min(seen[:EVALUATIONS], key=lambda pair: pair[0])[1])
            spent = time.process_time() - started
            searcher.write("search", best)
            scores = searcher.score_in_full("development", searcher.tasks)
            held = {t: np.mean([one.value for one in s]) for t, s in scores.items()}
            outcome = searcher.objective.score(searcher.subject, Racing(enabled=False))
            found[name, seed] = (outcome.value, float(np.mean(list(held.values()))), spent)
    print(f"\n{EVALUATIONS} evaluations, nats per byte, higher is better")
    print(f"{'':10}{'seed':>6}{'search':>10}{'development':>13}{'CPU s':>8}")
    for (name, seed), (value, development, spent) in sorted(found.items()):
        print(f"{name:10}{seed:6}{value:10.4f}{development:13.4f}{spent:8.0f}")
