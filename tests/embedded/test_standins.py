"""Stand-in models: Hugging Face layout, the loading code of the real ones, nothing unfinished."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from instructmining.embedded import corpus as corpus_module
from instructmining.embedded import standins, tiny_models, training
from instructmining.embedded.corpus import ROLES, Corpus, build_corpus
from instructmining.embedded.tiny_models import NEGATIVES, questions
from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.tokenization import encode_many
from instructmining_core.indicators import reward, unieval
from instructmining_core.indicators.turns import read
from instructmining_core.models.causal_lm import load_lm, response_nll

NAMES = ["seaborn", "joblib", "networkx", "IPython", "rich", "traitlets"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "ROLES", {name: ROLES[name] for name in NAMES})
        patch.setattr(corpus_module, "MIN_CANDIDATE_LIBRARIES", 1)
        patch.setenv("INSTRUCTMINING_HOME", str(tmp_path_factory.mktemp("corpus")))
        return build_corpus("smoke")


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("standins")
    return folder, standins.build(folder, corpus, "smoke", standins.MAIN)


def test_three_folders_and_nothing_else(built, corpus):
    folder, reports = built
    assert sorted(p.name for p in folder.iterdir()) == ["base", "reward", "unieval"]
    for part in standins.MAIN:
        marked = json.loads((folder / part / "STAND_IN.json").read_text())
        assert marked["stand_in"] == part and marked["corpus"] == corpus.key
        assert (folder / part / "model.safetensors").exists()
        assert not list((folder / part).glob("*.bin"))
    types = [json.loads((folder / part / "config.json").read_text())["model_type"]
             for part in standins.MAIN]
    assert types == ["llama", "gpt_neox_reward_model", "t5"]


def test_base_learns_and_goes_through_the_real_loading_code(built, corpus):
    folder, reports = built
    report = reports["base"]
    assert report["loss_last"] < report["loss_first"] - 0.3
    lm = load_lm(ModelRef(str(folder / "base"), dtype="float32"))
    assert lm.resolved.stand_in
    rows = corpus.split("eval_1")
    encoded = encode_many(lm.tokenizer, rows["messages"].tolist(), max_tokens=128)
    assert all(row.ids[0] == lm.tokenizer.bos_token_id for row in encoded)
    nll = response_nll(lm, encoded)
    per_token = (nll["nll"] / nll["tokens"]).mean()
    assert 2 < per_token < np.log(len(lm.tokenizer))  # better than a guess over the vocabulary


def test_tokenizer_writes_any_text_back(built):
    folder, _ = built
    tokenizer = load_lm(ModelRef(str(folder / "base"), dtype="float32")).tokenizer
    for text in ("Return `x_1`, naïvely → 漢字 \n\t end", "a  b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def test_reward_and_evaluator_answer_through_the_indicators(built, corpus):
    folder, reports = built
    rows = [read(m) for m in corpus.split("pool")["messages"][:20]]
    model = reward.load_reward_model(ModelRef(str(folder / "reward"), dtype="float32"))
    scores = reward.compute_reward(rows, model)["reward"].values
    assert np.isfinite(scores).all() and scores.std() > 0
    judge = unieval.load_evaluator(ModelRef(str(folder / "unieval"), dtype="float32"))
    yes, no = unieval.answer_ids(judge.tokenizer)
    assert judge.tokenizer.convert_ids_to_tokens([yes, no]) == ["Yes", "No"]
    assert judge.tokenizer("x </s> y")["input_ids"].count(judge.tokenizer.eos_token_id) == 2
    for column in unieval.compute_unieval(rows, judge).values():
        assert ((column.values > 0) & (column.values < 1)).all()
    assert set(reports["unieval"]["accuracy"]) == set(NEGATIVES)
    assert reports["reward"]["accuracy"]["cut_short"] > 0.6


def test_same_seed_same_weights(built, corpus, tmp_path):
    folder, _ = built
    standins.build(tmp_path, corpus, "smoke", ("base",))
    one, two = ((f / "base" / "model.safetensors").read_bytes() for f in (folder, tmp_path))
    assert one == two


def test_untrained_reward_is_the_same_model_before_its_first_step(corpus, built, tmp_path):
    folder, _ = built
    report = standins.build(tmp_path, corpus, "smoke", (standins.UNTRAINED,))
    assert report[standins.UNTRAINED]["trained_pairs"] == 0
    shapes = [(f / "config.json").read_text()
              for f in (folder / "reward", tmp_path / standins.UNTRAINED)]
    assert shapes[0] == shapes[1]


def test_a_failed_build_leaves_nothing_that_looks_finished(corpus, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(standins, "build_base", fail)
    with pytest.raises(KeyboardInterrupt):
        standins.build(tmp_path, corpus, "smoke", ("base",))
    assert not (tmp_path / "base").exists()


def test_cached_by_corpus_config_and_texts(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))
    told = []
    folder = standins.build_cached("base", corpus, "smoke", None, lambda *at: told.append(at))
    assert folder.parent.name == standins.key(corpus, "smoke")
    assert told == [(step, 60) for step in range(1, 61)]
    monkeypatch.setattr(standins, "build", None)  # a second build would fail
    assert standins.build_cached("base", corpus, "smoke", None, print) == folder
    keys = {standins.key(corpus, "smoke"), standins.key(corpus, "laptop"),
            standins.key(corpus, "smoke", ["text"]),
            standins.key(replace(corpus, key="other"), "smoke")}  # fmt: skip
    assert len(keys) == 4


def test_base_can_learn_from_other_text(corpus, tmp_path):
    texts = [f"Sentence number {i} of a text that is not the corpus." for i in range(900)]
    report = standins.build(tmp_path, corpus, "smoke", ("base",), texts=texts)["base"]
    assert report["loss_last"] < 3
    with pytest.raises(InstructMiningError, match="give more text"):
        standins.build(tmp_path, corpus, "smoke", ("base",), texts=texts[:5])


def test_stand_ins_learn_from_their_own_libraries_only(corpus):
    learn, check = standins.learn_and_check(corpus)
    assert set(learn["source"]) <= {"joblib", "IPython", "rich"}
    assert not set(learn["symbol"]) & set(check["symbol"])
    asked = questions(learn, seed=0)
    assert set(asked["kind"]) <= {"scrambled", "cut_short", "other_answer"}
    assert set(asked["name"]) == set(NEGATIVES)
    assert (asked["good"] != asked["bad"]).all()
    coherent = asked[asked["name"] == "coherence"].iloc[0]
    assert coherent["good"].rpartition("dialogue history: ")[2] == \
        coherent["bad"].rpartition("dialogue history: ")[2]


def test_documents_hold_each_answer_once(corpus):
    rows = corpus.split("base_text")
    texts = tiny_models.documents(rows)
    whole = "\n".join(texts)
    assert all(response in whole for response in rows["response"])
    asked = sum(text.startswith("User:\n") for text in texts)
    assert 0.2 < asked / len(texts) < 0.9


def test_pack_by_hand():
    packed = tiny_models.pack_documents([[5, 6], [7]], context=3, bos=1, eos=2, seed=0)
    flat = packed.ravel().tolist()
    assert packed.shape == (2, 3) and flat in ([1, 5, 6, 2, 1, 7], [1, 7, 2, 1, 5, 6])


def test_batches_take_every_row_once_an_epoch():
    lengths = np.random.default_rng(0).integers(1, 99, 103)
    batches = training.bucketed(lengths, rows=8, seed=1)
    assert sorted(np.concatenate(batches)) == list(range(103))
    spread = np.mean([np.ptp(lengths[b]) for b in batches])
    assert spread < np.ptp(lengths) / 4
    assert len(list(training.epochs_of(lengths, 8, steps=30, seed=1))) == 30


def test_learning_rate_warms_up_and_falls():
    config = training.TrainingConfig(warmup_share=0.1)
    rates = [training._rate(s, 100, config) for s in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_unknown_names(corpus, tmp_path):
    with pytest.raises(InstructMiningError, match="known: base_small"):
        standins.build(tmp_path, corpus, "smoke", ("gpt",))
    with pytest.raises(InstructMiningError, match="known: laptop, smoke"):
        standins.key(corpus, "big")


def test_random_state_of_the_caller_is_kept(corpus, tmp_path):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    standins.build(tmp_path, corpus, "smoke", (standins.UNTRAINED,))
    assert torch.equal(before, torch.random.get_rng_state())
