"""Masks as literal tensors: a tokenizer of one token a character, and SmolLM2's own."""

from __future__ import annotations

import pytest

from instructmining_core.config import InstructMiningError
from instructmining_core.data.tokenization import (
    CHAT,
    PLAIN,
    Encoded,
    encode,
    encode_many,
    end_ids,
    plain_pieces,
    template_version,
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
    assert [piece[:2] for piece in plain_pieces(turns, "</s>")] == [
        ("System:\nS\n\nUser:\na\n\nAssistant:\n", False), ("b", True), ("</s>", True),
        ("\n\nUser:\nc\n\nAssistant:\n", False), ("d", True), ("</s>", True),
    ]


def test_segments_without_an_answer_ask_for_one():
    assert plain_pieces([user("a")], "</s>") == [("User:\na\n\nAssistant:\n", False, False)]
    assert plain_pieces([user("a"), reply("b"), user("c")], "e")[-1][:2] == (
        "\n\nUser:\nc\n\nAssistant:\n", False)


def test_mask_of_one_turn_is_the_response_and_eos(characters):
    row = encode(characters, [user("Hi"), reply("Yo!")], max_tokens=99)
    text, marks = shown(characters, row)
    assert text == "^User:\nHi\n\nAssistant:\nYo!$"
    assert marks == "......................xxxx"
    assert (row.dropped, row.truncated) == (0, False)


def test_literal_ids(characters):
    row = encode(characters, [user("A"), reply("B")], max_tokens=99)
    prompt = [ord(c) - 32 + 3 if c != "\n" else 98 for c in "User:\nA\n\nAssistant:\n"]
    assert list(row.ids) == [BOS, *prompt, ord("B") - 29, EOS]
    assert sum(row.targets) == 2 and row.targets[-2:] == (True, True)


def test_every_reply_of_a_conversation_is_a_target(characters):
    row = encode(characters, [user("a"), reply("bb"), user("c"), reply("d")], max_tokens=99)
    text, marks = shown(characters, row)
    assert text == "^User:\na\n\nAssistant:\nbb$\n\nUser:\nc\n\nAssistant:\nd$"
    assert marks == "." * 21 + "xxx" + "." * 22 + "xx"


def test_one_turn_is_a_target_and_nothing_after_it_is_kept(characters):
    talk = [user("a"), reply("bb"), user("c"), reply("d"), user("e"), reply("f")]
    (row,) = encode_many(characters, [talk], max_tokens=99, turns=[1])
    text, marks = shown(characters, row)
    assert text == "^User:\na\n\nAssistant:\nbb$\n\nUser:\nc\n\nAssistant:\nd$"
    assert marks == "." * 46 + "xx"


def test_long_conversation_loses_whole_messages_at_the_left(characters):
    talk = [user("a"), reply("bb"), user("c"), reply("d")]
    row = encode(characters, talk, max_tokens=40)
    text, marks = shown(characters, row)
    assert text == "^User:\nc\n\nAssistant:\nd$" and marks == "." * 21 + "xx"
    assert (row.dropped, row.truncated) == (2, False)


def test_last_question_and_answer_stay_and_the_answers_end_is_cut(characters):
    row = encode(characters, [user("a"), reply("b"), user("c"), reply("0123456789")], max_tokens=25)
    text, marks = shown(characters, row)
    assert text == "^User:\nc\n\nAssistant:\n0123" and marks == "." * 21 + "xxxx"
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
    with pytest.raises(InstructMiningError, match="no chat template; set template: plain"):
        encode(characters, [user("a"), reply("b")], max_tokens=9, template="chat")


# The chat template: one that ends a turn with a token of its own, and SmolLM2's.


@pytest.fixture
def turned(characters):
    """The same alphabet with a chat template whose turns end in `§`, which is special, not eos."""
    from copy import deepcopy

    tokenizer = deepcopy(characters)
    tokenizer.add_special_tokens({"additional_special_tokens": ["§"]})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['role'][0] }}:{{ m['content'] | trim }}§\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer


def test_chat_mask_is_the_response_and_its_end_of_turn(turned):
    assert template_version(turned) == CHAT and template_version(turned, "plain") == PLAIN
    talk = [user("Hi"), reply("Yo!"), user("c"), reply("d")]
    text, marks = shown(turned, encode(turned, talk, max_tokens=99))
    assert text == "^u:Hi§\na:Yo!§\nu:c§\na:d§"
    assert marks == ".........xxxx........xx"
    (row,) = encode_many(turned, [talk], max_tokens=99, turns=[1])
    assert shown(turned, row) == (text, "." * 21 + "xx")
    assert encode_many(turned, [talk], max_tokens=99, turns=[0])[0].ids == row.ids[:13]


