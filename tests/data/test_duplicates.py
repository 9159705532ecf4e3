"""Runs of words: copies across an evaluation's border, and near duplicates in a ranking."""

from __future__ import annotations

import numpy as np
import pytest

from instructmining_core.data.duplicates import (
    Kept,
    boilerplate,
    fold,
    groups,
    shared_runs,
    shingles,
    word_runs,
)

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen".split()


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_fold_takes_case_and_punctuation_away():
    assert fold("Don't use `read_csv`, STRASSE = straße") == [
        "don", "t", "use", "read", "csv", "strasse", "strasse",
    ]  # fmt: skip
    assert fold("日本 go") == ["日", "本", "go"]


def test_shingles_are_the_runs_of_eight_words():
    assert len(shingles(WORDS)) == len(WORDS) - 8 + 1
    assert len(shingles(WORDS * 2)) == len(WORDS), "each distinct run once"
    assert len(shingles(WORDS[:3])) == 1 and len(shingles([])) == 0
    assert set(shingles(WORDS[:10])) < set(shingles(WORDS))
    assert not set(shingles(WORDS[:8])) & set(shingles(WORDS[7::-1])), "order counts"


def test_near_copies_by_hand():
    eight = "one two three four five six seven eight"
    texts = [
        f"{eight} tail", f"head, {eight.upper()}!", "one two three four five six seven other eight",
        "a non-zero value of the_name in row ten", "so a nonzero value of the_name in row ten",
    ]  # fmt: skip
    runs = word_runs(texts)
    group = groups(runs, len(texts))
    assert group[0] == group[1] != group[2]
    assert group[3] == group[4]  # hyphens taken out: eight words in common
    pairs = shared_runs(texts[:1], texts[1:3])
    assert pairs.to_numpy().tolist() == [[0, 0]]


def test_boilerplate_keeps_the_first_copies_only():
    texts = ["if true the input is copied else changed"] * 4 + ["a b c d e f g h"]
    assert boilerplate(word_runs(texts), most=2).tolist() == [2, 3]


def test_groups_join_through_a_chain():
    a, b = "a1 a2 a3 a4 a5 a6 a7 a8", "b1 b2 b3 b4 b5 b6 b7 b8"
    group = groups(word_runs([a, f"{a} {b}", b, "c"]), 4)
    assert group[0] == group[1] == group[2] != group[3]


def test_a_copy_in_a_script_without_spaces_is_seen():
    text = "今天天气很好我们去公园散步"
    assert len(shared_runs([text], [f"他说：{text}。"])) == 1
    assert shared_runs([text], ["今天我们去公园，天气很好，一起散步"]).empty


def numbers(first, last):
    return " ".join(f"w{i}" for i in range(first, last))


@pytest.mark.parametrize(("shared", "is_copy"), [(80, True), (79, False)])
def test_the_threshold_is_the_share_of_runs_held_by_a_better_row(shared, is_copy):
    kept = Kept()
    kept.add("better", talk("", numbers(0, 1000)))
    # 107 words have 100 runs; `shared` of them lie wholly in the better row.
    worse = talk("", numbers(1000 - shared - 7, 1000) + " " + numbers(5000, 5100 - shared))
    assert (kept.add("worse", worse) == "better") is is_copy


def test_a_long_row_is_no_copy_of_its_own_beginning():
    kept = Kept()
    assert kept.add("short", talk("q", numbers(0, 20))) is None
    assert kept.add("long", talk("q", numbers(0, 200))) is None
    assert kept.add("short again", talk("q", numbers(0, 20))) == "short"


def test_another_answer_about_the_same_passage_stays():
    kept = Kept()
    passage = numbers(0, 300)
    assert kept.add("a", talk(passage + " who", "Anna did, in the old house by the sea.")) is None
    assert kept.add("b", talk(passage + " when", "It was on a Tuesday in the spring, they say.")) \
        is None  # fmt: skip


def test_short_texts_match_only_whole():
    kept = Kept()
    assert kept.add("a", talk("Say hi", "Hi!")) is None
    assert kept.add("b", talk("say, HI", "hi")) == "a"
    assert kept.add("c", talk("say hi", "hi there")) is None
    assert kept.add("empty", talk("", "")) is None


def test_boilerplate_does_not_make_copies_and_the_index_is_exact():
    rng = np.random.default_rng(0)
    texts = [numbers(0, 12) + " " + " ".join(rng.choice(WORDS, 30)) for _ in range(60)]
    texts += [texts[7], texts[41]]
    kept = Kept()
    found = [kept.add(i, talk("", text)) for i, text in enumerate(texts)]

    def slow(i):
        own = set(shingles(fold(texts[i])).tolist())
        for j in range(i):
            if found[j] is None:
                other = set(shingles(fold(texts[j])).tolist())
                if len(own & other) >= 0.8 * len(own):
                    return j
        return None

    assert found == [slow(i) for i in range(len(texts))]
    assert found[-2:] == [7, 41]
