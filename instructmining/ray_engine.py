"""Beyond one machine: scoring and sweeps on a Ray cluster (extra `ray`), one code on all nodes.

A `Crew` keeps one actor for each core or GPU of the cluster; an actor opens its models once and
does one job after another. Where an actor or its node is lost, its job goes to another. What was
done is kept by the process that began (score cache, ledger), so nodes share no folder but that of
the models, and a driver that is started again goes on where it was.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from instructmining_core.config import InstructMiningError
from instructmining_core.indicators.bank import ScoreCache, Scores, key_hash
from instructmining_core.indicators.scorer import ParsedTable, Scorer, job_bar, read_rows

if TYPE_CHECKING:
    from instructmining_core.finetuning.ledger import Ledger
    from instructmining_core.finetuning.run_spec import Record, RunSpec
    from instructmining_core.models.causal_lm import LM

BLOCK_ROWS = 1000  # of one scoring job: what the loss of a node may cost
TRIES = 3  # actors that a job may lose before it counts as what kills them
LOOK = 1.0  # seconds between looks at the cluster while a job is waited for
# Of the environment. No tokens: Ray shows what it hands on.
_HANDED_ON = ("INSTRUCTMINING_HOME", "HF_HOME", "HF_HUB_OFFLINE", "PYTHONPATH")


def engine() -> str:
    """"local" or "ray": what a study computes on (`make study ENGINE=ray`)."""
    return os.environ.get("INSTRUCTMINING_ENGINE", "local")


def connected() -> Any:
    """Ray, connected to RAY_ADDRESS, to this machine's cluster, or to one begun for the process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise InstructMiningError(
            "Ray is not installed; run: pip install 'instructmining[ray]'"
        ) from None
    if not ray.is_initialized():
        known = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
        known |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            ray.init(runtime_env={"env_vars": known}, log_to_driver=False, logging_level="error")
        except ConnectionError as error:
            raise InstructMiningError(
                f"no Ray cluster answers ({error}); `ray start --head` begins one, RAY_ADDRESS "
                "names it"
            ) from None
    return ray


class Crew:
    """Actors on the cluster and the jobs that they do.

    kind : class whose `open()` gets an actor ready and whose `do(job)` does a job
    what : the only argument of `kind`; it lies once on each node
    gpu : whether an actor takes a GPU, where the cluster has any, in place of a core
    """

    def __init__(self, kind: type, what: Any, *, gpu: bool) -> None:
        self.ray = connected()
        self.unit = "GPU" if gpu and self.ray.cluster_resources().get("GPU") else "CPU"
        needs = {"num_gpus": 1} if self.unit == "GPU" else {"num_cpus": 1}
        self.kind, self.what = self.ray.remote(**needs)(kind), self.ray.put(what)
        self.told: Any = None  # what the first `open()` returned
        self._unopened = 0  # actors in a row that were lost before they were open
        self._jobs: deque[tuple[Hashable, Any, int]] = deque()
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, tuple | None]] = {}  # ref -> actor, job; None: it opens

    def slots(self) -> int:
        """Cores or GPUs of the nodes that are there now."""
        return max(1, int(self.ray.cluster_resources().get(self.unit, 0)))

    def open(self) -> Any:
        """Wait for the first actor; what its `open()` returns."""
        while self.told is None:
            self._open_actors(1)
            self._look(LOOK)
        return self.told

    def give(self, name: Hashable, job: Any) -> None:
        """Put a job at the end of the queue."""
        self._jobs.append((name, job, 0))

    def waiting(self) -> int:
        """Jobs that are not finished."""
        return len(self._jobs) + sum(job is not None for _, job in self._busy.values())

    def finished(self, *, wait: bool) -> list[tuple[Hashable, Any]]:
        """(name, result) of jobs that ended since the last call; None for what kills its actors.

        wait : until there is one, where any is open. Raises what a job raised.
        """
        found: list[tuple[Hashable, Any]] = []
        while self.waiting():
            self._open_actors(min(self.slots(), self.waiting()))
            while self._idle and self._jobs:
                actor, job = self._idle.pop(), self._jobs.popleft()
                self._busy[actor.do.remote(job[1])] = actor, job
            found += self._look(LOOK if wait else 0)
            if found or not wait:
                break
        return found

    def stop(self) -> None:
        """End the actors; what they are at is lost."""
        for actor in (*self._idle, *(actor for actor, _ in self._busy.values())):
            self.ray.kill(actor)
        self._jobs.clear(), self._idle.clear(), self._busy.clear()

    def _open_actors(self, wanted: int) -> None:
        """A job is given to none but an open actor: one may wait long for a node that is lost."""
        for _ in range(wanted - len(self._idle) - len(self._busy)):
            actor = self.kind.remote(self.what)
            self._busy[actor.open.remote()] = actor, None

    def _look(self, seconds: float) -> list[tuple[Hashable, Any]]:
        """Sort out what ended within so many seconds: open actors, results, lost jobs."""
        found, watched = [], list(self._busy)
        self.ray.wait(watched, timeout=seconds)
        ended, _ = self.ray.wait(watched, num_returns=len(watched), timeout=0)
        for ref in ended:
            lost, result = self._outcome(ref)
            actor, job = self._busy.pop(ref)
            if not lost:
                self._idle.append(actor)
            if job is None:
                self._unopened = self._unopened + 1 if lost else 0
                self.told = self.told if lost else result
            elif lost and job[2] + 1 < TRIES:
                self.ray.kill(actor)
                self._jobs.appendleft((*job[:2], job[2] + 1))
            else:
                found.append((job[0], result))
            if self._unopened > TRIES:
                why = str(lost).strip().rpartition("\n")[2]
                raise InstructMiningError(
                    f"the cluster's workers end before they are at work: {why}"
                )
        return found

    def _outcome(self, ref: Any) -> tuple[Exception | None, Any]:
        """How an actor was lost, or None and what it returned. Raises what it raised."""
        from ray.exceptions import RayError, RayTaskError

        try:
            return None, self.ray.get(ref)
        except RayTaskError as error:
            raise (error.cause or error) from None
        except RayError as error:
            return error, None


