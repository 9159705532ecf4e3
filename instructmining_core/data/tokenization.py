"""A conversation as token ids, with the positions that count in the loss.

The paper does not tell its prompt template. Ours is the tokenizer's own chat template where it has
one, else plain text, which no base model has seen more of than another. No header of ours ends in a
space: it would be a token of its own before an answer that a base expects to carry it, and costs
SmolLM2 11 to 13 nats at the answer's first token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..config import InstructMiningError
from .fields import Message, is_answer

CHAT, PLAIN = "chat-1", "plain-2"  # versions of the two templates, for records

_HEADERS = {"system": "System:\n", "user": "User:\n", "assistant": "Assistant:\n"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_PLACE = re.compile("\ue000(\\d+)\ue001")  # stands for a message's content in a chat template


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens.

    ids : token ids, prompt and response, in reading order.
    targets : same length; True where the token is predicted and counted (response text and the
        token that ends it).
    dropped : messages cut from the left to fit `max_tokens`.
    truncated : True when the last response was cut at its end as well; it then has no end token.
    """

    ids: tuple[int, ...]
    targets: tuple[bool, ...]
    dropped: int = 0
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)


def template_version(tokenizer, template: str = "auto") -> str:
    """Version of the template that `encode_many` takes: `CHAT` or `PLAIN`."""
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_one:
        raise InstructMiningError("The tokenizer has no chat template; set template: plain.")
    return CHAT if template == "chat" or (template == "auto" and has_one) else PLAIN


def encode(
    tokenizer, messages: Sequence[Message], *, max_tokens: int, template: str = "auto"
) -> Encoded:
    """Tokenise one conversation; `encode_many` says how."""
    return encode_many(tokenizer, [messages], max_tokens=max_tokens, template=template)[0]


def encode_many(
    tokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    turns: Sequence[int | None] | None = None,
    template: str = "auto",
) -> list[Encoded]:
    """Tokenise conversations, all pieces in one call of the tokenizer.

    Pieces are tokenised one by one, so no token spans the border between prompt and response and
    the number of target tokens does not depend on the prompt. Text that spells a special token
    ("</s>") stays text. A lone surrogate, which no tokenizer takes, becomes U+FFFD.

    conversations : each a list of messages; with a last user message it is a prompt for generation.
    max_tokens : longest row, in tokens, bos and eos counted. A longer one loses whole messages from
        the left (a reply goes with its question), but never its last question and answer; then
        its last response is cut at the end.
    turns : for each conversation None (every answer is a target that is not taken out of training)
        or i (only the i-th is, and what follows it is left out).
    template : "chat" (the tokenizer's own, with the system prompt that it adds where none is given;
        an answer ends in the template's end-of-turn token), "plain", or "auto": chat where there
        is one. A chat template that refuses a conversation is given it with each run of system and
        user messages as one user message.

    Raises InstructMiningError for an unknown role, a turn that is not there, a tokenizer without
    eos, or a conversation that its chat template refuses.
    """
    if tokenizer.eos_token_id is None:
        raise InstructMiningError(
            "The tokenizer has no eos token, so the end of a response cannot be counted. "
            "Name one as eos_token in the model's tokenizer_config.json, or take another model."
        )
    turns = [None] * len(conversations) if turns is None else turns
    cut = [_until_turn(m, t) for m, t in zip(conversations, turns, strict=True)]
    writer = _Writer(tokenizer, template)
    written = [writer.pieces(messages) for messages in cut]
    writer.learn(piece for row in written for piece in row)
    return [
        _fit(messages, row, writer, max_tokens, last_only=turn is not None)
        for messages, row, turn in zip(cut, written, turns, strict=True)
    ]


def end_ids(tokenizer) -> frozenset[int]:
    """Ids of the tokens that end an answer: eos, and the chat template's end of a turn."""
    ends = {tokenizer.eos_token_id} - {None}
    if getattr(tokenizer, "chat_template", None):
        writer = _Writer(tokenizer, "chat")
        end = Piece(writer.between(("user", "assistant"))[-1], True, markup=True)
        writer.learn([end])
        ids, targets = writer.write([end])
        ends |= {i for i, target in zip(ids, targets, strict=True) if target}
    return frozenset(ends)


def clean_text(text: str) -> str:
    """`text` with each lone surrogate as U+FFFD: the only change made before tokenising."""
    return _LONE_SURROGATE.sub("\ufffd", text)


class Piece(NamedTuple):
    """Text that is tokenised alone.

    target : whether it is predicted and counted
    markup : written by the template: special tokens that it spells are special, and as a target
        only its first token counts, if that is one (the end of the answer before it)
    """

    text: str
    target: bool
    markup: bool = False


def plain_pieces(messages: Sequence[Message], eos: str) -> list[Piece]:
    """A conversation in the plain template.

    Without a last assistant message the pieces end in the header that asks for one.

    >>> talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> [piece.text for piece in plain_pieces(talk, "<e>")]
    ['User:\\nHi\\n\\nAssistant:\\n', 'Yo', '<e>']
    """
    pieces: list[Piece] = []
    waiting = ""  # text that is no target, until the next response
    for message in messages:
        header = _HEADERS[message["role"]]
        if message["role"] == "assistant":
            target = is_answer(message)
            pieces += [Piece(waiting + header, False), Piece(message["content"], target),
                       Piece(eos, target, markup=True)]  # fmt: skip
            waiting = "\n\n"
        else:
            waiting += header + message["content"] + "\n\n"
    if _asks(messages):
        pieces.append(Piece(waiting + _HEADERS["assistant"], False))
    return pieces


