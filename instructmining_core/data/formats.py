"""One published record in, conversations out: the shapes of instruction data that people have.

A conversation is a list of `{"role": "user" | "assistant" | "system", "content": str}`. Most
records give one; a self-instruct record gives one for each of its instances, and an OASST tree one
for each path when all paths are asked for. A question that comes without an answer keeps an empty
assistant turn, so that the row stays and is scored as "not computable" instead of vanishing.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import orjson

from ..config import InstructMiningError

Message = dict[str, str]
Messages = list[Message]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "instruction", "question"), "user"),
    # A tool's output is context that the model reads, never text that it should learn to write.
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


class FormatError(InstructMiningError):
    """A record that is none of the known forms, or breaks its own: what was expected, what stood.

    `expected`, `got` : str, each one line, `got` at most about 90 characters.
    """

    def __init__(self, expected: str, got: object):
        self.expected, self.got = expected, show(got)
        super().__init__(f"expected {self.expected}, got {self.got}")


def show(value: object, width: int = 80) -> str:
    """`value` for an error message: its type and the start of it, safe to print anywhere."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        fields = ", ".join(ascii(key)[:40] for key in list(value)[:8])
        return f"an object with {fields or 'no fields'}"
    names = {str: "text", list: "a list", int: "the number", float: "the number", bool: "the value"}
    text = value if isinstance(value, str) else repr(value)
    text = text[: width + 1].encode("utf-8", "backslashreplace").decode()
    text = text[:width] + "..." if len(text) > width else text
    return f"{names.get(type(value), type(value).__name__)} {text!r}"


