"""`evaluate` from the command line to the files it leaves; models as they are loaded."""

from __future__ import annotations

import csv
import hashlib
import json
import statistics
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.errors import ModelError, OutputError
from mergekit_unconstrained.evaluation.loading import check_there, fingerprint
from mergekit_unconstrained.evaluation.records import Message
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.jobs.evaluating import evaluate_models, folder_names

ROWS = [{"prompt": f"{a}+1=", "target": str(a + 1)} for a in range(6)]


@pytest.fixture(scope="module")
def models(tmp_path_factory, random_model, byte_tokenizer):
    """Two folders, and an adapter of the first."""
    import peft

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        model = random_model(seed=seed).float()
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    told = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's words for transformers
        peft.get_peft_model(random_model().float(), told).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def tasks(write_tasks):
    return write_tasks(
        {
            "likely": {"kind": "likelihood", "data": "sums.jsonl"},
            "sums/1": {"kind": "numeric", "data": "sums.jsonl", "max_new_tokens": 3},
        },
        sums=ROWS,
    )


def test_the_command_prints_and_saves_one_table(models, tasks, tmp_path):
    names = [str(models / "first"), str(models / "second"), f"{models}/first+{models}/adapter"]
    out, cache = tmp_path / "out", tmp_path / "cache"
    told = ["--tasks", str(tasks), "--out", str(out), "--cache", str(cache), "--limit", "5"]
    result = CliRunner().invoke(main, ["evaluate", *names, *told, "--batch-size", "2"])
    assert result.exit_code == 0, result.output
    assert "nats per byte" in result.output
    assert "n = 5" in result.output
    saved = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert list(saved["models"]) == names
    assert saved["tasks"]["likely"]["unit"] == "nats per byte"
    values = {}
    for name, short in zip(names, ("first", "second", "first+adapter"), strict=True):
        file = out / "examples" / short / "likely.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert [row["target"] for row in rows] == [row["target"] for row in ROWS[:5]]
        mean = sum(row["value"] for row in rows) / 5
        told = saved["models"][name]["tasks"]["likely"]
        assert (told["mean"], told["n"]) == (pytest.approx(mean), 5)
        values[name] = told["mean"]
        assert (out / "examples" / short / "sums_1.jsonl").exists()
    assert len(set(values.values())) == 3
    kept = [out / "examples" / m / "likely.jsonl" for m in ("first", "second")]
    one, two = ([json.loads(x)["value"] for x in f.read_text().splitlines()] for f in kept)
    spread = statistics.stdev(a - b for a, b in zip(one, two, strict=True)) / 5**0.5
    assert saved["paired"]["likely"][names[0]][names[1]] == pytest.approx(spread)
    data = saved["data"]["likely"]
    (file,) = tasks.parent.glob("sums.jsonl")
    assert data == {
        "name": "sums.jsonl",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "hashed": "file",
        "licence": None,
        "n": 5,
    }
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table.count(" ± 0.") + table.count(" ± 1.") + table.count(" ± 2.") == 6
    assert "n = 5" in table
    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert not [path for path in out.rglob("*") if "partial" in path.name]


def test_known_scores_are_taken_and_equal(models, tasks, tmp_path, monkeypatch):
    names, cache = [str(models / "first")], tmp_path / "cache"
    (first,) = evaluate_models(names, tasks, cache=cache)

    def refuse(*_, **__):
        raise AssertionError("asked again")

    monkeypatch.setattr(Subject, "log_likelihoods", refuse)
    monkeypatch.setattr(Subject, "continuations", refuse)
    (second,) = evaluate_models(names, tasks, cache=cache)
    assert first == second


def test_an_adapter_is_applied(models):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    subject = Subject.load(f"{models}/first+{models}/adapter")
    base = AutoModelForCausalLM.from_pretrained(models / "first", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.PeftModel.from_pretrained(base, models / "adapter")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        found, right = subject.model(ids).logits, adapted(ids).logits
        adapted.disable_adapter_layers()
        plain = adapted(ids).logits
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)


