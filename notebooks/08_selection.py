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
# The paper compares one selected set with one random set; here every contrast has repeats.
# We ask:
#
# - which rows each method takes, and whether the rule reaches them;
# - whether the published rules would take the same rows;
# - how the loss after finetuning on selected rows compares with that on random rows;
# - whether the rule beats every rival, length above all;
# - whether the answer survives the rule's own uncertainty.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## Select from every pool
#
# To select is to predict, sort and keep: `pool.assign(loss=rule.predict(pool)).nsmallest(k, "loss")`.
# Beside these rows we take random draws, and rows by rivals that cost little: by either end of length, by perplexity, by reward.
# Where the profile asks for it, *matched* rows too, drawn at random but alike in length to the selected ones, prompt and answer: a win over random rows that is gone against these is a win of length.
# A method that likes long answers trains on more tokens at the same number of rows.
# So rivals run twice: with as many *rows* as the selection, and, under a name that ends in `_tokens`, with as many *target tokens*.
# A repeat has its own seeds, and where the profile draws anew, its own part of the pool; a pool that is one of the fitted sources is judged by the rule refitted without it.

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown
from scipy.stats import ttest_ind

from instructmining import claims, figures, paper, reports
from instructmining.experiments import comparisons, gate, outside
from instructmining.study import Study
from instructmining_core import load_rule
from instructmining_core.selection import beat_random
from instructmining_core.selection.select import compare_rules
from instructmining_core.selection.support import support

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
plans = gate.gate_plans(study, rule)
own = {p.label["pool"]: p.row_hashes for p in plans if p.label["method"] == "selected" and p.label["seed"] == 0}
rules_of = {pool: gate.rule_for(study, rule, pool) for pool in own}
parts = {pool: gate.pool_parts(study, pool) for pool in own}
same = 0
for pool, chosen in own.items():
    scores = parts[pool][1][0]
    best = scores.assign(loss=rules_of[pool].predict(scores)).nsmallest(len(chosen), "loss")
    same += len(set(best["row_hash"]) & set(chosen))

display(pd.DataFrame({pool: {"a repeat draws from": kind, "rows of it": len(part[0])} for pool, (kind, part) in parts.items()}).T)
labels = pd.DataFrame([{**p.label, "rows": len(p.row_hashes)} for p in plans])
display(labels.groupby(["pool", "method"])["rows"].agg(finetunes="size", rows="mean").unstack("pool").round(1))
taken = {
    (p.label["pool"], p.label["method"]): set(p.row_hashes)
    for p in plans if p.label["seed"] == 0 and not p.label["method"].endswith("_tokens")
}
alike = pd.Series({
    (pool, method): len(rows & taken[pool, "selected"]) / len(rows | taken[pool, "selected"])
    for (pool, method), rows in taken.items()
}).groupby(level=1).mean().drop("selected")
nearest = alike.drop(["random", "full"], errors="ignore").idxmax()
Markdown(f"""
Of the {sum(map(len, own.values()))} selected rows of all pools the plain line takes {same} as well; the core counts a row that stands twice in a pool once.
At equal rows the selection is most like that of “{nearest}”: the rows in both are {alike[nearest]:.0%} of those in either; with a random draw it is {alike['random']:.0%}.
""")

# %% [markdown]
# ## How do the chosen rows look?

# %%
by_hash = study.scores.drop_duplicates("row_hash").set_index("row_hash")[list(study.profile.indicators)]
looks = pd.DataFrame({key: by_hash.loc[list(rows)].mean() for key, rows in taken.items()}).T
looks = looks.groupby(level=1, sort=False).mean()
display(looks.round(2))
whole = pd.DataFrame({pool: study.pool_scores(pool)[looks.columns].mean() for pool in own}).mean(axis=1)
ahead = (looks.loc["selected"] - whole) / study.scores[looks.columns].std()
lengths = pd.DataFrame({
    (pool, method): gate.row_lengths(study, taken[pool, method]).astype(float).mean()
    for pool in own for method in gate.MAIN if (pool, method) in taken
}).T
display(lengths.round(2))
Markdown(f"""
The second table has the tokens of answers as trained on and of what stands before them, and the share of rows that were not cut.
Against the whole pools, the selected rows differ most in {ahead.abs().idxmax()}, by {ahead[ahead.abs().idxmax()]:+.1f} standard deviations of a row.
""")

