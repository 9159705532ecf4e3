"""More of the forms that exporters and sets have: a value each, as its author meant it."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pandas as pd
import pytest

from instructmining_core.config import InstructMiningError
from instructmining_core.data.duplicates import Kept
from instructmining_core.data.fields import FormatError
from instructmining_core.data.formats import conversations
from instructmining_core.data.records import read_records, row_hash


def said(*texts, system=None):
    turns = [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


ASKED = said("a b")
ANSWER = {"role": "assistant", "content": "c d"}
CALL = {"name": "f", "args": {"x": 1}}
CALLED = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
          {"role": "tool", "content": "5"}, ANSWER]  # fmt: skip
READ = {
    "sides with a system (XTuner)": (
        {"conversation": [{"system": "s", "input": "a", "output": "b"},
                          {"input": "c", "output": "d"}]}, said("a", "b", "c", "d", system="s")),
    "sides in any order (Firefly)": ({"conversation": [{"assistant": "b", "human": "a"}]},
                                     said("a", "b")),
    "a side each": ({"messages": [{"user": "a"}, {"assistant": "b"}]}, said("a", "b")),
    "sides of a history": ({"history": [{"question": "a", "answer": "b"}], "instruction": "c",
                            "output": "d"}, said("a", "b", "c", "d")),
    "Gemini's calls": (
        {"contents": [{"role": "user", "parts": [{"text": "a"}]},
                      {"role": "model", "parts": [{"functionCall": CALL}]},
                      {"role": "function", "parts": [{"functionResponse": {"name": "f", "r": 2}}]},
                      {"role": "model", "parts": [{"text": "b"}]}]},
        said("a", '{"name":"f","arguments":{"x":1}}', '{"name":"f","r":2}', "b")),
    "input of messages": ({"input": ASKED, "output": "c d"}, said("a b", "c d")),
    "input of messages in a cell": ({"input": '[{"role": "user", "content": "a b"}]',
                                     "output": "c d"}, said("a b", "c d")),
    "messages as the input of a task": (
        {"instruction": "To XML.", "input": '[{"role": "user", "content": "a b"}]', "output": "x"},
        said('To XML.\n\n[{"role": "user", "content": "a b"}]', "x")),
    "context of messages": ({"context": said("a", "b"), "question": "c", "answer": "d"},
                            said("a", "b", "c", "d")),
    "OpenAI's preferences": (
        {"input": {"messages": ASKED, "parallel_tool_calls": True}, "preferred_output": [ANSWER],
         "non_preferred_output": [{"role": "assistant", "content": "not that"}]},
        said("a b", "c d")),
    "traces": ({"inputs": {"question": "a b"}, "outputs": {"answer": "c d"}}, said("a b", "c d")),
    "traces of messages": ({"inputs": {"messages": ASKED}, "outputs": {"message": ANSWER}},
                           said("a b", "c d")),
    "chosen with calls keeps its question": (
        {"prompt": "a b", "chosen": CALLED, "rejected": [ANSWER]},
        said("a b", '{"name":"f","arguments":{}}', "5", "c d")),
    "chosen as an object of text": ({"prompt": "a", "chosen": {"text": "b", "model": "m"}},
                                    said("a", "b")),
    "answers as objects of text": ({"question": "a", "answers": [{"text": "b", "tokens": ["b"]}]},
                                   said("a", "b")),
    "an object as an answer": ({"question": "a", "answer": {"x": "b"}}, said("a", '{"x":"b"}')),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_row_is_read_as_it_is_meant(name):
    raw, expected = READ[name]
    assert conversations(raw) == ([expected], [])


def test_a_task_of_super_natural_instructions():
    raw = {"Definition": ["Do it."], "Instances": [{"input": "a", "output": ["b"]},
                                                   {"input": "c", "output": ["d", "e"]}]}
    found, notes = conversations(raw)
    assert found == [said("Do it.\n\na", "b"), said("Do it.\n\nc", "d")]
    assert notes == ["several answers in 'output': the first is read"]


def test_a_turn_of_two_sides_that_is_not_to_be_learnt():
    turns = [{"input": "a", "output": "b", "output_with_loss": False},
             {"input": "c", "output": "d"}]  # fmt: skip
    (found,), notes = conversations({"conversation": turns})
    assert [m.get("train") for m in found] == [None, False, None, None] and len(notes) == 1


def test_two_texts_of_one_side_are_refused_with_the_fields_that_were_there():
    with pytest.raises(FormatError) as caught:
        conversations({"conversation": [{"instruction": "a", "input": "x", "output": "b"}]})
    assert caught.value.got == "an object with 'instruction', 'input', 'output'"


PICTURES = {
    "image_path": ("1.jpg", "2.jpg"),
    "imgs": (["1.jpg"], ["2.jpg"]),
    "jpg": (b"\xff\xd8\x01", b"\xff\xd8\x02"),
    "figure": ({"bytes": b"\xff\x01", "path": None}, {"bytes": b"\xff\x02", "path": None}),
    "available_tools": ("f", "g"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_rows_that_differ_in_what_is_no_text_are_different(name):
    rows = [{name: one, "question": "Is it red?", "answer": "no"} for one in PICTURES[name]]
    found = [conversations(row) for row in rows]
    assert [notes for _, notes in found] == [[f"{name!r} is not read"]] * 2
    first, second = (talks[0] for talks, _ in found)
    assert row_hash(first) != row_hash(second)
    kept = Kept()
    assert kept.add(0, first) is None and kept.add(1, second) is None and kept.add(2, first) == 0


def test_numbers_of_pictures_are_no_pictures():
    raw = {"num_images": 2, "has_video": False, "question": "a", "answer": "b"}
    assert conversations(raw) == ([said("a", "b")], [])


def test_a_path_in_a_picture_part_is_no_text():
    content = [{"type": "image", "value": "x.jpg"}, {"type": "text", "value": "a"}]
    (found,), notes = conversations({"messages": [{"role": "user", "content": content}, ANSWER]})
    assert found[0]["content"] == "a" and notes == ["content of type 'image' is not read"]


AGAIN = {
    "UltraChat's prompt": ({"prompt": "a b", "messages": said("a b", "c d", "e f", "g h")},
                           said("a b", "c d", "e f", "g h")),
    "Magpie's fields": ({"instruction": "a b", "response": "c d ", "messages": said("a b", "c d")},
                        said("a b", "c d")),
    "the talk under two names": ({"messages": said("a b", "c d"),
                                  "conversation": [["a b", "c d"]]}, said("a b", "c d")),
    "a question with its tokens": ({"question": {"text": "a b?", "tokens": ["a", "b", "?"]},
                                    "answer": "c d"}, said("a b?", "c d")),
    "no input": ({"instruction": "a b", "input": "<noinput>", "output": "c d"}, said("a b", "c d")),
}  # fmt: skip


@pytest.mark.parametrize("name", AGAIN)
def test_what_is_said_again_is_no_loss(name):
    raw, expected = AGAIN[name]
    assert conversations(raw) == ([expected], [])


def test_what_is_not_said_is_a_loss_wherever_it_stands():
    raw = {"messages": said("a b", "c d"), "prompt": "e f"}
    assert conversations(raw)[1] == ["'prompt' is not read"]
    raw = {"question": {"text": "a b?", "hint": "look up"}, "answer": "c d"}
    assert conversations(raw) == ([said("a b?", "c d")], ["'hint' of 'question' is not read"])


MARKED = {
    "Llama 3 in an input": (
        {"input": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
                  "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
                  "<|start_header_id|>assistant<|end_header_id|>\n\n", "output": "b<|eot_id|>"},
        said("a", "b", system="s")),
    "ChatML in a prompt": ({"prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
                            "completion": "b<|im_end|>\n"}, said("a", "b")),
    "hh-rlhf in a prompt": ({"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
                             "response": " d"}, said("a", "b", "c", "d")),
    "an end of text behind the last turn": (
        {"text": "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>"
                 "assistant<|end_header_id|>\n\nb<|eot_id|><|end_of_text|>"}, said("a", "b")),
    "a begin of text before the system's": ({"text": "<s>s USER: a ASSISTANT: b</s>"},
                                            said("a", "b", system="s")),
    "messages as one text": ({"conversation": "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>"},
                             said("a", "b")),
    "a mark before the system's text": (
        {"system": "SYSTEM: s", "chat": "USER: a\n\n\nASSISTANT: b <|endoftext|>"},
        said("a", "b", system="s")),
    "marks in an answer alone stay text": ({"prompt": "a", "completion": "b</s>"},
                                           said("a", "b</s>")),
    "marks beside an instruction stay text": (
        {"instruction": "Mend it.", "input": "User: a\nAssistant:", "output": "b"},
        said("Mend it.\n\nUser: a\nAssistant:", "b")),
}  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
def test_marked_texts_give_their_turns(name):
    raw, expected = MARKED[name]
    assert conversations(raw) == ([expected], [])


def test_what_pandas_writes_into_a_cell_is_read(tmp_path):
    talk = np.array([{"from": "human", "value": "it's a"}, {"from": "gpt", "value": 'b} {"c"'}])
    options = {"text": np.array(["x", "y"], object), "label": np.array(["1", "2"], object)}
    path = tmp_path / "x.csv"
    pd.DataFrame({"conversations": [talk, None], "question": [None, "a"], "answer": [None, "2"],
                  "choices": [None, options]}).to_csv(path)  # fmt: skip
    table, _ = read_records(path)
    assert table["messages"].tolist() == [said("it's a", 'b} {"c"'), said("a\n\n1. x\n2. y", "2")]
    path.write_text('messages\n"[{\'role\': \'user\', \'content\': \'a\', \'name\': nan}, '
                    '{\'role\': \'assistant\', \'content\': \'b\', \'name\': nan}]"\n')  # fmt: skip
    assert read_records(path)[0]["messages"].tolist() == [said("a", "b")]
    path.write_text(json.dumps({"messages": json.dumps(json.dumps(said("a", "b")))}))
    assert read_records(path)[0]["messages"].tolist() == [said("a", "b")]


TALKS = [said("a b", "c d"), said("e f", "g h")]
FLAT = [{"prompt": talk[0]["content"], "completion": talk[1]["content"]} for talk in TALKS]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("datasets-server.json", {"features": [{"name": "prompt"}], "num_rows_total": 2,
                                  "rows": [{"row_idx": i, "row": r} for i, r in enumerate(FLAT)]}),
        ("messages by id.json", {"t1": TALKS[0], "t2": TALKS[1]}),
        ("lines under another name.csv", FLAT),
    ],
)  # fmt: skip
def test_rows_inside_one_document(tmp_path, name, value):
    lines = "\n".join(map(json.dumps, value)) if isinstance(value, list) else json.dumps(value)
    (tmp_path / name).write_text(lines)
    assert read_records(tmp_path / name)[0]["messages"].tolist() == TALKS


def test_a_zip_of_one_file_beside_hidden_ones(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("set/train.jsonl", "\n".join(map(json.dumps, FLAT)))
        archive.writestr("set/.DS_Store", b"\0")
    assert read_records(tmp_path / "x.zip")[0]["messages"].tolist() == TALKS


@pytest.mark.parametrize(
    ("coding", "text"),
    [("cp1251", "Привет, как дела сегодня?"), ("shift_jis", "これは日本語の文です。"),
     ("cp1252", "Ça déjà coûte très cher à l'été"), ("gb18030", "今天天气怎么样，我们去公园吧")],
)  # fmt: skip
def test_a_likely_encoding_is_named(tmp_path, coding, text):
    path = tmp_path / "x.jsonl"
    path.write_bytes(f'{{"prompt": "{text}", "completion": "b"}}\n'.encode(coding))
    _, problems = read_records(path, on_error="collect")
    assert f"this may be {coding}: " in problems[0].expected


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.csv", 'prompt,completion\na,"say \\"b\\""\n', "goes on behind its closing quote"),
        ("x.csv", 'prompt,completion\na,"b\nc,"d"\n', "is one never closed"),
        ("x.jsonl", '{"a": ' + "[" * 9000 + "\n{}\n", "nested too deeply"),
    ],
)
def test_a_broken_row_says_what_to_mend(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    _, problems = read_records(tmp_path / name, on_error="collect")
    assert says in problems[0].expected


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.csv", b"prompt,completion\ra,b\r", "a carriage return without quotes"),
        ("x.csv", b"<Error><Code>AccessDenied</Code></Error>", "an XML page"),
        ("x.jsonl", b"<!-- saved -->\n<html></html>", "a web page"),
        ("x.pt", b"\x80\x02}q\x00.", "a Python pickle"),
        ("x.parquet", b"PAR1" + b"\0" * 30, "fetch it again"),
    ],
)
def test_a_file_that_is_no_data_says_what_it_is(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InstructMiningError, match=says):
        read_records(tmp_path / name)


def test_calls_in_a_cell_stay_the_text_that_they_are(tmp_path):
    calls = '[{"name": "f",  "arguments": {}}, {"name": "g", "arguments": {}}]'
    rows = [{"query": "a", "answers": calls, "chosen": "[]"},
            {"query": "a", "answers": "['b', 'c']", "chosen": ""}]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    table, _ = read_records(tmp_path / "x.csv")
    assert table["messages"].tolist() == [said("a", calls), said("a", "b")]


def test_texts_that_may_be_turns_are_refused_with_the_way_to_read_them():
    raw = {"id": "0", "data": ["a", "b"]}
    with pytest.raises(FormatError, match="--columns messages=data"):
        conversations(raw)
    assert conversations(raw, columns={"messages": "data"})[0] == [said("a", "b")]


def test_an_object_whose_names_are_no_texts_is_no_message():
    """As the fuzzer found: a Python literal may have bytes for names."""
    with pytest.raises(FormatError, match="expected a list of messages in 'messages'"):
        conversations({"messages": "[{'role': 'user', b'x': 'a'}]"}, "all", None)


def test_parts_that_hold_nothing_give_way_to_the_text_beside_them():
    user = {"role": "user", "content": [{"type": "text", "text": None}], "text": "a b"}
    assert conversations({"messages": [user, ANSWER]}, "all", None) == ([ASKED + [ANSWER]], [])


def test_a_picture_as_content_does_not_hide_the_text_beside_it():
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    (found,), notes = conversations(
        {"messages": [{"role": "user", "content": picture, "text": "a b"}, ANSWER]}, "all", None)
    assert found[0]["content"] == "a b" and found[0]["unread"]
    assert notes == ["content of type 'image_url' is not read"]
