"""Conversations as the indicators read them: checked once, cleaned once, then turn by turn.

A row that cannot be read is not dropped: it becomes a `CheckedConversation` without turns and with
a `problem`, and so ends as NaN with that reason in every column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.fields import is_answer
from ..data.tokenization import clean_text

KNOWN_ROLES = ("system", "user", "assistant")
EMPTY = "empty response"


@dataclass(frozen=True, slots=True)
class CheckedConversation:
    """One row.

    messages : role and content of each message; lone surrogates are U+FFFD
    ends : positions of the assistant's messages, without those taken out of training
    problem : why the row has no turn to score, "" if it has
    """

    messages: tuple[dict[str, str], ...]
    ends: tuple[int, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One response of the assistant with everything said before it."""

    row: int
    index: int
    context: tuple[dict[str, str], ...]
    response: str


@dataclass(frozen=True)
class Column:
    """One number a row.

    values : float64, shape (n,), NaN where there is none
    reasons : n strings; why a value is NaN, or a note on how it came about; "" where all is fine
    """

    values: np.ndarray
    reasons: list[str] = field(default_factory=list)


def read(messages) -> CheckedConversation:
    """Check and clean the messages of one row; never raises."""
    problem = _problem(messages)
    if problem:
        return CheckedConversation((), (), problem)
    clean = tuple({"role": m["role"], "content": _clean(m["content"])} for m in messages)
    ends = tuple(i for i, m in enumerate(messages) if is_answer(m))
    return CheckedConversation(clean, ends, "" if ends else _no_answer(clean))


def each_turn(conversations: Sequence[CheckedConversation]) -> Iterator[Turn]:
    """Every assistant turn of every conversation, in order."""
    for row, conversation in enumerate(conversations):
        for index, end in enumerate(conversation.ends):
            messages = conversation.messages
            yield Turn(row, index, messages[:end], messages[end]["content"])


def mean_over_turns(
    conversations: Sequence[CheckedConversation],
    values: Sequence[float] | np.ndarray,
    reasons: Sequence[str] | None = None,
) -> Column:
    """The mean of a row's turns: the declared aggregate of every indicator of a turn.

    values : one number for each turn of `each_turn(conversations)`, NaN where there is none; a row
        is the mean of the rest, and NaN if nothing rests.
    reasons : why a turn is NaN, or a note, "" for none; with several turns the turn is named.
    """
    counts = np.array([len(c.ends) for c in conversations], dtype=np.int64)
    rows = np.repeat(np.arange(len(counts)), counts)
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(rows):
        raise ValueError(f"{len(values)} values for {len(rows)} turns; give one value a turn")
    fine = ~np.isnan(values)
    total = np.bincount(rows[fine], weights=values[fine], minlength=len(counts))
    number = np.bincount(rows[fine], minlength=len(counts))
    mean = np.full(len(counts), np.nan)
    np.divide(total, number, out=mean, where=number > 0)
    return Column(mean, _reasons_of_rows(conversations, counts, rows, reasons))


def cut_note(dropped: int, truncated: bool, what: str = "text") -> str:
    """What a model was not given of a row, as its reason: first messages, or the end of `what`."""
    notes = [f"{dropped} earlier messages cut to fit the model"] if dropped else []
    return "; ".join([*notes, f"end of the {what} cut to fit the model"] if truncated else notes)


def first_kept(lengths: Sequence[int], room: int, last: int) -> int:
    """The first message that is kept so that the rest fits into `room` tokens, `last` at most."""
    first = 0
    while first < last and sum(lengths[first:]) > room:
        first += 1
    return first


def values_and_reasons(found: Iterable[tuple[Any, str]]) -> tuple[list[float], list[str]]:
    """Values and reasons from pairs of what `map_batches` gave and a note: `Failed` is NaN."""
    values, reasons = [], []
    for score, note in found:
        why = getattr(score, "reason", "")
        values.append(np.nan if why else score)
        reasons.append(why or note)
    return values, reasons


def _reasons_of_rows(conversations, counts, rows, reasons) -> list[str]:
    texts = [c.problem for c in conversations]
    for position in [i for i, reason in enumerate(reasons or ()) if reason]:
        row = rows[position]
        note = reasons[position]
        if counts[row] > 1:
            first = np.searchsorted(rows, row)
            note = f"turn {position - first + 1}: {note}"
        texts[row] = f"{texts[row]}; {note}" if texts[row] else note
    return texts


def _no_answer(messages) -> str:
    if any(m["role"] == "assistant" for m in messages):
        return "the row takes its answer out of training (weight 0, train or label false)"
    return "no assistant turn"


def _problem(messages) -> str:
    if isinstance(messages, (str, bytes, dict)) or not hasattr(messages, "__len__"):
        return f"messages is {type(messages).__name__}, not a list"
    if len(messages) == 0:
        return "no messages"
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"message {position} is {type(message).__name__}, not an object"
        role, content = message.get("role"), message.get("content")
        if role not in KNOWN_ROLES:
            return f"message {position} has role {role!r}, not one of {', '.join(KNOWN_ROLES)}"
        if not isinstance(content, str):
            return f"content of message {position} is {type(content).__name__}, not text"
    return ""


def _clean(text: str) -> str:
    return text if text.isascii() else clean_text(text)
