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
# - which size a search finds, whether it beats random draws of the same cost, and whether its winner holds when it is trained anew;
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
# Its first trials span the whole range, so that no budget ends before the large sizes were looked at; the search counts trials and rows, not seconds, so that it can be repeated and goes on after a stop.
# Beside it stand random sizes that cost as many rows.
# Both search on the first evaluation set, so that the second can report: the paper reports the set that it searched on.

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown

from instructmining import claims, figures, reports
from instructmining.experiments import comparisons
from instructmining.study import Study
from instructmining_core import load_rule
from instructmining_core.selection.size import (
    blendsearch,
    random_search,
    search_report,
    simulated_searches,
    size_curve_power,
    size_curve_test,
    size_means,
)

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
pool, sizes = comparisons.size_pool(study), study.profile.size
rows = len(study.data.pools[pool])
loss_at = comparisons.size_trial(study, rule, pool)  # size -> loss of one finetune

one = loss_at(sizes.low)  # by hand; the search starts there too
trials = blendsearch(loss_at, sizes.low, sizes.high, sizes.trials, seed=0)
drawn = random_search(loss_at, sizes.low, sizes.high, int(trials["cost"].iloc[-1]), seed=0)
searches = {table["search"].iloc[0]: table for table in (trials, drawn)}
study.save(pd.concat(searches.values()), "search.parquet")
found = {name: int(table["best_size"].iloc[-1]) for name, table in searches.items()}
best = found["BlendSearch"]
display(figures.plot_search_trials(pd.concat(searches.values())))
Markdown(f"""
By hand, the best {sizes.low} rows of the pool “{pool}” end at {one:.4f} nats.
BlendSearch tries {len(trials)} sizes from {trials['size'].min()} to {trials['size'].max()} rows and ends at {best} of {rows} rows with {trials['best_loss'].iloc[-1]:.4f}.
Random search trains on {drawn['cost'].iloc[-1]} rows where BlendSearch took {trials['cost'].iloc[-1]}, and ends at {found['random search']} rows with {drawn['best_loss'].iloc[-1]:.4f}.
""")

# %% [markdown]
# The best of several noisy trials flatters.
# The sizes found are therefore trained again, on other seeds, within the curve below.
#
# ## How does the loss run with the size?
#
# Random draws and the rule's best rows, at each size, several times each.
# The number of *epochs* is fixed, so larger sets also take more steps.
# A `groupby` gives the curve; the core adds its intervals, with one noise pooled over the sizes so that two draws a size are enough.

# %%
plans = comparisons.size_plans(study, rule, pool, list(found.values()))
runs = study.run("size", plans)
study.save(runs[comparisons.GATE_COLUMNS], "sizes.parquet")
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
# ## How much did the searches flatter?
#
# Each winner on other seeds: the loss that was searched on, whose difference from what the search saw is its *optimism*, and the loss of the evaluation set that no search saw.
# One search says little of the method, so both are run many times on the measured curve with its measured noise, where the truth is known: `excess` is what the chosen size costs above the best one.

# %%
selected = runs.query("method == 'selected'")
report = search_report(searches, selected, searched="loss_eval_1", reported="loss_eval_2")
display(report.round(4))
noise = np.sqrt(np.log(selected["loss_eval_1"]).groupby(selected["size"]).var().mean())
words = "With one run a size there is no noise to simulate with."
if np.isfinite(noise):
    curve_1, repeats = size_means(selected, loss="loss_eval_1"), 20
    simulated = simulated_searches(curve_1, noise, sizes.low, sizes.high, sizes.trials, repeats)
    display(simulated.round(4))
    excess = simulated["excess"]["mean"]
    words = f"Over {repeats} simulated searches BlendSearch ends {excess['BlendSearch']:.4f} nats above the best size and random search {excess['random search']:.4f}, and what BlendSearch reports of itself is {simulated['optimism']['mean']['BlendSearch']:+.4f} nats too good."
