"""A fusion as people run it: one command, its stages, its second run, its errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from click.testing import CliRunner, Result

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.engine.digest import sha256
from mergekit_unconstrained.hub.provenance import load
from mergekit_unconstrained.present import size
from tests.fusion.tiny_fusion import MakeTokenizer, save_model, write_data, write_recipe


class Fused(NamedTuple):
    """A finished fusion: models, recipe and output in one folder."""

    folder: Path
    pivot: Path
    gpt2: Path
    mistral: Path
    data: Path
    recipe: Path
    out: Path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeed(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: MakeTokenizer) -> Fused:
    """Llama <- GPT-2 and Mistral, three tokenizers, with an SFT baseline; run once."""
    folder = tmp_path_factory.mktemp("fusion")
    pivot = save_model(folder / "pivot", make_tokenizer("byte_level"), "llama")
    gpt2 = save_model(folder / "gpt2", make_tokenizer("gpt2"), "gpt2", 1)
    mistral = save_model(folder / "mistral", make_tokenizer("metaspace"), "mistral", 2)
    data = write_data(folder / "data.jsonl")
    recipe = write_recipe(folder, pivot, [gpt2, mistral], data, {"sft_baseline": True})
    succeed("yaml", recipe, folder / "out", "--quiet")
    return Fused(folder, pivot, gpt2, mistral, data, recipe, folder / "out")


def stages_of(out: Path) -> dict[str, Any]:
    """Stage folder -> manifest."""
    work = Path(f"{out}.fusion")
    return {
        str(f.parent.relative_to(work)): json.loads(f.read_text())
        for f in work.rglob("manifest.json")
    }


def test_the_result_loads_and_differs_from_the_pivot(fused: Fused) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(fused.out)
    pivot = AutoModelForCausalLM.from_pretrained(fused.pivot)
    assert type(model) is type(pivot)
    changed = [
        name
        for name, weight in model.named_parameters()
        if not torch.equal(weight, pivot.get_parameter(name))
    ]
    assert len(changed) > 10
    tokenizer = AutoTokenizer.from_pretrained(fused.out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(fused.pivot).chat_template
    ids = tokenizer("the answer", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] >= 3


def test_the_folder_explains_itself(fused: Fused) -> None:
    names = {p.name for p in fused.out.iterdir()}
    assert {"README.md", "fuse.yml", "fusion.json", "losses.png", "mergekit_config.yml"} <= names
    settings = yaml.safe_load((fused.out / "fuse.yml").read_text())
    assert settings["batch_size"] == 4  # as given
    assert settings["lm_loss_weight"] == 0.9  # a default
    recipe = yaml.safe_load((fused.out / "mergekit_config.yml").read_text())
    assert recipe["parameters"]["settings"] == "fuse.yml"  # the one that lies beside it
    card = (fused.out / "README.md").read_text()
    assert "# mergekit_config.yml needs fuse.yml of this folder" in card
    for said in ("gpt2", "mistral", "SFT on the same data", "bits per byte", "## Teachers"):
        assert said in card
    assert str(fused.folder) not in card + (fused.out / "fusion.json").read_text()
    measured = json.loads((fused.out / "fusion.json").read_text())["held_out_bits_per_byte"]
    assert measured["pivot pivot"]["n"] == 5
    others = [score["paired"] for model, score in measured.items() if model != "this model"]
    assert len(others) == len(measured) - 1
    assert all(error > 0 for error in others)
    assert '"parts":' not in (fused.out / "fusion.json").read_text()  # of single conversations
    assert "a paired one, over the same examples" in card
    assert "this model" in measured
    assert "per_second" not in (fused.out / "fusion.json").read_text()  # equal runs, equal files


def test_the_folder_can_be_checked_and_made_again(
    fused: Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = load(fused.out)
    (data,) = known.data
    assert (data.place, data.rows) == ("data.jsonl", {"trained on": 19, "held out": 5})
    assert data.sha256 == sha256(fused.data)
    assert known.fusion is not None
    assert [t.name for t in known.fusion.teachers] == ["gpt2", "mistral"]
    assert str(fused.folder) not in (fused.out / "provenance.json").read_text()
    card = (fused.out / "README.md").read_text()
    measured = json.loads((fused.out / "fusion.json").read_text())["held_out_bits_per_byte"]
    for model, score in measured.items():
        assert f"| {model} | {score['bits_per_byte']:.4g} |" in card
    succeed("verify", fused.out, "--parents")
    monkeypatch.chdir(fused.folder)
    assert "equal byte for byte" in succeed("reproduce", "out")


def test_a_second_run_takes_every_stage_as_it_is(fused: Fused) -> None:
    before = stages_of(fused.out)
    out = fused.folder / "again"
    shutil.copytree(f"{fused.out}.fusion", f"{out}.fusion")
    succeed("yaml", fused.recipe, out, "--quiet")
    after = stages_of(out)
    assert after.keys() == before.keys()
    timed = ("distributions", "train", "alignment", "data")
    for name, manifest in after.items():
        if name.startswith(timed):
            assert manifest["seconds"] == before[name]["seconds"], f"{name} ran again"
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (fused.out / weights).read_bytes()


def test_a_manifest_says_how_fast_a_model_was_read(fused: Fused) -> None:
    for name, manifest in stages_of(fused.out).items():
        if name.startswith("distributions"):
            assert manifest["results"]["tokens_per_second"] > 0
            assert 0 < manifest["results"]["outside_forward"] < 1


def test_another_learning_rate_trains_again_and_collects_nothing(
    fused: Fused, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(f"{fused.out}.fusion", f"{out}.fusion")
    before = stages_of(out)
    recipe = write_recipe(
        tmp_path,
        fused.pivot,
        [fused.gpt2, fused.mistral],
        fused.data,
        {"sft_baseline": True},
        learning_rate=2e-3,
    )
    succeed("fuse", "train", recipe, out, "--quiet")
    new = stages_of(out).keys() - before.keys()
    assert {name.partition("/")[0] for name in new} == {"train"}
    assert len(new) == 3


def test_the_status_of_what_was_not_begun_is_no_error(fused: Fused, tmp_path: Path) -> None:
    said = " ".join(succeed("fuse", "status", fused.recipe, tmp_path / "new").split())
    assert said.startswith("nothing was begun yet: there is no ")


def test_status_marks_what_the_recipe_does_not_use(
    fused: Fused, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "not used" not in succeed("fuse", "status", fused.recipe, fused.out)

    def said_of(recipe: Path) -> str:
        return " ".join(succeed("fuse", "status", recipe, out).split())

    out = tmp_path / "out"
    shutil.copytree(f"{fused.out}.fusion", f"{out}.fusion")
    sources = [fused.gpt2, fused.mistral]
    other = write_recipe(
        tmp_path, fused.pivot, sources, fused.data, {"sft_baseline": True, "top_k": 4}
    )
    changed = said_of(other)
    assert "not used by this recipe (other top_k)" in changed
    assert "(follows distributions/gpt2-" in changed
    stay = [s for s in stages_of(fused.out) if re.match("data-|train/sft-|scores/", s)]
    assert changed.count("not used") == len(stages_of(fused.out)) - len(stay)
    fewer = write_recipe(tmp_path, fused.pivot, sources[:1], fused.data, {"sft_baseline": True})
    assert "not used by this recipe (mistral is not in the recipe)" in said_of(fewer)
    data = write_data(tmp_path / "data.jsonl", rows=20)
    moved = write_recipe(tmp_path, fused.pivot, sources, data, {"sft_baseline": True})
    assert "not used by this recipe (other dataset)" in said_of(moved)
    succeed("fuse", "collect", moved, out, "--quiet")
    assert "data is made anew, since it was made with other dataset" in caplog.text
    assert "distributions/gpt2 is made anew" not in caplog.text  # it follows the data


def test_status_and_inspect_show_what_is_there(fused: Fused) -> None:
    status = succeed("fuse", "status", fused.recipe, fused.out)
    for said in ("distributions/gpt2", "bits per byte", "label", "won by"):
        assert said in status
    shown = succeed("fuse", "inspect", fused.recipe, fused.out, "--row", "3", "--positions", "5")
    assert "row 3: gpt2 -> pivot" in shown
    assert "shared" in shown
    missing = run("fuse", "inspect", fused.recipe, fused.out, "--row", "99")
    assert missing.exit_code == 1
    assert "row 99 is not among the 24" in missing.output


def test_plan_check_and_dry_run_write_nothing(fused: Fused, tmp_path: Path) -> None:
    said = succeed("check", fused.recipe)
    assert "distribution_fusion, gpt2, mistral into the pivot pivot" in said
    # Long paths wrap the tree's lines.
    plan = succeed("plan", fused.recipe, "--out", tmp_path / "out")
    plan = " ".join(plan.replace("│", " ").split())
    for word in ("24 conversations", "GPT2LMHeadModel", "3 steps of 4", "disk", "licence"):
        assert word in plan
    assert re.search(r"training, \d times: under a minute of arithmetic", plan)
    words = json.loads((fused.pivot / "config.json").read_text())["vocab_size"]
    assert f"(2 x 4 conversations x 128 tokens x {words:,} words x 4 bytes)" in plan
    assert f"take up to {size(2 * 4 * 128 * words * 4)} more" in plan
    succeed("yaml", fused.recipe, tmp_path / "out", "--dry-run")
    assert list(tmp_path.iterdir()) == []


def write(folder: Path, fused: Fused, change: dict[str, Any]) -> Path:
    """The recipe with some of its keys changed; `settings` are those of the settings file."""
    settings = change.pop("settings", None)
    recipe = write_recipe(folder, fused.pivot, [fused.gpt2], fused.data, settings)
    data = yaml.safe_load(recipe.read_text())
    for key, value in change.items():
        if isinstance(value, dict):
            data[key] |= value
        else:
            data[key] = value
    recipe.write_text(yaml.safe_dump(data))
    return recipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parameters": {"dataset": ""}}, "names no `dataset`"),
        ({"parameters": {"dataset": "./none.jsonl"}}, "none.jsonl does not exist"),
        ({"parameters": {"learning_rte": 1}}, "Did you mean 'learning_rate'"),
        ({"parameters": {"learning_rate": -1}}, "learning_rate"),
        ({"settings": {"top_kk": 3}}, "no such setting. Did you mean 'top_k'"),
        ({"settings": {"top_k": 0}}, "top_k"),
        ({"settings": {"target": "best"}}, "target"),
        ({"models": []}, "'models'"),
        ({"slices": [{"sources": []}]}, "slices"),
        ({"base_model": None}, "needs a `base_model`"),
        ({"dtype": "bfloat16"}, "keeps the pivot's dtype"),
        ({"parameters": {"allow_nan": True}}, "cannot be fused"),
        ({"out_dtype": "bfloat16"}, "out_dtype"),
        ({"settings": {"columns": {"response": "reply"}}}, "reply"),
        ({"settings": {"max_length": 8}}, "max_length"),
        ({"settings": {"min_coverage": 1.0}}, "min_coverage"),
        ({"settings": {"alignment": "bytes", "vocabulary_map": "ms"}}, "vocabulary_map: ms"),
        ({"settings": {"training": {"learning_rate": 1}}}, "learning_rate"),
        ({"settings": {"training": {"no_such_argument": 1}}}, "no_such_argument"),
    ],
)
def test_bad_input_is_one_clear_error(
    fused: Fused, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    if "min_coverage" in str(change):
        change["models"] = [{"model": str(fused.mistral)}]
    recipe = write(tmp_path, fused, change)
    result = run("yaml", recipe, tmp_path / "out", "--quiet")
    assert result.exit_code == 1, result.output
    assert said in " ".join(result.output.split())
    assert result.output.startswith("Error: ")
    assert not (tmp_path / "out").exists()


def test_a_pivot_without_a_tokenizer_is_named(fused: Fused, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(fused.pivot, bare)
    for file in bare.glob("token*"):
        file.unlink()
    recipe = write(tmp_path, fused, {"base_model": str(bare)})
    result = run("check", recipe)
    assert result.exit_code == 1
    assert "bare has no tokenizer in its folder" in result.output


def test_a_source_that_gives_nan_is_named(fused: Fused, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(fused.gpt2, broken)
    weights = load_file(broken / "model.safetensors")
    weights["transformer.ln_f.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = write(tmp_path, fused, {"models": [{"model": str(broken)}]})
    result = run("yaml", recipe, tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert "broken gives NaN or infinity in row" in result.output


def test_a_bad_line_of_the_data_is_named(fused: Fused, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "response": "b"}\n{"instruction": \n')
    recipe = write(tmp_path, fused, {"parameters": {"dataset": str(bad)}})
    result = run("yaml", recipe, tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert "bad.jsonl:2" in result.output or "line 2" in result.output


def test_how_targets_are_merged_is_on_the_card_and_in_the_settings(fused: Fused) -> None:
    assert "sce_dense, select_topk 0.1" in (fused.out / "README.md").read_text()
    assert yaml.safe_load((fused.out / "fuse.yml").read_text())["post_merge_topk"] == 0.1


def test_a_source_that_is_gone_on_resume_is_named(fused: Fused, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(fused.gpt2, gone)
    recipe = write(tmp_path, fused, {"models": [{"model": str(gone)}]})
    succeed("fuse", "collect", recipe, tmp_path / "out", "--quiet")
    shutil.rmtree(gone)
    result = run("fuse", "align", recipe, tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert "gone" in result.output


def test_a_model_as_its_own_source_changes_no_target(fused: Fused, tmp_path: Path) -> None:
    """A source equal to the pivot gives the pivot's own next-token distributions everywhere."""
    import numpy as np

    from mergekit_unconstrained.fusion.distributions.store import Store
    from mergekit_unconstrained.fusion.feed import open_feed

    twin = tmp_path / "twin"
    shutil.copytree(fused.pivot, twin)
    change = {
        "models": [{"model": str(twin)}],
        "settings": {"target": "teacher", "top_k": 400, "rest": "renormalize"},
    }
    succeed("fuse", "target", write(tmp_path, fused, change), tmp_path / "out", "--quiet")
    (manifest,) = (m for n, m in stages_of(tmp_path / "out").items() if n.startswith("targets"))
    feed, _ = open_feed(manifest["results"]["feed"])
    encoded = feed.pivot.encoder.encode_many(feed.conversations)
    assert len(feed) == 19
    own = Store(Path(manifest["results"]["feed"]["sources"][0]["store"]))
    for conversation, one, target in zip(
        feed.conversations, encoded, feed.targets(feed.conversations, encoded), strict=True
    ):
        (record,) = own.read([conversation.row])
        assert target.used.all()
        dense = np.zeros((len(one.positions), 400))
        expected = np.zeros_like(dense)
        rows = np.arange(len(dense))[:, None]
        np.add.at(dense, (rows, np.maximum(target.ids, 0)), target.probs * (target.ids >= 0))
        np.add.at(expected, (rows, record.topk.ids), np.exp(record.topk.log_probs))
        np.testing.assert_allclose(dense, expected / expected.sum(1, keepdims=True), atol=1e-6)


