"""Formats in: every published shape, bad input, streaming, and the counts of the real files."""

from __future__ import annotations

import gzip
import io
import json
import sys
import types

import pandas as pd
import pytest

from instructmining_core.config import InstructMiningError
from instructmining_core.data import readers, records
from instructmining_core.data.fields import FormatError
from instructmining_core.data.formats import conversations
from instructmining_core.data.readers import count_records, is_hub_name
from instructmining_core.data.records import (
    assistant_turns,
    iter_records,
    read_records,
    row_hash,
    with_row_hash,
)


def said(*texts):
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


def message(text, role, *replies, rank=None, deleted=False):
    return {"text": text, "role": role, "rank": rank, "deleted": deleted, "replies": list(replies)}


TREE = {
    "message_tree_id": "t1",
    "prompt": message(
        "Why?", "prompter",
        message("worse", "assistant", rank=1),
        message(
            "best", "assistant",
            message("nobody answers", "prompter"),
            message("And then?", "prompter", message("the end", "assistant", rank=0)),
            rank=0,
        ),
        message("unranked", "assistant"),
        message("gone", "assistant", rank=-1, deleted=True),
    ),
}  # fmt: skip

FORMS = {
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, said("Add.\n\n1 2", "3")),
    "alpaca blank input": ({"instruction": "Hi", "input": " ", "output": "Ho"}, said("Hi", "Ho")),
    "alpaca empty output": ({"instruction": "Hi", "input": "", "output": ""}, said("Hi", "")),
    "alpaca null output": ({"instruction": "Hi", "output": None}, said("Hi", "")),
    "dolly": (
        {"instruction": "Who?", "context": "A text.", "response": "Me", "category": "qa"},
        said("Who?\n\nA text.", "Me"),
    ),
    "history": (
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
        said("a", "b", "c", "d"),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        said("a", "b"),
    ),
    "sharegpt system": (
        {"system": "Be.", "conversations": [{"from": "human", "value": "a"},
                                            {"from": "gpt", "value": "b"}]},
        [{"role": "system", "content": "Be."}, *said("a", "b")],
    ),
    "messages": ({"messages": said("a", "b", "c", "d")}, said("a", "b", "c", "d")),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                      {"role": "assistant", "content": None}]},
        said("a", ""),
    ),
    "lima conversations": ({"conversations": ["a", "b"], "source": "x"}, said("a", "b")),
    "lima test prompt": ({"conversations": ["a"]}, said("a", "")),
    "capybara": ({"conversation": [{"input": "a", "output": "b"}]}, said("a", "b")),
    "mt-bench": ({"question_id": 81, "turns": ["a", "c"]}, said("a", "", "c", "")),
    "mt-bench reference": (
        {"question_id": 1, "turns": ["a", "c"], "reference": ["b"]}, said("a", "b", "c", ""),
    ),
    "mt-bench on the hub": (
        {"prompt": ["a", "c"], "reference": ["b", "d"], "prompt_id": 1}, said("a", "b", "c", "d"),
    ),
    "first turn beside turns": (
        {"instruction": "a", "input": "", "output": "b", "turns": ["a", "c"]}, said("a", "b"),
    ),
    "vicuna": ({"question_id": 1, "text": "How?", "category": "generic"}, said("How?", "")),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "x"},
        said("a", "b", "c", "d"),
    ),
    "hh-rlhf with prompt": (
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"}, said("a", "b"),
    ),
    "chosen messages": ({"prompt": "a", "chosen": said("a", "b")}, said("a", "b")),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, said("a", "b")),
    "question and answer": ({"question": "a", "answer": "b"}, said("a", "b")),
    "openorca": (
        {"system_prompt": "Be.", "question": "a", "response": "b"},
        [{"role": "system", "content": "Be."}, *said("a", "b")],
    ),
    "chatml": (
        {"text": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"},
        said("a", "b"),
    ),
    "oasst tree": (TREE, said("Why?", "best", "And then?", "the end")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_its_conversation(name):
    raw, expected = FORMS[name]
    assert conversations(raw)[0] == [expected]


def test_self_instruct_instances_are_examples_of_their_own(tmp_path):
    instances = [{"input": "1 1", "output": "2"}, {"input": "", "output": "?"}]
    raw = {"id": "s", "instruction": "Add.", "instances": instances}
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(raw))
    table, _ = read_records(path)
    assert table["messages"].tolist() == [said("Add.\n\n1 1", "2"), said("Add.", "?")]
    assert table["id"].tolist() == ["s", "s#1"]
    assert table["row"].tolist() == [0, 0] and table["part"].tolist() == [0, 1]


def test_all_paths_of_a_tree_end_in_an_answer():
    assert conversations(TREE, "all")[0] == [
        said("Why?", "worse"),
        said("Why?", "best"),
        said("Why?", "best", "And then?", "the end"),
        said("Why?", "unranked"),
    ]


@pytest.mark.parametrize(
    ("raw", "expected", "got"),
    [
        ({"instruction": "a"}, "'output' or another answer beside", "an object with 'instruction'"),
        ({"instruction": ["a"], "output": {}}, "one text in 'instruction'", "a list"),
        ({"conversations": []}, "--columns messages=C", "an object with 'conversations'"),
        ({"conversations": "hi"}, "a list of messages in 'conversations'", "text 'hi'"),
        ({"messages": [{"role": "king", "content": "a"}]}, "a role such as", "text 'king'"),
        ({"messages": [{"role": "user", "content": 1}]}, "content of messages[0]", "the number"),
        ({"turns": ["a", 1]}, "'turns'", "an object with 'turns'"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "a pair of texts", "['q']"),
        ({"message_id": 1, "role": "prompter", "text": "a"}, "OASST tree", "message_id"),
        ({"title": "x"}, "'messages', 'conversations'", "an object with 'title'"),
        (["a"], "an object with named fields", "a list"),
        (None, "an object", "null"),
    ],
)
def test_a_broken_record_says_what_was_expected_and_what_stood(raw, expected, got):
    with pytest.raises(FormatError) as caught:
        conversations(raw)
    assert expected in caught.value.expected and got in caught.value.got


ROWS = [
    {"instruction": "a", "input": "", "output": "b"},
    {"instruction": "ä, \"quoted\"\nline", "input": "日本", "output": "d"},
]


def written(folder, name, rows=ROWS):
    path, plain = folder / name, name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        data = io.BytesIO()
        pd.DataFrame(rows).to_parquet(data)
        content = data.getvalue()
    elif plain.endswith(".csv"):
        content = pd.DataFrame(rows).to_csv(index=False).encode()
    elif plain.endswith(".jsonl"):
        content = "\n".join(map(json.dumps, rows)).encode()
    else:
        content = json.dumps(rows, indent=1).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_containers_give_the_same_table(tmp_path, suffix, packed):
    path = written(tmp_path, f"mine{suffix}{packed}")
    table, problems = read_records(path)
    assert problems == [] and count_records(path) == 2
    assert table["messages"].tolist() == [
        said("a", "b"), said('ä, "quoted"\nline\n\n日本', "d"),
    ]  # fmt: skip
    assert table["id"].tolist() == ["mine-0", "mine-1"]
    assert set(table["source"]) == {"mine"} and set(table["file"]) == {str(path)}
    assert table["row"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", b'{"prompt": "a", "completion": "b"}\n'
                       b'{"prompt": "a", "completion": "c"}\n'),
        ("array.jsonl", b'[{"prompt": "a", "completion": "b"},'
                        b' {"prompt": "a", "completion": "c"}]'),
        ("bom.jsonl", b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\n\n'
                      b'{"prompt": "a", "completion": "c"}'),
        ("pretty.json", b'{"data": [\n{"prompt": "a", "completion": "b"},\n'
                        b'{"prompt": "a", "completion": "c"}]}'),
        ("tabs.tsv", b"prompt\tcompletion\na\tb\na\tc\n"),
        ("crlf.csv", b"\xef\xbb\xbfprompt,completion\r\na,b\r\n\r\na,c\r\n"),
    ],
)  # fmt: skip
def test_the_content_decides(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    table, _ = read_records(path)
    assert table["messages"].tolist() == [said("a", "b"), said("a", "c")]


def test_standard_input_is_read_like_a_file(tmp_path):
    packed = gzip.compress(b'{"prompt": "a", "completion": "b"}\n')
    ((table, _),) = iter_records("-", stdin=io.BytesIO(packed))
    assert table["messages"].tolist() == [said("a", "b")]
    assert table["id"].tolist() == ["stdin-0"] and table["file"].tolist() == ["-"]


def test_lists_in_csv_are_json(tmp_path):
    path = tmp_path / "m.csv"
    pd.DataFrame({"messages": [json.dumps(said("a", "b"))]}).to_csv(path, index=False)
    assert read_records(path)[0]["messages"].tolist() == [said("a", "b")]


BAD_LINES = b"""{"prompt": "a", "completion": "b"}
{"prompt": "a"

{"prompt": "a", "completion": "7"
"\xff"
{"prompt": "c", "completion": "d"}
"""


def test_malformed_lines_raise_with_file_line_expected_and_got(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(BAD_LINES)
    with pytest.raises(InstructMiningError, match=r"bad\.jsonl, line 2: expected JSON .* got text"):
        read_records(path)


def test_malformed_lines_are_collected_and_counted(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(BAD_LINES)
    table, problems = read_records(path, on_error="collect")
    assert table["row"].tolist() == [0, 4], "positions count malformed rows"
    assert [(p.line, p.row) for p in problems] == [(2, 1), (4, 2), (5, 3)]
    assert problems[2].expected.startswith("UTF-8 text (this may be cp1252: name the encoding")
    assert str(problems[1]).startswith(f"{path}, line 4: expected JSON (Expecting ',' delimiter")


def test_malformed_lines_can_keep_their_row(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(BAD_LINES)
    table, problems = read_records(path, on_error="keep")
    assert table["row"].tolist() == [0, 1, 2, 3, 4]
    assert table["messages"].tolist()[2] == [] and table["problem"][2] == str(problems[1])
    assert table["problem"][0] == ""
    assert table["row_hash"].tolist() == [row_hash(m) if m else "" for m in table["messages"]]
    assert with_row_hash(table.iloc[[0, 4]])["row_hash"].tolist() == [
        row_hash(said("a", "b")), row_hash(said("c", "d"))]


def test_csv_names_line_and_record(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(b'prompt,completion\n"two\nlines",b\nonly one\n\xff,d\ne,f\n')
    table, problems = read_records(path, on_error="collect")
    assert [(p.line, p.row) for p in problems] == [(4, 1), (5, 2)]
    assert "2 columns" in problems[0].expected and "UTF-8 text" in problems[1].expected
    assert [m[0]["content"] for m in table["messages"]] == ["two\nlines", "e"]


def test_a_stray_carriage_return_in_csv_costs_its_own_record_only(tmp_path):
    path = tmp_path / "stray.csv"
    path.write_bytes(b'prompt,completion\r\na,b\r\nc,d\re\r\n"two\nlines",f\rg\nh,"i\rj"\n')
    table, problems = read_records(path, on_error="keep")
    # After a broken record of two lines it goes on at the second of them, which is none either.
    assert table["row"].tolist() == [0, 1, 2, 3, 4] == list(range(count_records(path)))
    assert [(p.line, p.row) for p in problems] == [(3, 1), (4, 2), (5, 3)]
    assert str(problems[0]).startswith(f"{path}, line 3: expected CSV (a carriage return without")
    assert problems[0].got == r"text 'c,d\re\r\n'"
    assert [m[1]["content"] if m else "" for m in table["messages"]] == ["b", "", "", "", "i\rj"]
    with pytest.raises(InstructMiningError, match=r"stray\.csv, line 3: expected CSV"):
        read_records(path)
    path.write_bytes(b"prompt,completion\ra,b\r")
    with pytest.raises(InstructMiningError, match=r"stray\.csv, line 1: expected CSV"):
        read_records(path)


def test_json_array_names_the_record(tmp_path):
    path = written(tmp_path, "x.json", [*ROWS, {"instruction": "q"}])
    with pytest.raises(InstructMiningError, match=r"x\.json, record 3: expected 'output'"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cut.json", b'[{"prompt": "a", "completion": "b"}, {"pro', "one whole JSON array"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}' * 9999)[:-20], "whole gzip file"),
        ("no.parquet", b"PAR1 nonsense", "expected whole Parquet"),
    ],
)
def test_a_broken_file_is_an_error_even_when_collecting(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InstructMiningError, match=says):
        read_records(tmp_path / name, on_error="collect")


def test_absent_files_and_folders_are_told(tmp_path):
    with pytest.raises(InstructMiningError, match=r"nothing\.jsonl: .*No such file"):
        read_records(tmp_path / "nothing.jsonl")
    with pytest.raises(InstructMiningError, match="got a folder"):
        read_records(tmp_path)


def test_bad_arguments(tmp_path):
    path = written(tmp_path, "x.jsonl")
    with pytest.raises(InstructMiningError, match="on_error"):
        read_records(path, on_error="ignore")
    with pytest.raises(InstructMiningError, match="paths"):
        list(iter_records(path, paths="some"))


def test_odd_texts_survive(tmp_path):
    texts = ["x" * 1_000_000, "nul \x00", "日本語 и русский", "\ud800 alone", ""]
    path = tmp_path / "odd.jsonl"
    rows = [{"id": "same", "instruction": "q", "output": text} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)))
    table, _ = read_records(path)
    assert [m[1]["content"] for m in table["messages"]] == texts
    assert table["id"].tolist() == ["same"] * 5, "duplicate ids stay as published"
    assert table["row_hash"].tolist() == [row_hash(m) for m in table["messages"]]
    assert table["row_hash"].nunique() == 5


