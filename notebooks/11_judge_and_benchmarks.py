# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   jupytext:
#     cell_metadata_filter: tags
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,accelerator,colab
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does a judge prefer the selected model's answers?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/11_judge_and_benchmarks.ipynb)
#
# A lower loss is not yet a better answer.
# The paper lets GPT-4 compare answers, each pair in one order; judges favour a position, so here each pair is judged in both.
# We ask:
#
# - how the answers of a model trained on selected rows differ from those of one trained on random rows;
# - which of them the judge prefers, and how sure that is;
# - what the paper's own count says when it is treated in the same way.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## Answers of both models
#
# Pairs of models, one finetuned on selected rows and one on random rows, answer the same prompts.

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown

from instructmining import claims, experiments, figures, paper
from instructmining.study import Study
from instructmining_core import load_rule
from instructmining_core.selection import judge

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
pairs = experiments.generate_pairs(study, rule)
words = pairs.groupby("pair")[["selected", "random"]].agg(lambda texts: texts.str.split().str.len().mean())
display(words.round(1))
same = (pairs["selected"] == pairs["random"]).mean()
Markdown(f"""
{pairs['pair'].nunique()} pairs of models answer {pairs['prompt_id'].nunique()} prompts; {same:.0%} of the answers are the same word for word.
The selected models' answers are {words['selected'].mean():.1f} words long, the random ones' {words['random'].mean():.1f}: where a judge likes length, that alone may decide.
""")

# %% [markdown]
# ## Wins, ties and losses
#
# The judge is the profile's reward model: the answer with the higher reward wins.
# To count is a line of pandas, and the share of wins minus that of losses is the *net win*.
# The core adds what the count lacks: both orders, an exact test, and an interval that takes prompts as drawn at random, and pairs of models too.

# %%
judged = experiments.judge_with_reward(study, pairs)
texts = ["selected", "random", "prompt"]
study.save(judged.drop(columns=texts, errors="ignore"), "judge.parquet")

shares = judged["outcome"].value_counts(normalize=True)
by_hand = shares.get("win", 0) - shares.get("lose", 0)
net = judge.net_win(judged)
if (judged["outcome"] != "none").all():
    np.testing.assert_allclose(by_hand, net.net, atol=1e-9)
display(judge.win_tie_lose(judged).round(3))
Markdown(f"""
The judge is {study.profile.models.reward.id}; what it prefers is its own affair, and the point here is the procedure.
By hand the net win is {by_hand:+.3f}, and so it is by the core: {net.net:+.3f} [{net.low:+.3f}, {net.high:+.3f}], p = {net.p:.2g}, which speaks of {net.scope}.
{f'A net win of {net.detectable:.2f} would have been found four times in five.' if np.isfinite(net.detectable) else 'The answers do not differ enough to say what could have been found.'}
{net.inconsistent:.0%} of the verdicts changed with the order.
""")

# %%
figures.plot_judge_bars(judged)

# %% [markdown]
# A pair of models allows a statement about these two models; the interval over pairs and prompts is for the method.
#
# ## The paper's count, treated in the same way

# %%
published = judge.net_win_of_counts(**paper.JUDGE)
study.record_claim("judged_better", **claims.judge_claim(net))
display(pd.DataFrame({"here": vars(net), "the paper": vars(published)}))
Markdown(f"""
The paper's {paper.JUDGE['win']} wins, {paper.JUDGE['tie']} ties and {paper.JUDGE['lose']} losses are a net win of {published.net:+.2f} [{published.low:+.2f}, {published.high:+.2f}]: {'more than a tie' if published.low > 0 else 'not to be told from a tie'}.
""")

# %% [markdown]
# ## Benchmarks
#
# The paper also reports four tasks of the OpenLLM leaderboard.
# They need the hub, and a base that does better than chance at them.
# With network, `lm-eval --model hf --model_args pretrained=FOLDER,peft=ADAPTER --tasks arc_challenge,hellaswag,mmlu,truthfulqa_mc2` runs them on an adapter such as the one that notebook 05 saves in `results/<profile>/adapter`.
#
# ## In this notebook we have seen
#
# - answers of paired models to the same prompts;
# - the net win by hand and from the core, with an interval that counts prompts and pairs;
# - whether the paper's own count can be told from a tie.
