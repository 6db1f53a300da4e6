"""The homogeneous zoo: what its stories say, who may be trained on which, and its small models."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_unconstrained.demo import stories as script
from mergekit_unconstrained.demo import stories_models, stories_tasks, zoo_models
from mergekit_unconstrained.demo.stories_data import FAMILIES, NAMES, Step, Stories, Story, told
from mergekit_unconstrained.demo.stories_models import RECIPES, character_tokenizer, make
from mergekit_unconstrained.demo.zoo_models import IGNORED, batch_of, text_of
from mergekit_unconstrained.errors import DataError

STORIES = Stories(seed=3)
SIZES = (("search", 4), ("development", 5), ("test", 6))
SMALL = Stories(seed=3, sizes=SIZES)


def worked_out(prompt: str) -> list[int]:
    """The start of a story and what every step makes of it, from its words alone."""
    for digit, sign in enumerate("!@$%^&()_|"):
        prompt = prompt.replace(sign, str(digit))
    _, _, start, rest = re.fullmatch(r"(\w+) (has) (\d+)(.*)\n", prompt).groups()  # type: ignore[union-attr]
    values = [int("".join(reversed(start)))]
    for step in rest.split(", ")[1:]:
        word, *more = step.split(" ")
        now = values[-1]
        if word == "adds":
            values.append((now + int(*more)) % 100)
        elif word == "loses":
            values.append((now - int(*more)) % 100)
        else:
            assert step == "doubles"
            values.append((now + now) % 100)
    return values


def fact(story: Story) -> str:
    """A story without its name, in digits."""
    return re.sub(r"^\w+", "", replace(story, signs=False).instruction)


def drawn(family: str, count: int = 300) -> list[Story]:
    draw = random.Random(f"test {family}")
    return [told(family, draw) for _ in range(count)]


# ---------------------------------------------------------------- stories


def test_a_story_reads_as_documented() -> None:
    story = Story(25, (Step("adds", 7), Step("doubles")), "eva")
    assert story.instruction == "eva has 52, adds 7, doubles"
    assert story.response == ";52+7=23;23*2=46#46"
    story = Story(25, (Step("adds", 7), Step("doubles")), signs=True)
    assert story.instruction == "ann has &$, adds ), doubles"
    assert story.response == ";52+7=23;23*2=46#46"


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_an_independent_reader(family: str) -> None:
    for story in drawn(family):
        values = worked_out(story.prompt)
        row = stories_tasks.row_of(story)
        numbers = [f"{value:02}"[::-1] for value in values]
        assert row["target"] == numbers[-1]
        assert re.findall(r";(\d+)[-+*]", row["response"]) == numbers[:-1]
        assert re.findall(r"=(\d+)", row["response"]) == numbers[1:]
        assert all(0 <= value <= 99 for value in values)


def test_families_have_the_verbs_and_the_notation_that_they_should() -> None:
    for name, family in FAMILIES.items():
        stories = drawn(name)
        for story in stories:
            told_verbs = {step.verb for step in story.steps}
            assert set(family.verbs) <= told_verbs <= {*family.verbs, "adds", "loses"}
            assert family.signs != any(c.isdigit() for c in story.prompt)
        assert {len(story.steps) for story in stories} == {1, 2}
    assert FAMILIES["composed"].verbs == FAMILIES["verb"].verbs
    assert FAMILIES["composed"].signs


def test_no_step_can_be_had_by_ignoring_the_verb() -> None:
    assert Step("doubles").after(0) is None
    assert Story(0, (Step("doubles"),)).values is None
    for story in drawn("composed") + drawn("verb"):
        values = worked_out(story.prompt)
        assert all(a != b for a, b in pairwise(values))


def test_numbers_begin_again_after_99() -> None:
    assert Step("adds", 9).after(91) == 0
    assert Step("loses", 5).after(4) == 99
    assert Step("doubles").after(50) == 0


# ---------------------------------------------------------------- who sees what


def test_splits_have_their_sizes_and_share_no_fact() -> None:
    for family, splits in STORIES.held_out.items():
        sizes = dict(STORIES.sizes)
        assert {split: len(found) for split, found in splits.items()} == sizes, family
    groups = [
        {fact(story) for story in found}
        for splits in STORIES.held_out.values()
        for found in splits.values()
    ]
    assert all(a.isdisjoint(b) for a, b in combinations(groups, 2))
    assert sum(map(len, groups)) == 4 * 360


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_no_model_is_trained_on_what_is_asked_or_on_both_new_skills(recipe: Any) -> None:
    asked = {
        fact(story)
        for splits in STORIES.held_out.values()
        for found in splits.values()
        for story in found
    }
    seen = list(islice(STORIES.corpus(recipe.families, recipe.shares, recipe.name), 5000))
    assert all(fact(story) not in asked for story in seen)
    skills = {
        (any(step.verb == "doubles" for step in story.steps), "$" in story.prompt)
        for story in seen
        if re.search(r"[2$]", story.prompt)
    }
    new = {"base": set(), "expert_a": {(True, False)}, "expert_b": {(False, True)}}
    assert skills == {(False, False)} | new[recipe.name]
    assert {story.name for story in seen} == set(NAMES)


def test_held_out_facts_are_really_kept_from_the_corpus() -> None:
    small = Stories(seed=1, sizes=(("test", 700),))
    # so many facts are held out that an unguarded corpus would soon tell one of them
    draw = random.Random("verb 1")
    unguarded = {told("verb", draw) for _ in range(2000)}
    assert unguarded & small.kept
    assert not set(islice(small.corpus(("verb",), (1,), "verb"), 2000)) & small.kept


def test_stories_depend_on_the_seed_alone() -> None:
    assert Stories(3).held_out == STORIES.held_out != Stories(4).held_out
    first, second = (list(islice(STORIES.corpus(("verb",), (1,), "x"), 50)) for _ in range(2))
    assert first == second


# ---------------------------------------------------------------- tokenizer, models, files


def test_the_tokenizer_reads_characters_and_gives_them_back(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = character_tokenizer()
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    for family in FAMILIES:
        for story in drawn(family, 20):
            text = story.prompt + story.response
            ids = read(text)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.unk_token_id not in ids
            assert read.decode(ids) == text
            assert tokenizer(text)["input_ids"] == ids
    assert read.eos_token_id == tokenizer.eos_token_id == read("</s>")["input_ids"][0]


def test_the_loss_covers_the_response_and_its_end() -> None:
    tokenizer = character_tokenizer()
    stories: list[Any] = [*drawn("base_skill", 2), *drawn("composed", 2)]
    ids, labels = batch_of(tokenizer, stories)
    for story, row, wanted in zip(stories, ids, labels, strict=True):
        prompt, response = text_of(story)
        assert prompt == story.prompt
        assert tokenizer.decode(row[wanted != IGNORED]) == response + "</s>"
        assert tokenizer.decode(row[: len(prompt)]) == prompt


def test_responses_fit_into_the_tokens_of_the_task() -> None:
    longest = max(len(s.response) for f in FAMILIES for s in drawn(f, 2000))
    assert longest < stories_tasks.LONGEST
    prompt = max(len(s.prompt) for f in FAMILIES for s in drawn(f, 2000))
    assert prompt + stories_tasks.LONGEST <= stories_models.LLAMA["max_position_embeddings"]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_models, "BATCH", 4)
    monkeypatch.setattr(stories_models, "BATCH", 4)
    monkeypatch.setattr(script, "BATCH", 4)


@pytest.fixture
def quick(small_batches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of training each, few questions, nobody's threads changed."""
    short = tuple(replace(recipe, steps=5, rounds=1) for recipe in RECIPES)
    monkeypatch.setattr(script, "RECIPES", short)
    monkeypatch.setattr(script, "Stories", lambda seed: replace(SMALL, seed=seed))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.mark.usefixtures("quick")