def test_large_csv_field_and_null_bytes(tmp_path):
    path = tmp_path / "big.csv"
    path.write_text("prompt,completion\na," + "y" * 1_000_000 + "\nb,\x00\n")
    table, _ = read_records(path)
    assert [len(m[1]["content"]) for m in table["messages"]] == [1_000_000, 1]


def test_ids_with_surrogates_can_be_stored(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "\\ud800", "prompt": "a", "completion": "b"}')
    table, _ = read_records(path)
    assert table["id"][0] == "\\ud800"


def test_streaming_keeps_only_a_chunk(tmp_path):
    def endless():
        while True:
            yield b'{"prompt": "a", "completion": "b"}\n'

    class Pipe(io.RawIOBase):
        lines = endless()

        def readable(self):
            return True

        def readinto(self, block):
            line = next(self.lines)
            block[: len(line)] = line
            return len(line)

    chunks = iter_records("-", chunk_rows=100, stdin=Pipe())
    first, second = next(chunks)[0], next(chunks)[0]
    assert len(first) == len(second) == 100 and second["row"].tolist()[0] == 100


def test_long_texts_end_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK_CHARACTERS", 100)
    path = written(tmp_path, "x.jsonl", [{"prompt": "a", "completion": "b" * 60}] * 4)
    assert [len(table) for table, _ in iter_records(path)] == [2, 2]


