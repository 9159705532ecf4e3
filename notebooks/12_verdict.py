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
# This notebook asks the embedded corpus for the truth, where there is one, and then goes through the claims one by one:
#
# - whether the loss measures quality;
# - whether a model with a lower loss also answers more questions rightly;
# - whether the rule finds the defective one of two twins, better than its rivals do;
# - whether a win over random rows comes from the defects;
# - whether the procedure stays silent where the indicators mean nothing;
# - what can be said of every claim;
# - what all of it took.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## Does the loss measure quality?
#
# Rows are replaced by their defective twins, a growing share of them, and nothing else changes.
# If a defect harms, the loss rises with the dose, and a `groupby` shows it.
# The core fits all runs together, with a level of its own for every dose and one for every seed, and gives the change of the log loss at the full dose (`slope`) with its interval; a kind *harms* where that interval lies above zero.
# A kind that was not seen to harm the loss is a negative control: one that the rule should *not* find.
#
# On real data the same is done to answers that the profile names: another answer of the same collection, words in disorder, an answer cut short, and so on.
# There the second figure counts: what remains of the gain over the untuned base, under both averagings of the loss.
# A kind that costs nothing there can't be found by a rule that is fitted to this loss.

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown

from instructmining import claims, figures, tables
from instructmining.embedded.defects import SEEN_KINDS
from instructmining.experiments import choice_tasks, comparisons, machines, planted_defects
from instructmining.study import Study
from instructmining_core import load_rule
from instructmining_core.regression.inference import significant

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
planted = study.profile.data.kind == "embedded"
words = "This profile makes no answers worse, so the loss is not asked what it sees."
if planted_defects.has_doses(study.profile):
    doses = planted_defects.dose_runs(study)
    study.save(doses[planted_defects.DOSE_COLUMNS], "doses.parquet")
    small = doses[doses["rows"] == doses["rows"].min()]
    plain = small.assign(log=np.log(small["loss_eval_1"])).groupby(["kind", "dose"])["log"].mean()
    by_hand = plain.groupby("kind").last().drop("clean") - plain["clean"].iloc[0]

    effects = planted_defects.dose_effects(small)
    harmful = effects.index[effects["harms"]]
    display(significant(effects))
    display(figures.plot_dose_response(small, harms=harmful, seen=SEEN_KINDS if planted else ()))
    left = planted_defects.dose_shares(doses)
    display(significant(left))
    display(figures.plot_dose_shares(left))
    blind = planted_defects.unseen_kinds(left)
    worst = effects["slope"].idxmax()
    apart = (by_hand - effects["slope"]).abs().max()
    words = f"""
At a full dose {worst} costs most: {100 * np.expm1(by_hand[worst]):+.2f} % of the loss by pandas, and the same by the fit (over all kinds the two differ by {apart:.1g} at most){f", with an interval of {100 * np.expm1(effects.loc[worst, 'low']):+.2f} to {100 * np.expm1(effects.loc[worst, 'high']):+.2f} %" if np.isfinite(effects.loc[worst, 'low']) else ", without an interval, since no run is repeated"}.
{len(harmful)} of {len(effects)} kinds are seen to harm the loss ({', '.join(harmful) or 'none'}); the others this loss does not see, or these runs are too few.
Under both averagings, whole sets of these kinds were not seen to lose anything of what clean ones gain: {', '.join(blind) or 'none'}."""
Markdown(words)

# %% [markdown]
# ## Does a lower loss go with better answers?
#
# Where the profile names multiple-choice tasks (`data.choices`), every run answered them: which docstring belongs to a function, which of two answers is preferred, by likelihood as `lm-eval` counts it.
# A correlation over models is one line of pandas.
# The core adds two intervals, over runs and over the sources of their rows, for each loss: all models first differ by source, so the interval over sources is the one that a general claim needs.

# %%
asked, proxies = choice_tasks.models(study), pd.DataFrame()
words = "Not evaluated: no run was asked a multiple-choice task, since the profile's `data.choices` is empty."
if len(asked):
    asked_tasks, proxies = choice_tasks.tasks_in(asked), choice_tasks.correlations(asked)
    by_hand = asked[["loss_eval_1", *asked_tasks]].corr().loc["loss_eval_1", asked_tasks]
    np.testing.assert_allclose(by_hand, proxies.query("runs == 'all' and loss == 'loss_eval_1'")["r"])
    study.save(proxies, "loss_proxy.parquet")
    display(significant(proxies))
    display(figures.plot_loss_proxy(asked, asked_tasks))
    words = "\n".join(f"Over {len(asked)} models the first loss and {task} have a correlation of {by_hand[task]:+.2f}; the untuned base gets {asked[f'base_{task}'].mean():.1%} right, the models {asked[task].min():.1%} to {asked[task].max():.1%}." for task in asked_tasks)
