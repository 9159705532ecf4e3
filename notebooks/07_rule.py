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

from instructmining_core import (
    claims,
    figures,
    findings,
    inference,
    regression,
    simulate,
)
from instructmining_core.study import Study

study = Study.open(profile)
runs, columns = study.sweep(), study.profile.rule_columns()
constants = regression.Standardisation.fit(study.candidate_scores, columns)
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
null = pd.concat([simulate.null_r2(sources, studies, seed=0) for sources in (4, 8, 12)])
figures.design_failure(null)
# %% [markdown]
# An $R^2$ of the paper's size is what such a world gives.
# It is no evidence for a rule about examples.
#
# ## One indicator at a time
#
# Each indicator alone, beside the shares of the sources.

# %%
screens = regression.univariate(runs, columns, constants)
print(screens.attrs["multiplicity"])
screens[["estimate", "low", "high", "p", "p_holm", "r2"]].round(4)

# %%
figures.regression_panels(runs, columns)
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

# %%
fit = regression.fit_within(runs, columns, constants)
jackknife = findings.jackknife(runs, columns, constants)
findings.coefficient_table(fit, jackknife).round(4)

# %% [markdown]
# Beside it, the paper's fit by the paper's procedure, on all runs and without shares.
# Its p-values are not valid after the choice.

# %%
by_paper = regression.fit_paper(runs, columns, constants, size=min(4, len(columns)))
by_paper.table()[["estimate", "low", "high", "p_paper", "interval"]].round(4)

# %%
figures.coefficients(findings.coefficient_frame(fit, jackknife, by_paper))
# %% [markdown]
# ## Is it there at all?
#
# The residuals of a fit by source shares alone are permuted, and the whole search over subsets is run on each permutation {cite:p}`freedman1983`.
# The hypothesis: the indicators add nothing to the shares.

# %%
size = min(4, len(columns))
tests = [
    inference.permutation(
        runs,
        columns,
        constants,
        null=null_name,
        size=size,
        n_permutations=study.profile.inference.permutations,
    )
    for null_name in ("H0b", "H0a")
]
pd.DataFrame(
    [{"hypothesis": t.meaning, "largest R²": t.statistic, "p": t.p} for t in tests]
).round(4)

# %% [markdown]
# The second line is what one would get by permuting the losses freely; it rejects whenever the sources differ at all, and is shown only for that.
#
# ## Does it hold for a source that it has not seen?
#
# For each source, the rule is fitted without it and tested on the sets within it.

# %%
held = inference.held_out(runs, columns, constants)
display(held.round(3))
inference.summary(held).round(3)

# %%
figures.predicted_measured(findings.predictions(fit))
# %% [markdown]
# ## Between sources and within them
#
# If the slopes between sources and those within them differ, a rule fitted to mixtures is not a rule for rows {cite:p}`mundlak1978`.

# %%
split, equality = findings.mundlak(study, runs, columns, constants)
print(equality)
split.round(4)

# %% [markdown]
# ## How stable is it?
#
# The choice of the procedure when the runs are drawn again; the directions in which the sets differ; the noise of a seed against the noise that the line leaves.

# %%
chosen = inference.bootstrap_choice(
    runs, columns, constants, n=study.profile.inference.bootstraps, size=size
)
noise = inference.seed_variance(runs)
display(
    pd.Series(inference.lack_of_fit(fit, noise), name="is a line enough?")
    .to_frame()
    .round(3)
)
chosen.round(2)

# %%
figures.residual_page(inference.residual_page(fit))
# %% [markdown]
# ## Does it depend on how the loss is averaged, and is it more than vocabulary?
#
# The same rule under the token mean; a coefficient whose sign differs is flagged.
# Beside the indicators stand a unigram model of each set's responses and the number of training tokens.

# %%
other = regression.fit_within(runs, columns, constants, outcome="log_loss_token")
display(regression.sign_flags(fit, other))
findings.baselines(study, runs, columns, constants).round(3)

# %% [markdown]
# ## The card
#
# The rule goes out with everything that is needed to use it, or to refuse to.

# %%
card = findings.rule_card(study, fit, jackknife, held, tests[0])
card.save(study.folder / "rule.json")
from IPython.display import Markdown

Markdown(card.render())

# %%
study.claim("rule_predicts", **claims.rule_claim(fit, tests[0], noise))
study.claim("rule_transfers", **claims.transfer_claim(inference.summary(held)))

# %% [markdown]
# ## In this notebook we have seen
#
# - that the paper's design finds a rule where there is none;
# - a rule within sources, with two intervals for every slope;
# - a test of the whole procedure, and the rule's record on sources that it had not seen.
