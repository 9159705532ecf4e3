"""Planted defects: what each does to a text, and that every one stands beside its twin."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from instructmining.embedded import defects
from instructmining.embedded.corpus import messages
from instructmining.embedded.defects import KINDS, SEEN_KINDS, UNSEEN_KINDS, plant, twins
from instructmining_core.config import InstructMiningError


def table(sources=("one", "two"), rows=30) -> pd.DataFrame:
    frame = pd.DataFrame({
        "id": [f"{s}:{i}" for s in sources for i in range(rows)],
        "source": [s for s in sources for _ in range(rows)],
        "symbol": [f"{s}.f{i}" for s in sources for i in range(rows)],
        "question": "summary",
        "prompt": [f"What does {s}.f{i} do?" for s in sources for i in range(rows)],
        "response": [
            f"Return the first {i + 2} rows of `table_{s}_{i}` before item number {i} is read."
            for s in sources for i in range(rows)],
    })  # fmt: skip
    return frame.assign(messages=messages(frame["prompt"], frame["response"]), file="f", row=0)


TEXT = "Return the first 3 rows of `table` before they are read again by others."
DONORS = defects.Donors(["m.g", "m.h"], ["Close the file.", "Open a `socket`."], ["socket", "m.g"])


def rng():
    return np.random.default_rng(0)


def test_other_answer_is_never_the_own():
    assert defects.other_answer(TEXT, "m.g", DONORS, rng()) == "Open a `socket`."
    assert defects.other_answer(TEXT, "m.h", DONORS, rng()) == "Close the file."


def test_scrambled_has_the_same_words():
    text = defects.scrambled(TEXT, "f", DONORS, rng())
    assert text != TEXT and sorted(text.split()) == sorted(TEXT.split())


def test_cut_short_is_a_beginning_without_a_stop():
    for seed in range(20):
        text = defects.cut_short(TEXT, "f", DONORS, np.random.default_rng(seed))
        assert TEXT.startswith(text) and 2 <= len(text.split()) <= 7 and text[-1].isalnum()


def test_repetitive_repeats_a_run_of_its_words():
    text = defects.repetitive(TEXT, "f", DONORS, rng())
    words, own = text.split(), TEXT.split()
    extra = len(words) - len(own)
    assert extra >= 6 and set(words) == set(own)
    start = next(i for i, (a, b) in enumerate(zip(words, own, strict=False)) if a != b)
    lengths = [n for n in range(3, 7) if words[start - n : start] == words[start : start + n]]
    assert lengths


def test_fluent_wrong_turns_words_round():
    text = defects.fluent_wrong("Return the first 3 rows.", "f", DONORS, rng())
    assert text == "Accept the last 6 columns."
    assert defects.fluent_wrong("Isn't it?", "f", DONORS, rng()) == "Is it?"
    # nothing to turn round: another function's answer under this function's name
    assert defects.fluent_wrong("Hello there.", "lib.f", DONORS, rng()) in (
        "`f`: Close the file.", "`f`: Open a `socket`.")


def test_wrong_identifier_changes_names_and_nothing_else():
    text = defects.wrong_identifier(TEXT, "f", DONORS, rng())
    assert text in (TEXT.replace("table", "socket"), TEXT.replace("table", "m.g"))
    plain = defects.wrong_identifier("Close the file.", "m.g", DONORS, rng())
    assert plain == "`m.h`: Close the file."


@pytest.mark.parametrize("kind", KINDS)
def test_twins_point_to_their_clean_row(kind):
    clean = table()
    made = twins(clean, kind, seed=3)
    assert len(made) == len(clean)
    assert (made["twin"] + f"#{kind}" == made["id"]).all() and (made["kind"] == kind).all()
    before = clean.set_index("id")["response"].loc[made["twin"]].to_numpy()
    assert (made["response"].to_numpy() != before).all()
    assert [m[1]["content"] for m in made["messages"]] == made["response"].tolist()
    assert [m[0]["content"] for m in made["messages"]] == clean["prompt"].tolist()
    pd.testing.assert_frame_equal(made, twins(clean, kind, seed=3))
    assert (twins(clean, kind, seed=4)["response"] != made["response"]).any()


def test_donors_stay_in_their_source():
    made = twins(table(), "other_answer", seed=0)
    own = [f"`table_{s}_" for s in made["source"]]
    assert all(o in r for o, r in zip(own, made["response"], strict=True))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.3, 0.5])
def test_share_in_every_source(share):
    clean = table(rows=60)
    planted = plant(clean, share, seed=1)
    part = planted.groupby("source")["kind"].agg(lambda k: (k != "").mean())
    assert part.to_numpy() == pytest.approx(share, abs=0.01)
    assert planted["id"].is_unique and planted.loc[planted["twin"] != "", "twin"].is_unique
    pd.testing.assert_frame_equal(planted.iloc[: len(clean)][list(clean)], clean)
    assert set(planted.loc[planted["twin"] != "", "twin"]) <= set(clean["id"])


def test_every_kind_in_every_source():
    planted = plant(table(rows=60), 0.3, seed=1)
    counts = planted.groupby(["source", "kind"]).size().unstack()[list(KINDS)]
    assert (counts >= 4).all().all()
    assert counts.to_numpy().max() - counts.to_numpy().min() <= 1
    assert len(KINDS) >= 6 and len(SEEN_KINDS) in (2, 3)
    assert not set(SEEN_KINDS) & set(UNSEEN_KINDS)


def test_errors():
    with pytest.raises(InstructMiningError, match="0 to 0.5"):
        plant(table(), 0.7, seed=0)
    with pytest.raises(InstructMiningError, match="known: other_answer"):
        twins(table(), "typos", seed=0)
    with pytest.raises(InstructMiningError, match="one function only"):
        twins(table(rows=1), "other_answer", seed=0)
