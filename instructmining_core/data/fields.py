"""A record's fields by name, and a message as role and content.

What is filled counts, not what is present; a name counts without case and blanks; a list may stand
as JSON text. What is read of a record is noted as used, so that the rest can be told.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

from ..config import InstructMiningError

Message = dict[str, str]
Messages = list[Message]

# A tool's output is context that the model reads, never text that it should learn to write.
ROLES = {name: role for role, names in {
    "user": "user human prompter instruction question inst input tool function observation "
            "function_response tool_response tool_result ipython",
    "assistant": "assistant gpt chatgpt bot chatbot model ai response function_call tool_call bing "
                 "bard claude /inst",
    "system": "system developer",
}.items() for name in names.split()}  # fmt: skip
MODEL_ROLE = re.compile(r"(chat)?gpt-?\d[\w.-]*|(claude|gemini|llama|mistral|qwen)-[\w.-]+")

ROLE_KEYS = ("role", "from", "author", "speaker")
CONTENT_KEYS = ("content", "value", "text", "parts")
REASONING = ("reasoning_content", "reasoning", "thinking")  # of a message: part of its text
CALLS = ("tool_calls", "function_call")

IDS = ("id", "question_id", "message_tree_id", "prompt_id", "conversation_id", "uuid")
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "tools", "functions")
# More names of what is no text, in the name of a field or in the type of a part of a content.
NO_TEXT = re.compile(r"image|img|picture|photo|video|audio|speech|tools|functions")
# The sides of a talk as fields of one object, in the order in which they speak.
SIDES = {name: role for role, names in {
    "system": "system", "user": "user human question instruction input prompt query",
    "assistant": "assistant gpt bot response output answer completion",
}.items() for name in names.split()}  # fmt: skip
# What takes an answer out of training: of a message, or of a row (there also a list, an entry for
# each message or answer). `label` and `kto_tag` tell that a row's answer is a rejected one.
MASKS = ("weight", "train", "trainable", "loss", "loss_mask", "loss_scale", "train_detail",
         "output_with_loss")
NOT_TO_LEARN = (*MASKS, "label", "kto_tag")
SILENT = {*IDS, "id", "category", "source", "user", "dataset", "data_source", "data_name", "lang",
          "language", "type", "kind", "meta", "metadata", "model", "model_id", "model_name", "name",
          "tool_call_id", "tags", "topic", "rejected", "score", "url", "title", "text_id",
          "message_id", "parent_id", "timestamp", "tstamp", "license", "split",
          "rejected_response", "non_preferred_output"}  # fmt: skip
NO_LOSS = {*SILENT, *NOT_TO_LEARN}  # of a row: not told where it is not read
# A text, which is passed over, or the end of an object before another one.
OBJECTS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(\})\s+(?=\{)""")
LONGEST_LITERAL = 1_000_000  # characters of a Python literal that is tried


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


def filled(value: object) -> bool:
    """Whether a field says anything: null, NaN, blank text, [] and {} do not, nor parts of a
    content that hold none but such.
    """
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value):
        return any(filled(field) for part in value for key, field in part.items() if key != "type")
    return value is not None and value == value and value not in ([], {}, b"")


def structured(value: object) -> object:
    """A list or object that stands as JSON text or a Python literal (as in CSV), decoded.

    A struct of lists (`{"role": [..], "content": [..]}`) becomes a list of objects. Anything else
    is returned as it is.
    """
    if isinstance(value, str) and value[:2] in ('"[', '"{'):  # JSON text in JSON text
        with contextlib.suppress(ValueError):
            value = orjson.loads(value)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for read in (orjson.loads, json.loads, _literal):
            try:
                found = read(value)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
            value = found if isinstance(found, list | dict) else value
            break
    if isinstance(value, dict) and any(key in value for key in ROLE_KEYS):
        columns = list(value.values())
        if all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value


def _literal(text: str) -> object:
    if len(text) > LONGEST_LITERAL:
        raise ValueError("too long")
    # NumPy, and so pandas in CSV, writes no commas between objects.
    text = OBJECTS.sub(lambda found: "}, " if found[1] else found[0], text.strip())
    if re.match(r"\[\s*['\"]", text) and re.search(r"['\"]\s+['\"]", text):
        raise ValueError("texts without commas, which Python would join")
    with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
        return ast.literal_eval(_Plain().visit(ast.parse(text, mode="eval")))


class _Plain(ast.NodeTransformer):
    """What pandas writes into a cell, as a plain literal: `array([..], dtype=object)`, `nan`."""

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        if not all(isinstance(getattr(key, "value", None), str) for key in node.keys):
            raise ValueError("no object of ours: a name in it is no text")
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        array = isinstance(node.func, ast.Name) and node.func.id == "array" and node.args
        return self.visit(node.args[0]) if array else node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(None) if node.id in ("nan", "null") else node


