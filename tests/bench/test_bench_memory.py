"""Peak memory of whole commands: ours with --fast, mergekit-yaml without the hook (`make bench`).

The peak is split into a process's own memory and its mapped files, and what the same command takes
for a model of 0.1 M parameters stands beside it: that is the libraries. Size, methods and the file
of results are chosen as in test_bench_engine.py.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import measure
import pytest
import yaml
from test_bench_engine import CHOSEN, RESULTS, SIZE, Results, recipe_of

pytestmark = pytest.mark.bench

ENTRY = "from mergekit_unconstrained.cli import main; main()"
COMMANDS = {
    "theirs": [sys.executable, "-m", "mergekit.scripts.run_yaml", "recipe.yml", "out"],
    "ours": [sys.executable, "-c", ENTRY, "yaml", "recipe.yml", "out", "--fast"],
}
OPTIONS = ["--quiet", "--no-write-model-card", "--no-copy-tokenizer"]


def test_peak_memory(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = Results(RESULTS)
    for size in ("tiny", SIZE):
        (tmp_path / size).mkdir()
        models = None
        for method in CHOSEN if size == SIZE else ("linear",):
            for who, command in COMMANDS.items():
                name = f"memory {size} {method} {who}"
                if results.of(name):
                    continue
                models = models or measure.random_llamas(tmp_path / size, size)
                (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_of(method, *models)))
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
                usage = measure.usage_of(
                    [*command, *OPTIONS], plugins=who == "ours", folder=tmp_path
                )
                results.add(name, vars(usage))
    with capsys.disabled():
        print("\n" + table(results))


def table(results: Results) -> str:
    lines = [
        f"{SIZE}, bf16: peak MiB of whole commands = own + mapped files, and CPU s",
        f"{'':20}{'mergekit-yaml':>26}{'ours':>28}{'ratio':>7}",
    ]
    rows = [("tiny", "linear"), *((SIZE, method) for method in CHOSEN)]
    for size, method in rows:
        found = [results.of(f"memory {size} {method} {who}") for who in COMMANDS]
        if not all(found):
            continue
        theirs, ours = (f[0] for f in found)
        lines.append(
            f"{'libraries' if size == 'tiny' else method:20}"
            + "".join(
                f"{u['peak_mib']:8.0f} = {u['anon_mib']:4.0f} + {u['file_mib']:4.0f}"
                f"{u['cpu_seconds']:6.1f}"
                for u in (theirs, ours)
            )
            + f"{ours['peak_mib'] / theirs['peak_mib']:7.2f}"
        )
    return "\n".join(lines)
