"""Pieces of the page as HTML. Every word that comes from elsewhere is escaped here, once."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit_unconstrained import present
from mergekit_unconstrained.hub.licences import NOT_LEGAL_ADVICE
from mergekit_unconstrained.hub.licences import Verdict as Licence
from mergekit_unconstrained.hub.markdown import one_line
from mergekit_unconstrained.space.desk import TICK, View, as_data_url
from mergekit_unconstrained.space.inspect import Model, Verdict
from mergekit_unconstrained.space.runner import Progress

WORDS = {
    "layerwise": "These models can be merged layer by layer.",
    "fusion": "These models cannot be merged; they can be fused.",
    "mixture": "Some of these models are merged, the results are then fused.",
}
MEANING = {
    "layerwise": "One architecture, equal shapes: weights are averaged tensor by tensor. Minutes, "
    "no GPU.",
    "fusion": "Different architectures: the pivot is fine-tuned towards the others’ token "
    "distributions, on instruction data. That is training: best on a GPU.",
    "mixture": "Models of one architecture are merged first, then fused into the pivot’s group. "
    "That is training: best on a GPU.",
}
STATUS = {
    "clear": ("ok", "Licence: clear"),
    "review": ("look", "Licence: needs a look"),
    "conflict": ("bad", "Licence: conflict"),
    "refused": ("bad", "Licence: refused"),
}
STARTING = "Starting: loading takes about half a minute"


def text(value: object) -> str:
    """Text from elsewhere within HTML."""
    return html.escape(one_line(value))


def message(words: str, kind: str = "info") -> str:
    """One sentence in a box. kind: info, ok, look or bad."""
    role = "alert" if kind == "bad" else "status"
    return f'<div class="mku-box mku-{kind}" role="{role}">{text(words)}</div>' if words else ""


def verdict(found: Verdict | None) -> str:
    """Step 2: how the chosen models can be brought together."""
    if found is None:
        return message("Choose a base model and at least one expert to see what can be done.")
    kind = "bad" if found.problems else "ok" if found.way == "layerwise" else "look"
    lead = f"<strong>{WORDS[found.way]}</strong> {MEANING[found.way]}"
    parts = [f'<div class="mku-box mku-{kind}" role="status">{lead}{_items(found.problems)}</div>']
    parts.append(_groups(found))
    parts.append(_models(found))
    parts.append(licence(found.licence))
    return "".join(parts)


def no_models(folder: Path, hosted: bool) -> str:
    """How models get into the lists."""
    hub = "type org/name of the Hub, or search for it below."
    if hosted:
        return message(f"No models lie here: {hub}")
    return message(
        f"No models were found in {folder}: start with --models-dir FOLDER, where every model is a "
        f"folder with config.json and safetensors; or {hub}"
    )


def licence(found: Licence) -> str:
    """What may be done with the result, and that this is no legal advice."""
    kind, words = STATUS[found.status]
    name = text(found.name if found.effective == "other" else f"{found.name} ({found.effective})")
    duties = _details("Duties of whoever publishes it", found.duties)
    return (
        f'<div class="mku-box mku-{kind}" role="status"><strong>{words}.</strong> Of the result: '
        f"{name}.{_items(found.reasons)}{duties}"
        f'<p class="mku-small">{text(NOT_LEGAL_ADVICE)}</p></div>'
    )


def cost(view: View | None) -> str:
    """What a merge takes, or why it cannot be planned."""
    if view is None:
        return ""
    if view.problem:
        return message(view.problem, "bad")
    lines = _items(view.cost.lines) if view.cost is not None else ""
    return (
        f'<div class="mku-box mku-info" role="status"><strong>What it takes</strong>{lines}</div>'
    )


def where(view: View | None) -> str:
    """Whether it may run here."""
    if view is None or view.problem:
        return message("There is no recipe yet that could be run.")
    if view.here:
        return message("Small enough to be merged here.", "ok")
    return message(view.why_not_here, "look")


def recipe_state(view: View | None) -> str:
    """Whether the recipe passed the strict check."""
    if view is None:
        return message("The recipe is written here when models are chosen.")
    return (
        message(view.problem, "bad")
        if view.problem
        else message("Checked: every word of the recipe, and every model beside it.", "ok")
    )


def heat_map(view: View | None) -> str:
    """The weights as a picture that scrolls where the screen is narrow."""
    if view is None or view.picture is None:
        return ""
    return (
        '<p class="mku-small mku-narrow">Wider than the screen: scroll it sideways ⟷</p>'
        '<div class="mku-scroll" tabindex="0" role="region" aria-label="Heat map of the weights">'
        f'<img src="{as_data_url(view.picture)}" alt="Weight of every expert by layer (across) and '
        'kind of tensor (down); the same numbers are in the recipe."></div>'
    )


def failure(error: Exception) -> str:
    """An error in a box, as a sentence."""
    words = str(error)
    first = words.partition(" ")[0]
    plain = first.isascii() and first.isalpha() and first.islower()  # no name, no file, no key
    return message(words[:1].upper() + words[1:] if plain else words, "bad")


def not_public(found: Licence, checked: bool) -> str:
    """Why a result is not pushed for everybody, "" where it may be. checked: the box is ticked."""
    if found.may_be_public or (checked and found.status != "refused"):
        return ""
    if found.status == "refused":
        lead, then = "The licences forbid to publish this.", "Push it privately."
    else:
        lead = f"The licences need a look before this is public ({found.status})."
        then = f"Push it privately, or read them and {TICK}."
    return (
        f'<div class="mku-box mku-bad" role="alert"><strong>{text(lead)}</strong>'
        f'{_items(found.reasons)}<p class="mku-place">{text(then)}</p>'
        f'<p class="mku-small">{text(NOT_LEGAL_ADVICE)}</p></div>'
    )


def progress(seen: Progress | None, cancelled: bool = False, kept: Path | None = None) -> str:
    """How far a merge is. kept: where the result stays, None where it goes with the page."""
    if seen is None:
        return ""
    percent = round(100 * seen.fraction)
    time = present.duration(seen.seconds)
    if seen.returncode is None:
        words, kind = (f"Merging, {percent} %" if percent else STARTING), "info"
    elif seen.returncode == 0:
        words, kind = "Merged", "ok"
    elif cancelled:
        words, kind = "Stopped; nothing was left behind", "look"
    else:
        last = seen.lines[-1] if seen.lines else "no word was left"
        words, kind = f"Failed: {last}", "bad"
    place = ""
    if seen.returncode == 0 and kept is not None:
        place = (
            f'<p class="mku-place">The result is in <code>{text(kept)}</code> and stays there when '
            "this page is closed.</p>"
        )
    return (
        f'<div class="mku-box mku-{kind}" role="status">{text(words)} <span class="mku-small">'
        f"({text(time)})</span>{place}"
        f'<div class="mku-bar" role="progressbar" aria-label="Progress of the merge" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}">'
        f'<div style="width:{percent}%"></div></div></div>'
    )


def pushed(url: str) -> str:
    """Where the result is."""
    address = html.escape(url, quote=True)
    if not url.startswith(("https://", "http://")):
        return message("Pushed.", "ok")
    return (
        f'<div class="mku-box mku-ok" role="status"><strong>Pushed.</strong> '
        f'<a href="{address}" target="_blank" rel="noopener noreferrer">{text(url)}</a></div>'
    )


def _groups(found: Verdict) -> str:
    if len(found.groups) == 1:
        return ""
    rows = []
    for index, group in enumerate(found.groups):
        role = "pivot" if index == 0 else "source"
        if group.merged:
            names = ", ".join(group.experts)
            rows.append(f"{role}: {names} merged, from the base {group.base}")
        else:
            name = group.experts[0] if group.experts else found.models[0].name
            rows.append(f"{role}: {name}, as it is")
    return (
        f'<div class="mku-box mku-info"><strong>Groups</strong>{_items(rows)}'
        f"{_details('Why they are apart', found.reasons)}</div>"
    )


def _models(found: Verdict) -> str:
    head = ("role", "model", "architecture", "layers", "parameters", "stored as", "licence")
    rows = []
    own, bases = found.groups[0].experts, {g.base for g in found.groups[1:]}
    for index, model in enumerate(found.models):
        role = "expert" if found.way == "layerwise" or model.name in own else "source"
        if index == 0:
            role = "base" if found.groups[0].merged else "pivot"
        elif model.name in bases:
            role = "base"
        cells = (role, *_cells(model))
        columns = zip(head, cells, strict=True)
        rows.append(
            "<tr>" + "".join(f'<td data-label="{h}">{text(c)}</td>' for h, c in columns) + "</tr>"
        )
    titles = "".join(f'<th scope="col">{h}</th>' for h in head)
    return (
        '<table class="mku-table"><caption class="mku-hidden">The chosen models</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _cells(model: Model) -> Sequence[str]:
    count = model.parameters
    return (
        model.name,
        model.architecture,
        str(model.layers),
        f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M",
        f"{model.dtype}, {present.size(model.bytes)}",
        model.licence or "not known",
    )


def _items(lines: Iterable[str]) -> str:
    found = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul>{found}</ul>" if found else ""


def _details(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f"<details><summary>{text(title)} ({len(lines)})</summary>{_items(lines)}</details>"


STYLE = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.mku-head h1 { margin: .2rem 0; font-size: 1.7rem; }
.mku-head p { margin: 0; color: var(--body-text-color-subdued); }
.mku-step h2 { margin: 1.4rem 0 .1rem; font-size: 1.2rem; }
.mku-step p { margin: 0; color: var(--body-text-color-subdued); }
.mku-box { border: 1px solid var(--border-color-primary); border-left-width: 5px;
  border-radius: 8px;
  padding: .7rem .9rem; margin: .45rem 0; background: var(--background-fill-primary);
  overflow-wrap: anywhere; line-height: 1.5; }
.mku-box ul { margin: .3rem 0 0; padding-left: 1.2rem; list-style: disc; }
.mku-box details { margin-top: .4rem; }
.mku-box summary { cursor: pointer; }
.mku-info { border-left-color: #94a3b8; }
.mku-ok { border-left-color: #15803d; }
.mku-look { border-left-color: #b45309; }
.mku-bad { border-left-color: #b91c1c; }
.mku-small { font-size: .85rem; color: var(--body-text-color-subdued); margin: .4rem 0 0; }
.mku-place { margin: .4rem 0 0; }
.mku-bar { height: 8px; border-radius: 4px; background: var(--border-color-primary);
  margin-top: .5rem; overflow: hidden; }
.mku-bar div { height: 100%; background: #0f766e; transition: width .3s; }
.mku-scroll { overflow-x: auto; background: #fff; border-radius: 8px; padding: .3rem;
  contain: inline-size; }
.mku-scroll::-webkit-scrollbar { height: 10px; }
.mku-scroll::-webkit-scrollbar-track { background: #e2e8f0; border-radius: 5px; }
.mku-scroll::-webkit-scrollbar-thumb { background: #0f766e; border-radius: 5px; }
.mku-narrow { display: none; }
.mku-expert { border: 1px solid var(--border-color-primary) !important; }
.mku-scroll img { min-width: 480px; max-width: min(100%, 760px); height: auto; display: block; }
.mku-code { contain: inline-size; }
#recipe .empty { display: none; }
#card { contain: inline-size; overflow-wrap: anywhere; }
#card pre, #card table { overflow-x: auto; max-width: 100%; }
#card table { display: block; border: 0; }
#card thead, #card tbody, #card tr { border: 0; }
#card td, #card th { min-width: 4.5rem; overflow-wrap: normal; word-break: normal; }
#card th { white-space: nowrap; }
.mku-row { align-items: flex-end; }
.mku-row button { min-height: 2.9rem; }
.block:has(> .html-container > .prose:empty), .block:has(> .prose:empty) { display: none; }
.mku-table { width: 100%; border-collapse: collapse; font-size: .92rem; margin: .45rem 0; }
.mku-table, .mku-table thead, .mku-table tr, .mku-table th, .mku-table td { border: 0 !important; }
.mku-table th, .mku-table td { text-align: left; padding: .4rem .6rem; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--border-color-primary) !important; }
.mku-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); }
:focus-visible { outline: 3px solid #0f766e !important; outline-offset: 2px; }
@media (max-width: 640px) {
  .mku-narrow { display: block; }
  .mku-table thead { display: none; }
  .mku-table tr { display: block; border: 1px solid var(--border-color-primary) !important;
    border-radius: 8px; margin: .45rem 0; padding: .3rem .2rem; }
  .mku-table td { display: flex; gap: .8rem; border: 0 !important; padding: .15rem .6rem; }
  .mku-table td::before { content: attr(data-label); flex: 0 0 6.5rem;
    color: var(--body-text-color-subdued); }
}
"""
