"""Which of two models answers better? Every pair judged in both orders, with an interval.

Source: the paper asks GPT-4 once a pair (v1: better in 42.5 % of cases; v3, Fig. 3). Judges favour
a position, so here a prompt's score is the mean of both orders, and the count has an interval
(statistical plan, section 9). The paper's prompt to its judge is unknown; ours is `INSTRUCTION`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from ..config import InstructMiningError
from ..data.fields import Messages
from .contrasts import LEVEL, detectable_shift

if TYPE_CHECKING:
    import openai

Judge = Callable[[Messages, str, str], float]

MIN_PAIRS = 3  # of models, below which an interval speaks of these models only
INSTRUCTION = (
    "You compare two answers to the same request. Judge how correct, relevant and helpful each is. "
    "Length and the order of the answers do not matter. Explain in at most two sentences, then end "
    "with one line: `VERDICT: 1` if the first answer is better, `VERDICT: 2` if the second is, "
    "`VERDICT: TIE` if neither is."
)
_VERDICT = re.compile(r"VERDICT:\W*(1|2|TIE)\b", re.IGNORECASE)
_PREFERENCE = {"1": 1.0, "2": 0.0, "TIE": 0.5}


@dataclass(frozen=True)
class NetWin:
    """Share of wins minus share of losses, in [−1, 1], with a 95 % interval.

    p : two-sided, of "no difference"; pairs : pairs of models, prompts : prompts judged;
    inconsistent : share of judgements that changed with the order (NaN if unknown);
    scope : what the interval speaks of, "these two models" or "the method"; detectable : float,
    the net win that would have been found with 80 % power.
    """

    net: float
    low: float
    high: float
    p: float
    prompts: int
    pairs: int
    inconsistent: float
    scope: str
    detectable: float


def judge_pairs(
    prompts: Sequence[Messages],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    judge: Judge,
    *,
    pair: str | int = 0,
) -> pd.DataFrame:
    """Ask a judge about each prompt twice, with A shown first and with B shown first.

    judge : (messages, first answer, second answer) -> how far the *first* is preferred, 1 first,
    0 second, ½ a tie, anything between; NaN if it gave no verdict. pair : names the two models.

    Returns one row a prompt: pair, prompt_id, a_first, a_second (preference for A when shown first
    and second), score (their mean, so an inconsistent pair is ½), outcome ("win", "tie", "lose" of
    A; "none" without a verdict), consistent (both orders agree; False without a verdict).
    """
    if not len(prompts) == len(answers_a) == len(answers_b):
        raise InstructMiningError(
            f"{len(prompts)} prompts, {len(answers_a)} and {len(answers_b)} answers: must be equal"
        )
    rows = []
    for number, (prompt, a, b) in enumerate(zip(prompts, answers_a, answers_b, strict=True)):
        first = _preference(judge(prompt, a, b))
        second = 1 - _preference(judge(prompt, b, a))
        score = (first + second) / 2
        rows.append({
            "pair": pair, "prompt_id": number, "a_first": first, "a_second": second,
            "score": score, "outcome": _outcome(score),
            "consistent": _outcome(first) == _outcome(second) != "none",
        })
    columns = ["pair", "prompt_id", "a_first", "a_second", "score", "outcome", "consistent"]
    return pd.DataFrame(rows, columns=columns)


def reward_judge(score: Callable[[Messages], float]) -> Judge:
    """A judge that prefers the answer with the higher reward.

    score : a conversation that ends with the answer -> reward; asked once for each conversation,
    however often it is compared. Equal rewards are a tie; NaN rewards give no verdict. A reward
    model reads one answer at a time, so order can't sway it.
    """
    known: dict[tuple, float] = {}

    def reward(prompt: Messages, answer: str) -> float:
        messages = [*prompt, {"role": "assistant", "content": answer}]
        key = tuple((m["role"], m["content"]) for m in messages)
        if key not in known:
            known[key] = float(score(messages))
        return known[key]

    def judge(prompt: Messages, first: str, second: str) -> float:
        lead = reward(prompt, first) - reward(prompt, second)
        if math.isnan(lead):
            return math.nan
        return 0.5 + 0.5 * float(np.sign(lead))

    return judge


def win_tie_lose(judged: pd.DataFrame) -> pd.DataFrame:
    """Counts and net win of each pair of models, indexed by pair.

    judged : from `judge_pairs`, one or several pairs. Returns win, tie, lose, none (no verdict,
    left out of the rest), net, low, high (95 %, over prompts), p (exact sign test on wins and
    losses), inconsistent (share in [0, 1]). A line speaks of its two models only.
    """
    rows = {}
    for pair, part in judged.groupby("pair", sort=False):
        counts = part["outcome"].value_counts()
        net = vars(_over_prompts(part))
        rows[pair] = {name: int(counts.get(name, 0)) for name in ("win", "tie", "lose", "none")}
        rows[pair] |= {name: net[name] for name in ("net", "low", "high", "p", "inconsistent")}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("pair")


def net_win(judged: pd.DataFrame) -> NetWin:
    """The net win over all pairs of models.

    judged : from `judge_pairs`; pairs share their prompts by `prompt_id`. With at least three
    pairs the interval takes both pairs and prompts as random and speaks of the method; with fewer
    it speaks of these models, and pairs are averaged within each prompt.
    """
    if judged["pair"].nunique() < MIN_PAIRS:
        return _over_prompts(judged)
    decided = judged.dropna(subset=["score"])
    table = decided.pivot(index="pair", columns="prompt_id", values="score").dropna(axis=1)
    values = 2 * table.to_numpy() - 1
    if values.shape[1] < 2:
        raise InstructMiningError("pairs of models share fewer than two judged prompts")
    net, se, df = _two_way(values)
    reach = stats.t.isf((1 - LEVEL) / 2, df) * se
    p = float(2 * stats.t.sf(abs(net) / se, df)) if se > 0 else float("nan")
    return NetWin(
        net, net - reach, net + reach, p, values.shape[1], len(values),
        _inconsistent(decided), "the method", detectable_shift(se, df),
    )


def net_win_of_counts(win: int, tie: int, lose: int) -> NetWin:
    """Net win of published counts, with the t interval and the exact sign test.

    >>> found = net_win_of_counts(34, 19, 27)  # our reading of the paper's 42.5 %
    >>> print(f"{found.net:+.2f} [{found.low:.2f}, {found.high:.2f}], p = {found.p:.2f}")
    +0.09 [-0.11, 0.28], p = 0.44
    """
    return _over_nets(np.repeat([1.0, 0.0, -1.0], [win, tie, lose]), 1, float("nan"))


def _preference(value: float) -> float:
    value = float(value)
    if not (math.isnan(value) or 0 <= value <= 1):
        raise InstructMiningError(f"a preference must be in [0, 1] or NaN, the judge gave {value}")
    return value


def _outcome(score: float) -> str:
    if math.isnan(score):
        return "none"
    return "win" if score > 0.5 else "lose" if score < 0.5 else "tie"


def _inconsistent(decided: pd.DataFrame) -> float:
    return float(1 - decided["consistent"].mean()) if len(decided) else float("nan")


def _over_prompts(judged: pd.DataFrame) -> NetWin:
    decided = judged.dropna(subset=["score"])
    nets = 2 * decided.groupby("prompt_id")["score"].mean().to_numpy() - 1
    return _over_nets(nets, judged["pair"].nunique(), _inconsistent(decided))


def _over_nets(nets: np.ndarray, pairs: int, inconsistent: float) -> NetWin:
    """Interval over prompts; nets : shape (prompts,), in [−1, 1]."""
    if len(nets) < 2:
        raise InstructMiningError(f"an interval needs two judged prompts, got {len(nets)}")
    net, se = float(nets.mean()), float(stats.sem(nets))
    reach = stats.t.isf((1 - LEVEL) / 2, len(nets) - 1) * se
    win, lose = int((nets > 0).sum()), int((nets < 0).sum())
    p = float(stats.binomtest(win, win + lose).pvalue) if win + lose else 1.0
    return NetWin(
        net, float(net - reach), float(net + reach), p, len(nets), pairs, inconsistent,
        "these two models" if pairs == 1 else "these models", detectable_shift(se, len(nets) - 1),
    )


def _two_way(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, standard error and degrees of freedom with rows and columns both random."""
    pairs, prompts = values.shape
    mean = values.mean()
    by_pair = values.mean(1).var(ddof=1) / pairs
    by_prompt = values.mean(0).var(ddof=1) / prompts
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + mean
    cells = (pairs - 1) * (prompts - 1)
    shared = (rest**2).sum() / cells / values.size
    total = max(by_pair + by_prompt - shared, by_pair, by_prompt)
    parts = ((by_pair, pairs - 1), (by_prompt, prompts - 1), (shared, cells))
    spread = sum(v**2 / d for v, d in parts)
    return float(mean), math.sqrt(total), total**2 / spread if spread else float("inf")


