import json

import numpy as np
import pandas as pd
import pytest

from bench.studies import COLUMNS, synthetic_world
from instructmining_core.config import InstructMiningError
from instructmining_core.finetuning.sets import (
    TrainingSet,
    anchors,
    designed_sets,
    directions,
    equal_token_sets,
    fusion_sets,
    largest_remainder,
    normal_scores,
    rows_by_source,
    set_means,
    tilted_order,
)


@pytest.fixture(scope="module")
def world():
    return synthetic_world(8, rows=300, seed=3)


@pytest.fixture(scope="module")
def designed(world):
    return designed_sets(world, 48, 20, 100, seed=5, columns=COLUMNS)


def test_largest_remainder_by_hand():
    assert largest_remainder(np.array([1.0, 1.0, 1.0]), 10).tolist() == [4, 3, 3]
    assert largest_remainder(np.array([0.475, 0.32, 0.205]), 10).tolist() == [5, 3, 2]
    assert largest_remainder(np.array([5.0, 0.0]), 7).tolist() == [7, 0]


def test_fusion_sets_have_the_size_each_row_once_and_true_shares(world):
    source = dict(zip(world["row_hash"], world["source"], strict=True))
    sets = fusion_sets(world, 20, 150, 1)
    assert {len(s.row_hashes) for s in sets} == {150}
    for one in sets:
        assert len(set(one.row_hashes)) == 150
        counted = pd.Series([source[h] for h in one.row_hashes]).value_counts() / 150
        assert one.shares == pytest.approx(counted.to_dict())
    assert sets == fusion_sets(world, 20, 150, 1)
    assert sets[0].set_id != fusion_sets(world, 20, 150, 2)[0].set_id


def test_fusion_draws_shares_that_every_source_can_deliver(world):
    short = world[(world["source"] != "s03") | (world.index % 300 < 5)]
    sets = fusion_sets(short, 20, 300, 1)
    assert max(s.shares.get("s03", 0) for s in sets) <= 5 / 300
    with pytest.raises(InstructMiningError, match="'s03' has 5 rows"):
        fusion_sets(short[short["source"] == "s03"], 1, 6, 1)


def test_normal_scores_follow_blom():
    assert normal_scores(np.array([10.0, -3.0, 2.0])) == pytest.approx([0.8694, -0.8694, 0.0],
                                                                      abs=1e-4)


def test_tilted_order_draws_the_first_row_with_its_weight():
    values, n = np.array([-1.0, 0.0, 1.0]), 4000
    rng = np.random.default_rng(0)
    first = np.bincount([tilted_order(values, 1.5, rng)[0] for _ in range(n)], minlength=3) / n
    weight = np.exp(1.5 * normal_scores(values))
    assert first == pytest.approx(weight / weight.sum(), abs=0.03)


def test_directions_are_orthonormal_frames_with_both_signs():
    d = directions(18, 9, np.random.default_rng(0))
    assert d[0::2] == pytest.approx(-d[1::2])
    assert d[0::2] @ d[0::2].T == pytest.approx(np.eye(9), abs=1e-12)


def test_within_sets_are_of_one_source_and_tilted_the_way_they_say(world, designed):
    within = [s for s in designed if s.arm == "within"]
    assert len(within) == 48 and {len(s.row_hashes) for s in within} == {100}
    # eight sources could take part, 48 // 6 = 8 of them get six sets each
    assert pd.Series([s.source for s in within]).value_counts().tolist() == [6] * 8
    by_hash = world.set_index("row_hash")
    for one in within:
        own = by_hash[by_hash["source"] == one.source][list(COLUMNS)]
        z = (own - own.mean()) / own.std()
        scale = np.sqrt(np.array(one.tilt) @ z.cov().to_numpy() @ np.array(one.tilt))
        assert set(one.row_hashes) <= set(own.index)
        assert z.loc[list(one.row_hashes)].mean() @ np.array(one.tilt) / scale > 0.5