# %% [markdown]
# ## Does the rule reach these rows, and has it seen them?
#
# A rule is fitted on means of sets and carried to rows by a straight line.
# For each pool: what it is to the rule, how far its mean lies from the design, and how many rows leave the range of the rows that the rule was fitted on.

# %%
kinds = {
    pool: reports.pool_kind(study.pool_scores(pool), rules_of[pool], gate.fitted_scores(study, pool))
    for pool in own
}
reach = pd.DataFrame(
    {pool: support(rules_of[pool], study.pool_scores(pool)).loc["all"] for pool in own}
).T.assign(pool={pool: kind.name for pool, kind in kinds.items()})
display(reach)
far = list(reach.index[reach["verdict"] != "inside"])
Markdown(f"""
{len(reach) - len(far)} of {len(reach)} pools lie inside what the rule was fitted on; {'outside: ' + ', '.join(far) if far else 'none lies outside'}.
""")

# %% [markdown]
# ## Would the published rules take the same rows?
#
# The coefficients of v1 and v3 belong to the paper's models.
# Where ours are others, they run in *published form*, and only the likeness of the rankings may be read.
# Ranks are among the rows of the pools, which no set was drawn from.

# %%
rules = {"fitted": rule, "v1": load_rule("v1"), "v3": load_rule("v3")}
everything = pd.concat([study.pool_scores(pool) for pool in study.data.pools], ignore_index=True)
pairs, _ = compare_rules(rules, everything.drop_duplicates("row_hash"), top=study.profile.selection.size)
display(pairs[["rule_1", "rule_2", "spearman", "jaccard"]].round(2))
ours, theirs = pairs.query("rule_1 == 'fitted'"), pairs.query("rule_1 != 'fitted'").iloc[0]
Markdown(f"""
The fitted rule ranks the rows like v1 with a correlation of {ours['spearman'].iloc[0]:+.2f} and like v3 with {ours['spearman'].iloc[1]:+.2f}; the two published rules agree with each other to {theirs['spearman']:+.2f}.
""")

# %% [markdown]
# ## Would others have taken the same rows?
#
# Of Alpaca's records others have published their own choices: by the ratings of a large model (AlpaGasus), by IFD (Cherry), by a learned judge (CaR); and experts have revised answers.
# A rule that is right about rows ranks what they chose above what they left, and a revision above its original.
# The area under the curve (AUC) is the chance of that; one half is a coin, and `beyond` is what it has more than length alone.

# %%
words, config = "This profile holds no rows that others have chosen from.", study.profile.outside
if config.of:
    known = study.scores.query("source == @config.of").drop_duplicates("row_hash")
    judges = {"fitted": gate.rule_for(study, rule, config.of), "v1": rules["v1"], "v3": rules["v3"]}
    others = outside.chosen_by_others(known, outside.published_selections(study, known), judges)
    revised = outside.preferred_by_experts(*outside.score_pairs(study), judges)
    study.save(others, "others.parquet")
    study.save(revised, "revised.parquet")
    display(others.round(3), revised.round(3))
    own, told = others.query("by == 'fitted'"), revised.set_index("by").loc["fitted"]
    words = f"""
The rule, fitted without {config.of}, agrees with a published selection to an AUC of {own['auc'].min():.2f} to {own['auc'].max():.2f}; beyond length it has more in {(own['beyond_low'] > 0).sum()} of {len(own)} and less in {(own['beyond_high'] < 0).sum()}.
It ranks the revised answer first in {told['right']:.0%} [{told['low']:.0%}, {told['high']:.0%}] of {told['pairs']:.0f} pairs, length in {revised.set_index('by').loc['longest', 'right']:.0%}."""
Markdown(words)

# %% [markdown]
# ## Finetune on each
#
# The table has the shape of the paper's Table 3, with repeats; `_half` is the half-width of the 95 % interval of the mean.
# `tokens_trained` counts the target tokens of all epochs, `rows` and `steps` are means over the finetunes.

