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
# This notebook draws the sets and asks, before the sweep:
#
# - why random sets teach next to nothing;
# - what each arm of the design can see;
# - how large the noise is;
# - how many runs are enough;
# - what choosing the sets would gain.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## Why not random sets?
#
# A set's mean of an indicator varies by the spread of the rows over the square root of their number: draw sets with pandas, and they all look alike.
# A slope is seen only where the means differ.
# So two arms are drawn.
# *Fusion*, as in the paper: every set mixes all sources by random weights.
# *Designed*: sets of one source, and of two or three, whose rows are drawn with a tilt along a direction of the indicator space.
# Where the profile asks for it, a third arm (*tokens*) holds the number of response tokens fixed instead of the number of rows; it answers one question of notebook 07, length or training tokens, and enters no other fit.

# %%
import json

import numpy as np
import pandas as pd
from IPython.display import Markdown

from instructmining import figures
from instructmining.design import gain
from instructmining.experiments import pilot
from instructmining.study import Study
from instructmining_core.regression.inference import effective_dimensions
from instructmining_core.regression.run_table import RankError

study = Study.open(profile)
columns, design, candidates = study.profile.rule_columns(), study.profile.design, study.candidate_scores
random_means = [candidates.sample(design.size, random_state=i)[columns].mean() for i in range(100)]

sets = study.draw_sets()
texts = [json.dumps(one.as_dict()) for one in sets]
study.save(pd.DataFrame({"set_id": [one.set_id for one in sets], "set": texts}), "sets.parquet")
frame = study.set_frame()
spread = {"single rows": candidates[columns].std(), "random sets": pd.DataFrame(random_means).std()}
spread |= {f"arm {arm}": part[columns].std() for arm, part in frame.groupby("arm")}
spread = pd.DataFrame(spread)
display(spread.round(3))
ratio = (spread / spread[["single rows"]].to_numpy()).median()
tilted = [name for name in ("arm within", "arm mixed", "arm fusion") if name in ratio]
Markdown(f"""
The means of random sets of {design.size} rows spread by {ratio['random sets']:.2f} of what single rows do (the median over indicators; one over the root of {design.size} is {design.size ** -0.5:.2f}).
Those of the design spread by {', '.join(f'{ratio[name]:.2f} in the {name}' for name in tilted)}: that is what the tilt buys.
There are {len(sets)} runs: {', '.join(f'{n} {arm}' for arm, n in pd.Series([one.arm for one in sets]).value_counts().items())}.
""")

# %% [markdown]
# A source gives at most 40 % of its rows to one set, rows are drawn without replacement, and every set has exactly the same number of rows, but for those of the arm *tokens*.
#
# ## What can each arm see?
#
# The *effective dimensions* of a design say in how many independent directions its sets differ.
# Mixtures of $S$ sources have at most $S-1$.

# %%
seen = pd.DataFrame(
    {arm: effective_dimensions(rows[columns] / candidates[columns].std()) for arm, rows in frame.groupby("arm")}
)
display(seen.round(2))
Markdown(f"""
Of {len(columns)} indicators the sets vary in {', '.join(f"{value:.1f} directions in the arm {arm}" for arm, value in seen.loc['participation'].items())}.
""")

# %% [markdown]
# ## How large is the noise?
#
# The design matrix is known before training; only the noise is not.
# So a pilot measures it: a few of the designed sets, each on several seeds.
# These are runs of the sweep of notebook 06, done ahead of it, and not done again there.

# %%
noise = pilot.run_pilot(study)
plans = pilot.pilot_plans(study)
if noise is None:
    noise = pilot.assumed(0.01)
known = pilot.noise_table(noise)
display(known.round(5))
Markdown(
    f"A pilot of {len(plans)} runs, {len({plan.label['set_id'] for plan in plans})} sets on further seeds, puts the noise between seeds at {noise.sd:.4f} [{noise.low:.4f}, {noise.high:.4f}] in log loss: two finetunes of one set differ by about {100 * np.sqrt(2) * noise.sd:.2f} % of the loss."
    if plans else "This design repeats no set, so there is no pilot: a standard deviation of 0.01 is assumed."
)

# %% [markdown]
# This is the least that the noise can be.
# What a straight line in the set means misses comes on top, and a pilot of so few sets can't see it; notebook 06 shows both and plans anew.
#
# ## How many runs are enough?
#
# The half-width of the 95 % interval of each slope can be computed for any number of runs.
# Since the noise is known from few runs only, each half-width has a band: where it will lie with 80 %, if the noise between seeds is all there is.

# %%
plan = pilot.planned_half_widths(study, frame, noise)
study.save(plan, "plan.parquet")
fitted = plan.dropna(subset="half_width")
if len(fitted):
    display(figures.plot_design_half_widths(plan))
last = fitted[fitted["runs"] == fitted.groupby("arm")["runs"].transform("max")]
Markdown("\n".join(
    f"With all {part['runs'].iloc[0]} runs of the {arm} arm the half-widths go from {part['half_width'].min():.4f} to {part['half_width'].max():.4f}, the widest that of {part.loc[part['half_width'].idxmax(), 'coefficient']}."
    for arm, part in last.groupby("arm")
) or "No number of runs of this design can be fitted: there is nothing to draw.")

# %% [markdown]
# How many designed runs bring a slope's half-width under a target?
# "Safe" asks that even the upper end of the band reaches it; an empty cell says that all the planned runs do not.
# For new sources, and for slopes between sources, more runs do not help: those rest on the number of sources, of which 8 are the least.

# %%
target = 0.01  # log loss per sd of a row: one per cent of the loss
words = "This design has no sets within sources, so no such slope can be planned for."
if frame["arm"].isin(pilot.ARMS["designed"]).any():
    within = pilot.arm_plan(study, frame, noise, every=10)
    needed = pilot.runs_needed(within, target)
    display(needed)
    words = f"For a half-width of {target}, {needed['safe'].notna().sum()} of {len(needed)} slopes are safe within the planned runs; the design has {within.sources} sources."
Markdown(words)

# %% [markdown]
# ## What would choosing the sets gain?
#
# The designed sets of a profile are a plain draw, or the D-optimal ones among many candidates if its `design.candidates` says so: those that make $\det(M^\top M)$ large, with a fifth left random {cite:p}`fedorov1972`.
# In words: the determinant of the design matrix $M$ times itself is large where the sets lie far apart in every direction.
# The gain is the plain draw's half-width over that of chosen sets, for the same number of runs, whatever the noise is.

# %%
try:
    gains = gain(candidates, design, columns, design.candidates or 1000)
    display(gains.round(3))
    words = f"Chosen sets would make the intervals {gains['gain'].median():.2f} times as narrow (the median over the coefficients); run here: {'the chosen sets' if design.candidates else 'the plain draw'}."
except RankError as error:
    words = f"Too few sets to choose by their information: {error}"
Markdown(words)

# %% [markdown]
# ## In this notebook we have seen
#
# - that random sets hardly differ, and how far the design pulls them apart;
# - in how many directions each arm varies;
# - the noise between seeds, by a pilot;
# - the precision that each number of runs would buy, and how many a target needs;
# - what sets chosen by their information would gain.
