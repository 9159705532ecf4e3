"""A message, a conversation, and what is said about one that is neither.

A conversation is a list of `{"role": "user" | "assistant" | "system", "content": str}`.
"""

from __future__ import annotations

import orjson

Message = dict[str, str]
Conversation = list[Message]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "instruction", "question"), "user"),
    # A tool's output is context that the model reads, never text that it should learn to write.
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


class FormatError(ValueError):
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


def in_turn(*contents: str) -> Conversation:
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


def messages_in(raw: dict, key: str) -> Conversation:
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