# %%
runs = study.run("gate", plans)
study.save(runs[[name for name in comparisons.GATE_COLUMNS if name in runs]], "comparison.parquet")
effects = reports.gate_effects(runs, study.runs("sweep"))
effects.attrs["facts"] = reports.facts_of(study)
study.save(effects, reports.EFFECTS)
display(figures.plot_forest(effects))
display(figures.plot_selected_random(beat_random.by_budget(runs)["equal rows"]))
table = beat_random.selection_table(runs)
display(table.round(4))
lowest = table.loc[table.groupby("pool")["loss_eval_2"].idxmin()]
published = paper.table_3().query("size == 1000").pivot(index="pool", columns="method", values="self_instruct")
Markdown("\n".join([
    *(f"In {one.pool} the lowest mean loss on the second evaluation set is that of “{one.method}”, {one.loss_eval_2:.4f} nats." for one in lowest.itertuples()),
    *(f"The paper has {one.selected} nats for 1,000 selected rows of {one.Index} and {one.random} for random ones, {100 * (one.selected / one.random - 1):+.1f} %, one run each." for one in published.itertuples()),
]))

# %% [markdown]
# ## Two columns of losses
#
# The question of this notebook is a comparison of two columns: the losses of the finetunes on selected rows, and those on random rows, on the evaluation set that was *not* used to fit the rule.
# Whoever has compared two groups knows what to do: Welch's test, which does not take their variances as equal.

# %%
first = next(iter(own))
part = runs[(runs["pool"] == first) & runs["method"].isin(["selected", "random"])]
losses = part.pivot(index="seed", columns="method", values="loss_eval_2")
selected, random = (np.log(losses[name].dropna()) for name in ("selected", "random"))
welch = ttest_ind(selected, random, equal_var=False)
display(losses.round(4))
Markdown(f"""
In {first} the mean log losses differ by {100 * np.expm1(selected.mean() - random.mean()):+.2f} %, with t = {welch.statistic:.2f} and p = {welch.pvalue:.2g}.
""")

# %% [markdown]
# ## The primary contrast, at equal rows and at equal tokens
#
# The core runs this test in every pool, and adds what a test alone does not say.
# One contrast for each pool was fixed beforehand: selected against random, one size; `p_holm` is adjusted for the number of pools.
# Difference is the relative change of the loss, negative when the selection is better.
# The interval from `low` to `high` speaks of these prompts, that from `low_prompts` to `high_prompts` takes the prompts too as drawn at random.
# `detectable` is the difference that this many runs would have found with 80 % power.
# `p_margin` asks another question: below 0.05, the difference is smaller than 1 %, whatever its sign.
# Where there are more prompts than every run can be asked, the main arms answer them too, and people's references beside the models' (the last tables).
# At equal tokens the random sets have another number of rows and, unless the profile asks for equal steps, of optimisation steps.

# %%
prompts = comparisons.per_example(study, runs)
contrasts = beat_random.compare_budgets(runs, prompts, loss="loss_eval_2")
by_tokens = beat_random.compare_budgets(runs, loss="loss_eval_2_token").query("role == 'primary'")
study.save(contrasts, "contrasts.parquet")
numbers = ["difference", "low", "high", "low_prompts", "high_prompts", "detectable"]
primary = contrasts.query("role == 'primary'")
display(primary[["budget", "pool", *numbers, "p", "p_holm", "p_margin", "verdict"]].round(4))
display(by_tokens[["budget", "pool", "difference", "low", "high", "verdict"]].round(4))
agree = (primary.set_index(["budget", "pool"])["difference"] * by_tokens.set_index(["budget", "pool"])["difference"] > 0)
main = runs[runs["method"].isin(gate.MAIN)]
for name in [name for name in ("gate", "human") if name in study.data.exams]:
    matrices = comparisons.per_example(study, main, name)
    wide = beat_random.compare_with_random(main, loss=f"loss_{name}", per_example=matrices)
    print(f"evaluation set “{name}”:")
    display(wide[["pool", "method", "versus", *numbers, "verdict"]].round(4))
same = primary.query("budget == 'equal rows' and pool == @first").iloc[0]
np.testing.assert_allclose(same["p"], welch.pvalue, rtol=1e-6)
Markdown("\n".join([
    f"The test by hand and the table give the same p in {first}.",
    *(f"At {budget} the selection is better than random rows in {part['verdict'].str.startswith('better').sum()} of {len(part)} pools; the differences go from {100 * part['difference'].min():+.2f} to {100 * part['difference'].max():+.2f} %, and {100 * part['detectable'].max():.1f} % could have been seen in every pool."
      for budget, part in primary.groupby("budget", sort=False)),
    f"Averaged over tokens instead of prompts (second table) {agree.sum()} of {len(agree)} differences have the same sign; one that turns depends on the averaging.",
    "Where only equal rows show an advantage, it may be one of how many tokens are trained on, and not of which.",
]))

