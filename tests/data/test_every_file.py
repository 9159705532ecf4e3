"""Rows as their authors meant them: emptiness, lists, other content, marks, containers, writers."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instructmining.what_is_read import page
from instructmining_core.config import InstructMiningError
from instructmining_core.data import fields, readers
from instructmining_core.data.duplicates import Kept
from instructmining_core.data.export import write_rows
from instructmining_core.data.fields import FormatError
from instructmining_core.data.formats import FORMS, MARKINGS, NAMES, conversations, marked
from instructmining_core.data.readers import count_records
from instructmining_core.data.records import (
    assistant_turns,
    iter_records,
    read_records,
    row_hash,
)
from instructmining_core.data.tokenization import plain_pieces
from instructmining_core.files import root
from instructmining_core.indicators.turns import read


def said(*texts, system=None):
    turns = [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


CALL = {"id": "c9", "function": {"name": "find", "arguments": '{"what": "tea"}'}}
READ = {
    "null fields": ({"messages": [{"role": "user", "from": None, "content": None, "text": "a"},
                                  {"from": "gpt", "role": None, "value": "b", "content": ""}]},
                    said("a", "b")),
    "nan and blanks": ({"instruction": float("nan"), "prompt": "a", "output": " ", "response": "b",
                        "chosen": None, "messages": []}, said("a", "b")),
    "all blank": ({"instruction": "", "input": "", "output": ""}, said("", "")),
    "accepted answers": ({"question": "a", "answer": ["b", "B"]}, said("a", "b")),
    "messages as JSON texts": ({"messages": [json.dumps(m) for m in said("a", "b")]},
                               said("a", "b")),
    "messages as a Python literal": ({"messages": str(said("a", "b"))}, said("a", "b")),
    "a struct of lists": ({"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}},
                          said("a", "b")),
    "pairs": ({"conversation": [["a", "b"], ["c", "d"]]}, said("a", "b", "c", "d")),
    "chosen beside its question": ({"conversations": [{"from": "human", "value": "a"}],
                                    "chosen": {"from": "gpt", "value": "b"}}, said("a", "b")),
    "chosen as JSON text": ({"prompt": "a", "chosen": json.dumps(said("a", "b"))}, said("a", "b")),
    "a tool call": ({"messages": [{"role": "user", "content": "a"},
                                  {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
                    said("a", '{"name":"find","arguments":{"what":"tea"}}')),
    "reasoning": ({"messages": [{"role": "user", "content": "a"},
                                {"role": "assistant", "reasoning_content": "hm", "content": "b"}]},
                  said("a", "<think>\nhm\n</think>\n\nb")),
    "a passage": ({"question": "a", "passage": "p", "answer": "b"}, said("a\n\np", "b")),
    "an instruction beside a question": ({"instruction": "i", "question": "a", "answer": "b"},
                                         said("i\n\na", "b")),
    "a prompt that holds the question": ({"question": "a", "prompt": "Q: a", "answer": "b"},
                                         said("Q: a", "b")),
    "choices": ({"question": "a", "choices": ["x", "y"], "answer": "B"},
                said("a\n\nA. x\nB. y", "B")),
    "letter case": ({" Question": "a", "ANSWER": "b"}, said("a", "b")),
    "input and target": ({"kind": "x", "input": "a", "target": "b"}, said("a", "b")),
    "numbers and objects": ({"question": "a", "answer": {"x": 1.5, "y": None}},
                            said("a", '{"x":1.5}')),
    "false is an answer": ({"question": "a", "answer": False}, said("a", "false")),
    "JSON as an answer": ({"instruction": "a", "output": '["x", "y"]'}, said("a", '["x", "y"]')),
    "roles": ({"messages": [{"role": " Human ", "content": "a"}, {"role": "GPT-4", "content": "b"},
                            {"role": "tool_response", "content": "c"},
                            {"role": "Chatbot", "content": "d"}]}, said("a", "b", "c", "d")),
    "Gemini": ({"contents": [{"role": "user", "parts": [{"text": "a"}]},
                             {"role": "model", "parts": [{"text": "b"}]}],
                "systemInstruction": {"parts": [{"text": "s"}]}}, said("a", "b", system="s")),
    "system_message": ({"system_message": "s", "prompt": "a", "response": "b"},
                       said("a", "b", system="s")),
    "reasoning of a row": ({"question": "a", "Complex_CoT": "hm", "answer": "b"},
                           said("a", "<think>\nhm\n</think>\n\nb")),
    "reasoning that the answer holds": ({"question": "a", "rationale": "hm", "answer": "hm: b"},
                                        said("a", "hm: b")),
    "messages that are the chosen ones": ({"messages": said("a", "b c"), "chosen": said("a", "b c"),
                                           "rejected": said("a", "d")}, said("a", "b c")),
    "chosen in place of an answer": ({"conversations": said("a", "b"), "chosen": "it is c"},
                                     said("a", "it is c")),
    "an answer beside its question": ({"messages": said("a"), "completion": "b"}, said("a", "b")),
    "a prompt alone": ({"prompt": said("a"), "reward": 1}, said("a", "")),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_row_is_read_as_it_is_meant(name):
    raw, expected = READ[name]
    assert conversations(raw)[0] == [expected]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_example_of_the_table_of_forms_is_read_by_its_form(form):
    found, notes = conversations(form.example)
    assert form.read(fields.Record(form.example, {}), "best") is not None
    assert found[0][-1]["content"] in ("Hello.", "Goodbye.", "Hi Ada.", "In the barn.")
    assert notes == []


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "one text in 'prompt'"),
        ({"data": ["a", "b"]}, "--columns messages=data"),
        ({"question": "a", "choices": ["x", "y"], "answer": 1}, "its letter or its words"),
        ({"instruction": "a", "ausgabe": "b"}, "--columns question=A,answer=B"),
        ({"messages": [{"role": "hummany", "content": "a"}]}, "a role such as"),
        ({"messages": [{"role": "user", "content": None}]}, "content of messages[0]"),
        ({"text": "A page of a book."}, "marks of ChatML"),
        ({"text": "<|im_start|>user\na<|im_end|>lost<|im_start|>assistant\nb"}, "before each turn"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_way_out(raw, says):
    with pytest.raises(FormatError) as caught:
        conversations(raw)
    assert says in caught.value.expected


@pytest.mark.parametrize(
    ("raw", "note"),
    [
        ({"prompt": "a", "response": "b", "hint": "first this, then that"}, "'hint' is not read"),
        ({"prompt": "a", "response": "b", "image": "x.jpg"}, "'image' is not read"),
        ({"prompt": "a", "response": "b", "label": False}, "answers that 'label' takes out"),
        ({"messages": [{**m, "weight": 0} for m in said("a", "b")]}, "that 'weight' takes out"),
        ({"question": "a", "answer": ["b", "c"]}, "several answers in 'answer'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
                       {"role": "assistant", "content": "b"}]}, "content of type 'image_url'"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_noted(raw, note):
    (notes,) = conversations(raw)[1]
    assert note in notes


def off(*texts, at):
    return [m | ({"train": False} if i in at else {}) for i, m in enumerate(said(*texts))]


OFF = {
    "a weight of 0": ({"messages": [*said("a"), {"role": "assistant", "content": "b", "weight": 0},
                                    *said("c", "d")]}, {1}),
    "train false": ({"conversations": [*said("a", "b", "c"), {"from": "gpt", "value": "d",
                                                              "train": False}]}, {3}),
    "a rejected answer": ({"messages": said("a", "b", "c", "d"), "label": False}, {1, 3}),
    "as text": ({"messages": said("a", "b", "c", "d"), "kto_tag": "False"}, {1, 3}),
    "a mask of messages": ({"messages": said("a", "b", "c", "d"), "loss_mask": [0, 0, 0, 1]}, {1}),
    "a mask of answers": ({"messages": said("a", "b", "c", "d"), "train": "[true, false]"}, {3}),
    "a class, a number": ({"messages": [{**m, "label": False} for m in said("a", "b", "c", "d")],
                           "label": 0, "loss": 0.0, "weight": "1", "train": True}, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", OFF)
def test_answers_that_are_not_to_be_learnt_are_context(name):
    raw, at = OFF[name]
    (found,), notes = conversations(raw)
    assert found == off("a", "b", "c", "d", at=at) and len(notes) == bool(at)
    assert [answer for _, answer in assistant_turns(found)] == [
        text for i, text in ((1, "b"), (3, "d")) if i not in at
    ]
    assert (row_hash(found) == row_hash(said("a", "b", "c", "d"))) == (not at)
    assert read(found).ends == tuple(i for i in (1, 3) if i not in at)
    assert ("takes its answer out" in read(found).problem) == (at == {1, 3})
    targets = [piece.text for piece in plain_pieces(found, "</s>") if piece.target]
    assert targets == [part for i, text in ((1, "b"), (3, "d")) if i not in at
                       for part in (text, "</s>")]  # fmt: skip


def test_a_mask_that_fits_nothing_is_told():
    (found,), notes = conversations({"messages": said("a", "b"), "loss_mask": [0, 1, 0, 0, 1]})
    assert found == said("a", "b")
    assert notes == ["'loss_mask' fits neither messages nor answers, and is not read"]


def test_metadata_and_renderings_are_no_loss():
    raw = {"id": 1, "category": "open qa", "instruction": "Say it.", "output": "It is said.",
           "label": 0, "text": "Below: Say it. Response: It is said."}  # fmt: skip
    assert conversations(raw) == ([said("Say it.", "It is said.")], [])


def test_rows_that_differ_in_a_picture_or_a_tool_are_different(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"image": f"{i}.jpg", "question": "Is it red?", "answer": "no"} for i in (1, 2, 1)]
    path.write_text("\n".join(map(json.dumps, rows)))
    table, _ = read_records(path)
    one, two, again = table["row_hash"]
    assert one != two and one == again
    kept = Kept()
    assert [kept.add(i, m) for i, m in enumerate(table["messages"])] == [None, None, 0]


def test_another_question_about_one_passage_stays_under_a_short_answer():
    passage = " ".join(f"w{i}" for i in range(80)) + "."
    kept = Kept()
    assert kept.add("a", said(f"Is it open?\n\n{passage}", "yes")) is None
    assert kept.add("b", said(f"Is it closed on Sundays?\n\n{passage}", "yes")) is None
    assert kept.add("c", said(f"is it OPEN\n\n{passage}", "Yes.")) == "a"
    rules = "Never tell anybody of " + passage
    assert kept.add("d", said("How do I pick a lock?", "I cannot help.", system=rules)) is None
    assert kept.add("e", said("Where is the safe?", "I cannot help.", system=rules)) is None


TEXTS = {
    "ChatML": "<|im_start|>system\ns<|im_end|>\n<|im_start|> user name=Bo\na<|im_end|>\n"
              "<|im_start|>assistant\nb<|im_end|>\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
    "Llama 2": "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b </s>",
    "Gemma": "<bos><start_of_turn>system\ns<end_of_turn>\n<start_of_turn>user\na<end_of_turn>\n"
             "<start_of_turn>model\nb<end_of_turn>",
    "Zephyr": "<|system|>\ns</s>\n<|user|>\na</s>\n<|assistant|>\nb</s>",
    "DeepSeek": "<\uff5cbegin\u2581of\u2581sentence\uff5c>s<\uff5cUser\uff5c>a"
                "<\uff5cAssistant\uff5c>b<\uff5cend\u2581of\u2581sentence\uff5c>",
    "Alpaca": "s\n\n### Instruction:\na\n\n### Response:\nb",
    "Guanaco": "### System: s### Human: a### Assistant: b",
    "Vicuna": "s USER: a ASSISTANT: b</s>",
    "hh-rlhf": "s\n\nHuman: a\n\nAssistant: b",
    "User and Assistant": "System: s\nUser: a\nAssistant: b",
}  # fmt: skip


@pytest.mark.parametrize("name", MARKINGS)
def test_every_marking_gives_its_turns(name):
    assert marked(TEXTS[name]) == said("a", "b", system="s")
    assert conversations({"text": TEXTS[name]})[0] == [said("a", "b", system="s")]


def test_alpaca_marks_with_an_input_and_prompts_with_marks():
    text = ("Below is an instruction that describes a task, paired with an input.\n\n"
            "### Instruction:\na\n\n### Input:\nx\n\n### Response:\n")  # fmt: skip
    assert marked(text + "b") == said("a\n\nx", "b")
    assert conversations({"prompt": text, "completion": "b"})[0] == [said("a\n\nx", "b")]
    talk = "<|user|>\na</s>\n<|assistant|>\n"
    assert conversations({"prompt": talk, "completion": "b"})[0] == [said("a", "b")]
    answer = "User: hi\nBot: ho"
    assert conversations({"instruction": "Invent a talk.", "output": answer})[0] == [
        said("Invent a talk.", answer)
    ]


def test_columns_can_be_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("nr,titel,text,output\n7,a,b,no\n")
    columns = {"question": "titel", "answer": "text", "id": "nr"}
    ((table, _),) = iter_records(path, columns=columns)
    assert table["messages"].tolist() == [said("a", "b")] and table["id"].tolist() == ["7"]
    with pytest.raises(InstructMiningError, match="the column 'title' that --columns names"):
        list(iter_records(path, columns={"question": "title"}))


ROWS = [{"instruction": "a", "input": "", "output": "b"},
        {"instruction": "ü", "input": "", "output": "d"}]  # fmt: skip
MEANT = [said("a", "b"), said("ü", "d")]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def zipped(text: bytes, *names: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in names:
            archive.writestr(name, text)
    return held.getvalue()


def arrow(kind) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with kind(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


FILES = {
    "x.jsonl.gz": gzip.compress(LINES.encode()),
    "x.jsonl.zst": zstandard.compress(LINES.encode()),
    "x.jsonl.xz": lzma.compress(LINES.encode()),
    "x.jsonl.bz2": bz2.compress(LINES.encode()),
    "x.zip": zipped(LINES.encode(), "x.jsonl", "__MACOSX/x.jsonl"),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16_without_mark.jsonl": LINES.encode("utf-16-le"),
    "x.arrow": arrow(pa.ipc.new_file),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "pretty.jsonl": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "commas.jsonl": LINES.replace("}\n", "},\n").encode(),
    "two_on_a_line.jsonl": LINES.replace("\n", " ").encode(),
    "bom_inside.jsonl": LINES.replace("\n", "\n\ufeff", 1).encode(),
    "python.jsonl": "".join(f"{row}\n" for row in ROWS).encode(),
    "json_in_json.jsonl": "".join(json.dumps(json.dumps(r)) + "\n" for r in ROWS).encode(),
    "message_lists.jsonl": "\n".join(map(json.dumps, MEANT)).encode(),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "columns.json": json.dumps({k: [r[k] for r in ROWS] for k in ROWS[0]}).encode(),
    "pandas.json": pd.DataFrame(ROWS).to_json().encode(),
    "by_id.json": json.dumps({f"id{i}": row for i, row in enumerate(ROWS)}).encode(),
    "split.json": pd.DataFrame(ROWS).to_json(orient="split").encode(),
    "semicolons.csv": pd.DataFrame(ROWS).to_csv(index=False, sep=";").encode(),
    "told.csv": b"sep=;\r\n" + pd.DataFrame(ROWS).to_csv(index=False, sep=";").encode(),
    "utf16.csv": pd.DataFrame(ROWS).to_csv(index=False, sep="\t").encode("utf-16"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_container_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    table, problems = read_records(tmp_path / name)
    assert table["messages"].tolist() == MEANT and problems == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs"),
        ("x.jsonl", b"\n<!DOCTYPE html><html>", "a web page"),
        ("x.csv", zipped(b"", "[Content_Types].xml", "xl/a.xml"), "spreadsheet of Excel"),
        ("x.zip", zipped(b"a", "1.jsonl", "2.jsonl"), "of 2 files"),
        ("x.json", json.dumps({"train": ROWS, "test": ROWS}).encode(), "several lists"),
        ("x.csv", b"a,b,a\n1,2,3\n", "'a' stands twice"),
        ("x.jsonl.xz", lzma.compress(LINES.encode() * 99)[:-30], "that breaks"),
        ("x.jsonl.zst", zstandard.compress(LINES.encode() * 9)[:9], "that breaks|no records"),
    ],
)
def test_what_is_no_data_is_said_in_one_sentence(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InstructMiningError, match=says) as caught:
        table, _ = read_records(tmp_path / name, on_error="collect")
        raise InstructMiningError("no records" if table.empty else "read")
    assert "\n" not in str(caught.value)


def test_a_folder_is_told_with_the_files_in_it(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "data-00000-of-00001.arrow").write_bytes(FILES["x.arrow"])
    with pytest.raises(InstructMiningError, match=r"name the files in it: .*00001\.arrow"):
        read_records(tmp_path)


def test_a_quote_that_is_never_closed_costs_its_own_row(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text('prompt,completion\na,b\nc,"d is never closed\ne,f\n"g\nh",i\n')
    table, problems = read_records(path, on_error="collect")
    assert table["messages"].tolist() == [said("a", "b"), said("e", "f"), said("g\nh", "i")]
    assert [(p.line, p.row) for p in problems] == [(3, 1)]


def test_other_encodings_are_named(tmp_path):
    path = tmp_path / "e.csv"
    for coding, text in (("cp1252", "café"), ("gb18030", "你好吗")):
        path.write_bytes(f"prompt,completion\n{text},b\n".encode(coding))
        _, problems = read_records(path, on_error="collect")
        assert f"this may be {coding}" in problems[0].expected


@pytest.mark.parametrize("coding", ["cp1252", "gb18030", "shift_jis", "utf-16-be"])
def test_an_encoding_can_be_named(tmp_path, coding):
    text = {"cp1252": "café", "gb18030": "你好"}.get(coding, "日本")
    for name, content in (("e.csv", f"prompt,completion\n{text},b\n"),
                          ("e.jsonl", f'{{"prompt": "{text}", "completion": "b"}}\n')):
        (tmp_path / name).write_bytes(content.encode(coding))
        ((table, problems),) = iter_records(tmp_path / name, encoding=coding)
        assert table["messages"].tolist() == [said(text, "b")] and problems == []
        assert count_records(tmp_path / name, coding) == 1
    with pytest.raises(InstructMiningError, match="--encoding"):
        list(iter_records(tmp_path / "e.csv", encoding="no such"))


def test_accepted_answers_in_a_cell_are_a_list(tmp_path):
    path = tmp_path / "l.csv"
    cells = ["['b', 'c']", '["b"]', "[b]", "['b' 'c']"]
    pd.DataFrame({"question": "a", "answer": cells}).to_csv(path, index=False)
    table, _ = read_records(path)
    assert [m[1]["content"] for m in table["messages"]] == ["b", "b", "[b]", "['b' 'c']"]


def test_a_quote_inside_a_cell_is_a_character(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text('prompt,completion\na 5" pipe,b\nc,"d "" e"\nf,3" and 4"\n')
    table, problems = read_records(path, on_error="collect")
    assert table["messages"].tolist() == [said('a 5" pipe', "b"), said("c", 'd " e'),
                                          said("f", '3" and 4"')]  # fmt: skip
    assert problems == []


def test_integers_of_any_size_survive_or_cost_one_row(tmp_path):
    path = tmp_path / "n.jsonl"
    path.write_text('{"prompt": "a", "completion": 123456789012345678901}\n'
                    '{"prompt": "a", "completion": "b", "n": ' + "7" * 5000 + "}\n"
                    '{"prompt": "a", "completion": "b", "n": ' + "[" * 9000 + "}\n")  # fmt: skip
    table, problems = read_records(path, on_error="collect")
    assert table["messages"].tolist() == [said("a", "123456789012345678901")]
    assert [p.line for p in problems] == [2, 3]


def test_a_date_that_python_lacks_costs_one_row(tmp_path):
    path = tmp_path / "d.parquet"
    dates = pa.array([0, 300_000_000_000], pa.timestamp("s"))
    pq.write_table(pa.table({"prompt": ["a", "c"], "completion": ["b", "d"], "when": dates}), path)
    table, problems = read_records(path, on_error="collect")
    assert table["messages"].tolist() == [said("a", "b")] and problems[0].row == 1


def test_a_packed_bomb_is_refused_before_memory_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD", 1 << 20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b"[\n" + b" " * (1 << 24) + b"]"))
    with pytest.raises(InstructMiningError, match="unpacks to one document"):
        read_records(path)
    path = tmp_path / "line.jsonl.gz"
    rows = b'{"prompt": "a", "completion": "b"}\n'
    path.write_bytes(gzip.compress(rows + b'"' + b"x" * (1 << 24) + b'"\n' + rows))
    table, problems = read_records(path, on_error="collect")
    assert len(table) == 2 and "at most 1 MiB" in problems[0].expected


TYPED = [
    {"instruction": "a\rb", "output": 'c "d"\n', "meta": {}, "n": 1},
    {"instruction": "né", "output": "x, y; z\t", "meta": {"deep": {}}, "n": 2},
]
TALKS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None,
     "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b",
     "tool_calls": [{"function": {"name": "f", "arguments": {"y": [2]}}}]}]},
    {"prompt": "q", "chosen": {"role": "assistant", "content": "b"}, "image": b"\x89PNG"},
    {"question": "q", "answer": ["b", "it's c"]},
    {"messages": [*said("a"), {"role": "assistant", "content": "b", "weight": 0}, *said("c", "d")]},
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("rows", [TYPED, TALKS], ids=["typed", "talks"])
def test_what_is_written_is_read_back_as_the_same_rows(tmp_path, suffix, rows):
    hashes = [row_hash(conversations(row)[0][0]) for row in rows]
    write_rows(rows, tmp_path / f"out{suffix}", hashes=hashes)
    table, _ = read_records(tmp_path / f"out{suffix}")
    assert table["row_hash"].tolist() == hashes


def test_a_format_that_cannot_hold_the_rows_is_refused_before_anything_is_written(tmp_path):
    rows = [{"instruction": "a", "output": ["b"]}]
    with pytest.raises(InstructMiningError, match=r"1 of 1 would be read back as others"):
        write_rows(rows, tmp_path / "x.csv", hashes=[row_hash(said("a", "b"))])
    assert not (tmp_path / "x.csv").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from(["user", "assistant", "[1]", *TEXTS.values()]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(sorted(NAMES) + ["role", "content", "value"]), inner,
                      max_size=4),
    max_leaves=12,
)  # fmt: skip
RECORDS = st.dictionaries(
    st.sampled_from(sorted({*NAMES, *fields.MEDIA, *fields.NOT_TO_LEARN, "rejected"})), JSON,
    max_size=5,
)  # fmt: skip


def read_or_refused(name: str, content: bytes) -> None:
    try:
        for table, _ in iter_records(name, on_error="keep", stdin=io.BytesIO(content)):
            for talk, own in zip(table["messages"], table["row_hash"], strict=True):
                assert all(isinstance(m["content"], str) for m in talk) and bool(talk) == bool(own)
    except InstructMiningError:
        pass


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(st.lists(RECORDS, min_size=1, max_size=3), st.booleans())
def test_any_record_is_read_or_refused(rows, lines):
    texts = [json.dumps(row) for row in rows]
    read_or_refused("x.json", ("\n".join(texts) if lines else f"[{','.join(texts)}]").encode())


@FUZZ
@given(st.sampled_from(sorted(FILES)), st.data())
def test_any_bytes_are_read_or_refused(name, data):
    content = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content)))
        if data.draw(st.booleans()):
            content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        else:
            content[at:at] = data.draw(st.sampled_from([b'"', b"\n", b"\0", b"[", b"{", b"\xff"]))
    read_or_refused(name, bytes(content))


def test_the_page_of_the_book_is_made_from_the_tables():
    written = root() / "book" / "what_is_read.md"
    assert written.read_text() == page(), "run `python -m instructmining.what_is_read`"
