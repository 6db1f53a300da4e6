"""What the package says of itself: its methods and the environment it runs in."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import typing
from pathlib import Path
from typing import Any, get_args, get_origin

from rich.markup import escape
from rich.table import Table

from mergekit_unconstrained import __version__, _activate
from mergekit_unconstrained.catalog import ALIAS_PREFIX, CATALOG, entry_for
from mergekit_unconstrained.present import console, size
from mergekit_unconstrained.resources import cache_dir

EXTRAS = {
    "demo": ("gguf", "reasoning_gym", "peft"),
    "fusion": ("rapidfuzz",),
    "search": ("optuna", "cmaes"),
    "eval": ("lm_eval",),
    "space": ("gradio",),
}
"""One importable module for each package of an extra."""


def print_methods() -> None:
    """The catalogue with parameters and bounds."""
    for entry in CATALOG.values():
        console.print(f"[bold]{entry.name}[/] (also {ALIAS_PREFIX}{entry.name})", highlight=False)
        console.print(f"  {escape(entry.summary)}", highlight=False)
        console.print(f"  {escape(entry.paper)}", highlight=False)
        console.print(f"  beside mergekit: {escape(entry.relation)}", highlight=False)
        console.print(_parameter_table(_method(entry.name)))


def print_method(name: str) -> None:
    """One method, ours or mergekit's."""
    method = _method(name)
    spec = method.spec
    console.print(f"[bold]{spec.pretty_name or spec.name}[/]  {spec.reference_url or ''}")
    if (entry := entry_for(name)) is not None:
        module = importlib.import_module(f"mergekit_unconstrained.methods.{entry.name}")
        assert module.__doc__ is not None
        console.print(escape(module.__doc__.strip()), highlight=False, soft_wrap=True)
    contract = spec.contract
    console.print(f"base model: {contract.base.value}", highlight=False)
    console.print(_parameter_table(method))
    console.print(escape(f"\nThe shortest recipe:\n\n{shortest_recipe(name)}"), highlight=False)


def shortest_recipe(name: str) -> str:
    """YAML that `mergekit-yaml` runs once BASE and EXPERT_1 (and a fusion's DATA) are there."""
    spec = _method(name).spec
    own = {p.name: p for p in spec.parameters}
    fuses = "dataset" in own
    based = spec.contract.base.value == "required"
    lines = [f"merge_method: {name}", "models:"]
    weight = own.get("weight")  # None is no weight: those of a table
    needs_weight = weight is not None and (weight.required or weight.default is None)
    alone = fuses or spec.contract.max_inputs == 2  # with the base
    for number in (1,) if alone else (1, 2):
        lines.append(f"  - model: EXPERT_{number}")
        if needs_weight and not fuses:
            lines.append("    parameters: {weight: 0.5}")
    if based:
        lines.append("base_model: BASE")
    if fuses:  # into the base, whose dtype stays
        lines.append("parameters:")
        lines.append("  dataset: DATA.jsonl")
        lines.append("  dry_run: true   # only shows what will be done; then remove this line")
        return "\n".join(lines)
    needed = [p for p in own.values() if p.required and p.scope.value == "shared"]
    if needed:
        given = (f"{p.name}: {0.5 if p.value_type is float else 1}" for p in needed)
        lines.append(f"parameters: {{{', '.join(given)}}}")
    return "\n".join([*lines, "dtype: bfloat16"])


def markdown_table() -> str:
    """The method table of the README, which a test compares with it."""
    headings = ("method", "what it does", "parameters", "beside mergekit", "from")
    rows = [headings, tuple("---" for _ in headings)]
    for entry in CATALOG.values():
        parameters = ", ".join(f"`{p.name}`" for p in _method(entry.name).spec.parameters)
        paper = f"[{entry.paper}]({entry.url})"
        rows.append((f"`{entry.name}`", entry.summary, parameters, entry.relation, paper))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def print_environment() -> None:
    """Versions, hook, extras, device, disk."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("mergekit-unconstrained", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("mergekit", "torch", "transformers", "huggingface_hub", "safetensors", "peft"):
        table.add_row(package, _version(package))
    table.add_row("hook", _hook_state())
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        remedy = escape(
            f'missing {", ".join(missing)}: pip install "mergekit-unconstrained[{extra}]"'
        )
        table.add_row(f"extra {extra}", remedy if missing else "installed")
    table.add_row("device", _devices())
    cache = cache_dir()
    disk = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists()))
    table.add_row("cache", f"{cache} ({size(disk.free)} free)")
    table.add_row("here", f"{Path.cwd()} ({size(shutil.disk_usage(Path.cwd()).free)} free)")
    console.print(table, highlight=False)


def _hook_state() -> str:
    if _activate.disabled():
        return (
            f"off ({_activate.OFF_SWITCH} is set); `mergekit-unconstrained yaml` works all the same"
        )
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return (
            "off (TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set); `mergekit-unconstrained yaml` works all "
            "the same"
        )
    installed = [
        e for e in importlib.metadata.entry_points(group="torch.backends")
        if e.value.startswith("mergekit_unconstrained.")
    ]  # fmt: skip
    if not installed:
        return "not installed: this package is imported from a folder; pip install it"
    import torch  # noqa: F401  (importing it is what installs the hook)

    return (
        "on: mergekit-yaml knows our methods" if _activate.is_active() else "installed, not active"
    )


def _devices() -> str:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        ", ".join(names) or f"CPU only, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _method(name: str) -> Any:
    _activate.install()
    from mergekit_unconstrained import compat

    return compat.get(name)


def _parameter_table(method: Any) -> Table:
    table = Table()
    for heading in ("parameter", "for", "values", "default"):
        table.add_column(heading)
    scopes = {"shared": "the merge", "input": "every model", "non_base": "every expert"}
    for parameter in method.spec.parameters:
        default = "required" if parameter.required else f"{parameter.default!r}".strip("'") or '""'
        if parameter.default is None:
            default = "none"
        values = escape(values_of(parameter.value_type))
        table.add_row(parameter.name, scopes[parameter.scope.value], values, default)
    return table


def values_of(annotation: Any) -> str:
    """A type and its bounds in words: `float, 0 to 1`; `int, 0 or more`; `a | b`."""
    origin = get_origin(annotation)
    if origin is typing.Literal:
        return " | ".join(str(a) for a in get_args(annotation))
    if origin is typing.Annotated:
        base, *metadata = get_args(annotation)
        items = [i for m in metadata for i in (m, *getattr(m, "metadata", ()))]
        return values_of(base) + _bounds_in_words(items)
    if origin is not None:  # a union
        return " | ".join(values_of(a) for a in get_args(annotation) if a is not type(None))
    return {"str": "text", "bool": "true | false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def _bounds_in_words(items: list[Any]) -> str:
    """Of pydantic's constraints; "" where there are none."""
    found: dict[str, float] = {}
    for item in items:
        for name in ("ge", "gt", "le"):
            if getattr(item, name, None) is not None:
                found[name] = getattr(item, name)
    low, above, high = (found.get(name) for name in ("ge", "gt", "le"))
    start = f"{low:g}" if low is not None else f"above {above:g}" if above is not None else ""
    if high is not None:
        return f", {start} to {high:g}" if start else f", at most {high:g}"
    return f", {start}{' or more' if low is not None else ''}" if start else ""
