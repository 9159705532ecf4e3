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
# A method that likes long answers trains on more tokens at the same number of rows.
# So every rival runs twice: with as many *rows* as the selection, and, under a name that ends in `_tokens`, with as many *target tokens*.

# %%
import pandas as pd

from instructmining import claims, experiments, figures, reports
from instructmining.study import Study
from instructmining_core.regression.rule_card import load_rule
from instructmining_core.selection import beat_random
from instructmining_core.selection.beat_random import answers_table, both_ends
from instructmining_core.selection.select import compare_rules
from instructmining_core.selection.support import support

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
plans = experiments.gate_plans(study, rule)
experiments.count_plans(plans).round(1)

# %% [markdown]
# How much do the methods choose alike, at equal rows?
# The Jaccard index of two selections is the number of rows in both over the number in either.

# %%
at_equal_rows = [p for p in plans if not p.label["method"].endswith("_tokens")]
experiments.method_overlap(at_equal_rows).round(2)

# %% [markdown]
# ## Does the rule reach these rows, and has it seen them?
#
# A rule is fitted on means of sets and carried to rows by a straight line.
# For each pool: what it is to the rule, how far its mean lies from the design, and how many rows leave the range of the rows that the rule was fitted on.

# %%
kinds = {
    pool: reports.pool_kind(study.pool_scores(pool), rule, study.candidate_scores)
    for pool in study.data.pools
}
reach = {
    pool: support(rule, study.pool_scores(pool)).loc["all"] for pool in study.data.pools
}
pd.DataFrame(reach).T.assign(pool={pool: kind.name for pool, kind in kinds.items()})

# %% [markdown]
# ## The published rules on the same rows
#
# The coefficients of v1 and v3 belong to the paper's models.
# Where ours are others, they run in *published form*, and only the likeness of the rankings may be read.
# Ranks are among the rows of the pools, which no set was drawn from.

# %%
rules = {"fitted": rule, "v1": load_rule("v1"), "v3": load_rule("v3")}
rows = experiments.all_pool_rows(study)
pairs, apart = compare_rules(rules, rows, top=study.profile.selection.size)
for name, one in rules.items():
    differing = one.check(rows.attrs, allow_mismatch=True)
    print(f"{name}: {'; '.join(differing) or 'scored by the models it was fitted with'}")
pairs[["rule_1", "rule_2", "spearman", "jaccard"]].round(2)

# %% [markdown]
# The rows on which the rules part most: each rule's rank (0 is best, 1 worst), and the indicators that decide it.

# %%
apart.join(rows[list(study.profile.indicators)]).head(8).round(2)

# %% [markdown]
# ## Finetune on each

# %%
runs = study.run("gate", plans)
study.save(runs[experiments.GATE_COLUMNS], "comparison.parquet")
table = beat_random.selection_table(runs)
table.round(4)

# %% [markdown]
# The losses above have the shape of the paper's Table 3, with repeats; `_half` is the half-width of the 95 % interval of the mean.
# `tokens_trained` counts the target tokens of all epochs, `rows` and `steps` are means over the finetunes.

# %%
figures.plot_selected_random(beat_random.by_budget(runs)["equal rows"])
# %% [markdown]
# ## The primary contrast, at equal rows and at equal tokens
#
# One contrast for each pool was fixed beforehand: selected against random, one size, on the evaluation set that was *not* used to fit the rule.
# Difference is the relative change of the loss, negative when the selection is better; `p_holm` is adjusted for the number of pools.
# The interval from `low` to `high` speaks of these prompts, that from `low_prompts` to `high_prompts` takes the prompts too as drawn at random.
# `detectable` is the difference that this many runs would have found with 80 % power.
# `p_margin` asks another question: below 0.05, the difference is smaller than 1 %, whatever its sign, and the verdict says so.

# %%
prompts = experiments.per_example(study, runs)
contrasts = beat_random.compare_budgets(runs, prompts, loss="loss_eval_2")
numbers = ["difference", "low", "high", "low_prompts", "high_prompts", "detectable"]
shown = ["budget", "pool", *numbers, "p_holm", "p_margin", "verdict"]
primary = contrasts.query("role == 'primary'")
primary[shown].round(4)

# %% [markdown]
# In how many pools is the selection better, at equal rows and at equal tokens?
# Where only equal rows show an advantage, it may be one of how many tokens are trained on, and not of which; where both do, it is not one of the number of tokens.
# At equal tokens the random sets have another number of rows and of optimisation steps.

# %%
better = primary["verdict"].str.startswith("better")
better.groupby(primary["budget"], sort=False).agg(better="sum", pools="size")

# %% [markdown]
# ## Selected against every rival
#
# The rivals cost nothing or little; `full` is the whole pool.

# %%
secondary = contrasts.query("role != 'primary'")
against_rivals = secondary.query("method == 'selected'")
against_rivals[["budget", "pool", "versus", *numbers, "verdict"]].round(4)

# %% [markdown]
# And every rival against random:

# %%
rivals = secondary.query("versus == 'random'")
rivals[["budget", "pool", "method", *numbers, "verdict"]].round(4)

# %% [markdown]
# ## Does the rule beat length alone?
#
# Length costs nothing, and which end of it serves better depends on the pool and on the evaluation set; a rule has to beat the better one.
# The pools of one seed share the adapter's first values, the order and the prompts, so they are averaged within a seed, and the seeds are counted.

# %%
against = both_ends(runs, prompts)
answers_table(against)[["answer", *numbers, "p_margin", "seeds"]].round(4)

# %% [markdown]
# ## With the rule's own uncertainty
#
# The contrasts above are of *one* rule, which came out of one sweep.
# Here the sweep's sets are drawn again within their sources, a rule is refitted each time, and each refit selects its own rows and is finetuned once.
# First, how many of the rule's rows the refits choose too; then the refits against the random draws.

# %%
cards = experiments.refit_cards(study, study.profile.selection.refits)
refit_plans = experiments.refit_plans(study, cards)
refitted = study.run("refit", refit_plans)
own = {p.label["pool"]: p.row_hashes for p in plans if p.label["method"] == "selected"}
experiments.refit_agreement(refit_plans, own).round(2)

# %%
wider = pd.concat([refitted, runs[runs["method"] == "random"]])
with_refits = beat_random.compare_with_random(
    wider, per_example=experiments.per_example(study, wider), selected="refit"
)
with_refits[["pool", *numbers, "p_holm", "p_margin", "verdict"]].round(4)

# %% [markdown]
# ## The verdict
#
# The page that `instructmining select --verify` writes for a reader's own data, here for the primary contrasts of these pools.

# %% tags=["hide-input"]
from IPython.display import Markdown

Markdown(reports.verdict_markdown(primary, kinds, rule))

# %%
study.record_claim("selected_beats_random", **claims.contrasts_claim(contrasts, with_refits))
study.record_claim("beats_length", **claims.length_claim(*against.values()))
experiments.selected_means(study, at_equal_rows).round(2)

# %% [markdown]
# The last table shows how the rows look that each method takes: means of the indicators over all pools.
#
# ## In this notebook we have seen
#
# - selections and rivals on every pool, with repeats, at equal rows and at equal tokens;
# - the verdict on selected against random, with the difference that it could have detected, with the prompts taken as drawn, and with the rule refitted;
# - whether the rule earns its cost beside length alone, and beside the whole pool.
