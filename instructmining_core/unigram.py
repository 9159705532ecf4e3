"""How much of a set's loss is mere vocabulary: a smoothed unigram model of its responses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from .subsets import TrainingSet

WORDS = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Case-folded words and single punctuation marks."""
    return WORDS.findall(text.casefold())


def unigram_losses(sets: Sequence[TrainingSet], responses: Mapping[str, str],
                   evaluation: Sequence[str], smoothing: float = 0.1) -> pd.Series:
    """Loss of the evaluation responses under each set's own unigram model; index set_id.

    responses : row hash -> response text (several turns joined); evaluation : response texts;
    smoothing : count added to every word of the joint vocabulary of evaluation and all sets.
    Mean over prompts of the mean negative log probability per word, in nats.
    """
    if not evaluation:
        raise ValueError("no evaluation responses to score")
    distinct = {s.set_id: s for s in sets}
    needed = {h for s in distinct.values() for h in s.row_hashes}
    lacking = [h for h in needed if h not in responses]
    if lacking:
        raise ValueError(f"{len(lacking)} rows have no response text, the first is {lacking[0]}")
    counted = {h: Counter(words(responses[h])) for h in needed}
    prompts = [Counter(words(text)) for text in evaluation]
    prompts = [p for p in prompts if p]
    vocabulary = {w for c in (*counted.values(), *prompts) for w in c}
    asked = sorted({w for p in prompts for w in p})
    position = {w: i for i, w in enumerate(asked)}
    weight = np.zeros(len(asked))
    for prompt in prompts:
        total = sum(prompt.values()) * len(prompts)
        for w, c in prompt.items():
            weight[position[w]] += c / total
    losses = {}
    for name, one in distinct.items():
        have, total = np.zeros(len(asked)), 0
        for h in one.row_hashes:
            total += sum(counted[h].values())
            for w, c in counted[h].items():
                if w in position:
                    have[position[w]] += c
        probability = (have + smoothing) / (total + smoothing * len(vocabulary))
        losses[name] = float(-weight @ np.log(probability))
    return pd.Series(losses, name="unigram").rename_axis("set_id")
