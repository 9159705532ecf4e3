"""`instructmining select`: the best rows of a table, in their own columns, with the reasons.

With `--verify` they are set against random draws and rivals, finetuned: the gate of the statistical
plan, section 6, for one pool, the user's own file. Base model, evaluation sets, training and the
number of repeats are those of a profile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from instructmining_core.data.duplicates import RUN, THRESHOLD
from instructmining_core.data.export import SourceRows, keys_of, output_format, write_rows
from instructmining_core.files import file_sha256, refuse_overwrite
from instructmining_core.indicators.score_table import ScoreTable
from instructmining_core.models.hub import HubError
from instructmining_core.regression.rule_card import RuleCard, load_rule
from instructmining_core.selection.select import (
    BASELINES,
    TOKENS,
    Selection,
    choose_rows,
    choose_tokens,
)
from instructmining_core.selection.select import select as select_rows
from instructmining_core.selection.support import row_intervals, support

if TYPE_CHECKING:
    from instructmining_core.config import ModelRef

    from ..study import Study


LARGEST = 20_000  # kept rows above which a CPU would embed for more than minutes


def diversity(
    encoder: ModelRef | None, selection: Selection, sources: SourceRows
) -> dict[str, Any]:
    """Vendi score and nearest neighbours inside the kept rows, or `left_out` with the reason."""
    if encoder is None:
        return {"left_out": "no encoder is named: give --profile, or --models encoder=ID"}
    rows = len(selection.kept)
    if rows > LARGEST:
        return {"left_out": f"{rows:,} rows were kept, and more than {LARGEST:,} are not embedded"}
    from instructmining_core.indicators import embedding
    from instructmining_core.indicators.neighbours import of_set
    from instructmining_core.indicators.turns import read

    try:
        model = embedding.load_encoder(encoder)
    except HubError as error:
        return {"left_out": str(error)}
    return of_set([read(messages) for messages in sources.fetch(selection.kept)], model)


IDENTITY = ["id", "file", "row", "part", "rank", "score"]


def select_to(
    out: str, table: str, rule_name: str, top: int | str, *, moved: Sequence[str],
    allow_mismatch: bool, strict: bool, encoder: ModelRef | None, study: Study | None, show: bool,
) -> None:  # fmt: skip
    """Select from a score table by a rule; write the rows to `out`, the report beside them.

    top : rows to keep, or "auto"; moved : where scored files are now
    encoder : measures how diverse the selection is; None leaves that out
    study : whose base model is finetuned to verify the selection; None leaves that out
    """
    output_format(out)
    scores, rule = ScoreTable(table), load_rule(rule_name)
    differences = rule.check(
        scores.attrs, sources=scores.distinct(["source"])["source"].tolist(),
        allow_mismatch=allow_mismatch,
    )  # fmt: skip
    reach = support(rule, scores, strict=strict)
    _warn(rule_name, differences, reach)
    files = scores.distinct(["file", "file_sha256"])
    sources = SourceRows(files, beside=Path(table).parent, moved=moved)
    refuse_overwrite(out, (table, rule_name, *sources.files.values()))
    selection = select_rows(scores, rule, top, texts=sources.fetch)
    column, spelt_out = _write(out, selection, sources)
    report = {
        "out": out,
        "sha256": file_sha256(out),
        "scores": table,
        "files": {name: {"read_from": path, "sha256": sources.sha256[name]}
                  for name, path in sources.files.items()},
        "rule": {"name": rule_name, "kind": rule.kind, "hash": rule.content_hash,
                 "fitted_on": rule.fitted_on.model_dump(), "not_for": rule.not_for},
        "differences": differences,
        "support": json.loads(reach.reset_index().to_json(orient="records")),
        "top": top,
        "near_duplicate": {"run_of_words": RUN, "share_held_by_a_better_row": THRESHOLD},
        "counts": selection.counts(),
        "diversity": diversity(encoder, selection, sources),
        "score_column": column,
        "texts_spelt_out": spelt_out,
        "kept": _kept(selection, rule),
        "dropped": _dropped(selection),
    }  # fmt: skip
    if study is not None:
        pool = scores.rows()
        report["verdict"], page = verified(study, pool, rule, selection, sources, show=show)
        Path(f"{out}.verdict.md").write_text(page, encoding="utf-8")
    Path(f"{out}.report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    _tell(report)


def _warn(name: str, differences: list[str], reach: pd.DataFrame) -> None:
    if differences:
        sys.stderr.write(
            f"rule {name}: published form, other models or data; a ranking, no conclusion:\n"
            + "".join(f"  - {one}\n" for one in differences)
        )
    far = reach.index[reach["verdict"] == "far"]
    if len(far):
        sys.stderr.write(f"far from what the rule was fitted on: {', '.join(map(str, far))}\n")
    if (reach["verdict"] == "unknown").any():
        sys.stderr.write(f"rule {name} does not say which range it was fitted on: whether it "
                         "reaches these rows is unknown\n")  # fmt: skip


def _write(out: str, selection: Selection, sources: SourceRows) -> tuple[str, int]:
    """Write the kept records; the name of the score's column and how many texts were spelt out."""
    sources.fetch(selection.kept)
    keys = keys_of(selection.kept)
    records = [sources.records[key] for key in keys]
    # Some published sets have a `score` of their own, which stays.
    taken = any("score" in record for record in records)
    column = "instructmining_score" if taken else "score"
    scores = selection.kept["score"].astype(float).tolist()
    rows = [{**record, column: score} for record, score in zip(records, scores, strict=True)]
    table = sources.table(keys, column, scores) if output_format(out) == ".parquet" else None
    hashes = selection.kept.get("row_hash", pd.Series("", selection.kept.index)).tolist()
    columns = sources.read.get("columns")
    return column, write_rows(rows, out, table=table, hashes=hashes, columns=columns)


