"""Stand-in models: Hugging Face layout, the loading code of the real ones, nothing unfinished."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from instructmining.embedded import corpus as corpus_module
from instructmining.embedded import standins
from instructmining.embedded.corpus import ROLES, Corpus, build_corpus
from instructmining.embedded.defects import twins
from instructmining.embedded.standins import NEGATIVES, question_pairs
from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.tokenization import encode_many
from instructmining_core.indicators import reward, unieval
from instructmining_core.indicators.turns import read
from instructmining_core.models.causal_lm import load_lm, response_nll

NAMES = ["seaborn", "joblib", "networkx", "IPython", "rich", "traitlets"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache of its own, and few libraries in the place of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "ROLES", {name: ROLES[name] for name in NAMES})
        patch.setattr(corpus_module, "MIN_CANDIDATE_LIBRARIES", 1)
        patch.setenv("INSTRUCTMINING_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def corpus(home) -> Corpus:
    return build_corpus("smoke")


@pytest.fixture(scope="module")
def folder(home):
    return standins.build_standins([ModelRef(f"standin:{part}") for part in standins.PARTS])


def test_four_folders_and_nothing_else(folder, corpus):
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(standins.PARTS)
    for part in standins.PARTS:
        marked = json.loads((folder / part / "STAND_IN.json").read_text())
        assert marked["stand_in"] == part and marked["corpus"] == corpus.key
        assert (folder / part / "model.safetensors").exists()
        assert not list((folder / part).glob("*.bin"))
    types = [json.loads((folder / part / "config.json").read_text())["model_type"]
             for part in standins.PARTS]
    assert types == ["llama", "llama", "gpt_neox_reward_model", "t5"]


@pytest.mark.parametrize("part", ["base", "base_small"])
def test_a_base_learns_and_goes_through_the_real_loading_code(folder, corpus, part):
    lm = load_lm(ModelRef(str(folder / part), dtype="float32"))
    assert lm.resolved.stand_in
    rows = corpus.split("eval_1")
    encoded = encode_many(lm.tokenizer, rows["messages"].tolist(), max_tokens=128)
    assert all(row.ids[0] == lm.tokenizer.bos_token_id for row in encoded)
    nll = response_nll(lm, encoded)
    per_token = (nll["nll"] / nll["tokens"]).mean()
    assert 2 < per_token < np.log(len(lm.tokenizer))  # better than a guess over the vocabulary


def test_tokenizer_writes_any_text_back(folder):
    tokenizer = load_lm(ModelRef(str(folder / "base"), dtype="float32")).tokenizer
    for text in ("Return `x_1`, naïvely → 漢字 \n\t end", "a  b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def test_the_reward_of_a_clean_answer_is_larger(folder, corpus):
    """On functions that it has not learnt from, of libraries that only stand-ins read."""
    rows = corpus.split("standin")
    held = rows[~rows["symbol"].isin(set(standins.learnt_rows(corpus)["symbol"]))]
    cut = twins(held, "cut_short", seed=0)
    clean = held.set_index("id").loc[cut["twin"]]
    model = reward.load_reward_model(ModelRef(str(folder / "reward"), dtype="float32"))
    good, bad = (
        reward.compute_reward([read(m) for m in part["messages"]], model)["reward"].values
        for part in (clean, cut)
    )
    assert len(good) > 20 and np.mean(good > bad) > 0.6


def test_the_evaluator_answers_through_the_indicator(folder, corpus):
    rows = [read(m) for m in corpus.split("pool")["messages"][:20]]
    judge = unieval.load_evaluator(ModelRef(str(folder / "unieval"), dtype="float32"))
    yes, no = unieval.answer_ids(judge.tokenizer)
    assert judge.tokenizer.convert_ids_to_tokens([yes, no]) == ["Yes", "No"]
    assert judge.tokenizer("x </s> y")["input_ids"].count(judge.tokenizer.eos_token_id) == 2
    for column in unieval.compute_unieval(rows, judge).values():
        assert ((column.values > 0) & (column.values < 1)).all()


def test_same_seed_same_weights_whatever_the_threads(folder, corpus, tmp_path):
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(2)
    try:
        standins.write_standin(tmp_path, "base", corpus)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    one, two = ((f / "base" / "model.safetensors").read_bytes() for f in (folder, tmp_path))
    assert one == two
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state is kept"


def test_a_failed_build_leaves_nothing_that_looks_finished(corpus, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(standins, "train_tiny", fail)
    with pytest.raises(KeyboardInterrupt):
        standins.write_standin(tmp_path, "base", corpus)
    assert not (tmp_path / "base").exists()


def test_built_once_and_only_what_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(standins, "write_standin", None)  # a second build would fail
    real = ModelRef("some/model")
    assert standins.build_standins([real, ModelRef("standin:reward")]) == folder
    assert standins.build_standins([real]) is None
    with pytest.raises(InstructMiningError, match="'gpt' is unknown; known: base, base_small"):
        standins.build_standins([ModelRef("standin:gpt")])


def test_stand_ins_learn_from_their_own_libraries_only(corpus):
    learnt = standins.learnt_rows(corpus)
    assert set(learnt["source"]) <= {"joblib", "IPython", "rich"}
    asked = question_pairs(learnt)
    assert set(asked["kind"]) <= {"scrambled", "cut_short", "other_answer"}
    assert set(asked["name"]) == set(NEGATIVES)
    assert (asked["good"] != asked["bad"]).all()
    coherent = asked[asked["name"] == "coherence"].iloc[0]
    assert coherent["good"].rpartition("dialogue history: ")[2] == \
        coherent["bad"].rpartition("dialogue history: ")[2]


def test_documents_hold_each_answer_once(corpus):
    rows = corpus.split("base_text")
    texts = standins.documents(rows)
    whole = "\n".join(texts)
    assert all(response in whole for response in rows["response"])
    asked = sum(text.startswith("User:\n") for text in texts)
    assert 0.2 < asked / len(texts) < 0.9


def test_pack_by_hand(monkeypatch):
    monkeypatch.setattr(standins, "CONTEXT", 3)
    packed = standins.pack_documents([[5, 6], [7]], bos=1, eos=2, seed=0)
    flat = packed.ravel().tolist()
    assert packed.shape == (2, 3) and flat in ([1, 5, 6, 2, 1, 7], [1, 7, 2, 1, 5, 6])


def test_batches_take_every_row_once_an_epoch():
    lengths = np.random.default_rng(0).integers(1, 99, 103)
    batches = standins.pair_batches(lengths, rows=8, seed=1)
    assert sorted(np.concatenate(batches)) == list(range(103))
    spread = np.mean([np.ptp(lengths[b]) for b in batches])
    assert spread < np.ptp(lengths) / 4


def test_learning_rate_warms_up_and_falls():
    rates = [standins.rate(s, 100) for s in range(101)]
    assert rates[0] == 1 / 6 and rates[5] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[6:], rates[7:], strict=False))
