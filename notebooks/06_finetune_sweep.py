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
# We ask:
#
# - what the runs cost and what came out;
# - how far the loss is a matter of the source;
# - how large the noise is;
# - whether the plan was right, and whether fewer runs would have done;
# - whether the evaluation sets agree;
# - whether another machine or precision says the same.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## Run the sweep

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown

from instructmining import figures
from instructmining.experiments import machines, pilot
from instructmining.experiments.comparisons import sweep_plans
from instructmining.study import Study
from instructmining_core.regression.inference import seed_variance
from instructmining_core.regression.run_table import RunsError

study = Study.open(profile)
runs = study.run("sweep", sweep_plans(study))
sweep = study.sweep()
losses = [c for c in ("base_eval_1", "loss_eval_1", "loss_eval_1_token", "loss_eval_2", "relevance") if c in sweep]
display(sweep[losses].describe().round(4))
lost = (runs["status"] != "done").sum()
words = ""
if "base_eval_1" in sweep:
    words = f"The base itself stands at {sweep['base_eval_1'].iloc[0]:.4f}, and {(sweep['loss_eval_1'] < sweep['base_eval_1']).mean():.0%} of the runs end below it."
if "relevance" in sweep:
    words += f" Under another row's question the same answers cost {sweep['relevance'].median():+.4f} nats more after a typical run, {sweep['base_relevance'].iloc[0]:+.4f} before any: that much of the question reaches the answer."
Markdown(f"""
{len(sweep)} runs trained on {sweep['tokens_trained'].sum():,} tokens in {sweep['seconds'].sum() / 60:.1f} minutes of training and evaluation; {lost or 'none'} diverged.
The loss on the first evaluation set goes from {sweep['loss_eval_1'].min():.4f} to {sweep['loss_eval_1'].max():.4f} nats a token: the worst set costs {100 * (sweep['loss_eval_1'].max() / sweep['loss_eval_1'].min() - 1):.1f} % more than the best.
{words}
""")

# %% [markdown]
# ## Does the loss depend on the source?
#
# One line of pandas asks it: sets drawn within one source, by source.
# If these differ much, a rule could be nothing but a list of sources.

# %%
display(figures.plot_loss_by_source(sweep))
within = sweep[(sweep["arm"] == "within") & ~sweep.duplicated("set_id")]
by_source = within.groupby("source")["log_loss"].agg(["count", "mean", "std"])
display(by_source.sort_values("mean").round(4))
between = 1 - (within["log_loss"] - within["source"].map(by_source["mean"])).var() / within["log_loss"].var()
Markdown(f"""
Sets of {by_source['mean'].idxmin()} end lowest and sets of {by_source['mean'].idxmax()} highest, {100 * np.expm1(by_source['mean'].max() - by_source['mean'].min()):.1f} % of the loss apart.
{between:.0%} of the variance of these sets' losses lies between sources; a rule about rows can explain the rest at most.
""")

# %% [markdown]
# ## How large is the noise?
#
# The anchors are sets that were run again with other seeds, so pandas gives the noise *between seeds*: the standard deviation of the log loss inside a set, pooled over the sets.
# The core does the same and adds bounds.
# The fit of the rule to the designed sets leaves residuals, which also hold what a straight line in the set means misses: this decides how wide the intervals are.

# %%
seeds, fit = pilot.sweep_noise(study)
words = "No set was repeated: the noise between seeds is assumed to be 0.01."
if seeds is None:
    seeds = pilot.assumed(0.01)
else:
    repeated = sweep[sweep.duplicated("set_id", keep=False)]
    parts = repeated.groupby("set_id")["log_loss"].agg(["var", "count"])
    by_hand = np.sqrt((parts["var"] * (parts["count"] - 1)).sum() / (parts["count"] - 1).sum())
    np.testing.assert_allclose(by_hand, seed_variance(sweep).sd)
    words = f"By pandas and by the core the noise between seeds is {by_hand:.4f} in log loss, with bounds [{seeds.low:.4f}, {seeds.high:.4f}] from {seeds.df} degrees of freedom."
