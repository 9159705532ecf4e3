"""Facts of the paper, each with its place: what was claimed, and what we hold against it.

"Instruction Mining", Cao, Kang, Wang, Sun, arXiv 2307.06290: v1 July 2023, v2 October 2023, v3
July 2024. The authors keep no public repository. Where the paper is silent we say so and choose.
"""

from __future__ import annotations

import pandas as pd

RUNS, SET_SIZE, R_SQUARED = 129, 1000, 0.522  # v3, section 3; R² as quoted second-hand
RISE_FROM = 10_000  # rows at which the loss is said to rise again, v3, Fig. 4
JUDGE = {"win": 34, "tie": 19, "lose": 27}  # of 80; an inference from v1's 42.5 %

UNKNOWN = {
    "prompt template": "plain `User:` / `Assistant:` turns",
    "loss masking": "response tokens and the end mark only",
    "loss averaging": "mean over prompts of the per-token loss; the token mean beside it",
    "seeds": "one seed for all sets, varied on purpose on the anchors",
    "distribution of the mixing weights": "uniform on [0, 1], then normalised",
    "sentence encoder of KNN": "all-MiniLM-L6-v2, Euclidean distance of unit vectors",
    "reward model's input form": "the Open-Assistant form, recorded with the score",
    "p-values of the rule": "shown, and marked as not valid after selection",
}


def indicators() -> pd.DataFrame:
    """v3, Table 1: the nine indicators, with the unit we give each."""
    rows = [
        ("len_in", "Len_in", "tokens of the instruction", "tokens"),
        ("len_out", "Len_out", "tokens of the response", "tokens"),
        ("reward", "Rew", "reward-model score of the pair", "score"),
        ("ppl", "PPL", "exponentiated mean loss of the response", "perplexity"),
        ("mtld", "MTLD", "lexical diversity of the response (McCarthy & Jarvis 2010)", "words"),
        ("knn_6", "KNN_6", "distance to the sixth nearest neighbour", "Euclidean distance"),
        ("naturalness", "Nat", "would a person say this (UniEval)", "probability"),
        ("coherence", "Coh", "does it follow from the instruction (UniEval)", "probability"),
        ("understandability", "Und", "can it be understood (UniEval)", "probability"),
    ]
    return pd.DataFrame(rows, columns=["name", "paper", "definition", "unit"])


def table_3() -> pd.DataFrame:
    """v3, Table 3: selected against random on LLaMA-2-7B; losses in nats per token."""
    rows = [
        ("OpenOrca", "selected", 1000, -0.1347, 0.958, 0.711),
        ("OpenOrca", "selected", 20000, -0.0716, 0.991, 0.730),
        ("OpenOrca", "selected", 90000, -0.0243, 1.014, 0.735),
        ("OpenOrca", "BlendSearch", 2532, -0.1197, 0.973, 0.699),
        ("OpenOrca", "random", 1000, -0.0195, 1.001, 0.746),
        ("OpenOrca", "random", 20000, -0.0180, 0.991, 0.751),
        ("OpenOrca", "random", 90000, -0.0176, 1.010, 0.763),
        ("Dolly", "selected", 1000, -0.0969, 1.0429, 0.7964),
        ("Dolly", "selected", 5000, -0.0622, 1.0327, 0.7847),
        ("Dolly", "selected", 10000, -0.0449, 1.0371, 0.8001),
        ("Dolly", "BlendSearch", 2648, -0.0770, 1.0160, 0.7746),
        ("Dolly", "random", 1000, -0.0286, 1.0409, 0.8215),
        ("Dolly", "random", 5000, -0.0289, 1.0331, 0.7910),
        ("Dolly", "random", 10000, -0.0293, 1.0356, 0.8086),
    ]
    columns = ["pool", "method", "size", "rule", "self_instruct", "mt_bench"]
    return pd.DataFrame(rows, columns=columns)


