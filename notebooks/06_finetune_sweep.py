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
from instructmining import figures
from instructmining.experiments import sweep_plans
from instructmining.study import Study

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
figures.plot_loss_by_source(sweep)
# %% [markdown]
# ## How large is the noise?
#
# Two kinds of noise matter.
# The anchors are sets that were run again with other seeds: this is the noise *between seeds*.
# The fit of the rule to the designed sets leaves residuals, which also hold what a straight line in the set means misses: this decides how wide the intervals are.

# %%
from instructmining import pilot

seeds, fit = pilot.sweep_noise(study)
if seeds is None:
    seeds = pilot.assumed(0.01)
    print("No set was repeated: the noise between seeds is assumed to be 0.01.")
if fit is not None:
    print(f"The line leaves {fit.sigma / seeds.sd:.1f} times the sd between seeds.")
pilot.noise_table(seeds, fit).round(5)

# %% [markdown]
# Against this noise stands the spread of the losses over sets:

# %%
import numpy as np

spread = sweep.groupby("arm")["log_loss"].std()
spread.rename("sd of the log loss over sets").round(4).to_frame()

# %% [markdown]
# ## Was the plan right?
#
# Notebook 04 planned with the pilot's noise between seeds.
# Every 30 runs we plan anew, with the residuals of the fit once it has more degrees of freedom than the pilot.
# The table sets the half-widths that were planned against those that the runs then gave, as medians over the coefficients: `planned` with its 80 % band, `realised` by the same formula with the residuals' noise, and `hc3`, which the rule reports.
# `in_band` is the share of coefficients whose realised half-width lies in the band.

# %%
from instructmining_core.regression.run_table import RunsError

known = pilot.run_pilot(study, progress=False)
try:
    table = pilot.replanned(
        study,
        study.set_frame(),
        sweep,
        pilot.assumed(0.01) if known is None else known,
    )
    display(pilot.in_medians(table).round(5))
except RunsError as error:
    table = None
    print(f"There is nothing to compare: {error}.")

# %% [markdown]
# Where `realised` lies above the band, the pilot's noise was not the whole of it: what the line misses can't be seen in repeats of the same sets.
#
# Would fewer runs have done?
# A number of runs suffices where every slope's reported half-width is within the target, and stays so with more runs.

# %%
target = 0.01  # log loss per sd of a row: one per cent of the loss
if table is not None:
    display(pilot.within_target(table, target))
    display(
        table.pivot(
            index="coefficient", columns="runs", values=["planned", "hc3"]
        ).round(4)
    )

# %% [markdown]
# ## Do the two evaluation sets agree?

# %%
agreement = np.corrcoef(sweep["log_loss"], sweep["log_loss_eval_2"])[0, 1]
print(f"correlation of the log losses on the two evaluation sets: {agreement:.3f}")
figures.plot_two_losses(sweep)

# %% [markdown]
# ## In this notebook we have seen
#
# - one record for each run;
# - how the loss differs between sources and within them;
# - the noise of a seed, and the larger noise that a straight line leaves;
# - how far the plan made before the runs was right, and whether fewer runs would have done.