def inner_value(key: str, value: object) -> object:
    """What an object of one field under `inputs` or `outputs` holds, as traces of runs have it."""
    if key in ("inputs", "outputs") and isinstance(value, dict) and len(value) == 1:
        (inner,) = value.values()
        return value if isinstance(inner, int | float) else inner
    return value


def in_turn(*contents: str) -> Messages:
    """Contents of a conversation in turn, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def plain(value: object) -> object:
    """`value` as JSON has it, whatever file it came from: no null fields, bytes as text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, bytes):
        return bytes_text(value)
    return value


def bytes_text(value: bytes) -> str:
    """Bytes as text: UTF-8 where they are that, else base64."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def as_text(value: object) -> str:
    """A value as the text that it stands for: "" for null, numbers and objects as JSON."""
    if isinstance(value, str | bytes):
        return value if isinstance(value, str) else bytes_text(value)
    if not filled(value):
        return ""
    return json_text(value) if isinstance(value, dict | list | int | float) else str(value)


def json_text(value: object) -> str:
    """A value as one line of JSON text, without its null fields."""
    return json_bytes(plain(value)).decode()


def json_bytes(value: object) -> bytes:
    """A value as one line of JSON; what JSON has no form for (a date) as its own text."""
    try:
        return orjson.dumps(value, default=str)
    except TypeError:  # lone surrogates and integers above 64 bits: ASCII escapes carry both
        return json.dumps(value, separators=(",", ":"), default=str).encode()


@lru_cache(4096)
def pick(names: tuple[str, ...], keys: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `keys` that are among `names`, in the order of `keys`."""
    return tuple(key for key in keys if key in names)


@lru_cache(4096)
def _folded(keys: tuple) -> tuple[str, ...]:
    """Names without case and blanks."""
    return tuple(str(key).strip().lower() for key in keys)


def _fields(raw: dict) -> dict[str, Any]:
    """A record by folded names; of two that fold to one name, the first filled one has it."""
    fields: dict[str, Any] = {}
    for name, (key, value) in zip(_folded(tuple(raw)), raw.items(), strict=True):
        if name not in fields or not filled(fields[name]):
            fields[name] = value
        elif filled(value):
            fields[f"{key} (again)"] = value
    return fields


