"""The book's page "What is read, and how", written from the tables by which files are read.

`python -m instructmining.what_is_read` writes it anew.
"""

from __future__ import annotations

import json

from instructmining_core.data import fields, formats
from instructmining_core.data.formats import FORMS, conversations
from instructmining_core.data.readers import FOREIGN, PACKED, SUFFIXES
from instructmining_core.files import root, write_atomic

PAGE = """# What is read, and how

A file is read by its content; its name only helps.
Containers: {suffixes}, also out of {packed}, from a pipe, or a set of the hub; JSON may also be one list, one object around a list, several values one after the other, or a table by columns.
UTF-16 is read by its mark, any other encoding is told with `--encoding cp1252`; CSV may have semicolons, tabs or a line `sep=;`.
Refused in one sentence: {foreign}, a spreadsheet, an archive of several files.

A field counts where it is *filled*: null, NaN, blanks, `[]` and `{{}}` do not.
Case and blanks of names do not count.
Lists and objects may stand as JSON text or Python literals, as in CSV.
An answer that stands as text stays text, but for messages, and for a list in {lists} of a CSV file.
Other names of columns are told with `--columns question=input,answer=target`; only these are read then.

## Forms, the first that fits

{forms}

## In every form

- System text: {system}.
- Roles: {roles}. A tool's output is the user's side.
- Reasoning ({reasoning}) of a message stands before its text in `<think>` marks; a tool call follows it as JSON of its name and arguments.
- Not read, but part of the row's identity, and counted: {media}, other names of pictures, sounds and tools, bytes, and parts of a content that are no text.
- An answer is taken out of training where one of {off} says no (`0`, `false`), of its message or of its row, there also as a list with an entry for each message or answer; a `label` (of a row alone, like `kto_tag`) or `loss` only where it is `false`.
  It stays context, is no answer that is scored or learnt, and is counted.
- Reasoning of a row, beside a question and an answer ({thoughts}), stands before the answer in `<think>` marks.
- Any other field that bears text is counted in one note at the end of `score`, unless it says again what the row says.
"""  # noqa: E501  one sentence a line


def page() -> str:
    """The page as Markdown."""
    forms = []
    for form in FORMS:
        talk = "\n".join(f"{m['role']}: {m['content']}" for m in conversations(form.example)[0][0])
        forms.append(
            f"### {form.name}\n\n{_code(form.needs)}: {form.fields}.\n\n"
            f"```json\n{json.dumps(form.example)}\n```\n\n```text\n{talk}\n```"
        )
    roles = {role: [name for name, own in fields.ROLES.items() if own == role]
             for role in fields.ROLES.values()}  # fmt: skip
    return PAGE.format(
        suffixes=_code(name for name in SUFFIXES if name not in PACKED), packed=_code(PACKED),
        lists=_code(formats.LISTS),
        foreign="; ".join(dict.fromkeys(what.partition(",")[0].partition(":")[0].partition(" (")[0]
                                        for _, what in FOREIGN)),
        forms="\n\n".join(forms), system=_code(formats.SYSTEM), reasoning=_code(fields.REASONING),
        roles="; ".join(f"{role}: {_code(names)}" for role, names in roles.items()),
        media=_code(fields.MEDIA), off=_code(fields.NOT_TO_LEARN),
        thoughts=_code(formats.THOUGHTS),
    )  # fmt: skip


def _code(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    write_atomic(root() / "book" / "what_is_read.md", page())
