"""What our own commands put off at start-up is there when it is needed, and is the real thing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

from mergekit_unconstrained import quick_start

CODE = """
import sys
from mergekit_unconstrained import quick_start
quick_start.prepare()
import mergekit.common, mergekit.architecture, mergekit.io.tasks
from mergekit_unconstrained import compat, jobs

HEAVY = ("peft.peft_model", "transformers.modeling_utils", "torch._dynamo", "scipy.optimize",
         "transformers.core_model_loading", "networkx.algorithms", "accelerate.utils")
loaded = [name for name in HEAVY if name in sys.modules]
assert not loaded, loaded
assert not isinstance(sys.modules["peft"].__spec__, type(None))  # it counts as installed

# A config is read, and its activation's name is not held against functions that nobody loaded.
from transformers import LlamaConfig
LlamaConfig(hidden_act="silu")
loaded = [name for name in HEAVY if name in sys.modules]
assert not loaded, loaded

# The table of Auto classes is mergekit's own.
import transformers
table = mergekit.common.ARCH_NAME_TO_AUTO_CLS
assert table["LlamaForCausalLM"] is transformers.AutoModelForCausalLM
assert "NoSuchModel" not in table and len(table) > 100 and set(table) == set(table.keys())
assert mergekit.common.get_auto_cls("BertForMaskedLM") is transformers.AutoModelForMaskedLM

# The functions that were put off are those of their modules.
import mergekit.architecture.auto as auto, mergekit.architecture.conversion as conversion
import types
assert callable(auto.infer_architecture_info)
assert type(auto) is types.ModuleType and type(conversion) is types.ModuleType
assert mergekit.io.tasks.convert_checkpoint_tensors(None, {}, "x") is None
assert compat.can_convert("llama", ["x"], compat.WeightInfo(name="x"))

# peft runs when it is asked for something.
import peft
assert peft.PeftModel.__module__ == "peft.peft_model"
assert type(peft) is types.ModuleType
from peft.utils import get_peft_model_state_dict
import networkx, accelerate.utils
assert list(networkx.lexicographical_topological_sort(networkx.DiGraph([(2, 1)]))) == [2, 1]
assert accelerate.init_empty_weights.__module__ == "accelerate.big_modeling"
assert transformers.PreTrainedModel.__module__ == "transformers.modeling_utils"
from transformers.activations import ACT2FN
assert "silu" in ACT2FN
from transformers.utils import type_validators
assert "silu" in type_validators.ACT2FN and len(type_validators.ACT2FN) == len(ACT2FN)
quick_start.prepare()  # a second time it has nothing to do
"""


def test_what_is_put_off_is_the_real_thing_when_it_is_needed() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_transformers_lists_its_models_as_before() -> None:
    spec = importlib.util.spec_from_file_location(
        import_utils.__name__ + "_once_more", import_utils.__file__
    )
    assert spec is not None
    assert spec.loader is not None
    quick = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quick)
    quick_start.hasten(quick)
    assert quick.fetch__all__ is not import_utils.fetch__all__
    models = str(Path(import_utils.__file__).parent.parent / "models")
    found = quick.define_import_structure(models)
    assert found == import_utils.define_import_structure(models)
    assert sum(len(files) for files in found.values()) > 1_000


@pytest.mark.parametrize(
    "content",
    [
        "",
        "x = 1",
        "# __all__ x",
        '__all__ = ["a"]',
        '__all__ = ["a"]\n__all__ = ["b"]',
        'x\n__all__ = [\n    "a",\n    "b",\n]\n',
        'if x:\n    __all__ = ["a"]\n',
        'a\n\n__all__ = ["b"]',
    ],
)
def test_the_names_of_a_file_are_found_from_its_end(content: str) -> None:
    spec = importlib.util.spec_from_loader("functions", loader=None)
    assert spec is not None
    quick = importlib.util.module_from_spec(spec)
    quick.__dict__.update(
        fetch__all__=import_utils.fetch__all__,
        create_import_structure_from_path=import_utils.create_import_structure_from_path,
    )
    quick_start.hasten(quick)
    assert quick.fetch__all__(content) == import_utils.fetch__all__(content)
