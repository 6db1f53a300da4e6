"""`training: {push_to_hub: true}`: what is refused, and where several trainings push to."""

from __future__ import annotations

import types
from typing import Any

import pytest

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.fusion.stages import pushed_as
from mergekit_unconstrained.fusion.training.arguments import (
    check_training_block,
    training_arguments,
)

PUSH = {"push_to_hub": True, "hub_model_id": "alice/steps"}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"push_to_hub": True}, "needs `hub_model_id: org/name`"),
        ({**PUSH, "hub_token": "hf_secret"}, "a token does not belong into a file"),
        ({**PUSH, "hub_strategy": "end"}, "the recipe's parameter `push_to_hub`"),
    ],
)
def test_what_cannot_be_pushed_is_said_beforehand(block: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        check_training_block(FusionSettings(training=block))
    assert "hf_secret" not in raised.value.message


@pytest.mark.parametrize(("given", "private"), [({}, True), ({"hub_private_repo": False}, False)])
def test_checkpoints_are_private_unless_asked(
    tmp_path: Any, given: dict[str, Any], private: bool
) -> None:
    arguments = training_arguments(
        FusionSettings(training={**PUSH, **given, "use_cpu": True}),
        tmp_path / "checkpoints",
        max_steps=1,
        epochs=0.0,
        learning_rate=1e-3,
        evaluate=False,
    )
    assert arguments.hub_private_repo is private
    assert str(arguments.hub_strategy) == "HubStrategy.EVERY_SAVE"


def test_several_trainings_push_to_repositories_of_their_own() -> None:
    def name(sources: int, **settings: Any) -> str:
        chosen = FusionSettings(training=PUSH, **settings)
        plan: Any = types.SimpleNamespace(settings=chosen, sources=(None,) * sources)
        return str(pushed_as(plan, "gpt2")["hub_model_id"])

    assert name(1) == "alice/steps"
    assert name(2, pairing="joint") == "alice/steps"
    assert name(2) == "alice/steps-gpt2"
    assert name(1, sft_baseline=True) == "alice/steps-gpt2"
