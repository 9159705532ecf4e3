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
# This notebook builds the candidates, the pools to select from and the evaluation sets, and asks:
#
# - what a row is, whatever form it was published in;
# - where the rows come from, and which serve as what;
# - whether there is a truth that the rule is not told;
# - whether an evaluation row leaks into the training rows;
# - how many rows are cut at their longest;
# - which models the study uses.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## What is a row?
#
# Instruction data are JSON lines that anybody can open with pandas; only, every set has its own columns.
# The core reads all of these forms into one: a list of messages, with a hash that names the row wherever it turns up.

# %%
import json
import re
import tempfile
from pathlib import Path

import pandas as pd
from IPython.display import Markdown

from instructmining.experiments import gate
from instructmining.paper import quote
from instructmining.study import Study
from instructmining_core import read_records
from instructmining_core.data.duplicates import count_shared
from instructmining_core.models.hub import resolve

alpaca = {"instruction": "Name a prime.", "input": "", "output": "Seven."}
sharegpt = {"conversations": [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "Seven."}]}
published = Path(tempfile.mkdtemp()) / "both.jsonl"
published.write_text("\n".join(json.dumps(record) for record in (alpaca, sharegpt)))

print(list(pd.read_json(published, lines=True).columns))
records, problems = read_records(published)
display(records[["id", "messages", "row_hash"]])
Markdown(f"""
For pandas these two lines have nothing in common; read as records they are {records['row_hash'].nunique()} conversation, said twice.
""")

# %% [markdown]
# ## Where do the rows come from?
#
# On the embedded profiles every row is a question about a function and an answer taken from its documentation, read from the source files of packages that are already on the disk; each package is one *source*.
# On other profiles the rows are read from files or from the hub.
# What a source's publication has left in its texts is taken out where the profile says so (`clean`), counted before and after: literal end marks and line breaks, a calculator's notes.
# Rows that then say nothing go, and templates whose answers are all the same, and whatever asks what an evaluation prompt asks.

# %%
study = Study.open(profile)
data = study.data
display(data.facts)
left = data.facts.loc[:, data.facts.columns.str.endswith(" after")]
assert not left.any(axis=None), "what was to be taken out is still there"
Markdown(f"""
{len(data.candidates):,} candidates from {data.candidates['source'].nunique()} sources make the training sets of the sweep.
""")

# %% [markdown]
# Pools are selected from later; a pool is either an unseen source or unseen rows of a source that the rule was fitted on, and its name says which.
# The rule is fitted on the loss over the first evaluation set, and judged on the second.
# A third is made of the first: its answers, each after another row's question.
# What they cost more there than under their own question says how much a model makes of what it was asked.
# Other profiles have further sets: prompts that only the regime's runs see (notebook 05), prompts that only the gate's main runs see, and people's answers to the first set's prompts.

# %%
exams = data.exams
tables = {"candidates": data.candidates, **data.pools, **exams}
pd.DataFrame(
    {name: {"rows": len(t), "sources": t["source"].nunique()} for name, t in tables.items()}
).T

# %% [markdown]
# ## Is there a truth that the rule is not told?
#
# In the embedded corpus some rows of *every* source get a planted defect, each beside its clean twin.
# No defect is a source, so a rule that has merely learnt the sources can't find them.
# One defective row of each kind stands here below the clean row that it was made from.

# %%
rows = data.candidates.set_index("id")
if "twin" in rows:
    made = rows[rows["twin"].isin(rows.index)]
    origins = data.facts.set_index("source")[["version", "licence"]]
    for row in made.groupby("kind").sample(1, random_state=0).itertuples():
        clean = rows.loc[row.twin]
        print(f"{row.source} {', '.join(origins.loc[row.source])}")
        print("  asked:   ", quote(clean["messages"][0]["content"]))
        print("  clean:   ", quote(clean["messages"][-1]["content"]))
        print(f"  {row.kind}:", quote(row.messages[-1]["content"]))
    shares = (rows["kind"] != "").groupby(rows["source"]).mean()
    words = f"Between {shares.min():.0%} and {shares.max():.0%} of a source's rows are defective, of {rows.loc[rows['kind'] != '', 'kind'].nunique()} kinds."