# Scoring: blocks of rows are the jobs; this process reads, keeps the cache and writes the table.


class _Known:
    """What the score cache knows of a block's rows, in its place; `new` is to be added to it."""

    def __init__(self, known: Mapping[str, dict[str, Scores]]) -> None:
        self.known, self.new = known, []

    def get(self, key: Mapping, row_hashes: Sequence[str]) -> dict[str, Scores]:
        return dict(self.known.get(key_hash(key), {}))

    def add(self, key: Mapping, scores: Mapping[str, Scores]) -> None:
        self.new.append((dict(key), dict(scores)))


class _ScoringActor:
    """A `Scorer` on a node."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.scorer = Scorer(**options)

    def open(self) -> list[dict]:
        """Keys of what goes through the cache: with the dtype and so on that this node has."""
        return self.scorer.keys()

    def do(self, job: tuple[ParsedTable, dict]) -> tuple[pd.DataFrame, list]:
        rows, known = job
        self.scorer.cache = _Known(known)
        return self.scorer.score(rows), self.scorer.cache.new


def scored(
    scorer: Scorer, tables: Iterable[pd.DataFrame]
) -> Iterator[tuple[ParsedTable, pd.DataFrame]]:
    """`scorer.score` of each record table in turn, done on the cluster, two blocks a slot ahead.

    Neighbours are exact: each block meets the whole reference, which lies once on every node.
    """
    about = scorer.models
    options = {
        "models": about.refs, "indicators": [one.name for one in scorer.indicators],
        "reference": scorer.reference, "standins": about.standins,
        "reward_form": about.reward_form, "template": about.template,
    }  # fmt: skip
    crew = Crew(_ScoringActor, options, gpu=any(one.role for one in scorer.indicators))
    try:
        keys = crew.open()
        cache = ScoreCache(scorer.bank) if keys and scorer.bank is not None else None
        blocks = enumerate(map(read_rows, tables))
        begun: dict[int, ParsedTable] = {}
        done: dict[int, pd.DataFrame] = {}
        more = True
        while more or begun:
            while more and len(begun) < 2 * crew.slots():
                number, rows = next(blocks, (0, None))
                if more := rows is not None:
                    begun[number] = rows
                    crew.give(number, _scoring_job(scorer, rows, keys, cache))
            for number, result in crew.finished(wait=True):
                if result is None:
                    raise InstructMiningError(
                        f"{TRIES} workers were lost at the same rows; with too little memory for "
                        "them, give --chunk-rows a smaller number"
                    )
                done[number], new = result
                for key, scores in new if cache is not None else ():
                    cache.add(key, scores)
            while begun and next(iter(begun)) in done:
                first = next(iter(begun))
                yield begun.pop(first), done.pop(first)
    finally:
        crew.stop()


def _scoring_job(
    scorer: Scorer, rows: ParsedTable, keys: Sequence[dict], cache: ScoreCache | None
) -> tuple[ParsedTable, dict]:
    """A block without its raw texts, which the checked conversations hold, and what is known."""
    table = rows.table.drop(columns="messages")
    if "file" in table:
        table["file_sha256"] = [scorer.file_hash(name) for name in table["file"]]
    names = [rows.row_hashes[i] for i in rows.readable]
    known = {key_hash(key): cache.get(key, names) for key in keys} if cache is not None else {}
    return replace(rows, table=table), known


class RayScorer:
    """A scorer whose tables are scored on the cluster, by blocks."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def score(self, table: pd.DataFrame, *, progress: bool) -> pd.DataFrame:
        """As `Scorer.score`."""
        if "row" not in table:
            table = table.assign(row=range(len(table)))
        blocks = (table.iloc[i : i + BLOCK_ROWS].reset_index(drop=True)
                  for i in range(0, len(table), BLOCK_ROWS))  # fmt: skip
        frames = []
        with job_bar(len(table), show=progress) as bar:
            for _, frame in scored(self.scorer, blocks):
                frames.append(frame)
                bar.update(len(frame))
        whole = pd.concat(frames, ignore_index=True)
        whole.attrs = frames[0].attrs
        return whole