def _asks(messages: Sequence[Message]) -> bool:
    """Whether an answer is still to come."""
    return bool(messages) and messages[-1]["role"] != "assistant"


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


def _folded(messages: Sequence[Message]) -> list[Message]:
    """Each run of system and user messages as one user message."""
    folded: list[Message] = []
    for message in messages:
        if message["role"] == "assistant":
            folded.append(message)
        elif folded and folded[-1]["role"] == "user":
            content = folded[-1]["content"] + "\n\n" + message["content"]
            folded[-1] = {"role": "user", "content": content}
        else:
            folded.append({"role": "user", "content": message["content"]})
    return folded


def _until_turn(messages: Sequence[Message], turn: int | None) -> Sequence[Message]:
    for index, message in enumerate(messages):
        if message["role"] not in _HEADERS:
            raise InstructMiningError(
                f"Message {index} has role {message['role']!r}; known: {sorted(_HEADERS)}."
            )
    if turn is None:
        return messages
    ends = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not 0 <= turn < len(ends):
        raise InstructMiningError(
            f"Turn {turn} was asked of a conversation with {len(ends)} replies."
        )
    return messages[: ends[turn] + 1]


class _Writer:
    """A template's pieces as token ids, each distinct piece tokenised once."""

    def __init__(self, tokenizer, template: str) -> None:
        self.tokenizer = tokenizer
        self.chat = template_version(tokenizer, template) == CHAT
        bos = tokenizer.bos_token_id
        self.bos = [] if bos is None or self.chat else [bos]  # a chat template writes its own
        self.eos = str(tokenizer.eos_token)
        self.known: dict[tuple[str, bool], list[int]] = {
            ("", False): [], ("", True): [], (self.eos, True): [tokenizer.eos_token_id],
        }  # fmt: skip
        self.special = set(tokenizer.all_special_ids)
        self.special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.rendered: dict[tuple[str, ...], list[str] | None] = {}

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """A conversation as the template writes it."""
        if not self.chat or not messages:
            return plain_pieces(messages, self.eos)
        between = self.between(_roles(messages))
        if between is None:
            messages = _folded(messages)
            between = self.between(_roles(messages))
        if between is None:
            raise InstructMiningError(
                f"The tokenizer's chat template refuses a conversation with the roles "
                f"{list(_roles(messages))}; set template: plain."
            )
        pieces = [Piece(between[0], False, markup=True)]
        for message, after in zip(messages, between[1:], strict=True):
            answer = is_answer(message)
            pieces += [Piece(message["content"], answer), Piece(after, answer, markup=True)]
        return pieces

    def between(self, roles: tuple[str, ...]) -> list[str] | None:
        """What the chat template writes before, between and after the contents; None where it
        refuses the roles.

        It is given places in the contents' stead: text of a row is never read as markup, and never
        trimmed.
        """
        from jinja2 import TemplateError

        if roles not in self.rendered:
            messages = [{"role": r, "content": f"\ue000{i}\ue001"} for i, r in enumerate(roles)]
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=_asks(messages),
                    date_string="26 Jul 2024",  # LLaMA 3 would write today's: other tokens daily
                )  # fmt: skip
            except TemplateError:
                text = ""
            parts = _PLACE.split(text)
            whole = parts[1::2] == [str(i) for i in range(len(roles))]
            self.rendered[roles] = parts[::2] if whole else None
        return self.rendered[roles]

    def learn(self, pieces: Iterable[Piece]) -> None:
        """Tokenise the pieces that are not known yet."""
        new = dict.fromkeys((piece.text, piece.markup) for piece in pieces)
        for markup in (False, True):
            texts = [t for t, kind in new if kind == markup and (t, kind) not in self.known]
            if texts:
                ids = self.tokenizer(
                    [clean_text(t) for t in texts],
                    add_special_tokens=False,
                    split_special_tokens=not markup,
                    return_attention_mask=False,
                    verbose=False,
                )["input_ids"]
                self.known.update(zip([(t, markup) for t in texts], ids, strict=True))

    def write(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """Ids and targets of a row; what follows its last answer's end is left out."""
        ids, targets = list(self.bos), [False] * len(self.bos)
        for piece in pieces:
            found = self.known[piece.text, piece.markup]
            counted = [piece.target] * len(found)
            if piece.markup:
                counted = [piece.target and i == 0 and found[0] in self.special
                           for i in range(len(found))]
            ids += found
            targets += counted
        if pieces and pieces[-1].target:
            end = len(ids) - len(found) + sum(counted)
            ids, targets = ids[:end], targets[:end]
        return ids, targets


def _fit(messages, pieces, writer: _Writer, max_tokens: int, last_only: bool) -> Encoded:
    """The conversation's tokens within `max_tokens`, as `encode_many` promises."""
    dropped = 0
    while True:
        if last_only:
            pieces = [piece._replace(target=False) for piece in pieces[:-2]] + pieces[-2:]
        ids, targets = writer.write(pieces)
        rest = _without_first(messages) if len(ids) > max_tokens else messages
        if len(rest) == len(messages):
            break
        dropped += len(messages) - len(rest)
        messages, pieces = rest, writer.pieces(rest)
        writer.learn(pieces)
    truncated = len(ids) > max_tokens
    return Encoded(tuple(ids[:max_tokens]), tuple(targets[:max_tokens]), dropped, truncated)


def _without_first(messages: Sequence[Message]) -> Sequence[Message]:
    """One message less at the left, and no reply left without its question; or all, if too few."""
    kept = len(messages) - (2 if messages[-1]["role"] == "assistant" else 1)
    for start in range(1, kept + 1):
        if messages[start]["role"] != "assistant":
            return messages[start:]
    return messages
