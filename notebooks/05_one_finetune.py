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
# # What exactly is the loss that everything else predicts?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/05_one_finetune.ipynb)
#
# The loss after finetuning is the response variable of the whole study.
# If it depended on the batch size or on the padding, every later number would too.
# This notebook does one finetune slowly, and asks:
#
# - which tokens the loss counts;
# - whether it is the cross entropy that everybody knows;
# - how far batching moves it;
# - what one finetune does to it, and what another seed does;
# - at which depth, learning rate and number of rows the hypothesis can be tested at all.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## Which tokens count
#
# A row becomes pieces of text, and only the response and the mark that ends it are targets.

# %%
import dataclasses

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown

from instructmining import figures
from instructmining.experiments import regime
from instructmining.study import PlannedRun, Study
from instructmining_core import evaluate, finetune
from instructmining_core.data.tokenization import encode
from instructmining_core.models.causal_lm import response_nll

study = Study.open(profile)
config = study.profile.finetune
rows = study.encoded_evals(study.lm, config)["eval_1"]
whole = [row for row in rows if not row.truncated and sum(row.targets) > 3]
row = next(row for row in whole if np.ptp(np.flatnonzero(row.targets)) < sum(row.targets))  # one answer
pieces = study.lm.tokenizer.convert_ids_to_tokens(list(row.ids))
around = slice(max(0, row.targets.index(True) - 8), row.targets.index(True) + 16)
display(pd.DataFrame({"token": pieces, "target": row.targets}).iloc[around].T)
Markdown(f"""
{sum(row.targets)} of this row's {len(row)} tokens count; the base is {study.lm.resolved.id}.
""")

# %% [markdown]
# ## A cross entropy, masked by hand
#
# What is computed for one row is what any reader of transformers would write: a forward pass, and the cross entropy of each token given those before it, over the targets only.
# The study's own loss is that of the answer's *body*: without its first token and the mark that ends it, which tell where an answer begins and stops and little of what is in it.
# `evaluate` gives the same numbers; it does so for many rows at once, makes logits at the targets only, and never lets a row's loss depend on its neighbours.

# %%
exact = study.load(dataclasses.replace(study.profile.models.base, dtype="float32"))

ids = torch.tensor([row.ids], device=exact.device)
target = torch.tensor(row.targets, device=exact.device)[1:]
with torch.no_grad():
    logits = exact.model(input_ids=ids).logits[0, :-1]
nll = torch.nn.functional.cross_entropy(logits[target], ids[0, 1:][target], reduction="none")
by_hand = {"prompt_mean": nll.mean().item(), "body_prompt_mean": nll[1:-1].mean().item()}

ours = evaluate(exact, [row])[0]
for name, value in by_hand.items():
    np.testing.assert_allclose(value, ours[name], rtol=1e-4)  # float32, sums in another order
Markdown(f"""
By hand the row costs {by_hand['prompt_mean']:.6f} nats a token and its body {by_hand['body_prompt_mean']:.6f}; by `evaluate` {ours['prompt_mean']:.6f} and {ours['body_prompt_mean']:.6f}.
Its first token alone costs {nll[0].item():.2f} nats.
""")

# %% [markdown]
# ## How much does the batching matter?
#
# The same prompts, one at a time and together, in the model's own precision and in float32.
# A product of matrices rounds at other places when its rows are batched otherwise.

# %%
def moved(lm):
    """Nats per token between the two ways: the most that a prompt moves, and the mean's move."""
    parts = [response_nll(lm, rows), response_nll(lm, rows, batch_tokens=1)]
    together, alone = (part["nll"] / part["tokens"] for part in parts)
    return {
        "largest of a prompt": (together - alone).abs().max(),
        "prompt mean": abs(together.mean() - alone.mean()),
    }


batching = pd.DataFrame({str(lm.dtype): moved(lm) for lm in (study.lm, exact)}).T
display(batching.map("{:.1e}".format))
own = batching.iloc[0]
Markdown(f"""
In the model's own precision ({batching.index[0]}) batching moves a single prompt by up to {own['largest of a prompt']:.1g} nats a token, and the mean over prompts, which is what the study uses, by {own['prompt mean']:.1g}.
""")

# %% [markdown]
# ## One finetune
#
# A random set of candidates, the profile's settings, one adapter.

