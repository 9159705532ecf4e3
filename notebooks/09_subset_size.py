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
# Both are looked at here: the search, with its winner evaluated anew, and a curve with repeats.

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
# ## Search
#
# One trial is one finetune on the best $k$ rows; the search counts trials, not seconds, so that it can be repeated.

# %%
import pandas as pd

from instructmining import claims, experiments, figures
from instructmining.study import Study
from instructmining_core.regression.rule_card import load_rule
from instructmining_core.selection.size_curve import size_curve_power, size_curve_test, size_means
from instructmining_core.selection.size_search import blendsearch

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
pool = experiments.size_pool(study)
sizes = study.profile.size
trials = blendsearch(
    experiments.size_trial(study, rule, pool),
    sizes.low,
    sizes.high,
    sizes.trials,
    seed=0,
)
study.save(trials, "search.parquet")
trials.round(4)

# %%
figures.plot_search_trials(trials)
# %% [markdown]
# The best of several noisy trials flatters.
# The size found is therefore trained again, on other seeds, within the curve below.

# %%
best = int(trials.loc[trials["loss"].idxmin(), "size"])
print(
    f"pool: {pool}; best size in the search: {best} of {len(study.data.pools[pool])} rows"
)

# %% [markdown]
# ## The curve, with repeats
#
# Random draws and the rule's best rows, at each size, several times each.
# The number of *epochs* is fixed, so larger sets also take more steps.

# %%
runs = study.run("size", experiments.size_plans(study, rule, pool, best))
study.save(runs[experiments.GATE_COLUMNS], "sizes.parquet")
means = size_means(runs, loss="loss_eval_2")
means.round(4)

# %%
figures.plot_size_curve(runs)
# %% [markdown]
# ## Does it fall, rise and fall?
#
# For any four sizes in order, the test takes the smallest of three steps: the fall from the first to the second, the rise to the third, the fall to the fourth.
# Its statistic is the largest such value over all fours, held against what noise alone would give to the worst curve that does not fall, rise and fall.

# %%
random_runs = runs.query("method == 'random'")
bump = size_curve_test(random_runs, loss="loss_eval_2", seed=0)
pd.Series(vars(bump), name="value").to_frame()

# %% [markdown]
# Its power: how large a bump would this design have found?
# The front page names the smallest of these with a power of 80 %.

# %%
draws = study.profile.size.draws
power = pd.Series(
    {
        b: size_curve_power(
            b, sizes=random_runs["size"].nunique(), draws_each=draws
        )
        for b in (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    },
    name="power",
)
power.rename_axis("bump, in seed-sd").to_frame().round(2)

# %%
rows = len(study.data.pools[pool])
small_is_best = claims.size_claim(means, best, rows, trials, sizes.high)
study.record_claim("small_is_best", **small_is_best)
study.record_claim("double_descent", **claims.bump_claim(bump, power.to_dict()))
small_is_best

# %% [markdown]
# ## In this notebook we have seen
#
# - a search for the size, counted in trials;
# - the curves of selected and random rows, with repeats;
# - whether a rise can be told from noise, and how large a rise could have been.
