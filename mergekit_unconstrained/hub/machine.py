"""What a model was made with: versions and hardware, nothing that names a computer or its owner."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from mergekit_unconstrained import __version__

PACKAGES = ("mergekit", "torch", "transformers", "safetensors")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """This package's release, those of others, and Python's."""
    versions = {"mergekit-unconstrained": __version__}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    return versions | {"python": platform.python_version()}


def installed(packages: Sequence[str]) -> dict[str, str | None]:
    """Releases of packages here, None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, str]:
    """System, processor, cores, memory and accelerators, in a few words each."""
    import torch

    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count() or 1),
        "memory": _memory(),
    }
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if names:
        found["accelerators"] = ", ".join(names)
    return {name: value for name, value in found.items() if value}


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return ""
    return f"{size / 2**30:.0f} GiB"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor()
