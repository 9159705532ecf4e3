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
# # How many rows are enough, and does the loss rise again?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/09_subset_size.ipynb)
#
# The paper searches the size of the selected set with BlendSearch {cite:p}`wang2021blendsearch` and reports that the loss falls, rises and falls again as the set grows.
# We ask:
#
# - which size a search finds, and whether its winner holds when it is trained anew;
# - how the loss runs with the size, with repeats;
# - whether it falls, rises and falls, and how large a rise could have been seen.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## Which size does a search find?
#
# One trial is one finetune on the best $k$ rows.
# Trying sizes and keeping the lowest loss is what anybody would do; BlendSearch only chooses the next size by what it has seen.
# The search counts trials, not seconds, so that it can be repeated.

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown

from instructmining import claims, experiments, figures
from instructmining.study import Study
from instructmining_core import load_rule
from instructmining_core.selection.size_curve import size_curve_power, size_curve_test, size_means
from instructmining_core.selection.size_search import blendsearch

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
pool, sizes = experiments.size_pool(study), study.profile.size
rows = len(study.data.pools[pool])
loss_at = experiments.size_trial(study, rule, pool)  # size -> loss of one finetune

one = loss_at(sizes.low)  # by hand; the search starts there too
trials = blendsearch(loss_at, sizes.low, sizes.high, sizes.trials, seed=0)
study.save(trials, "search.parquet")
best = int(trials.loc[trials["loss"].idxmin(), "size"])
display(figures.plot_search_trials(trials))
Markdown(f"""
By hand, the best {sizes.low} rows of the pool “{pool}” end at {one:.4f} nats.
The search tries {trials['size'].nunique()} sizes in {len(trials)} trials, from {trials['size'].min()} to {trials['size'].max()} rows, and ends at {best} of {rows} rows with {trials['loss'].min():.4f}.
""")

# %% [markdown]
# The best of several noisy trials flatters.
# The size found is therefore trained again, on other seeds, within the curve below.
#
# ## How does the loss run with the size?
#
# Random draws and the rule's best rows, at each size, several times each.
# The number of *epochs* is fixed, so larger sets also take more steps.
# A `groupby` gives the curve; the core adds its intervals, with one noise pooled over the sizes so that two draws a size are enough.

# %%
runs = study.run("size", experiments.size_plans(study, rule, pool, best))
study.save(runs[experiments.GATE_COLUMNS], "sizes.parquet")
means = size_means(runs, loss="loss_eval_2")
by_hand = runs.assign(log=np.log(runs["loss_eval_2"])).groupby(["method", "size"])["log"].mean()
np.testing.assert_allclose(np.exp(by_hand), means.set_index(["method", "size"]).loc[by_hand.index, "mean"])
display(means.round(4))
curve = means.pivot(index="size", columns="method", values="mean")
ahead = curve["selected"] / curve["random"] - 1
Markdown(f"""
Both give the same means.
Selected rows have the lower mean loss at {(ahead < 0).sum()} of {len(ahead)} sizes; the difference is most in their favour at {ahead.idxmin()} rows ({100 * ahead.min():+.2f} %). The lowest loss of all is that of {curve.min().idxmin()} rows at size {curve[curve.min().idxmin()].idxmin()}.
""")

# %%
figures.plot_size_curve(runs)

# %% [markdown]
# ## Does it fall, rise and fall?
#
# For any four sizes in order, the test takes the smallest of three steps: the fall from the first to the second, the rise to the third, the fall to the fourth.
# Its statistic is the largest such value over all fours, held against what noise alone would give to the worst curve that does not fall, rise and fall.
# Its power says how large a bump this design would have found.

# %%
random_runs = runs.query("method == 'random'")
bump = size_curve_test(random_runs, loss="loss_eval_2", seed=0)
power = pd.Series({
    b: size_curve_power(b, sizes=random_runs["size"].nunique(), draws_each=sizes.draws)
    for b in (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
}, name="power").rename_axis("bump, in seed-sd")
display(power.to_frame().round(2))
enough = power.index[power >= 0.8]
Markdown(f"""
The largest rise of the random curve is {100 * bump.rise:+.1f} % of the loss, between sizes {bump.sizes[1]} and {bump.sizes[2]}, and p = {bump.p:.2f}: {'the curve falls, rises and falls' if bump.p < 0.05 else 'it can’t be told from noise'}.
{f"A bump of {enough[0]:g} seed standard deviations" if len(enough) else "Not even a bump of 8 seed standard deviations"} would have been found four times in five.
""")

# %% [markdown]
# ## What do we conclude?

# %%
small_is_best = claims.size_claim(means, best, rows, trials, sizes.high)
study.record_claim("small_is_best", **small_is_best)
study.record_claim("double_descent", **claims.bump_claim(bump, power.to_dict()))
Markdown(f"""
A small part of the data is the best size: **{small_is_best['verdict']}**.
What we observe is {small_is_best['ours']}; what could have been seen is {small_is_best['detectable']}.
""")

# %% [markdown]
# ## In this notebook we have seen
#
# - a search for the size, counted in trials, and its winner trained anew;
# - the curves of selected and random rows, with repeats;
# - whether a rise can be told from noise, and how large a rise could have been seen.
