"""lm-evaluation-harness on a model in memory, against values computed from the model's logits."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_unconstrained.errors import DataError, MissingExtraError, RecipeError
from mergekit_unconstrained.evaluation.kinds.harness import HarnessTask
from mergekit_unconstrained.evaluation.kinds.harness_settings import HarnessSettings, read_slice
from mergekit_unconstrained.evaluation.settings import load_tasks
from mergekit_unconstrained.evaluation.splits import check_disjoint, fitness_refused
from mergekit_unconstrained.evaluation.subject import Subject

pytest.importorskip("lm_eval")

ROWS = [
    {
        "question": f"What is {i} and {i}?",
        "choices": ["x", "yes", "no way", "perhaps"],
        "gold": i % 4,
    }
    for i in range(10)
]
MULTIPLE_CHOICE = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "target_delimiter": " ",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
GENERATE = {
    "task": "tiny_words",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
TWO_FILTERS = [
    {"name": "whole", "filter": [{"function": "take_first"}]},
    {
        "name": "first",
        "filter": [
            {"function": "regex", "regex_pattern": "^(.)"},
            {"function": "take_first"},
        ],
    },
]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., HarnessTask]:
    """`make(config, rows, train=rows, **settings)`: a task over a YAML file and JSONL beside it."""

    def write(config: dict, rows: list[dict], train: list[dict] = (), **settings: Any):
        files = {"test": "test.jsonl"}
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        splits = {"test_split": "test"}
        if train:
            files["train"] = "train.jsonl"
            (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in train))
            splits |= {"training_split": "train", "fewshot_split": "train"}
        kwargs = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
        whole = {"dataset_path": "json", "dataset_kwargs": kwargs, **splits, **config}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(whole))
        told = {"kind": "harness", "task": "own.yaml", **settings}
        return HarnessTask("own", HarnessSettings.model_validate(told), tmp_path)

    return write


@pytest.fixture(scope="module")
def subject(random_model, byte_tokenizer) -> Subject:
    """Random words over bytes; float32 as lm-eval expects."""
    return Subject("tiny", random_model().float(), byte_tokenizer(), "w", batch_size=4)


@torch.no_grad()
def likelihood(subject: Subject, prompt: str, answer: str) -> float:
    """log p(answer | prompt), one token after the other, without any padding."""
    start, ids = (subject.tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    total = 0.0
    for at in range(len(start), len(ids)):
        logits = subject.model(torch.tensor([ids[:at]])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[ids[at]])
    return total


@torch.no_grad()
def spoken(subject: Subject, prompt: str, tokens: int, stop: str) -> str:
    """The likeliest continuation, without keys and values kept, without padding."""
    ids = list(subject.tokenizer(prompt)["input_ids"])
    start = len(ids)
    while len(ids) < start + tokens:
        ids.append(int(subject.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == subject.tokenizer.eos_token_id:
            break
    said = subject.tokenizer.decode(ids[start:], skip_special_tokens=True)
    return said.partition(stop)[0]


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_multiple_choice_is_the_likeliest_choice(metric, make, subject):
    task = make(MULTIPLE_CHOICE, ROWS, metric=metric)
    examples = task.examples("test")
    done: list[int] = []
    scores = task.score(subject, examples, done.append)
    expected = []
    for row in ROWS:
        found = [likelihood(subject, row["question"], f" {c}") for c in row["choices"]]
        if metric == "acc_norm":
            found = [x / len(c) for x, c in zip(found, row["choices"], strict=True)]
        expected.append(float(found.index(max(found)) == row["gold"]))
    assert [one.value for one in scores] == expected
    assert 0 < sum(expected) < len(ROWS)
    assert [one.id for one in scores] == [str(i) for i in range(len(ROWS))]
    assert {one.failure for one in scores} == {""}
    assert sum(done) == len(ROWS)
    assert (task.unit, task.solved_at, task.splits()) == (metric, 1.0, ("test",))
    assert examples[3].choices == ("x", "yes", "no way", "perhaps")
    assert examples[3].messages[0].content == "What is 3 and 3?"


def test_words_are_generated_filtered_and_matched(make, subject):
    said = [spoken(subject, row["question"], 6, "\n") for row in ROWS]
    answers = [words[:1] if i % 2 else words for i, words in enumerate(said)]
    rows = [
        {"question": row["question"], "answer": answer}
        for row, answer in zip(ROWS, answers, strict=True)
    ]
    config = {**GENERATE, "filter_list": TWO_FILTERS}
    whole = make(config, rows)
    scores = whole.score(subject, whole.examples("test"))
    right = [float(a == b) for a, b in zip(said, answers, strict=True)]
    assert [one.said for one in scores] == said
    assert [one.value for one in scores] == right
    assert 0 < sum(right) < len(rows)
    assert whole.unit == "exact_match (whole)"
    assert "did not stop within 6 tokens" in {one.failure for one in scores}
    first = make(config, rows, filter="first")
    scores = first.score(subject, first.examples("test"))
    beginnings = [re.match("^(.)", words) for words in said]
    right = [float(m is not None and m[1] == a) for m, a in zip(beginnings, answers, strict=True)]
    assert [one.value for one in scores] == right
    assert 0 < sum(right) < len(rows)


def test_lm_eval_itself_agrees(make, subject):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    task = make(MULTIPLE_CHOICE, ROWS)
    ours = [one.value for one in task.score(subject, task.examples("test"))]
    tokenizer = copy.deepcopy(subject.tokenizer)  # lm-eval changes it
    model = HFLM(pretrained=subject.model, tokenizer=tokenizer, batch_size=3)
    theirs = evaluate(model, {"tasks": {"tiny_choice": task._task}}, bootstrap_iters=0)
    assert sum(ours) / len(ours) == theirs["results"]["tiny_choice"]["acc,none"]


def test_what_is_better_lower_counts_negative(make, subject):
    config = {**MULTIPLE_CHOICE, "metric_list": [dict(MULTIPLE_CHOICE["metric_list"][0])]}
    config["metric_list"][0]["higher_is_better"] = False
    task = make(config, ROWS)
    values = {one.value for one in task.score(subject, task.examples("test"))}
    assert values == {0.0, -1.0}
    assert task.solved_at is None
    assert task.worst < -1


def test_perplexities_count_as_log_likelihoods(make, subject):
    config = {
        "task": "tiny_text",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    task = make(config, ROWS[:3])
    scores = task.score(subject, task.examples("test"))
    for one, row in zip(scores, ROWS, strict=False):
        text = row["question"]
        # lm-eval puts the end of text in front
        expected = likelihood(subject, "<|endoftext|>", text) / len(text)
        assert one.value == pytest.approx(expected, rel=1e-4)
    assert (task.unit, task.solved_at) == ("nats per byte", None)


def test_an_example_is_scored_alike_in_any_company_and_is_none_of_its_own_shots(make, subject):
    task = make(MULTIPLE_CHOICE, ROWS, train=ROWS, fewshot=3, splits="train")
    examples = task.examples("test")
    together = [one.value for one in task.score(subject, examples)]
    alone = [task.score(subject, [one])[0].value for one in reversed(examples)]
    assert together == alone[::-1]
    for number, row in enumerate(ROWS):
        text = task._context("train", task._documents("train")[number])
        assert text.count("What is") == 4
        assert text.count(row["question"]) == 1
        assert task._context("train", task._documents("train")[number]) == text


def test_slices_are_kept_apart_and_the_benchmarks_own_test_split_is_no_fitness(make):
    splits = {"search": "0:4", "development": "4:6", "test": "6:"}
    task = make(MULTIPLE_CHOICE, ROWS, splits=splits)
    assert [len(task.examples(split)) for split in task.splits()] == [4, 2, 4]
    assert [one.id for one in task.examples("development")] == ["4", "5"]
    check_disjoint([task])
    with pytest.raises(RecipeError, match=r"test split of tiny_choice.*allow_test_split"):
        fitness_refused(task)
    fitness_refused(make(MULTIPLE_CHOICE, ROWS, splits=splits, allow_test_split=True))
    overlapping = make(MULTIPLE_CHOICE, ROWS, splits={"search": "0:4", "test": "3:"})
    with pytest.raises(DataError, match="is also"):
        check_disjoint([overlapping])


def test_training_documents_may_be_fitness(make):
    train = [{**row, "question": f"And {row['question']}"} for row in ROWS]
    splits = {"search": "train[:5]", "test": ":"}
    task = make(MULTIPLE_CHOICE, ROWS, train=train, splits=splits, limit=3)
    fitness_refused(task)
    check_disjoint([task])
    assert [one.messages[0].content for one in task.examples("search")] == [
        row["question"] for row in train[:3]
    ]
    with pytest.raises(DataError, match=r"own.yaml has no validation documents"):
        make(MULTIPLE_CHOICE, ROWS, splits="validation").examples("test")
    with pytest.raises(DataError, match=r"'90:' has no documents; there are 10"):
        make(MULTIPLE_CHOICE, ROWS, splits="90:").examples("test")


@pytest.mark.parametrize(
    ("text", "slice_"),
    [
        (":", (None, None, None)),
        ("0:100", (None, 0, 100)),
        ("train", ("train", None, None)),
        ("train[5:]", ("train", 5, None)),
        (" test[:7] ", ("test", None, 7)),
    ],
)
def test_choices_of_documents(text, slice_):
    assert read_slice(text) == slice_


@pytest.mark.parametrize("text", ["", "5", "5:5", "9:3", "dev[1:2]", "train[]", "train:5", "-1:3"])
def test_what_is_no_choice_of_documents(text):
    with pytest.raises(ValueError, match="documents"):
        read_slice(text)


def test_the_key_knows_what_scores_depend_on_and_no_more(make):
    key = make(MULTIPLE_CHOICE, ROWS).key
    assert make(MULTIPLE_CHOICE, ROWS, splits="0:3", weight=2.0, limit=2).key == key
    assert make(MULTIPLE_CHOICE, ROWS, fewshot=1).key != key
    assert make(MULTIPLE_CHOICE, ROWS, metric="acc_norm").key != key
    assert make({**MULTIPLE_CHOICE, "target_delimiter": ""}, ROWS).key != key


def test_nan_and_crashes_are_failures_of_their_examples(make, random_model, byte_tokenizer):
    model = random_model().float()
    forward = model.forward

    def falls(input_ids: Any, **more: Any) -> Any:
        out = forward(input_ids=input_ids, **more)
        texts = byte_tokenizer().batch_decode(input_ids)
        if any("is 4" in text for text in texts):
            raise RuntimeError("the model fell over")
        for row, text in enumerate(texts):
            if "is 7" in text:
                out.logits[row] = torch.nan
        return out

    task = make(MULTIPLE_CHOICE, ROWS)
    well = Subject("tiny", model, byte_tokenizer(), batch_size=4)
    expected = [one.value for one in task.score(well, task.examples("test"))]
    model.forward = falls
    scores = task.score(well, task.examples("test"))
    assert scores[4].failure == "RuntimeError: the model fell over"
    assert scores[7].failure == "the logits are not finite"
    assert [one.value for one in scores] == [
        0.0 if i in (4, 7) else value for i, value in enumerate(expected)
    ]
    assert [i for i, one in enumerate(scores) if one.failure] == [4, 7]
    assert not model._forward_hooks


def test_the_subjects_tokenizer_stays_as_it_was(make, subject):
    task = make(GENERATE, [{"question": "a", "answer": "b"}])
    task.score(subject, task.examples("test"))
    assert subject.tokenizer.pad_token is None


def test_chat_templates_are_used_when_asked_for(make, random_model, byte_tokenizer):
    chatty = Subject("tiny", random_model().float(), byte_tokenizer(chat=True), batch_size=4)
    rows = [{"question": "Say", "answer": "x"}]
    task = make(GENERATE, rows, chat=True, system="Be brief.")
    task.score(chatty, task.examples("test"))
    (request,) = task._task.instances
    assert request.args[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    plain = make(GENERATE, rows)
    plain.score(chatty, plain.examples("test"))
    assert plain._task.instances[0].args[0] == "Say"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "acc_nrom"}, "has no metric 'acc_nrom'. Did you mean 'acc_norm'"),
        ({"filter": "strict"}, "has no filter 'strict'. Known here: none"),
        ({"chat": True}, "has no chat template"),
        ({"task": "nowhere.yaml"}, "there is no .*nowhere.yaml"),
    ],
)
def test_what_cannot_be_meant_is_named(settings, message, make, subject):
    task = make(MULTIPLE_CHOICE, ROWS, **settings)
    with pytest.raises(RecipeError, match=message):
        task.score(subject, task.examples("test"))


def test_a_group_and_unsafe_code_are_refused(make, tmp_path):
    task = make(MULTIPLE_CHOICE, ROWS)
    (tmp_path / "own.yaml").write_text("group: several\ntask: [a, b]\n")
    with pytest.raises((RecipeError, DataError), match="own"):
        task.examples("test")
    unsafe = make({**GENERATE, "unsafe_code": True}, [{"question": "a", "answer": "b"}])
    with pytest.raises(RecipeError, match="use `kind: code`"):
        unsafe.examples("test")


def test_data_that_is_not_there_is_one_sentence(make, tmp_path):
    task = make(MULTIPLE_CHOICE, ROWS)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"lm-eval cannot load own.yaml \(FileNotFoundError"):
        task.examples("test")


def test_a_packaged_task_is_found_without_the_index(monkeypatch):
    from mergekit_unconstrained.evaluation.kinds import harness_benchmarks

    found = harness_benchmarks.packaged("gsm8k")
    assert found is not None
    assert found.parent.name == "gsm8k"
    assert harness_benchmarks.packaged("no_such_task") is None


def test_a_tasks_file_reads_it(make, tmp_path):
    make(MULTIPLE_CHOICE, ROWS)
    path = tmp_path / "tasks.yml"
    path.write_text("tasks: {mc: {kind: harness, task: own.yaml, splits: {test: '2:4'}}}")
    (task,) = load_tasks(path)
    assert [one.id for one in task.examples("test")] == ["2", "3"]
    path.write_text("tasks: {mc: {kind: harness, task: own.yaml, splits: {test: 'dev'}}}")
    with pytest.raises(RecipeError, match="is no choice of documents"):
        load_tasks(path)


def test_without_the_extra_it_says_which(make, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    from mergekit_unconstrained.evaluation.kinds import harness_benchmarks

    harness_benchmarks.manager.cache_clear()
    with pytest.raises(MissingExtraError, match=r"mergekit-unconstrained\[eval\]"):
        make(MULTIPLE_CHOICE, ROWS).examples("test")


@pytest.mark.slow
def test_an_unknown_task_is_named_with_the_nearest():
    settings = HarnessSettings.model_validate({"kind": "harness", "task": "gsm8kk"})
    with pytest.raises(RecipeError, match=r"no task 'gsm8kk'. Did you mean 'gsm8k'"):
        HarnessTask("t", settings, Path()).examples("test")
