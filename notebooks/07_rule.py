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
# The paper chooses its variables by the best fit and reports their p-values.
# We fit the rule within sources, give every coefficient two intervals, and ask what the whole procedure would find if there were nothing to find.

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
# ## The data of the regression
#
# One row a run: the log loss, the share of each source, and the set's mean of each indicator.

# %%
import pandas as pd

from instructmining import claims, figures, tables
from instructmining.simulation.studies import null_r2
from instructmining.study import Study
from instructmining_core.regression import checks, inference
from instructmining_core.regression.intervals import r2_of, significant
from instructmining_core.regression.paper_rule import fit_paper
from instructmining_core.regression.permutation import permutation
from instructmining_core.regression.rule import fit_rule, mundlak_test
from instructmining_core.regression.run_table import DESIGNED, RunsError, Standardizer, pick_arms

study = Study.open(profile)
runs, columns = study.sweep(), study.profile.rule_columns()
constants = Standardizer.fit(study.candidate_scores, columns)
print(
    f"{len(runs)} runs of {runs['set_id'].nunique()} sets, {runs['arm'].value_counts().to_dict()}"
)
print(*study.notes)

# %% [markdown]
# ## First, what the paper's design can't see
#
# Suppose that *no* property of an example matters, and only the sources differ.
# In mixtures of few sources every indicator then follows the sources, and the procedure "best fit, then smallest p-values" finds a rule all the same.
# We simulate such studies, and draw the paper's $R^2$ beside what they find.

# %%
studies = study.profile.inference.simulated_studies
null = pd.concat([null_r2(sources, studies, seed=0) for sources in (4, 8, 12)])
display(tables.failure_table(null))
figures.plot_design_failure(null)
# %% [markdown]
# The brackets are 95 % intervals over the simulated studies: by order statistics for medians, Wilson's for shares.
# With few sources an $R^2$ of the paper's size is what such a world gives.
# It is no evidence for a rule about examples.
#
# ## One indicator at a time
#
# Each indicator alone, beside the shares of the sources, on the designed runs.
# Slopes are changes of log loss per standard deviation of a row, with HC3 intervals; $R^2$ is what the indicator explains of what the shares leave, with an interval from the noncentral $F$.
# Both intervals speak of these sources.

# %%
screens = checks.univariate(runs, columns, constants)
print(
    f"{len(screens)} single tests at 5 %: {0.05 * len(screens):.2g} would pass with no effect at all; "
    f"{(screens['p'] < 0.05).sum()} pass, {(screens['p_holm'] < 0.05).sum()} after Holm's correction"
)
significant(
    screens[["estimate", "low", "high", "p", "p_holm", "r2", "r2_low", "r2_high"]]
)

# %%
figures.plot_regression_panels(pick_arms(runs, DESIGNED), columns, fit=screens)
# %% [markdown]
# ## The rule: slopes within sources
#
# $$ \log L = \sum_s \alpha_s w_s + \sum_j \beta_j \bar X_j + \varepsilon $$
#
# In words: the log loss of a set is the sum of a constant for each source $s$, weighted by its share $w_s$, and of a slope $\beta_j$ times the set's mean of each standardised indicator $\bar X_j$.
# Since the shares take up whatever belongs to a source, a slope speaks of rows of the *same* source.
#
# Every coefficient has two intervals: for these sources (HC3), and for sources like these that we have not seen (delete one source at a time).
# At a fixed number of rows the mean response length *is* the number of training tokens, so its coefficient may be called either.
# The raw slope is per unit of the indicator, its bounds are for these sources.

# %%
fit = fit_rule(runs, columns, constants)
jackknife = tables.jackknife(runs, columns, constants)
r2, r2_low, r2_high = r2_of(fit)
print(
    f"Fitted to {len(fit.runs)} designed runs of {len(runs)} in all, one a set: "
    f"R² beyond the shares {r2:.2f} [{r2_low:.2f}, {r2_high:.2f}], these sources."
)
significant(tables.both_intervals(fit, jackknife))

# %% [markdown]
# Beside it, the paper's fit by the paper's procedure and without shares: on all arms, and on fusion alone, which is the paper's own design.
# Its p-values and intervals, that of $R^2$ too, are not valid after the choice.

# %%
size = min(4, len(columns))
by_paper = fit_paper(runs, columns, constants, size=size)
significant(tables.paper_table(runs, columns, constants, size))

# %%
figures.plot_coefficients(tables.coefficient_frame(fit, jackknife, by_paper))
# %% [markdown]
# ## Is it there at all?
#
# The residuals of a fit by source shares alone are permuted, and the whole search over subsets is run on each permutation {cite:p}`freedman1983`.
# The hypothesis: the indicators add nothing to the shares.

# %%
rows = tables.rows_of_sets(study)
tests = [
    permutation(
        runs,
        columns,
        constants,
        null=null_name,
        size=size,
        n_permutations=study.profile.inference.permutations,
        rows=shared,
    )
    for null_name, shared in (("H0b", rows), ("H0b", None), ("H0a", None))
]
significant(tables.tests_table(tests, fit, size))

