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
# # What does the loss look like over all the sets?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/06_finetune_sweep.ipynb)
#
# Now every set is finetuned on and evaluated, and each run leaves one record.
# A finished run is never done twice: stop this notebook and start it again, and it goes on.

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
# ## Run the sweep

# %%
import pandas as pd

from instructmining_core import figures
from instructmining_core.experiments import sweep_plans
from instructmining_core.study import Study

study = Study.open(profile)
runs = study.run("sweep", sweep_plans(study))
runs["status"].value_counts().rename("runs").to_frame()

# %%
sweep = study.sweep()
print(
    f"{len(sweep)} runs, {sweep['tokens_trained'].sum():,} tokens trained, {sweep['seconds'].sum() / 60:.1f} minutes of training and evaluation"
)
sweep[["loss_eval_1", "loss_eval_2", "loss_eval_1_token"]].describe().round(4)

# %% [markdown]
# ## Does the loss depend on the source?
#
# Sets drawn within one source, by source.
# If these differ much, a rule could be nothing but a list of sources.

# %%
figures.loss_by_source(sweep)
# %% [markdown]
# ## How large is the noise?
#
# The anchors are sets that were run again with other seeds.

# %%
from instructmining_core.inference import seed_variance

pd.Series(vars(seed_variance(sweep)), name="sd of the log loss between seeds").round(
    5
).to_frame()

# %% [markdown]
# Against this noise stands the spread of the losses over sets:

# %%
import numpy as np

spread = sweep.groupby("arm")["log_loss"].std()
spread.rename("sd of the log loss over sets").round(4).to_frame()

# %% [markdown]
# ## Do the two evaluation sets agree?

# %%
agreement = np.corrcoef(sweep["log_loss"], sweep["log_loss_eval_2"])[0, 1]
print(f"correlation of the log losses on the two evaluation sets: {agreement:.3f}")
figures.two_losses(sweep)

# %% [markdown]
# ## In this notebook we have seen
#
# - one record for each run;
# - how the loss differs between sources and within them;
# - the noise of a seed, against which every effect has to be seen.
