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
#
# This study asks whether such a rule can be trusted, and fits one to a model of your own.
# It runs on the profile named below; the default needs no network and no GPU.

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
# ## The idea, in one formula
#
# Finetune a model on a set of examples $D$ and take its loss $L$ on a fair evaluation set.
# The lower the loss, the better the set.
# That costs a finetune for every set, so the paper fits a line to many of them:
#
# $$ \log L(D) \approx \beta_0 + \sum_j \beta_j \bar I_j(D) $$
#
# In words: the logarithm of the loss is a constant plus, for each indicator $j$, a weight $\beta_j$ times the mean $\bar I_j$ of that indicator over the set.
# Nine indicators are candidates.

# %%
from instructmining import figures, paper
from instructmining.study import Study

study = Study.open(profile)
paper.indicators()

# %% [markdown]
# The line is fitted on *means of sets* and then applied to *single examples*, to rank them.
# Whether that step is allowed is the question on which everything depends.

# %%
figures.plot_procedure()
# %% [markdown]
# ## What the paper claims, and what it offers for each claim
#
# We test them, and two of our own, one after the other.
# The last notebook sets a verdict beside each, with an interval and with the smallest effect that we could have seen.

# %%
paper.claims()

# %% [markdown]
# ## What the paper does not say
#
# A reproduction has to choose where the paper is silent.
# These are our choices.

# %%
import pandas as pd

pd.Series(paper.UNKNOWN, name="our choice").rename_axis(
    "unknown in the paper"
).to_frame()

# %% [markdown]
# ## This run
#
# The profile fixes every size, so that a number in this book can be traced to its setting.

# %%
import dataclasses

plan = dataclasses.asdict(study.profile.design) | {
    "finetunes in the sweep": study.profile.design.runs()
}
print(study.profile.name, "-", study.profile.description)
pd.Series(plan, name="value").to_frame()

# %% [markdown]
# The paper fits its rule on 129 mixtures of four sources.
# A mixture of four sources has only three free shares, so nearly all that differs between such sets is *which source* they come from.
# The design above keeps an arm of such mixtures and adds sets drawn within one source, tilted towards one end of an indicator, and sets of two or three sources.
# Notebook 07 shows what that changes.

# %%
dataclasses.asdict(study.profile.finetune)

# %% [markdown]
# ## In this notebook we have seen
#
# - the rule, and the step from means of sets to single examples that it takes;
# - the claims to be tested, and what the paper offers for each;
# - what we had to choose, and the size of this run.
