"""A disk that is really full, at every stage of a fusion: one sentence, and nothing is lost.

A file system of few bytes is mounted where the fusion writes, in a namespace of its own (Linux);
then it is made larger, and the same command has to go on.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fusion.tiny_fusion import MakeTokenizer, save_model, write_data, write_recipe

pytestmark = pytest.mark.slow

SIZES = 11
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
DRIVER = """
import json, subprocess, sys
from pathlib import Path
from click.testing import CliRunner
from mergekit_unconstrained.cli import main

recipe, disk, sizes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def mount(*arguments):
    subprocess.run(["mount", "-t", "tmpfs", *arguments], check=True)

def fuse():
    return CliRunner().invoke(main, ["yaml", recipe, str(disk / "out"), "--quiet"])

told = []
for size in sizes:
    mount("-o", f"size={size}", "none", str(disk))
    first = fuse()
    stages = [json.loads(f.read_text()) for f in disk.rglob("manifest.json")]
    mount("-o", "remount,size=500m", "none", str(disk))
    then = fuse() if first.exit_code else first
    weights = disk / "out" / "model.safetensors"
    told.append({
        "size": size,
        "code": first.exit_code,
        "said": first.output,
        "error": repr(first.exception),
        "begun": [s["stage"] for s in stages if not s["finished"]],
        "then": then.exit_code,
        "then_said": then.output,
        "weights": weights.read_bytes().hex() if weights.exists() else "",
    })
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # mapped files keep it busy
print("RESULTS" + json.dumps(told))
"""


def _mounts(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = [*NAMESPACE, "mount", "-t", "tmpfs", "none", str(folder)]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def test_a_disk_that_is_full_in_any_stage_is_one_sentence_and_nothing_is_lost(
    tmp_path: Path, make_tokenizer: MakeTokenizer
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not _mounts(disk):
        pytest.skip("no file system can be mounted in a namespace here")
    pivot = save_model(tmp_path / "pivot", make_tokenizer("byte_level"), "llama")
    gpt2 = save_model(tmp_path / "gpt2", make_tokenizer("gpt2"), "gpt2", 1)
    data = write_data(tmp_path / "data.jsonl")
    recipe = write_recipe(tmp_path, pivot, [gpt2], data, {"save_steps": 1}, max_steps=2)
    program = [sys.executable, "-c", DRIVER, str(recipe), str(disk)]
    sizes = [500_000_000, *(int(8192 * 1.6**n) for n in range(SIZES))]
    ran = subprocess.run(
        [*NAMESPACE, *program, json.dumps(sizes)], capture_output=True, text=True, check=False
    )
    assert "RESULTS" in ran.stdout, ran.stderr[-3000:]
    whole, *others = json.loads(ran.stdout.partition("RESULTS")[2])
    assert whole["code"] == 0, whole["said"] + whole["error"]
    full = [one for one in others if one["code"]]
    said = {one["size"]: " ".join(one["said"].split()) for one in full}
    for one in full:
        print(one["size"], one["begun"], said[one["size"]])
    for one in full:
        assert one["code"] == 1, one
        assert re.match("Error: .*the disk is full.*run the same command again", said[one["size"]])
    for one in others:
        assert one["then"] == 0, one["then_said"]
        assert one["weights"] == whole["weights"], one["size"]
    begun = {stage.split("/")[0] for one in full for stage in one["begun"]}
    assert begun >= {"data", "distributions", "train"}
