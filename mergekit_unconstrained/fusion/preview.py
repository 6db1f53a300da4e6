"""What can be seen of a fusion's data before a run: its size, and how the models here will read it.

`plan` and `check` look at it. A run needs no preview: it reads all of the data before it loads the
first model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from mergekit_unconstrained.fusion.data.conversations import DataReport, read_conversations
from mergekit_unconstrained.fusion.data.encoding import fit_many
from mergekit_unconstrained.fusion.data.prepared import check_cut
from mergekit_unconstrained.fusion.models import LocalModel
from mergekit_unconstrained.fusion.plan import FusionPlan
from mergekit_unconstrained.fusion.records import Conversation

BYTES_PER_TOKEN = 4.2
"""Of English text under the usual tokenizers: an estimate, to be replaced by the data stage."""
SAMPLE = 500


@dataclass(frozen=True)
class Preview:
    """conversations; tokens that are read and bytes of text, both from a sample; notes: sentences
    about what of that sample could not be used as it is."""

    conversations: int
    tokens: int
    text: int
    notes: tuple[str, ...] = ()


def preview(plan: FusionPlan) -> Preview:
    """Read the data as a run will; DataError or ModelError for what would end the run.

    Rows are looked at by every model that lies here: all of them where they are few, else a sample,
    about which there are notes only.
    """
    s = plan.settings
    report = DataReport()
    rows = read_conversations(plan.dataset, s.columns, s.split, s.max_rows, report)
    sample = list(islice(rows, SAMPLE))
    count = len(sample) + sum(1 for _ in rows)
    size = sum(len(t.text.encode()) for c in sample for t in c.turns)
    mean = size / max(len(sample), 1)
    notes = _read(plan, sample, count, report)
    tokens = int(min(mean / BYTES_PER_TOKEN, s.max_length) * count)
    return Preview(count, tokens, int(mean * count), notes)


def _read(
    plan: FusionPlan, sample: list[Conversation], count: int, report: DataReport
) -> tuple[str, ...]:
    encoders = [model.encoder for model in _models_here(plan)]
    usable = DataReport(plan.dataset, len(sample))
    cut = 0
    for conversation, reason in fit_many(sample, encoders):
        if reason is not None:
            usable.skip(conversation.row, reason)
        cut += reason is None and conversation.keep_bytes is not None
    if len(sample) == count:
        usable.check()
        check_cut(cut, usable.kept, plan.settings)
    found = [report.describe()] if report.rows else []
    if usable.rows:
        found.append(f"as the models read the first rows, {usable.describe()}")
    if cut:
        found.append(
            f"{cut} of the first {len(sample)} responses are cut by `max_length: "
            f"{plan.settings.max_length}`"
        )
    return tuple(found)


def _models_here(plan: FusionPlan) -> list[LocalModel]:
    """The members whose files are here, as far as reading text goes."""
    return [
        LocalModel(
            name=member.name,
            weights=member.parent.folder,
            tokenizer_folder=member.parent.folder,
            identity="",
            max_length=plan.settings.max_length,
            chat_template=member.chat_template,
        )
        for member in plan.members
        if member.parent.folder is not None
    ]
