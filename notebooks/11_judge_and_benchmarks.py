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
# # Does a judge prefer the selected model's answers?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/instructmining/instructmining/blob/main/notebooks/11_judge_and_benchmarks.ipynb)
#
# A lower loss is not yet a better answer.
# The paper lets GPT-4 compare answers, each pair in one order; judges favour a position, so here each pair is judged in both.
# We ask:
#
# - how the answers of a model trained on selected rows differ from those of one trained on random rows;
# - how good the judge is, against people or planted defects;
# - which of them the judge prefers, and how sure that is;
# - what the paper's own count says when it is treated in the same way;
# - whether the models differ in tasks with right answers.

# %% tags=["parameters"]
profile = "laptop"  # type: str  # a preset's name or a YAML file

# %% tags=["hide-input"]
# !test -n "$COLAB_RELEASE_TAG" && git clone -q --depth 1 https://github.com/instructmining/instructmining im && cp -r im/. . && pip install -q ".[study]"

# %% [markdown]
# ## Answers of both models
#
# Pairs of models, one finetuned on selected rows and one on random rows, answer the same prompts.

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown

from instructmining import claims, figures, paper
from instructmining.experiments import choice_tasks, judging
from instructmining.study import Study
from instructmining_core import load_rule
from instructmining_core.data.choices import write_task
from instructmining_core.selection import judge

study = Study.open(profile)
rule = load_rule(study.find("rule.json"))
pairs = judging.generate_pairs(study, rule)
words = pairs.groupby("pair")[["selected", "random"]].agg(lambda texts: texts.str.split().str.len().mean())
display(words.round(1))
same = (pairs["selected"] == pairs["random"]).mean()
Markdown(f"""
{pairs['pair'].nunique()} pairs of models answer {pairs['prompt_id'].nunique()} prompts; {same:.0%} of the answers are the same word for word.
The selected models' answers are {words['selected'].mean():.1f} words long, the random ones' {words['random'].mean():.1f}: where a judge likes length, that alone may decide.
""")

# %% [markdown]
# ## How good is the judge?
#
# The profile names the judge (`judge.kind`): a reward model, a language model by the likelihood of "A" and "B", or a model at a server, as GPT-4 was for the paper.
# Before it judges our models, it judges pairs of which it is known which answer is better: those that people compared, where the profile names such sets (`judge.checks`), and in the embedded corpus a clean answer beside its planted defect.
# A mean is a line of pandas; what it needs beside it is an interval over prompts, the share of verdicts for the answer shown first (½ without a position bias), and how much of the verdicts length explains: whoever prefers the longer answer is a judge too, and stands in the table.

# %%
name, judged_by = judging.open_judge(study)
checks = judging.check_judge(study, name, judged_by)
study.save(checks, "judge_checks.parquet")
own = checks[checks["judge"] == name]
display(checks.set_index(["check", "judge"]).round(2))
lines = [
    f"On {row.check} it agrees in {row.agreement:.0%} [{row.low:.0%}, {row.high:.0%}] of {row.pairs} pairs and is {row.verdict}; the answer shown first gets {row.first:.0%} of its verdicts, and length explains {row.length:.0%} of them."
    for row in own.itertuples()
]
good = bool(len(own)) and (own["verdict"] == judge.ABOVE).all()
Markdown(f"""
The judge is the {name}.
{' '.join(lines) or 'No check is named in this profile.'}
{'So its verdicts below count.' if good else 'So it judges nothing: what follows shows the procedure, and the front page has no verdict of it.'}
""")

# %% [markdown]
# ## Wins, ties and losses
#
# To count is a line of pandas, and the share of wins minus that of losses is the *net win*; a prompt on which the judge contradicts itself is a tie.
# The core adds what the count lacks: both orders, an exact test, and an interval that takes prompts as drawn at random, and pairs of models too.
# The length-controlled net win is that of AlpacaEval 2: a logistic regression with the difference in length, read off where it is 0.

# %%
judged = judging.judge_models(judged_by, pairs)
study.save(judged, "judge.parquet")

by_hand = 2 * judged["score"].mean() - 1
net, controlled = judge.net_win(judged), judge.length_controlled(judged)
if judged["score"].notna().all():
    np.testing.assert_allclose(by_hand, net.net, atol=1e-9)