def api_judge(client: openai.OpenAI, model: str) -> Judge:
    """A judge at any server with OpenAI's chat completions: GPT-4 as in the paper, or a local one.

    client : `openai.OpenAI(base_url=..., api_key=...)` of the extra `judge`; key, time limit,
    retries and errors are its own. model : as the server names it. It is asked at temperature 0 in
    the order given (`judge_pairs` asks in both); a reply without a verdict is NaN.
    """

    def judge(prompt: Messages, first: str, second: str) -> float:
        reply = client.chat.completions.create(
            model=model, messages=_comparison(prompt, first, second), temperature=0
        )
        return parse_verdict(reply.choices[0].message.content or "")

    return judge


def _comparison(prompt: Messages, first: str, second: str) -> Messages:
    """The conversation that asks for a comparison of two answers to `prompt`."""
    request = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in prompt)
    parts = [("Request", request), ("First answer", first), ("Second answer", second)]
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in parts)
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]


def parse_verdict(reply: str) -> float:
    """The last verdict line of a reply as a preference for the first answer; NaN if it has none.

    >>> parse_verdict("Both are right, the first is clearer. VERDICT: 1")
    1.0
    """
    found = _VERDICT.findall(reply)
    return _PREFERENCE[found[-1].upper()] if found else math.nan
