"""Messages as tokens: with and without a template, and where an answer begins and ends."""

from __future__ import annotations

import pytest

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.evaluation.prompts import Prompts
from mergekit_unconstrained.evaluation.records import Message

ASKED = (Message("system", "Be brief."), Message("user", "Hi?"))


def test_a_template_is_used_where_there_is_one(byte_tokenizer):
    prompts = Prompts(byte_tokenizer(chat=True), "m")
    templated = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompts.text(ASKED, None) == prompts.text(ASKED, True) == templated
    assert prompts.text(ASKED, False) == "Be brief.\nHi?\n"
    assert prompts.text(ASKED, None, "=") == templated  # a template separates for itself


def test_without_a_template_the_messages_are_joined_by_newlines(byte_tokenizer):
    prompts = Prompts(byte_tokenizer(), "m")
    assert prompts.text(ASKED, None) == "Be brief.\nHi?\n"
    with pytest.raises(ModelError, match="m has no chat template"):
        prompts.text(ASKED, True)


@pytest.mark.parametrize(
    ("asked", "separator", "text"),
    [
        ("Hi?", "auto", "Hi?\n"),
        ("Hi?\n", "auto", "Hi?\n"),  # separated already, by whatever white space
        ("Hi? ", "auto", "Hi? "),
        ("", "auto", ""),
        ("Hi?", "", "Hi?"),
        ("Hi?\n", " => ", "Hi?\n => "),
    ],
)
def test_without_a_template_a_newline_stands_before_the_answer(
    byte_tokenizer, asked, separator, text
):
    prompts = Prompts(byte_tokenizer(), "m")
    assert prompts.text([Message("user", asked)], None, separator) == text


@pytest.mark.parametrize("with_end", [True, False])
def test_earlier_answers_end_as_a_fusion_writes_them(byte_tokenizer, with_end):
    from mergekit_unconstrained.fusion.data.encoding import Encoder
    from mergekit_unconstrained.fusion.records import Conversation, Turn
    from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable

    tokenizer = byte_tokenizer()
    if not with_end:
        tokenizer.eos_token = None
    asked = [
        *ASKED,
        Message("assistant", "Hello."),
        Message("user", "And?"),
        Message("assistant", "No more.\n"),
        Message("user", "Why?"),
    ]
    turns = [*(Turn(m.role, m.content) for m in asked), Turn("assistant", "So.")]
    encoder = Encoder(tokenizer, ByteTable.from_tokenizer(tokenizer))
    pair = Prompts(tokenizer, "m").with_answer(asked, "So.", None, end=with_end)
    trained_on = encoder.encode(Conversation(0, tuple(turns)))
    assert [*pair.prompt, *pair.answer] == trained_on.ids.tolist()


def test_a_prompt_is_read_as_a_fusion_writes_it(byte_tokenizer):
    from mergekit_unconstrained.fusion.data.rendering import Renderer
    from mergekit_unconstrained.fusion.records import Turn

    tokenizer = byte_tokenizer()
    turns = [Turn(m.role, m.content) for m in ASKED]
    written = Renderer(tokenizer, None, tokenizer.eos_token).render(
        [*turns, Turn("assistant", "Hello.")]
    )
    pair = Prompts(tokenizer, "m").with_answer(ASKED, "Hello.", None, end=True)
    assert tokenizer.decode([*pair.prompt, *pair.answer]) == written.text


def test_a_template_that_refuses_is_named(byte_tokenizer):
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ModelError, match=r"m refuses messages of system, user \(no system here\)"):
        Prompts(tokenizer, "m").text(ASKED, None)


def test_the_end_is_the_templates_else_the_tokenizers(byte_tokenizer):
    tokenizer = byte_tokenizer(chat=True)
    turn, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    prompts = Prompts(tokenizer, "m", [7, 8])
    assert prompts.with_answer(ASKED, "x", None, end=True).answer[-1] == turn
    assert prompts.with_answer(ASKED, "x", False, end=True).answer[-1] == text
    assert prompts.ends(None) == {turn, text, 7, 8}
    assert prompts.ends(False) == {text, 7, 8}
    assert len(prompts.with_answer(ASKED, "x", None, end=False).answer) == 1


@pytest.mark.parametrize(
    ("asked", "answer", "prompt_tokens", "answer_tokens"),
    [
        ("x", "ab", ["x"], ["ab"]),  # the answer's own tokens
        ("xa", "b", ["x", "a"], ["b"]),  # "ab" would straddle: the answer stands by itself
        ("xa", "bab", ["x", "a"], ["b", "ab"]),
    ],
)
def test_no_token_straddles_the_boundary(
    byte_tokenizer, asked, answer, prompt_tokens, answer_tokens
):
    tokenizer = byte_tokenizer(merges=(("a", "b"),))
    pair = Prompts(tokenizer, "m").with_answer(
        [Message("user", asked)], answer, None, end=False, separator=""
    )
    assert tokenizer.convert_ids_to_tokens(pair.prompt) == prompt_tokens
    assert tokenizer.convert_ids_to_tokens(pair.answer) == answer_tokens


def test_a_prompt_is_never_without_a_token(byte_tokenizer):
    tokenizer = byte_tokenizer()
    pair = Prompts(tokenizer, "m").with_answer([Message("user", "")], "ab", None, end=False)
    assert (len(pair.prompt), len(pair.answer)) == (1, 2)


def test_an_end_that_a_tokenizer_puts_behind_every_text_is_taken_off(byte_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    assert tokenizer("ab")["input_ids"][-1] == end
    prompts = Prompts(tokenizer, "m")
    pair = prompts.with_answer([Message("user", "ab")], "cd", None, end=True)
    assert end not in pair.prompt
    assert pair.answer.count(end) == 1


@pytest.mark.parametrize(
    ("written", "end"),
    [
        ("<s>{{ m['content'] | trim }}<|im_end|>\n", "<|im_end|>"),
        ("[A] <think>\n</think>{{ m['content'] }} <|im_end|>", "<|im_end|>"),
        ("{{ m['content'] }}{{ eos_token }}", "<|endoftext|>"),
        ("{{ m['content'] }}\nNext: ", "<|endoftext|>"),  # nothing special: the tokenizer's own
        (
            "{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}",
            "<|endoftext|>",
        ),
    ],
)
def test_the_end_of_turn_is_read_from_the_template(byte_tokenizer, written, end):
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}" + written + "{% endfor %}"
    pair = Prompts(tokenizer, "m").with_answer([Message("user", "u")], "x", None, end=True)
    assert tokenizer.convert_ids_to_tokens(pair.answer[-1]) == end