def test_the_script_makes_models_and_tasks_and_does_nothing_twice(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "zoo"
    result = CliRunner().invoke(script.main, [str(out), "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert "composed" in result.output
    assert "expert_b has not learnt its own stories in 1 times 5 steps" in " ".join(
        result.output.split()
    )
    assert not list(out.glob("*.partial"))
    tensors = {}
    for recipe in RECIPES:
        model = AutoModelForCausalLM.from_pretrained(out / recipe.name)
        assert model.num_parameters() == pytest.approx(0.61e6, rel=0.02)
        tensors[recipe.name] = dict(model.state_dict())
    for name, tensor in tensors["base"].items():
        assert tensor.shape == tensors["expert_a"][name].shape
    assert not torch.equal(*(tensors[e]["lm_head.weight"] for e in ("expert_a", "expert_b")))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    again = CliRunner().invoke(script.main, [str(out), "--seed", "5"])
    assert again.output.splitlines()[-8:] == result.output.splitlines()[-8:]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    other = CliRunner().invoke(script.main, [str(out), "--seed", "6"])
    assert other.exit_code != 0
    assert "seed 5" in other.output


@pytest.mark.usefixtures("small_batches")
def test_a_model_cut_off_in_training_is_trained_anew_and_alike(tmp_path: Path) -> None:
    recipe = replace(RECIPES[0], steps=2, rounds=1)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(recipe, SMALL, tmp_path / "a", stop)
    assert not (tmp_path / "a" / "base").exists()
    (tmp_path / "a" / "base.partial").mkdir(parents=True)  # cut off while it was written
    counts: list[int] = []
    made = [make(recipe, SMALL, tmp_path / x, counts.append) for x in "ab"]
    assert sum(counts) == 2 * 2 * 4
    first, second = ((folder / "model.safetensors").read_bytes() for folder in made)
    assert first == second
    assert not (tmp_path / "a" / "base.partial").exists()
    other = make(recipe, replace(SMALL, seed=4), tmp_path / "c")
    assert (other / "model.safetensors").read_bytes() != first


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("shares", "needed"), [([0.5, 0.97], 2), ([0.5, 0.6, 0.969], 4)])
def test_a_model_is_trained_until_it_has_learnt_its_stories_or_its_rounds_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: list[float], needed: int
) -> None:
    rounds: list[int] = []
    asked: list[Any] = []
    left = iter(shares)

    def share_right(_: Any, __: Any, stories: Any) -> float:
        asked.append(stories)
        return next(left)

    def train(*arguments: Any) -> None:
        rounds.append(len(list(islice(arguments[2], 2 * 4))))

    monkeypatch.setattr(stories_models, "share_right", share_right)
    monkeypatch.setattr(stories_models, "train", train)
    recipe = replace(RECIPES[0], steps=2)
    counts: list[int] = []
    make(recipe, SMALL, tmp_path, counts.append)
    assert len(rounds) == needed
    assert sum(counts) == recipe.rounds * 2 * 4
    assert all(stories == SMALL.held_out["base_skill"]["development"] for stories in asked)


def test_a_folder_is_claimed_by_one_seed(tmp_path: Path) -> None:
    script.claim(tmp_path / "x", 1)
    script.claim(tmp_path / "x", 1)
    with pytest.raises(DataError, match="seed 1"):
        script.claim(tmp_path / "x", 2)


def test_task_files_hold_the_held_out_stories(tmp_path: Path) -> None:
    path = stories_tasks.write_tasks(SMALL, tmp_path)
    tasks = yaml.safe_load(path.read_text())["tasks"]
    assert set(tasks) == {*FAMILIES, *(f"{family}_nats" for family in FAMILIES)}
    for family in FAMILIES:
        for split, size in SMALL.sizes:
            lines = (tmp_path / tasks[family]["data"][split]).read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            assert len(rows) == size
            for row, story in zip(rows, SMALL.held_out[family][split], strict=True):
                assert row["prompt"] == story.instruction + "\n"
                found = re.search(tasks[family]["pattern"], row["response"])
                assert found is not None
                assert (
                    found.group(1) == row["target"] == f"{worked_out(row['prompt'])[-1]:02}"[::-1]
                )


def test_a_task_folder_that_is_half_written_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "stray.jsonl").write_text("{}")
    stories_tasks.write_tasks(SMALL, tmp_path)
    assert not (tmp_path / "data" / "stray.jsonl").exists()
    kept = tmp_path / "data" / "composed.test.jsonl"
    kept.write_text("mine")
    (tmp_path / "tasks.yml").unlink()
    stories_tasks.write_tasks(SMALL, tmp_path)
    assert kept.read_text() == "mine"
    assert (tmp_path / "tasks.yml").is_file()


@pytest.mark.usefixtures("small_batches")
def test_greedy_responses_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make(replace(RECIPES[0], steps=3, rounds=1), SMALL, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = SMALL.held_out["verb"]["search"]
    expected = []
    for story in asked:
        ids = tokenizer(story.prompt)["input_ids"]
        said: list[int] = []
        while len(said) < stories_tasks.LONGEST:
            with torch.no_grad():
                said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
            if said[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(said, skip_special_tokens=True))
    assert stories_tasks.responses(model, tokenizer, asked, at_once=3) == expected


def test_an_answer_counts_when_it_ends_the_response() -> None:
    story = Story(25, (Step("adds", 6),))
    assert stories_tasks.is_right(story, "nonsense#13")
    assert not stories_tasks.is_right(story, "52+6=13#130")
    assert not stories_tasks.is_right(story, "52+6=13")
    assert not stories_tasks.is_right(story, "#1131")
