"""`instructmining references`: an evaluation set's answers, made by a teacher at a server.

Source: the paper evaluates on GPT-4's answers to Self-Instruct's 252 prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from instructmining_core.config import InstructMiningError
from instructmining_core.data.fields import FormatError, Messages
from instructmining_core.data.formats import conversations, record_id
from instructmining_core.data.records import iter_rows, source_name
from instructmining_core.files import write_atomic
from instructmining_core.selection.served_model import ServedModel

REPLIES = ".replies"  # folder beside the file, with what was answered so far
WHY = {"length": "cut", "stop": "empty"}  # finish reason of a reply -> why it is left out


def make_references(
    prompts: str, out: Path, base_url: str, model: str, *, budget: int, workers: int,
    timeout: float, max_tokens: int | None,
) -> list[str]:  # fmt: skip
    """Ask the teacher and write id, source and messages with its answer, a JSON line a prompt.

    prompts : file, "-" or hub name in any format that is read; a record needs no answer, and one
        that stands there is not looked at. An answer that was cut, refused or is empty is left out
        and counted. Returns what to tell, a line each. Raises InstructMiningError where `out` is
        there.
    """
    if out.exists():
        raise InstructMiningError(f"{out} is there; name another file with -o, or move it")
    if out.suffix != ".jsonl":
        raise InstructMiningError(f"{out} must end in .jsonl")
    source = source_name(prompts)
    asked, left_out = [], Counter()
    for _, raw, found in iter_rows(prompts):
        talk = found[0] if found else _unanswered(raw.value)
        left_out["unreadable"] += talk is None
        if talk is not None:
            asked.append((record_id(raw.value, f"{source}-{raw.row}"), _question(talk)))
    options = {"temperature": 0.0} | ({"max_tokens": max_tokens} if max_tokens else {})
    teacher = ServedModel(base_url, model, out.with_name(out.name + REPLIES), budget=budget,
                          workers=workers, timeout=timeout, options=options)  # fmt: skip
    replies = teacher.ask([talk for _, talk in asked], f"answers of {model}")
    lines = []
    for (name, talk), reply in zip(asked, replies, strict=True):
        answer = reply.text.strip()
        if reply.finish != "stop" or not answer:
            left_out[WHY.get(reply.finish, "refused")] += 1
            continue
        record = {"id": name, "source": source, "teacher": model,
                  "messages": [*talk, {"role": "assistant", "content": answer}]}
        lines.append(json.dumps(record) + "\n")
    write_atomic(out, "".join(lines))
    told = [f"left out, {why}: {count}" for why, count in left_out.items() if count]
    return [f"{len(lines)} answers of {model}", *told, f"written to {out}"]


def _unanswered(raw: object) -> Messages | None:
    """The conversation of a record that has a question alone; None where it has none."""
    try:
        return conversations({**raw, "output": "."})[0][0] if isinstance(raw, dict) else None
    except FormatError:
        return None


def _question(messages: Messages) -> Messages:
    """What comes before the first answer that is empty, else before the last one."""
    plain = [{"role": one["role"], "content": one["content"]} for one in messages]
    answers = [i for i, one in enumerate(plain) if one["role"] == "assistant"]
    return plain[: next((i for i in answers if not plain[i]["content"].strip()), answers[-1])]
