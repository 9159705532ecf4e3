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
# # Does the rule choose better rows than chance, or than length alone?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/08_selection.ipynb)
#
# A rule is worth something if the rows it selects train a better model than random rows do.
# The paper compares one selected set with one random set.
# Here every contrast has repeats, an interval, the difference that it could have detected, and rivals that cost nothing.

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
# ## Select from every pool
#
# From each pool we take the rows with the lowest predicted log loss, and beside them random draws, the longest, the shortest, the least perplexing, the best rewarded and the least compressible rows.

# %%
import pandas as pd

from instructmining_core import claims, experiments, figures, verify
from instructmining_core.card import load_rule
from instructmining_core.rule_compare import compare_rules
from instructmining_core.study import Study

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
plans = experiments.gate_plans(study, rule)
experiments.describe(plans)

# %% [markdown]
# How much do the methods choose alike?
# The Jaccard index of two selections is the number of rows in both over the number in either.

# %%
experiments.overlap(plans).round(2)

# %% [markdown]
# ## Does the rule reach these rows?
#
# A rule is fitted on means of sets and carried to rows by a straight line.
# For each pool: how far its mean lies from the design, and how many rows leave the range of the rows that the rule was fitted on.

# %%
support = {
    pool: rule.support(study.pool_scores(pool)).loc["all"] for pool in study.data.pools
}
pd.DataFrame(support).T

# %% [markdown]
# ## The published rules on the same rows
#
# The coefficients of v1 and v3 belong to the paper's models.
# Where ours are others, they run in *published form*, and only the likeness of the rankings may be read.

# %%
rules = {"fitted": rule, "v1": load_rule("v1"), "v3": load_rule("v3")}
pairs, apart = compare_rules(rules, study.scores, top=study.profile.selection.size)
pairs["published form, other models"] = (pairs["notes_1"] + pairs["notes_2"]) != ""
display(pairs.drop(columns=["notes_1", "notes_2"]).round(2))
apart.head(5).round(2)

# %% [markdown]
# ## Finetune on each

# %%
runs = study.run("gate", plans)
study.save(runs[experiments.GATE_COLUMNS], "comparison.parquet")
table = verify.selection_table(runs)
table.round(4)

# %% [markdown]
# The losses above have the shape of the paper's Table 3, with repeats; `_half` is the half-width of the 95 % interval of the mean.

# %%
figures.selected_random(runs)
# %% [markdown]
# ## The primary contrast
#
# One contrast for each pool was fixed beforehand: selected against random, one size, on the evaluation set that was *not* used to fit the rule.
# Difference is the relative change of the loss, negative when the selection is better; `p_holm` is adjusted for the number of pools.

# %%
contrasts = verify.compare(runs, loss="loss_eval_2")
shown = ["pool", "difference", "low", "high", "detectable", "p_holm", "verdict"]
contrasts.query("role == 'primary'")[shown].round(4)

# %% [markdown]
# ## Every rival against random

# %%
rivals = contrasts.query("role != 'primary' and versus == 'random'")
rivals[["pool", "method", "difference", "low", "high", "verdict"]].round(4)

# %% [markdown]
# ## Does the rule beat length alone?
#
# Length costs nothing, and which end of it serves better depends on the pool and on the evaluation set; a rule has to beat the better one.

# %%
against = {
    end: verify.beats_length(runs, length=end) for end in ("longest", "shortest")
}
for end, found in against.items():
    print(
        f"{end}: {found.answer}, {claims.percent(found.difference, found.low, found.high)}"
    )

# %% [markdown]
# ## Do the rows look different?

# %%
experiments.selected_means(study, plans).round(2)

# %%
study.claim("selected_beats_random", **claims.contrasts_claim(contrasts))
study.claim("beats_length", **claims.length_claim(against))

# %% [markdown]
# ## In this notebook we have seen
#
# - selections and rivals on every pool, with repeats;
# - the verdict on selected against random, with the difference that it could have detected;
# - whether the rule earns its cost beside length alone.
