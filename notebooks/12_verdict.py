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
# # What is true, what is not, and what can't be known from this run?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/12_verdict.ipynb)
#
# This notebook asks the embedded corpus for the truth, where there is one, and then goes through the claims one by one.

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
# ## Does the loss measure quality?
#
# Rows are replaced by their defective twins, a growing share of them, and nothing else changes.
# If a defect harms, the loss rises with the dose.

# %%
import pandas as pd

from instructmining import claims, figures, planted_defects, tables
from instructmining.embedded import ground_truth
from instructmining.embedded.defects import SEEN_KINDS
from instructmining.study import Study
from instructmining_core.regression.intervals import significant
from instructmining_core.regression.rule_card import load_rule

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
planted = planted_defects.planted(study)
if planted:
    doses = planted_defects.dose_runs(study)
    study.save(doses[planted_defects.DOSE_COLUMNS], "doses.parquet")
    effects = ground_truth.dose_effects(doses)
    harmful = effects.index[effects["harms"]]
    display(significant(effects))
    display(figures.plot_dose_response(doses, harms=harmful, seen=SEEN_KINDS))
else:
    print("Real data: no defects are planted, so there is no truth to ask for.")

# %% [markdown]
# One fit over all runs, with a level of its own for every dose, gives the change of the log loss at the full dose (`slope`), and table and figure both take from it which kinds *harm*: those whose interval lies above zero.
# A kind that was not seen to harm the loss is a negative control: one that the rule should *not* find.
#
# ## Does the rule find the defective twin?
#
# Each defective row has a clean twin.
# The AUC within twins is how often the rule ranks the clean one better: 0.5 is chance, 1 is perfect.
# The reward and evaluator models have seen some of the kinds during their own training and never the others, and the rule was fitted to sets of the candidates but not to the pools: all four groups stand apart.
# The figure takes fitted and unseen rows together, kind by kind; the table below it sets them apart.
# The loss oracle knows what each kind costs and nothing of kinds that cost nothing; the oracle knows the label.

# %%
if planted:
    auc = planted_defects.auc_of_study(study, rule, effects)
    study.save(auc, "truth.parquet")
    display(figures.plot_twin_auc(ground_truth.over_libraries(auc)))

# %%
planted_defects.auc_table(auc) if planted else "-"

# %% [markdown]
# Does the rule find the kinds that harm, and keep off those that don't?
# A negative control whose AUC lies above 0.5 with its whole interval is found all the same.

# %%
if planted:
    display(significant(planted_defects.by_kind(auc, effects)))

# %% [markdown]
# Is the rule better than each rival, library by library, on kinds that no stand-in has seen?
# The difference of AUC, with its interval over libraries.

# %%
if planted:
    found = planted_defects.defects_found(auc, effects)
    study.record_claim("finds_defects", **claims.defects_claim(found))
    print(f"The harder end of length to beat is the {found['rival']} row.")
    print(f"Furthest ahead in {found['kind']}: {found['kind_rival']:.0%} of the pairs,")
    print(f"the rule {found['kind_rule']:.0%}.")
    display(significant(planted_defects.rule_against(auc)))

# %% [markdown]
# ## Does a win come from the defects?
#
# The gate of notebook 08, pool by pool: how many of the pool's rows are defective, how many of those that the rule selects and that a random draw takes, and the relative difference of the loss.
# In the pool without defects there is nothing to avoid, and no win is expected; a win there says that the rule gains by something else than the planted defects, and so may its wins in the other pools.

# %%
if planted:
    pools = planted_defects.defect_pools(study, rule)
    study.record_claim("no_win_without_defects", **claims.clean_pool_claim(pools))
    display(significant(pools))

# %% [markdown]
# ## The negative control
#
# The indicators of the rows are shuffled within each source, so that they mean nothing, and the whole procedure runs again, many times.
# About one shuffle in twenty should be "significant" at 5 %.
# Sets drawn from one source share rows, so their losses and even their shuffled means are alike, and runs can't be exchanged freely.
# Both tests of notebook 07 are tried, the one that counts shared rows and the one that does not; and the study's own $R^2$ is held against the shuffles as well, which share rows in just the same way.
# A test keeps its level where the interval of its share of significant shuffles holds 0.05; where it lies above, its p is not to be believed.
# The control stops at the test: nothing is selected or finetuned by a shuffled rule.

# %%
control = tables.negative_control(study)
significant(control).T

# %% [markdown]
# ## Claim by claim

# %%
if planted:
    study.record_claim("loss_is_quality", **claims.dose_claim(effects))
verdict = claims.verdicts(study)
study.save(verdict, "verdict.csv")
with pd.option_context("display.max_colwidth", None):
    display(verdict.drop(columns="claim"))

# %% [markdown]
# Every verdict stands beside the smallest effect that this run could have detected.
# "Undecided" means that the run was too small to tell, not that there is nothing.
#
# ## In this notebook we have seen
#
# - which defects harm the loss, and by how much;
# - how well the rule finds them, beside length, perplexity and the rest, and whether it keeps off those that do no harm;
# - whether the selected rows win where there is no defect to avoid;
# - a verdict on every claim of the paper, for this run's models and data.
