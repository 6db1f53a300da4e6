"""Jobs of a Space: real processes of our own command, stopped, limited, and telling no secrets."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest

from mergekit_unconstrained.errors import OutputError
from mergekit_unconstrained.space import runner
from mergekit_unconstrained.space.runner import Jobs, scrubbed

TOKEN = "hf_" + "Abcdefghij" * 4
RECIPE = """\
merge_method: layerwise
base_model: llama/base
models:
- model: llama/expert1
  parameters: {weight: 0.5}
"""
SLEEPS = (
    "import os, subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print(child.pid, os.environ.get('HF_TOKEN'), 'work:  40%|####', flush=True); time.sleep(600)"
)


@pytest.fixture
def jobs(tmp_path):
    made = Jobs(tmp_path / "jobs", most=2)
    yield made
    made.close()
    assert not list((tmp_path / "jobs").iterdir())


@pytest.fixture
def sleeping(monkeypatch):
    """The command is one that starts another process, tells its token, and never ends."""
    monkeypatch.setattr(runner, "COMMAND", SLEEPS)


def first_line(job: runner.Job) -> str:
    for _ in range(600):
        if lines := job.progress().lines:
            return lines[0]
        time.sleep(0.05)
    raise AssertionError("the job printed nothing")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_a_bad_recipe_ends_in_its_own_sentence(jobs, models_dir):
    job = jobs.start("me", RECIPE + "dtype: float3\n", "bad", models_dir)
    *_, last = jobs.follow(job, pause=0.1)
    assert last.returncode == 1
    assert "dtype: 'float3' will not do" in last.lines[-1] + last.lines[0]
    assert not job.succeeded


def test_a_cancelled_job_is_gone_with_all_it_started(jobs, sleeping, tmp_path):
    job = jobs.start("me", RECIPE, "merged", tmp_path)
    child = int(first_line(job).split()[0])
    assert alive(child)
    partial = job.out.with_name("merged.partial")
    partial.mkdir()
    assert jobs.cancel("me")
    assert job.cancelled
    assert job.process.poll() is not None
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    assert not partial.exists()
    assert not jobs.cancel("me")


def test_a_job_for_each_person_and_a_few_at_a_time(jobs, sleeping, tmp_path):
    jobs.start("anna", RECIPE, "merged", tmp_path)
    with pytest.raises(OutputError, match="a merge of yours is running"):
        jobs.start("anna", RECIPE, "merged", tmp_path)
    other = jobs.start("bert", RECIPE, "merged", tmp_path)
    with pytest.raises(OutputError, match="2 merges are running"):
        jobs.start("carl", RECIPE, "merged", tmp_path)
    jobs.cancel("bert")
    assert jobs.start("carl", RECIPE, "merged", tmp_path) is not other


def test_only_the_persons_own_token_is_passed_and_it_is_never_shown(
    jobs, sleeping, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "theservers" * 4)
    monkeypatch.setenv("SECRET_OF_THE_SPACE", "x")
    with_one = jobs.start("anna", RECIPE, "merged", tmp_path, TOKEN)
    assert first_line(with_one).split()[1] == "hf_***"
    raw = (with_one.folder / "log.txt").read_text()
    assert TOKEN in raw  # the process had it; the page does not
    without = jobs.start("bert", RECIPE, "merged", tmp_path)
    assert first_line(without).split()[1] == "None"
    environment = Path(f"/proc/{without.process.pid}/environ").read_text()
    assert "SECRET_OF_THE_SPACE" not in environment
    assert with_one.progress().fraction == pytest.approx(0.4)


WRITES = "import os, sys; os.mkdir(sys.argv[-1]); print('done')"


@pytest.mark.parametrize("stays", [True, False])
def test_a_result_outlives_the_page_where_it_has_a_place_to_stay(tmp_path, monkeypatch, stays):
    monkeypatch.setattr(runner, "COMMAND", WRITES)
    jobs = Jobs(tmp_path / "jobs", results=tmp_path / "results" if stays else None)
    outs = []
    for _ in range(2):
        job = jobs.start("me", RECIPE, "merged", tmp_path)
        *_, last = jobs.follow(job, pause=0.05)
        assert (last.returncode, job.succeeded) == (0, True)
        outs.append(job.out)
    jobs.leave("me")
    jobs.close()
    assert [out.exists() for out in outs] == [stays, stays]
    if stays:
        assert [out.name for out in outs] == ["merged", "merged-2"]
        assert {out.parent for out in outs} == {tmp_path / "results"}


def test_two_people_never_write_one_result(sleeping, tmp_path):
    jobs = Jobs(tmp_path / "jobs", results=tmp_path / "results")
    (tmp_path / "results" / "other.partial").mkdir(parents=True)
    first = jobs.start("anna", RECIPE, "merged", tmp_path)
    second = jobs.start("bert", RECIPE, "merged", tmp_path)
    jobs.close()
    third = jobs.start("anna", RECIPE, "other", tmp_path)
    jobs.close()
    assert [j.out.name for j in (first, second, third)] == ["merged", "merged-2", "other-2"]


def test_a_job_that_takes_too_long_is_stopped(tmp_path, sleeping):
    jobs = Jobs(tmp_path / "jobs", minutes=0.5 / 60)
    job = jobs.start("me", RECIPE, "merged", tmp_path)
    *_, last = jobs.follow(job, pause=0.05)
    assert last.returncode not in (None, 0)
    jobs.close()


def test_no_shell_sees_anything(jobs, monkeypatch, tmp_path):
    seen = {}

    class Process:
        pid = os.getpid()
        returncode = 0

        def __init__(self, command, **options):
            seen.update(options, command=command)

        def poll(self):
            return 0

    monkeypatch.setattr(runner.subprocess, "Popen", Process)
    jobs.start("me", "$(touch pwned)", "merged", tmp_path)
    assert seen["command"][:3] == [sys.executable, "-c", runner.COMMAND]
    assert isinstance(seen["command"], list)
    assert not seen.get("shell")
    assert "pwned" not in " ".join(seen["command"])


def test_whatever_looks_like_a_token_is_hidden():
    assert scrubbed(f"a {TOKEN} b") == "a hf_*** b"
    assert scrubbed("hf_hub_download and hf_xet stay") == "hf_hub_download and hf_xet stay"
    assert scrubbed("my odd secret", ("odd secret",)) == "my hf_***"


def test_a_line_that_was_drawn_over_shows_its_last_state(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    text = "Warmup loader cache: 100%|##| 3/3\rx\n\x1b[1mExecuting graph:  10%|#\rgraph:  35%|###"
    (folder / "log.txt").write_text(text)

    @dataclasses.dataclass
    class Process:
        def poll(self):
            return None

    job = runner.Job("me", folder, folder / "out", Process(), (), {})
    seen = job.progress()
    assert seen.lines[-1] == "graph:  35%|###"
    assert seen.fraction == pytest.approx(0.35)