# %% [markdown]
# The bounds of $R^2$ take the chosen subset as given, so the lower one is too high; the bounds of $p$ are what the number of permutations leaves open.
# Sets that share rows have like errors; the first line counts them, and is the one that the card and the front page carry: notebook 12 tries both tests on indicators that mean nothing.
# The last line is what one would get by permuting the losses freely; it rejects whenever the sources differ at all, and is shown only for that.
#
# ## Does it hold for a source that it has not seen?
#
# For each source, the rule is fitted without it and tested on the sets within it.
# The calibration slope of a source has an interval over its few sets; the means below have theirs over sources, with $t(S-1)$.

# %%
held = inference.held_out(runs, columns, constants)
few = held.attrs["too_few"]
print(
    f"Sources with too few sets to be tested (their number of sets): {few or 'none'}."
)
display(significant(held))
significant(inference.over_sources(held))

# %%
figures.plot_predicted_measured(tables.predictions(fit), title="in sample")
# %% [markdown]
# ## Between sources and within them
#
# If the slopes between sources and those within them differ, a rule fitted to mixtures is not a rule for rows {cite:p}`mundlak1978`.
# A small p says that they differ; a large one does not prove them equal.

# %%
means = study.candidate_scores.groupby("source")[columns].mean()
try:
    split = mundlak_test(runs, columns, means, constants)
    print(
        f"equal slopes: F({split.df1}, {split.df2}) = {split.f:.2f}, p = {split.p:.2g}"
    )
    display(significant(split.table))
except RunsError as error:
    print(error)

# %% [markdown]
# ## How stable is it?
#
# The noise of a seed, from the anchors ($\chi^2$ interval), against the noise that the line leaves ($F$ interval); the directions in which the sets differ; the choice of the procedure when the runs are drawn again (Wilson intervals over the draws).

# %%
chosen = inference.bootstrap_choice(
    runs, columns, constants, n=study.profile.inference.bootstraps, size=size
)
noise = inference.seed_variance(runs)
left = inference.lack_of_fit(fit, noise)
print(
    f"The line leaves {left['ratio']:.1f} [{left['ratio_low']:.1f}, {left['ratio_high']:.1f}] times "
    f"the sd of a seed, p = {left['p']:.2g} that this is seed noise alone."
)
display(significant(pd.DataFrame([vars(noise)], ["sd between seeds of one set"])))
display(significant(tables.dimensions(runs, fit)))
significant(tables.choice_table(chosen, study.profile.inference.bootstraps))

# %%
figures.plot_residual_page(inference.influence_table(fit))
# %% [markdown]
# ## Does it depend on how the loss is averaged?
#
# The same rule under every loss that the ledger holds.
# A slope is marked "!" where its sign differs from that under the study's loss, and "!!" where both intervals also leave out zero.

# %%
variants = checks.variant_table(runs, columns, constants)
turned = variants.groupby("column")[["sign_differs", "contradicts"]].any()
print("sign changes:", list(turned.index[turned["sign_differs"]]) or "none")
print("beyond both intervals:", list(turned.index[turned["contradicts"]]) or "none")
for name, effective in checks.effective_n(runs).items():
    print(f"The token mean of {name} rests on {effective:.0f} prompts' worth of tokens.")
checks.variant_page(variants)

# %% [markdown]
# ## Is it more than vocabulary and the number of tokens?
#
# Beside the indicators stand a unigram model of each set's responses and the number of training tokens.
# Below, the indicators' slopes without and with these two; all intervals are for these sources.

# %%
compared = tables.vocabulary_baselines(study, runs, columns, constants)
display(significant(compared))
significant(checks.baseline_slopes(compared))

# %% [markdown]
# ## Length, or training tokens?
#
# One arm holds the number of training tokens fixed instead of the number of rows.
# The slope of length alone, beside the shares, in both designs.
# If its interval at equal tokens holds zero, what the rule calls length may be training tokens.
# If it leaves out zero on the same side, length matters beyond the number of tokens.

# %%
lengths = checks.length_slopes(runs, constants)
if lengths.empty:
    print("No fit at equal tokens here: the coefficient stays “length or training tokens”.")
significant(lengths)

# %% [markdown]
# ## The card
#
# The rule goes out with everything that is needed to use it, or to refuse to.

# %%
card = tables.rule_card(study, fit, jackknife, held, tests[0])
card.save(study.folder / "rule.json")
study.record_claim("rule_predicts", **claims.rule_claim(fit, tests[0], noise))
study.record_claim("rule_transfers", **claims.transfer_claim(inference.over_sources(held)))
from IPython.display import Markdown

from instructmining.reports import card_markdown

Markdown(card_markdown(card))

# %% [markdown]
# ## In this notebook we have seen
#
# - that the paper's design finds a rule where there is none;
# - a rule within sources, with two intervals for every slope;
# - a test of the whole procedure, and the rule's record on sources that it had not seen;
# - the same rule under every loss, and length at equal training tokens.
