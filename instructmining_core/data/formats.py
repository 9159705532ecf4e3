"""One published record in, conversations out: the names, marks and shapes that people use.

A conversation is a list of `{"role": "user" | "assistant" | "system", "content": str}`; a message
that holds what is no text (a picture, a tool's definition) has its fingerprint in `unread` too, so
that rows that differ only there are different rows. Most records give one conversation; a
self-instruct record gives one for each of its instances, and an OASST tree one for each path when
all paths are asked for. A question without an answer keeps an empty assistant turn where its form
allows one, so that the row stays and is scored as "not computable" instead of vanishing.

An answer that its record takes out of training (a weight of 0, a rejected one) has `train: False`,
and is context only. `FORMS` is the table of all forms: which fields each uses, with an example.
What a record holds beside them is not read, and told as a note where it bears text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from .fields import (
    IDS,
    REASONING,
    ROLES,
    FormatError,
    Messages,
    Record,
    as_text,
    bears_text,
    filled,
    fingerprint,
    in_turn,
    inner_value,
    is_message,
    pick,
    structured,
    thought,
)

CHATS = ("messages", "conversations", "conversation")
MORE_CHATS = ("message", "dialog", "dialogue", "chat", "chat_rounds", "contents", "thread",
              "items", "data", "turns")  # fmt: skip
ASKED = ("instruction", "prompt", "question", "query", "problem")
ASKED_ALONE = ("inputs", "input_text", "user", "human", "source")  # where none of ASKED is filled
BESIDE = ("input", "context", "passage", "document", "article")  # after a blank line
CHOICES = ("choices", "options")
ANSWERS = ("response", "output", "completion", "answer", "answers", "target", "targets",
           "target_text", "outputs", "generation", "generations", "assistant", "solution",
           "answerkey", "preferred_output")  # fmt: skip
ANSWERS_FIRST = {"instruction": "output", "prompt": "completion", "question": "answer",
                 "query": "response", "inputs": "targets", "problem": "solution"}  # fmt: skip
LISTS = ("answer", "answers", "targets", "outputs", "generations")  # of accepted answers, in CSV
ANSWER_KEYS = ("answer", "response", "text")  # of an answer that is an object
REFERENCES = ("reference_turns", "reference", "answers")
SYSTEM = ("system", "system_prompt", "system_message", "systeminstruction")
NAMES = {*CHATS, *MORE_CHATS, *ASKED, *ASKED_ALONE, *BESIDE, *CHOICES, *ANSWERS, *SYSTEM, *IDS,
         "text", "chosen", "history", "instances"}  # what --columns can name  # fmt: skip
THOUGHTS = (*REASONING, "cot", "complex_cot", "chain_of_thought", "rationale", "scratchpad")
IN_MARKS = ("prompt", "instruction", "inputs", "input")  # that may be a template filled in
NO_INPUT = ("<noinput>", "<no input>", "noinput")  # self-instruct's words for none
NO_VALUE = {"none", "nan", "null", "<na>", "nat"}  # what a missing cell became, in optional fields
QUESTIONS = ASKED + ASKED_ALONE + BESIDE
ASKED_FIRST = ASKED + ASKED_ALONE
ANSWERS_TO = {asked: (first, *ANSWERS) for asked, first in ANSWERS_FIRST.items()}

# Markings of a conversation inside one text: what begins a turn (its group is the role), what may
# end one, and whether text before the first mark is the system's.
MARKINGS = {name: (re.compile(mark), re.compile(end), opening) for name, mark, end, opening in (
    ("ChatML", r"<\|im_start\|>[ \t]*([\w-]+)[^\n]*(?:\n|\Z)", r"<\|im_end\|>", False),
    ("Llama 3", r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>",
     r"<\|eo[tm]_id\|>|<\|end_of_text\|>", False),
    ("Llama 2", r"(?:<s>\s*)?\[(/?INST)\]", r"</s>", False),
    ("Gemma", r"<start_of_turn>(\w+)\n", r"<end_of_turn>|<eos>", False),
    ("Zephyr", r"<\|(system|user|assistant|prompter)\|>",
     r"</s>|<\|end\|>|<\|endoftext\|>", False),
    ("DeepSeek", r"<\uff5c(User|Assistant)\uff5c>", r"<\uff5cend\u2581of\u2581sentence\uff5c>",
     True),
    ("Alpaca", r"(?:^|\n)\s*### *(Instruction|Input|Response|System) *:?[ \t]*(?=\n|\Z)",
     r"</s>|<\|endoftext\|>", True),
    ("Guanaco", r"### *(Human|User|Assistant|System) *:", r"</s>|<\|endoftext\|>", True),
    ("Vicuna", r"(?:(?<!\S)|(?<=</s>))(USER|ASSISTANT|SYSTEM|FUNCTION RESPONSE):",
     r"</s>|<\|endoftext\|>", True),
    ("hh-rlhf", r"\n*(?:^|\n\n)(Human|Assistant):", r"(?!)", True),
    ("User and Assistant", r"(?:^|\n)(Human|User|Assistant|AI|Bot|System):", r"(?!)", True),
)}  # fmt: skip
BEGIN = re.compile(r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>"
                   r"|<\uff5cbegin\u2581of\u2581sentence\uff5c>)?\s*")  # fmt: skip
LAST = re.compile(r"(?:\s|</s>|<end_of_turn>|<eos>|<\uff5cend\u2581of\u2581sentence\uff5c>"
                  r"|<\|(?:im_end|eo[tm]_id|end|end_of_text|endoftext)\|>)*\Z")  # fmt: skip
PROMPT = re.compile(r"\s*(?:<|\[INST|###|[Hh]uman:|[Uu]ser:|USER:|SYSTEM:|Below is an)")
SYS = re.compile(r"\s*<<SYS>>\s*(.*?)\s*<</SYS>>\s*", re.DOTALL)
ALPACA_PREAMBLE = "Below is an instruction that describes a task"


def marked(text: str, whole: bool = True) -> Messages | None:
    """The turns of a text with marks, or None where it has none of the known `MARKINGS`.

    whole : the text is all there is, and must hold a user's and an assistant's turn; else it is a
        prompt, and must begin with a mark. Raises FormatError where text is left over, or a role is
        not known.
    """
    if not whole and not PROMPT.match(text):
        return None
    found = []
    for name, (mark, _, _) in MARKINGS.items():
        roles = {ROLES.get(role.lower()) for role in mark.findall(text)}
        first = mark.search(text)
        if {"user", "assistant"} <= roles or (
            first and not whole and "user" in roles and BEGIN.fullmatch(text, 0, first.start())
        ):
            found.append((first.start(), name))
    if not found or (not whole and not BEGIN.fullmatch(text, 0, min(found)[0])
                     and not text.startswith(ALPACA_PREAMBLE)):  # fmt: skip
        return None
    return _split(text, min(found)[1])


def _split(text: str, name: str) -> Messages:
    mark, end, opening = MARKINGS[name]
    before, *pieces = mark.split(text)
    turns: Messages = []
    if not BEGIN.fullmatch(before):
        if not opening:
            raise FormatError(f"marks of {name} around the whole text", before)
        if not before.startswith(ALPACA_PREAMBLE):
            turns.append({"role": "system", "content": before[BEGIN.match(before).end():].strip()})
    for named, said in zip(pieces[::2], pieces[1::2], strict=True):
        said, *rest = end.split(said)
        if any(BEGIN.fullmatch(part) is None for part in rest):
            raise FormatError(f"a mark of {name} before each turn", "".join(rest).strip())
        role = ROLES.get(named.lower().replace(" ", "_"))
        if role is None:
            raise FormatError(f"a role such as 'user' or 'assistant' in marks of {name}", named)
        inside = SYS.match(said) if name == "Llama 2" and role == "user" else None
        if inside:
            turns.append({"role": "system", "content": inside[1]})
            said = said[inside.end() :]
        # Alpaca's input belongs to its instruction.
        if named == "Input" and turns and turns[-1]["role"] == "user":
            turns[-1]["content"] += f"\n\n{said.strip()}" if said.strip() else ""
        else:
            turns.append({"role": role, "content": said.strip()})
    return turns


class Form(NamedTuple):
    """One form of record: `read` gives its conversations, or None where the record is another.

    needs : fields, one of which is filled; fields : what is used, in words; example : a record
    """

    name: str
    needs: tuple[str, ...]
    fields: str
    example: dict[str, Any]
    read: Callable[[Record, str], list[Messages] | None]


def _chat(record: Record, _: str) -> list[Messages] | None:
    """A list of messages; the last answer may stand beside it, and a chosen one does."""
    key = record.first(CHATS)
    messages = record.chat(key, texts=True)
    if messages is None and not filled(structured(record.fields[key])):  # "[]" in a cell
        return None
    if messages is None:
        turns = marked(as_text(record.fields[key]))
        if turns is None:
            raise FormatError(f"a list of messages in {key!r}, or one text with marks of "
                              f"{', '.join(MARKINGS)}", record.fields[key])  # fmt: skip
        messages = turns
    answered = messages[-1]["role"] == "assistant"
    beside = next(iter(record.filled(("chosen",) if answered else ("chosen", *ANSWERS))), None)
    value = structured(record.fields.get(beside))
    if beside is None or (answered and not (isinstance(value, list | dict) or bears_text(value))):
        return [messages]
    asked = messages[:-1] if answered and messages[1:] else messages
    return [_answered(record, asked, beside)]


def _other_chat(record: Record, _: str) -> list[Messages] | None:
    found = (record.chat(key) for key in record.filled(MORE_CHATS))
    messages = next((one for one in found if one), None)
    return messages and [messages]


def _chosen(record: Record, _: str) -> list[Messages] | None:
    """Preference data: the chosen answer. hh-rlhf marks its turns inside one text."""
    if not filled(structured(record.fields["chosen"])):  # "[]" in a cell
        return None
    return [_answered(record, _question(record), "chosen")]


def _turns(record: Record, _: str) -> list[Messages] | None:
    """Questions in turn, with the reference answers where they are published, each in its turn."""
    key = "turns" if "turns" in record.there else "prompt"
    questions = structured(record.fields.get(key))
    if not isinstance(questions, list) or not all(isinstance(text, str) for text in questions):
        return None
    if key == "prompt" and record.first(ANSWERS):
        return None
    given = record.first(REFERENCES)
    answers = structured(record.fields[given]) if given else []
    answers = answers if isinstance(answers, list) else [answers]
    if not all(isinstance(text, str) for text in answers):
        raise FormatError("a list of texts in 'reference'", answers)
    record.used.add(key)
    pairs = zip_longest(questions, answers[: len(questions)], fillvalue="")
    return [in_turn(*chain.from_iterable(pairs))]


def _instances(record: Record, _: str) -> list[Messages] | None:
    """Self-instruct: one instruction with its instances, each an example of its own."""
    asked = record.fields.get(record.first(("instruction", "definition")))
    asked = asked[0] if isinstance(asked, list) and len(asked) == 1 else asked  # SuperNI's
    instances = structured(record.fields["instances"])
    if not isinstance(instances, list):
        raise FormatError("a list in 'instances'", instances)
    found = []
    for i, instance in enumerate(instances):
        if not isinstance(instance, dict) or "output" not in instance:
            raise FormatError(f"'output' in instances[{i}]", instance)
        one = Record({"instruction": asked, **instance})
        found += _pair(one, "") or []
        record.notes.update(one.notes)
    record.used |= {"instances", "instruction"}
    return found


def _pair(record: Record, _: str) -> list[Messages] | None:
    """A question in one field (with what stands beside it), an answer in another."""
    names = tuple(record.fields)
    present = record.filled(QUESTIONS) or pick(names, QUESTIONS)
    main = present[0] if present else None
    answers = pick(names, ANSWERS_TO.get(main, ANSWERS))
    if main is None or (main == "source" and "target" not in record.fields):
        return None
    if not answers:
        # A prompt of messages is a whole conversation; an answer that is nowhere is a mistake.
        chat = record.chat("prompt") if "prompt" in record.there else None
        return chat and [chat]
    answer = record.first(answers) or answers[0]
    talk = _answered(record, _question(record), answer)
    for key in record.filled(THOUGHTS):
        said = record.fields[key]
        if isinstance(said, str) and said.strip() not in talk[-1]["content"]:
            record.used.add(key)
            talk[-1]["content"] = thought(said) + talk[-1]["content"]
    return [talk]


def _question(record: Record) -> Messages:
    """What the user says, after the earlier turns where there are some."""
    main = next(iter(record.filled(ASKED_FIRST)), None)
    chat = record.chat(main) if main else None
    if chat:
        return chat
    talks = {key: _talk(record, key, alone=main is None) for key in record.filled(BESIDE)}
    earlier = [*_history(record), *(turn for talk in talks.values() for turn in talk or ())]
    asked = record.text(main) if main else ""
    first = main or next(iter(talks), None)
    text = asked or as_text(record.fields.get(first))
    turns = marked(text, whole=False) if first in IN_MARKS else None
    if turns:
        record.used.add(first)
        record.marked = True
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns = turns[:-1]
        return turns
    parts = [asked] if filled(asked) else []
    for key in record.filled(ASKED)[1:]:
        # A prompt that holds the question is the question in its template: it is not said twice.
        if not any((t := record.text(key)) in p or p in t for p in parts):
            parts.append(t)
    for key in record.filled(BESIDE):
        record.used.add(key)
        text = "" if talks[key] else as_text(record.fields[key])
        if filled(text) and text.strip().lower() not in NO_INPUT:
            parts.append(text)
    if record.filled(CHOICES):
        parts += _choices(record)
    if earlier and not parts:
        return earlier
    return [*earlier, *in_turn("\n\n".join(parts) if parts else asked)]


def _talk(record: Record, key: str, alone: bool) -> Messages | None:
    """The messages in a field that mostly holds text; its text is decoded where it stands alone."""
    value = record.fields[key]
    value = structured(value) if alone else value
    inner = value.get("messages") if isinstance(value, dict) else value
    talk = isinstance(inner, list) and inner and all(map(is_message, inner))
    return record.chat(key) if talk else None


def _choices(record: Record) -> list[str]:
    """The options of a multiple choice as one text, a line each, with their letters."""
    key = record.filled(CHOICES)[0]
    given = structured(record.fields[key])
    labels = None
    if isinstance(given, dict):
        texts = "text" in given
        labels = given.get("label") if texts else list(given)
        given = given["text"] if texts else list(given.values())
    if not isinstance(given, list) or not all(isinstance(one, str | int | float) for one in given):
        return []
    record.used.add(key)
    answer = next((record.fields[name] for name in record.filled(ANSWERS)), None)
    if isinstance(answer, int):
        raise FormatError(f"the answer as text beside {key!r}: its letter or its words", answer)
    labels = labels if isinstance(labels, list) else [chr(ord("A") + i) for i in range(len(given))]
    return ["\n".join(f"{label}. {one}" for label, one in zip(labels, given, strict=False))]


def _history(record: Record) -> Messages:
    if "history" not in record.there:
        return []
    earlier = record.chat("history")
    if earlier is None:
        given = structured(record.fields["history"])
        got = given[0] if isinstance(given, list) and given else given
        raise FormatError("a pair of texts in each entry of 'history'", got)
    return earlier


def _answered(record: Record, asked: Messages, key: str) -> Messages:
    """The question with the answer in `key`; an answer that is a whole conversation stands alone.

    Of several answers the first is read, which is noted.
    """
    record.used.add(key)
    value = inner_value(key, record.fields[key])
    chat = None
    if isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip()[:1] in "[{"):
        value, chat = _one_answer(record, key, structured(value), value)
    if chat is None:
        text = as_text(value)
        if key == "chosen":
            chat = marked(text, whole=not asked[-1]["content"])
        elif record.marked:
            text = LAST.sub("", text).strip()
        if chat is None or chat[-1]["role"] != "assistant":
            if key == "chosen":
                if not asked[-1]["content"]:
                    raise FormatError("marks of the turns in 'chosen', or a 'prompt' beside it",
                                      text)  # fmt: skip
                text = text.strip()
            chat = [{"role": "assistant", "content": text}]
    # UltraFeedback, TRL and hh-rlhf repeat the prompt in front of the answer.
    first = next((turn["role"] for turn in chat if turn["role"] != "system"), None)
    return chat if first == "user" else [*asked, *chat]


def _one_answer(record: Record, key: str, value: object, given: object):
    """(answer, None) or (None, messages) from an answer that is a list, an object or its text.

    given : as it stands; a text that happens to be JSON stays text, unless it is of messages
    """
    if is_message(value) and filled(value):
        return None, [record.message({"role": "assistant", **value}, f"'{key}'")]
    if isinstance(value, list) and value and all(map(is_message, value)):
        return None, [record.message(one, f"{key}[{i}]") for i, one in enumerate(value)]
    first = next(filter(filled, value), "") if isinstance(value, list) else None
    if isinstance(given, str) and not (isinstance(first, list) and all(map(is_message, first))):
        return given, None
    if key == "chosen" and isinstance(value, dict) and isinstance(value.get("text"), str):
        return value["text"], None
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # SQuAD's answers
        return _one_answer(record, key, value["text"], value["text"])
    if isinstance(value, dict) and "aliases" in value:  # TriviaQA's
        return value.get("value"), None
    if isinstance(first, dict):  # answers with their ratings, or one answer that is a list
        first = next((first[name] for name in ANSWER_KEYS if name in first), None)
    if first is None:
        return value, None
    if sum(map(filled, value)) > 1:
        record.notes[f"several answers in {key!r}: the first is read"] = True
    return _one_answer(record, key, first, first)


def accepted(cell: str) -> object:
    """Accepted answers out of a cell; a list of calls is one answer, and stays the text it is."""
    value = structured(cell)
    calls = isinstance(value, list) and value and all(
        isinstance(one, dict) and not pick(tuple(one), ANSWER_KEYS) for one in value)  # fmt: skip
    return cell if calls else value


def _text(record: Record, _: str) -> list[Messages] | None:
    """One text with marks; Vicuna's questions are a text with a `question_id`."""
    key = record.first(("text", "chat"))
    if isinstance(record.fields[key], list | dict):
        return None
    text = record.text(key)
    if "question_id" in record.fields:
        return [in_turn(text)]
    turns = marked(text)
    return turns and [turns]


