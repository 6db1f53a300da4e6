"""Any list of models in one recipe: two Llama experts, a Qwen2 and a GPT-2 become one Llama."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from click.testing import CliRunner, Result

from mergekit_unconstrained.cli import main
from tests.fusion.conftest import make_tokenizer as make_tokenizer
from tests.fusion.tiny_fusion import save_model, write_data

WEIGHTS = {"llama_a": 0.8, "llama_b": 0.3}


class Models(NamedTuple):
    """Random models in one folder, by their names."""

    folder: Path
    data: Path

    def recipe(self, models: dict[str, dict[str, Any]], **parameters: Any) -> dict[str, Any]:
        """models: name -> its parameters."""
        entries = [{"model": str(self.folder / name)} for name in models]
        for entry, own in zip(entries, models.values(), strict=True):
            if own:
                entry["parameters"] = own  # type: ignore[assignment]
        return {
            "merge_method": "unconstrained",
            "base_model": str(self.folder / "llama_base"),
            "models": entries,
            "parameters": parameters,
            "dtype": "float32",
        }

    def mix(self, models: dict[str, dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """The recipe with what the fusion needs."""
        chosen = {"batch_size": 4, "device_batch_size": 4, "eval_share": 0, "max_length": 128}
        file = self.folder / "fuse.yml"
        file.write_text(yaml.safe_dump({**chosen, "pairing": "joint", **settings}))
        steps = {"max_steps": 2, "learning_rate": 1e-3}
        return self.recipe(models, dataset=str(self.data), settings=str(file), **steps)


def run(recipe: dict[str, Any], out: Path, command: str = "yaml") -> Result:
    path = out.with_name(f"{out.name}.yml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    rest = [str(out), "--quiet"] if command == "yaml" else []
    return CliRunner().invoke(main, [command, str(path), *rest])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., Any]) -> Models:
    folder = tmp_path_factory.mktemp("mixture")
    for seed, name in enumerate(("llama_base", "llama_a", "llama_b")):
        save_model(folder / name, make_tokenizer("metaspace"), "llama", seed)
    for seed, name in enumerate(("qwen2", "qwen2_too", "qwen2_base", "qwen2_other")):
        save_model(folder / name, make_tokenizer("byte_level"), "qwen2", 10 + seed)
    save_model(folder / "gpt2", make_tokenizer("gpt2"), "gpt2", 20)
    return Models(folder, write_data(folder / "data.jsonl", rows=12))


@pytest.fixture(scope="module")
def mixed(models: Models) -> Path:
    """Four models, three architectures, three tokenizers."""
    own: dict[str, dict[str, Any]] = {n: {"weight": w} for n, w in WEIGHTS.items()}
    out = models.folder / "mixture"
    result = run(models.mix({**own, "qwen2": {}, "gpt2": {}}), out)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return out


def test_four_models_become_one_that_loads_and_generates(mixed: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(mixed)
    assert model.config.model_type == "llama"
    tokenizer = AutoTokenizer.from_pretrained(mixed)
    ids = tokenizer("What is 3 plus 6?", return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert said.shape[1] == ids["input_ids"].shape[1] + 4


def test_the_card_lists_the_groups(mixed: Path) -> None:
    card = (mixed / "README.md").read_text()
    table = card[card.index("## Groups") : card.index("## Teachers")]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert [row.split("|")[1].strip() for row in rows] == ["llama", "qwen2", "gpt2"]
    assert all(f"`{name}`" in rows[0] or name in rows[0] for name in WEIGHTS)
    assert "into `llama`" in card


def test_both_sources_were_asked_and_one_target_was_trained(mixed: Path) -> None:
    work = Path(f"{mixed}.fusion")
    stages = {str(f.parent.relative_to(work)) for f in work.rglob("manifest.json")}
    kinds = sorted(name.rpartition("-")[0] for name in stages)
    assert kinds == [
        "alignment/gpt2",
        "alignment/qwen2",
        "data",
        "distributions/gpt2",
        "distributions/llama",
        "distributions/qwen2",
        "groups/llama",
        "targets/qwen2-gpt2",
        "train/qwen2-gpt2",
    ]


def test_the_weights_of_a_group_are_those_of_the_recipe(models: Models, mixed: Path) -> None:
    from safetensors.torch import load_file

    def weights(folder: Path) -> dict[str, Any]:
        return load_file(folder / "model.safetensors")

    (group,) = Path(f"{mixed}.fusion/groups").iterdir()
    base = weights(models.folder / "llama_base")
    experts = {name: weights(models.folder / name) for name in WEIGHTS}
    merged = weights(group / "llama")
    assert merged.keys() == base.keys()
    for name, start in base.items():
        first = start.double()
        expected = first + sum(w * (experts[e][name].double() - first) for e, w in WEIGHTS.items())
        assert merged[name].double().numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_models_of_one_architecture_alone_are_a_plain_layerwise_merge(
    models: Models, tmp_path: Path
) -> None:
    own: dict[str, dict[str, Any]] = {n: {"weight": w} for n, w in WEIGHTS.items()}
    recipe = models.recipe(own, operator="task_arithmetic")
    plain = {**recipe, "merge_method": "layerwise"}
    for name, one in (("mixed", recipe), ("plain", plain)):
        result = run(one, tmp_path / name)
        assert result.exit_code == 0, result.output
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("mixed", "plain")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "mixed.fusion").exists()


def test_a_model_that_is_alone_in_its_group_is_taken_as_it_is_unless_it_has_a_weight(
    models: Models, tmp_path: Path
) -> None:
    for own, groups in (({}, 0), ({"weight": 0.5, "base": str(models.folder / "qwen2_base")}, 1)):
        out = tmp_path / f"out{groups}"
        path = out.with_suffix(".yml")
        path.write_text(yaml.safe_dump(models.mix({"qwen2": own}), sort_keys=False))
        result = CliRunner().invoke(main, ["fuse", "collect", str(path), str(out), "--quiet"])
        assert result.exit_code == 0, result.output
        assert len(list(Path(f"{out}.fusion").glob("groups/*"))) == groups


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        ({}, {}, "give each of them `parameters: {base: MODEL}`"),
        ({"base": "qwen2_base"}, {"base": "qwen2_other"}, "name different bases"),
        ({"base": "qwen2_base", "weigth": 1}, {}, "Did you mean 'weight'"),
        ({"base": "gpt2"}, {"base": "gpt2"}, "GPT2LMHeadModel"),
    ],
)
def test_a_group_that_cannot_be_merged_is_one_clear_error(
    models: Models, tmp_path: Path, own: dict[str, Any], other: dict[str, Any], said: str
) -> None:
    entries = {"llama_a": {}, "qwen2": own, "qwen2_too": other}
    for parameters in (own, other):
        if "base" in parameters:
            parameters["base"] = str(models.folder / parameters["base"])
    recipe = models.mix(entries)
    for command in ("check", "yaml"):
        result = run(recipe, tmp_path / "out", command)
        assert result.exit_code == 1
        assert result.output.startswith("Error: ")
        assert said in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.fusion").exists()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"llama_a": {}, "qwen2": {"base": "gpt2"}}, "qwen2 names a base that it was not trained"),
        ({"llama_a": {"base": "llama_b"}, "qwen2": {}}, "llama_b, but that group is merged from"),
    ],
)
def test_a_base_that_would_be_ignored_is_refused(
    models: Models, tmp_path: Path, entries: dict[str, dict[str, Any]], said: str
) -> None:
    bases = {n: {k: str(models.folder / v) for k, v in own.items()} for n, own in entries.items()}
    result = run(models.mix(bases), tmp_path / "out", "check")
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize("base", ["llama_base", "qwen2_base"])
def test_a_base_that_is_the_groups_own_is_let_pass(
    models: Models, tmp_path: Path, base: str
) -> None:
    own = {"base": str(models.folder / base)}
    entries = {"llama_a": own, "qwen2": {}} if base == "llama_base" else {"qwen2": own}
    assert run(models.mix(entries), tmp_path / "out", "check").exit_code == 0


# -- the zoo --------------------------------------------------------------------------------------


def knowledge(folder: Path, family: str) -> list[float]:
    """Log-likelihood of the outcomes of every verb and letter of a family, in nats."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mergekit_unconstrained.demo.zoo import Zoo
    from mergekit_unconstrained.demo.zoo_scores import fact_likelihoods

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return fact_likelihoods(model, AutoTokenizer.from_pretrained(folder), Zoo(), family)