def test_shuffling_gives_every_conversation_another_ones_distributions() -> None:
    from mergekit_unconstrained.fusion.feed import shuffled
    from mergekit_unconstrained.fusion.records import Conversation

    conversations = [Conversation(row, ()) for row in range(10, 40)]
    given = shuffled(conversations, seed=1)
    assert sorted(given) == list(range(10, 40))
    assert sorted(c.row for c in given.values()) == list(range(10, 40))
    assert all(row != other.row for row, other in given.items())
    assert given != shuffled(conversations, seed=2)


def test_tensor_by_tensor_front_ends_say_that_they_cannot(fused: Fused) -> None:
    from mergekit_unconstrained import compat
    from mergekit_unconstrained.errors import UnconstrainedError

    with pytest.raises(UnconstrainedError, match="takes whole models"):
        compat.get("distribution_fusion").merge_group(None)


@pytest.mark.slow
def test_two_processes_collect_and_train_what_one_does(fused: Fused, tmp_path: Path) -> None:
    from mergekit_unconstrained.fusion.distributions.store import Store

    figures = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        change = {"settings": {"processes": processes, "training": {"use_cpu": True}}}
        succeed("yaml", write(folder, fused, change), folder / "out", "--quiet")
        figures[processes] = json.loads((folder / "out" / "fusion.json").read_text())
        (store,) = (folder / "out.fusion").glob("distributions/gpt2-*/store")
        assert len(list(store.glob("*.parquet"))) == processes
        assert Store(store).rows == list(range(24))
    one, two = (figures[n]["held_out_bits_per_byte"]["this model"] for n in (1, 2))
    assert one["bits_per_byte"] == pytest.approx(two["bits_per_byte"], abs=1e-5)


