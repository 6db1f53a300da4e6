"""layerwise on a tiny model of several architectures, read back by transformers."""

from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "mixtral"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merge_of_two_experts_loads_and_lies_between_them(make_tiny, tmp_path, architecture):
    import torch
    import transformers
    from mergekit.scripts.run_yaml import main

    models = make_tiny(architecture, experts=2)
    recipe = {
        "merge_method": "layerwise",
        "base_model": str(models.base),
        "models": [
            {"model": str(expert), "parameters": {"weight": 0.5}} for expert in models.experts
        ],
        "parameters": {"operator": "task_arithmetic"},
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    result = CliRunner().invoke(main, [str(tmp_path / "recipe.yml"), str(out), "--quiet"])
    assert result.exit_code == 0, result.output or result.exception

    merged, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys"))
    assert merged.dtype == torch.bfloat16
    first, second = (
        dict(transformers.AutoModelForCausalLM.from_pretrained(e, dtype="auto").named_parameters())
        for e in models.experts
    )
    for name, parameter in merged.named_parameters():
        mean = (first[name].double() + second[name].double()) / 2
        torch.testing.assert_close(parameter.double(), mean, rtol=2**-8, atol=1e-6, msg=name)
    tokens = transformers.AutoTokenizer.from_pretrained(out)("2+2=", return_tensors="pt")
    with torch.no_grad():
        logits = merged(tokens["input_ids"]).logits
    assert logits.shape == (1, 4, 256)
    assert torch.isfinite(logits).all()
