"""What others chose from Alpaca, and what experts revised, beside the rules that there are so far.

    python -m bench.outside --rows 3000 --table book/_generated

scores so many rows of the replication's Alpaca (a seeded draw of its candidates and its pool) and
its expert pairs, and writes `outside.csv`. The rules are the paper's in published
form and the published book's own, which was fitted to docstrings; notebook 08 of the replication
does the same with a rule that was fitted to instructions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from instructmining.experiments import outside
from instructmining.study import Study
from instructmining_core import files
from instructmining_core.regression.rule_card import load_rule

PROFILE = "replication"


def main() -> None:
    """Score, compare, write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.outside", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--table", type=Path, required=True, help="folder")
    options = parser.parse_args()
    study = Study.open(PROFILE)
    source = study.profile.outside.of
    rows = pd.concat([study.data.candidates.query("source == @source"), study.data.pools[source]])
    rows = rows.drop_duplicates("row_hash").sample(options.rows, random_state=1)
    scores = study.scorer().score(rows, progress=True)
    rules = {"v1 in form": load_rule("v1"), "v3 in form": load_rule("v3"),
             "laptop": load_rule(files.evidence("laptop") / "rule.json")}
    chosen = outside.published_selections(study, scores)
    others = outside.chosen_by_others(scores, chosen, rules)
    revised = outside.preferred_by_experts(*outside.score_pairs(study), rules)
    print(others.round(3).to_string(), revised.round(3).to_string(), sep="\n")
    both = pd.concat([others.rename(columns={"auc": "value", "chosen": "of"}), revised.rename(
        columns={"right": "value", "pairs": "of"}).assign(selection="pairs revised by experts")])
    cells = [f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in both.itertuples()]
    wide = both.assign(cell=cells).pivot(index=["selection", "of"], columns="by", values="cell")
    wide = wide[[*rules, *outside.RIVALS]].reset_index()
    wide.to_csv(options.table / "outside.csv", index=False)


if __name__ == "__main__":
    main()
