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
# # Does the gain survive another way of finetuning, or another base?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/10_robustness.ipynb)
#
# A rule that works only for the setting it was fitted in is a description of that setting.
# The paper changes the base and the method of finetuning, one run each; here each has repeats.

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
# ## Other methods and other bases
#
# The same pool, the same rule, the same sizes; only the finetune changes.

# %%
import pandas as pd

from instructmining import claims, experiments, figures, paper, tables
from instructmining.study import Study
from instructmining_core.regression.intervals import significant
from instructmining_core.regression.rule_card import load_rule
from instructmining_core.regression.run_table import Standardizer
from instructmining_core.selection import beat_random

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
runs = pd.concat(
    [
        study.run("robustness", plans, **setting)
        for setting, plans in experiments.robustness_plans(study, rule)
    ]
)
study.save(runs[experiments.GATE_COLUMNS], "robustness.parquet")
contrasts = beat_random.compare_with_random(runs, loss="loss_eval_2")
contrasts[
    [
        "pool",
        "n",
        "mean",
        "mean_versus",
        "difference",
        "low",
        "high",
        "detectable",
        "verdict",
    ]
].round(4)

# %%
figures.plot_selected_random(runs)
# %% [markdown]
# The paper's Table 6, for comparison: one run a cell.

# %%
paper.table_6()

# %% [markdown]
# ## Does the rule carry over to other prompts, and to another base?
#
# The score of a set by the rule, beside the shares of its sources, should predict the log loss of another setting with slope one.
# The second evaluation set costs nothing, its losses are in the ledger; further bases are finetuned on the same sets where the profile asks for it.
# The first row is the setting that the rule was fitted in, where the slope is one by construction.

# %%
settings = tables.transfer_settings(study)
slopes = tables.transfer_table(settings, rule)
study.save(slopes, "transfer.parquet")
print(slopes.attrs["note"])
if not study.profile.robustness.transfer:
    print("This profile asks for no further base (`robustness.transfer`).")
significant(slopes)

# %% [markdown]
# ## Which coefficients hold?
#
# The rule is fitted anew in every setting, on the same sets.
# A slope is *claimed* where its interval leaves out zero in the first setting, and *holds* elsewhere where the interval there lies on the same side of zero.
# All intervals are for these sources; the settings share their sets, so they agree more easily than independent studies would.

# %%
columns = study.profile.rule_columns()
constants = Standardizer.fit(study.candidate_scores, columns)
coefficients = tables.coefficient_map(tables.fit_settings(settings, columns, constants))
coefficients.pivot(index="name", columns="setting", values="holds").loc[
    columns, list(dict.fromkeys(coefficients["setting"]))
]

# %%
figures.plot_coefficients(coefficients.rename(columns={"setting": "kind"}))

# %% [markdown]
# ## Which indicator carries the rule?
#
# Drop one indicator, refit on the same runs, select anew by the same code, and see how much of the selection stays the same.
# Where it does not (a Jaccard index under 0.8), the profile may ask to finetune on the smaller rule's rows, on several seeds; where the selections are nearly the same, so is the loss.

# %%
overlaps, dropped = experiments.ablation(study, rule)
study.save(overlaps, "ablation.parquet")
significant(overlaps)

# %% [markdown]
# The losses on the second evaluation set: the full rule against random rows first, then each smaller rule against random rows, and the full rule's rows against those of the smaller rule.
# Only the first is free of multiplicity; a negative difference is a lower loss.

# %%
if len(dropped):
    study.save(dropped, "ablation_runs.parquet")
    shown = ["method", "versus", "n", "n_versus", "difference", "low", "high"]
    display(significant(dropped[[*shown, "detectable", "verdict"]]))
else:
    print("Nothing was finetuned: not asked for (`robustness.ablation`), or no rule")
    print("without one indicator selects rows that differ enough.")

# %% [markdown]
# The paper's Table 5, for comparison: one run a cell.

# %%
paper.table_5()

# %%
study.record_claim("robust", **claims.contrasts_claim(contrasts))

# %% [markdown]
# ## In this notebook we have seen
#
# - selected against random under other settings, with intervals;
# - whether the score carries over to other prompts and, where the profile has them, to other bases, and which coefficients hold;
# - how much each indicator matters to what is selected and, where asked for, to the loss.
