"""Answers of selected and random models to the same prompts, and what the reward model prefers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .card import RuleCard
from .experiments import repeated, size_pool
from .records import row_hash
from .study import Study


def generate_pairs(study: Study, rule: RuleCard, *, progress: bool = True) -> pd.DataFrame:
    """Finetune pairs of models and let them answer the same prompts of eval_2, greedily.

    The prompts are drawn from all sources by the profile's data seed (`draw_prompts`).
    Returns columns pair (int), prompt_id, prompt (messages), selected, random (answers).
    """
    from .generate import generate

    config = study.profile.judge
    prompts = draw_prompts(study.data.eval_2, config.prompts, study.profile.data.seed)
    questions = [messages[:-1] for messages in prompts["messages"]]
    pool, size = size_pool(study), study.profile.selection.size
    frames = []
    for pair in range(config.model_pairs):
        answers = {}
        for method in ("selected", "random"):
            plan = repeated(study, rule, pool, method, size, 1, first=pair)[0]
            with study.tuned(plan) as tuned:
                answers[method] = generate(
                    tuned.lm, questions, max_new_tokens=config.max_new_tokens, progress=progress
                )
        frames.append(
            pd.DataFrame({"pair": pair, "prompt_id": prompts["id"], "prompt": questions, **answers})
        )
    return pd.concat(frames, ignore_index=True)


def draw_prompts(table: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`count` rows of a record table, as equally from its sources as they allow, by seed.

    The numbers from any two sources differ by at most one, unless one has no more rows. Rows keep
    the table's order; all of them where the table has no more than `count`.
    """
    rng = np.random.default_rng(seed)
    shuffled = table.iloc[rng.permutation(len(table))]
    # one row of every source, then a second of every source, ...: which sources get one more
    # is as random as the rows are
    turn = shuffled.groupby("source", sort=False).cumcount()
    first = shuffled.loc[turn.sort_values(kind="stable").index[:count]]
    return table[table.index.isin(first.index)]


def judge_with_reward(study: Study, pairs: pd.DataFrame) -> pd.DataFrame:
    """The reward model's preference for each pair of answers, in both orders.

    pairs : from `generate_pairs`; returns the frame of `judge.judge_pairs`, all pairs of models.
    """
    from .judge import judge_pairs, reward_judge

    conversations = [
        [*row["prompt"], {"role": "assistant", "content": row[method]}]
        for row in pairs.to_dict("records")
        for method in ("selected", "random")
    ]
    rewards = _rewards(study, conversations)
    judge = reward_judge(lambda messages: rewards[row_hash(messages)])
    judged = [
        judge_pairs(part["prompt"].tolist(), part["selected"].tolist(), part["random"].tolist(),
                    judge, pair=pair)
        for pair, part in pairs.groupby("pair")
    ]  # fmt: skip
    return pd.concat(judged, ignore_index=True)


def _rewards(study: Study, conversations: list[list[dict]]) -> dict[str, float]:
    """Reward by row hash, all conversations in one pass."""
    from .scoring import score

    table = pd.DataFrame({
        "id": [str(i) for i in range(len(conversations))],
        "source": "answers", "messages": conversations, "file": "",
        "row": range(len(conversations)),
    })  # fmt: skip
    ref = study.profile.models.reward
    scores = score(table, {"reward": ref}, indicators=("reward",), standins=study.standins(ref))
    return dict(zip(map(row_hash, conversations), scores["reward"], strict=True))