@pytest.mark.slow
def test_leaving_any_parent_of_the_zoo_out_lowers_its_skill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acceptance 3 of fusion: by the log-likelihood of its family's outcomes, fact by fact.

    The interval is that of the paired difference: both models are asked the same 64 facts.
    """
    from mergekit_unconstrained.demo import zoo_models, zoo_scores

    root = Path(__file__).resolve().parent.parent
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(root / "recipes")
    made = CliRunner().invoke(zoo_models.main, ["zoo"])
    assert made.exit_code == 0, made.output
    recipe = yaml.safe_load((root / "recipes/zoo/mix.yml").read_text())
    assert run(recipe, tmp_path / "mixture").exit_code == 0
    for left_out in ("llama_a", "llama_b", "qwen2", "gpt2"):
        others = [m for m in recipe["models"] if m["model"] != f"zoo/{left_out}"]
        out = tmp_path / f"without_{left_out}"
        assert run({**recipe, "models": others}, out).exit_code == 0
        with_it, without = (knowledge(f, left_out) for f in (tmp_path / "mixture", out))
        lost = [a - b for a, b in zip(with_it, without, strict=True)]
        score = zoo_scores.Score.of(lost)
        print(json.dumps({left_out: [score.mean, score.error]}))
        assert score.mean - 1.96 * score.error > 0, left_out
        assert math.fsum(with_it) / len(with_it) > -2.0, left_out


def test_without_resume_a_fresh_work_folder_is_no_obstacle_to_its_own_groups(
    models: Models, tmp_path: Path
) -> None:
    own: dict[str, dict[str, Any]] = {n: {"weight": w} for n, w in WEIGHTS.items()}
    recipe = models.mix({**own, "gpt2": {}}, resume=False)
    result = run(recipe, tmp_path / "out")
    assert result.exit_code == 0, result.output
    again = run(recipe, tmp_path / "out2")
    assert again.exit_code == 0, again.output
    (tmp_path / "out3.fusion" / "left").mkdir(parents=True)
    refused = run(recipe, tmp_path / "out3")
    assert refused.exit_code == 1
    assert "resume: false" in refused.output


def test_status_of_a_recipe_that_fuses_nothing_says_so(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "one.yml"
    path.write_text(yaml.safe_dump(models.recipe({"llama_a": {}, "llama_b": {}})))
    result = CliRunner().invoke(main, ["fuse", "status", str(path), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "nothing is fused" in result.output