# Sweeps: groups of runs are the jobs; this process holds their leases and writes the records.


class _Finetuner:
    """A base model on a node, with a sweep's rows."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def open(self) -> bool:
        import torch

        from instructmining_core.config import ModelRef
        from instructmining_core.finetuning.workers import read_job
        from instructmining_core.models.causal_lm import load_lm
        from instructmining_core.models.hub import pick_device

        if (device := pick_device()) == "cpu":
            torch.set_num_threads(1)  # one core is what the actor has
        self.lm = load_lm(ModelRef(**self.job["model"]), device)
        self.rows, self.evals = read_job(self.job, self.lm)
        return True

    def do(self, group: Sequence[tuple[dict, dict]]) -> list[dict]:
        from instructmining_core.finetuning.run_spec import RunSpec
        from instructmining_core.finetuning.workers import attempt

        specs = [RunSpec.from_content(content, label) for content, label in group]
        by_epoch = self.job["options"]["by_epoch"]
        return list(attempt(specs, self.lm, self.rows, self.evals, by_epoch))


class RaySweep:
    """`run_sweep`'s cluster by Ray: the ledger is this process's alone, a record written once."""

    def __init__(self) -> None:
        self.crew: Crew | None = None

    def slots(self) -> int:
        """Cores, or GPUs where there are any, of the cluster."""
        found = connected().cluster_resources()
        return max(1, int(found.get("GPU") or found.get("CPU", 0)))

    def begin(self, job: Record, lm: LM, ledger: Ledger) -> None:
        """Take a job; actors begin with the first group."""
        self.lm, self.ledger, self.tried = lm, ledger, job["options"]["tried"]
        self.mine: dict[str, list[RunSpec]] = {}
        self.crew = Crew(_Finetuner, job | {"groups": []}, gpu=True)

    def do(self, group: Sequence[RunSpec]) -> int:
        """Give a group to the cluster, and write what it has finished; waits where it is full."""
        from instructmining_core.finetuning.run import failure
        from instructmining_core.finetuning.workers import put, take

        mine = take(group, self.ledger, self.tried)
        if mine:
            self.mine[mine[0].run_id] = mine
            self.crew.give(mine[0].run_id, [(one.content(), one.label) for one in mine])
        full, moved = self.crew.waiting() > self.crew.slots(), len(mine)
        for name, records in self.crew.finished(wait=full):
            specs = self.mine.pop(name)
            if records is None:
                lost = RuntimeError(f"{TRIES} workers were lost at it")
                records = [failure(one, self.lm, lost) for one in specs]
            moved += put(specs, records, self.ledger)
        return moved

    def start(self) -> None:
        """Actors start with their jobs."""

    def fallen(self) -> list[str]:
        """Nothing to tell: what a lost worker was at is done by another."""
        return []

    def stop(self) -> None:
        """End the actors and give the leases of unfinished runs back."""
        if self.crew is not None:
            self.crew.stop()
            for one in [spec for specs in self.mine.values() for spec in specs]:
                self.ledger.release(one.run_id)