study.record_claim("loss_predicts_tasks", **choice_tasks.proxy_claim(proxies))
Markdown(words)

# %% [markdown]
# A loss that does not see a defect may still be right, if the defect costs nothing.
# So each kind at its full dose is held against the clean sets, question by question: what does it cost in loss, and what in right answers?

# %%
words = "Not evaluated here."
if planted_defects.has_doses(study.profile) and len(asked):
    damage = choice_tasks.damage_costs(study, small)
    study.save(damage, "damage.parquet")
    display(significant(damage))
    unseen = damage[~damage["kind"].isin(harmful)]
    worse = unseen[unseen["high"] < 0]
    words = f"""
Of {unseen['kind'].nunique()} kinds that were not seen to cost loss, {worse['kind'].nunique()} cost right answers ({', '.join(worse['kind'].unique()) or 'none'}).
The intervals are over questions and, where there are several, over runs; a difference of {100 * (damage['high'] - damage['low']).min() / 2:.1f} points is the smallest that one of them could tell from none."""
Markdown(words)

# %% [markdown]
# ## Does the rule find the defective twin?
#
# Each defective row has a clean twin, and the question can be put to any number: how often is the clean one the better of the two?
# That share is the AUC within twins, a tie counting half: 0.5 is chance, 1 is perfect.
# Taking the longer answer is one comparison of two columns; the core asks the rule and all its rivals, library by library, so that there is an interval over libraries.

# %%
words = "No twins here."
if planted:
    told = study.data.everything.drop_duplicates("id").set_index("id")[["kind", "twin"]]
    length = study.scores.drop_duplicates("id").set_index("id")["len_out"]
    pairs = told[(told["kind"] != "") & told["twin"].isin(length.index) & told.index.isin(length.index)]
    clean, bad = length[pairs["twin"]].to_numpy(), length[pairs.index].to_numpy()
    longer = np.mean((clean > bad) + 0.5 * (clean == bad))

    auc = planted_defects.auc_of_study(study, rule, effects)
    study.save(auc, "truth.parquet")
    display(figures.plot_twin_auc(planted_defects.over_libraries(auc)))
    display(planted_defects.auc_table(auc))
    own = planted_defects.over_libraries(auc, by=("scorer",)).set_index("scorer")
    one = auc.query("scorer == 'longest'")
    pooled = np.average(one["auc"], weights=one["pairs"])
    words = f"""
By hand the longer of two twins is the clean one in {longer:.1%} of {len(pairs)} pairs, by the core in {pooled:.1%} of {one['pairs'].sum()}.
The rule ranks the clean twin better in {own.loc['rule', 'auc']:.0%} [{own.loc['rule', 'low']:.0%}, {own.loc['rule', 'high']:.0%}] of the pairs (every library counts once); the best of its rivals without the label is “{own.drop(['rule', 'oracle', 'loss_oracle'], errors='ignore')['auc'].idxmax()}” with {own.drop(['rule', 'oracle', 'loss_oracle'], errors='ignore')['auc'].max():.0%}."""
Markdown(words)

# %% [markdown]
# The reward and evaluator models have seen some of the kinds during their own training and never the others, and the rule was fitted to sets of the candidates but not to the pools: all four groups stand apart in the table.
# The loss oracle knows what each kind costs and nothing of kinds that cost nothing; the oracle knows the label.
#
# ## Does it find the kinds that harm, and keep off those that don't?

# %%
words = "No kinds here."
if planted:
    kinds = planted_defects.by_kind(auc, effects)
    display(significant(kinds))
    rule_on = planted_defects.over_libraries(auc.query("scorer == 'rule'"), by=("kind",)).set_index("kind")
    controls = rule_on.loc[[kind for kind in rule_on.index if kind not in harmful]]
    caught = controls.index[controls["low"] > 0.5]
    words = f"""
Of {len(controls)} negative controls the rule finds {len(caught)} all the same ({', '.join(caught) or 'none'}): its whole interval lies above one half there."""
Markdown(words)

# %% [markdown]
# ## Is the rule better than each rival?
#
# On kinds that no model has seen, library by library: the difference of AUC, with its interval over libraries.

# %%
words = "No rivals here."
if planted:
    found = planted_defects.defects_found(auc, effects)
    study.record_claim("finds_defects", **claims.defects_claim(found))
    study.record_claim("loss_is_quality", **claims.dose_claim(effects))
    display(significant(planted_defects.rule_against(auc)))
    words = f"""
The harder end of length to beat is the {found['rival']} row: the rule's AUC differs from its AUC by {found['difference']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}].
It falls furthest behind, or is least ahead, in {found['kind']}, where length finds {found['kind_rival']:.0%} of the pairs and the rule {found['kind_rule']:.0%}."""
Markdown(words)

