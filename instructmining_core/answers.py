"""Answers of selected and random models to the same prompts, and what the reward model prefers."""

from __future__ import annotations

import pandas as pd

from .card import RuleCard
from .experiments import repeated, size_pool
from .study import Study


def generate_pairs(study: Study, rule: RuleCard, *, progress: bool = True) -> pd.DataFrame:
    """Finetune pairs of models and let them answer the same prompts of eval_2, greedily.

    Returns columns pair (int), prompt_id, prompt (messages), selected, random (answers).
    """
    from .generate import generate

    config = study.profile.judge
    prompts = study.data.eval_2.head(config.prompts)
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