Markdown(f"""
Trained anew, BlendSearch's {best} rows end at {report.loc['BlendSearch', 'anew']:.4f} nats, {report.loc['BlendSearch', 'optimism']:+.4f} from what it saw; on the other evaluation set at {report.loc['BlendSearch', 'reported']:.4f}, random search's at {report.loc['random search', 'reported']:.4f}.
{words}
""")

# %% [markdown]
# ## The same sets at equal steps
#
# More rows at fixed epochs are also more steps, so the curve above is of both.
# Where the profile asks for it (`size.fixed_steps`), every set is trained once more for one number of steps: small sets are seen more often, and what is left is the number of different rows.

# %%
curves, words = {"fixed epochs": runs}, "The profile does not ask for the curve at fixed steps."
if sizes.fixed_steps:
    curves["fixed steps"] = study.run("size_steps", comparisons.at_fixed_steps(study, plans))
    study.save(pd.concat(curves.values())[comparisons.GATE_COLUMNS], "sizes.parquet")
    display(figures.plot_size_curve(curves["fixed steps"]))
    low_high = {name: part.query("method == 'selected'").groupby("size")["loss_eval_2"].mean().iloc[[0, -1]] for name, part in curves.items()}
    words = "From the smallest to the largest set of selected rows the loss changes by " + ", ".join(f"{pair.iloc[1] - pair.iloc[0]:+.4f} nats at {name}" for name, pair in low_high.items()) + "."
Markdown(words)

# %% [markdown]
# ## Does it fall, rise and fall?
#
# For any four sizes in order, the test takes the smallest of three steps: the fall from the first to the second, the rise to the third, the fall to the fourth.
# Its statistic is the largest such value over all fours, held against what noise alone would give to the worst curve that does not fall, rise and fall.
# Its power says how large a bump this design would have found.
# It needs four sizes and repeats at them.

# %%
tested = {f"{method}, {name}": part.query("method == @method") for name, part in curves.items() for method in ("random", "selected")}
testable = runs["size"].nunique() >= 4 and sizes.draws > 1
words, double_descent = "Too few sizes or repeats for the test.", {"ours": "too few sizes or repeats", "detectable": "-", "verdict": reports.NOT_ASKED}
if testable:
    bumps = {name: size_curve_test(part, loss="loss_eval_2", seed=0) for name, part in tested.items()}
    display(pd.DataFrame({name: vars(one) for name, one in bumps.items()}).T)
    power = pd.Series({b: size_curve_power(b, sizes=runs["size"].nunique(), draws_each=sizes.draws) for b in (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)}, name="power").rename_axis("bump, in seed-sd")
    display(power.to_frame().round(2))
    enough, bump = power.index[power >= 0.8], bumps["random, fixed epochs"]
    double_descent = claims.bump_claim(bump, power.to_dict())
    words = f"""
The largest rise of the random curve at fixed epochs is {100 * bump.rise:+.1f} % of the loss, between sizes {bump.sizes[1]} and {bump.sizes[2]}, and p = {bump.p:.2f}: {'the curve falls, rises and falls' if bump.p < 0.05 else 'it can’t be told from noise'}.
Of {len(bumps)} curves {sum(one.falls_rises_falls for one in bumps.values())} fall, rise and fall.
{f"A bump of {enough[0]:g} seed standard deviations" if len(enough) else "Not even a bump of 8 seed standard deviations"} would have been found four times in five."""
Markdown(words)

# %% [markdown]
# ## What do we conclude?

# %%
small_is_best = claims.size_claim(means, best, rows, trials, sizes.high)
study.record_claim("small_is_best", **small_is_best)
study.record_claim("double_descent", **double_descent)
Markdown(f"""
A small part of the data is the best size: **{small_is_best['verdict']}**.
What we observe is {small_is_best['ours']}; what could have been seen is {small_is_best['detectable']}.
""")

# %% [markdown]
# ## In this notebook we have seen
#
# - two searches for the size at one cost, and how much they flatter;
# - the curves of selected and random rows, with repeats, at fixed epochs and where asked for at fixed steps;
# - whether a rise can be told from noise, and how large a rise could have been seen.