def test_row_hash_is_the_documented_one():
    # sha256 of [{"content":"a","role":"user"},{"content":"b","role":"assistant"}], 32 hex digits
    import hashlib

    text = b'[{"content":"a","role":"user"},{"content":"b","role":"assistant"}]'
    assert row_hash(said("a", "b")) == hashlib.sha256(text).hexdigest()[:32]
    assert row_hash([{**m, "name": "x"} for m in said("a", "b")]) == row_hash(said("a", "b"))
    assert row_hash(said("a", "b\n")) != row_hash(said("a", "b"))


def test_row_hash_of_a_lone_surrogate_differs_from_its_spelling():
    assert row_hash(said("a", "\ud800")) != row_hash(said("a", "\\ud800"))


def test_assistant_turns_carry_their_context():
    talk = [{"role": "system", "content": "s"}, *said("a", "b", "c", "d")]
    assert assistant_turns(talk) == [(talk[:2], "b"), (talk[:4], "d")]


@pytest.mark.parametrize(
    ("where", "is_hub"),
    [("owner/name", True), ("owner/name:test", True), ("o/n/config@abc:train", True),
     ("data/x.jsonl", False), ("data/x.json.gz", False), ("./o/n", False), ("name", False),
     ("-", False)],
)  # fmt: skip
def test_hub_names_are_told_from_files(where, is_hub):
    assert is_hub_name(where) is is_hub


