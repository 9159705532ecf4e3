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
# # Which sets should we finetune on, so that a rule can be seen?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/04_subsets.ipynb)
#
# Every finetune costs the same; what it teaches depends on the set.
# This notebook draws the sets and computes, before any training, how precisely each design could estimate each slope.

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
# ## Two arms
#
# *Fusion*, as in the paper: every set mixes all sources by random weights.
# *Designed*: sets of one source, and of two or three, whose rows are drawn with a tilt along a direction of the indicator space.

# %%
import json

import pandas as pd

from instructmining_core import figures, findings
from instructmining_core.study import Study

study = Study.open(profile)
columns = study.profile.rule_columns()
sets = study.draw_sets()
study.save(
    pd.DataFrame(
        {
            "set_id": [s.set_id for s in sets],
            "set": [json.dumps(s.as_dict()) for s in sets],
        }
    ),
    "sets.parquet",
)
pd.Series([s.arm for s in sets]).value_counts().rename("sets").to_frame()

# %% [markdown]
# A source gives at most 40 % of its rows to one set, rows are drawn without replacement, and every set has exactly the same number of rows.

# %%
frame = study.set_frame()
frame.groupby("arm")[columns].std().T.round(3)

# %% [markdown]
# ## What each arm can see
#
# The *effective dimensions* of a design say in how many independent directions its sets differ.
# Mixtures of $S$ sources have at most $S-1$.

# %%
from instructmining_core.inference import effective_dimensions

constants = study.candidate_scores[columns].std()
pd.DataFrame(
    {
        arm: effective_dimensions(rows[columns] / constants)
        for arm, rows in frame.groupby("arm")
    }
).round(2)

# %% [markdown]
# ## How many runs are enough?
#
# The design matrix is known before training; only the noise is not.
# So the half-width of the interval of each slope can be computed for any number of runs.
# Until there are runs, the noise is taken to be a standard deviation of 0.01 in log loss; notebook 06 measures it.

# %%
plan = findings.planned_half_widths(study, frame)
plan.pivot_table(
    index="coefficient", columns=["arm", "runs"], values="half_width"
).round(4)

# %% [markdown]
# A fusion arm sees the slopes mostly through differences between sources; an empty cell says that so few sets can't tell the indicators apart at all.
# A slope that differs between sources is another matter: there more runs do not help, more sources do.

# %%
figures.design_half_widths(plan)

# %% [markdown]
# ## In this notebook we have seen
#
# - the two arms, drawn;
# - that the designed sets differ in more directions than mixtures do;
# - the precision that each number of runs would buy, before spending any.