def in_turn(*contents: str) -> Messages:
    """Contents of a conversation in turn, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def listed(raw: dict, key: str) -> list:
    """A field that holds a list; in CSV it is a list written as JSON. Raises FormatError."""
    value = raw.get(key)
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise FormatError(f"a list in {key!r} (JSON: {error})", value) from None
    if isinstance(value, list):
        return value
    raise FormatError(f"a list in {key!r}", value)


def messages_in(raw: dict, key: str) -> Messages:
    """ShareGPT (`from`, `value`), OpenAI (`role`, `content`), LIMA's plain texts in turn, or
    Capybara's pairs (`input`, `output`).

    Raises FormatError naming the entry.
    """
    entries = listed(raw, key)
    if entries and all(isinstance(entry, str) for entry in entries):
        return in_turn(*entries)
    if entries and all(_is_pair(entry) for entry in entries):
        return in_turn(*(entry[side] for entry in entries for side in ("input", "output")))
    return [message(entry, f"{key}[{i}]") for i, entry in enumerate(entries)]


def _is_pair(entry: object) -> bool:
    sides = ("input", "output")
    return isinstance(entry, dict) and all(isinstance(entry.get(side), str) for side in sides)


def message(entry: object, where: str) -> Message:
    """One published message as role and content; `where` names it in an error. Raises FormatError.

    Tool and function output becomes the user's side; an assistant's null content (a tool call
    without text) becomes empty.
    """
    if not isinstance(entry, dict):
        raise FormatError(f"a message (an object) in {where}", entry)
    named = entry.get("role", entry.get("from"))
    role = ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise FormatError(f"a role such as 'user' or 'assistant' in {where}", named)
    content = entry.get("content", entry.get("value", entry.get("text")))
    if isinstance(content, str):
        return {"role": role, "content": content}
    if content is None and role == "assistant":
        return {"role": role, "content": ""}
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str) for part in parts):
            return {"role": role, "content": "".join(parts)}
    raise FormatError(f"text as the content of {where}", content)


ANSWERS = {
    "instruction": ("output", "response", "completion", "answer"),
    "prompt": ("completion", "response", "output", "answer"),
    "question": ("answer", "response", "output", "completion"),
    "query": ("response", "answer", "output"),
    "inputs": ("targets",),
}
IDS = ("id", "question_id", "message_tree_id", "prompt_id", "conversation_id", "uuid")
CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
HH_MARK = re.compile(r"\n*(?:^|\n\n)(Human|Assistant):", re.ASCII)


def conversations(raw: object, paths: str = "best") -> list[Messages]:
    """The conversations in one published record.

    raw : the decoded JSON value, CSV row or Parquet row.
    paths : "best" (an OASST tree gives its best-ranked path) or "all" (every path that ends in
        an answer).
    Returns at least one conversation, each with at least one assistant message.
    Raises FormatError.
    """
    if not isinstance(raw, dict):
        raise FormatError("an object with named fields", raw)
    found = _form(raw)(raw, paths)
    return [_complete(raw, messages) for messages in found]


def record_id(raw: object, fallback: str) -> str:
    """The record's own identifier as text, else `fallback`. Not made unique: the data are theirs.

    Lone surrogates are spelt out (`\\udc80`), because an id is printed and stored as UTF-8.
    """
    if isinstance(raw, dict):
        for key in IDS:
            value = raw.get(key)
            if isinstance(value, str) and value:
                return value.encode("utf-8", "backslashreplace").decode()
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
    return fallback


def _form(raw: dict) -> Callable[[dict, str], list[Messages]]:
    """Which reader a record needs. The order matters: richer fields win over poorer ones."""
    has = {key for key, value in raw.items() if value is not None}
    if "messages" in has:
        return lambda record, _: [messages_in(record, "messages")]
    for key in ("conversations", "conversation"):
        if key in has:
            return lambda record, _, key=key: [messages_in(record, key)]
    if isinstance(raw.get("prompt"), dict):
        return tree
    if {"message_id", "role", "text"} <= has:
        raise FormatError(
            "an OASST tree ('prompt' with nested 'replies'); use the *_trees export", raw
        )
    if "chosen" in has:
        return _chosen
    if isinstance(raw.get("prompt"), list) and not has.intersection(ANSWERS["prompt"]):
        return _turns
    if "instances" in raw:
        return _instances
    for question in ANSWERS:
        if question in has:
            return lambda record, _, question=question: [_pair(record, question)]
    if "turns" in has:
        return _turns
    if "text" in has and "<|im_start|>" in str(raw["text"]):
        return _chatml
    if "text" in has and "question_id" in raw:
        return lambda record, _: [in_turn(_text(record, "text"))]
    raise FormatError(
        "'messages', 'conversations', 'instruction' and 'output', 'prompt' and 'completion', "
        "'turns', 'chosen', 'instances' or an OASST tree",
        raw,
    )


def _text(raw: dict, key: str, optional: bool = False) -> str:
    value = raw.get(key)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    raise FormatError(f"text in {key!r}", value if key in raw else raw)


def _complete(raw: dict, messages: Messages) -> Messages:
    """With the record's system text in front and, where nobody answers, an empty answer behind."""
    if not messages:
        raise FormatError("at least one message", [])
    system = raw.get("system") or raw.get("system_prompt")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "assistant" for message in messages):
        messages = [*messages, {"role": "assistant", "content": ""}]
    return messages


def _pair(raw: dict, question: str) -> Messages:
    """Alpaca, Dolly, LIMA with `history`, prompt/completion, question/answer, inputs/targets."""
    if isinstance(raw[question], list):
        asked = messages_in(raw, question)
    else:
        asked = in_turn(_asked(raw) if question == "instruction" else _text(raw, question))
    answer = next((key for key in ANSWERS[question] if key in raw), None)
    if answer is None:
        raise FormatError(f"{ANSWERS[question][0]!r} beside {question!r}", raw)
    if isinstance(raw[answer], list):
        return [*asked, *messages_in(raw, answer)]
    earlier = []
    if raw.get("history"):
        for i, turn in enumerate(listed(raw, "history")):
            if not (isinstance(turn, list) and [type(t) for t in turn] == [str, str]):
                raise FormatError(f"a pair of texts in history[{i}]", turn)
            earlier += in_turn(*turn)
    answered = {"role": "assistant", "content": _text(raw, answer, optional=True)}
    return [*earlier, *asked, answered]


