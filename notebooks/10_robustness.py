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
# We ask:
#
# - whether the rule's score predicts the loss on other prompts and of other bases;
# - which of its coefficients hold there;
# - whether selected rows beat random rows under other settings;
# - which indicator carries the rule.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## Does the score carry over?
#
# Whoever has a score and a loss draws a line through them: `np.polyfit` of the log loss of the sets on what the rule predicts for them, once on the evaluation set that the rule was fitted on and once on the other.
# But a line through all sets also rises with the sources.
# The core's slope stands beside the shares of the sources: 1 where the rule carries over whole, 0 where nothing does; the first row's is 1 by construction.
# Further bases are finetuned on the same sets where the profile asks for it (`robustness.transfer`).

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown

from instructmining import claims, figures, paper, tables
from instructmining.experiments import comparisons
from instructmining.study import Study
from instructmining_core import load_rule
from instructmining_core.regression.inference import significant
from instructmining_core.regression.run_table import Standardizer
from instructmining_core.selection.beat_random import compare_with_random

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
sweep = study.sweep()
plain = {name: np.polyfit(rule.predict(sweep), sweep[name], 1)[0] for name in ("log_loss", "log_loss_eval_2")}

settings = tables.transfer_settings(study)
slopes = tables.transfer_table(settings, rule)
study.save(slopes, "transfer.parquet")
display(significant(slopes))
others = slopes.iloc[1:]
Markdown(f"""
The plain lines have slopes of {plain['log_loss']:.2f} and {plain['log_loss_eval_2']:.2f}, sources mixed in.
Beside the shares the rule carries over whole in {(others['carries'] == 'whole').sum()} of {len(others)} other settings, and in part in {(others['carries'] == 'in part').sum()}; the smallest slope is {others['slope'].min():.2f}.
Every slope is taken over the very sets that the rule was fitted on: it says whether the rule carries to another base or to other prompts, not whether it holds for new sets, which is what held-out sources are for.
""")

# %% [markdown]
# ## Which coefficients hold?
#
# The rule is fitted anew in every setting, on the same sets.
# A slope is *claimed* where its interval leaves out zero in the first setting, and *holds* elsewhere where the interval there lies on the same side of zero.
# All intervals are for these sources; the settings share their sets, so they agree more easily than independent studies would.

# %%
columns = study.profile.rule_columns()
constants = Standardizer.fit(study.candidate_scores, columns)
coefficients = tables.coefficient_map(settings, columns, constants)
order = list(dict.fromkeys(coefficients["setting"]))
display(coefficients.pivot(index="name", columns="setting", values="holds").loc[columns, order])
elsewhere = coefficients[coefficients["setting"] != order[0]]
counts = elsewhere["holds"].value_counts()
Markdown(f"""
The first setting claims {(coefficients['holds'] == 'claimed').sum()} of {len(columns)} slopes.
{f"Of what it claims, {counts.get('holds', 0)} hold elsewhere, {counts.get('not seen', 0)} are not seen and {counts.get('reversed', 0)} are reversed, counted over {len(order) - 1} other settings." if (coefficients['holds'] == 'claimed').any() else 'So there is nothing that could hold or fail elsewhere.'}
""")

# %%
figures.plot_coefficients(coefficients.rename(columns={"setting": "kind"}))

# %% [markdown]
# ## Other methods and other bases
#
# The same pool, the same rule, the same sizes; only the finetune changes.

# %%
runs = pd.concat([
    study.run("robustness", plans, **setting)
    for setting, plans in comparisons.robustness_plans(study, rule)
])
study.save(runs[comparisons.GATE_COLUMNS], "robustness.parquet")
display(figures.plot_selected_random(runs))
contrasts = compare_with_random(runs, loss="loss_eval_2")
study.record_claim("robust", **claims.contrasts_claim(contrasts))
shown = ["pool", "n", "mean", "mean_versus", "difference", "low", "high", "detectable", "verdict"]
display(contrasts[shown].round(4))
Markdown(f"""
Selected rows are better than random ones in {contrasts['verdict'].str.startswith('better').sum()} of {len(contrasts)} settings, and worse in {contrasts['verdict'].str.startswith('worse').sum()}; {100 * contrasts['detectable'].max():.1f} % of the loss could have been seen in each.
""")

# %% [markdown]
# The paper's Table 6, for comparison: one run a cell.

# %%
published = paper.table_6()
gap = published["self_instruct_selected"] / published["self_instruct_random"] - 1
display(published)
Markdown(f"""
Its differences on Self-Instruct go from {100 * gap.min():+.2f} % ({published['model'][gap.idxmin()]}) to {100 * gap.max():+.2f} % ({published['model'][gap.idxmax()]}), without an interval.
""")

# %% [markdown]
# ## Which indicator carries the rule?
#
# Drop one indicator, refit on the same runs, select anew by the same code, and see how much of the selection stays the same.

# %%
overlaps, dropped = comparisons.ablation(study, rule)
study.save(overlaps, "ablation.parquet")
display(significant(overlaps))
needed = overlaps.sort_values("jaccard")["without"].tolist() if len(overlaps) else []
Markdown(f"""
{f"Leaving out {needed[0]} changes the selection most: {overlaps['jaccard'].min():.0%} of the rows in either selection are in both." if needed else "The rule has one indicator only, so there is none to leave out."}
Selections that agree in {comparisons.SAME:.0%} of their rows count as the same, and {int(overlaps['finetuned'].sum()) if needed else 0} of {len(overlaps)} differ by more.
""")

# %% [markdown]
# Where the selections differ, the profile may ask to finetune on the smaller rule's rows, on several seeds (`robustness.ablation`).
# The losses on the second evaluation set: the full rule against random rows first, then each smaller rule against random rows, and the full rule's rows against those of the smaller rule.
# Only the first is free of multiplicity; a negative difference is a lower loss.

# %%
words = "Nothing was finetuned: not asked for, or no rule without one indicator selects rows that differ enough."
if len(dropped):
    study.save(dropped, "ablation_runs.parquet")
    display(significant(dropped[["method", "versus", "n", "n_versus", "difference", "low", "high", "detectable", "verdict"]]))
    smaller = dropped.query("versus == 'random' and method != 'selected'")
    words = f"{smaller['verdict'].str.startswith('better').sum()} of {len(smaller)} smaller rules still select rows that are better than random ones."
table_5 = paper.table_5().set_index("rule")["self_instruct"]
Markdown(f"""
{words}
In the paper's Table 5, one run a cell, the loss goes from {table_5['all four']} with all four indicators to {table_5.drop(['all four', 'random']).max()} without the most useful one, against {table_5['random']} for random rows.
""")

# %% [markdown]
# ## In this notebook we have seen
#
# - whether the score carries over to other prompts and, where the profile has them, to other bases;
# - which coefficients hold there;
# - selected against random under other settings, with intervals;
# - how much each indicator matters to what is selected and, where asked for, to the loss.
