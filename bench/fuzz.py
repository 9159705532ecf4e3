"""Many odd files at the readers: `python -m bench.fuzz --inputs 1000000` prints one JSON line.

Half of them are records of odd structure (any field that is read, with any kind of value), half
the bytes of sound files of every format with a few of them changed. Each is read or refused in
words; any other exception ends the run with the input that raised it.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import random
import resource
import time
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from instructmining_core.config import InstructMiningError
from instructmining_core.data import fields
from instructmining_core.data.formats import FORMS
from instructmining_core.data.records import iter_records

NAMES = sorted({*fields.NAMES, *fields.MEDIA, *fields.NOT_TO_LEARN, *fields.ROLE_KEYS,
                *fields.CONTENT_KEYS, *fields.CALLS, "rejected", "replies", "rank"})  # fmt: skip
TEXTS = ["", "a", "Hi there", "None", "[1, 2]", '[{"role": "user", "content": "x"}]', "\ud800",
         "### Human: a### Assistant: b", "[INST] q [/INST] a", "<|im_start|>user\nq", "user",
         "assistant", "{'a': 1}", "[" * 99, "USER: q ASSISTANT: a</s>x"]  # fmt: skip
ROWS = [form.example for form in FORMS]
BYTES = [b'"', b"\n", b",", b"[", b"{", b"\r", b"\0", b"\xef\xbb\xbf", b"\xff", b"\\u"]


def sound_files() -> dict[str, bytes]:
    """A small sound file of every format by its name."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "n": [1, 2]})
    parquet, arrow, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    with pa.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table)
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("x.jsonl", lines)
    return {
        "x.jsonl": lines, "x.json": json.dumps(ROWS).encode(), "wide.jsonl": lines.decode().encode(
            "utf-16"), "x.csv": b'prompt,completion\n"a ""b""\nc",d\n', "x.tsv": b"a\tb\n1\t2\n",
        "x.parquet": parquet.getvalue(), "x.arrow": arrow.getvalue(), "x.zip": archive.getvalue(),
        "x.gz": gzip.compress(lines), "x.xz": lzma.compress(lines), "x.bz2": bz2.compress(lines),
        "x.zst": zstandard.compress(lines), "wrapped.json": json.dumps({"data": ROWS}).encode(),
    }  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> object:
    """Any value of JSON, mostly such as records hold."""
    kind = rng.random()
    if kind < 0.5 or depth > 3:
        return rng.choice(TEXTS)
    if kind < 0.65:
        return rng.choice([None, True, False, 0, 1, -1.5, float("nan"), 10**30, 17.0])
    if kind < 0.8:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice(NAMES): value(rng, depth + 1) for _ in range(rng.randint(0, 4))}


def changed(rng: random.Random, content: bytes) -> bytes:
    """The bytes with up to six changes."""
    found = bytearray(content)
    for _ in range(rng.randint(0, 6)):
        at = rng.randrange(len(found) + 1)
        if rng.random() < 0.5:
            found[at : at + rng.randint(0, 9)] = rng.choice(BYTES)
        elif at < len(found):
            found[at] = rng.randrange(256)
    return bytes(found)


def one_input(rng: random.Random, files: dict[str, bytes]) -> tuple[str, bytes]:
    """A name and its bytes."""
    if rng.random() < 0.5:
        rows = [{rng.choice(NAMES): value(rng) for _ in range(rng.randint(0, 5))} for _ in "ab"]
        return "x.json", json.dumps(rows if rng.random() < 0.5 else rows[0]).encode()
    name = rng.choice(list(files))
    return name, changed(rng, files[name])


def run(inputs: int, seed: int) -> dict[str, float]:
    """Read so many inputs; how many were read, how many refused, and what it took."""
    rng, files, refused, slowest = random.Random(seed), sound_files(), 0, 0.0
    start = time.perf_counter()
    for _ in range(inputs):
        name, content = one_input(rng, files)
        began = time.perf_counter()
        try:
            for _ in iter_records(name, on_error="keep", stdin=io.BytesIO(content)):
                pass
        except InstructMiningError:
            refused += 1
        except BaseException:
            print(json.dumps({"name": name, "content": content.hex()}))
            raise
        slowest = max(slowest, time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"inputs": inputs, "seed": seed, "read": inputs - refused, "files refused": refused,
            "seconds": round(time.perf_counter() - start, 1), "slowest input, s": round(slowest, 3),
            "peak memory, GiB": round(peak, 2)}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(json.dumps(run(asked.inputs, asked.seed)))