# %% [markdown]
# ## Does a win come from the defects?
#
# The gate of notebook 08, pool by pool: how many of the pool's rows are defective, how many of those that the rule selects and that a random draw takes, and the relative difference of the loss.
# In a pool without defects there is nothing to avoid, and no win is expected.

# %%
words = "No pools with planted defects here."
if planted:
    pools = planted_defects.defect_pools(study, rule)
    free = pools[pools["defects"] == 0]
    study.record_claim("no_win_without_defects", **claims.clean_pool_claim(pools))
    display(significant(pools))
    avoided = pools[pools["defects"] > 0]
    words = f"""
Where there are defects, the selection takes {avoided['in_selected'].mean():.0%} defective rows and a random draw {avoided['in_random'].mean():.0%}.
{f"In the pool without any, the verdict is “{free['verdict'].iloc[0]}”: {'the rule gains by something else than the planted defects, and so may its wins in the other pools' if free['verdict'].iloc[0].startswith('better') else 'no win where none is expected'}." if len(free) else 'No pool is free of them.'}"""
Markdown(words)

# %% [markdown]
# ## The negative control
#
# The indicators of the rows are shuffled within each source, so that they mean nothing, and the whole procedure runs again, many times.
# About one shuffle in twenty should be "significant" at 5 %.
# Both tests of notebook 07 are tried, the one that counts shared rows and the one that does not; the study's own $R^2$ is held against the shuffles as well, which share rows in just the same way.
# The control stops at the test: nothing is selected or finetuned by a shuffled rule.

# %%
control = tables.negative_control(study)
display(significant(control).T)
Markdown("\n".join(
    f"With {name}, {one['significant at 5 %']:.0f} of {one['shuffles']:.0f} shuffles are significant, a share between {one['low']:.2f} and {one['high']:.2f}: {'its p is not to be believed' if one['low'] > 0.05 else 'no sign that the test breaks its level'}."
    for name, one in control.iterrows()
))

# %% [markdown]
# ## How much of what there is to gain is it?
#
# Training on random rows gains something over the untuned base; the selected rows gain something beyond that.
# Their ratio is told only where what there is to gain stands well above its noise.
# Pools, finetunes and prompts are drawn again together, refitted rules among the finetunes, so the interval is over all of them.

# %%
share = comparisons.improvements(study)
study.save(share, "improvement.parquet")
display(share.round(4))
Markdown("\n".join(
    f"Averaged over {one.averaging}, random rows gain {one.gain:+.4f} nats over the base (standard error {one.gain_se:.4f}), and the selected rows {one.effect:+.4f} [{one.effect_low:+.4f}, {one.effect_high:+.4f}] beyond: "
    + (f"{one.share:+.0%} [{one.low:+.0%}, {one.high:+.0%}] of what there is to gain." if np.isfinite(one.share) else "too little is gained at all for a share of it.")
    for one in share.itertuples()
))

# %% [markdown]
# ## Claim by claim

# %%
verdict = claims.verdicts(study)
study.save(verdict, "verdict.csv")
with pd.option_context("display.max_colwidth", None):
    display(verdict.drop(columns="claim"))
whole = verdict["verdict"].str.split(r"[;:,]").str[0].value_counts()
Markdown(f"""
Of {len(verdict)} claims, {whole.get('holds', 0)} hold, {whole.get('does not hold', 0)} do not, and {whole.get('undecided', 0)} stay undecided; the others have an answer of their own kind.
Every verdict stands beside the smallest effect that this run could have detected: "undecided" means that the run was too small to tell, not that there is nothing.
""")

# %% [markdown]
# ## What did all of it take?
#
# Every record names its machine and its seconds, so a sum tells the cost of each stage in finetuning and evaluation.
# Scoring, embedding and the statistics come on top.

# %%
spent = machines.costs(study.ledger_of(study.find("ledger")).load())
display(spent.round(3))
dearest = spent.groupby("purpose")["hours"].sum()
Markdown(f"""
{spent['runs'].sum():,} runs computed for {spent['hours'].sum():.1f} hours on {spent['machine'].nunique()} kind{'' if spent['machine'].nunique() == 1 else 's'} of machine; the stage {dearest.idxmax()} took most, {dearest.max():.1f} hours.
The hours are those of single processes: where two of them share a machine, it is done in half the time.
""")

# %% [markdown]
# ## In this notebook we have seen
#
# - which defects harm the loss, and by how much;
# - whether models with a lower loss answer more questions rightly, and what a defect costs there;
# - how well the rule finds them, beside length, perplexity and the rest, and whether it keeps off those that do no harm;
# - whether the selected rows win where there is no defect to avoid;
# - how often the procedure finds something in shuffled indicators;
# - a verdict on every claim, for this run's models and data;
# - what each stage took, and on what.
