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
# # Which indicators predict the loss, and how far may we believe it?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/07_rule.ipynb)
#
# Here the two streams meet: what the rows look like, and what happened when a model was trained on them.
# We ask, one after the other:
#
# - which indicators go with the loss, in one formula of `statsmodels`;
# - how sure each slope is, for these sources and for new ones;
# - what the paper's procedure gives on the same runs, and what it finds where there is nothing to find;
# - whether our own procedure finds more than chance;
# - whether the rule holds for a source that it has not seen, and between sources as within them;
# - how stable it is, and whether it is more than length, vocabulary or the way the loss is averaged.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## The rule as a formula
#
# $$ \log L = \sum_s \alpha_s w_s + \sum_j \beta_j \bar X_j + \varepsilon $$
#
# In words: the log loss of a set is the sum of a constant $\alpha_s$ for each source $s$, weighted by the set's share $w_s$ of that source, and of a slope $\beta_j$ times the set's mean $\bar X_j$ of each standardised indicator $j$; what is left, $\varepsilon$, is noise.
# Since the shares take up whatever belongs to a source, a slope speaks of rows of the *same* source.
#
# That is ordinary least squares without a constant, and anybody can run it on the table of runs: one row a set, with its log loss, the share of each source and the mean of each indicator.

# %%
import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from IPython.display import Markdown
from statsmodels.stats.proportion import proportion_confint

from instructmining import claims, figures, tables
from instructmining.experiments import planted_defects
from instructmining.reports import card_markdown
from instructmining.study import Study
from instructmining_core import fit_rule
from instructmining_core.regression import checks, inference
from instructmining_core.regression.inference import r2_of, significant
from instructmining_core.regression.paper_rule import fit_paper
from instructmining_core.regression.permutation import permutation
from instructmining_core.regression.rule import mundlak_test
from instructmining_core.regression.run_table import DESIGNED, RunsError, Standardizer, pick_arms

study = Study.open(profile)
runs, columns = study.sweep(), study.profile.rule_columns()
constants = Standardizer.fit(study.candidate_scores, columns)

data = pick_arms(runs, DESIGNED)  # the designed sets, one run each
data = data.assign(**constants.transform(data, columns))  # in sd of a row
data.columns = data.columns.str.replace(r"\W", "_", regex=True)  # names that a formula can hold
shares = [name for name in data if name.startswith("share_") and data[name].any()]
formula = f"log_loss ~ 0 + {' + '.join([*shares, *columns])}"
by_formula = smf.ols(formula, data=data).fit(cov_type="HC3", use_t=True)
print(formula)
by_formula.summary(slim=True)

# %% [markdown]
# The core fits the same line.
# What it adds is what a rule needs to be used: which runs may enter, a second interval for sources that we have not seen (delete one source at a time), the slope per raw unit, the inflation of each variance by the other indicators (`vif`), and a refusal where the sets can't tell the indicators apart.
# At a fixed number of rows the mean response length *is* the number of training tokens, so its coefficient may be called either.

# %%
fit = fit_rule(runs, columns, constants)
slopes = fit.table()
np.testing.assert_allclose(slopes["estimate"], by_formula.params[columns], rtol=1e-6)
if by_formula.get_influence().hat_matrix_diag.max() < 1 - 1e-9:  # else HC3 is 0/0 there
    np.testing.assert_allclose(slopes["se"], by_formula.bse[columns], rtol=1e-6)

