"""Numbers that README and book tell by hand are those of evidence, plan and table."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from instructmining.plan import STAGES, expected_runs
from instructmining.profile import load_profile
from instructmining_core.finetuning.ledger import RunArchive

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "evidence" / "laptop"


def test_readme_tells_the_committed_study():
    told = " ".join((ROOT / "README.md").read_text().split())
    ours = pd.read_csv(EVIDENCE / "verdict.csv").set_index("claim")["ours"]
    assert f"{len(RunArchive(EVIDENCE / 'ledger').records())} finetunes" in told
    assert f"({re.match(r'R² .*?]', ours['rule_predicts'])[0]}, p" in told
    found = re.findall(r"models: (r = .*?])", ours["loss_predicts_tasks"])
    assert len(found) == 2 and all(one in told for one in found)
    for pool in ("0 % defects", "50 % defects"):
        effect = re.search(rf"unseen sources, {pool}: (.*?])", ours["selected_beats_random"])[1]
        assert effect.replace("+", "") in told
    doses = dict(re.findall(r"(\w+) (\+\S+ %) \[\+", ours["loss_is_quality"]))
    assert {f"({dose})" for dose in doses.values()} == set(re.findall(r"\(\+\S+ %\)", told))


def test_the_page_on_real_data_tells_the_plan():
    page, profile = (ROOT / "book" / "real_data.md").read_text(), load_profile("replication")
    sources, pools = len(profile.data.sources), len(profile.data.pools_of)
    runs = {one: expected_runs(profile, one, sources, pools) for one in STAGES}
    told = dict(re.findall(r"^\| (regime|doses|sweep|gate) \| (\d+) \|", page, re.MULTILINE))
    assert {name: int(number) for name, number in told.items()} == {
        "regime": runs["regime"], "doses": runs["dose"], "sweep": runs["sweep"],
        "gate": runs["gate"] + runs["refit"],
    }  # fmt: skip
    done = RunArchive(ROOT / "evidence" / "replication" / "ledger").load().set_index("kind")
    readme = (ROOT / "README.md").read_text()
    assert f"{len(done)} of the {sum(runs.values())} runs are done" in page
    assert f"{len(done)} of {sum(runs.values())} runs" in readme
    for end, told in (("", "0.027 ± 0.005", ), ("_token", "0.036 ± 0.003")):
        mixed = done.loc["mixture", f"loss_regime{end}"]
        gain = done[f"base_regime{end}"].iloc[0] - mixed.mean()
        first = done.loc["mixture"].query("seed == 0")[f"loss_regime{end}"].item()
        cost = done.loc["other_answer", f"loss_regime{end}"] - first
        assert f"{gain:.3f} ± " in told and told in page and f"{cost:.3f} ± " in page


def test_the_book_tells_the_fuzzers_table():
    page = (ROOT / "book" / "measured.md").read_text()
    table = pd.read_csv(ROOT / "bench" / "fuzz.csv")
    assert f"{table['inputs'].sum():,} inputs" in page and not table["findings"].any()
    assert f"took {table['slowest_s'].max():.1f} seconds" in page
    assert f"memory stayed at {table['peak_gib'].max():.2f} GiB" in page
