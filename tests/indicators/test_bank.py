"""The bank: what is known is not asked again, a kill leaves nothing half, two can write at once."""

from __future__ import annotations

import json
import multiprocessing
import time

import numpy as np
import pytest

from instructmining_core.indicators.bank import BankError, key_hash, open_shelf

KEY = {"indicator": "ppl", "version": "1", "model": "m", "revision": "r", "dtype": "float32"}


def fill(shelf, names, start=0.0):
    values = np.arange(len(names), dtype=float)[:, None] + start
    shelf.add(names, values, [("",)] * len(names))


def test_rows_come_back_from_disk_with_nan_and_reason(tmp_path):
    shelf = open_shelf(tmp_path, KEY, ["ppl"])
    shelf.add(["a", "b"], np.array([[1.5], [np.nan]]), [("",), ("empty response",)])
    again = open_shelf(tmp_path, KEY, ["ppl"])
    values, reasons = again.get(["b", "a", "a"])
    assert np.isnan(values[0, 0]) and values[1:, 0].tolist() == [1.5, 1.5]
    assert reasons == [("empty response",), ("",), ("",)]
    assert again.missing(["a", "c", "b"]) == [1]
    with pytest.raises(KeyError):
        again.get(["c"])
    assert json.loads((again.folder / "key.json").read_text()) == KEY


@pytest.mark.parametrize("field, value", [
    ("version", "2"), ("revision", "s"), ("dtype", "bfloat16"), ("indicator", "ifd"),
    ("reference", {"hash": "h", "size": 3}), ("model", "n"),
])
def test_every_part_of_the_key_counts(tmp_path, field, value):
    fill(open_shelf(tmp_path, KEY, ["ppl"]), ["a"])
    assert open_shelf(tmp_path, {**KEY, field: value}, ["ppl"]).missing(["a"]) == [0]


def test_weights_known_by_hash_are_known_in_any_folder():
    here = {**KEY, "model": "/here", "revision": "sha256:1"}
    assert key_hash(here) == key_hash({**here, "model": "/there"})
    assert key_hash(KEY) != key_hash({**KEY, "model": "n"})


def test_half_written_parts_are_not_seen_and_broken_ones_are_named(tmp_path):
    shelf = open_shelf(tmp_path, KEY, ["ppl"])
    fill(shelf, ["a"])
    (shelf.folder / ".part-1-killed.parquet").write_bytes(b"PAR1 half")
    assert open_shelf(tmp_path, KEY, ["ppl"]).missing(["a"]) == []
    (shelf.folder / "part-2-broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(BankError, match="part-2-broken.parquet.*delete that file"):
        open_shelf(tmp_path, KEY, ["ppl"])


def test_another_writer_is_seen_after_refresh(tmp_path):
    ours, theirs = (open_shelf(tmp_path, KEY, ["ppl"]) for _ in range(2))
    fill(theirs, ["x"])
    assert ours.missing(["x"]) == [0]
    ours.refresh()
    assert ours.missing(["x"]) == []


def write_many(folder, worker):
    shelf = open_shelf(folder, KEY, ["ppl"])
    for block in range(10):
        fill(shelf, [f"{worker}-{block}-{i}" for i in range(20)], start=worker)


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(tmp_path, w)) for w in (100, 200)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        open_shelf(tmp_path, KEY, ["ppl"])  # reading meanwhile finds whole parts only
        time.sleep(0.02)
    assert [worker.exitcode for worker in workers] == [0, 0]
    shelf = open_shelf(tmp_path, KEY, ["ppl"])
    assert len(shelf.values) == 400 and shelf.values["200-9-3"][0] == (203.0,)


def test_without_a_folder_nothing_is_kept():
    shelf = open_shelf(None, KEY, ["ppl"])
    fill(shelf, ["a"])
    assert shelf.missing(["a"]) == []
    shelf.forget()
    assert shelf.missing(["a"]) == [0]