def test_hub_sets_record_the_commit(monkeypatch):
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(name=name, config=config, **options)
        return [{"instruction": "a", "output": "b"}]

    class Api:
        def dataset_info(self, name, revision):
            return types.SimpleNamespace(sha="c" * 40)

    hub = types.ModuleType("huggingface_hub")
    hub.HfApi = Api
    sets = types.ModuleType("datasets")
    sets.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "datasets", sets)
    table, _ = read_records("owner/name/main:test")
    assert table["file"].tolist() == ["owner/name/main@" + "c" * 40 + ":test"]
    assert table["source"].tolist() == ["name/main"]
    assert asked == {"name": "owner/name", "config": "main", "split": "test",
                     "revision": "c" * 40, "streaming": True}  # fmt: skip
    again, _ = read_records(table["file"][0])
    assert again["file"].tolist() == table["file"].tolist()


def test_hub_errors_are_told(monkeypatch):
    hub = types.ModuleType("huggingface_hub")

    class Api:
        def dataset_info(self, name, revision):
            raise OSError("no network")

    hub.HfApi = Api
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(InstructMiningError, match="owner/name.*no network.*gated"):
        readers.resolve_set("owner/name")


@pytest.mark.parametrize(
    ("name", "rows"),
    [("alpaca_data.json.gz", 52_002), ("lima.json.gz", 1_029), ("dummy_conversation.json", 500),
     ("user_oriented_instructions.jsonl", 252), ("oasst_en_100_tree.jsonl", 100),
     ("mt_bench_question.jsonl", 80), ("vicuna_question.jsonl", 80),
     ("hh-rlhf_harmless-base_test.jsonl.gz", 2_312)],
)  # fmt: skip
def test_published_files_are_read_whole(shared_data, name, rows):
    table, problems = read_records(shared_data / "raw" / name)
    assert len(table) == rows and problems == []


def test_oasst_paths_equal_the_normalised_set(shared_data):
    ours, _ = read_records(shared_data / "raw" / "oasst_en_100_tree.jsonl")
    theirs, _ = read_records(shared_data / "oasst_en_trees.jsonl.gz")
    assert ours["messages"].tolist() == theirs["messages"].tolist()


def test_alpaca_has_28_empty_outputs(shared_data):
    table, _ = read_records(shared_data / "raw" / "alpaca_data.json.gz")
    assert sum(m[1]["content"] == "" for m in table["messages"]) == 28