else:
    for name, part in rows.groupby("source"):
        print(f"{name}: {len(part)} rows of {part['messages'].map(len).max()} messages at most")
    words = "This profile holds real data: no defects are planted, and there is no truth to ask for."
Markdown(words)

# %% [markdown]
# ## Does anything leak?
#
# Two rows are *near copies* if they share a run of eight words after folding case and punctuation.
# That is a line of Python with sets, and slow for more than a few thousand rows; the core does the same with sorted hashes.
# No evaluation row may be a near copy of a row that a model is trained on.

# %%
def eight_words(messages):
    """Every run of eight words of a conversation."""
    words = re.findall(r"\w+", " ".join(m["content"] for m in messages).casefold())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


exam = pd.concat(exams.values(), ignore_index=True)
trained = set().union(*data.candidates["messages"].map(eight_words))
by_hand = sum(not trained.isdisjoint(eight_words(messages)) for messages in exam["messages"])

leaks = {name: count_shared(exam, t) for name, t in tables.items() if name not in exams}
assert not any(leaks.values()), leaks
display(pd.Series(leaks, name="evaluation rows with a near copy").to_frame())
Markdown(f"""
By hand {by_hand} of {len(exam)} evaluation rows share eight words with a candidate, by the core {leaks['candidates']}; in the pools it is {sum(leaks.values()) - leaks['candidates']}.
""")

# %% [markdown]
# ## How much is cut?
#
# A row is trained on up to `finetune.max_tokens` tokens, and an evaluation row counts up to `data.eval_tokens`.
# What is longer loses its end: it counts as long and not as a defect.

# %%
lengths = gate.row_lengths(study, data.candidates["row_hash"])
source = data.candidates.drop_duplicates("row_hash").set_index("row_hash")["source"]
by_source = lengths.astype(float).groupby(source).agg({"prompt": "mean", "answer": "mean", "whole": lambda whole: 1 - whole.mean()})
config = study.profile.finetune
for name in exams:
    encoded = study.encoded_evals(study.lm, config, (name,))[name]
    by_source.loc[name] = [
        sum(len(row) - sum(row.targets) for row in encoded) / len(encoded),
        sum(sum(row.targets) for row in encoded) / len(encoded),
        sum(bool(row.truncated or row.dropped) for row in encoded) / len(encoded),
    ]
display(by_source.rename(columns={"prompt": "tokens before the answer", "answer": "tokens of the answer", "whole": "share cut"}).round(3))
Markdown(f"""
{1 - lengths['whole'].astype(float).mean():.1%} of the candidates are cut at {config.max_tokens} tokens, most often those of {by_source.loc[source.unique(), 'whole'].idxmax()}; {(lengths['answer'] == 0).sum()} have no token of an answer left.
""")

# %% [markdown]
# ## Which models does the study use?
#
# A model that the profile calls `standin:` is trained on the spot, from text that no evaluation row shares, and goes through the same loading code as a real one.
# It says how the method behaves, and nothing about a real model.

# %%
roles, ladder = study.profile.models.roles(), study.profile.models.ladder
study.standins(*roles.values(), *ladder)  # those that are missing are built
found = {role: resolve(ref, standins=study.standins(ref)) for role, ref in roles.items()}
display(pd.DataFrame(
    [{"role": role, "model": r.id, "revision": r.revision, "stand-in": r.stand_in} for role, r in found.items()]
))
made = [role for role, r in found.items() if r.stand_in]
Markdown(f"""
{len(found) - len(made)} of {len(found)} roles have a real model; trained on the spot: {', '.join(made) or 'none'}.
""")

# %% [markdown]
# ## In this notebook we have seen
#
# - that a row is a list of messages with a hash, whatever form it was published in;
# - the sources, the pools and the evaluation sets;
# - where there is a known truth: defects inside every source, each beside its clean twin;
# - that no evaluation row has a near copy among the training rows;
# - how much of the rows is cut;
# - the model behind every role.
