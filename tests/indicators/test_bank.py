"""The score cache: what is known is not asked again, a kill leaves nothing half, two can write."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from instructmining_core.config import InstructMiningError
from instructmining_core.indicators.bank import FILE, ScoreCache, key_hash

KEY = {"indicator": "ppl", "version": "1", "model": "m", "revision": "r", "dtype": "float32"}


def numbered(names, start=0.0):
    return {name: ((start + i,), ("",)) for i, name in enumerate(names)}


def test_rows_come_back_exactly_with_nan_and_reasons(tmp_path):
    scores = {
        "a": ((0.1 + 0.2, -0.0, 5e-324), ("", "", "")),
        "b": ((math.nan, math.inf, 1.5), ("empty response", "", "turn 2: é \u2028 \"cut\"")),
    }
    ScoreCache(tmp_path).add(KEY, scores)
    found = ScoreCache(tmp_path).get(KEY, ["b", "a", "a", "c"])
    assert found["a"] == scores["a"] and math.copysign(1, found["a"][0][1]) == -1
    assert math.isnan(found["b"][0][0]) and found["b"][0][1:] == scores["b"][0][1:]
    assert found["b"][1] == scores["b"][1] and set(found) == {"a", "b"}
    kept = sqlite3.connect(tmp_path / FILE).execute("SELECT key FROM keys").fetchone()[0]
    assert json.loads(kept) == KEY


def test_a_row_that_is_added_again_is_replaced(tmp_path):
    cache = ScoreCache(tmp_path)
    cache.add(KEY, numbered(["a", "b"]))
    cache.add(KEY, numbered(["b"], start=7.0))
    assert cache.get(KEY, ["a", "b"]) == {"a": ((0.0,), ("",)), "b": ((7.0,), ("",))}


@pytest.mark.parametrize("field, value", [
    ("version", "2"), ("revision", "s"), ("dtype", "bfloat16"), ("indicator", "ifd"),
    ("reference", {"hash": "h", "size": 3}), ("model", "n"),
])
def test_every_part_of_the_key_counts(tmp_path, field, value):
    cache = ScoreCache(tmp_path)
    cache.add(KEY, numbered(["a"]))
    assert not cache.get({**KEY, field: value}, ["a"])


def test_weights_known_by_hash_are_known_in_any_folder():
    here = {**KEY, "model": "/here", "revision": "sha256:1"}
    assert key_hash(here) == key_hash({**here, "model": "/there"})
    assert key_hash(KEY) != key_hash({**KEY, "model": "n"})
    assert key_hash(KEY) == "fda4700a9f81e1a8", "as in the bank of Parquet parts"


def test_another_writer_is_seen_at_once(tmp_path):
    ours, theirs = ScoreCache(tmp_path), ScoreCache(tmp_path)
    theirs.add(KEY, numbered(["x"]))
    assert set(ours.get(KEY, ["x", "y"])) == {"x"}


def write_many(folder, worker):
    cache = ScoreCache(folder)
    for block in range(30):
        cache.add(KEY, numbered([f"{worker}-{block}-{i}" for i in range(20)], start=worker))


def test_two_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(tmp_path, w)) for w in (100, 200)]
    for worker in workers:
        worker.start()
    names = [f"{w}-{b}-{i}" for w in (100, 200) for b in range(30) for i in range(20)]
    while any(worker.is_alive() for worker in workers):
        found = ScoreCache(tmp_path).get(KEY, names)
        assert len(found) % 20 == 0, "whole blocks only"
        time.sleep(0.02)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = ScoreCache(tmp_path).get(KEY, names)
    assert len(found) == 1200 and found["200-29-3"] == ((203.0,), ("",))


WRITER = """
import sys
from instructmining_core.indicators.bank import ScoreCache
cache = ScoreCache(sys.argv[1])
for block in range(10_000):
    rows = {f"{block}-{i}": ((block + i / 1000,), ("",)) for i in range(500)}
    cache.add({"indicator": "ppl"}, rows)
    print(block, flush=True)
"""


def test_a_writer_that_is_killed_loses_at_most_its_block(tmp_path):
    for wait in (0.0, 0.003):
        folder = tmp_path / str(wait)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)],
                                  stdout=subprocess.PIPE, text=True)
        told = [int(writer.stdout.readline()) for _ in range(4)]
        time.sleep(wait)
        os.kill(writer.pid, signal.SIGKILL)
        told += [int(line) for line in writer.stdout if line.strip()]
        writer.wait()
        cache, key = ScoreCache(folder), {"indicator": "ppl"}
        names = {block: [f"{block}-{i}" for i in range(500)] for block in range(told[-1] + 3)}
        found = {block: cache.get(key, rows) for block, rows in names.items()}
        assert all(len(rows) in (0, 500) for rows in found.values())
        assert all(found[block][f"{block}-7"] == ((block + 0.007,), ("",)) for block in told)
        cache.add(key, numbered(["after"]))


def test_files_of_others_are_refused(tmp_path):
    (tmp_path / FILE).write_bytes(b"PAR1 is no SQLite file" * 100)
    with pytest.raises(InstructMiningError, match="scores.sqlite is damaged.*delete it"):
        ScoreCache(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    with sqlite3.connect(other / FILE) as file:
        file.execute("CREATE TABLE scores (x)")
    with pytest.raises(InstructMiningError, match="no score cache of this version"):
        ScoreCache(other)


def test_a_damaged_byte_is_an_error_or_an_unknown_row_and_never_another_value(tmp_path):
    names = [f"{i:032x}" for i in range(200)]
    scores = {name: ((i / 7, math.pi), ("", f"note {i}")) for i, name in enumerate(names)}
    ScoreCache(tmp_path).add(KEY, scores)
    whole = (tmp_path / FILE).read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (tmp_path / FILE).write_bytes(damaged)
        try:
            found = ScoreCache(tmp_path).get(KEY, names)
        except InstructMiningError as error:
            refused += FILE in str(error)
            continue
        assert all(scores[name] == row for name, row in found.items())
    assert refused > 100
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InstructMiningError, match="delete it to score anew"):
        ScoreCache(tmp_path).get(KEY, names)


def test_a_locked_or_unwritable_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("instructmining_core.indicators.bank.WAIT_SECONDS", 0.05)
    cache = ScoreCache(tmp_path)
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InstructMiningError, match="scores.sqlite: database is locked"):
        cache.add(KEY, numbered(["a"]))
    other.execute("ROLLBACK")
    cache.add(KEY, numbered(["a"]))


def test_numbers_that_became_text_are_damage(tmp_path):
    """What the fuzzer found: SQLite keeps any type in any column."""
    ScoreCache(tmp_path).add(KEY, {"a": ((1.0,), ("",))})
    with sqlite3.connect(tmp_path / FILE) as file:
        file.execute("UPDATE scores SET data = 'text'")
    with pytest.raises(InstructMiningError, match="damaged .the checksum of row a is wrong"):
        ScoreCache(tmp_path).get(KEY, ["a"])
