"""Which tokens are the response, and which of its bytes each covers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import real_tokenizer

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.data.encoding import (
    NO_RESPONSE,
    TOO_LONG,
    Encoder,
    Unencodable,
    fit,
    fit_many,
)
from mergekit_unconstrained.fusion.records import Conversation, Encoded, Turn
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable

KINDS = ["byte_level", "gpt2", "metaspace"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60)

Tokenizers = Callable[..., Any]


def talk(*texts: str, row: int = 0, keep: int | None = None) -> Conversation:
    """user, assistant, user, assistant ..."""
    roles = ("user", "assistant") * len(texts)
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))
    return Conversation(row, turns, keep)


def encoder(tokenizer: Any, **options: Any) -> Encoder:
    return Encoder(tokenizer, ByteTable.from_tokenizer(tokenizer), **options)


def space(conversation: Conversation) -> bytes:
    """The response bytes, with a line feed for the end of each turn."""
    answers = [t.text for t in conversation.turns if t.role == "assistant"]
    return b"".join(answer.encode() + b"\n" for answer in answers)


def covered(encoded: Encoded, conversation: Conversation) -> list[bytes]:
    """The response bytes under each response token."""
    held = space(conversation)
    return [held[a:b] for a, b in zip(encoded.starts, encoded.ends, strict=True)]


def special_like(tokenizer: Any, *tokens: Any, template: str) -> Any:
    """A copy with further special tokens and a chat template."""
    from transformers import PreTrainedTokenizerFast

    copied = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()
        ),
        eos_token=tokenizer.eos_token,
    )
    copied.add_special_tokens({"extra_special_tokens": list(tokens)})
    copied.chat_template = template
    return copied


# -- the response tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_response_tokens_are_the_response_and_its_end(
    make_tokenizer: Tokenizers, kind: str
) -> None:
    tokenizer = make_tokenizer(kind)
    answer = "Seven apples, naïve 東京 😀.\nTwo."
    encoded = encoder(tokenizer).encode(talk("How many?", answer))
    text = tokenizer.decode(encoded.response_ids, clean_up_tokenization_spaces=False)
    assert text == answer + tokenizer.eos_token
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert encoded.starts[0] == 0
    assert encoded.ends[-1] == encoded.response_bytes == len(answer.encode()) + 1


@pytest.mark.parametrize("kind", ["byte_level", "gpt2"])
def test_offsets_agree_with_those_of_the_tokenizers_library(
    make_tokenizer: Tokenizers, kind: str
) -> None:
    tokenizer = make_tokenizer(kind)
    answer = "there are seven apples  and two pears, because 12 plus 30 makes 42."
    encoded = encoder(tokenizer).encode(talk("there are?", answer))
    text = tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first = text.index(answer)
    inside = [(a, b) for a, b in made["offset_mapping"] if a >= first and b <= first + len(answer)]
    assert made["input_ids"] == encoded.ids.tolist()
    offsets = list(zip(encoded.starts[:-1] + first, encoded.ends[:-1] + first, strict=True))
    assert offsets == inside


@pytest.mark.parametrize("kind", KINDS)
def test_every_turn_is_found_with_its_end(make_tokenizer: Tokenizers, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    conversation = talk("one", "é two.", "three", "four", "one", "five")
    encoded = encoder(tokenizer).encode(conversation)
    assert b"".join(covered(encoded, conversation)) == space(conversation)
    ends = encoded.ends[encoded.response_ids == tokenizer.eos_token_id]
    assert ends.tolist() == [8, 13, 18]
    assert (encoded.starts[1:] == encoded.ends[:-1]).all()


def test_the_response_is_found_where_the_prompt_says_the_same(make_tokenizer: Tokenizers) -> None:
    for kind in KINDS:
        encoded = encoder(make_tokenizer(kind)).encode(talk("7 or 7? assistant 7", "7"))
        assert len(encoded.ids) - 2 == encoded.positions[0]


def test_special_tokens_written_in_a_response_are_part_of_it(make_tokenizer: Tokenizers) -> None:
    conversation = talk("q", "a<|im_end|>\nb", "q", "c")
    encoded = encoder(make_tokenizer("byte_level")).encode(conversation)
    assert b"".join(covered(encoded, conversation)) == space(conversation)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_text_is_covered_once_and_in_order(
    make_tokenizer: Tokenizers, kind: str, texts: list[tuple[str, str]]
) -> None:
    conversation = talk(*(text for pair in texts for text in pair))
    coder = encoder(make_tokenizer(kind))
    try:
        encoded = coder.encode(conversation)
    except Unencodable as reason:
        assert str(reason) == NO_RESPONSE  # noqa: PT017
        return
    assert (np.diff(encoded.positions) > 0).all()
    assert (encoded.ends > encoded.starts).all()
    assert (encoded.starts[1:] >= encoded.ends[:-1]).all()
    assert encoded.response_bytes == len(space(conversation))
    pieces = coder.table.pieces
    for i, said in zip(encoded.response_ids, covered(encoded, conversation), strict=True):
        piece = pieces[i] or b""
        # an end of turn stands for one byte; a sentencepiece word may bring its space along
        assert said in (piece, piece.removeprefix(b" ")) or (i == coder.end_id and said == b"\n")
    # what is not covered are tokens that also hold bytes of the template
    assert encoded.response_bytes - (encoded.ends - encoded.starts).sum() <= 32 * len(texts)


def test_a_token_that_straddles_prompt_and_response_is_no_response_token(
    make_tokenizer: Tokenizers,
) -> None:
    tokenizer = special_like(
        make_tokenizer("byte_level"),
        template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )
    conversation = talk("Answer:", "there are seven")
    encoded = encoder(tokenizer).encode(conversation)
    # " there" is one token here, and its space is the template's
    assert encoded.starts[0] == len("there")
    assert b"".join(covered(encoded, conversation)) == b" are seven"


def test_nothing_predicts_the_first_token(make_tokenizer: Tokenizers) -> None:
    conversation = Conversation(0, (Turn("assistant", "seven apples"), Turn("user", "?")))
    encoded = encoder(make_tokenizer("gpt2")).encode(conversation)
    assert encoded.positions[0] == 1
    assert encoded.starts[0] > 0


# -- templates ------------------------------------------------------------------------------------


def test_without_a_template_text_is_plain_and_none_asks_for_it(make_tokenizer: Tokenizers) -> None:
    conversation = Conversation(0, (Turn("system", "Be."), *talk("a", "b", "c", "d").turns))
    plain = "Be.\na\nb<|endoftext|>c\nd<|endoftext|>"
    tokenizer = make_tokenizer("gpt2")
    assert tokenizer.decode(encoder(tokenizer).encode(conversation).ids) == plain
    chat = make_tokenizer("byte_level")
    forced = encoder(chat, chat_template="none").encode(conversation)
    assert chat.decode(forced.ids) == plain.replace("<|endoftext|>", "<|im_end|>")


def test_plain_text_begins_with_what_the_tokenizer_puts_there(make_tokenizer: Tokenizers) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = special_like(make_tokenizer("metaspace"), template="")
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    bare, begun = (
        encoder(t).encode(talk("q", "seven")) for t in (make_tokenizer("metaspace"), tokenizer)
    )
    assert begun.ids.tolist() == [1, *bare.ids]
    assert begun.positions.tolist() == [p + 1 for p in bare.positions]
    # a chat template writes its own begin token, or none
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    assert encoder(tokenizer).encode(talk("q", "seven")).ids[0] != 1


def test_a_template_that_trims_leaves_offsets_in_the_untrimmed_response(
    make_tokenizer: Tokenizers,
) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim "
        "+ '<|im_end|>\\n' }}{% endfor %}"
    )
    conversation = talk(" q ", "\n é\tseven \n", "q", " two")
    whole = encoder(make_tokenizer("byte_level"))
    trimmed = encoder(make_tokenizer("byte_level"), chat_template=template)
    first, second = whole.encode(conversation), trimmed.encode(conversation)
    assert first.response_bytes == second.response_bytes == len(space(conversation))
    assert second.starts[0] == 2
    said = covered(second, conversation)
    assert b"".join(said) == "é\tseven\ntwo\n".encode()
    for i, piece in zip(second.response_ids, said, strict=True):
        assert piece == b"\n" if i == trimmed.end_id else piece == whole.table.pieces[i]


def test_an_end_token_after_a_space_is_the_end_of_the_turn(make_tokenizer: Tokenizers) -> None:
    template = (  # as Llama 2's
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer("metaspace")
    encoded = encoder(tokenizer, chat_template=template).encode(talk("q", "seven", "q", "two"))
    ends = encoded.ends[encoded.response_ids == tokenizer.eos_token_id]
    assert ends.tolist() == [6, 10]


def test_the_next_turns_mark_is_not_the_end_of_this_one(make_tokenizer: Tokenizers) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '\\n' }}"
        "{% endfor %}"
    )
    coder = encoder(make_tokenizer("byte_level"), chat_template=template)
    encoded = coder.encode(talk("q", "seven", "q", "two"))
    start = make_tokenizer("byte_level").convert_tokens_to_ids("<|im_start|>")
    assert start not in encoded.response_ids.tolist()
    assert encoded.response_bytes == 10
    assert encoded.ends[-1] == 9  # no token stands for the end of the last turn


def test_special_tokens_that_swallow_white_space_are_followed(make_tokenizer: Tokenizers) -> None:
    from transformers import AddedToken

    template = "{% for m in messages %}{{ '<|x|>\\n' + m['content'] + ' <|y|> \\n' }}{% endfor %}"
    tokenizer = special_like(
        make_tokenizer("byte_level"),
        AddedToken("<|x|>", rstrip=True, special=True),  # as Phi 3's
        AddedToken("<|y|>", lstrip=True, rstrip=True, special=True),
        template=template,
    )
    conversation = talk("one", "seven pears", "two", "naïve")
    encoded = encoder(tokenizer, generation_ends=[tokenizer.convert_tokens_to_ids("<|y|>")]).encode(
        conversation
    )
    assert b"".join(covered(encoded, conversation)) == space(conversation)


def test_a_space_put_after_special_tokens_is_not_in_the_text(make_tokenizer: Tokenizers) -> None:
    # the Prepend normalizer of Llama 2 puts one into every piece between special tokens
    tokenizer = special_like(
        make_tokenizer("metaspace"),
        "<|a|>",
        template="{% for m in messages %}{{ '<|a|>' + m['content'] + '</s>' }}{% endfor %}",
    )
    conversation = talk("the sum", "the sum of twelve", "the", "  the")
    encoded = encoder(tokenizer).encode(conversation)
    assert b"".join(covered(encoded, conversation)) == space(conversation)
    pieces = ByteTable.from_tokenizer(tokenizer).pieces
    first = pieces[encoded.response_ids[0]] or b""
    assert first.startswith(b" ")
    assert covered(encoded, conversation)[0] == first[1:]


def test_a_system_text_that_a_template_refuses_goes_before_the_prompt(
    make_tokenizer: Tokenizers,
) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = make_tokenizer("byte_level")
    coder = encoder(tokenizer, chat_template=template)
    conversation = Conversation(0, (Turn("system", "Be brief."), *talk("q", "a").turns))
    assert tokenizer.decode(coder.encode(conversation).ids) == "Be brief.\n\nq<|im_end|>a<|im_end|>"


def test_a_template_that_reshapes_a_response_is_searched_or_refused(
    make_tokenizer: Tokenizers,
) -> None:
    template = (  # drops what stands before </think>, as Qwen 3's does of earlier turns
        "{% for m in messages %}{{ '<|im_start|>' }}{% if '</think>' in m['content'] %}"
        "{{ 'T:' + m['content'].split('</think>')[-1] }}{% elif 'Y' in m['content'] %}"
        "{{ 'now ' + m['content'] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}"
    )
    coder = encoder(make_tokenizer("byte_level"), chat_template=template)
    searched = coder.encode(talk("q", "a Yak, or"))
    assert covered(searched, talk("q", "a Yak, or"))[-1] == b"\n"
    with pytest.raises(Unencodable, match="response not found"):
        coder.encode(talk("q", "hm</think>seven"))
    with pytest.raises(Unencodable, match="response not found"):
        coder.encode(talk("Y Y", "Y"))  # which of them?


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}",
        "{{ raise_exception('never') }}",
        "{% for m in messages %}{{ m['role'] }}{% endfor %}",
        "{{ messages[0]['content'] + 3 }}",
    ],
)
def test_a_template_that_cannot_work_is_one_error_at_once(
    make_tokenizer: Tokenizers, template: str
) -> None:
    with pytest.raises(ModelError, match=r"chat template of .* cannot be used"):
        encoder(make_tokenizer("byte_level"), chat_template=template)


def test_a_template_runs_in_a_sandbox(make_tokenizer: Tokenizers) -> None:
    with pytest.raises(ModelError, match="cannot be used"):
        encoder(
            make_tokenizer("byte_level"),
            chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}",
        )


# -- ends and failures ----------------------------------------------------------------------------


def test_the_end_of_a_response_is_what_the_template_writes_there(
    make_tokenizer: Tokenizers,
) -> None:
    tokenizer = special_like(
        make_tokenizer("gpt2"),
        "<turn>",
        template="{% for m in messages %}{{ m['content'] + '<turn>' }}{% endfor %}",
    )
    coder = encoder(tokenizer, generation_ends=[5])
    turn, eos = tokenizer.convert_tokens_to_ids("<turn>"), tokenizer.eos_token_id
    assert coder.end_id == turn
    assert coder.end_ids == {turn, eos, 5}
    plain = encoder(make_tokenizer("metaspace"))
    assert plain.end_id == 2
    assert plain.end_ids == {2}


def test_a_model_without_an_end_of_text_still_counts_the_end_byte(
    make_tokenizer: Tokenizers,
) -> None:
    tokenizer = special_like(make_tokenizer("gpt2"), template="")
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    coder = encoder(tokenizer)
    conversation = talk("q", "seven", "q", "two")
    encoded = coder.encode(conversation)
    assert coder.end_id is None
    assert encoded.response_bytes == 10
    assert b"".join(covered(encoded, conversation)) == b"seventwo"


def test_no_tokenizer_is_a_sentence() -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        Encoder(None, None)  # type: ignore[arg-type]


def test_text_that_the_tokens_do_not_spell_is_not_encoded(make_tokenizer: Tokenizers) -> None:
    coder = encoder(make_tokenizer("metaspace"))
    good, bad = coder.try_many([talk("q", "a b"), talk("q", "a▁b")])
    assert isinstance(good, Encoded)
    assert isinstance(bad, Unencodable)
    assert bad.reason == "the tokens do not spell the text"
    with pytest.raises(Unencodable):
        coder.encode_many([talk("q", "a b"), talk("q", "a▁b")])


def test_a_response_without_a_token_of_its_own_is_not_encoded(make_tokenizer: Tokenizers) -> None:
    tokenizer = special_like(
        make_tokenizer("byte_level"),
        template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )
    with pytest.raises(Unencodable, match=NO_RESPONSE):
        encoder(tokenizer).encode(talk("Answer:", "there"))


# -- truncation -----------------------------------------------------------------------------------

LONG = talk("How many apples?", "Naïve café, 東京: there are seven. " * 6, "And?", "Twelve. " * 9)


@pytest.mark.parametrize("limit", [30, 61, 90, 117, 140])
def test_truncation_keeps_the_same_bytes_for_every_model(
    make_tokenizer: Tokenizers, limit: int
) -> None:
    coders = [encoder(make_tokenizer(kind), max_length=limit) for kind in KINDS]
    whole = [coder.encode(LONG) for coder in coders]
    keep = fit(LONG, coders)
    assert keep
    cut = [c.encode(Conversation(0, LONG.turns, keep)) for c in coders]
    for before, after in zip(whole, cut, strict=True):
        count = len(after.positions)
        assert len(after.ids) <= limit
        assert after.ends[-1] <= keep < before.ends[count]
        assert after.ids.tolist() == before.ids[: len(after.ids)].tolist()
        assert after.positions[-1] == len(after.ids) - 1
        assert after.response_bytes == keep
    # the model that needs most tokens uses all it may: its next response token would not fit
    assert any(b.positions[len(a.positions)] >= limit for a, b in zip(cut, whole, strict=True))


def test_what_fits_is_not_cut(make_tokenizer: Tokenizers) -> None:
    coders = [encoder(make_tokenizer(kind), max_length=2048) for kind in KINDS]
    assert fit(LONG, coders) is None


def test_a_prompt_that_leaves_no_room_gives_zero(make_tokenizer: Tokenizers) -> None:
    coders = [
        encoder(make_tokenizer(kind), max_length=limit)
        for kind, limit in [("byte_level", 8), ("gpt2", 2048)]
    ]
    assert fit(LONG, coders) == 0


def test_many_are_fitted_with_the_reason_of_those_left_out(make_tokenizer: Tokenizers) -> None:
    coders = [encoder(make_tokenizer(kind), max_length=60) for kind in ("byte_level", "metaspace")]
    short = talk("q", "seven", row=4)
    stream = [LONG, short, talk("q", "▁", row=5), talk("q " * 70, "seven", row=6)] * 80
    found = list(fit_many(iter(stream), coders))
    assert [c.row for c, _ in found] == [c.row for c in stream]
    assert found[:4] == found[-4:]
    assert [reason for _, reason in found[:4]] == [
        None,
        None,
        "the tokens do not spell the text",
        TOO_LONG,
    ]
    assert found[0][0].keep_bytes == fit(LONG, coders)
    assert found[1][0] == short


# -- real tokenizers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral-v1", "qwen"])
def test_real_tokenizers_cover_responses_of_every_script(name: str) -> None:
    conversation = talk(
        "  Was kostet das?\n\n",
        "Ünïcödé – 東京 😀👩‍👩‍👧 ½ of 3.14 €\n\n\tprint(1)  # x",
        "#def",
        "#### 17\n",
    )
    coder = encoder(real_tokenizer(name))
    encoded = coder.encode(conversation)
    said = b"".join(covered(encoded, conversation))
    held = space(conversation)
    assert held.endswith(said[-8:])
    assert len(said) >= len(held) - 8  # a first token may belong to the template's line feed
    assert encoded.response_bytes == len(held)
    assert (encoded.response_ids == coder.end_id).sum() == 2


@pytest.mark.parametrize("name", ["mistral-v1", "qwen"])
def test_reading_without_offsets_gives_the_tokenizers_own_ids(name: str) -> None:
    tokenizer = real_tokenizer(name)
    texts = ["", "a", " #def\n", "Ünï 東京 😀‍👧 </s><|im_end|>", "word " * 300, "\t\n  x"]
    usual = tokenizer(texts, add_special_tokens=False)["input_ids"]
    coder = encoder(tokenizer)
    assert coder._backend is not None
    assert coder._tokenise(texts) == usual
    # whoever else has the tokenizer may have left it cutting and padding
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=400)
    assert coder._tokenise(texts) == usual


def test_a_tokenizer_that_changes_text_first_is_asked_itself(make_tokenizer: Tokenizers) -> None:
    from transformers import PreTrainedTokenizerFast

    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            louder = [t.upper() for t in text] if isinstance(text, list) else text.upper()
            return super()._encode_plus(louder, *args, **kwargs)

    plain = make_tokenizer("byte_level")
    shouting = Shouting(tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token)
    coder = Encoder(shouting, ByteTable.from_tokenizer(plain))
    assert coder._backend is None
    assert coder._tokenise(["abc", "d"]) == encoder(plain)._tokenise(["ABC", "D"])
