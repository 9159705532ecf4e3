"""The two multiple-choice tasks of a study: which docstring, which answer; and what models score.

Both need no hub. Docstrings are those of installed packages that no study trains or evaluates on;
pairs of answers are read from a file at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from instructmining_core.data.choices import Question
from instructmining_core.finetuning.ledger import Ledger

from .profile import DataConfig, SourceConfig
from .study_data import read_pairs

Tasks = Mapping[str, Sequence[Question]]  # by the task's name

EMBEDDED = "embedded"  # the place of the task that is made from docstrings
LIBRARIES = ("pyarrow", "pydantic", "accelerate", "sentence_transformers", "rich", "docutils")
RIVALS = 3  # wrong docstrings beside the right one
WORDS = 24  # of a docstring at most: a run answers all questions, so they are short
ANSWER_WORDS = 80  # of one answer of a pair at most, and of its prompt
NEAR = 1.25  # length of the longer answer of a pair over that of the shorter, at most


def questions_of(
    source: SourceConfig, data: DataConfig, root: Path, trained: Sequence[Sequence[Mapping]] = ()
) -> list[Question]:
    """The questions of one task of a profile, `take` of them (all when 0), drawn by seed.

    trained : conversations that models may be trained on: what one of them begins with is not asked
    """
    if source.where == EMBEDDED:
        found = docstring_questions(data.seed)
    else:
        found = preference_questions(read_pairs(source, data, root), data.seed)
    known = {_asked(messages[0]["content"]) for messages in trained}
    found = [one for one in found if one.prompt not in known]
    return found[: source.take or None]


def _asked(prompt: str) -> str:
    return f"Question: {prompt.strip()}\nAnswer:"


def docstring_questions(seed: int) -> list[Question]:
    """Which docstring belongs to this function? In an order drawn by seed.

    The wrong ones are of the same library's functions with the nearest lengths, so that neither
    the library nor the length tells.
    """
    from .embedded.corpus import SIZES, find_library, read_library

    libraries = [found for name in LIBRARIES if (found := find_library(name))]
    parts = [read_library(one, SIZES["smoke"].read) for one in libraries]
    table = pd.concat(parts, ignore_index=True)
    words = table["response"].str.split().str.len()
    function = table["symbol"].str.rpartition(".")[2].str[0].str.islower()
    kept = table[(table["question"] == "summary") & function & (words <= WORDS)]
    kept = kept.drop_duplicates("response").assign(words=words)
    rng, found = np.random.default_rng(seed), []
    for _, part in kept.sort_values(["words", "id"]).groupby("source"):
        texts = part["response"].tolist()
        for place, prompt in enumerate(part["prompt"]):
            near = sorted((abs(i - place), i) for i in range(len(texts)) if i != place)
            others = [i for _, i in near[: 2 * RIVALS]]
            if len(others) >= RIVALS:
                wrong = [texts[i] for i in rng.permutation(others)[:RIVALS]]
                right = int(rng.integers(RIVALS + 1))
                wrong.insert(right, texts[place])
                found.append(Question(_asked(prompt), tuple(wrong), right))
    return [found[i] for i in rng.permutation(len(found))]


def preference_questions(pairs: pd.DataFrame, seed: int) -> list[Question]:
    """Which of two answers is preferred? One pair a prompt, in an order drawn by seed.

    pairs : from `study_data.read_pairs`. Kept are those of one turn whose answers are short and of
    nearly the same length, so that length hardly tells.
    """
    rng, found = np.random.default_rng(seed), {}
    for i in rng.permutation(len(pairs)):
        prompt, *answers = pairs.loc[i, ["prompt", "chosen", "rejected"]]
        asked = prompt[0]["content"].strip()
        better, worse = (" ".join(text.split()) for text in answers)
        longest = max(len(text.split()) for text in (asked, better, worse))
        sizes = sorted((len(better), len(worse)))
        if (len(prompt) > 1 or longest > ANSWER_WORDS or better == worse
                or sizes[1] > NEAR * sizes[0]):  # fmt: skip
            continue
        right = int(rng.integers(2))
        texts = (worse, better) if right else (better, worse)
        found.setdefault(asked, Question(_asked(asked), texts, right))
    return list(found.values())


def answered_right(records: Sequence[Mapping], task: str) -> np.ndarray:
    """Which questions each record's model got right by `acc_norm`: 0 or 1, (records, questions)."""
    told = [record["choices"][task]["right_norm"] for record in records]
    return np.array([[int(mark) for mark in marks] for marks in told], float)


def difference(right: np.ndarray, versus: np.ndarray) -> dict[str, float]:
    """Difference of two groups' accuracy, paired by question, with a 95 % interval.

    right, versus : of `answered_right`, the same questions. The variance is that over questions
    plus, of a group with several models, that over models: a little is counted twice. With one
    model a side the interval speaks of these two models.
    """
    apart = right.mean(0) - versus.mean(0)
    terms = [(apart.var(ddof=1) / len(apart), len(apart) - 1)]
    terms += [(group.mean(1).var(ddof=1) / len(group), len(group) - 1)
              for group in (right, versus) if len(group) > 1]
    total = sum(one for one, _ in terms)
    df = total**2 / sum(one**2 / d for one, d in terms) if total else 1.0  # Satterthwaite
    half = stats.t.isf(0.025, df) * np.sqrt(total)
    return {"accuracy": right.mean(), "versus": versus.mean(), "difference": apart.mean(),
            "low": apart.mean() - half, "high": apart.mean() + half}  # fmt: skip


def chances(tasks: Tasks) -> dict[str, float]:
    """The share that guessing gets right, by task."""
    return {name: float(np.mean([1 / len(one.choices) for one in questions]))
            for name, questions in tasks.items()}


def base_scores(tasks: Tasks, record: Mapping) -> pd.DataFrame:
    """What the untuned base scores on every task, beside chance.

    record : of any run of that base. One row a task: questions, chance, acc, acc_norm with low and
    high (Wilson), above_chance (low > chance: a model at chance can show no difference).
    """
    rows, chance_of = [], chances(tasks)
    for name, found in record["base_choices"].items():
        chance = chance_of[name]
        hits, count = found["right_norm"].count("1"), found["questions"]
        low, high = proportion_confint(hits, count, method="wilson")
        rows.append({"task": name, "questions": count, "chance": chance, "acc": found["acc"],
                     "acc_norm": found["acc_norm"], "low": low, "high": high,
                     "above_chance": low > chance})  # fmt: skip
    return pd.DataFrame(rows).set_index("task")


def selected_against_random(ledger: Ledger, runs: pd.DataFrame) -> pd.DataFrame:
    """Do selected rows train a model that answers more questions rightly than random rows do?

    runs : the gate's, columns run_id, pool, method, size; of the size that `selected` has. One row
    a pool and task: n, n_versus, and `difference`'s columns.
    """
    rows, size = [], runs.loc[runs["method"] == "selected", "size"].iloc[0]
    for pool, part in runs[runs["size"] == size].groupby("pool", sort=False):
        groups = [[ledger.read(one) for one in part.loc[part["method"] == method, "run_id"]]
                  for method in ("selected", "random")]  # fmt: skip
        for task in groups[0][0].get("choices", {}):
            told = difference(*(answered_right(group, task) for group in groups))
            rows.append({"pool": pool, "task": task, "n": len(groups[0]),
                         "n_versus": len(groups[1]), **told})  # fmt: skip
    return pd.DataFrame(rows)
