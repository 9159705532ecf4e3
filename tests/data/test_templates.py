"""Masks as literal tensors, with a tokenizer of one token a character."""

from __future__ import annotations

import pytest

from instructmining_core.config import InstructMiningError
from instructmining_core.data.tokenization import (
    Encoded,
    encode,
    encode_many,
    segments,
)

EOS, BOS = 1, 2


@pytest.fixture(scope="module")
def characters():
    """Every character its code point's place in a fixed alphabet."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [chr(c) for c in range(32, 127)] + ["\n", "é", "\ufffd", "日"]
    vocabulary = {"<unk>": 0, "</s>": EOS, "<s>": BOS}
    vocabulary |= {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


def shown(tokenizer, row: Encoded) -> tuple[str, str]:
    """The row as text (`^` bos, `$` eos), and a line below it with `x` at targets."""
    names = {BOS: "^", EOS: "$"}
    text = "".join(names.get(i) or tokenizer.convert_ids_to_tokens(i) for i in row.ids)
    return text, "".join("x" if t else "." for t in row.targets)


def test_segments_are_the_stated_template():
    turns = [{"role": "system", "content": "S"}, user("a"), reply("b"), user("c"), reply("d")]
    assert segments(turns, "</s>") == [
        ("System: S\n\nUser: a\n\nAssistant: ", False), ("b", True), ("</s>", True),
        ("\n\nUser: c\n\nAssistant: ", False), ("d", True), ("</s>", True),
    ]


def test_segments_without_an_answer_ask_for_one():
    assert segments([user("a")], "</s>") == [("User: a\n\nAssistant: ", False)]
    assert segments([user("a"), reply("b"), user("c")], "e")[-1] == (
        "\n\nUser: c\n\nAssistant: ", False)


def test_mask_of_one_turn_is_the_response_and_eos(characters):
    row = encode(characters, [user("Hi"), reply("Yo!")], max_tokens=99)
    text, marks = shown(characters, row)
    assert text == "^User: Hi\n\nAssistant: Yo!$"
    assert marks == "......................xxxx"
    assert (row.dropped, row.truncated) == (0, False)


def test_literal_ids(characters):
    row = encode(characters, [user("A"), reply("B")], max_tokens=99)
    prompt = [ord(c) - 32 + 3 if c != "\n" else 98 for c in "User: A\n\nAssistant: "]
    assert list(row.ids) == [BOS, *prompt, ord("B") - 29, EOS]
    assert sum(row.targets) == 2 and row.targets[-2:] == (True, True)


def test_every_reply_of_a_conversation_is_a_target(characters):
    row = encode(characters, [user("a"), reply("bb"), user("c"), reply("d")], max_tokens=99)
    text, marks = shown(characters, row)
    assert text == "^User: a\n\nAssistant: bb$\n\nUser: c\n\nAssistant: d$"
    assert marks == "." * 21 + "xxx" + "." * 22 + "xx"


def test_one_turn_is_a_target_and_nothing_after_it_is_kept(characters):
    talk = [user("a"), reply("bb"), user("c"), reply("d"), user("e"), reply("f")]
    (row,) = encode_many(characters, [talk], max_tokens=99, turns=[1])
    text, marks = shown(characters, row)
    assert text == "^User: a\n\nAssistant: bb$\n\nUser: c\n\nAssistant: d$"
    assert marks == "." * 46 + "xx"


def test_long_conversation_loses_whole_messages_at_the_left(characters):
    talk = [user("a"), reply("bb"), user("c"), reply("d")]
    row = encode(characters, talk, max_tokens=40)
    text, marks = shown(characters, row)
    assert text == "^User: c\n\nAssistant: d$" and marks == "." * 21 + "xx"
    assert (row.dropped, row.truncated) == (2, False)


def test_last_question_and_answer_stay_and_the_answers_end_is_cut(characters):
    row = encode(characters, [user("a"), reply("b"), user("c"), reply("0123456789")], max_tokens=25)
    text, marks = shown(characters, row)
    assert text == "^User: c\n\nAssistant: 0123" and marks == "." * 21 + "xxxx"
    assert (row.dropped, row.truncated) == (2, True)
    assert EOS not in row.ids


def test_prompt_longer_than_the_limit_has_no_target(characters):
    row = encode(characters, [user("x" * 50), reply("y")], max_tokens=30)
    assert len(row.ids) == 30 and not any(row.targets) and row.truncated


def test_exact_fit_is_not_cut(characters):
    messages = [user("Hi"), reply("Yo!")]
    length = len(encode(characters, messages, max_tokens=999))
    assert not encode(characters, messages, max_tokens=length).truncated
    assert encode(characters, messages, max_tokens=length - 1).truncated


def test_text_that_spells_a_special_token_stays_text(characters):
    row = encode(characters, [user("a</s>b"), reply("</s><s>")], max_tokens=99)
    assert row.ids.count(EOS) == 1 and row.ids.count(BOS) == 1
    assert sum(row.targets) == len("</s><s>") + 1


def test_empty_reply_is_only_eos(characters):
    row = encode(characters, [user("a"), reply("")], max_tokens=99)
    assert [i for i, t in zip(row.ids, row.targets, strict=True) if t] == [EOS]


def test_lone_surrogate_and_nul_do_not_crash(characters):
    row = encode(characters, [user("\ud800"), reply("a\x00\udfff")], max_tokens=99)
    assert sum(row.targets) == 4
    assert characters.convert_ids_to_tokens(row.ids[-2]) == "\ufffd"


def test_many_equals_one_by_one(tiny_tokenizer):
    talks = [[user("Sort it."), reply("Done " * i)] for i in range(9)]
    talks.append([user("a"), reply("b"), user("c"), reply("d")])
    together = encode_many(tiny_tokenizer, talks, max_tokens=40)
    assert together == [encode(tiny_tokenizer, t, max_tokens=40) for t in talks]


def test_response_tokens_do_not_depend_on_the_prompt(tiny_tokenizer):
    def targets(prompt):
        row = encode(tiny_tokenizer, [user(prompt), reply("the list of items")], max_tokens=99)
        return [i for i, t in zip(row.ids, row.targets, strict=True) if t]

    assert targets("x") == targets("Compute the mean") == targets("")


def test_errors_say_what_is_wrong(characters):
    with pytest.raises(InstructMiningError, match="role 'robot'"):
        encode(characters, [{"role": "robot", "content": ""}], max_tokens=9)
    with pytest.raises(InstructMiningError, match="Turn 1 .* 1 replies"):
        encode_many(characters, [[user("a"), reply("b")]], max_tokens=9, turns=[1])

    class Endless:
        eos_token_id = None

    with pytest.raises(InstructMiningError, match="no eos token"):
        encode(Endless(), [user("a"), reply("b")], max_tokens=9)
