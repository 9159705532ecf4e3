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
# The rule sees nothing of a row but its indicators.
# Here they are computed, once for each row, and looked at:
#
# - what an indicator is, beside a plain line of pandas;
# - what values they take, which model made them, and where one can't be computed;
# - how much of each is a matter of the source;
# - which of them say the same.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## An indicator in one line
#
# The simplest indicator is the length of the answer, and a line of pandas gives it in words.
# The core's `score` gives it too; it counts punctuation marks as well, takes the mean over the assistant's turns, and says of every row without a value why it has none.

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown

from instructmining import figures
from instructmining.study import Study
from instructmining_core import INDICATORS, score
from instructmining_core.indicators.score_table import write_scores

study = Study.open(profile)
rows = study.data.everything
words = rows["messages"].map(lambda messages: len(messages[-1]["content"].split()))

plain = score(rows, indicators=["length"])
display(pd.DataFrame({"words by pandas": words, "len_out by the core": plain["len_out"]}).describe().round(1))
Markdown(f"""
The two rank the answers alike, with a rank correlation of {words.corr(plain['len_out'], method='spearman'):.3f}; the core's is larger by {(plain['len_out'] - words).mean():.1f} marks on average.
""")

# %% [markdown]
# ## All of them, for every row
#
# Most indicators need a model: a language model for perplexity and for the tokens in which length is counted, a reward model, an evaluator, a sentence encoder.
# Scores are kept in a cache keyed by the row's hash, the indicator, its version and the model's revision, so that nothing dear is computed twice.

# %%
scores = study.scorer().score(rows, progress=True)
write_scores(scores, study.folder / "scores.parquet")
study.save(study.data.roles, "roles.parquet")
columns = list(study.profile.indicators)
display(scores[columns].describe().T.round(3))
skew = scores[columns].skew().sort_values()
Markdown(f"""
The spread differs between indicators by orders of magnitude, so a rule's weights can be compared only per standard deviation.
The most lopsided is {skew.index[-1]}: its mean is {scores[skew.index[-1]].mean():.1f}, its median {scores[skew.index[-1]].median():.1f}.
In the tokens of the study's base an answer is {(scores['len_out'] / plain['len_out']).median():.1f} times as long as in words and marks.
""")

# %% [markdown]
# The models that produced each column travel with the file.

# %%
made = pd.DataFrame(scores.attrs["indicators"]).T[["version", "model", "revision", "stand_in"]]
display(made.assign(paper={name: entry.paper for entry in INDICATORS.values() for name in entry.columns}))
Markdown(f"""
{int(made['stand_in'].fillna(False).astype(bool).sum())} of {len(made)} columns come from a model that was trained on the spot.
""")

# %% [markdown]
# ## Where is there no value?
#
# An indicator that can't be computed is NaN with a reason, never a plausible number.

# %%
missing = scores[columns].isna().sum().rename("rows without a value")
display(missing.to_frame())
Markdown(f"""
{int(scores[columns].isna().any(axis=1).sum())} of {len(scores):,} rows lack at least one indicator{f", most often {missing.idxmax()}" if missing.max() else ""}.
""")

# %% [markdown]
# ## How much is a matter of the source?
#
# If the sources differ in an indicator, a mixture of sources moves that indicator *and* everything else in which the sources differ.

# %%
candidates = study.candidate_scores
figures.plot_indicator_distributions(candidates, columns)

# %%
z = candidates[columns].apply(lambda c: (c - c.mean()) / c.std())
between = z.groupby(candidates["source"]).transform("mean").var() / z.var()
between = between.rename("share of variance between sources").sort_values(ascending=False)
display(between.round(3).to_frame())
Markdown(f"""
The sources tell most about {between.index[0]}, {between.iloc[0]:.0%} of its variance, and least about {between.index[-1]}, {between.iloc[-1]:.0%}.
What is left over is what a rule for single rows lives on.
""")

# %% [markdown]
# ## Which indicators say the same?
#
# Above the diagonal are correlations over all rows, below it those *within* a source, which a rule for single rows needs.

# %%
display(figures.plot_correlation_map(candidates, columns))
within = z - z.groupby(candidates["source"]).transform("mean")
pairs = within.corr().where(np.triu(np.ones((len(columns), len(columns)), bool), 1)).stack()
pairs = pairs.sort_values(key=abs, ascending=False).head(3)
Markdown("Within sources a regression will find these pairs the hardest to tell apart: " + ", ".join(
    f"{a} and {b} (correlation {value:+.2f})" for (a, b), value in pairs.items()
) + ".")

# %% [markdown]
# ## In this notebook we have seen
#
# - an indicator as a line of pandas, and what the core adds;
# - nine indicators for every row, with the model behind each, and the rows without a value;
# - how much of each indicator is a matter of the source;
# - which indicators a regression will find hard to tell apart.