jackknife = tables.jackknife(runs, columns, constants)
display(significant(tables.both_intervals(fit, jackknife)))
r2, r2_low, r2_high = r2_of(fit)
clear = slopes[slopes["low"] * slopes["high"] > 0].index
new = jackknife.table.query("low * high > 0").index if jackknife else []
largest = slopes["estimate"].abs().idxmax()
change = 100 * np.expm1(slopes.loc[largest, "estimate"])
Markdown(f"""
The formula and `fit_rule` give the same slopes.
We observe that the interval for these sources leaves out zero in {len(clear)} of {len(columns)} slopes ({', '.join(clear) or 'none'}), and the interval for new sources in {len(new)} ({', '.join(new) or 'none'}).
The largest slope is that of {largest}: sets whose rows lie one standard deviation higher in it end at a loss {abs(change):.1f} % {'higher' if change > 0 else 'lower'}.
Beside the shares the indicators explain R² = {r2:.2f} [{r2_low:.2f}, {r2_high:.2f}] of what the shares leave, in sample and for these sources, from {len(fit.runs)} sets of {len(runs)} runs.
""")

# %%
figures.plot_predicted_measured(fit.runs.assign(predicted=fit.ols.fittedvalues), title="in sample")

# %% [markdown]
# ## One indicator at a time
#
# Is a slope of the rule there because the other indicators stand beside it?
# Each panel fits one indicator alone, beside the shares.

# %%
screens = checks.univariate(runs, columns, constants)
study.save(screens.reset_index(), "screens.parquet")
display(figures.plot_regression_panels(pick_arms(runs, DESIGNED), columns, fit=screens))
turned = screens.index[screens["estimate"] * slopes["estimate"] < 0]
Markdown(f"""
Of {len(screens)} single tests at 5 %, {0.05 * len(screens):.2g} would pass with no effect at all; {(screens['p'] < 0.05).sum()} pass, {(screens['p_holm'] < 0.05).sum()} of them after Holm's correction.
The largest share of what the sources leave is explained by {screens['r2'].idxmax()}, R² = {screens['r2'].max():.2f} [{screens.loc[screens['r2'].idxmax(), 'r2_low']:.2f}, {screens.loc[screens['r2'].idxmax(), 'r2_high']:.2f}].
Alone and in the rule the sign differs for {', '.join(turned) or 'no indicator'}.
""")

# %% [markdown]
# ## What would the paper's procedure say?
#
# The paper takes the best subset by fit and then drops the largest p-values, on mixtures of sources and without shares.
# Here it runs on all arms, and on fusion alone, which is the paper's own design.
# Its p-values and intervals, that of $R^2$ too, are not valid after the choice.

# %%
size = min(4, len(columns))
by_paper = fit_paper(runs, columns, constants, size=size)
display(significant(tables.paper_table(runs, columns, constants, size)))
display(figures.plot_coefficients(tables.coefficient_frame(fit, jackknife, by_paper)))
paper = by_paper.table()
agree = (np.sign(paper["estimate"]) == np.sign(slopes.loc[paper.index, "estimate"])).sum()
Markdown(f"""
The paper's procedure keeps {', '.join(paper.index)} on all arms; {agree} of these {len(paper)} slopes have the sign that the rule gives them.
""")

# %% [markdown]
# ## What does that procedure find where there is nothing to find?
#
# Suppose that *no* property of an example matters, and only the sources differ.
# In mixtures of few sources every indicator then follows the sources, and "best fit, then smallest p-values" finds a rule all the same.
# We simulate such studies, and draw the paper's $R^2$ beside what they find.

# %%
studies = study.profile.inference.simulated_studies
null = pd.concat([tables.null_r2(sources, studies, seed=0) for sources in (4, 8, 12)])
study.save(null, "null.parquet")
display(figures.plot_design_failure(null))
failure, seen = tables.failure_table(null).loc[4], tables.dimensions(runs, fit)["participation"]
Markdown(f"""
With four sources and no effect at all the median R² is {failure['median R²']}, and a share of {failure["R² as large as the paper's"]} of the {failure['studies']} simulated studies reaches the paper's R²; two repeats rank new sources alike with a correlation of {failure['median rank correlation']} (95 % intervals over the simulated studies).
So an R² of that size is no evidence for a rule about examples.
Our designed sets differ in {seen.iloc[0]:.1f} effective directions beside the shares{f", fusion's in {seen.iloc[1]:.1f} with the sources in them" if len(seen) > 1 else ""}.
""")

