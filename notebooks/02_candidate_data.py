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
# # Which data do we choose from, and can we know the truth about them?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/02_candidate_data.ipynb)
#
# A rule can only be judged on data whose quality is known in some way.
# This notebook builds the candidates, the pools to select from and two evaluation sets, and shows that none of them leaks into another.

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
# ## Where the rows come from
#
# On the embedded profiles every row is a question about a function and an answer taken from its documentation, read from the source files of packages that are already on the disk.
# Each package is one *source*.
# On other profiles the rows are read from files or from the hub.

# %%
from instructmining.study import Study

study = Study.open(profile)
data = study.data
data.facts

# %% [markdown]
# Candidates make the training sets of the sweep.
# Pools are selected from later; a pool is either an unseen source or unseen rows of a source that the rule was fitted on, and its name says which.

# %%
import pandas as pd

tables = {
    "candidates": data.candidates,
    **data.pools,
    "eval_1": data.eval_1,
    "eval_2": data.eval_2,
}
pd.DataFrame(
    {
        name: {"rows": len(t), "sources": t["source"].nunique()}
        for name, t in tables.items()
    }
).T

# %% [markdown]
# ## What a row looks like
#
# A row is a list of messages; a single question with its answer is a list of two.
# Where the profile plants defects, one defective row of each kind stands here below the clean row that it was made from.

# %%
from instructmining.paper import quote

rows = data.candidates.set_index("id")
if "twin" in rows:
    made = rows[rows["twin"].isin(rows.index)]
    shown = made.groupby("kind").sample(1, random_state=0)
    origins = data.facts.set_index("source")[["version", "licence"]]
    for row in shown.itertuples():
        clean = rows.loc[row.twin]
        print(f"{row.source} {', '.join(origins.loc[row.source])}")
        print("  asked:   ", quote(clean["messages"][0]["content"]))
        print("  clean:   ", quote(clean["messages"][-1]["content"]))
        print(f"  {row.kind}:", quote(row.messages[-1]["content"]))
else:
    for name, part in rows.groupby("source"):
        print(f"{name}: {len(part)} rows of {part['messages'].map(len).max()} messages at most")

# %% [markdown]
# ## Planted defects: a truth that the rule is not told
#
# In the embedded corpus some rows of *every* source get a defect, each beside its clean twin.
# No defect is a source, so a rule that has merely learnt the sources can't find them.
# The share of defective rows in each source:

# %%
if "twin" in data.candidates:
    shares = data.candidates.groupby("source")["kind"].agg(
        defective=lambda k: (k != "").mean(),
        kinds_of_defect=lambda k: k[k != ""].nunique(),
    )
    display(shares.round(2))
else:
    print("This profile holds real data; no defects are planted.")

# %% [markdown]
# ## Does anything leak?
#
# Two rows are *near copies* if they share a run of eight words after folding case and punctuation.
# No evaluation row may be a near copy of a row that a model is trained on.

# %%
from instructmining_core.data.duplicates import count_shared

exam = pd.concat([data.eval_1, data.eval_2])
leaks = {
    name: count_shared(exam, t)
    for name, t in tables.items()
    if not name.startswith("eval")
}
assert not any(leaks.values()), leaks
pd.Series(leaks, name="evaluation rows with a near copy").to_frame()

# %% [markdown]
# ## The models
#
# Stand-in models are small models trained on the spot from text that no evaluation row shares; they are of the same architectures as the paper's and go through the same loading code.
# They say how the method behaves, not how LLaMA behaves.

# %%
from instructmining_core.models.hub import resolve

roles, ladder = study.profile.models.roles(), study.profile.models.ladder
study.standins(*roles.values(), *ladder)  # those that are missing are built, side by side
found = {
    role: resolve(ref, standins=study.standins(ref))
    for role, ref in roles.items()
}
pd.DataFrame(
    [
        {"role": role, "model": r.id, "revision": r.revision, "stand-in": r.stand_in}
        for role, r in found.items()
    ]
)

# %% [markdown]
# ## In this notebook we have seen
#
# - the sources, the pools and the two evaluation sets;
# - defects planted inside every source, each beside its clean twin;
# - that no evaluation row has a near copy among the training rows.
