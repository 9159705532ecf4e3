"""Many odd inputs at all that is read from outside: `python -m bench.fuzz --inputs 1000000`.

Records of odd structure (any field that is read, with any kind of value), the bytes of sound files
of every format with some of them changed, rule cards, profiles, and the score cache's file. Each is
read or refused in words; any other exception, a hang or too much memory is a finding, printed with
the input that raised it, and the exit status is 1. Inputs of a chunk follow from seed and number
alone, so that a finding can be had again. `--table FILE.csv` keeps the figures.

Workers are forked once and read in their own process; each stops an input that takes longer than
`--seconds` and has a limit on memory. One that no longer answers is ended with its chunk.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import copy
import gzip
import io
import json
import lzma
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard
from tqdm import tqdm

from instructmining.profile import PRESETS, load_profile
from instructmining_core.config import InstructMiningError
from instructmining_core.data import fields, formats
from instructmining_core.data.formats import FORMS
from instructmining_core.data.records import iter_records, iter_rows, row_hash
from instructmining_core.indicators.bank import FILE, ScoreCache
from instructmining_core.regression.rule_card import RULES, load_rule

CHUNK = 1000  # inputs that a worker is given at a time
BATCH = 50  # records of odd structure in one file
HARD_GIB = 2.0  # above which a worker gets no memory; the limit of the figures is 1 GiB
SHARES = {"records": 0.5, "bytes": 0.44, "rule card": 0.03, "profile": 0.01, "bank": 0.02}
NAMES = sorted({*formats.NAMES, *fields.MEDIA, *fields.NOT_TO_LEARN, *fields.ROLE_KEYS,
                *fields.CONTENT_KEYS, *fields.CALLS, *formats.THOUGHTS, "rejected", "replies",
                "rank", "parts", "type"})  # fmt: skip
TEXTS = ["", "a", "Hi there", "None", "[1, 2]", '[{"role": "user", "content": "x"}]', "\ud800",
         "### Human: a### Assistant: b", "[INST] q [/INST] a", "<|im_start|>user\nq", "user",
         "assistant", "{'a': 1}", "[" * 99, "USER: q ASSISTANT: a</s>x", "false", "0",
         "\n\nHuman: a\n\nAssistant: b", "é" * 300]  # fmt: skip
ROWS = [form.example for form in FORMS]
BYTES = [b'"', b"\n", b",", b"[", b"{", b"\r", b"\0", b"\xef\xbb\xbf", b"\xff", b"\\u", b"[" * 5000,
         b"9" * 5000, b"\\ud800", b"\t", b";"]  # fmt: skip
VALUES = [None, True, False, 0, 1, -1.5, 2**70, 1e308, float("nan"), "", "1e999", "../x", "b", [],
          {}, [[]], {"a": None}, "standin:base", "x" * 999]  # fmt: skip

BANKED = [f"{i:032x}" for i in range(40)]  # row hashes


class Hang(BaseException):
    """An input that took longer than the limit."""


def sound_files() -> dict[str, bytes]:
    """A small sound file of every format by its name."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "n": [1, 2],
                      "messages": [[{"role": "user", "content": "q"}], None]})  # fmt: skip
    parquet, arrow, archive, stream = (io.BytesIO() for _ in range(4))
    pq.write_table(table, parquet)
    for sink, kind in ((arrow, pa.ipc.new_file), (stream, pa.ipc.new_stream)):
        with kind(sink, table.schema) as writer:
            writer.write_table(table)
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("x.jsonl", lines)
    pairs = pd.DataFrame({"prompt": ['a "b"\nc', "d"], "completion": ["e, f", "None"]})
    return {
        "x.jsonl": lines, "x.json": json.dumps(ROWS).encode(), "pretty.json": json.dumps(
            ROWS, indent=1).encode(), "wrapped.json": json.dumps({"data": ROWS}).encode(),
        "columns.json": pairs.to_json().encode(), "wide.jsonl": lines.decode().encode("utf-16"),
        "x.csv": pairs.to_csv(index=False).encode(), "semicolons.csv": pairs.to_csv(
            index=False, sep=";").encode("cp1252"), "x.tsv": pairs.to_csv(
            index=False, sep="\t").encode(), "x.parquet": parquet.getvalue(),
        "x.arrow": arrow.getvalue(), "stream.arrow": stream.getvalue(), "x.zip": archive.getvalue(),
        "x.gz": gzip.compress(lines), "x.xz": lzma.compress(lines), "x.bz2": bz2.compress(lines),
        "x.zst": zstandard.compress(lines),
        "bomb.json.gz": gzip.compress(b"[" + b"[]," * (1 << 22), 9),
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
    """The bytes with up to six changes: others in their place, put in, taken out, or said twice."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at, size = rng.randrange(len(found) + 1), rng.randint(0, 9)
        kind = rng.randrange(6)
        if kind == 0:
            found[at : at + size] = rng.choice(BYTES)
        elif kind == 1 and rng.random() < 0.3:
            del found[at:]
        elif kind == 2:
            found[at:at] = found[rng.randrange(len(found) + 1) :][:200]
        elif at < len(found):
            found[at] = rng.randrange(256)
    return bytes(found)


def altered(rng: random.Random, whole: dict) -> object:
    """A JSON object with a few of its parts taken out or others in their place."""
    whole = copy.deepcopy(whole)
    for _ in range(rng.randint(1, 3)):
        holder = whole
        while holder:
            key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(
                len(holder))  # fmt: skip
            if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.7:
                holder = holder[key]
            elif rng.random() < 0.7:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
                break
            else:
                del holder[key]
                break
    return whole


class Fuzzer:
    """Makes inputs and reads them, in one process; its files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, sound_files()
        self.card = json.loads((RULES / "v3.json").read_text())
        self.preset = yaml.safe_load((PRESETS / "smoke.yaml").read_text())
        bank = ScoreCache(folder)
        with contextlib.closing(bank._file):
            bank.add({"indicator": "x"}, {row: ((0.5,), ("",)) for row in BANKED})
        self.bank = (folder / FILE).read_bytes()
        self.kinds = {
            "records": self.records, "bytes": self.odd_bytes, "rule card": self.rule_card,
            "profile": self.profile, "bank": self.damaged_bank,
        }  # fmt: skip

    def records(self, rng):
        """A file of records of odd structure, as lines or as one list."""
        rows = [{rng.choice(NAMES): value(rng) for _ in range(rng.randint(0, 5))}
                for _ in range(BATCH)]  # fmt: skip
        texts = [json.dumps(row) for row in rows]
        content = ("\n".join(texts) if rng.random() < 0.5 else f"[{','.join(texts)}]").encode()

        def read():
            for table, _ in iter_records("x.json", on_error="keep", stdin=io.BytesIO(content)):
                assert all(bool(talk) == bool(own) for talk, own in
                           zip(table["messages"], table["row_hash"], strict=True))  # fmt: skip

        return content, read

    def odd_bytes(self, rng):
        """A sound file of some format with bytes changed."""
        name = rng.choice(list(self.files))
        if name.startswith("bomb") and rng.random() < 0.999:  # seconds each
            name = "x.gz"
        content = changed(rng, self.files[name])

        def read():
            for _, _, talks in iter_rows(name, stdin=io.BytesIO(content)):
                for talk in talks:
                    row_hash(talk)

        return content, read

    def rule_card(self, rng):
        """A rule card with other parts."""
        content = json.dumps(altered(rng, self.card)).encode()
        return content, self._from_file("card.json", content, load_rule)

    def profile(self, rng):
        """A profile with other parts, or other bytes."""
        whole = altered(rng, self.preset)
        if isinstance(whole, dict) and rng.random() < 0.1:
            whole["extends"] = rng.choice(["profile.yaml", "smoke", "no such", 1])
        content = yaml.safe_dump(whole).encode()
        content = content if rng.random() < 0.7 else changed(rng, content)
        return content, self._from_file("profile.yaml", content, load_profile)

    def damaged_bank(self, rng):
        """The score cache's file with bytes changed."""
        content = changed(rng, self.bank)

        def use(_):
            bank = ScoreCache(self.folder)
            with contextlib.closing(bank._file):
                found = bank.get({"indicator": "x"}, BANKED)
                assert all(scores == ((0.5,), ("",)) for scores in found.values())

        return content, self._from_file(FILE, content, use)

    def _from_file(self, name: str, content: bytes, load: Callable[[str], object]):
        def read():
            path = self.folder / name
            for old in self.folder.glob(f"{FILE}-*"):  # SQLite's journal of another input
                old.unlink()
            path.write_bytes(content)
            load(str(path))

        return read


def chunk(job: tuple[int, int, int, float]) -> list[dict]:
    """The figures of a chunk by kind, and its findings.

    job : seed, number of the chunk, its inputs, seconds for one
    """
    seed, number, inputs, seconds = job
    rng, found, done = random.Random(f"{seed} {number}"), {}, 0
    while done < inputs:
        kind = rng.choices(list(SHARES), [share / (BATCH if name == "records" else 1)
                                          for name, share in SHARES.items()])[0]  # fmt: skip
        content, read = FUZZER.kinds[kind](rng)
        size = BATCH if kind == "records" else 1
        row = found.setdefault(kind, {"kind": kind, "inputs": 0, "refused": 0, "findings": [],
                                      "slowest": 0.0})  # fmt: skip
        start = time.perf_counter()
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                read()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except InstructMiningError:
            row["refused"] += size
        except (Exception, Hang) as error:
            row["findings"].append({"kind": kind, "chunk": number, "error": repr(error)[:300],
                                    "content": content[:20_000].hex()})  # fmt: skip
        row["slowest"] = max(row["slowest"], time.perf_counter() - start)
        row["inputs"] += size
        done += size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [{**row, "peak": peak} for row in found.values()]


def _begin(folder: str) -> None:
    """A worker's limits and its fuzzer."""
    global FUZZER

    def hang(*_):
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    limit = int(HARD_GIB * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    own = Path(folder) / str(os.getpid())
    own.mkdir()
    FUZZER = Fuzzer(own)


def run(inputs: int, seed: int, workers: int, seconds: float) -> pd.DataFrame:
    """Figures by kind; findings are printed as they come.

    columns : inputs, refused, findings, slowest input in seconds, peak memory in GiB
    """
    jobs = [(seed, i, min(CHUNK, inputs - i * CHUNK), seconds) for i in range(-(-inputs // CHUNK))]
    rows, context = [], multiprocessing.get_context("fork")
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as folder, context.Pool(
        workers, _begin, (folder,)
    ) as pool, tqdm(total=inputs, unit=" inputs", mininterval=5) as bar:
        results = pool.imap_unordered(chunk, jobs)
        for _ in jobs:
            try:
                found = results.next(timeout=60 + 30 * seconds)
            except multiprocessing.TimeoutError:  # code that no signal stops, or a worker that died
                print(json.dumps({"error": "a worker no longer answers"}), flush=True)
                rows.append({"kind": "bytes", "inputs": 0, "findings": 1})
                break
            for row in found:
                for one in row["findings"]:
                    print(json.dumps(one), flush=True)
                rows.append({**row, "findings": len(row["findings"])})
                bar.update(row["inputs"])
    table = pd.DataFrame(rows).groupby("kind", sort=False).agg(
        inputs=("inputs", "sum"), refused=("refused", "sum"), findings=("findings", "sum"),
        slowest_s=("slowest", "max"), peak_gib=("peak", "max"),
    )  # fmt: skip
    return table.round(3)


def main(arguments: list[str] | None = None) -> int:
    """Run as told by `--help`; 1 where there was a finding or too much memory was taken."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=20.0, help="for one input")
    parser.add_argument("--table", type=Path, metavar="FILE.csv")
    asked = parser.parse_args(arguments)
    start = time.perf_counter()
    table = run(asked.inputs, asked.seed, asked.workers, asked.seconds)
    taken = time.perf_counter() - start
    print(table.to_string())
    print(f"{table['inputs'].sum():,} inputs by {asked.workers} workers in {taken:,.0f} s")
    if asked.table:
        table.assign(seed=asked.seed, seconds=round(taken)).to_csv(asked.table)
    return int(bool(table["findings"].sum()) or table["peak_gib"].max() > 1)


if __name__ == "__main__":
    sys.exit(main())