display(judge.win_tie_lose(judged).round(3))
Markdown(f"""
By hand the net win is {by_hand:+.3f}, and so it is by the core: {net.net:+.3f} [{net.low:+.3f}, {net.high:+.3f}], p = {net.p:.2g}, which speaks of {net.scope}.
At equal length it would be {controlled.net:+.3f} [{controlled.low:+.3f}, {controlled.high:+.3f}].
{f'A net win of {net.detectable:.2f} would have been found four times in five.' if np.isfinite(net.detectable) else 'The answers do not differ enough to say what could have been found.'}
{net.inconsistent:.0%} of the verdicts changed with the order, and {(judged['outcome'] == 'none').mean():.0%} of the prompts got no verdict.
""")

# %%
figures.plot_judge_bars(judged, paper.JUDGE)

# %% [markdown]
# We see one bar a pair of models, and the paper's count as we infer it.
# A pair of models allows a statement about these two models; the interval over pairs and prompts is for the method.
#
# ## The paper's count, treated in the same way

# %%
published = judge.net_win_of_counts(**paper.JUDGE)
study.record_claim("judged_better", **claims.judge_claim(net, own))
display(pd.DataFrame({"here": vars(net), "at equal length": vars(controlled), "the paper": vars(published)}))
Markdown(f"""
The paper's {paper.JUDGE['win']} wins, {paper.JUDGE['tie']} ties and {paper.JUDGE['lose']} losses are a winning score of {published.winning_score:.4f}, a net win of {published.net:+.2f} [{published.low:+.2f}, {published.high:+.2f}], p = {published.p:.2f}: {'more than a tie' if published.low > 0 else 'not to be told from a tie'}.
""")

# %% [markdown]
# ## Benchmarks
#
# The paper also reports four tasks of the OpenLLM leaderboard, without an interval.
# They need the hub; two tasks of the same form need none: which docstring belongs to this function, and which of two answers was preferred.
# Where the profile names them (`data.choices`), every run of the study answered them: the choice with the largest likelihood per character, `acc_norm` of `lm-eval`.
# A share of right answers needs no core; what it needs is an interval, and models that are paired question by question.

# %%
gate = study.frame("comparison.parquet").query("method in ('selected', 'random')")
ledger = study.ledger_of(study.find("ledger"))
record = ledger.read(gate["run_id"].iloc[0])
words = "Not evaluated: no run was asked a task, since the profile's `data.choices` is empty."
if "base_choices" in record:
    base = choice_tasks.base_scores(study.choices, record)
    display(base.round(3))
    benchmark = choice_tasks.selected_against_random(ledger, gate)
    display(benchmark.round(3))
    for name, questions in study.choices.items():
        write_task(study.folder / "tasks", name, questions)
    able = base.index[base["above_chance"]]
    clear = benchmark[benchmark["low"] * benchmark["high"] > 0]
    words = f"""
The untuned base is above chance on {len(able)} of {len(base)} tasks ({', '.join(able) or 'none'}); on the others no difference can be expected.
Of {len(benchmark)} differences between selected and random rows {len(clear)} can be told from none; they go from {100 * benchmark['difference'].min():+.1f} to {100 * benchmark['difference'].max():+.1f} points."""
Markdown(words)

# %% [markdown]
# The tasks lie in `results/<profile>/tasks` in `lm-eval`'s own form, for whoever wants to ask another model.
# `python -m bench.openllm` (extra `benchmarks`) trains the base's selected and random models again from their records and lets `lm-eval` answer: these two tasks, whose numbers must be ours, and where the hub can be reached ARC, HellaSwag, MMLU and TruthfulQA with the leaderboard's shots.
#
# The paper's Table 4, for comparison: one model a row.

# %%
paper.table_4()

# %% [markdown]
# ## In this notebook we have seen
#
# - answers of paired models to the same prompts;
# - how far the judge agrees with what is known, its position bias, and what length explains;
# - the net win by hand and from the core, with an interval that counts prompts and pairs, and at equal length;
# - whether the paper's own count can be told from a tie;
# - two tasks with right answers, and what selecting does to them.
