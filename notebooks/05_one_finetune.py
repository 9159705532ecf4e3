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
# This notebook does one finetune slowly.

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
# ## Which tokens count
#
# A row becomes pieces of text, and only the response and the end mark are targets.

# %%
import dataclasses

import pandas as pd

from instructmining.study import PlannedRun, Study
from instructmining_core.data.tokenization import encode

study = Study.open(profile)
messages = study.data.eval_1["messages"].iloc[0]
row = encode(study.lm.tokenizer, messages, max_tokens=study.profile.finetune.max_tokens)
pieces = study.lm.tokenizer.convert_ids_to_tokens(list(row.ids))
pd.DataFrame({"token": pieces, "target": row.targets}).iloc[:24].T

# %% [markdown]
# ## How much does the batching matter?
#
# The same prompts, one at a time and together, in the model's own precision and in float32.
# A product of matrices rounds at other places when its rows are batched otherwise; in bfloat16 a single prompt can therefore move visibly, while the mean over prompts, which is what the study uses, hardly does.

# %%
from instructmining_core.models.causal_lm import response_nll

rows = study.encoded_evals(study.lm, study.profile.finetune)["eval_1"]
exact = study.load(dataclasses.replace(study.profile.models.base, dtype="float32"))


def moved(lm):
    """Nats per token between the two ways: the most that a prompt moves, and the mean's move."""
    parts = [response_nll(lm, rows), response_nll(lm, rows, batch_tokens=1)]
    together, alone = (part["nll"] / part["tokens"] for part in parts)
    return {
        "largest of a prompt": (together - alone).abs().max(),
        "prompt mean": abs(together.mean() - alone.mean()),
    }


batching = pd.DataFrame({str(lm.dtype): moved(lm) for lm in (study.lm, exact)}).T
batching.map("{:.1e}".format)

# %% [markdown]
# ## One finetune
#
# A random set of candidates, the profile's settings, one adapter.

# %%
from instructmining_core.finetuning.finetune import finetune
from instructmining_core.models.loss import evaluate

config = study.profile.finetune
chosen = study.data.candidates.sample(study.profile.design.size, random_state=0)
train = [
    encode(study.lm.tokenizer, m, max_tokens=config.max_tokens)
    for m in chosen["messages"]
]
before, _ = evaluate(study.lm, rows)
tuned = finetune(study.lm, train, config, init_seed=0, order_seed=0)
after, per_prompt = evaluate(tuned.lm, rows)
pd.DataFrame({"before": before, "after": after}).round(4)

# %%
from instructmining import figures

curve = tuned.curve
tuned.save(study.folder / "adapter")  # as peft saves it: `PeftModel.from_pretrained` loads it
tuned.close()
figures.plot_training_curve(curve)
# %% [markdown]
# ## The mean over prompts, and the mean over tokens
#
# A few long answers can carry most of a token mean.
# The *effective* number of prompts says how many prompts of equal weight would vary as much.

# %%
weights = per_prompt["tokens"] / per_prompt["tokens"].sum()
print(
    f"{len(per_prompt)} prompts; effective number in the token mean: {1 / (weights**2).sum():.0f}"
)

# %% [markdown]
# ## The same seed gives the same loss, another seed another

# %%
hashes = tuple(chosen["row_hash"])
plans = [PlannedRun(hashes, {"set_id": "one"}, init_seed=s, order_seed=s) for s in (0, 1, 2)]
seeds = study.run("one", plans)
seeds[["init_seed", "order_seed", "loss_eval_1", "loss_eval_2", "seconds"]].round(4)

# %%
again = abs(seeds["loss_eval_1"].iloc[0] / after["prompt_mean"] - 1)
print(f"the run in the ledger and the one above differ by {again:.1e} of the loss")
print(
    f"three seeds differ by a standard deviation of {seeds['loss_eval_1'].std():.4f} nats;"
    f" batching moves the prompt mean by {batching['prompt mean'].iloc[0]:.1e}"
)

# %% [markdown]
# ## In this notebook we have seen
#
# - which tokens the loss counts;
# - how little batching moves it, in each precision;
# - how much a seed changes it, which is the noise of everything that follows.
