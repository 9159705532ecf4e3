"""MTLD by hand, against `lexicalrichness`, and on the texts where that one has no value."""

from __future__ import annotations

import gzip
import json
import math
import random

import pytest

from instructmining_core.indicators.surface import compute_mtld, mtld, mtld_words
from instructmining_core.indicators.turns import read


def test_by_hand():
    # Forwards a b a | b a b: ratio 2/3 <= 0.72 at the third word of each half: 2 factors, 6/2 = 3.
    # Backwards the same, so 3.
    assert mtld("a b a b a b".split()) == 3.0
    # a b c d a: ratio 4/5 = 0.8 at the end, part factor 0.2 / 0.28, so 5 / (0.2/0.28) = 7.
    assert mtld("a b c d a".split()) == pytest.approx(7.0)
    # Forwards: a a | b c d, then 3 words without repeat: 1 factor + 0, 5. Backwards d c b a a:
    # ratio 4/5, part factor 0.2 / 0.28: 7. Mean 6.
    assert mtld("a a b c d".split()) == pytest.approx(6.0)


def test_no_repeat_gives_the_number_of_words_and_no_word_is_nan():
    assert mtld("one two three".split()) == 3.0
    assert math.isnan(mtld([]))


def test_rows_without_words_are_nan_with_a_reason():
    rows = [read([{"role": "user", "content": "x"}, {"role": "assistant", "content": text}])
            for text in ("", "12 + 3", "fine")]
    column = compute_mtld(rows)["mtld"]
    assert [math.isnan(v) for v in column.values] == [True, True, False]
    assert column.reasons == ["no word in the response"] * 2 + [""]


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    pieces = ["the", "The", "a", "it's", "well-known", "x1", "3rd", "naïve", "—", "foo.bar", "€5",
              "über", "data", "model", "İstanbul", "word\u00a0apart", "tab\tapart", "\x1fend"]
    return [" ".join(draw.choices(pieces + [f"w{i}" for i in range(draw.randint(1, 60))],
                                  k=draw.randint(1, 150))) for _ in range(count)]


def peer(text: str) -> float:
    lexicalrichness = pytest.importorskip("lexicalrichness")
    return lexicalrichness.LexicalRichness(text).mtld(threshold=0.72)


def test_equal_to_lexicalrichness_on_random_texts():
    for text in random_texts(400):
        if mtld_words(text):
            assert mtld(mtld_words(text)) == peer(text), text


def test_equal_to_lexicalrichness_on_alpaca(shared_data):
    with gzip.open(shared_data / "alpaca.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["output"] for _ in range(1500)]
    for text in texts:
        if mtld_words(text):
            assert mtld(mtld_words(text)) == peer(text), text
