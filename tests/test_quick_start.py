"""What our own commands put off at start-up is there when it is needed, and is the real thing."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from mergekit_unconstrained import quick_start
quick_start.prepare()
import mergekit.common, mergekit.architecture, mergekit.io.tasks
from mergekit_unconstrained import compat, jobs

HEAVY = ("peft.peft_model", "transformers.modeling_utils", "torch._dynamo", "scipy.optimize",
         "transformers.core_model_loading")
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
