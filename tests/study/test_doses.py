"""Answers made worse on real data: the sets, and what remains of the gain."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from instructmining import figures
from instructmining.experiments import comparisons, planted_defects, regime
from instructmining.profile import DesignConfig, RegimeConfig, SelectionConfig
from instructmining_core.config import FinetuneConfig, ProfileError
from instructmining_core.data.records import with_row_hash

WORDS = "the red fox sees a blue bird above some old tree while warm rain falls".split()


def real_rows(each: int) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    for source in "ab":
        for i in range(each):
            answer = f"{source}{i} " + " ".join(rng.permutation(WORDS))
            rows.append((f"{source}-{i}", source, [{"role": "user", "content": f"ask {source} {i}"},
                                                   {"role": "assistant", "content": answer}]))
    short = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Yes."}]
    return with_row_hash(pd.DataFrame([*rows, ("a-x", "a", short)],
                                      columns=["id", "source", "messages"]))  # fmt: skip


def study_of(**selection):
    profile = SimpleNamespace(
        selection=SelectionConfig(**selection), design=DesignConfig(size=8),
        regime=RegimeConfig(learning_rates=(1e-3, 3e-4), rows=(6, 8), layers=(0,), draws=2),
        finetune=FinetuneConfig(), data=SimpleNamespace(seed=1),
    )  # fmt: skip
    data = SimpleNamespace(candidates=real_rows(12), exams={"regime": None})
    return SimpleNamespace(profile=profile, data=data)


def test_dose_sets_of_real_rows_are_made_of_rows_of_the_same_source():
    study = study_of(dose_levels=(0.0, 0.5, 1.0), dose_seeds=2, dose_rows=(8, 16),
                     dose_kinds=("other_answer", "scrambled", "cut_short", "repetitive"),
                     dose_partial=("scrambled",))  # fmt: skip
    table = planted_defects.dose_sets_of(study)
    assert "a-x" not in set(table["id"]), "too short to be cut or scrambled"
    sets = table.groupby(["size", "set_kind", "dose"])["seed"].nunique()
    assert len(sets) == 2 * (1 + 4) + 1 and (sets == 2).all()
    assert ("8", "scrambled", 0.5) not in sets.index and (8, "scrambled", 0.5) in sets.index
    own = table.query("size == 16 and seed == 0")
    clean, other = (own[own["set_kind"] == kind] for kind in ("clean", "other_answer"))
    assert clean["prompt"].tolist() == other["prompt"].tolist()
    answers = {m[1]["content"]: s for m, s in zip(study.data.candidates["messages"],
                                                  study.data.candidates["source"], strict=True)}
    for right, wrong in zip(clean.itertuples(), other.itertuples(), strict=True):
        text = wrong.messages[1]["content"]
        assert text != right.messages[1]["content"] and answers[text] == right.source
    plans = planted_defects.dose_plans(table)
    assert len(plans) == 2 * len(sets)
    assert {p.label["size"] for p in plans[:6]} == {8, 16}, "any first part holds both sizes"


def test_the_regimes_sets_and_plans():
    study = study_of()
    table = regime.regime_sets(study)
    sets = table.groupby(["size", "set"])["seed"].nunique()
    each = {"a": 1, "b": 1, "mixture": 2, "other_answer": 1}
    assert sets.to_dict() == {(n, name): of for n in (6, 8) for name, of in each.items()}
    rows = table.groupby(["size", "set", "seed"]).size()
    assert all(n == key[0] for key, n in rows.items())
    plans = regime.regime_plans(study, table)
    assert len(plans) == 4 * 5 and all(p.exams == ("regime",) for p in plans)
    first = {(p.config.learning_rate, len(p.row_hashes)) for p in plans[:4]}
    assert len(first) == 4, "every setting has begun after one run each"
    del study.data.exams["regime"]
    with pytest.raises(ProfileError, match="regime_prompts"):
        regime.regime_sets(study)


def test_both_means_with_their_errors():
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 60, 400).astype(float)
    nll = tokens * rng.normal(0.3, 0.5, 400)
    tokens[0], nll[0] = 0.0, 0.0  # an answer without a body counts nothing
    found = regime.both_means(nll, tokens, "gain")
    each = nll[1:] / tokens[1:]
    assert found["gain"] == pytest.approx(each.mean())
    assert found["gain_se"] == pytest.approx(stats.sem(each))
    assert found["gain_token"] == pytest.approx(nll.sum() / tokens.sum())
    drawn = rng.integers(1, 400, (4000, 399))
    resampled = nll[drawn].sum(1) / tokens[drawn].sum(1)
    assert found["gain_token_se"] == pytest.approx(resampled.std(), rel=0.06)  # resampling: 1 %


def test_the_criterion_in_words_when_nothing_is_admissible():
    index = pd.MultiIndex.from_tuples([(0, 96, 1e-3), (6, 96, 1e-3)], names=regime.SETTING)
    table = pd.DataFrame({"admissible": False, "chosen": False}, index=index)
    assert regime.in_words(table).startswith("None of the 2 settings is admissible")
    table.iloc[0] = True
    assert "takes all layers, 96 rows and a learning rate of 0.001" in regime.in_words(table)


def dose_runs(clean_gain: float) -> pd.DataFrame:
    rows = []
    for kind, dose, cost in (("clean", 0.0, 0.0), ("blind", 1.0, 0.0), ("bad", 0.5, 0.02),
                             ("bad", 1.0, 0.08)):  # fmt: skip
        for seed, noise in enumerate((-0.001, 0.0, 0.001)):
            loss = 2.0 - clean_gain + cost + noise
            rows.append({"kind": kind, "dose": dose, "rows": 96, "seed": seed, "loss_eval_1": loss,
                         "loss_eval_1_token": loss, "base_eval_1": 2.0, "base_eval_1_token": 2.0})
    return pd.DataFrame(rows)


def test_shares_of_the_gain_that_remain():
    table = planted_defects.dose_shares(dose_runs(0.1)).set_index(["averaging", "kind", "dose"])
    assert table.loc[("prompts", "bad", 1.0), "share"] == pytest.approx(0.2)
    assert table.loc[("tokens", "bad", 0.5), "cost"] == pytest.approx(0.02)
    assert table.loc[("prompts", "blind", 1.0), ["share", "sees"]].tolist() == [1.0, False]
    assert planted_defects.unseen_kinds(table.reset_index()) == ["blind"]
    one, other = pd.Series([1.0, 2.0, 3.0]), pd.Series([0.0, 1.0, 5.0])
    theirs = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
    ours = comparisons.welch_interval(one, other)
    assert ours == pytest.approx((theirs.low, theirs.high))
    small = planted_defects.dose_shares(dose_runs(0.002))
    assert small["share"].isna().all(), "a gain within eight standard errors has no shares"


def test_the_two_figures_show_their_tables():
    share = figures.plot_dose_shares(planted_defects.dose_shares(dose_runs(0.1)))
    assert [ax.get_title(loc="left") for ax in share.axes] == ["blind", "bad"]
    line = share.axes[1].get_lines()[1]
    np.testing.assert_allclose(line.get_ydata(), [100, 80, 20])
    nats = figures.plot_dose_shares(planted_defects.dose_shares(dose_runs(0.002)))
    assert "nats" in nats.axes[0].get_ylabel()
    runs = pd.DataFrame({"kind": ["mixture", "a"] * 2, "layers": 0, "rows": 96,
                         "learning_rate": [1e-3, 1e-3, 3e-4, 3e-4], "loss_regime": 1.9,
                         "loss_regime_token": 1.8, "base_regime": 2.0, "base_regime_token": 2.0})
    shown = figures.plot_regime(runs)
    assert shown.axes[0].get_title(loc="left") == "all layers, 96 rows"
    points = np.vstack([c.get_offsets() for c in shown.axes[0].collections])
    assert sorted(set(points[:, 0].round(6))) == [0.1, 0.2]
