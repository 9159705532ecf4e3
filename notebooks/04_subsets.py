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
# Where the profile asks for it, a small third arm (*tokens*) holds the number of response tokens fixed instead of the number of rows; it answers one question of notebook 07, length or training tokens, and enters no other fit.

# %%
import json

import pandas as pd

from instructmining import figures
from instructmining.study import Study

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
# A source gives at most 40 % of its rows to one set, rows are drawn without replacement, and every set has exactly the same number of rows, but for those of the arm *tokens*.

# %%
frame = study.set_frame()
frame.groupby("arm")[columns].std().T.round(3)

# %% [markdown]
# ## What each arm can see
#
# The *effective dimensions* of a design say in how many independent directions its sets differ.
# Mixtures of $S$ sources have at most $S-1$.

# %%
from instructmining_core.regression.inference import effective_dimensions

constants = study.candidate_scores[columns].std()
pd.DataFrame(
    {
        arm: effective_dimensions(rows[columns] / constants)
        for arm, rows in frame.groupby("arm")
    }
).round(2)

# %% [markdown]
# ## How large is the noise?
#
# The design matrix is known before training; only the noise is not.
# So a pilot measures it: 4 of the designed sets, each on 3 seeds.
# These are runs of the sweep of notebook 06, done ahead of it, and not done again there.

# %%
from instructmining import pilot

noise = pilot.run_pilot(study)
if noise is None:
    noise = pilot.assumed(0.01)
    print("This design repeats no set, so there is no pilot: a sd of 0.01 is assumed.")
else:
    plans = pilot.pilot_plans(study)
    sets_run = len({plan.label["set_id"] for plan in plans})
    print(f"a pilot of {len(plans)} runs: {sets_run} sets on further seeds")
    if sets_run < pilot.PILOT_SETS:
        print(
            f"The design repeats {sets_run} sets only, fewer than the {pilot.PILOT_SETS} of a full pilot."
        )
pilot.noise_table(noise).round(5)

# %% [markdown]
# This is the standard deviation of the log loss *between seeds* of one set, with its 95 % bounds.
# It is the least that the noise can be.
# What a straight line in the set means misses comes on top, and a pilot of so few sets can't see it; notebook 06 shows both and plans anew.
#
# ## How many runs are enough?
#
# The half-width of the 95 % interval of each slope can be computed for any number of runs.
# Since the noise is known from few runs only, each half-width has a band: in brackets where it will lie with 80 %, if the noise between seeds is all there is.

# %%
plan = pilot.planned_half_widths(study, frame, noise)
pilot.in_cells(plan)

# %% [markdown]
# A fusion arm sees the slopes mostly through differences between sources; "none" says that so few sets can't tell the indicators apart at all.

# %%
if plan["half_width"].notna().any():
    display(figures.plot_design_half_widths(plan))
else:
    print("No number of runs of this design can be fitted: there is nothing to draw.")
# %% [markdown]
# How many designed runs bring a slope's half-width under a target?
# "Safe" asks that even the upper end of the band reaches it; an empty cell says that all the planned runs do not.
# After 30 runs the noise is known better, and the plan is worth making anew.
# For new sources, and for slopes between sources, more runs do not help: those rest on the number of sources, of which 8 are the least.

# %%
target = 0.01  # log loss per sd of a row: one per cent of the loss
if frame["arm"].isin(pilot.ARMS["designed"]).any():
    within = pilot.arm_plan(study, frame, noise, every=10)
    print(f"target half-width {target}, {within.sources} sources")
    display(pilot.runs_needed(within, target))
else:
    print("This design has no sets within sources, so no such slope can be planned for.")

# %% [markdown]
# ## What would choosing the sets gain?
#
# The designed sets of a profile are a plain draw, or the D-optimal ones among many candidates if its `design.candidates` says so: those that make $\det(M^\top M)$ of the design matrix $M$ large, with a fifth left random {cite:p}`fedorov1972`.
# The gain is the plain draw's half-width over that of chosen sets, for the same number of runs, whatever the noise is.

# %%
from instructmining.design import gain
from instructmining_core.regression.run_table import RankError

design = study.profile.design
try:
    gains = gain(study.candidate_scores, design, columns, design.candidates or 1000)
    print(f"median gain over the coefficients: {gains['gain'].median():.2f}")
    print("run here:", "the chosen sets" if design.candidates else "the plain draw")
    display(gains.round(3))
except RankError as error:
    print(f"Too few sets to choose by their information: {error}")

# %% [markdown]
# ## In this notebook we have seen
#
# - the two arms, drawn;
# - that the designed sets differ in more directions than mixtures do;
# - the noise between seeds, by a pilot;
# - the precision that each number of runs would buy at that noise, and how many runs a target needs.