class Record:
    """A record's fields by folded name, what was used of them, and notes on what was not.

    columns : our name -> the record's own, in place of the names that are looked for
    """

    def __init__(self, raw: dict, columns: Mapping[str, str] | None = None) -> None:
        self.raw, self.notes, self.used = raw, {}, set()
        self.unread: list = []  # what is no text, for the row's identity
        self.marked = False  # whether the question stands in marks of a chat
        self.fields = self.all = _fields(raw)
        if columns:
            lacking = [name for name in columns.values() if name not in raw]
            if lacking:
                raise FormatError(f"the column {lacking[0]!r} that --columns names", raw)
            self.used = set(_folded(tuple(columns.values())))
            self.fields = {ours: raw[theirs] for ours, theirs in columns.items()}
        self.there = tuple([key for key, value in self.fields.items() if filled(value)])

    def filled(self, keys: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `keys` that are filled, in the order of `keys`."""
        return pick(self.there, keys)

    def first(self, keys: tuple[str, ...]) -> str | None:
        """The first filled one of `keys`, which counts as used."""
        found = pick(self.there, keys)
        if not found:
            return None
        self.used.add(found[0])
        return found[0]

    def text(self, key: str) -> str:
        """A field as text: numbers and objects as JSON. Raises FormatError for a list of texts."""
        self.used.add(key)
        value = inner_value(key, self.fields[key])
        if isinstance(value, dict) and isinstance(text := value.get("text"), str):
            for name, beside in value.items():  # its tokens, its source
                self._leave(name, beside, self.unread, f" of {key!r}", text)
            return text
        if isinstance(value, list) and value:
            raise FormatError(f"one text in {key!r} (a batch of columns: one row each)", value)
        return as_text(value)

    def chat(self, key: str, texts: bool = False) -> Messages | None:
        """The messages in a field, or None where it holds no list of them.

        texts : whether plain texts are turns. Raises FormatError naming the entry.
        """
        entries = structured(self.fields.get(key))
        if isinstance(entries, dict):
            inner = next(iter(entries)) if len(entries) == 1 else "messages"
            for name in entries.keys() - {inner}:
                if filled(entries[name]) and filled(entries.get(inner)):
                    self._leave(name, entries[name], self.unread, f" of {key!r}")
            entries = structured(entries.get(inner))
        if not isinstance(entries, list) or not entries:
            return None
        entries = [structured(entry) for entry in entries]
        if texts or key == "history":
            entries = [turn for entry in entries for turn in _sides(entry)]
        if all(isinstance(entry, str) for entry in entries):
            found = in_turn(*entries) if texts else None
        elif sides := _pairs(entries):
            found = in_turn(*sides)
        elif not texts and not all(map(is_message, entries)):
            found = None
        else:
            found = [self.message(entry, f"{key}[{i}]") for i, entry in enumerate(entries)]
        if found is not None:
            self.used.add(key)
        return found

    def message(self, entry: object, where: str) -> Message:
        """One published message as role and content. Raises FormatError naming `where`."""
        if not isinstance(entry, dict):
            raise FormatError(f"a message (an object) in {where}", entry)
        named = _first_filled(entry, ROLE_KEYS)
        named = named.get("role") if isinstance(named, dict) else named
        folded = named.strip().lower() if isinstance(named, str) else ""
        role = ROLES.get(folded) or ("assistant" if MODEL_ROLE.fullmatch(folded) else None)
        if role is None:
            got = entry if named is None else named
            raise FormatError(f"a role such as 'user' or 'assistant' in {where}", got)
        unread: list = []
        content, off = None, ""
        for key in pick(tuple(name for name in entry if filled(entry[name])), CONTENT_KEYS):
            content = self.content(entry[key], where, unread)
            if content:  # else it holds pictures, and its text may stand beside it
                break
        for key in _others(tuple(entry)):
            value = entry[key]
            if key in MASKS and not isinstance(value, list | dict):
                off = off or (key if is_off(key, value) else "")
            elif not filled(value):
                continue
            elif key in REASONING and isinstance(value, str):
                content = thought(value) + (content or "")
            elif key in CALLS and isinstance(calls := structured(value), list | dict):
                calls = calls if isinstance(calls, list) else [calls]
                content = "\n".join([*([content] if content else []), *map(_call, calls)])
            else:
                self._leave(key, value, unread, " of a message")
        if content is None:
            if role != "assistant" and not unread:
                absent = next((entry[key] for key in CONTENT_KEYS if key in entry), entry)
                if not isinstance(absent, str):
                    raise FormatError(f"text as the content of {where}", absent)
                content = absent
            content = content or ""
        found = {"role": role, "content": content}
        if unread:
            found["unread"] = fingerprint(unread)
        if off and role == "assistant":
            self._not_learnt(found, off)
        return found

    def content(self, content: object, where: str, unread: list) -> str | None:
        """Text of a content field; parts that are no text are put into `unread`."""
        if content is None or isinstance(content, str):
            return content
        if isinstance(content, bytes):
            return bytes_text(content)
        if isinstance(content, dict):
            content = content.get("parts", [content])
        if not isinstance(content, list):
            raise FormatError(f"text as the content of {where}", content)
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(part, str):
                texts.append(part)
            elif not isinstance(part, dict):
                raise FormatError(f"text as the content of {where}", content)
            elif called := part if kind == "tool_use" else part.get("functionCall"):
                texts.append(("\n" if texts else "") + _call(called))
            elif filled(part.get("functionResponse")):
                texts.append(json_text(part["functionResponse"]))
            elif isinstance(kind, str) and NO_TEXT.search(kind):
                self._left_out(part, unread)
            elif filled(inner := _first_filled(part, (*CONTENT_KEYS, "thinking"))):
                inner = self.content(inner, where, unread) or ""
                texts.append(thought(inner) if kind == "thinking" else inner)
            elif kind != "text":
                self._left_out(part, unread)
        return "".join(texts)

    def _left_out(self, part: dict, unread: list) -> None:
        unread.append(part)
        kind = part.get("type") or ", ".join(map(str, part))
        self.notes[f"content of type {kind!r} is not read"] = True

    def mark(self, messages: Messages) -> None:
        """Take the answers out of training that the row's own marks take out."""
        for key in self.filled(NOT_TO_LEARN):
            answers = [message for message in messages if message["role"] == "assistant"]
            value = structured(self.fields[key])
            sizes = {len(answers): answers, len(messages): messages}
            marks = value if isinstance(value, list) else [value] * len(answers)
            if len(marks) not in sizes or isinstance(value, dict):
                self.notes[f"{key!r} fits neither messages nor answers, and is not read"] = True
                continue
            for message, one in zip(sizes[len(marks)], marks, strict=True):
                if message["role"] == "assistant" and is_off(key, one):
                    self._not_learnt(message, key)

    def note_unread(self, messages: Messages) -> None:
        """Note the fields that were not used, and put what is no text into the identity."""
        said = None
        for key, value in self.all.items():
            if key in NO_LOSS or key in self.used or not filled(value):
                continue
            said = said or "\n".join(message["content"] for message in messages)
            if _no_text(key, value) or not _rendering(value, messages):
                self._leave(key, value, self.unread, said=said)

    def _leave(self, key: str, value: object, unread: list, of: str = "", said: str = "") -> None:
        """Leave a field unread: it is noted where it is no text at all, or bears another text than
        what is `said`."""
        if _no_text(key, value):
            unread.append([key, structured(value)])
        elif key not in MASKS and not bears_text(value, said):
            return
        self.notes[f"{key!r}{of} is not read"] = True

    def _not_learnt(self, message: Message, key: str) -> None:
        message["train"] = False
        self.notes[f"answers that {key!r} takes out of training are context, not scored"] = True


def fingerprint(value: object) -> str:
    """16 hex digits that tell apart what is no text."""
    return hashlib.sha256(json_bytes(plain(value))).hexdigest()[:16]


@lru_cache(4096)
def _others(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Fields of a message beside its role, its content and what is silent, calls last."""
    known = {*SILENT, *ROLE_KEYS, *CONTENT_KEYS}
    return tuple(sorted((key for key in keys if key not in known), key=CALLS.__contains__))


def _first_filled(entry: dict, keys: tuple[str, ...]) -> object:
    for key in keys:
        if key in entry and filled(entry[key]):
            return entry[key]
    return None


def is_answer(message: Mapping) -> bool:
    """Whether this message is the assistant's, and not taken out of training."""
    return message["role"] == "assistant" and message.get("train") is not False


def is_message(entry: object) -> bool:
    """Whether this is an object with a role."""
    if not isinstance(entry, dict):
        return False
    first, second, *names = ROLE_KEYS
    if filled(entry.get(first)) or filled(entry.get(second)):
        return True
    # The author of an answer may be anybody.
    return any(isinstance(who := entry.get(key), dict) or str(who).strip().lower() in ROLES
               for key in names)  # fmt: skip


def _no_text(key: str, value: object) -> bool:
    """Whether a field holds a picture, a sound or a tool's definition."""
    if isinstance(value, bytes) or (isinstance(value, dict) and filled(value.get("bytes"))):
        return True
    return key in MEDIA or (not isinstance(value, int | float) and bool(NO_TEXT.search(key)))


def _sides(entry: object) -> list:
    """The messages of an object with a field for each side (Capybara's `input` and `output`)."""
    if not isinstance(entry, dict) or is_message(entry):
        return [entry]
    sides = {key: SIDES[name] for key in entry
             if filled(entry[key]) and (name := str(key).strip().lower()) in SIDES}  # fmt: skip
    if len(set(sides.values())) < max(len(sides), 1):  # two of one side, or none
        return [entry]
    found = [{"role": role, "content": entry[key]} for role in dict.fromkeys(SIDES.values())
             for key in sides if sides[key] == role]  # fmt: skip
    beside = {key: value for key, value in entry.items()
              if key not in sides and key not in CONTENT_KEYS}  # fmt: skip
    found[-1] |= beside
    return found


def _pairs(entries: list) -> list[str] | None:
    """The texts of pairs (`[["a", "b"]]`), in turn."""
    found = []
    for entry in entries:
        if not (isinstance(entry, list) and [type(side) for side in entry] == [str, str]):
            return None
        found += entry
    return found


def _call(call: object) -> str:
    """A tool call as JSON text: name and arguments, without the ids of one conversation."""
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or "name" not in inner:
        return json_text(call)
    given = next((inner[key] for key in ("arguments", "input", "args") if key in inner), {})
    arguments = structured(given)
    return json_text({"name": inner["name"], "arguments": arguments})


def thought(text: str) -> str:
    """Reasoning as it stands before an answer."""
    return f"<think>\n{text.strip()}\n</think>\n\n"


def is_off(key: str, value: object) -> bool:
    """Whether a mark says "not to be learnt"; a label or loss of 0 may be any class or number."""
    said = str(value).strip().lower()
    return said == "false" or (said in ("0", "0.0") and key not in ("label", "loss"))


def bears_text(value: object, said: str = "") -> bool:
    """Whether a value holds a text of more than one word that is not part of what is `said`."""
    if isinstance(value, str):
        return len(value.split(None, 2)) > 1 and value.strip() not in said
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and any(bears_text(one, said) for one in value[:100])


def _rendering(value: object, messages: Messages) -> bool:
    """Whether a field says again all that the conversation says, as Alpaca's `text` does."""
    return isinstance(value, str) and all(m["content"].strip() in value for m in messages)
