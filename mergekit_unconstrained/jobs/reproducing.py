"""Making a finished folder again from the recipe it holds, and comparing the bytes.

The recipe runs unchanged, in a temporary folder in which everything that it names lies where it
looks for it: the table, the settings, and links to the local models and data.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import safe_open

from mergekit_unconstrained import compat, jobs
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.engine import staging
from mergekit_unconstrained.errors import ModelError, OutputError
from mergekit_unconstrained.hub import machine, provenance
from mergekit_unconstrained.hub.facts import DataSet, Source
from mergekit_unconstrained.hub.provenance import WEIGHTS, Provenance
from mergekit_unconstrained.hub.record import CHANGING_FLAGS

AGAIN = "again"
HUB_KEYS = ("push_to_hub", "hub_")
"""How keys of recipes and of transformers' TrainingArguments begin that publish something."""


@dataclass(frozen=True)
class Outcome:
    """What came of it. differences: a sentence for each tensor or file; files: that were compared.

    versions: packages that are not of the release they were, as `torch 2.13.0 (here 2.14.0)`.
    """

    differences: tuple[str, ...]
    files: int
    versions: tuple[str, ...]


def reproduce(
    folder: Path,
    out: Path | None = None,
    *,
    given: Mapping[str, Path] | None = None,
    arguments: Sequence[str] = (),
    trust_remote_code: bool = False,
    dry_run: bool = False,
) -> Outcome:
    """Run a folder's own recipe again and compare its weights with those that were written.

    out: keep what was made here. given: where local models and data lie, by the name or place that
    the recipe has for them. arguments: further options of mergekit-yaml, such as --cuda. Everything
    that can be checked is checked before the run: dry_run stops there.
    """
    known = provenance.load(folder)
    options = compat.parse_options(
        [*_flags(known, trust_remote_code), *arguments], "mergekit-unconstrained reproduce DIR"
    )
    if out is not None:
        staging.check_out(out)
    found = _all_found(known, folder, given or {})
    _check_inputs(known, found)
    versions = _other_versions(known)
    if dry_run:
        return Outcome((), 0, versions)
    with _workplace(known, folder, found, out) as work:
        recipe = str(Path(known.recipe))
        quiet = options.model_copy(update={"write_model_card": False})
        with contextlib.chdir(work):
            jobs.run_recipe(recipe, AGAIN, quiet)
        differences, files = compare(known, folder, work / AGAIN)
        if out is not None:
            with contextlib.suppress(FileNotFoundError):
                out.rmdir()  # empty: check_out saw to that
            shutil.move(work / AGAIN, out)
    return Outcome(tuple(differences), files, versions)


def found_here(known: Provenance, folder: Path, given: Mapping[str, Path]) -> dict[str, Path]:
    """Place of a local model or data file -> where it is, for those that are found.

    Looked for in `given`, then relative to the current directory, to the folder, to its parent.
    """
    inputs = _local(known)
    names = {name for one in inputs for name in (one.name, one.place or "")}
    for name, path in given.items():
        if name not in names:
            raise ModelError(
                f"--parent {name}={path}: the recipe has no local model or data of that name. "
                f"{suggest(name, sorted(names))}"
            )
        if not path.exists():
            raise ModelError(f"--parent {name}={path}: there is no such file or folder")
    found = {}
    for one in inputs:
        place = one.place or ""
        named = given.get(place) or given.get(one.name)
        roots = (Path.cwd(), folder, folder.absolute().parent)
        candidates = [named] if named is not None else [root / place for root in roots]
        here = next((path for path in candidates if path.exists()), None)
        if here is not None:
            found[place] = here.absolute()
    return found


def compare(known: Provenance, folder: Path, again: Path) -> tuple[list[str], int]:
    """What differs between the weights that are on record and those made again; how many files."""
    recorded = [f for f in known.files if f.name.endswith(WEIGHTS)]
    names = {f.name for f in recorded}
    made = {name for name in provenance.listed_files(again) if name.endswith(WEIGHTS)}
    differences = [f"{name} was not made again" for name in sorted(names - made)]
    differences += [f"{name} was made, and was not there" for name in sorted(made - names)]
    for file in recorded:
        if file.name in made and provenance.compare(file, again / file.name, ""):
            differences += _tensors(file.name, folder / file.name, again / file.name)
    return differences, len(recorded)


