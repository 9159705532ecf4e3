"""One docstring -> the pieces of prose that can answer a question about its function.

Three styles are read: numpydoc sections (underlined headings), Google sections (`Args:`) and
Sphinx fields (`:param x:`). What is not prose (tables, code, directives, formulas) gives nothing.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

MIN_WORDS, MAX_WORDS = 6, 90

_UNDERLINED = re.compile(r"^(?P<name>[A-Z][A-Za-z ]{2,30})\n[-=~]{3,}[ \t]*$", re.M)
_GOOGLE = re.compile(
    r"^(?P<name>Args|Arguments|Params|Parameters|Returns?|Yields|Raises|Notes?|Examples?|"
    r"Attributes|Keyword Args|Shape|Usage|Warnings?|See also|References)\s*:[ \t]*$", re.M)
_FIELD = re.compile(r"^:(?P<field>param|parameter|arg|return|returns|raises?|rtype|type|"
                    r"ivar|cvar|var|keyword|kwarg)\b(?P<rest>[^:\n]*):[ \t]*", re.M)
_NUMPY_ENTRY = re.compile(r"^(?P<names>[A-Za-z_][\w.*, ]*?)\s*(?::.*)?$")
_GOOGLE_ENTRY = re.compile(r"^(?P<name>\*{0,2}`?[A-Za-z_]\w*`?)\s*(?:\([^\n]*?\))?\s*:(?:\s+|$)")

_NOT_PROSE = re.compile(
    r">>>|\.\. |::\s|\\[a-zA-Z]{2,}|[{}|]|\s=\s.*\s=\s|<[a-z/]+|https?:|\[\d+\]_?|\bTODO\b|"
    r"\bFIXME\b|\bXXX\b|^\W|[\x00-\x08]|-{4,}|={3,}|\+{2,}|\*{3,}|_{4,}")
_TIDY = [(re.compile(r"``\s*([^`]*?)\s*``"), r"`\1`"), (re.compile(r"`~?\.?([\w.]+)`"), r"`\1`"),
         (re.compile(r"\[`!?~?([\w.]+)`\]"), r"`\1`"), (re.compile(r"\*\*"), "")]
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}")
_ROLE = re.compile(r":[a-zA-Z]+(?::[a-zA-Z]+)?:`!?~?([^`]*)`")
_SECTIONS = {
    "parameters": "parameter", "other parameters": "parameter", "args": "parameter",
    "arguments": "parameter", "params": "parameter", "keyword args": "parameter",
    "attributes": "attribute", "returns": "returns", "return": "returns", "yields": "returns",
    "raises": "raises", "notes": "notes", "note": "notes",
}


@dataclass(frozen=True)
class DocstringPiece:
    """A part of one docstring.

    question : "summary", "long", "parameter", "attribute", "returns", "raises" or "notes"
    about : the parameter's, attribute's or exception's name, "" for the other questions
    text : cleaned prose of MIN_WORDS to MAX_WORDS words, never cut
    """

    question: str
    about: str
    text: str


def clean(text: str) -> str:
    """Prose on one line, without markup; "" where the text is not usable as an answer.

    Nothing is cut: too short, too long and non-prose texts give "" (a cut answer would be one of
    the planted defects). A missing last full stop is added.
    """
    text = _LINK.sub(r"\1", _ROLE.sub(r"`\1`", text))
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    words = text.split(" ")
    if not MIN_WORDS <= len(words) <= MAX_WORDS or _NOT_PROSE.search(text):
        return ""
    plain = sum(word.strip(".,;:()`'\"").isalpha() for word in words)
    if plain < 0.6 * len(words) or not text.isascii() or text[-1] in ":,-(":
        return ""
    return text if text[-1] in ".!?" else text.rstrip(";") + "."


def pieces(docstring: str) -> list[DocstringPiece]:
    """The usable pieces of a docstring, in its order; no two of them share text.

    docstring : as `ast.get_docstring` returns it (dedented).
    """
    lead, sections = _sections(docstring)
    found = [*_lead_pieces(lead)]
    for kind, body in sections:
        found.extend(_section_pieces(kind, body))
    unique = {(piece.question, piece.about): piece for piece in reversed(found) if piece.text}
    return list(unique.values())[::-1]


def _lead_pieces(lead: str) -> Iterator[DocstringPiece]:
    """First and second paragraph together where both are prose, else the first alone."""
    paragraphs = [p for p in re.split(r"\n\s*\n", lead.strip()) if p.strip()][:2]
    if not paragraphs:
        return
    both = [clean(p) for p in paragraphs]
    if len(both) == 2 and all(both) and not paragraphs[1].startswith((" ", "\t", "-", "*")):
        joined = " ".join(both)
        if len(joined.split()) <= MAX_WORDS:
            yield DocstringPiece("long", "", joined)
            return
    yield DocstringPiece("summary", "", both[0])


def _sections(docstring: str) -> tuple[str, list[tuple[str, str]]]:
    """The text before the first section, and (kind, body) of each section that is used."""
    matches = sorted(
        [*_UNDERLINED.finditer(docstring), *_GOOGLE.finditer(docstring)], key=lambda m: m.start())
    fields = list(_FIELD.finditer(docstring))
    first = min([m.start() for m in matches + fields], default=len(docstring))
    sections = []
    for match, following in zip_longest(matches, matches[1:]):
        kind = _SECTIONS.get(match["name"].strip().lower())
        if kind:
            kind += "/numpy" if match.re is _UNDERLINED else ""
            stop = following.start() if following else len(docstring)
            sections.append((kind, docstring[match.end():stop]))
    for match, following in zip_longest(fields, fields[1:]):
        stop = following.start() if following else len(docstring)
        body = re.split(r"\n\s*\n|\n(?=\S)", docstring[match.end():stop])[0]
        sections.append((f":{match['field']}", f"{match['rest'].strip()}\n{body}"))
    return docstring[:first], sections


def _section_pieces(kind: str, body: str) -> Iterator[DocstringPiece]:
    if kind.startswith(":"):
        yield from _field_pieces(kind[1:], body)
    elif kind.startswith("notes"):
        first = re.split(r"\n\s*\n", textwrap.dedent(body).strip())[0]
        yield DocstringPiece("notes", "", clean(first))
    else:
        kind, _, numpy = kind.partition("/")
        for about, text in _entries(textwrap.dedent(body.strip("\n")), bool(numpy)):
            if kind == "returns" or about:
                yield DocstringPiece(kind, "" if kind == "returns" else about, clean(text))


def _field_pieces(field: str, body: str) -> Iterator[DocstringPiece]:
    rest, _, text = body.partition("\n")
    about = rest.split()[-1] if rest.split() else ""
    if field in ("param", "parameter", "arg", "keyword", "kwarg") and about:
        yield DocstringPiece("parameter", about, clean(text))
    elif field in ("return", "returns"):
        yield DocstringPiece("returns", "", clean(text))
    elif field in ("raise", "raises") and about:
        yield DocstringPiece("raises", about, clean(text))


def _entries(body: str, numpy: bool) -> Iterator[tuple[str, str]]:
    """(name, first paragraph of its description) of each entry of a section.

    numpy : the heading was underlined, so an entry's first line is "name : type" and no prose.
    """
    for block in re.split(r"\n(?=\S)", body):
        head, _, rest = block.partition("\n")
        if numpy:
            names = _NUMPY_ENTRY.match(head)
            yield names["names"].split(",")[0] if names else "", _first_paragraph(rest)
        elif google := _GOOGLE_ENTRY.match(head):
            text = head[google.end():] + "\n" + textwrap.dedent(rest)
            yield google["name"].strip("`*"), _first_paragraph(text)
        else:
            yield "", _first_paragraph(block)


def _first_paragraph(text: str) -> str:
    """Up to the first blank line or list item."""
    return re.split(r"\n\s*\n|\n\s*[-*] ", textwrap.dedent(text).strip())[0]