def _asked(raw: dict) -> str:
    """Alpaca's and Dolly's question: the instruction, a blank line, the input where there is one.

    The paper's prompt template is not published; this is the plain join.
    """
    instruction = _text(raw, "instruction")
    extra = _text(raw, "input" if raw.get("input") is not None else "context", optional=True)
    if not extra.strip():
        return instruction
    return f"{instruction}\n\n{extra}" if instruction.strip() else extra


def _instances(raw: dict, _: str) -> list[Messages]:
    """Self-instruct: one instruction with its instances, each an example of its own."""
    instances = listed(raw, "instances")
    if not instances:
        raise FormatError("at least one entry in 'instances'", [])
    for i, instance in enumerate(instances):
        if not isinstance(instance, dict) or "output" not in instance:
            raise FormatError(f"'output' in instances[{i}]", instance)
    shared = {"instruction": raw.get("instruction")}
    return [_pair({**shared, **instance}, "instruction") for instance in instances]


def _turns(raw: dict, _: str) -> list[Messages]:
    """MT-Bench: questions in turn, with the reference answers where they are published.

    The hub's copy calls the turns `prompt`.
    """
    questions = listed(raw, "turns" if "turns" in raw else "prompt")
    given = next((key for key in ("reference_turns", "reference", "answers") if raw.get(key)), None)
    if given is None:
        answers = []
    elif isinstance(raw[given], str) and raw[given].lstrip()[:1] != "[":
        answers = [raw[given]]
    else:
        answers = listed(raw, given)
    for name, texts in (("turns", questions), ("reference", answers)):
        if not all(isinstance(text, str) for text in texts):
            raise FormatError(f"a list of texts in {name!r}", texts)
    said = []
    for i, question in enumerate(questions):
        said += [question, answers[i] if i < len(answers) else ""]
    return [in_turn(*said)]


def _chatml(raw: dict, _: str) -> list[Messages]:
    """One text with `<|im_start|>role` marks, as in oasst_top1."""
    turns = CHATML.findall(_text(raw, "text"))
    return [[message({"role": who, "content": said.strip()}, "'text'") for who, said in turns]]


def _chosen(raw: dict, _: str) -> list[Messages]:
    """Preference data: the chosen answer. hh-rlhf marks its turns inside one text."""
    key = next((key for key in ("prompt", "instruction", "question") if raw.get(key)), "prompt")
    prompt, chosen = raw.get(key), raw["chosen"]
    before = []
    if isinstance(prompt, list):
        before = messages_in(raw, key)
    elif isinstance(prompt, str):
        before = _marked(prompt) if HH_MARK.search(prompt) else in_turn(prompt)
        if before and before[-1] == {"role": "assistant", "content": ""}:
            before = before[:-1]
    if isinstance(chosen, list):
        answered = messages_in(raw, "chosen")
        # UltraFeedback and TRL repeat the prompt in front of the answer.
        return [answered if len(answered) > 1 else [*before, *answered]]
    text = _text(raw, "chosen")
    if HH_MARK.match(text):
        return [_marked(text)]
    if not before:
        raise FormatError("'\\n\\nHuman:' marks in 'chosen', or a 'prompt' beside it", text)
    return [[*before, {"role": "assistant", "content": text.strip()}]]


def _marked(text: str) -> Messages:
    before, *pieces = HH_MARK.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": words.strip()}
        for who, words in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    opening = [{"role": "system", "content": before.strip()}] if before.strip() else []
    return [*opening, *turns]


def tree(raw: dict, paths: str) -> list[Messages]:
    """OASST: the best-ranked reply at each answer, then the follow-up with most replies.

    raw : a tree record; raw["prompt"] is its root message with nested `replies`.
    paths : "best" gives one path, "all" every path that ends in an answer.
    Deleted messages are left out; a follow-up that nobody answered is cut off. Where one reply
    is ranked, unranked ones stand behind it. Raises FormatError.
    """
    root = raw["prompt"]
    found = [_best_path(root)] if paths == "best" else _all_paths(root)
    return [[message(node, "the tree") for node in path] for path in found]


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