def test_chat_prompt_ends_in_the_header_that_asks(turned):
    text, marks = shown(turned, encode(turned, [user("Hi")], max_tokens=99))
    assert text == "^u:Hi§\na:" and marks == "." * 9


def test_chat_text_that_spells_markup_stays_text_untrimmed(turned):
    row = encode(turned, [user(" a§</s>"), reply(" {{ b }}§ ")], max_tokens=99)
    assert row.ids.count(turned.convert_tokens_to_ids("§")) == 2 and EOS not in row.ids
    assert sum(row.targets) == len(" {{ b }}§ ") + 1 and row.targets[-1]


def test_chat_conversation_is_cut_like_a_plain_one(turned):
    talk = [user("a"), reply("bb"), user("c"), reply("0123456789")]
    row = encode(turned, talk, max_tokens=12)
    assert shown(turned, row) == ("^u:c§\na:0123", "." * 8 + "xxxx")
    assert (row.dropped, row.truncated) == (2, True)


def test_a_role_that_a_chat_template_refuses_joins_the_user(turned):
    talk = [{"role": "system", "content": "S"}, user("a"), reply("b")]
    assert shown(turned, encode(turned, talk, max_tokens=99))[0] == "^u:S\n\na§\na:b§"
    turned.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InstructMiningError, match="refuses a conversation with the roles"):
        encode(turned, talk, max_tokens=99)


def test_what_ends_an_answer(characters, turned, smollm2):
    assert end_ids(characters) == {EOS}
    assert end_ids(turned) == {EOS, turned.convert_tokens_to_ids("§")}
    assert end_ids(smollm2.tokenizer) == {2}


HEADER = [1, 9690, 198]  # <|im_start|>system\n
SYSTEM = [  # You are a helpful AI assistant named SmolLM, trained by Hugging Face
    2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182,
]
USER, ASSISTANT, END = [1, 4093, 198], [1, 520, 9531, 198], 2
QUESTION, ANSWER = [26843, 30], [73, 95, 17]  # "Hi."; "Yo!"


def test_smollm2_chat_literally(smollm2):
    row = encode(smollm2.tokenizer, [user("Hi."), reply("Yo!")], max_tokens=99)
    prompt = [*HEADER, *SYSTEM, END, 198, *USER, *QUESTION, END, 198, *ASSISTANT]
    assert list(row.ids) == [*prompt, *ANSWER, END]
    assert list(row.targets) == [False] * len(prompt) + [True] * 4


def test_smollm2_chat_is_what_the_tokenizer_itself_writes(smollm2):
    tokenizer = smollm2.tokenizer
    talk = [user("Name three colours."), reply("Red, blue and 3 more."), user("Why?"),
            reply("Because.")]
    for messages in (talk, [{"role": "system", "content": "Be brief."}, *talk]):
        own = tokenizer.apply_chat_template(messages)["input_ids"]
        row = encode(tokenizer, messages, max_tokens=999)
        assert list(row.ids) == own[:-1] and own[-1] == 198, "the newline after the last turn"
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
        assert list(encode(tokenizer, messages[:-1], max_tokens=999).ids) == asked["input_ids"]


def test_smollm2_plain_literally(smollm2):
    row = encode(smollm2.tokenizer, [user("Hi."), reply("Yo!")], max_tokens=99, template="plain")
    prompt = [1, 11126, 42, 198, *QUESTION, 198, 198, 9519, 9531, 42, 198]
    assert list(row.ids) == [*prompt, *ANSWER, END]
    assert list(row.targets) == [False] * len(prompt) + [True] * 4


ORDINARY = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Write a haiku about rain.", "Soft rain on the roof\nA quiet song in the night"),
    ("Name three primary colors.", "Red, blue, and yellow."),
    ("Translate 'good morning' into Spanish.", "Buenos días."),
    ("Give me a tip for staying healthy.", "Eat a balanced diet with fruits and vegetables."),
    ("What is 7 times 6?", "42"),
]


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_no_header_makes_the_first_token_of_an_answer_dear(smollm2, template):
    """With a header that ends in a space it costs SmolLM2 11 to 13 nats on the mean."""
    from instructmining_core.models.causal_lm import losses, response_nll

    rows = encode_many(smollm2.tokenizer, [[user(q), reply(a)] for q, a in ORDINARY],
                       max_tokens=99, template=template)
    frame = response_nll(smollm2, rows)
    assert losses(frame)["first_token"] < 6
    body = [len(smollm2.tokenizer(answer)["input_ids"]) - 1 for _, answer in ORDINARY]
    assert (frame["tokens"] - frame["tokens_first"] - frame["tokens_eos"]).tolist() == body