def _tree(record: Record, paths: str) -> list[Messages] | None:
    """OASST: the best-ranked reply at each answer, then the follow-up with most replies.

    Deleted messages are left out; a follow-up that nobody answered is cut off. Where one reply is
    ranked, unranked ones stand behind it.
    """
    if {"message_id", "role", "text"} <= record.fields.keys():
        raise FormatError("an OASST tree ('prompt' with nested 'replies'); use the *_trees export",
                          record.raw)  # fmt: skip
    root = structured(record.fields.get("prompt"))
    if not isinstance(root, dict):
        return None
    record.used |= {"prompt", "message_tree_id", "tree_state"}
    found = [_best_path(root)] if paths == "best" else _all_paths(root)
    return [[record.message({key: node.get(key) for key in ("role", "text")}, "the tree")
             for node in path] for path in found]  # fmt: skip


def _replies(node: dict) -> list[dict]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise FormatError("a list of messages in 'replies'", replies)
    return [reply for reply in replies if not reply.get("deleted")]


def _best_path(root: dict) -> list[dict]:
    path = [root]
    while replies := _replies(path[-1]):
        if path[-1].get("role") == "assistant":
            path.append(max(replies, key=lambda reply: len(_replies(reply))))
        else:
            ranks = [reply.get("rank") for reply in replies]
            order = [(rank is None, rank or 0) for rank in ranks]
            path.append(replies[order.index(min(order))])
    return _to_last_answer(path)


