"""A conversation as token ids, with the positions that count in the loss.

The paper does not tell its prompt template. Ours is plain text on purpose: no chat markup that one
base model has seen and another has not. `TEMPLATE_VERSION` goes into every cache key and record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..config import InstructMiningError
from .formats import Message

TEMPLATE_VERSION = "plain-1"

_HEADERS = {"system": "System: ", "user": "User: ", "assistant": "Assistant: "}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens.

    ids : token ids, prompt and response, in reading order.
    targets : same length; True where the token is predicted and counted (response text and eos).
    dropped : messages cut from the left to fit `max_tokens`.
    truncated : True when the last response was cut at its end as well; it then has no eos.
    """

    ids: tuple[int, ...]
    targets: tuple[bool, ...]
    dropped: int = 0
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)


def segments(messages: Sequence[Message], eos: str) -> list[tuple[str, bool]]:
    """Text pieces of a conversation, each with whether it is a target.

    Without a last assistant message the pieces end in the header that asks for one, so the same
    function writes the prompt of a generation.

    >>> segments([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}], "<e>")
    [('User: Hi\\n\\nAssistant: ', False), ('Yo', True), ('<e>', True)]
    """
    return [(eos if text is None else text, target) for text, target in _pieces(messages)]


def encode(tokenizer, messages: Sequence[Message], *, max_tokens: int) -> Encoded:
    """Tokenise one conversation; `encode_many` says how."""
    return encode_many(tokenizer, [messages], max_tokens=max_tokens)[0]


def encode_many(
    tokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    turns: Sequence[int | None] | None = None,
) -> list[Encoded]:
    """Tokenise conversations, all pieces in one call of the tokenizer.

    Pieces are tokenised one by one, so no token spans the border between prompt and response and
    the number of target tokens does not depend on the prompt. Text that spells a special token
    ("</s>") stays text. A lone surrogate, which no tokenizer takes, becomes U+FFFD.

    conversations : each a list of messages; with a last user message it is a prompt for generation.
    max_tokens : longest row, in tokens, bos and eos counted. A longer one loses whole messages from
        the left (a reply goes with its question), but never its last question and answer; then
        its last response is cut at the end.
    turns : for each conversation None (every assistant turn is a target) or i (only the i-th is,
        and what follows it is left out).

    Raises InstructMiningError for an unknown role, a turn that is not there, or a tokenizer
    without eos.
    """
    if tokenizer.eos_token_id is None:
        raise InstructMiningError(
            "The tokenizer has no eos token, so the end of a response cannot be counted. "
            "Set tokenizer.eos_token first."
        )
    turns = [None] * len(conversations) if turns is None else turns
    cut = [_until_turn(m, t) for m, t in zip(conversations, turns, strict=True)]
    written = [_pieces(messages) for messages in cut]
    vocabulary = _Pieces(tokenizer)
    vocabulary.learn(text for row in written for text, _ in row)
    return [
        _fit(messages, row, vocabulary, max_tokens, last_only=turn is not None)
        for messages, row, turn in zip(cut, written, turns, strict=True)
    ]


def clean_text(text: str) -> str:
    """`text` with each lone surrogate as U+FFFD: the only change made before tokenising."""
    return _LONE_SURROGATE.sub("\ufffd", text)


Piece = tuple[str | None, bool]  # text (None stands for eos), and whether it is a target


def _pieces(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    waiting = ""  # text that is no target, until the next response
    for index, message in enumerate(messages):
        role = message["role"]
        if role not in _HEADERS:
            known = sorted(_HEADERS)
            raise InstructMiningError(f"Message {index} has role {role!r}; known: {known}.")
        if role == "assistant":
            pieces += [(waiting + _HEADERS[role], False), (message["content"], True), (None, True)]
            waiting = "\n\n"
        else:
            waiting += _HEADERS[role] + message["content"] + "\n\n"
    if messages and messages[-1]["role"] != "assistant":
        pieces.append((waiting + _HEADERS["assistant"], False))
    return pieces


def _until_turn(messages: Sequence[Message], turn: int | None) -> Sequence[Message]:
    if turn is None:
        return messages
    ends = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not 0 <= turn < len(ends):
        raise InstructMiningError(
            f"Turn {turn} was asked of a conversation with {len(ends)} replies."
        )
    return messages[: ends[turn] + 1]


class _Pieces:
    """Token ids of text pieces, each distinct piece tokenised once."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.known: dict[str | None, list[int]] = {None: [tokenizer.eos_token_id], "": []}

    def learn(self, texts: Iterable[str | None]) -> None:
        new = list(dict.fromkeys(t for t in texts if t not in self.known))
        if new:
            ids = self.tokenizer(
                [clean_text(t) for t in new],
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            self.known.update(zip(new, ids, strict=True))

    def write(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        ids, targets = list(self.bos), [False] * len(self.bos)
        for text, target in pieces:
            ids += self.known[text]
            targets += [target] * len(self.known[text])
        return ids, targets


def _fit(messages, pieces, vocabulary: _Pieces, max_tokens: int, last_only: bool) -> Encoded:
    """The conversation's tokens within `max_tokens`, as `encode_many` promises."""
    dropped = 0
    while True:
        if last_only:
            pieces = [(text, False) for text, _ in pieces[:-2]] + list(pieces[-2:])
        ids, targets = vocabulary.write(pieces)
        rest = _without_first(messages) if len(ids) > max_tokens else messages
        if len(rest) == len(messages):
            break
        dropped += len(messages) - len(rest)
        messages, pieces = rest, _pieces(rest)
        vocabulary.learn(text for text, _ in pieces)
    truncated = len(ids) > max_tokens
    return Encoded(tuple(ids[:max_tokens]), tuple(targets[:max_tokens]), dropped, truncated)


def _without_first(messages: Sequence[Message]) -> Sequence[Message]:
    """One message less at the left, and no reply left without its question; or all, if too few."""
    kept = len(messages) - (2 if messages[-1]["role"] == "assistant" else 1)
    for start in range(1, kept + 1):
        if messages[start]["role"] != "assistant":
            return messages[start:]
    return messages
