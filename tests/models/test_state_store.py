"""Arrays on disk: exact, shared, bounded, and never silently wrong."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from instructmining_core.models import state_store
from instructmining_core.models.state_store import StateStore


def arrays(numbers, rows=4, width=3):
    rng = np.random.default_rng(0)
    return {b"%d" % n: (rng.normal(size=(rows, width)) + n).astype(np.float32) for n in numbers}


def test_what_is_written_is_read(tmp_path):
    store, kept = StateStore(tmp_path, 3, np.float32), arrays(range(5))
    kept[b"empty"] = np.empty((0, 3), np.float32)
    store.write(kept)
    again = StateStore(tmp_path, 3, np.float32)
    assert again.missing([b"0", b"9", b"empty", b"9"]) == [b"9"]
    for digest, found in zip(kept, again.read(list(kept)), strict=True):
        np.testing.assert_array_equal(found, kept[digest])
    with pytest.raises(KeyError, match="fill it anew"):
        again.read([b"0", b"9"])


def test_what_grows_later_is_seen(tmp_path):
    reader = StateStore(tmp_path, 3, np.float32)
    for number in range(3):
        StateStore(tmp_path, 3, np.float32).write(arrays([number]))
        assert reader.missing([b"%d" % number]) == []


def test_the_oldest_leaves_when_the_budget_is_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(state_store, "SEGMENT", 48)  # one array of 4 x 3 float32
    monkeypatch.setattr(state_store, "BUDGET", 100)
    store = StateStore(tmp_path, 3, np.float32)
    for number in range(5):
        store.write(arrays([number]))
    assert store.bytes() <= 100
    names = [b"%d" % n for n in range(5)]
    assert store.missing(names) == names[:3]
    np.testing.assert_array_equal(store.read([b"4"])[0], arrays([4])[b"4"])


def test_a_cut_or_rotten_segment_counts_as_missing(tmp_path):
    store = StateStore(tmp_path, 3, np.float32)
    store.write(arrays(range(3)))
    path = tmp_path / "0.bin"
    data = bytearray(path.read_bytes())
    data[50] ^= 1  # inside the second array
    path.write_bytes(data[:-4])
    assert StateStore(tmp_path, 3, np.float32).missing([b"0", b"1", b"2"]) == [b"1", b"2"]
    store = StateStore(tmp_path, 3, np.float32)
    store.write({name: array for name, array in arrays(range(3)).items() if name != b"0"})
    assert store.missing([b"0", b"1", b"2"]) == []
    np.testing.assert_array_equal(store.read([b"2"])[0], arrays(range(3))[b"2"])


def test_two_writers_at_once(tmp_path):
    code = ("import sys, numpy as np; from instructmining_core.models.state_store import "
            "StateStore\nstore = StateStore(sys.argv[1], 3, np.float32)\n"
            "for n in range(40): store.write({b'%s %d' % (sys.argv[2].encode(), n): "
            "np.full((2, 3), n, np.float32)})")
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), who])
               for who in ("a", "b")]  # fmt: skip
    assert [writer.wait(60) for writer in writers] == [0, 0]
    store = StateStore(tmp_path, 3, np.float32)
    names = [b"%s %d" % (who, n) for who in (b"a", b"b") for n in range(40)]
    assert store.missing(names) == []
    assert [found[0, 0] for found in store.read(names)] == [*range(40), *range(40)]