def _all_paths(root: dict) -> list[list[dict]]:
    found, waiting = {}, [[root]]
    while waiting:
        path = waiting.pop()
        replies = _replies(path[-1])
        waiting += [[*path, reply] for reply in reversed(replies)]
        if not replies:
            ending = _to_last_answer(path)
            found[tuple(map(id, ending))] = ending
    answered = [path for path in found.values() if len(path) > 1]
    return answered or [[root]]


def _to_last_answer(path: list[dict]) -> list[dict]:
    answers = [i for i, node in enumerate(path) if node.get("role") == "assistant"]
    return path[: answers[-1] + 1] if answers else path[:1]


_SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
# The order matters: richer fields win over poorer ones.
FORMS = (
    Form("A list of messages", CHATS, "objects with a role (`role`, `from`) and a content "
         "(`content`, `value`, `text`, `parts`), objects with a field a side (`input`, `output`), "
         "pairs, plain texts in turn, or one text with marks; `chosen`, where it "
         "is filled, is the answer to the last question",
         {"messages": _SAID}, _chat),
    Form("An Open-Assistant tree", ("prompt", "message_id"), "`prompt` with its nested `replies`",
         {"prompt": {"role": "prompter", "text": "Hi", "replies": [
             {"role": "assistant", "text": "Hello.", "rank": 0, "replies": []}]}}, _tree),
    Form("A preference", ("chosen",), "its question in `prompt`, `instruction` or `question`, or "
         "in `chosen` itself; `rejected` is not read",
         {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}, _chosen),
    Form("A task with instances", ("instances",), "`instruction` or `definition`, and each `input` "
         "and `output`",
         {"instruction": "Greet.", "instances": [{"input": "Ada", "output": "Hi Ada."}]},
         _instances),
    Form("A question and an answer", QUESTIONS + ANSWERS, "the first filled question and the first "
         "filled answer; what stands beside the question (`input`, `context`, `passage`, "
         "`choices`, ...) follows it after a blank line, `history` goes before it, reasoning "
         "(`cot`, `rationale`, ...) before the answer in `<think>` marks",
         {"question": "Where?", "context": "It is in the barn.", "answer": "In the barn."}, _pair),
    Form("Questions in turn", ("turns", "prompt"), "a list of texts, with `reference` answers",
         {"turns": ["Hi", "Bye"], "reference": ["Hello.", "Goodbye."]}, _turns),
    Form("Messages under other names", MORE_CHATS, "objects with a role",
         {"thread": _SAID}, _other_chat),
    Form("One text", ("text", "chat"), "with the marks of " + ", ".join(MARKINGS),
         {"text": "### Human: Hi### Assistant: Hello."}, _text),
    Form("Pairs alone", ("history",), "pairs of texts", {"history": [["Hi", "Hello."]]},
         lambda record, _: [_history(record)]),
)  # fmt: skip


