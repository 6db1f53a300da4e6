"""The memory of a process and of those that it started; Linux, no packages."""

from __future__ import annotations

import time
from pathlib import Path


def members(pid: int) -> list[int]:
    """A process and all that it and any of its threads started."""
    found = [pid]
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children = (thread / "children").read_text().split()
            found += [one for child in children for one in members(int(child))]
    except OSError:  # it ended in between
        pass
    return found


def memory(pid: int) -> list[int]:
    """KiB: together, of their own, of mapped files; what several share is divided among them.

    Waits for a moment, longer for several, of which the system says it by looking at every page.
    """
    found = members(pid)
    file, keys = "smaps_rollup", ("Pss_Anon", "Pss_File")
    if len(found) == 1:
        file, keys = "status", ("RssAnon", "RssFile")
    totals = [0, 0]
    for one in found:
        try:
            text = Path(f"/proc/{one}/{file}").read_text()
            lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            totals = [t + int(lines[k].split()[0]) for t, k in zip(totals, keys, strict=True)]
        except (OSError, KeyError):  # it ended in between, or the system does not say
            continue
    time.sleep(0.004 if len(found) == 1 else 0.05)
    return [sum(totals), *totals]
