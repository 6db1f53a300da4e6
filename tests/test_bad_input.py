"""Bad input gives one clear error and leaves no half-written output.

Every case goes through our own command, which is mergekit-yaml's path from the hook on; what the
hook adds is tested in test_front_ends.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.config.first_look import read_recipe
from tests.conftest import TinyModels

Recipe = dict[str, Any]


@pytest.fixture
def workplace(tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of a base and two experts, and the current directory."""
    for name, source in zip(
        ("base", "math", "code"), (tiny_models.base, *tiny_models.experts[:2]), strict=True
    ):
        shutil.copytree(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def good() -> Recipe:
    return {
        "merge_method": "layerwise",
        "base_model": "base",
        "models": [
            {"model": "math", "parameters": {"weight": 0.5}},
            {"model": "code", "parameters": {"weight": 0.3}},
        ],
        "dtype": "bfloat16",
    }


def run(recipe: Recipe | str, *arguments: str, command: str = "yaml") -> Result:
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)
    Path("recipe.yml").write_text(text)
    out = ["out"] if command == "yaml" else []
    return CliRunner().invoke(main, [command, "recipe.yml", *out, *arguments])


def refused(result: Result, *words: str) -> None:
    """One line, exit status 1, nothing under the final name."""
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    message = " ".join(result.output.split("Error: ")[-1].split())
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "recipe 'recipe.yml' does not exist"),
        ("merge_method: [", "recipe.yml:1: this is not YAML"),
        ("- a", "a recipe is a mapping"),
        ("models: []", "names no `merge_method`"),
        (
            "merge_method: layerwise\nmodels:\n- model: ./maths",
            "recipe.yml:3: models[0].model: the model folder ./maths does not exist",
        ),
        (
            "merge_method: linear\nbase_model: base+/no/adapter",
            "recipe.yml:2: base_model: the adapter folder /no/adapter does not exist",
        ),
    ],
)
def test_what_can_be_seen_in_the_recipe_is_refused_before_torch_is_imported(
    tmp_path: Path, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / "recipe.yml").write_text(text)
    code = "import sys\nfrom mergekit_unconstrained.cli import main\n"
    code += "try: main(['yaml', 'recipe.yml', 'out'])\n"
    code += "except SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stderr
    assert words in " ".join(said.split())
    assert said.endswith("False\n")


@pytest.mark.usefixtures("workplace")
def test_the_first_look_knows_what_mergekit_makes_of_a_models_name() -> None:
    text = "merge_method: linear\nmodels:\n- model: ./math@main+./code@main\n- model: org/name\n"
    Path("recipe.yml").write_text(text)
    assert len(read_recipe("recipe.yml").data["models"]) == 2


def edit_config(model: str, **changes: Any) -> None:
    path = Path(model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(model: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = Path(model) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})