@lru_cache(4096)
def _forms(filled_names: tuple[str, ...]) -> tuple[Form, ...]:
    """The forms that a record with these filled fields may have, the first that fits wins."""
    return tuple(form for form in FORMS if pick(filled_names, form.needs))


def conversations(
    raw: object, paths: str = "best", columns: Mapping[str, str] | None = None
) -> tuple[list[Messages], list[str]]:
    """The conversations in one published record, and notes on what of it was not read.

    raw : the decoded JSON value, CSV row or Parquet row.
    paths : "best" (an OASST tree gives its best-ranked path) or "all" (every path that ends in
        an answer).
    columns : our name of a field -> the record's own ({"question": "titel"}); then only these.
    Returns at least one conversation, each with at least one assistant message. Raises FormatError.
    """
    if not isinstance(raw, dict):
        raise FormatError("an object with named fields", raw)
    record = Record(raw, columns)
    forms = _forms(record.there)
    found = next((one for form in forms if (one := form.read(record, paths))), None)
    if found is None and not record.there and pick(tuple(record.fields), QUESTIONS + ANSWERS):
        found = [in_turn("", "")]  # a row of blanks
    if found is None:
        raise FormatError(_refusal(record), raw)
    for messages in found:
        record.mark(messages)
    found = [_complete(record, messages) for messages in found]
    record.note_unread(found[0])
    if record.unread:
        extra = fingerprint(record.unread)
        for messages in found:
            messages[0] = {**messages[0], "unread": messages[0].get("unread", "") + extra}
    return found, list(record.notes)