# %%
chosen = study.data.candidates.sample(study.profile.design.size, random_state=0)
train = [
    encode(study.lm.tokenizer, m, max_tokens=config.max_tokens, template=config.template)
    for m in chosen["messages"]
]
before, _ = evaluate(study.lm, rows)
tuned = finetune(study.lm, train, config, init_seed=0, order_seed=0)
after, per_prompt = evaluate(tuned.lm, rows)
shown = ["body_prompt_mean", "body_token_mean", "first_token", "end_of_text", "prompt_mean", "token_mean"]
display(pd.DataFrame({"before": before, "after": after}).loc[shown].round(4))
Markdown(f"""
One finetune on {len(train)} rows changes the loss of the body by {100 * (after['body_prompt_mean'] / before['body_prompt_mean'] - 1):+.1f} %, from {before['body_prompt_mean']:.4f} to {after['body_prompt_mean']:.4f} nats a token.
Over whole answers it is {100 * (after['prompt_mean'] / before['prompt_mean'] - 1):+.1f} %: a first token changes by {after['first_token'] - before['first_token']:+.2f} nats and an end mark by {after['end_of_text'] - before['end_of_text']:+.2f}, which says how an answer begins and stops.
The token mean gives long answers more weight: {len(per_prompt)} prompts count in it like {after['effective_n']:.0f} of equal length.
""")

# %%
curve = tuned.curve
tuned.save(study.folder / "adapter")  # as peft saves it: `PeftModel.from_pretrained` loads it
tuned.close()
figures.plot_training_curve(curve)

# %% [markdown]
# ## The same seed gives the same loss, another seed another
#
# The same set, three times, through the ledger that every later notebook uses.

# %%
hashes = tuple(chosen["row_hash"])
plans = [PlannedRun(hashes, {"set_id": "one"}, init_seed=s, order_seed=s) for s in (0, 1, 2)]
seeds = study.run("one", plans)
display(seeds[["init_seed", "order_seed", "loss_eval_1", "loss_eval_2", "seconds"]].round(4))
again = abs(seeds["loss_eval_1"].iloc[0] / after["body_prompt_mean"] - 1)
Markdown(f"""
The run in the ledger and the one above, with the same seed, differ by {again:.1g} of the loss.
Three seeds differ by a standard deviation of {seeds['loss_eval_1'].std():.4f} nats, where batching moves the mean by {own['prompt mean']:.1g}: the seed is the noise of everything that follows.
""")

# %% [markdown]
# ## The regime
#
# A hypothesis about data can only be tested where finetuning changes something, and where the loss sees what the data say.
# So some settings are tried first, on prompts that serve nothing else: an equal mixture of collections, each collection alone, and the mixture with every answer exchanged for another question's.
# A setting is *admissible* where the mixture lowers the loss by five standard errors under both averagings, at least half of the collections lower it, and answers to other questions cost loss.
# This was written before any run, and is code in one place (`instructmining.experiments.regime`).

# %%
regimes, table = pd.DataFrame(), None
if study.profile.regime.rows:
    regimes = regime.regime_runs(study)
    study.save(regimes[["run_id", "kind", *regime.SETTING, "seed", *regime.LOSSES, "seconds"]], "regime.parquet")
    display(figures.plot_regime(regimes))
    base = regimes.iloc[0]
    best = regimes.loc[(regimes["base_regime"] - regimes["loss_regime"]).idxmax()]
Markdown("This profile tries no settings." if regimes.empty else f"""
The base costs {base['base_regime']:.4f} nats a token on these prompts ({base['base_regime_token']:.4f} averaged over tokens).
The largest gain is that of {best['kind']}, {best['base_regime'] - best['loss_regime']:.4f} nats, with {best['rows']} rows and a learning rate of {best['learning_rate']:g}.
{(regimes['loss_regime'] < regimes['base_regime']).sum()} of {len(regimes)} runs end below the base.
""")

# %% [markdown]
# Among the admissible settings the criterion takes the one with the highest reliability for a second of computing: the variance between collections, as a share of that and of the variance between draws of one mixture.

# %%
words = "No settings, no criterion."
if len(regimes):
    table = regime.regime_table(study, regimes)
    display(table.round(4))
    clear = table["gain"] / table["gain_se"]
    words = f"""
{regime.in_words(table)}
The mixture's gain is {clear.min():.1f} to {clear.max():.1f} standard errors; answers to other questions cost {table['cost'].min():+.4f} to {table['cost'].max():+.4f} nats more than the right ones."""
Markdown(words)

# %% [markdown]
# ## In this notebook we have seen
#
# - which tokens the loss counts;
# - that it is the masked cross entropy, to the rounding of float32;
# - how little batching moves it, in each precision;
# - what one finetune changes, and how much a seed does;
# - which settings can test the hypothesis, by a criterion written beforehand.
