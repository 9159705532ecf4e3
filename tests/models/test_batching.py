from __future__ import annotations

import numpy as np
import pytest

from instructmining_core.models.batching import (
    Failed,
    is_out_of_memory,
    map_batches,
    pad,
    token_budget_batches,
)


def test_literal_batches_longest_first():
    batches = token_budget_batches([3, 9, 9, 3, 4], 18)
    assert [b.tolist() for b in batches] == [[1, 2], [4], [0, 3]]


def test_one_row_may_exceed_the_budget_alone():
    assert [b.tolist() for b in token_budget_batches([100, 2, 2], 10)] == [[0], [1, 2]]


@pytest.mark.parametrize("budget", [64, 700, 5000])
def test_every_row_once_and_within_budget(budget):
    lengths = np.random.default_rng(0).integers(0, 400, 777)
    batches = token_budget_batches(lengths, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(777))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget


def padded_share(lengths, batches) -> float:
    """Padded tokens per real token."""
    return sum(len(b) * lengths[b].max() for b in batches) / lengths.sum()


@pytest.mark.parametrize("rows", [512, 2048, 20_000])
def test_padding_of_realistic_lengths_is_under_five_per_cent(rows):
    lengths = np.random.default_rng(1).lognormal(4.3, 0.7, rows).astype(int).clip(15, 512)
    assert padded_share(lengths, token_budget_batches(lengths, 2048)) <= 1.05
    unsorted = np.array_split(np.arange(rows), rows // 32)
    assert padded_share(lengths, unsorted) > 2


def test_pad_both_sides_literally():
    ids, mask = pad([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad([[5, 6, 7], [8]], 0, "left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == np.int64 and pad([], 0)[0].shape == (0, 0)


def test_results_come_back_in_the_rows_order():
    lengths = [5, 1, 9, 9, 2]
    assert map_batches(lambda rows: [int(r) * 10 for r in rows], lengths, 10) == [0, 10, 20, 30, 40]
    assert map_batches(lambda rows: [], [], 10) == []


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
])
def test_halves_on_out_of_memory_and_keeps_to_it(error):
    sizes, budgets = [], []

    def fn(rows):
        sizes.append(len(rows))
        if len(rows) > 3:
            raise error
        return [int(r) for r in rows]

    assert map_batches(fn, [10] * 40, 160, on_halved=budgets.append) == list(range(40))
    assert budgets == [80, 40, 20], "what a later call may start with"
    assert sizes[:3] == [16, 8, 4] and max(sizes[3:]) == 2  # nothing large is tried again


def test_row_that_does_not_fit_alone_is_failed_and_others_go_on():
    def fn(rows):
        if 2 in rows:
            raise MemoryError("needs 9 GiB")
        return [int(r) for r in rows]

    results = map_batches(fn, [5, 5, 50, 5], 100)
    assert results[:2] == [0, 1] and results[3] == 3
    assert results[2] == Failed("out of memory on one row of 50 tokens: needs 9 GiB")


def test_other_errors_are_raised():
    def fn(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        map_batches(fn, [1, 1], 10)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_on_batch_sees_each_row_once_even_if_stopped():
    stored = {}

    def keep(rows, done):
        stored.update(zip(rows, done, strict=True))

    def fn(rows):
        if len(stored) >= 4:
            raise KeyboardInterrupt
        return [int(r) for r in rows]

    with pytest.raises(KeyboardInterrupt):
        map_batches(fn, [10] * 9, 20, on_batch=keep)
    assert stored == {0: 0, 1: 1, 2: 2, 3: 3}


def test_progress_counts_tokens(capsys):
    map_batches(lambda rows: list(rows), [700, 300], 1000, True, "loss")
    assert "loss: 100%" in capsys.readouterr().err