def test_a_good_recipe_passes_the_check_and_runs(workplace: Path) -> None:
    checked = run(good(), command="check")
    assert checked.exit_code == 0, checked.output
    assert "all right" in checked.output
    result = run(good())
    assert result.exit_code == 0, result.output
    assert Path("out/model.safetensors").exists()
    assert not Path("out.partial").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(modles=r.pop("models")), ["modles", "'models'"]),
        (lambda r: r.update(basemodel="base"), ["basemodel", "Did you mean 'base_model'"]),
        (lambda r: r["models"][1].update(paramters={}), ["models[1].paramters", "'parameters'"]),
        (
            lambda r: r["models"][0]["parameters"].update(wieght=1),
            ["recipe.yml:", "models[0].parameters.wieght", "Did you mean 'weight'"],
        ),
        (lambda r: r.update(parameters={"allow_nans": True}), ["allow_nans", "'allow_nan'"]),
        (lambda r: r.update(parameters={"allow_nan": 1}), ["allow_nan", "true or false"]),
        (lambda r: r.update(parameters={"operator": "tise"}), ["operator", "Did you mean 'ties'"]),
        (lambda r: r.update(parameters={"lambda": "much"}), ["lambda", "'much'"]),
        (lambda r: r.update(parameters={"lambda": float("nan")}), ["lambda", "finite"]),
        (lambda r: r.update(parameters={"seed": 1.5}), ["seed", "1.5"]),
        (lambda r: r["models"][0]["parameters"].update(density=1.5), ["density", "1.5"]),
        (
            lambda r: r["models"][0]["parameters"].update({"lambda": 1.0}),
            ["models[0].parameters.lambda", "whole merge"],
        ),
        (
            lambda r: r["models"][0]["parameters"].update(allow_nan=True),
            ["allow_nan", "whole merge"],
        ),
        (lambda r: r["models"][0].pop("parameters"), ["no weight for math"]),
        (lambda r: r["models"][0]["parameters"].update(weight=[]), ["empty list"]),
        (lambda r: r["models"][0]["parameters"].update(weight=[1, 2, 3, 4, 5]), ["5 points"]),
        (
            lambda r: r["models"][0]["parameters"].update(weight=[{"filter": "mpl", "value": 1}]),
            ["'mpl' matches no tensor", "'mlp'"],
        ),
        (
            lambda r: r["models"][0]["parameters"].update(weight=[{"filtre": "mlp", "value": 1}]),
            ["filtre", "'filter'"],
        ),
        (lambda r: r["models"][0]["parameters"].update(weight=[{"filter": "mlp"}]), ["no `value`"]),
        (
            lambda r: r["models"].append({"model": "base", "parameters": {"weight": 1}}),
            ["models[2].parameters.weight", "is the base"],
        ),
        (
            lambda r: r["models"][0]["parameters"].update(density=0.5),
            ["models[0].parameters.density", "nothing to operator 'task_arithmetic'", "ties"],
        ),
        (lambda r: r.update(parameters={"epsilon": 0.1}), ["'epsilon' means nothing", "della"]),
        (lambda r: r.pop("base_model"), ["needs a `base_model`"]),
        (lambda r: r.pop("merge_method"), ["merge_method"]),
        (
            lambda r: r.update(merge_method="layrwise"),
            [
                "recipe.yml:",
                "merge_method: Unimplemented",
                "'layrwise'",
                "Did you mean 'layerwise'",
            ],
        ),
        (lambda r: r["models"].append({"model": "./none"}), ["./none does not exist"]),
        (lambda r: r.update(base_model="no/such/base"), ["no/such/base does not exist"]),
        (lambda r: r.update(models=[]), ["models"]),
        (lambda r: r.update(models="math"), ["models"]),
        (
            lambda r: (
                r.update(parameters={"operator": "della"})
                or r["models"][0]["parameters"].update(density=0.1)
            ),
            ["della needs density - epsilon > 0"],
        ),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_place_and_the_right_word(
    workplace: Path, change: Callable[[Recipe], object], words: list[str]
) -> None:
    recipe = good()
    change(recipe)
    refused(run(recipe), *words)


def test_a_number_that_pyyaml_reads_as_a_string_is_a_number(workplace: Path) -> None:
    recipe = yaml.safe_dump(good()).replace("0.5", "5e-6").replace("0.3", "'0.3'")
    assert run(recipe, command="check").exit_code == 0


def test_text_that_is_not_yaml_names_the_line(workplace: Path) -> None:
    refused(run("merge_method: layerwise\nmodels: [\n  - x\n"), "recipe.yml:3", "not YAML")


def test_a_repeated_key_is_not_silently_dropped(workplace: Path) -> None:
    refused(run(yaml.safe_dump(good()) + "dtype: float32\n"), "dtype", "twice")


def test_a_recipe_that_is_not_there_is_said_to_be_missing(workplace: Path) -> None:
    result = CliRunner().invoke(main, ["yaml", "none.yml", "out"])
    refused(result, "'none.yml' does not exist")


# -- parents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ["rope_parameters"]),
        ({"rms_norm_eps": 1e-3}, ["rms_norm_eps is 0.001 in code"]),
        ({"num_attention_heads": 8, "head_dim": 8}, ["num_attention_heads is 8 in code"]),
        ({"hidden_act": "gelu"}, ["hidden_act"]),
        ({"tie_word_embeddings": True}, ["code ties its head", "base does not"]),
        ({"num_hidden_layers": 3}, ["number of layers", "code has 3"]),
        ({"vocab_size": 300}, ["vocabulary of 300", "tokenizer: {source: base}"]),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
            ["MistralForCausalLM"],
        ),
    ],
)
def test_an_expert_whose_config_means_something_else_is_refused(
    workplace: Path, changes: dict[str, Any], words: list[str]
) -> None:
    edit_config("code", **changes)
    refused(run(good()), *words)


