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
# # What do nine cheap numbers say about a text?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/03_indicators.ipynb)
#
# The rule sees nothing of a row but nine numbers.
# Here they are computed, once for each row, and looked at: how they spread, which of them say the same, and where one can't be computed.

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
# ## Score every row
#
# Scores are kept in a bank keyed by the row's hash, the indicator, its version and the model's revision, so that nothing dear is computed twice.

# %%
import pandas as pd

from instructmining import figures
from instructmining.study import Study
from instructmining_core.indicators.score_table import write_scores

study = Study.open(profile)
scores = study.scorer().score(study.data.everything, progress=True)
write_scores(scores, study.folder / "scores.parquet")
study.save(study.data.roles, "roles.parquet")
columns = list(study.profile.indicators)
scores[columns].describe().T.round(3)

# %% [markdown]
# The models that produced each column travel with the file.

# %%
pd.DataFrame(scores.attrs["indicators"]).T[["version", "model", "revision", "stand_in"]]

# %% [markdown]
# An indicator that can't be computed is NaN with a reason, never a plausible number.

# %%
scores[columns].isna().sum().rename("rows without a value").to_frame()

# %% [markdown]
# ## How they spread, by source

# %%
candidates = study.candidate_scores
figures.plot_indicator_distributions(candidates, columns)
# %% [markdown]
# If the sources differ in an indicator, a mixture of sources moves that indicator *and* everything else in which the sources differ.
# How much of each indicator's variance lies between sources?

# %%
z = candidates[columns].apply(lambda c: (c - c.mean()) / c.std())
between = z.groupby(candidates["source"]).transform("mean").var() / z.var()
between.rename("share of variance between sources").round(3).sort_values(
    ascending=False
).to_frame()

# %% [markdown]
# ## Which indicators say the same?

# %%
figures.plot_correlation_map(candidates, columns)
# %% [markdown]
# The left half of the question is the correlation over all rows; what a rule for single rows needs is the correlation *within* a source.

# %%
within = z - z.groupby(candidates["source"]).transform("mean")
strongest = (
    within.corr()
    .where(lambda c: c.abs() < 1)
    .abs()
    .unstack()
    .dropna()
    .sort_values(ascending=False)
)
strongest.iloc[::2].head(5).rename("|correlation| within sources").round(2).to_frame()

# %% [markdown]
# ## In this notebook we have seen
#
# - nine indicators for every row, with the model behind each;
# - how much of each indicator is a matter of the source;
# - which indicators a regression will find hard to tell apart.