def test_weights_are_named_by_what_the_files_hold(models, tmp_path):
    import shutil

    plain = Subject.load(str(models / "first"))
    assert plain.weights == Subject.load(str(models / "first")).weights
    assert plain.weights != Subject.load(str(models / "second")).weights
    assert plain.weights != Subject.load(f"{models}/first+{models}/adapter").weights
    half = Subject.load(str(models / "first"), dtype="bfloat16")
    assert plain.weights != half.weights
    assert str(half.model.dtype) == "torch.bfloat16"
    shutil.copytree(models / "first", tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("A card.")
    assert fingerprint([tmp_path / "copy"], "float32") == plain.weights
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ 1 }}")
    assert fingerprint([tmp_path / "copy"], "float32") != plain.weights


def test_a_folder_with_a_plus_in_its_name_is_a_folder(models, tmp_path):
    (tmp_path / "a+b").symlink_to(models / "first")
    subject = Subject.load(str(tmp_path / "a+b"))
    assert len(subject.generate([[Message("user", "x")]], max_new_tokens=2)) == 1


def broken(models, tmp_path, what):
    """A copy of the first model with something wrong."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(models / "first", folder)
    weights = folder / "model.safetensors"
    if what == "config":
        (folder / "config.json").unlink()
    elif what == "weights":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "tensor":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("config", "is no model folder: it has no config.json"),
        ("weights", "has no weights as safetensors"),
        ("tensor", "is incomplete: its files lack 1 weights, model.layers.1.mlp.down_proj"),
        ("cut", "cannot be loaded"),
        ("tokenizer", "the tokenizer of .* cannot be loaded"),
    ],
)
def test_a_broken_model_is_one_clear_error(models, tmp_path, what, told):
    with pytest.raises(ModelError, match=told) as error:
        Subject.load(broken(models, tmp_path, what))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./none", "there is no model folder './none'"),
        ("none", "there is no model folder 'none'"),
        ("nobody/nothing-at-all", "neither a folder here nor a readable model on the Hub"),
        ("FIRST+", r"a model and its adapter are written MODEL\+ADAPTER"),
        ("FIRST+./none", "there is no adapter folder './none'"),
        ("FIRST+SECOND", "is no adapter folder: it has no adapter_config.json"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_error(models, name, told):
    name = name.replace("FIRST", str(models / "first")).replace("SECOND", str(models / "second"))
    with pytest.raises(ModelError, match=told):
        Subject.load(name)


def test_a_device_or_dtype_that_is_not_there_is_one_clear_error(models):
    with pytest.raises(ModelError, match="there is no device 'warp'"):
        Subject.load(str(models / "first"), device="warp")
    with pytest.raises(ModelError, match="no dtype is called 'int3'"):
        Subject.load(str(models / "first"), dtype="int3")


def test_the_command_tells_mistakes_in_one_line(models, tasks, tmp_path):
    first = str(models / "first")
    (tmp_path / "file").write_text("")
    for arguments, told in [
        ([first, first, "--tasks", str(tasks)], "is named twice"),
        ([first, "--tasks", "none.yml"], "tasks file 'none.yml' does not exist"),
        ([first, "--tasks", str(tasks), "--split", "search"], "has no 'search' split"),
        ([first, "--tasks", str(tasks), "--out", str(tmp_path / "file")], "cannot be made"),
        ([str(tmp_path / "no"), "--tasks", str(tasks)], "there is no model folder"),
    ]:
        result = CliRunner().invoke(main, ["evaluate", *arguments])
        assert result.exit_code == 1, result.output
        assert told in " ".join(result.output.split())
        assert isinstance(result.exception, SystemExit)


def test_a_disk_that_refuses_is_one_clear_error(models, tasks, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"cannot write .*scores.json': No space left"):
        evaluate_models([str(models / "first")], tasks, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("./none", "there is no model folder './none'"),
        ("FIRST+./none", "there is no adapter folder './none'"),
        ("BROKEN", "has no weights as safetensors"),
    ],
)
def test_every_model_is_looked_for_before_the_first_is_loaded(
    models, tasks, tmp_path, monkeypatch, last, told
):
    def refuse(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(Subject, "load", refuse)
    last = last.replace("FIRST", str(models / "first"))
    if last == "BROKEN":
        last = broken(models, tmp_path, "weights")
    out = tmp_path / "out"
    with pytest.raises(ModelError, match=told):
        evaluate_models([str(models / "first"), last], tasks, out=out)
    assert not out.exists()


def test_an_index_that_names_a_file_too_many_is_told(models, tmp_path):
    folder = Path(broken(models, tmp_path, ""))
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"is incomplete: model-2.safetensors of its index"):
        check_there(str(folder))


def test_a_folder_of_something_else_is_left_alone(models, tasks, tmp_path):
    for name, text in [("notes.txt", "mine"), ("scores.json", "{}"), ("scores.json", "no JSON")]:
        out = tmp_path / f"out{len(text)}"
        out.mkdir()
        (out / name).write_text(text)
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="no earlier output of `evaluate`"):
                evaluate_models([str(models / "first")], tasks, out=out, overwrite=overwrite)
        assert [(f.name, f.read_text()) for f in out.iterdir()] == [(name, text)]


def test_scores_of_two_commands_do_not_mix(models, tasks, write_tasks, tmp_path):
    first, second = str(models / "first"), str(models / "second")
    out, cache = tmp_path / "out", tmp_path / "cache"
    told = {"out": out, "cache": cache}
    evaluate_models([first], tasks, **told)
    evaluate_models([first], tasks, **told)  # the same again
    evaluate_models([first, second], tasks, **told)  # as after a run that was killed
    before = (out / "scores.json").read_text()
    with pytest.raises(OutputError, match=f"another model, {second}: .*--overwrite"):
        evaluate_models([first], tasks, **told)
    with pytest.raises(OutputError, match="scores of --limit none: "):
        evaluate_models([first, second], tasks, limit=2, **told)
    task = {"kind": "likelihood", "data": "sums.jsonl"}
    changed = write_tasks({"likely": {**task, "end": False}, "sums/1": task})
    with pytest.raises(
        OutputError, match="scores of the task likely with other settings or examples: "
    ):
        evaluate_models([first, second], changed, **told)
    data = write_tasks({"likely": task, "sums/1": task}, sums=ROWS[1:])
    with pytest.raises(OutputError, match="of the task likely with other settings or examples: "):
        evaluate_models([first, second], data, **told)
    fewer = write_tasks({"likely": task}, sums=ROWS)
    with pytest.raises(OutputError, match="scores of other tasks, likely, sums/1: "):
        evaluate_models([first, second], fewer, **told)
    assert (out / "scores.json").read_text() == before
    arguments = ["evaluate", first, "--tasks", str(fewer), "--out", str(out), "--overwrite"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert list(json.loads((out / "scores.json").read_text())["models"]) == [first]
    left = [str(file.relative_to(out)) for file in out.glob("examples/*/*")]
    assert left == ["examples/first/likely.jsonl"]


def test_models_get_folders_of_their_own():
    names = ["a/x", "b/x/", "x+l/y", "o/n@main", "..", "C:\\m\\z"]
    assert list(folder_names(names).values()) == ["x", "x-2", "x+y", "n@main", "unnamed", "z"]
    assert list(folder_names(["a/x", "b/X"]).values()) == ["x", "X-2"]  # one file on some disks
    assert Path(folder_names(["../../etc"])["../../etc"]).name == "etc"


def test_failures_are_told_with_their_reason(models, tasks):
    from mergekit_unconstrained.present import evaluation as display

    (found,) = evaluate_models([str(models / "first")], tasks)
    stuck = sum("did not stop" in one.failure for one in found["sums/1"].scored)
    lines = display.failures([found])
    assert stuck == 0 or f"{stuck} of 6 examples failed" in lines[0]
    assert ("did not stop within 3 tokens" in display.markdown([found])) == bool(stuck)
