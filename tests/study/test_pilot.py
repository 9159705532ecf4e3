"""The planner wired to a study: pilot runs, half-widths, replanning, and the choice of sets."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2, t

from bench.studies import COLUMNS, synthetic_world
from instructmining.cli import main
from instructmining.design import chosen, design_matrix, drawn, gain
from instructmining.experiments import pilot
from instructmining.profile import DesignConfig, load_profile
from instructmining.study import Study
from instructmining_core.config import FinetuneConfig
from instructmining_core.finetuning import sweep
from instructmining_core.finetuning.run_spec import EvalSets
from instructmining_core.finetuning.sets import anchors, designed_sets, fusion_sets, set_means
from instructmining_core.regression.planner import half_widths
from instructmining_core.regression.rule import fit_rule
from instructmining_core.regression.run_table import RankError, Standardizer

DESIGN = DesignConfig(size=100, fusion=35, within=60, mixed=30, anchors=8, anchor_seeds=2)
NOISE, MISSED = 0.01, 0.03  # sd between seeds; sd of what a line misses, the same at every seed


class Invented(Study):
    """A study of a synthetic world: designed sets, and losses that no model gave."""

    def __init__(self, folder, design=DESIGN, missed=MISSED, has_sweep=True):
        world = synthetic_world(9, rows=300, seed=4)
        self.profile = SimpleNamespace(design=design, rule_columns=lambda: list(COLUMNS),
                                       indicators=COLUMNS, finetune=FinetuneConfig())
        self.name, self.folder, self._noted, self._asked = "invented", folder, set(), {}
        self.world, self.missed, self.has_sweep, self.calls = world, missed, has_sweep, []
        self.drawn = fusion_sets(world, design.fusion, design.size, 1)
        made = designed_sets(world, design.within, design.mixed, design.size, seed=1,
                             columns=COLUMNS)
        self.drawn += made + anchors(made, design.anchors, range(1, design.anchor_seeds + 1))

    sets = property(lambda self: self.drawn)
    scores = property(lambda self: self.world)
    candidate_scores = property(lambda self: self.world)

    def has_own(self, name):
        return self.has_sweep or name != "runs/sweep.json"

    def runs(self, purpose):
        return self.losses(pilot.sweep_plans(self))

    def run(self, purpose, plans, *, listed="", progress=True):
        self.calls.append((purpose, listed, len(plans)))
        return self.losses(plans)

    def losses(self, plans):
        rows = []
        for plan in plans:
            seed = int(plan.label["set_id"][:8], 16)
            own = np.random.default_rng(seed).normal(0, self.missed)
            noise = np.random.default_rng([seed, plan.init_seed]).normal(0, NOISE)
            loss = np.exp(1 + own + noise)
            rows.append({**plan.label, "init_seed": plan.init_seed, "loss_eval_1": loss,
                         "status": "done", "loss_eval_1_token": loss, "loss_eval_2": loss,
                         "tokens_trained": 1, "seconds": 1.0})
        return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Invented(tmp_path_factory.mktemp("study"))


def test_the_pilot_is_four_anchors_on_three_seeds_of_the_sweep(study, tmp_path):
    plans = pilot.pilot_plans(study)
    assert Counter(Counter(p.label["set_id"] for p in plans).values()) == {3: 4}
    assert {p.init_seed for p in plans} == {0, 1, 2}
    whole = pilot.sweep_plans(study)
    assert all(plan in whole for plan in plans)
    few = DesignConfig(size=100, fusion=2, within=60, mixed=30, anchors=2, anchor_seeds=1)
    assert len(pilot.pilot_plans(Invented(tmp_path, few))) == 4
    none = DesignConfig(size=100, fusion=2, within=60, mixed=30, anchors=0, anchor_seeds=0)
    assert pilot.run_pilot(Invented(tmp_path, none)) is None


def test_the_pilots_noise_is_that_between_seeds(study):
    found = pilot.run_pilot(study)
    assert study.calls[-1] == ("sweep", "pilot", 12)
    logs = study.losses(pilot.pilot_plans(study)).assign(
        log_loss=lambda f: np.log(f["loss_eval_1"]))
    by_hand = np.sqrt(logs.groupby("set_id")["log_loss"].var().mean())
    assert found.sd == pytest.approx(by_hand) and found.df == 8
    made_up = pilot.assumed(0.01)
    assert made_up.high == pytest.approx(0.01 * np.sqrt(8 / chi2.ppf(0.025, 8)))


def test_a_pilots_runs_have_the_sweeps_ids_and_their_own_list(study, tmp_path, monkeypatch):
    """Study.run itself: `listed` changes which list is written, never a run id."""
    asked = []

    def noted(specs, *rest, **more):
        asked.append(specs)
        return pd.DataFrame(index=range(len(specs)))

    monkeypatch.setattr(sweep, "run_sweep", noted)
    real = Invented(tmp_path)
    base = SimpleNamespace(id="b", revision="r")
    real.lm = SimpleNamespace(dtype="torch.float32", resolved=base, tokenizer=None)
    real.encoded_evals = lambda *args: EvalSets()
    real.encoded_rows = lambda *args: {}
    real.ledger = SimpleNamespace(kept=lambda run_ids: 0)
    Study.run(real, "sweep", pilot.sweep_plans(real))
    Study.run(real, "sweep", pilot.pilot_plans(real), listed="pilot")
    whole, few = ([spec.run_id for spec in specs] for specs in asked)
    assert set(few) < set(whole) and len(few) == 12
    assert json.loads((tmp_path / "runs" / "sweep.json").read_text()) == whole
    assert json.loads((tmp_path / "runs" / "pilot.json").read_text()) == few


def test_half_widths_of_both_arms_and_the_runs_a_target_needs(study):
    frame, noise = study.set_frame(), pilot.assumed(NOISE)
    table = pilot.planned_half_widths(study, frame, noise)
    assert table.groupby("arm")["runs"].max().to_dict() == {"fusion": 35, "designed": 90}
    rows = frame[frame["arm"] != "fusion"].sample(frac=1.0, random_state=DESIGN.seed)
    shares = rows[[c for c in rows if c.startswith("share_")]].to_numpy()
    X = Standardizer.fit(study.world, COLUMNS).transform(rows)[list(COLUMNS)].to_numpy()
    by_hand = half_widths(np.hstack([shares, X]), NOISE)[-9:]
    last = table.query("arm == 'designed' and runs == 90")
    assert last["half_width"].to_numpy() == pytest.approx(by_hand)
    cells = pilot.in_cells(table)
    assert cells.at["log_ppl", ("designed", 90)].startswith(f"{by_hand[3]:.4f} [")
    plan = pilot.arm_plan(study, frame, noise, every=10)
    row = plan.table.query("runs == 70 and coefficient == 'log_ppl'").iloc[0]
    target = float(row["half_width"])
    needed = pilot.runs_needed(plan, target)
    assert needed.at["log_ppl", "expected"] == 70
    assert needed.at["log_ppl", "safe"] > 70 or np.isnan(needed.at["log_ppl", "safe"])


def test_the_table_of_noise_shows_both_and_says_which_is_used(study):
    seeds, fit = pilot.sweep_noise(study)
    assert seeds.df == 16 and seeds.sd == pytest.approx(NOISE, rel=0.4)
    table = pilot.noise_table(seeds, fit)
    assert table["used"].tolist() == ["", "yes"]
    assert table.at["left by the line", "sd"] == pytest.approx(fit.sigma)
    assert table.at["left by the line", "sd"] > 2 * seeds.sd
    assert pilot.noise_table(seeds)["used"].tolist() == ["yes"]


def test_replanning_starts_from_the_pilot_and_learns_what_the_line_misses(study):
    runs, known = study.sweep(), pilot.run_pilot(study)
    table = pilot.replanned(study, study.set_frame(), runs, known)
    medians = pilot.in_medians(table)
    assert medians.index.tolist() == [30, 60, 90]
    assert medians.at[30, "noise"] == known.sd
    assert medians.at[60, "noise"] == medians.at[30, "residual_sd"] > 2 * known.sd
    # the pilot can't see what the line misses; planned anew, the band holds
    assert medians.at[30, "in_band"] == 0 and medians.at[90, "in_band"] == 1
    fit = fit_rule(runs, COLUMNS, Standardizer.fit(study.world, COLUMNS))
    last = table[table["runs"] == 90]
    classical = t.ppf(0.975, fit.df) * fit.ols.bse[-9:]
    assert last["realised"].to_numpy() == pytest.approx(classical)
    reported = (fit.table()["high"] - fit.table()["low"]) / 2
    assert last["hc3"].to_numpy() == pytest.approx(reported.to_numpy())


def test_no_candidates_is_the_plain_draw_of_before():
    world = synthetic_world(9, rows=300, seed=4)
    before = designed_sets(world, 60, 30, 100, 1.5, 1, columns=COLUMNS, min_sources=8,
                           sets_per_source=6)
    assert chosen(world, DESIGN, COLUMNS, 0) == before
    assert load_profile("colab").design.candidates >= 1000


def test_chosen_sets_keep_every_sources_number_and_gain():
    world = synthetic_world(9, rows=300, seed=4)
    plain, best = drawn(world, DESIGN, COLUMNS), chosen(world, DESIGN, COLUMNS, 180)
    assert Counter(s.source for s in best) == Counter(s.source for s in plain)
    assert len({s.set_id for s in best}) == 90
    M = design_matrix(best, world, COLUMNS)
    shares = pd.DataFrame([s.shares for s in best]).fillna(0).sort_index(axis=1)
    means = set_means(best, world, COLUMNS)
    constants = Standardizer.fit(world, COLUMNS)
    assert M[:, :9] == pytest.approx(shares.to_numpy())
    assert M[:, 9:] == pytest.approx(((means - constants.mean) / constants.sd).to_numpy())
    table = gain(world, DESIGN, COLUMNS, 180)
    assert table["chosen"].to_numpy() == pytest.approx(half_widths(M, 1.0)[-9:])
    assert table["gain"].median() > 1.05
    few = DesignConfig(size=100, fusion=0, within=8, mixed=2, candidates=50)
    with pytest.raises(RankError, match="10 designed sets can't fit"):
        chosen(world, few, COLUMNS, few.candidates)


@pytest.mark.parametrize("options, says, never", [
    (["--pilot", "--target", "0.02"], ["a pilot of 12 runs, and from the sweep", "between seeds",
     "left by the line", "half-width of 0.02"], ["assumed"]),
    (["--sigma", "0.02"], ["assumed by --sigma", "take these as the least"], ["left by the line"]),
    ([], ["from the sweep that has been run", "left by the line"], ["assumed"])])
def test_plan_tells_the_noise_the_widths_and_the_advice(study, monkeypatch, capsys, options, says,
                                                        never):
    monkeypatch.setattr(Study, "open", lambda name: study)
    assert main(["plan", "--profile", "invented", *options]) == 0
    said = capsys.readouterr().out
    for part in [*says, "more runs do not help, add sources", "Plan anew after 30 runs", "safe"]:
        assert part in said
    assert not any(part in said for part in never)


def test_plan_without_a_pilot_or_with_two_noises_is_an_error(tmp_path, monkeypatch, capsys):
    none = DesignConfig(size=100, fusion=2, within=60, mixed=30, anchors=0, anchor_seeds=0)
    bare = Invented(tmp_path, none, has_sweep=False)
    monkeypatch.setattr(Study, "open", lambda name: bare)
    assert main(["plan", "--profile", "x", "--pilot"]) == 1
    assert "repeats no set" in capsys.readouterr().err
    assert main(["plan", "--profile", "x", "--pilot", "--sigma", "0.1"]) == 1
    assert main(["plan", "--profile", "x"]) == 0
    assert "0.01 assumed, for want of" in capsys.readouterr().out
    fused = Invented(tmp_path, DesignConfig(size=100, fusion=35, within=0, mixed=0, anchors=0,
                                            anchor_seeds=0), has_sweep=False)
    monkeypatch.setattr(Study, "open", lambda name: fused)
    assert main(["plan", "--profile", "x"]) == 0
    assert "no sets within sources" in capsys.readouterr().out