def test_allow_crimes_lets_a_different_setting_pass(workplace: Path) -> None:
    edit_config("code", rms_norm_eps=1e-3)
    assert run(good(), "--allow-crimes").exit_code == 0


def test_an_expert_of_another_shape_is_refused(workplace: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = torch.zeros(200, 64, dtype=torch.bfloat16)

    edit_weights("code", widen)
    refused(run(good()), "model.layers.1.mlp.up_proj.weight", "[200, 64] in code", "[128, 64]")


def test_a_missing_tensor_is_named(workplace: Path) -> None:
    edit_weights("code", lambda t: t.pop("model.layers.2.self_attn.q_proj.weight"))
    refused(run(good()), "code has no tensor model.layers.2.self_attn.q_proj.weight")


def test_a_grown_vocabulary_is_refused_with_the_hint_and_merged_when_the_recipe_says_how(
    workplace: Path,
) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(2, 64, dtype=torch.bfloat16)])

    edit_config("code", vocab_size=258)
    edit_weights("code", grow)
    refused(run(good()), "vocabulary of 258", "tokenizer: {source: base}")
    recipe = good() | {"tokenizer": {"source": "base"}}
    result = run(recipe)
    assert result.exit_code == 0, result.output
    assert load_file("out/model.safetensors")["lm_head.weight"].shape == (256, 64)


def test_tokenizers_that_disagree_are_refused(workplace: Path) -> None:
    path = Path("code/tokenizer.json")
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(content))
    refused(run(good()), "the tokenizers differ", "tokenizer: {source: base}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("model", ["base", "code"])
def test_nan_in_a_weight_names_model_and_tensor_and_allow_nan_goes_on(
    workplace: Path, model: str, value: float
) -> None:
    name = "model.layers.3.mlp.down_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = value

    edit_weights(model, spoil)
    refused(run(good()), name, f"of {model}", "1 of 8,192", "allow_nan: true")
    result = run(good() | {"parameters": {"allow_nan": True}})
    assert result.exit_code == 0, result.output
    merged = load_file("out/model.safetensors")[name]
    assert not torch.isfinite(merged[3, 5])
    assert int((~torch.isfinite(merged)).sum()) == 1


def test_a_result_that_overflows_its_dtype_is_refused(workplace: Path) -> None:
    recipe = good()
    recipe["dtype"] = "float16"
    recipe["models"][0]["parameters"]["weight"] = 1e9
    refused(run(recipe), "overflows float16")


def test_a_truncated_file_is_found_before_anything_is_written(workplace: Path) -> None:
    path = Path("math/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    refused(run(good()), "model.safetensors of math", "cut short by 100 bytes")


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 10**9) + b"{}", b"x" * 64])
def test_a_file_that_is_not_safetensors_is_named(workplace: Path, content: bytes) -> None:
    Path("math/model.safetensors").write_bytes(content)
    refused(run(good()), "model.safetensors of math", "fetch it again")


def test_a_missing_shard_is_named(workplace: Path) -> None:
    Path("math/model.safetensors").unlink()
    weight_map = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    Path("math/model.safetensors.index.json").write_text(json.dumps(weight_map))
    refused(run(good()), "model-00001-of-00002.safetensors", "missing")


def test_a_folder_without_config_or_weights_is_named(workplace: Path) -> None:
    Path("code/model.safetensors").unlink()
    refused(run(good()), "code has no weights")
    Path("code/config.json").unlink()
    refused(run(good()), "code is not a model folder", "config.json")


def test_an_adapter_that_is_none_is_refused(workplace: Path) -> None:
    recipe = good()
    recipe["models"][0]["model"] = "math+adapter"
    refused(run(recipe), "adapter")
    Path("deep/er/adapter").mkdir(parents=True)
    recipe["models"][0]["model"] = "math+deep/er/adapter"
    refused(run(recipe), "not a PEFT adapter", "adapter_config.json")


