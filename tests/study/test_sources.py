"""Sources of a profile of files: what is left out is counted, and no near copy gets through."""

from __future__ import annotations

import dataclasses
import json

import pytest

from instructmining.profile import DataConfig, SourceConfig
from instructmining.study_data import read_source, read_study_data
from instructmining_core.config import ProfileError
from instructmining_core.data.duplicates import count_shared

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
