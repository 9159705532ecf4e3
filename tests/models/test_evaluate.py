from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from instructmining_core.config import ModelRef
from instructmining_core.data.tokenization import encode_many
from instructmining_core.models.causal_lm import COLUMNS, evaluate, load_lm, losses, response_nll


def frame(*rows):
    return pd.DataFrame(rows, columns=list(COLUMNS))


# nll, tokens, over the first 64, of the end, of the first token, reason
SHORT = (6.0, 3, 6.0, 3, 1.0, 1, 4.0, 1, "")  # 2 nats a token; 2.5 without eos; body of 1 token: 1
LONG = (100.0, 100, 128.0, 64, np.nan, 0, 2.0, 1, "")  # 1 nat a token, 2 over the first 64; cut


def test_every_mean_by_hand():
    found = losses(frame(SHORT, LONG))
    assert found["prompt_mean"] == pytest.approx(1.5)
    assert found["token_mean"] == pytest.approx(106 / 103)
    assert found["first64"] == pytest.approx(2.0)
    assert found["without_eos"] == pytest.approx((2.5 + 1) / 2)
    assert found["body_prompt_mean"] == pytest.approx((1 / 1 + 98 / 99) / 2)
    assert found["body_token_mean"] == pytest.approx(99 / 100)
    assert (found["first_token"], found["end_of_text"]) == (pytest.approx(3.0), pytest.approx(1.0))
    assert found["effective_n"] == pytest.approx(103**2 / (9 + 10_000))
    assert (found["rows"], found["missing"]) == (2, 0)


def test_rows_without_response_are_left_out_and_counted():
    empty = (np.nan, 0, np.nan, 0, np.nan, 0, np.nan, 0, "no response token within max_tokens")
    found = losses(frame(SHORT, empty))
    assert found["prompt_mean"] == pytest.approx(2.0)
    assert (found["rows"], found["missing"]) == (1, 1)


@pytest.mark.parametrize("bad", [
    (np.nan, 0, np.nan, 0, np.nan, 0, np.nan, 0, "out of memory on one row of 9 tokens: x"),
    (np.nan, 5, 7.0, 5, 1.0, 1, np.nan, 1, "the model's loss is not finite on this row"),
])
def test_a_row_that_failed_makes_every_mean_nan(bad):
    found = losses(frame(SHORT, bad))
    means = set(found) - {"rows", "missing", "effective_n"}
    assert {name for name in means if np.isfinite(found[name])} == set()


def test_an_eos_alone_is_no_text():
    found = losses(frame(SHORT, (4.0, 1, 4.0, 1, 4.0, 1, np.nan, 0, "")))
    assert found["without_eos"] == pytest.approx(2.5) and found["prompt_mean"] == pytest.approx(3.0)
    assert (found["first_token"], found["body_prompt_mean"]) == (4.0, 1.0)


def test_no_row_is_nan_not_zero():
    assert np.isnan(losses(frame())["prompt_mean"])


def test_evaluate_is_losses_of_the_frame(tiny_lm_folder):
    lm = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"))
    talks = [[{"role": "user", "content": "Sort."}, {"role": "assistant", "content": t}]
             for t in ("the list", "an axis, one by one")]
    rows = encode_many(lm.tokenizer, talks, max_tokens=64)
    found, per_row = evaluate(lm, rows)
    pd.testing.assert_frame_equal(per_row, response_nll(lm, rows))
    assert found == losses(per_row)
    assert found["prompt_mean"] == pytest.approx((per_row["nll"] / per_row["tokens"]).mean())
