"""lm-eval on a study's models: the base, and models trained again from their records.

    python -m bench.openllm --profile FILE                # the profile's own tasks, against ours
    python -m bench.openllm --profile FILE --leaderboard  # ARC, HellaSwag, MMLU, TruthfulQA

Needs the extra `benchmarks`. Models: of the gate's first pool the first `selected` and `random`
run; before there is a gate, two draws of that pool, trained and recorded now. The adapters are
trained from the records' specifications, so this also asks whether a record can be rebuilt. The
profile's own tasks need no hub and must give the record's numbers; the leaderboard's need it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from instructmining.experiments.choice_tasks import chances, difference
from instructmining.experiments.comparisons import size_pool
from instructmining.study import PlannedRun, Study
from instructmining_core.data.choices import write_task
from instructmining_core.finetuning.finetune import finetune
from instructmining_core.finetuning.run_spec import Record, RunSpec

SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0}  # the paper's
METRICS = ("acc", "acc_norm")


def records_of(study: Study) -> dict[str, Record]:
    """The tuned models' records by what they are called in the table."""
    ledger, pool, size = study.ledger, size_pool(study), study.profile.selection.size
    if study.has_own("runs/gate.json"):
        runs = study.runs("gate")
    else:
        rows = study.data.pools[pool]["row_hash"]
        draws = [PlannedRun(tuple(rows.sample(size, random_state=k)), {"method": f"draw {k}"}, k, k)
                 for k in (1, 2)]  # fmt: skip
        runs = study.run("bench", draws).assign(pool=pool)
    first = runs[runs["pool"] == pool].drop_duplicates("method").set_index("method")["run_id"]
    names = [name for name in ("selected", "random", "draw 1", "draw 2") if name in first]
    return {name: ledger.read(first[name]) for name in names}


def models(study: Study, records: Mapping[str, Record]) -> Iterator[tuple[str, Any]]:
    """(name, model) of the base and of each record trained again; one at a time is open."""
    yield "base", study.lm.model
    for name, record in records.items():
        spec = RunSpec.from_content(record["spec"], record["label"])
        rows = study.encoded_rows(study.lm, spec.finetune, set(spec.row_hashes))
        tuned = finetune(study.lm, [rows[h] for h in spec.row_hashes], spec.finetune,
                         init_seed=spec.init_seed, order_seed=spec.order_seed)
        try:
            yield name, tuned.lm.model
        finally:
            tuned.close()


def ask(model: Any, tokenizer: Any, tasks: Mapping[str, int | None], folder: Path, limit: int,
        batch: int) -> dict[str, dict[str, Any]]:  # fmt: skip
    """lm-eval's results of one model by task.

    tasks : name -> shots; folder : of further tasks' YAML files; limit : questions a task, 0 = all
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder))
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
    found = {}
    for name, shots in tasks.items():
        told = simple_evaluate(wrapped, tasks=[name], num_fewshot=shots, task_manager=manager,
                               limit=limit or None, bootstrap_iters=100, log_samples=True)
        found[name] = told["results"][name] | {"samples": told["samples"].get(name, [])}
    return found


def row(task: str, model: str, told: Mapping[str, Any], ours: Mapping[str, Any] | None,
        base: np.ndarray) -> dict:  # fmt: skip
    """One row of the table: lm-eval's accuracies with standard errors, ours beside them, and the
    difference from the base, paired by question (`choice_tasks.difference`).

    base : right answers of the base, of `marks`
    """
    found = {"task": task, "model": model, "questions": base.size}
    for metric in METRICS:
        found[f"lm-eval {metric}"] = told.get(f"{metric},none")
        found[f"{metric} se"] = told.get(f"{metric}_stderr,none")
        if ours:
            found[f"ours {metric}"] = ours[metric]
    right = marks(told)
    if ours:
        own = np.array([int(mark) for mark in ours["right_norm"]])
        found["judged otherwise"] = int((own != right[0]).sum())
    if model != "base" and base.size:
        found |= {f"{name} from base": value for name, value in difference(right, base).items()
                  if name in ("difference", "low", "high")}
    return found


def marks(told: Mapping[str, Any]) -> np.ndarray:
    """Right answers by question, shape (1, questions): acc_norm where the task has it, else acc."""
    ordered = sorted(told["samples"], key=lambda sample: sample["doc_id"])
    return np.array([[one.get("acc_norm", one.get("acc")) for one in ordered]], float)


def command(argv: Sequence[str] | None = None) -> int:
    """Write the table; exit status 1 where an accuracy of the profile's own tasks is not ours."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--leaderboard", action="store_true", help="the paper's four tasks")
    parser.add_argument("--limit", type=int, default=0, help="questions a task; 0 = all")
    parser.add_argument("--batch", type=int, default=16, help="rows of one batch of lm-eval")
    parser.add_argument("--out", type=Path, default=Path("results/openllm.csv"))
    options = parser.parse_args(argv)
    study = Study.open(options.profile)
    records, folder = records_of(study), study.folder / "tasks"
    for name, questions in study.choices.items():
        write_task(folder, name, questions)
    tasks = SHOTS if options.leaderboard else dict.fromkeys(study.choices, 0)
    if not tasks:
        print("The profile has no tasks of its own: data.choices is empty.", file=sys.stderr)
        return 2
    rows, base, begun = [], {}, time.perf_counter()
    for name, model in models(study, records):
        print(f"lm-eval on {name} ...", file=sys.stderr, flush=True)
        for task, told in ask(model, study.lm.tokenizer, tasks, folder, options.limit,
                              options.batch).items():  # fmt: skip
            record = records.get(name) or next(iter(records.values()))
            ours = record["choices" if name in records else "base_choices"].get(task)
            base.setdefault(task, marks(told))
            rows.append(row(task, name, told, None if options.limit else ours, base[task]))
            print(rows[-1], file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    table.insert(3, "chance", table["task"].map(chances(study.choices)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(options.out, index=False)
    print(f"{study.lm.resolved.id}, {study.lm.dtype}, lm-eval {version('lm-eval')}, "
          f"{time.perf_counter() - begun:.0f} s\n{table.round(4).to_string(index=False)}")
    return 0 if options.leaderboard or options.limit else int(not _same(table))


def _same(table: pd.DataFrame) -> bool:
    return all((table[f"ours {metric}"] == table[f"lm-eval {metric}"]).all() for metric in METRICS)


if __name__ == "__main__":
    raise SystemExit(command())