def test_a_licence_with_a_word_on_distillation_is_warned_of(fused: Fused, tmp_path: Path) -> None:
    bound = tmp_path / "bound"
    shutil.copytree(fused.gpt2, bound)
    (bound / "README.md").write_text("---\nlicense: llama3\n---\n")
    recipe = write(tmp_path, fused, {"models": [{"model": str(bound)}]})
    said = succeed("fuse", "collect", recipe, tmp_path / "out", "--quiet")
    assert "Llama 3 Community License, the licence of bound, forbids" in " ".join(said.split())


@pytest.mark.parametrize("command", ["check", "plan", "yaml"])
def test_such_a_licence_is_warned_of_once_before_anything_is_done(
    fused: Fused, tmp_path: Path, command: str
) -> None:
    bound = tmp_path / "bound"
    shutil.copytree(fused.gpt2, bound)
    (bound / "README.md").write_text("---\nlicense: llama2\n---\n")
    recipe = write(tmp_path, fused, {"models": [{"model": str(bound)}]})
    rest = [tmp_path / "out", "--dry-run"] if command == "yaml" else []
    said = " ".join(succeed(command, recipe, *rest).split())
    assert said.count("the licence of bound, forbids using the model or its outputs") == 1


def test_a_source_that_teaches_nothing_and_a_training_that_diverges_are_warned_of(
    fused: Fused, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    deaf = tmp_path / "deaf"
    shutil.copytree(fused.gpt2, deaf)
    (deaf / "README.md").write_text("---\nlicense: llama2\n---\n")
    weights = load_file(deaf / "model.safetensors")
    weights["transformer.wte.weight"] *= 100  # sure of itself, and wrong
    save_file(weights, deaf / "model.safetensors", metadata={"format": "pt"})
    change = {"models": [{"model": str(deaf)}], "parameters": {"learning_rate": 3.0}}
    said = " ".join(succeed("yaml", write(tmp_path, fused, change), tmp_path / "out").split())
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    for text in (said, card):
        assert "deaf reads the responses worse than chance" in text
        assert "deaf won none of the sampled conversations" in text
    assert "training deaf made the held-out responses less likely" in said
    assert said.count("the licence of deaf, forbids using the model or its outputs") == 1


def test_a_source_that_teaches_something_is_not_warned_of(fused: Fused) -> None:
    card = (fused.out / "README.md").read_text()
    assert "worse than chance" not in card
    won = json.loads((fused.out / "fusion.json").read_text())["targets"]
    assert [f"Warning: {name}" in card for name in won] == [
        not target["won"][name] for name, target in won.items()
    ]
    assert any(target["won"][name] for name, target in won.items())


def wordpiece(folder: Path, fused: Fused) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(fused.gpt2, folder)
    words = models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": '{"question": "q", "text": "r"}'}, "has no response column"),
        (
            {"data": '{"question": "q", "answer": "r"}\n{"quest'},
            "bad.jsonl:2: this line is not JSON",
        ),
        ({"data": ""}, "holds no rows"),
        ({"settings": {"max_length": 8}}, "no row can be used"),
        ({"settings": {"max_length": 300}, "long": True}, "set `max_length: 256`"),
        ({"settings": {"max_length": 100}, "long": True}, "every response is longer than"),
        ({"template": "{{ messages[7].content }}"}, "chat template of"),
        ({"wordpiece": True, "settings": {"alignment": "dtw_fusechat"}}, "whatever the alignment"),
        ({"parameters": {"epochs": 2}}, "parameters.epochs: is given beside `max_steps`"),
        ({"settings": {"schedule": "cosin"}}, "settings.yml:5: schedule: 'cosin' is no schedule"),
    ],
)
def test_check_and_plan_refuse_what_the_run_would(
    fused: Fused, tmp_path: Path, command: str, change: dict[str, Any], said: str
) -> None:
    change = dict(change)
    if change.pop("long", False):
        change["data"] = json.dumps({"question": "q", "answer": "seven and two " * 200})
    if "data" in change:
        (tmp_path / "bad.jsonl").write_text(change.pop("data"))
        change["parameters"] = {"dataset": str(tmp_path / "bad.jsonl")}
    if "template" in change:
        (tmp_path / "t.jinja").write_text(change.pop("template"))
        own = {"chat_template": str(tmp_path / "t.jinja")}
        change["models"] = [{"model": str(fused.gpt2), "parameters": own}]
    if change.pop("wordpiece", False):
        change["models"] = [{"model": str(wordpiece(tmp_path / "words", fused))}]
    result = run(command, write(tmp_path, fused, change))
    assert result.exit_code == 1, result.output
    assert said in " ".join(result.output.split())


