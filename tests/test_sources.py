"""Sources of a profile of files: what is left out is counted, and no near copy gets through."""

from __future__ import annotations

import json

import pytest

from instructmining_core.near_copies import count_shared
from instructmining_core.profiles import DataConfig, ProfileError, SourceConfig
from instructmining_core.sources import read_study_data

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


def test_a_missing_file_says_how_to_get_it(data, tmp_path):
    import dataclasses

    gone = SourceConfig("c", "c.jsonl", how_to_get="Ask the authors.")
    with pytest.raises(ProfileError, match="c.jsonl. Ask the authors."):
        read_study_data(dataclasses.replace(data, sources=(gone,)), tmp_path)
