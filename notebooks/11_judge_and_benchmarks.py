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

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
import sys

if "google.colab" in sys.modules:  # on Colab the package is not there yet
    home = "/content/instructmining"  # with the committed evidence, for a notebook opened first
    get_ipython().system(
        f"git clone -q --depth 1 https://github.com/instructmining/instructmining {home}"
    )  # noqa: F821
    get_ipython().run_line_magic("pip", f"install -q {home}[study]")  # noqa: F821
    sys.path.insert(0, home)

# %% [markdown]
# ## Answers of both models
#
# Pairs of models, one finetuned on selected rows and one on random rows, answer the same prompts.

# %%
import pandas as pd

from instructmining import claims, experiments, figures, paper
from instructmining.study import Study
from instructmining_core.regression.rule_card import load_rule
from instructmining_core.selection import judge

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
pairs = experiments.generate_pairs(study, rule)
pairs.groupby("pair")[["selected", "random"]].agg(
    lambda texts: texts.str.split().str.len().mean()
).round(1)

# %% [markdown]
# The judge is the profile's reward model.
# On the embedded profiles that is a stand-in of about a million parameters, and what it prefers is its own affair; the point here is the procedure.

# %%
judged = experiments.judge_with_reward(study, pairs)
study.save(
    judged.drop(columns=["selected", "random", "prompt"], errors="ignore"),
    "judge.parquet",
)
result = judge.win_tie_lose(judged)
result

# %%
figures.plot_judge_bars(judged)
# %% [markdown]
# ## With its interval
#
# The net win is the share of wins minus the share of losses.
# A pair of models allows a statement about these two models; the interval over pairs and prompts is for the method.

# %%
net = judge.net_win(judged)
pd.Series(vars(net), name="net win").to_frame()

# %% [markdown]
# The paper's 34 wins, 19 ties and 27 losses of 80, treated in the same way:

# %%
published = judge.net_win_of_counts(**paper.JUDGE)
pd.Series(vars(published), name="net win").to_frame()

# %% [markdown]
# ## Benchmarks
#
# The paper also reports four tasks of the OpenLLM leaderboard.
# They need the hub and a model that can do them; a base of a million parameters answers at chance.
# With network, `lm-eval --model hf --model_args pretrained=FOLDER,peft=ADAPTER --tasks arc_challenge,hellaswag,mmlu,truthfulqa_mc2` runs them on an adapter such as the one that notebook 05 saves in `results/<profile>/adapter`.

# %%
study.record_claim("judged_better", **claims.judge_claim(net))

# %% [markdown]
# ## In this notebook we have seen
#
# - answers of paired models judged in both orders;
# - the net win with an interval that counts prompts and pairs;
# - that the paper's own count can't be told from a tie.