def _kept(selection: Selection, rule: RuleCard) -> list[dict]:
    """Each kept row with what every indicator adds to its score (to the rule's intercept).

    Where the card knows it, also the predicted log loss with its 95 % interval (`low`, `high`).
    """
    expected = row_intervals(rule, selection.kept)
    shares = rule.contributions(selection.kept).round(6).to_dict(orient="records")
    rows = _plain(selection.kept.join(expected), [*IDENTITY, *expected])
    return [{**row, "contributions": share} for row, share in zip(rows, shares, strict=True)]


def _dropped(selection: Selection) -> list[dict]:
    """Rows dropped for another reason than their rank; those below the cut are only counted."""
    return _plain(selection.dropped, [*IDENTITY, "why", "reason"])


def _plain(frame: pd.DataFrame, columns: list[str]) -> list[dict]:
    chosen = frame[[column for column in columns if column in frame]].astype({"rank": "Int64"})
    return json.loads(chosen.to_json(orient="records", double_precision=15))


def _tell(report: dict) -> None:
    counts, out, top = report["counts"], report["out"], report["top"]
    lines = [
        f"{counts['kept']:,} of {counts['rows']:,} rows in {out}; dropped: "
        + ", ".join(f"{counts[name]:,} {name}" for name in list(counts)[2:]),
        f"why each row was kept or dropped: {out}.report.json",
    ]
    if isinstance(top, int) and counts["kept"] < top:
        lines.append(f"fewer than the {top:,} asked for: there are no more rows to keep")
    if report["score_column"] != "score":
        lines.append(f"the data have a column 'score'; ours is {report['score_column']!r}")
    if report["texts_spelt_out"]:
        lines.append(f"{report['texts_spelt_out']} texts that {out} cannot hold are spelt out in "
                     "it (lone surrogates as \\ud800, bytes as base64)")  # fmt: skip
    if "verdict" in report:
        lines += _verdict(out, report["verdict"])
    sys.stdout.write("\n".join(lines) + "\n")


def _verdict(out: str, verdict: dict) -> list[str]:
    """The verdict's page and the contrasts of the selection, each with what it could have seen."""
    from ..reports import contrast_line

    with open(f"{out}.verdict.md", encoding="utf-8") as page:
        answer = page.readline().strip()
    numbers = pd.DataFrame(verdict["contrasts"]).astype(
        {name: float for name in ("difference", "low", "high", "detectable")}
    )
    lines = [answer, f"the pool is {verdict['pool']}: {verdict['pool_why']}"]
    lines += [
        f"verdict: {one['method']} against {one['versus']} at {one['budget']}: {contrast_line(one)}"
        for one in numbers.to_dict("records")
    ]
    return [*lines, f"the verdict in full: {out}.verdict.md"]