def test_mixed_sets_have_two_or_three_sources_within_their_cap(designed):
    mixed = [s for s in designed if s.arm == "mixed"]
    assert len(mixed) == 20 and {len(s.shares) for s in mixed} == {2, 3}
    for one in mixed:
        assert len(set(one.row_hashes)) == 100 and sum(one.shares.values()) == pytest.approx(1)
        assert max(one.shares.values()) * 100 <= 0.4 * 300


def test_a_small_source_enters_mixed_sets_only(world):
    small = world[(world["source"] != "s00") | (world.index < 200)]
    sets = designed_sets(small, 48, 40, 100, seed=1, columns=COLUMNS)
    assert not any(s.source == "s00" for s in sets if s.arm == "within")
    assert any("s00" in s.shares for s in sets if s.arm == "mixed")
    assert all(s.shares.get("s00", 0) * 100 <= 80 for s in sets)


def test_errors_say_what_is_missing(world):
    with pytest.raises(InstructMiningError, match="7 sources"):
        designed_sets(world[world["source"] != "s00"], world, 10, 5, 100, columns=COLUMNS)
    with pytest.raises(InstructMiningError, match="no source has the 1000 rows"):
        designed_sets(world, 10, 5, 400, columns=COLUMNS)


def test_a_row_in_two_sources_counts_once():
    table = pd.DataFrame({"source": ["b", "a", "a"], "row_hash": ["x", "x", "y"]})
    found = {name: rows["row_hash"].tolist() for name, rows in rows_by_source(table).items()}
    assert found == {"b": ["x"], "a": ["y"]}


def test_anchors_repeat_designed_sets_on_other_seeds(designed):
    repeats = anchors(designed, 8, (1, 2))
    assert len(repeats) == 16 and len({s.set_id for s in repeats}) == 8
    assert {s.set_id for s in repeats} <= {s.set_id for s in designed}
    assert {(s.init_seed, s.order_seed) for s in repeats} == {(1, 1), (2, 2)}
    assert {s.arm for s in repeats} == {"within", "mixed"}
    with pytest.raises(InstructMiningError, match="100 anchors"):
        anchors(designed, 100, (1,))


def test_set_means_by_hand_and_with_a_missing_value():
    scores = pd.DataFrame({"row_hash": ["a", "b", "c"], "x": [1.0, 3.0, np.nan]})
    sets = [TrainingSet("one", "fusion", ("a", "b"), {"s": 1.0}),
            TrainingSet("two", "fusion", ("a", "c"), {"s": 1.0})]
    means = set_means([*sets, sets[0]], scores, ["x"])
    assert means["x"].to_dict() == {"one": 2.0, "two": 1.0}
    assert means.attrs["missing"] == {"x": 0.5}
    with pytest.raises(InstructMiningError, match="set three"):
        set_means([TrainingSet("three", "fusion", ("z",), {"s": 1.0})], scores, ["x"])


def test_sets_survive_json(designed):
    again = TrainingSet.from_dict(json.loads(json.dumps(designed[-1].as_dict())))
    assert again == designed[-1]


def test_equal_token_sets_hold_the_same_tokens_and_other_numbers_of_rows(world):
    scores = world.assign(len_out=np.round(np.exp(3 + 0.6 * world["len_out"])))
    sets = equal_token_sets(scores, 24, 1500, seed=2, columns=COLUMNS)
    lengths = scores.set_index("row_hash")["len_out"]
    tokens = np.array([lengths.loc[list(s.row_hashes)].sum() for s in sets])
    assert np.abs(tokens - 1500).max() <= lengths.max() / 2
    assert len({len(s.row_hashes) for s in sets}) > 5 and {s.arm for s in sets} == {"tokens"}
    with pytest.raises(InstructMiningError, match="tokens of responses"):
        equal_token_sets(scores, 2, 10**7, columns=COLUMNS)
