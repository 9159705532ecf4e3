"""The judge that a profile names, the pairs it is checked on, and what it says of two models."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bench.judge_server import JudgeServer
from instructmining.experiments import judging
from instructmining.profile import JudgeConfig, Profile, SourceConfig, load_profile, preset_names
from instructmining.study import Study
from instructmining_core.config import InstructMiningError, ModelRef, ProfileError
from instructmining_core.selection import judge

PAIRS = [
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " A long greeting.", "rejected": " No."},
    {"prompt": "Hi again", "chosen": "Hello.", "rejected": "A far longer, but rude, reply."},
    {"prompt": "Same", "chosen": "Yes.", "rejected": "Yes."},
    {"prompt": "Empty", "chosen": "Yes.", "rejected": ""},
    {"instruction": "No pair", "output": "Yes."},
]


def study_of(tmp_path, **settings) -> Study:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in PAIRS))
    source = SourceConfig("people", str(path))
    study = Study(Profile("t", judge=JudgeConfig(checks=(source,), **settings)))
    study.folder = tmp_path / "results"
    empty = pd.DataFrame({"id": [], "kind": [], "twin": [], "messages": [], "row_hash": []})
    rows = pd.DataFrame([
        {"id": f"{i}{kind}", "kind": kind, "twin": str(i) if kind else "", "row_hash": f"{i}{kind}",
         "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]}
        for i, answer in enumerate(["Returns a list.", "Opens a file."])
        for kind, text in (("", answer), ("cut_short", answer[:5]))
    ])  # fmt: skip
    study.data = SimpleNamespace(everything=rows if len(rows) else empty)
    return study


def test_pairs_come_from_files_and_from_planted_defects(tmp_path):
    found = judging.preference_sets(study_of(tmp_path))
    people = found["people"].sort_values("chosen")
    assert people["chosen"].tolist() == ["A long greeting.", "Hello."]
    assert people["prompt"].tolist()[0] == [{"role": "user", "content": "Hi"}]
    planted = found[judging.PLANTED].sort_values("chosen")
    assert planted[["chosen", "rejected"]].values.tolist() == [
        ["Opens a file.", "Opens"], ["Returns a list.", "Retur"]]


def test_a_judge_at_a_server_is_checked_beside_length(tmp_path):
    with JudgeServer(record=True) as server:
        study = study_of(tmp_path, kind="api", base_url=server.url, model=ModelRef("gpt-x"))
        name, judged_by = judging.open_judge(study)
        checks = judging.check_judge(study, name, judged_by).set_index(["judge", "check"])
        pairs = pd.DataFrame({"pair": 0, "prompt": [[{"role": "user", "content": "?"}]] * 2,
                              "selected": ["longer one", "a"], "random": ["short", "bcd"]})
        judged = judging.judge_models(judged_by, pairs)
    assert name == f"gpt-x, {judge.VERSION}"
    assert checks.loc[(name, "people"), "agreement"] == 0.5
    assert checks.loc[(name, judging.PLANTED), "agreement"] == 1
    # the server prefers the longer answer, as the rival does
    numbers = checks.select_dtypes("number")
    pd.testing.assert_frame_equal(numbers.xs(name), numbers.xs("the longer answer"))
    assert judged["outcome"].tolist() == ["win", "lose"]
    assert (tmp_path / "results" / "replies").is_dir()


def test_a_likelihood_judge_reads_the_model_and_gives_no_verdict_on_a_cut_text(tiny_lm_folder):
    from instructmining_core.models.causal_lm import load_lm

    ref = ModelRef(str(tiny_lm_folder), dtype="float32")
    study = Study(Profile("t"))
    study.load = lambda _: load_lm(ref)
    asked = [{"role": "user", "content": "?"}]
    comparisons = [(asked, "a", "b")] * 2 + [(asked, "a", "b" * 400)]  # of 512 positions
    found = judging._by_likelihood(study, ref)(comparisons)
    assert found[0] == found[1] and 0 < found[0] < 1 and found[0] != 0.5 and np.isnan(found[2])


def test_a_check_without_pairs_is_an_error(tmp_path):
    study = study_of(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[2]) + "\n")
    with pytest.raises(InstructMiningError, match="'people' has no pair"):
        judging.preference_sets(study)


def test_answers_are_kept_so_that_a_run_goes_on(tmp_path, monkeypatch):
    study = Study(Profile("t", judge=JudgeConfig(max_new_tokens=3)))
    study.folder = tmp_path
    study.lm = SimpleNamespace(resolved=ModelRef("x/y", "r"), dtype="float32")
    tuned = []
    study.tuned = lambda plan: _Tuned(tuned, plan)
    monkeypatch.setattr("instructmining_core.models.causal_lm.generate",
                        lambda lm, questions, **_: [f"{lm} {len(questions)}"] * len(questions))
    plan = judging.PlannedRun(("h1",), init_seed=1)
    asked = [[{"role": "user", "content": "?"}]] * 2
    first = judging._answers(study, plan, asked)
    assert judging._answers(study, plan, asked) == first == ["lm 2", "lm 2"] and len(tuned) == 1
    judging._answers(study, judging.PlannedRun(("h1",), init_seed=2), asked)
    judging._answers(study, plan, asked[:1])
    assert len(tuned) == 3


class _Tuned:
    def __init__(self, seen, plan):
        seen.append(plan)
        self.lm = "lm"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return


def test_every_preset_names_a_judge_that_can_be_opened():
    for name in preset_names():
        config = load_profile(name).judge
        assert config.kind != "api" or (config.base_url and config.model), name


def test_an_api_judge_needs_a_server_and_a_key_has_no_place_in_a_profile(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("extends: smoke\njudge: {kind: api, model: gpt-4}\n")
    with pytest.raises(ProfileError, match="needs judge.base_url"):
        load_profile(path)
    path.write_text("extends: smoke\njudge: {api_key: sk-1}\n")
    with pytest.raises(ProfileError, match="judge has no field 'api_key'"):
        load_profile(path)
    path.write_text("extends: smoke\njudge: {kind: api, model: m, base_url: 'https://h/v1', "
                    "temperature: null}\n")
    assert load_profile(path).judge.temperature is None