display(pilot.noise_table(seeds, fit).round(5))
spread = sweep.groupby("arm")["log_loss"].std()
left = f"The line leaves {fit.sigma / seeds.sd:.1f} times that." if fit is not None else "No line can be fitted to so few sets."
Markdown(f"""
{words}
{left}
Against it stands a spread over sets of {', '.join(f'{value:.4f} in the arm {arm}' for arm, value in spread.items())}.
""")

# %% [markdown]
# ## Was the plan right?
#
# Notebook 04 planned with the pilot's noise between seeds.
# Every 30 runs we plan anew, with the residuals of the fit once it has more degrees of freedom than the pilot.
# The table sets the half-widths that were planned against those that the runs then gave, as medians over the coefficients: `planned` with its 80 % band, `realised` by the same formula with the residuals' noise, and `hc3`, which the rule reports.

# %%
known = pilot.run_pilot(study, progress=False)
try:
    table = pilot.replanned(study, study.set_frame(), sweep, pilot.assumed(0.01) if known is None else known)
    medians = pilot.in_medians(table)
    display(medians.round(5))
    last = medians.iloc[-1]
    words = f"With all {medians.index[-1]} runs the realised half-width is {last['realised']:.4f}, planned were {last['planned']:.4f} [{last['low']:.4f}, {last['high']:.4f}]; {last['in_band']:.0%} of the coefficients lie in their band. " + (
        "It lies above the band, so the pilot's noise was not the whole of it: what the line misses can't be seen in repeats of the same sets."
        if last["realised"] > last["high"] else "The pilot's noise was enough to plan by."
    )
except RunsError as error:
    table, words = None, f"There is nothing to compare: {error}."
Markdown(words)

# %% [markdown]
# Would fewer runs have done?
# A number of runs suffices where every slope's reported half-width is within the target, and stays so with more runs.

# %%
target = 0.01  # log loss per sd of a row: one per cent of the loss
words = "Nothing to compare, so nothing to save."
if table is not None:
    within_target = (table["hc3"] <= target).groupby(table["runs"])
    reached = pd.DataFrame({"slopes": within_target.size(), "within": within_target.sum()})
    reached["suffices"] = within_target.all()[::-1].cummin()[::-1]
    display(reached)
    enough = reached.index[reached["suffices"]]
    words = f"{enough[0]} runs suffice for a half-width of {target} in every slope." if len(enough) else f"With all runs {reached['within'].iloc[-1]} of {reached['slopes'].iloc[-1]} slopes are within {target}; more runs would have been of use."
Markdown(words)

# %% [markdown]
# ## Do the evaluation sets agree?

# %%
display(figures.plot_two_losses(sweep))
agreement = np.corrcoef(sweep["log_loss"], sweep["log_loss_eval_2"])[0, 1]
Markdown(f"""
Over the sets the log losses on the two evaluation sets have a correlation of {agreement:.3f}: a set that is good for one is {'good' if agreement > 0.8 else 'often good' if agreement > 0.4 else 'not therefore good'} for the other.
""")

# %% [markdown]
# ## Would another machine or precision say the same?
#
# `python -m instructmining.book compare` does finished runs again: the same sets and seeds, with another number of threads, in another precision or on another machine.

# %%
words = "No run of this study has been done again yet."
if study.has_own("compared.parquet"):
    compared = study.frame("compared.parquet")
    moved, gained = machines.differences(compared), machines.gains(compared)
    display(moved.round(5))
    display(gained.round(5))
    first = moved[moved["loss"] == "loss_eval_1"]
    furthest = first.loc[first["largest"].idxmax()]
    words = f"No loss on the first evaluation set moved by more than {furthest['largest']:.2g} nats, where sets differ by {furthest['spread']:.2g} (sd); that was in {furthest['dtype_again']} on {furthest['threads_again']:.0f} thread{'' if furthest['threads_again'] == 1 else 's'} of {furthest['machine_again']}."
    if len(gained):
        words += f" What the selected rows gain over random ones changed its sign in {gained['turned'].sum()} of {len(gained)} comparisons of a pool."
Markdown(words)

# %% [markdown]
# ## In this notebook we have seen
#
# - one record for each run, and what all of them cost;
# - how the loss differs between sources and within them;
# - the noise of a seed, by pandas and by the core, and the noise that a straight line leaves;
# - how far the plan made before the runs was right, and whether fewer runs would have done;
# - how far the evaluation sets agree;
# - what happens to the losses when runs are done again elsewhere.
