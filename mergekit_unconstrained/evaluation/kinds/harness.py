"""Benchmarks of lm-evaluation-harness, by name or from a YAML file of one's own.

The benchmark's own prompts, filters and metrics are used, on the model in memory. Departures from
`lm_eval`: every example is scored by itself, so that it gets the same score whatever it is scored
with; all examples are therefore asked with the same few shots (seed 1234), and an example is never
among its own shots, whichever split it is from; groups of tasks are not averaged: name each task.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import DataError, RecipeError, UnconstrainedError
from mergekit_unconstrained.evaluation.configured import ConfiguredTask
from mergekit_unconstrained.evaluation.kinds.harness_benchmarks import (
    SHOTS_SEED,
    in_a_line,
    lm_eval,
    load_benchmark,
    quiet,
    seeded,
    watched,
)
from mergekit_unconstrained.evaluation.kinds.harness_settings import HarnessSettings, read_slice
from mergekit_unconstrained.evaluation.records import SPLITS, Example, Message, Scored, Split
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.evaluation.task import Advance

_NATS = {
    "perplexity": "nats",
    "word_perplexity": "nats per word",
    "byte_perplexity": "nats per byte",
    "bits_per_byte": "nats per byte",
}
"""Metrics of a whole task whose values for single examples are log-likelihoods; -> their unit."""
_WORST = -100.0
_CHUNK = 8
"""Batches of examples scored together, between two steps of the progress bar."""


class HarnessTask(ConfiguredTask[HarnessSettings]):
    """Scored by the benchmark's own metric; one that is better lower counts negative."""

    settings_class = HarnessSettings

    def __init__(self, name: str, settings: HarnessSettings, folder: Path) -> None:
        super().__init__(name, settings, folder)
        self._examples: dict[Split, list[Example]] = {}
        self._tokenizer: tuple[Any, Any] = (None, None)

    # -- what it is

    @property
    def unit(self) -> str:  # type: ignore[override]
        """The metric, and the filter where the task has several."""
        told = _NATS.get(self._metric, self._metric)
        return told if len(self._filters) < 2 else f"{told} ({self._filter})"

    @property
    def solved_at(self) -> float | None:  # type: ignore[override]
        """1 where more is better: such metrics of single examples end at 1."""
        return 1.0 if self._from_0_to_1 else None

    @property
    def worst(self) -> float:  # type: ignore[override]
        """As in ConfiguredTask; of what has no end, something bad enough."""
        return 0.0 if self._from_0_to_1 else _WORST

    @property
    def key(self) -> str:
        """As in Task: the benchmark's settings as they are in the installed release."""
        config = {
            name: value
            for name, value in self._task.dump_config().items()
            if name not in ("dataset_kwargs", "metadata")  # where the data lie: not what they say
        }
        text = json.dumps(config, sort_keys=True, default=str)
        text = re.sub(r" at 0x[0-9a-f]+", "", text)  # functions that have no source
        return self.settings.digest(
            version=self.version,
            lm_eval=lm_eval("lm_eval").__version__,
            task=hashlib.sha256(text.encode()).hexdigest(),
        )

    def splits(self) -> tuple[Split, ...]:
        """As in Task."""
        return tuple(split for split in SPLITS if split in self.settings.splits)

    def benchmark(self, split: Split) -> str | None:
        """As in ConfiguredTask: whether these are the documents that lm-eval reports on."""
        named, config = self._named(split), self._task.config
        if self._local is None:
            reported = "test" if self._task.has_test_docs() else "validation"
            return self.settings.task if named == reported else None
        # a file of one's own may call training data its test split
        own = str(config.test_split or "")
        return self._task.config.task if named == "test" and "test" in own.casefold() else None

    # -- examples

    def examples(self, split: Split) -> Sequence[Example]:
        """As in Task. Ids are the documents' numbers in lm-eval's order."""
        if split not in self._examples:
            documents = self._documents(self._named(split))
            first, last = read_slice(self.settings.splits[split])[1:]
            numbers = range(len(documents))[first:last][: self.settings.limit]
            if not numbers:
                raise DataError(
                    f"task {self.name!r}: {self.settings.splits[split]!r} has no documents; there "
                    f"are {len(documents)}"
                )
            named = self._named(split)
            self._examples[split] = [self._example(named, i, documents[i]) for i in numbers]
        return self._examples[split]

    def _example(self, named: str, number: int, document: Any) -> Example:
        task = self._task
        text, target = task.doc_to_text(document), task.doc_to_target(document)
        choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else ()
        whole = json.dumps(document, sort_keys=True, default=str)
        asked = text if isinstance(text, str) and text.strip() else whole
        shots = self._context(named, document)
        told = hashlib.sha256(json.dumps([whole, shots]).encode()).hexdigest()
        return Example(
            str(number),
            (Message("user", asked),),
            target=str(target),
            choices=tuple(str(choice) for choice in choices or ()),
            extra={"from": named, "number": number, "document": told},
        )

    def _named(self, split: Split) -> str:
        """train, validation or test: what a split's documents are to the benchmark."""
        named = read_slice(self.settings.splits[split])[0]
        return named or ("test" if self._task.has_test_docs() else "validation")

    def _documents(self, named: str) -> Any:
        task = self._task
        has, get = {
            "train": (task.has_training_docs, task.training_docs),
            "validation": (task.has_validation_docs, task.validation_docs),
            "test": (task.has_test_docs, task.test_docs),
        }[named]
        if not has():
            raise DataError(f"task {self.name!r}: {self.settings.task} has no {named} documents")
        if named not in self._read:
            self._read[named] = get()
        return self._read[named]

    @cached_property
    def _read(self) -> dict[str, Any]:
        return {}

    # -- scoring

    def score(
        self, subject: Subject, examples: Sequence[Example], advance: Advance = lambda _: None
    ) -> list[Scored]:
        """As in Task. What fails for many is tried in halves, until it is known for whom."""
        with quiet(), watched(subject.model):
            model = self._model(subject)
            found = []
            step = _CHUNK * subject.batch_size
            for start in range(0, len(examples), step):
                chunk = examples[start : start + step]
                found += self._chunk(model, chunk)
                advance(len(chunk))
            return found

    def _chunk(self, model: Any, examples: Sequence[Example]) -> list[Scored]:
        try:
            return self._scores(model, examples)
        except UnconstrainedError:
            raise
        except Exception as error:
            if len(examples) > 1:
                half = len(examples) // 2
                return self._chunk(model, examples[:half]) + self._chunk(model, examples[half:])
            return [Scored(examples[0].id, self.worst, failure=in_a_line(error))]

    def _scores(self, model: Any, examples: Sequence[Example]) -> list[Scored]:
        """lm_eval.evaluate for some documents, without what is not needed for single examples."""
        task, chat = self._task, self._templated(model)
        asked: list[list[Any]] = []
        documents = []
        for position, example in enumerate(examples):
            named, number = example.extra["from"], example.extra["number"]
            document = self._documents(named)[number]
            documents.append(document)
            made = task.construct_requests(
                doc=document,
                ctx=self._context(named, document, model, chat),
                metadata=(task.config.task, position, task.config.repeats),
                apply_chat_template=chat,
                chat_template=model.apply_chat_template if chat else None,
            )
            asked.append(made if isinstance(made, list) else [made])
        task._instances = [request for requests in asked for request in requests]
        kind = task._instances[0].request_type
        repeated = [request for request in task._instances for _ in range(request.repeats)]
        with seeded(model.device):
            answers = getattr(model, kind)(repeated, disable_tqdm=True)
        for request, answer in zip(repeated, answers, strict=True):
            request.resps.append(answer)
        task.apply_filters()
        return [
            self._scored(example, document, requests, model)
            for example, document, requests in zip(examples, documents, asked, strict=True)
        ]

    def _scored(
        self, example: Example, document: Any, requests: Sequence[Any], model: Any
    ) -> Scored:
        answers = [request.filtered_resps[self._filter] for request in requests]
        metrics = self._task.process_results(document, answers)
        value = metrics.get(self._metric)
        if self._metric in _NATS and isinstance(value, tuple):
            value = value[0] / max(1, value[1])  # its likelihood, and its words or bytes
        if not _is_number(value):
            raise RecipeError(
                f"task {self.name!r}: the metric {self._metric!r} has no value for a single "
                f"example. {suggest('', [m for m in metrics if _is_number(metrics[m])])}"
            )
        number = float(value) * (1 if self._higher_is_better else -1)
        first = requests[0]
        said = first.resps[0] if isinstance(first.resps[0], str) else ""
        if not math.isfinite(number):
            return Scored(example.id, self.worst, said, f"{self._metric} is not finite")
        failure = ""
        if first.request_type == "generate_until":
            limit = first.args[1].get("max_gen_toks", model.max_gen_toks)
            if len(model.tok_encode(said, add_special_tokens=False)) >= limit:
                failure = f"did not stop within {limit} tokens"
        return Scored(example.id, number, said, failure)

    def _context(
        self, named: str, document: Any, model: Any = None, chat: bool = False
    ) -> str | list[str]:
        """What the model reads before it answers; without a model: before any chat template."""
        task = self._task
        task.set_fewshot_seed(SHOTS_SEED)
        with self._not_its_own_shot(named, document):
            found: str | list[str] = task.fewshot_context(
                document,
                num_fewshot=task.config.num_fewshot or 0,
                system_instruction=self.settings.system or None,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                chat_template=model.apply_chat_template if chat else None,
                gen_prefix=task.doc_to_prefix(document),
            )
        return found

    @contextlib.contextmanager
    def _not_its_own_shot(self, named: str, document: Any) -> Iterator[None]:
        config, sampler = self._task.config, getattr(self._task, "sampler", None)
        splits = (config.training_split, config.validation_split, config.test_split)
        source = self._task.fewshot_cfg.split or next(filter(None, splits))
        own = dict(zip(("train", "validation", "test"), splits, strict=True))[named]
        if sampler is None or source != own:
            yield
            return
        sample = sampler.sample

        def others(n: int, **more: Any) -> Any:
            return sample(n, **{**more, "eval_doc": document})

        sampler.sample = others
        try:
            yield
        finally:
            del sampler.sample

    def _templated(self, model: Any) -> bool:
        has = bool(getattr(model.tokenizer, "chat_template", None))
        if self.chat and not has:
            raise RecipeError(
                f"task {self.name!r}: the tokenizer has no chat template: use `chat: auto` or "
                "`chat: false`"
            )
        return has if self.chat is None else self.chat

    def _model(self, subject: Subject) -> Any:
        """The subject as lm-eval sees a model. Its tokenizer is a copy: lm-eval changes it."""
        if self._tokenizer[0] is not subject.tokenizer:
            self._tokenizer = (subject.tokenizer, copy.deepcopy(subject.tokenizer))
        hflm = lm_eval("lm_eval.models.huggingface").HFLM
        return hflm(
            pretrained=subject.model,
            tokenizer=self._tokenizer[1],
            batch_size=subject.batch_size,
            backend="causal",
        )

    # -- the benchmark

    @property
    def _metric(self) -> str:
        return self._one_of("metric", list(self._task.aggregation()))

    @property
    def _filters(self) -> list[str]:
        return [one.name for one in self._task._filters]

    @property
    def _filter(self) -> str:
        return self._one_of("filter", self._filters)

    def _one_of(self, setting: str, known: list[str]) -> str:
        given: str | None = getattr(self.settings, setting)
        if given is None:
            return known[0]
        if given not in known:
            raise RecipeError(
                f"task {self.name!r}: {self.settings.task} has no {setting} {given!r}. "
                f"{suggest(given, known)}"
            )
        return given

    @property
    def _higher_is_better(self) -> bool:
        """Of a single example's value."""
        return self._metric in _NATS or bool(self._task.higher_is_better().get(self._metric, True))

    @property
    def _from_0_to_1(self) -> bool:
        return self._higher_is_better and self._metric not in _NATS

    @property
    def _local(self) -> Path | None:
        """The YAML file; None for a task that lm-eval brings."""
        if not self.settings.task.endswith((".yaml", ".yml")):
            return None
        return self.folder / Path(self.settings.task).expanduser()

    @cached_property
    def _task(self) -> Any:
        """lm-eval's task object; RecipeError, DataError when there is none."""
        task = load_benchmark(self.settings.task, self._local, self.name)
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(
                f"task {self.name!r}: {self.settings.task} runs model-written code without any "
                "sandbox; use `kind: code` with its data"
            )
        if self.settings.fewshot is not None:
            task.set_config("num_fewshot", self.settings.fewshot)
        if self.settings.max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
            more = {"max_gen_toks": self.settings.max_new_tokens}
            task.set_config("generation_kwargs", more, update=True)
        return task


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__")
