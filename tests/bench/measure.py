"""CPU seconds and peak memory of commands, and random models to run them on.

Wall time says little on a shared machine, so nothing here measures it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256},
    "21M": {"hidden_size": 1024, "num_hidden_layers": 1, "vocab_size": 4_000},
    "84M": {"hidden_size": 1024, "num_hidden_layers": 4, "vocab_size": 16_000},
    "270M": {"hidden_size": 1024, "num_hidden_layers": 16, "vocab_size": 32_000},
}
"""What MERGEKIT_UNCONSTRAINED_BENCH may say; the default is 84M."""


@dataclass(frozen=True)
class Usage:
    """What one finished process took.

    Processes that it forks count: their memory with what they share divided among them.
    anon_mib, file_mib: its own memory and its mapped files (libraries, inputs) when both together
    were largest; 0 where the system does not say.
    """

    cpu_seconds: float
    peak_mib: float
    anon_mib: float = 0.0
    file_mib: float = 0.0


WATCH = """
import json, os, subprocess, sys
sys.path.insert(0, sys.argv[1])
import family
process = subprocess.Popen(sys.argv[3:])
most = [0, 0, 0]
while True:
    most = max(most, family.memory(process.pid))
    done, status, usage = os.wait4(process.pid, os.WNOHANG)
    if done:
        break
cpu = usage.ru_utime + usage.ru_stime
found = [os.waitstatus_to_exitcode(status), cpu, max(usage.ru_maxrss, most[0]), *most[1:]]
os.write(int(sys.argv[2]), json.dumps(found).encode())
"""
"""Runs a command. A process of its own, and a small one: until a new process has become another
program, Linux counts the memory of the one that started it as its peak."""


def usage_of(command: list[str], *, plugins: bool = True, folder: Path | None = None) -> Usage:
    """Run a command to its end; RuntimeError with its output when it fails.

    plugins: whether our hook is on in it.
    """
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["MERGEKIT_DISABLE_PLUGINS"] = "" if plugins else "1"
    log = Path(folder or ".") / "bench.log" if folder else Path(os.devnull)
    reading, writing = os.pipe()
    with log.open("wb") as output, os.fdopen(reading) as answer:
        here = str(Path(__file__).parent)
        watched = [sys.executable, "-I", "-S", "-c", WATCH, here, str(writing), *command]
        with subprocess.Popen(
            watched, stdout=output, stderr=output, env=env, cwd=folder, pass_fds=(writing,)
        ):
            os.close(writing)
            status, cpu, peak, anon, file = json.loads(answer.read())
    if status:
        said = log.read_text()[-2000:] if folder else ""
        raise RuntimeError(f"{' '.join(command)} failed ({status}): {said}")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return Usage(cpu, peak / unit, anon / 2**10, file / 2**10)


def interleaved(
    runs: Mapping[str, Callable[[], Usage]], repeats: int
) -> dict[str, tuple[Usage, list[float]]]:
    """Every run in turn, `repeats` times over, so that a busy minute falls on all of them.

    Returns the median CPU time and largest peak of each, and all its CPU times.
    """
    seen: dict[str, list[Usage]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seen[name].append(run())
    return {
        name: (
            Usage(statistics.median(u.cpu_seconds for u in found), max(u.peak_mib for u in found)),
            sorted(u.cpu_seconds for u in found),
        )
        for name, found in seen.items()
    }


def random_llamas(
    folder: Path, size: str, experts: int = 3, dtype: str = "bfloat16"
) -> tuple[Path, list[Path]]:
    """A random Llama and experts a tenth as far from it as it is from zero.

    size: a key of SIZES. No tokenizer. Returns their folders.
    """
    import torch
    from safetensors.torch import save_file

    config = llama_config(size)
    paths = [folder / "base", *(folder / f"expert{i + 1}" for i in range(experts))]
    for number, path in enumerate(paths):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config, indent=2))
        tensors = {}
        for seed, (name, shape) in enumerate(llama_shapes(config).items()):
            generator = torch.Generator().manual_seed(seed)
            tensor = 0.02 * torch.randn(shape, generator=generator) + name.endswith("norm.weight")
            if number:
                generator.manual_seed(10_000 * number + seed)
                tensor = (
                    tensor.bfloat16()
                    .float()
                    .add_(torch.randn(shape, generator=generator), alpha=0.002)
                )
            tensors[name] = tensor.to(getattr(torch, dtype))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return paths[0], paths[1:]


def llama_config(size: str) -> dict[str, Any]:
    """The config.json of a Llama of one of the SIZES."""
    hidden = SIZES[size]["hidden_size"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **SIZES[size],
    }


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama without grouped queries."""
    h, m, v = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    layer = {
        "input_layernorm": (h,),
        **{f"self_attn.{p}_proj": (h, h) for p in "qkvo"},
        "post_attention_layernorm": (h,),
        "mlp.gate_proj": (m, h),
        "mlp.up_proj": (m, h),
        "mlp.down_proj": (h, m),
    }
    return {
        "model.embed_tokens.weight": (v, h),
        **{
            f"model.layers.{i}.{name}.weight": shape
            for i in range(config["num_hidden_layers"])
            for name, shape in layer.items()
        },
        "model.norm.weight": (h,),
        "lm_head.weight": (v, h),
    }