if TYPE_CHECKING:
    from ..study import Study

LARGEST_FULL = 10_000  # rows above which the "full data" rival is left out, for its time
TOKEN_RIVALS = ("random", "longest", "shortest")  # chance, and both ends of length


def verified(
    study: Study, scores: pd.DataFrame, rule: RuleCard, selection: Selection, sources: SourceRows,
    *, show: bool,
) -> tuple[dict, str]:
    """Finetune and compare; the contrasts as plain records, and the verdict's page in Markdown.

    Raises InstructMiningError where the pool is too small for a random draw of another kind than
    the selection.
    """
    from instructmining_core.selection.beat_random import compare_budgets

    from ..experiments.comparisons import one_run, per_example
    from ..reports import pool_kind, verdict_markdown

    pool = ", ".join(sources.files)
    chosen = _chosen(study, scores, rule, selection, sources)
    # sets of equal tokens are told by the size whose tokens they have
    plans = [one_run(rows, pool, method, len(selection.kept if method.endswith(TOKENS) else rows),
                     seed) for method, seed, rows in chosen]  # fmt: skip
    rows = pd.concat([rows for _, _, rows in chosen]).drop_duplicates("row_hash")
    # The study encodes training rows from its pools; this one is the user's.
    study.data.pools[pool] = rows.assign(messages=sources.fetch(rows))
    runs = study.run("verify", plans, progress=show)
    table = compare_budgets(
        runs, per_example(study, runs), loss="loss_eval_2", primary_size=len(selection.kept)
    )
    ours = rule.fitted_on.profile == study.profile.name
    kind = pool_kind(scores, rule, study.data.candidates if ours else None)
    records = json.loads(table.to_json(orient="records"))
    report = {"profile": study.profile.name, "finetunes": len(plans), "pool": kind.name,
              "pool_why": kind.why, "contrasts": records}  # fmt: skip
    return report, verdict_markdown(table, {pool: kind}, rule)


def _chosen(
    study: Study, scores: pd.DataFrame, rule: RuleCard, selection: Selection, sources: SourceRows
) -> list[tuple[str, int, pd.DataFrame]]:
    """(method, seed, rows) of every finetune."""
    size, repeats = len(selection.kept), study.profile.selection
    rivals = [name for name, (column, _) in BASELINES.items() if column in scores]
    if len(scores) <= LARGEST_FULL:
        rivals.append("full")
    counts = {"random": repeats.draws} | dict.fromkeys(rivals, repeats.baseline_seeds)
    found = [("selected", seed, selection.kept) for seed in range(repeats.seeds)]
    tokens_of = _counter(study, sources)
    tokens = sum(tokens_of(selection.kept))
    at_tokens = []
    for method, seed in ((name, seed) for name, seeds in counts.items() for seed in range(seeds)):
        found.append((method, seed, choose_rows(scores, method, size, rule=rule, seed=seed)))
        if method in TOKEN_RIVALS:
            rows = choose_tokens(scores, method, tokens, seed=seed, tokens_of=tokens_of)
            at_tokens.append((method + TOKENS, seed, rows))
    return found + at_tokens


def _counter(study: Study, sources: SourceRows) -> Callable[[pd.DataFrame], Sequence[int]]:
    """Rows of the score table -> target tokens of each as it is trained on; a row once."""
    from instructmining_core.data.tokenization import encode

    known: dict[str, int] = {}
    longest = study.profile.finetune.max_tokens

    def count(rows: pd.DataFrame) -> list[int]:
        new = rows[~rows["row_hash"].isin(known)]
        for own, messages in zip(new["row_hash"], sources.fetch(new), strict=True):
            row = encode(
                study.lm.tokenizer, messages, max_tokens=longest, template=study.lm.template
            )
            known[own] = int(sum(row.targets))
        return [known[own] for own in rows["row_hash"]]

    return count


