"""Runs that share rows: overlap by hand, the likelihood written out, the level of the test."""

import numpy as np
import pytest

from bench.studies import permutation_size
from instructmining_core.regression.permutation import GRID, MOST, row_overlap, row_share, whitener


def drawn(seed: int, share: float, n: int = 160, rows: int = 300, size: int = 60):
    """Sets of `size` rows of `rows`, errors of which `share` is the rows', and a design."""
    rng = np.random.default_rng(seed)
    sets = [[f"r{i}" for i in rng.permutation(rows)[:size]] for _ in range(n)]
    effects = dict(zip((f"r{i}" for i in range(rows)), rng.normal(size=rows), strict=True))
    of_rows = np.array([sum(effects[r] for r in one) / np.sqrt(size) for one in sets])
    y = np.sqrt(share) * of_rows + np.sqrt(1 - share) * rng.normal(size=n)
    return row_overlap(sets), y, np.column_stack([np.ones(n), rng.normal(size=(n, 2))])


def test_overlap_by_hand():
    K = row_overlap([["a", "b", "c", "d"], ["c", "d"], ["x", "y", "z"], ["a", "b", "c", "d"]])
    half = 2 / np.sqrt(8)
    assert K == pytest.approx(np.array([
        [1, half, 0, 1], [half, 1, 0, half], [0, 0, 1, 0], [1, half, 0, 1],
    ]))  # fmt: skip


def test_the_share_of_rows_is_found():
    for share in (0.0, 0.5, 0.9):
        worlds = [drawn(seed, share) for seed in range(12)]
        estimate, low, high = np.array([row_share(y, X, K) for K, y, X in worlds]).T
        assert (low <= estimate).all() and (estimate <= high).all() and high.max() <= MOST
        assert estimate.mean() == pytest.approx(share, abs=0.15)
        assert (low <= share + 0.01).mean() >= 0.75 <= (share <= high).mean()


def test_the_profile_is_the_restricted_likelihood():
    """Against the textbook formula, with determinants and inverses written out."""
    K, y, X = drawn(2, 0.6, n=40)

    def deviance(share):
        V = share * K + (1 - share) * np.eye(len(K))
        inverse = np.linalg.inv(V)
        middle = X.T @ inverse @ X
        P = inverse - inverse @ X @ np.linalg.inv(middle) @ X.T @ inverse
        logs = np.linalg.slogdet(V)[1] + np.linalg.slogdet(middle)[1]
        return logs + (len(y) - X.shape[1]) * np.log(y @ P @ y)

    values = np.array([deviance(share) for share in GRID])
    estimate, low, high = row_share(y, X, K)
    assert estimate == GRID[values.argmin()]
    inside = GRID[values <= values.min() + 3.841459]
    assert (low, high) == (inside.min(), inside.max())


def test_sets_without_a_common_row_have_nothing_to_share():
    K = row_overlap([[f"{i}-{j}" for j in range(5)] for i in range(20)])
    y = np.random.default_rng(0).normal(size=20)
    assert row_share(y, np.ones((20, 1)), K) == (0.0, 0.0, 0.0)


def test_whitening_takes_the_correlation_out():
    K, _, _ = drawn(3, 0.8)
    P = whitener(0.7, K)
    assert P @ (0.7 * K + 0.3 * np.eye(len(K))) @ P == pytest.approx(np.eye(len(K)), abs=1e-8)


def test_the_test_keeps_its_level_only_where_shared_rows_are_counted():
    found = permutation_size(3, 30, 11, 99)[["rows_plain", "rows_counted"]].mean()
    assert found["rows_plain"] > 0.12  # twice the level and more
    assert found["rows_counted"] < 0.11  # 90 studies at 5 %: 98 % of them reject less than 11 %