# %% [markdown]
# ## Is it there at all?
#
# The residuals of a fit by source shares alone are permuted, and the whole search over subsets is run on each permutation {cite:p}`freedman1983`.
# The hypothesis: the indicators add nothing to the shares.
# Sets that share rows have like errors; the first line counts them, the second does not.
# The last line permutes the losses freely; it rejects whenever the sources differ at all, and is shown only for that.

# %%
rows = {one.set_id: one.row_hashes for one in study.sets}
tests = [
    permutation(runs, columns, constants, null=name, size=size, rows=shared,
                n_permutations=study.profile.inference.permutations)
    for name, shared in (("H0b", rows), ("H0b", None), ("H0a", None))
]
tested = tables.tests_table(tests, fit, size)
display(significant(tested))
first = tested.iloc[0]
Markdown(f"""
Counting shared rows, p = {first['p']:.2g}, and what {first['permutations']} permutations leave open of it is [{first['p low']:.2g}, {first['p high']:.2g}]: {'the indicators add to the shares' if first['p'] < 0.05 else 'no evidence that the indicators add anything to the shares'}.
Without counting them p would be {tested.iloc[1]['p']:.2g}; notebook 12 tries both tests on indicators that mean nothing.
""")

# %% [markdown]
# ## Does it hold for a source that it has not seen?
#
# For each source, the rule is fitted without it and tested on the sets within it.
# $R^2$ is 1 for a perfect prediction, 0 for one no better than the source's mean, and below 0 where the rule does harm; the calibration slope is 1 where effects are of the right size.
# If the slopes *between* sources differ from those within them, a rule fitted to mixtures is not a rule for rows {cite:p}`mundlak1978`.

# %%
held = inference.held_out(runs, columns, constants)
display(significant(held))
over = inference.over_sources(held)
words = "Too few sources have sets enough to be held out."
if len(held) > 1:
    words = f"Over {len(held)} sources the held-out R² is {over.loc['r2', 'mean']:.2f} [{over.loc['r2', 'low']:.2f}, {over.loc['r2', 'high']:.2f}] and the calibration slope {over.loc['slope', 'mean']:.2f} [{over.loc['slope', 'low']:.2f}, {over.loc['slope', 'high']:.2f}]; the rule does harm in {(held['r2'] < 0).sum()} of them."
try:
    means = study.candidate_scores.groupby("source")[columns].mean()
    split = mundlak_test(runs, columns, means, constants)
    between = f"That slopes between sources equal those within has F({split.df1}, {split.df2}) = {split.f:.2f}, p = {split.p:.2g}: {'they differ' if split.p < 0.05 else 'no difference is seen, which does not prove them equal'}."
except RunsError as error:
    between = f"Slopes between sources can't be told here: {error}."
Markdown(f"{words}\n{between}")

# %% [markdown]
# ## How stable is it?
#
# Two questions: is what the line leaves more than the noise of a seed, and would the procedure choose the same indicators had other runs been drawn?

# %%
noise = inference.seed_variance(runs)
left = inference.lack_of_fit(fit, noise)
draws = study.profile.inference.bootstraps
chosen = inference.bootstrap_choice(runs, columns, constants, n=draws, size=size)
chosen["low"], chosen["high"] = proportion_confint(chosen["frequency"] * draws, draws, method="wilson")
display(significant(chosen))
page = inference.influence_table(fit)
display(figures.plot_residual_page(page))
often = chosen.index[chosen["frequency"] >= 0.8]
Markdown(f"""
The noise between seeds of one set is {noise.sd:.4f} [{noise.low:.4f}, {noise.high:.4f}] in log loss, and the line leaves {left['ratio']:.1f} [{left['ratio_low']:.1f}, {left['ratio_high']:.1f}] times as much (p = {left['p']:.2g} that this is seed noise alone).
In {draws} draws of the runs, {', '.join(often) or 'no indicator'} {'are' if len(often) > 1 else 'is'} chosen at least four times in five.
The most influential run has a Cook's distance of {page['cook'].max():.2f}; none is dropped.
""")

