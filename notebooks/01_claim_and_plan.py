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
# # What does InstructMining claim, and what would make us believe it?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/01_claim_and_plan.ipynb)
#
# Which instruction data should a model be finetuned on?
# InstructMining {cite:p}`cao2023instruction` answers with a rule: a weighted sum of cheap numbers about a text that predicts how well a model will do after it was finetuned on that text.
# This study asks whether such a rule can be trusted, and fits one to a model of your own.
#
# This first notebook says:
#
# - what the rule is, and the step from sets to single examples that it takes;
# - which claims will be tested, and what the paper offers for each;
# - what we had to choose where the paper is silent;
# - how large this run is.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## The idea, in one formula
#
# Finetune a model on a set of examples $D$ and take its loss $L$ on a fair evaluation set.
# The lower the loss, the better the set.
# That costs a finetune for every set, so the paper fits a line to many of them:
#
# $$ \log L(D) \approx \beta_0 + \sum_j \beta_j \bar I_j(D) $$
#
# In words: the logarithm of the loss is a constant plus, for each indicator $j$, a weight $\beta_j$ times the mean $\bar I_j$ of that indicator over the set.
#
# Once the weights are there, a rule is nothing but a weighted sum.
# Here is the paper's own, applied to one invented example, by pandas and by the core.

# %%
import dataclasses

import numpy as np
import pandas as pd
from IPython.display import Markdown

from instructmining import figures, paper
from instructmining.study import Study
from instructmining_core import load_rule

rule = load_rule("v3")
weights = pd.Series({one.name: one.estimate for one in rule.coefficients})
example = pd.DataFrame([{"reward": 1.2, "understandability": 0.9, "naturalness": 0.8, "coherence": 0.95}])

by_hand = rule.intercept + (example[weights.index] * weights).sum(axis=1)
np.testing.assert_allclose(by_hand, rule.predict(example))
display(weights.rename("weight").to_frame().assign(example=example.iloc[0]))
Markdown(f"""
The example's predicted log loss is {by_hand[0]:.3f}, by hand and by the core.
A reward that is one point higher lowers it by {-weights['reward']:.4f}, that is the loss by {-100 * np.expm1(weights['reward']):.1f} %.
""")

# %% [markdown]
# Nine indicators are candidates for such a rule.

# %%
paper.indicators()

# %% [markdown]
# The line is fitted on *means of sets* and then applied to *single examples*, to rank them.
# Whether that step is allowed is the question on which everything depends.

# %%
figures.plot_procedure()

# %% [markdown]
# ## What does the paper claim, and what does it offer for each claim?
#
# We test its claims, and some of our own, one after the other.
# The last notebook sets a verdict beside each, with an interval and with the smallest effect that we could have seen.

# %%
claimed = paper.claims()
display(claimed)
silent = claimed["paper_value"].str.startswith("not ").sum()
Markdown(f"""
For {silent} of these {len(claimed)} claims the paper offers no number.
For the rule it offers R² = {paper.R_SQUARED}, in sample, from {paper.RUNS} finetunes on {paper.SET_SIZE:,} rows each.
""")

# %% [markdown]
# ## What does the paper not say?
#
# A reproduction has to choose where the paper is silent.
# These are our choices.

# %%
pd.Series(paper.UNKNOWN, name="our choice").rename_axis("unknown in the paper").to_frame()

# %% [markdown]
# ## How large is this run?
#
# The profile fixes every size, so that a number in this book can be traced to its setting.

# %%
study = Study.open(profile)
design, tuning = (dataclasses.asdict(part) for part in (study.profile.design, study.profile.finetune))
display(pd.concat({"design": pd.Series(design), "finetune": pd.Series(tuning)}).rename("value").to_frame())
Markdown(f"""
This run is `{study.profile.name}`: {study.profile.description}
It makes {study.profile.design.runs()} finetunes of {study.profile.design.size} rows for the rule, on the base `{study.profile.models.base.id}`; the paper made {paper.RUNS} of {paper.SET_SIZE:,}.
""")

# %% [markdown]
# The paper fits its rule on mixtures of four sources.
# A mixture of four sources has only three free shares, so nearly all that differs between such sets is *which source* they come from.
# The design above keeps an arm of such mixtures and adds sets drawn within one source, tilted towards one end of an indicator, and sets of two or three sources.
# Notebook 07 shows what that changes.
#
# ## In this notebook we have seen
#
# - the rule as a weighted sum, and the step from means of sets to single examples that it takes;
# - the claims to be tested, and what the paper offers for each;
# - what we had to choose;
# - the size of this run.