# %% [markdown]
# ## Selected against every rival
#
# The rivals cost nothing or little; `full` is all that a repeat draws from, `worst` what the rule ranks last.

# %%
secondary = contrasts.query("role != 'primary'")
against_rivals = secondary.query("method == 'selected' and versus != 'random'")
display(against_rivals[["budget", "pool", "versus", *numbers, "verdict"]].round(4))
won = against_rivals["verdict"].str.startswith("better").groupby(against_rivals["versus"])
rivals = secondary.query("versus == 'random' and method != 'selected'")
as_good = rivals["verdict"].str.startswith("better").groupby(rivals["method"]).agg(["sum", "size"])
Markdown("\n".join([
    *(f"Against “{name}” the selection is better in {yes.sum()} of {len(yes)} contrasts." for name, yes in won),
    f"Of the rivals themselves, “{as_good['sum'].idxmax()}” beats random rows most often, in {as_good['sum'].max()} of {as_good['size'].max()} contrasts." if as_good["sum"].any() else "None of the rivals is seen to beat random rows.",
    "All contrasts are in `contrasts.parquet`.",
]))

# %% [markdown]
# ## Does the rule beat length alone?
#
# Length costs nothing, and which end of it serves better depends on the pool and on the evaluation set; a rule has to beat the better one.
# The pools of one seed share the adapter's first values, the order and the prompts, so they are averaged within a seed, and the seeds are counted.

# %%
against = beat_random.both_ends(runs, prompts)
display(beat_random.answers_table(against)[["answer", *numbers, "p_margin", "seeds"]].round(4))
Markdown("\n".join(
    f"At {budget} the harder end to beat is that of the {end} rows: the rule's loss differs by {100 * one.difference:+.2f} %{f' [{100 * one.low:+.2f}, {100 * one.high:+.2f}]' if one.seeds > 1 else ', with one seed and so no interval'}. Does the rule beat length alone? **{one.answer}**."
    for budget, ends in against.items()
    for end, one in [max(ends.items(), key=lambda item: item[1].difference)]
))

# %% [markdown]
# ## With the rule's own uncertainty
#
# The contrasts above are of *one* rule, which came out of one sweep.
# Here the sweep's sets are drawn again within their sources, a rule is refitted each time, and each refit selects its own rows and is finetuned once.

# %%
refit_plans, with_refits = gate.refit_plans(study), None
words = "This profile refits no rule: the contrasts above are those of one rule."
if refit_plans:
    wider = pd.concat([study.run("refit", refit_plans), runs[runs["method"] == "random"]])
    with_refits = beat_random.compare_with_random(
        wider, per_example=comparisons.per_example(study, wider), selected="refit"
    )
    display(with_refits[["pool", *numbers, "p_holm", "p_margin", "verdict"]].round(4))
    chosen = {(p.label["pool"], p.label["seed"]): set(p.row_hashes) for p in plans if p.label["method"] == "selected"}
    told = [(p.label["pool"], chosen[p.label["pool"], p.label["seed"]] & set(p.row_hashes)) for p in refit_plans if (p.label["pool"], p.label["seed"]) in chosen]
    shared = pd.Series([len(rows) / len(own[pool]) for pool, rows in told]).groupby([pool for pool, _ in told]).agg(["mean", "min"])
    words = f"""
Over the pools, the refits choose {shared['mean'].min():.0%} to {shared['mean'].max():.0%} of the rule's own rows, the least like it {shared['min'].min():.0%}.
With their uncertainty counted the selection is better than random rows in {with_refits['verdict'].str.startswith('better').sum()} of {len(with_refits)} pools."""
Markdown(words)

# %% [markdown]
# ## The verdict
#
# The page that `instructmining select --verify` writes for a reader's own data, here for the primary contrasts of these pools.

# %% tags=["hide-input"]
study.record_claim("selected_beats_random", **claims.contrasts_claim(contrasts, with_refits))
study.record_claim("beats_length", **claims.length_claim(*against.values()))
Markdown(reports.verdict_markdown(primary, kinds, rule))

# %% [markdown]
# ## In this notebook we have seen
#
# - which rows the rule and its rivals take, and that it was fitted near enough to them or not;
# - how far the published rules would have taken others;
# - selected against random rows by a plain Welch test, and the same contrast with its intervals, at equal rows and at equal tokens;
# - the rule against every rival, and against both ends of length;
# - the same contrast with the rule refitted.