def test_plan_tells_of_rows_that_are_left_out_and_cut(fused: Fused, tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": a} for a in ("r", "seven and two " * 200, "", "s")]
    rows.append({"question": "seven and two " * 200, "answer": "r"})
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = write(tmp_path, fused, {"parameters": {"dataset": str(data)}})
    for command in ("check", "plan"):
        said = " ".join(succeed(command, recipe).replace("│", " ").split())
        assert "1 empty response (row 2)" in said
        assert "1 longer than max_length before its response begins (row 4)" in said
        assert "1 of the first 4 responses are cut by `max_length: 128`" in said


def test_the_disk_of_the_work_folder_is_the_one_that_counts(
    fused: Fused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_unconstrained.present import fusion as display

    asked = []
    monkeypatch.setattr(display, "free_space", lambda folder: asked.append(folder) or 1000)
    full = tmp_path / "full"
    recipe = write(tmp_path, fused, {"settings": {"work_dir": str(full)}})
    assert "only 1000 B free" in " ".join(succeed("plan", recipe).replace("│", " ").split())
    said = " ".join(succeed("fuse", "collect", recipe, tmp_path / "out", "--quiet").split())
    assert "1000 B are free there: make room" in said
    assert set(asked) == {full}


def test_distributions_of_another_tokenizers_version_are_noticed(
    fused: Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries can split a text otherwise than when the pivot's distributions were collected."""
    from mergekit_unconstrained.errors import DataError
    from mergekit_unconstrained.fusion.feed import open_feed

    (target,) = (m for name, m in stages_of(fused.out).items() if name.startswith("targets/gpt2"))
    feed, _ = open_feed(target["results"]["feed"])
    assert feed[0]["used"].any()
    as_it_was = feed.pivot.encoder.encode_many

    def otherwise(conversations: Any) -> Any:
        found = as_it_was(conversations)
        for one in found:
            one.ids[one.positions[-2]] += 1
        return found

    monkeypatch.setattr(feed.pivot.encoder, "encode_many", otherwise)
    with pytest.raises(DataError, match=r"row \d+: .* of pivot are for other tokens .* run again"):
        feed[0]