def as_record(value: object) -> object:
    """A value of a file as a record: a bare list of messages is one, and JSON text in JSON too."""
    value = structured(value) if isinstance(value, str) else value
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return {"messages": value}
    return value


def _refusal(record: Record) -> str:
    rename = "name the columns, as in --columns question=A,answer=B or --columns messages=C"
    if "text" in record.there:
        return f"a conversation in 'text', with marks of {', '.join(MARKINGS)}; or {rename}"
    for key in record.filled(MORE_CHATS):
        texts = structured(record.fields[key])
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return (f"messages with roles in {key!r}; if its texts are turns, the user's first: "
                    f"--columns messages={key}")  # fmt: skip
    if asked := next(iter(record.filled(QUESTIONS)), None):
        wanted = ANSWERS_FIRST.get(asked, "output")
        return f"{wanted!r} or another answer beside {asked!r}; {rename}"
    return ("'messages', 'conversations', 'instruction' and 'output', 'prompt' and 'completion', "
            f"'turns', 'chosen', 'instances' or an OASST tree; {rename}")  # fmt: skip


def _complete(record: Record, messages: Messages) -> Messages:
    """With the record's system text in front and, where nobody answers, an empty answer behind."""
    if not messages:
        raise FormatError("at least one message", [])
    key = record.first(SYSTEM)
    if key and messages[0]["role"] != "system":
        system = record.content(structured(record.fields[key]), key, record.unread)
        system = re.sub(r"\A\s*SYSTEM:\s*", "", system or "")  # Glaive's mark
        messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "assistant" for message in messages):
        messages = [*messages, {"role": "assistant", "content": ""}]
    return messages


def record_id(raw: object, fallback: str, columns: Mapping[str, str] | None = None) -> str:
    """The record's own identifier as text, else `fallback`. Not made unique: the data are theirs.

    Lone surrogates are spelt out (`\\udc80`), because an id is printed and stored as UTF-8.
    """
    if isinstance(raw, dict):
        named = (columns or {}).get("id")
        for key in (named,) if named else IDS:
            value = raw.get(key)
            if isinstance(value, str) and value:
                return value.encode("utf-8", "backslashreplace").decode()
            if isinstance(value, float) and value.is_integer():
                return str(int(value))
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
    return fallback
