"""Sources of a profile of files: what is left out is counted, and no near copy gets through."""

from __future__ import annotations

import dataclasses
import json

import pytest

from instructmining.profile import DataConfig, SourceConfig
from instructmining.study_data import read_source, read_study_data
from instructmining_core.config import ProfileError
from instructmining_core.data.duplicates import count_shared
from instructmining_core.data.records import with_row_hash

EXAM = "name the nine planets in their order from the sun please"


def write(folder, name, rows):
    lines = [json.dumps({"instruction": i, "input": "", "output": o}) for i, o in rows]
    (folder / name).write_text("\n".join(lines))


@pytest.fixture
def data(tmp_path):
    rows = [(f"question number {i} of many", f"answer {i}") for i in range(20)]
    write(tmp_path, "a.jsonl", [*rows, ("long " * 30, "x"), (EXAM, "Mercury"), ("empty", "")])
    write(tmp_path, "b.jsonl", [(f"other question {i} of few", f"reply {i}") for i in range(10)])
    write(tmp_path, "e1.jsonl", [(EXAM, "Mercury, Venus")])
    write(tmp_path, "e2.jsonl", [("what is two and two", "four")])
    return DataConfig(
        kind="files", folder=str(tmp_path), rows_per_source=12, pool_rows=8, eval_prompts=0,
        max_prompt_words=20,
        sources=(SourceConfig("a", "a.jsonl"),), unseen=(SourceConfig("b", "b.jsonl"),),
        eval_1=SourceConfig("e1", "e1.jsonl"), eval_2=SourceConfig("e2", "e2.jsonl"),
    )  # fmt: skip


def test_what_is_left_out_is_counted(data, tmp_path):
    found = read_study_data(data, tmp_path)
    row = found.facts.set_index("source").loc["a"]
    assert row["read"] == 22  # the empty answer is no training row
    assert (row["prompt too long"], row["near copies of evaluation rows"]) == (1, 1)
    assert len(found.candidates) == 12
    assert set(found.pools) == {"b (unseen source)", "unseen rows of fitted sources"}
    assert len(found.pools["b (unseen source)"]) == 8


def test_no_row_of_an_evaluation_set_is_a_candidate(data, tmp_path):
    found = read_study_data(data, tmp_path)
    assert count_shared(found.eval_1, found.candidates) == 0
    fitted = {r["id"] for r in found.candidates.to_dict("records")}
    pool = found.pools["unseen rows of fitted sources"]
    assert not fitted & set(pool["id"]) and len(pool) == 8


def test_malformed_records_are_counted_and_named(data, tmp_path):
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write("\n{not json")
    found = read_study_data(data, tmp_path)
    row = found.facts.set_index("source").loc["a"]
    assert (row["read"], row["malformed"], row["no answer"]) == (22, 1, 1)
    read = read_source(data.sources[0], data, tmp_path)
    assert "a.jsonl, line 24" in read.attrs["problems"][0]


def test_no_pool_row_is_a_near_copy_of_a_candidate(data, tmp_path):
    copied = [(f"question number {i} of many more", f"the very same answer as number {i} has")
              for i in range(12)]  # fmt: skip
    write(tmp_path, "a.jsonl", copied)
    write(tmp_path, "b.jsonl", [*copied[:3], ("something else", "entirely")])
    found = read_study_data(data, tmp_path)
    pool = found.pools["b (unseen source)"]
    assert len(pool) == 1 and count_shared(pool, found.candidates) == 0
    assert found.facts.set_index("source").loc["b", "near copies of candidates"] == 3


def test_the_second_evaluation_set_has_no_near_copy_of_the_first(data, tmp_path):
    write(tmp_path, "e2.jsonl", [("what is two and two", "four"), (EXAM, "Mercury")])
    found = read_study_data(data, tmp_path)
    assert len(found.eval_2) == 1
    facts = found.facts.set_index("role")
    assert facts.loc["eval_2", "near copies of evaluation rows"] == 1


def test_a_missing_file_says_how_to_get_it(data, tmp_path):
    import dataclasses

    gone = SourceConfig("c", "c.jsonl", how_to_get="Ask the authors.")
    with pytest.raises(ProfileError, match="c.jsonl. Ask the authors."):
        read_study_data(dataclasses.replace(data, sources=(gone,)), tmp_path)