# %% [markdown]
# ## Does it depend on how the loss is averaged?
#
# The same rule under every loss that the ledger holds.
# A slope is marked "!" where its sign differs from that under the study's loss, and "!!" where both intervals also leave out zero.

# %%
variants = checks.variant_table(runs, columns, constants)
study.save(variants, "variants.parquet")
display(checks.variant_page(variants))
turned = variants.groupby("column")[["sign_differs", "contradicts"]].any()
rests = [f"{n:.0f} in {name}" for name, n in checks.effective_n(runs).items()]
Markdown(f"""
The sign changes under some loss for {', '.join(turned.index[turned['sign_differs']]) or 'no indicator'}, and beyond both intervals for {', '.join(turned.index[turned['contradicts']]) or 'none'}.
A token mean rests on fewer prompts than there are, since long answers weigh more: as if on {', '.join(rests)}.
""")

# %% [markdown]
# ## Is it more than vocabulary, tokens or length?
#
# Beside the indicators stand a unigram model of each set's responses and the number of training tokens.
# One arm of the design holds the number of training tokens fixed instead of the number of rows: if the slope of length vanishes there, what the rule calls length may be training tokens.

# %%
compared = tables.vocabulary_baselines(study, runs, columns, constants)
display(significant(compared))
beside, lengths = checks.baseline_slopes(compared), checks.length_slopes(runs, constants)
words = ""
if len(beside):
    kept = beside.query("with_low * with_high > 0").index
    turned = beside.index[beside["without"] * beside["with"] < 0]
    words = f"The baselines alone reach an adjusted R² of {compared.loc['+ all baselines', 'r2_adjusted']:.2f}, the indicators {compared.loc['+ indicators', 'r2_adjusted']:.2f}, both {compared.loc['+ baselines and indicators', 'r2_adjusted']:.2f}. Beside the baselines the slopes of {', '.join(kept) or 'no indicator'} leave out zero, and the sign turns for {', '.join(turned) or 'none'}."
at = "No fit at equal tokens here: the coefficient stays “length or training tokens”."
if len(lengths):
    rows_, tokens_ = (f"{one.estimate:+.4f} [{one.low:+.4f}, {one.high:+.4f}]" for one in lengths.itertuples())
    at = f"The slope of length is {rows_} at equal rows and {tokens_} at equal tokens (log loss per sd, these sources)."
Markdown(f"{words}\n{at}")

# %% [markdown]
# ## The card
#
# The rule goes out with everything that is needed to use it, or to refuse to.
# What the loss does not see, a rule fitted to it can't find: the card names the ways of making answers worse that the loss was not seen to punish (notebook 12 shows them by dose).

# %%
blind = []
if planted_defects.has_doses(study.profile):
    blind = planted_defects.unseen_kinds(planted_defects.dose_shares(planted_defects.dose_runs(study)))
card = tables.rule_card(study, fit, jackknife, held, tests[0], blind)
card.save(study.folder / "rule.json")
study.record_claim("rule_predicts", **claims.rule_claim(fit, tests[0], noise))
study.record_claim("rule_transfers", **claims.transfer_claim(over))
Markdown(card_markdown(card))

# %% [markdown]
# ## In this notebook we have seen
#
# - the rule as one formula, and the same rule from the core;
# - two intervals for every slope, and each indicator alone;
# - the paper's procedure on our runs, and a rule that its design finds where there is none;
# - a test of the whole procedure that counts shared rows;
# - the rule's record on sources that it had not seen, and slopes between sources against slopes within;
# - its stability, and the same rule under every loss, beside vocabulary and at equal training tokens.