# -- coefficient tables ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"layers": 5, "experts": {"math": 1, "code": 1}}, ["for 5 layers", "the output has 4"]),
        (
            {
                "layers": 4,
                "experts": {"math": {"default": {"weight": 1, "density": 0.5}}, "code": 1},
            },
            ["density", "means nothing to operator"],
        ),
        ({"layers": 4, "experts": {"math": 1, "coed": 1}}, ["no such expert", "'code'"]),
        ({"layers": 4, "experts": {"math": {"layers": {"4": 1}}, "code": 1}}, ["last layer (3)"]),
        (
            {"layers": 4, "experts": {"math": {"layers": {"0": 1}}, "code": 1}},
            ["no weight for math"],
        ),
        (
            {
                "layers": 4,
                "experts": {"math": {"default": 1, "layers": {0: {"qkv": 1}}}, "code": 1},
            },
            ["kind 'qkv'"],
        ),
        ({"layers": 4, "experts": {"math": 1, "code": {"default": 1, "heads": 1}}}, ["'head'"]),
    ],
)
def test_a_table_for_something_else_is_refused(
    workplace: Path, table: dict[str, Any], words: list[str]
) -> None:
    recipe = good()
    for model in recipe["models"]:
        del model["parameters"]
    recipe["parameters"] = {"coefficients": "table.yml"}
    Path("table.yml").write_text(yaml.safe_dump(table))
    refused(run(recipe), *words)


def test_a_table_that_is_not_there_is_named(workplace: Path) -> None:
    recipe = good() | {"parameters": {"coefficients": "none.yml"}}
    refused(run(recipe), "coefficient table 'none.yml' does not exist")


# -- slices ----------------------------------------------------------------------------------------


def slices(*ranges: list[int]) -> Recipe:
    recipe = good()
    models = recipe.pop("models")
    models.append({"model": "base"})
    recipe["slices"] = [{"sources": [{**m, "layer_range": r} for m in models]} for r in ranges]
    return recipe


def test_slices_outside_the_model_are_refused(workplace: Path) -> None:
    refused(run(slices([0, 2], [2, 5])), "slices[1].sources[0].layer_range", "4 layers")
    refused(run(slices([2, 2])), "holds no layer")


def test_a_table_counts_the_layers_of_the_output_whatever_the_slices(workplace: Path) -> None:
    recipe = slices([0, 2], [3, 4])
    for source in (s for piece in recipe["slices"] for s in piece["sources"]):
        source.pop("parameters", None)
    table = {"layers": 3, "experts": {"math": {"default": 0, "layers": {2: 1.0}}, "code": 0}}
    Path("table.yml").write_text(yaml.safe_dump(table))
    recipe["parameters"] = {"coefficients": "table.yml"}
    result = run(recipe)
    assert result.exit_code == 0, result.output
    merged = load_file("out/model.safetensors")
    base, expert = load_file("base/model.safetensors"), load_file("math/model.safetensors")
    for kind in ("mlp.up_proj.weight", "self_attn.q_proj.weight"):
        name = "model.layers.{}." + kind
        assert torch.equal(merged[name.format(1)], base[name.format(1)])
        assert torch.equal(merged[name.format(2)], expert[name.format(3)])


# -- the output ------------------------------------------------------------------------------------


def test_a_non_empty_output_folder_is_refused_and_left_alone(workplace: Path) -> None:
    Path("out").mkdir()
    Path("out/precious").write_text("x")
    result = run(good())
    assert result.exit_code == 1
    assert "out exists and is not empty" in result.output
    assert Path("out/precious").read_text() == "x"


def test_an_empty_output_folder_is_used(workplace: Path) -> None:
    Path("out").mkdir()
    assert run(good()).exit_code == 0
    assert Path("out/model.safetensors").exists()


def test_a_disk_that_is_too_small_is_seen_before_the_work(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(run(good()), "GiB free", "make room")


def test_a_disk_that_fills_up_on_the_way_loses_nothing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mergekit.io.tensor_writer as writer

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer.TensorWriter, "finalize", full)
        recipe = {**good(), "parameters": {"engine": "mergekit"}}
        refused(run(recipe), "the disk is full", "run the same command again")
    assert run(good()).exit_code == 0
    assert not Path("out.partial").exists()