def test_rows_of_one_id_in_three_sources_stay_apart(data, tmp_path):
    for name in "abc":
        rows = [{"id": i, "instruction": f"ask {name} number {i}", "output": f"say {name} {i}"}
                for i in range(5)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = tuple(SourceConfig(name, f"{name}.jsonl") for name in "ab")
    found = read_study_data(
        dataclasses.replace(
            data, rows_per_source=3, sources=sources, unseen=(SourceConfig("c", "c.jsonl"),)
        ),
        tmp_path,
    )
    assert len(found.everything) == found.everything["id"].nunique() == 15
    assert set(found.candidates["id"]) <= {f"{name}/{i}#0" for name in "ab" for i in range(5)}
    assert set(found.roles["id"]) == set(found.everything["id"])


def record(folder, name, rows):
    (folder / name).write_text("\n".join(map(json.dumps, rows)))


def test_marks_are_taken_out_before_the_row_is_named(data, tmp_path):
    rows = [
        {"instruction": "Pick\\none", "output": "3<<1+2=3>>3 apples<|endoftext|>", "t": "x"},
        {"instruction": "Say it", "output": "<|endoftext|>", "t": "x"},
        {"instruction": "Keep <|endoftext|> inside", "output": "a << b and c", "t": "x"},
        *({"instruction": f"Is {i} odd?", "output": "Yes<|endoftext|>", "t": "one"}
          for i in range(6)),
        *({"instruction": f"Has {i} a sign?", "output": "No", "t": "few"} for i in range(3)),
    ]
    record(tmp_path, "m.jsonl", rows)
    plain = SourceConfig("m", "m.jsonl")
    source = dataclasses.replace(plain, clean=("end_marks", "literal_newlines", "calculator"),
                                 template_field="t")  # fmt: skip
    found = read_source(source, data, tmp_path)
    said = [[m["content"] for m in messages] for messages in found["messages"]]
    assert said[:2] == [["Pick\none", "33 apples"], ["Keep <|endoftext|> inside", "a << b and c"]]
    assert [one[1] for one in said[2:]] == ["No"] * 3, "of three rows nobody can tell"
    told = found.attrs["cleaned"]
    assert (told["end marks before"], told["end marks after"]) == (8, 0)
    assert (told["literal newlines before"], told["calculator before"]) == (1, 1)
    assert (told["empty when cleaned"], told["templates with one label"]) == (1, 6)
    raw = read_source(plain, data, tmp_path)
    assert raw["row_hash"].iloc[0] != found["row_hash"].iloc[0]
    assert found["row_hash"].tolist() == with_row_hash(found)["row_hash"].tolist()
    part = read_source(dataclasses.replace(plain, records=(9, 12)), data, tmp_path)
    assert part["row"].tolist() == [9, 10, 11]


def test_a_row_that_asks_a_short_evaluation_prompt_is_no_candidate(data, tmp_path):
    write(tmp_path, "a.jsonl", [("What is two, and two?", "five"), ("what is two", "two")])
    found = read_study_data(data, tmp_path)
    assert found.facts.set_index("source").loc["a", "evaluation prompts"] == 1
    assert [m[0]["content"] for m in found.candidates["messages"]] == ["what is two"]


def test_further_prompts_serve_once_and_like_ones_together(data, tmp_path):
    alike = "write a long friendly letter to my old neighbour about"
    rows = [(f"{alike} {i}", f"dear {i}") for i in range(5)]
    rows += [(f"tell {i}", f"told {i}") for i in range(9)] + [("what is two and two", "4")]
    write(tmp_path, "more.jsonl", rows)
    write(tmp_path, "human.jsonl", [(EXAM, "Mercury first")])
    more = dataclasses.replace(
        data, eval_more=(SourceConfig("more", "more.jsonl"),), eval_2_more=2, regime_prompts=4,
        human=SourceConfig("human", "human.jsonl"),
    )  # fmt: skip
    exams = read_study_data(more, tmp_path).exams
    sizes = {name: len(exam) for name, exam in exams.items()}
    assert sizes == {"eval_1": 1, "eval_2": 3, "regime": 4, "gate": 8, "human": 1}
    asked = {name: [m[0]["content"] for m in exam["messages"]] for name, exam in exams.items()}
    assert sum(text.startswith(alike) for text in asked["gate"]) == 5, "too large a group is whole"
    every = [text for name, texts in asked.items() if name != "human" for text in texts]
    assert len(every) == len(set(every)) == 16
    assert read_study_data(more, tmp_path).exams["regime"].equals(exams["regime"])


def test_a_source_may_be_a_pool_with_its_own_candidates_last(data, tmp_path):
    named = dataclasses.replace(data, pools_of=("a",), pool_rows=15)
    found = read_study_data(named, tmp_path)
    assert set(found.pools) == {"a"}
    ids, fitted = found.pools["a"]["id"].tolist(), set(found.candidates["id"])
    assert len(ids) == 15 and not set(ids[:8]) & fitted and set(ids[8:]) <= fitted
    assert len(found.everything) == 20, "a row in two roles is scored once"