def _tensors(name: str, old: Path, new: Path) -> list[str]:
    """Which tensors of two files differ, and by how much."""
    if not old.is_file() or not name.endswith(".safetensors"):
        return [f"{name} has other contents (the old file is not here to compare with)"]
    said = []
    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        theirs, ours = set(before.keys()), set(after.keys())
        said += [f"{name}: {tensor} was not made again" for tensor in sorted(theirs - ours)]
        said += [f"{name}: {tensor} was not there" for tensor in sorted(ours - theirs)]
        for tensor in sorted(theirs & ours):
            one, two = before.get_tensor(tensor), after.get_tensor(tensor)
            if one.shape != two.shape or one.dtype != two.dtype:
                said.append(f"{name}: {tensor} has another shape or dtype")
            elif not torch.equal(_bytes(one), _bytes(two)):
                gap = (one.double() - two.double()).abs().max().item()
                said.append(f"{name}: {tensor} differs, by {gap:.3g} at most")
    return said or [f"{name}: all tensors are equal, and the recorded file was another one"]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


# -- what is needed -------------------------------------------------------------------------------


def _local(known: Provenance) -> list[Source | DataSet]:
    inputs: list[Source | DataSet] = [*known.sources, *known.data]
    local = [one for one in inputs if one.place is not None]
    for one in local:
        try:
            provenance.inside(one.place or "")
        except ValueError as error:
            raise OutputError(f"{provenance.FILE}: {error}") from None
    return local


def _all_found(known: Provenance, folder: Path, given: Mapping[str, Path]) -> dict[str, Path]:
    found = found_here(known, folder, given)
    missing = [one.place for one in _local(known) if one.place not in found]
    if missing:
        listed = " ".join(f"--parent {place}=PATH" for place in dict.fromkeys(missing))
        raise ModelError(
            f"{', '.join(map(str, dict.fromkeys(missing)))}: not found here, beside {folder} or in "
            f"it; say where, with {listed}"
        )
    return found


def _check_inputs(known: Provenance, found: Mapping[str, Path]) -> None:
    """ModelError when a local input is not the one that was used."""
    problems = provenance.sealed(known)
    for source in known.sources:
        if source.place is not None:
            problems += provenance.verify_parent(source, found[source.place])
    for data in known.data:
        if data.place is not None and data.hashed == "file" and data.sha256:
            file = provenance.WeightFile(data.name, data.sha256)
            remedy = "find the version that was used"
            problems += provenance.compare(file, found[data.place], remedy)
    if problems:
        raise ModelError("; ".join(str(problem) for problem in problems))


def _flags(known: Provenance, trust_remote_code: bool) -> list[str]:
    """The recorded options, of those only that a record may hold."""
    allowed = {"--" + name.replace("_", "-") for name in CHANGING_FLAGS}
    for flag in known.flags:
        if flag.startswith("-") and flag not in allowed:
            raise OutputError(f"{provenance.FILE} asks for {flag!r}, which no record holds")
    if "--trust-remote-code" in known.flags and not trust_remote_code:
        raise OutputError(
            "this model was made with --trust-remote-code: code from its parents' repositories "
            "would run here. Read it, and say --trust-remote-code if you want that"
        )
    return list(known.flags)


def _other_versions(known: Provenance) -> tuple[str, ...]:
    names = [name for name in known.versions if name not in ("python", "mergekit-unconstrained")]
    here = machine.installed(names)
    return tuple(
        f"{name} {release} (here {here[name] or 'none'})"
        for name, release in known.versions.items()
        if name in here and here[name] != release
    )


def _publishes_nothing(file: Path) -> None:
    """Take out of a copied recipe or settings file what would publish with the user's token."""
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    for block in ("parameters", "training"):
        asked = data.get(block) if isinstance(data, dict) else None
        if isinstance(asked, dict) and (keys := [k for k in asked if str(k).startswith(HUB_KEYS)]):
            data[block] = {k: v for k, v in asked.items() if k not in keys}
            file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


@contextlib.contextmanager
def _workplace(
    known: Provenance, folder: Path, found: Mapping[str, Path], out: Path | None
) -> Iterator[Path]:
    """A temporary folder in which the recipe finds everything. out: on whose disk it is to be."""
    beside = out.absolute().parent if out is not None else None
    with tempfile.TemporaryDirectory(prefix="reproduce-", dir=beside) as name:
        work = Path(name)
        for file in filter(None, (known.recipe, known.coefficients, known.settings)):
            shutil.copyfile(folder / file, work / file)
            _publishes_nothing(work / file)
        for place, real in sorted(found.items()):
            link = work / place
            if link.exists():  # inside a model that is linked already, or a file of the folder
                if not link.samefile(real):
                    raise OutputError(f"{place} and another input of the recipe are in the way")
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(real, target_is_directory=real.is_dir())
        yield work