def table_4() -> pd.DataFrame:
    """v3, Table 4: four OpenLLM tasks, accuracy in per cent (shots 25, 10, 5, 0)."""
    rows = [
        ("selected", 10_000, 56.66, 79.77, 49.89, 48.26),
        ("selected", 40_000, 54.44, 80.11, 52.60, 49.83),
        ("random", 10_000, 54.78, 79.58, 49.02, 51.58),
        ("random", 40_000, 54.78, 79.89, 51.16, 49.95),
        ("LLaMA-2-7B", 0, 53.07, 78.59, 46.87, 38.76),
    ]
    return pd.DataFrame(rows, columns=["model", "rows", "arc", "hellaswag", "mmlu", "truthfulqa"])


def table_5() -> pd.DataFrame:
    """v3, Table 5: drop one indicator, refit, select 1,000 of OpenOrca; losses in nats."""
    rows = [
        ("all four", 0.958, 0.711), ("without reward", 0.988, 0.762),
        ("without understandability", 0.989, 0.746), ("without naturalness", 0.977, 0.742),
        ("without coherence", 0.969, 0.742), ("random", 1.001, 0.746),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["rule", "self_instruct", "mt_bench"])


def table_6() -> pd.DataFrame:
    """v3, Table 6: selected against random for other bases and for LoRA; losses in nats."""
    rows = [
        ("LLaMA-2-13B", 0.8748, 0.8983, 0.6531, 0.6589),
        ("LLaMA-1-7B", 1.013, 1.056, 0.798, 0.844),
        ("LLaMA-2-7B with LoRA", 1.0698, 1.0700, 0.8624, 0.8631),
    ]
    columns = ["model", "self_instruct_selected", "self_instruct_random",
               "mt_bench_selected", "mt_bench_random"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def claims() -> pd.DataFrame:
    """The paper's claims and those that stand behind them, what it offers, who tests ours."""
    rows = [
        ("loss_is_quality", "The loss after finetuning measures the quality of a set",
         "losses of three kinds of source", "v3, section 3", "12"),
        ("loss_predicts_tasks", "A model with a lower loss answers more tasks rightly",
         "a figure without an interval", "v3, appendix", "12"),
        ("rule_predicts", "A linear rule over indicators predicts the log loss",
         f"R² = {R_SQUARED}, in sample", "v3, section 4", "07"),
        ("rule_transfers", "The rule holds for data that it has not seen",
         "not tested by held-out sources", "v3, section 4", "07"),
        ("selected_beats_random", "The selected rows train a better model than random rows",
         "0.958 against 1.001 (OpenOrca, 1,000 rows)", "v3, Table 3", "08"),
        ("beats_length", "The rule is worth more than ranking rows by their length alone",
         "not compared", "-", "08"),
        ("finds_defects", "The rule finds defective rows, and better than length does",
         "not asked", "-", "12"),
        ("no_win_without_defects", "Where no row is defective, selecting brings nothing",
         "not asked", "-", "12"),
        ("small_is_best", "A small part of the data is the best size",
         "2,532 of 100,000 rows", "v3, Table 3", "09"),
        ("double_descent", "The loss falls, rises and falls again as the size grows",
         f"a rise from about {RISE_FROM:,} rows", "v3, Fig. 4", "09"),
        ("robust", "The gain holds for LoRA and for other base sizes",
         "1.0698 against 1.0700 with LoRA", "v3, Table 6", "10"),
        ("judged_better", "A judge prefers the answers of the selected model",
         "wins 34, ties 19, loses 27 of 80", "v1, abstract (inferred)", "11"),
    ]  # fmt: skip
    columns = ["claim", "statement", "paper_value", "paper_source", "notebook"]
    return pd.DataFrame(rows, columns=columns)


def quote(text: str) -> str:
    """The first words of a text on one line: committed pages quote at most 25.

    >>> quote("one " * 26)[-9:]
    'one one …'
    """
    words = text.split()
    return " ".join(words[:25]) + (" …" if len(words) > 25 else "")