# -- what a trial by a stranger brought up ---------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(dtype="bf16"), ["recipe.yml:", "'bf16'", "Did you mean 'bfloat16'"]),
        (lambda r: r.update(out_dtype="int8"), ["'int8'", "float16"]),
        (lambda r: r.update(tokenizer={"source": "bse"}), ["'bse' is no model", "'base'"]),
        (lambda r: r.update(tokenizer_source="unoin"), ["'unoin' is no model", "'union'"]),
        (
            lambda r: r.update(tokenizer={"source": "base", "tokens": {"A": {"sorce": "math"}}}),
            ["tokenizer.tokens.A.sorce", "'source'"],
        ),
        (lambda r: r.update(chat_template="chatl"), ["chat_template", "'chatl'"]),
        (lambda r: r.update(modules={"defualt": {"models": r.pop("models")}}), ["'default'"]),
        (lambda r: r["models"].append(dict(r["models"][0])), ["models[2].model", "twice"]),
        (lambda r: r["models"][0]["parameters"].update(weight=True), ["a number, not True"]),
        (lambda r: r.update(parameters={"operator": ["ties", "sce"]}), ["takes one value"]),
        (lambda r: r["models"][0].update(model=3), ["recipe.yml:", "models[0].model", "3"]),
        (lambda r: r.update(parameters={"operator": "linear"})
         or r["models"][1]["parameters"].update(weight=-0.5), ["sum of the weights"]),
        (
            lambda r: r.update(out_dtype="float16", dtype="float32")
            or r["models"][0]["parameters"].update(weight=1e9),
            ["overflows float16"],
        ),
    ],
)  # fmt: skip
def test_a_recipe_that_only_mergekit_would_trip_over_is_refused(
    workplace: Path, change: Callable[[Recipe], object], words: list[str]
) -> None:
    recipe = good()
    change(recipe)
    refused(run(recipe), *words)


def test_a_setting_that_only_the_expert_has_is_seen(workplace: Path) -> None:
    edit_config("code", attention_multiplier=2.0)
    refused(run(good()), "attention_multiplier is 2.0 in code but None")


def test_a_renamed_word_of_the_vocabulary_is_refused(workplace: Path) -> None:
    path = Path("code/tokenizer.json")
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["zz5"] = vocabulary.pop("A")
    path.write_text(json.dumps(content))
    refused(run(good()), "the tokenizers differ", "'zz5'", "'A'")


def test_parents_in_bin_files_merge_and_are_checked_alike(workplace: Path) -> None:
    path = Path("code/model.safetensors")
    tensors = load_file(path)
    path.unlink()
    torch.save(tensors, "code/pytorch_model.bin")
    assert run(good()).exit_code == 0
    shutil.rmtree("out")
    del tensors["model.norm.weight"]
    torch.save(tensors, "code/pytorch_model.bin")
    refused(run(good()), "code has no tensor model.norm.weight")
    Path("code/pytorch_model.bin").write_bytes(b"\x80\x04damaged")
    refused(run(good()), "pytorch_model.bin of code", "fetch it again")


def test_an_output_that_cannot_be_made_is_refused_in_words(workplace: Path) -> None:
    Path("file").write_text("x")
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    for out, words in (
        ("file", "is a file"),
        ("file/below", "cannot write"),
        ("link", "symbolic link"),
    ):
        Path("recipe.yml").write_text(yaml.safe_dump(good()))
        result = CliRunner().invoke(main, ["yaml", "recipe.yml", out])
        assert result.exit_code == 1, result.output
        assert words in result.output
        assert isinstance(result.exception, SystemExit)


def test_what_varies_over_the_tensors_is_not_told_as_one_value(workplace: Path) -> None:
    recipe = good() | {
        "parameters": {
            "operator": [{"filter": "mlp", "value": "ties"}, {"value": "task_arithmetic"}],
            "lambda": [0.5, 1.0],
        }
    }
    assert run(recipe).exit_code == 0
    card = Path("out/README.md").read_text()
    assert "lambda = 0.5" not in card
    assert "varies, see the recipe" in card


def test_the_recipe_kept_with_a_result_says_what_the_command_line_said(workplace: Path) -> None:
    edit_config("code", rms_norm_eps=1e-3)
    assert run(good(), "--allow-nan", "--allow-crimes").exit_code == 0
    kept = yaml.safe_load(Path("out/mergekit_config.yml").read_text())
    assert kept["parameters"]["allow_nan"] is True
    assert (
        "mergekit-yaml mergekit_config.yml OUT --allow-crimes" in Path("out/README.md").read_text()
    )


def test_an_interrupt_leaves_nothing_in_the_way(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mergekit.io.tensor_writer as writer

    def interrupt(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.TensorWriter, "finalize", interrupt)
        assert run({**good(), "parameters": {"engine": "mergekit"}}).exit_code != 0
    assert not Path("out.partial").exists()
    assert not Path("out").exists()
