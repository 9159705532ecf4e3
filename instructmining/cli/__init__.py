"""The command line: `instructmining score | select | explain | fit | plan | pin | references`.

Each command takes its options apart here and is thin over the functions that the notebooks call.
Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option


def _examples(text: str) -> str:
    """An epilog that is shown line by line as it stands here."""
    return "\n\n".join(f"\b\n{part}" for part in text.strip("\n").split("\n\n"))


app = typer.Typer(
    name="instructmining", no_args_is_help=True, rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Score instruction data by cheap indicators, and select with a fitted rule.",
    epilog=_examples("""
examples:
  instructmining score my_data.jsonl -o scores.parquet
  instructmining score my_data.jsonl -o scores.parquet --profile colab
  instructmining select scores.parquet --rule rule.json --top 1000 -o best.jsonl
  instructmining explain my_data-17 --scores scores.parquet --rule rule.json
  instructmining fit --profile laptop -o rule.json

`instructmining COMMAND --help` tells more of each.
"""),
)  # fmt: skip

SCORE = _examples("""
examples:
  instructmining score data.json more.jsonl.gz -o scores.parquet
      model-free indicators: lengths in words, MTLD, compression, script, turns
  instructmining score data.jsonl -o scores.parquet --profile colab
      all nine of the paper, with the models of a profile
  instructmining score data.csv -o scores.parquet \\
      --models ppl=HuggingFaceTB/SmolLM2-135M --indicators ppl,len_out
  zcat data.jsonl.gz | instructmining score - -o scores.parquet
  instructmining score databricks/databricks-dolly-15k:train -o scores.parquet

Files may be Alpaca, Dolly, ShareGPT, messages, OASST trees, self-instruct,
MT-Bench, LIMA, hh-rlhf or prompt/completion, or one text with a chat's marks,
as JSON, JSONL, CSV, TSV, Parquet or Arrow, also packed (.gz .zst .xz .bz2 .zip).
Other names of columns: --columns question=input,answer=target
""")

SELECT = _examples("""
examples:
  instructmining select scores.parquet --rule rule.json --top 1000 -o best.jsonl
  instructmining select scores.parquet --rule rule.json --top auto -o best.parquet
  instructmining select scores.parquet --rule v3 --top 1000 -o best.json \\
      --allow-mismatch
      the published rule on other models: a ranking in its form, no conclusion
  instructmining select scores.parquet --rule rule.json --top 1000 -o best.jsonl \\
      --verify --profile laptop
      then finetune on the selection and on its rivals, and compare
  instructmining select scores.parquet --rule rule.json --top 500 -o best.csv \\
      --data /moved/my_data.csv --data /moved/more.csv

The files that were scored are read again, and refused where they have changed.
OUT has their own columns and `score`, the predicted log loss (lower is better),
best first. OUT.report.json tells why each row was kept or dropped, and the 95 %
interval of its prediction. With --verify, OUT.verdict.md says whether the rows
are better than random ones, and than the longest and the shortest, at equal
rows and at equal tokens, or that there is no evidence of it.
""")

EXPLAIN = _examples("""
example:
  instructmining explain alpaca-17 --scores scores.parquet --rule rule.json
""")

FIT = _examples("""
examples:
  instructmining fit --profile laptop -o rule.json
      from the sweep of a study (`make study PROFILE=laptop`)
  instructmining fit runs.parquet --scores scores.parquet -o rule.json
      runs: one row a finetuning run, with log_loss, share_<source> and set means
""")

PLAN = _examples("""
examples:
  instructmining plan --profile laptop --pilot --target 0.005
      measures the noise by 12 runs of the sweep, then tells how many runs each
      slope needs
  instructmining plan --profile laptop --sigma 0.01
""")

PIN = _examples("""
examples:
  instructmining pin mine.yaml
  instructmining pin colab -o colab_pinned.yaml
""")

REFERENCES = _examples("""
examples:
  INSTRUCTMINING_API_KEY=... instructmining references prompts.jsonl \\
      -o answers.jsonl --base-url https://api.openai.com/v1 --model gpt-4o
  instructmining references prompts.jsonl -o answers.jsonl \\
      --base-url http://localhost:11434/v1 --model llama3.1

Replies are kept in OUT.replies: a run that ended goes on where it was, and pays
nothing twice. The key is read from the environment alone, and written nowhere.
""")

NOT_FOR = ("other models, other reference sets, other languages; rows outside the range of the "
           "fitted sets")  # fmt: skip


def _top(text: str) -> int | str:
    if text == "auto":
        return text
    number = int(text.replace(",", "").replace("_", ""))
    if number < 1:
        raise typer.BadParameter("must be above 0, or 'auto'")
    return number


Files = Annotated[list[str], Argument(metavar="FILE...", help="file, '-' or hub name owner/name")]
Profile = Annotated[str | None, Option(help="profile that names the models: a preset or a YAML")]
Models = Annotated[
    list[str],
    Option("--models", metavar="ROLE=ID", help="a model by role (base, ppl, reward, unieval, "
           "encoder), ID[@REVISION]; give the option once for each"),
]  # fmt: skip
Rule = Annotated[str, Option(help="rule.json, or a published rule: v1, v3")]
Mismatch = Annotated[
    bool, Option("--allow-mismatch", help="use a rule of other models; a ranking, no conclusion")
]
Quiet = Annotated[bool, Option("--quiet", help="no progress bar")]


@app.command("score", epilog=SCORE)
def _score(
    files: Files,
    out: Annotated[str, Option("-o", "--out", help="score table to write (.parquet)")],
    profile: Profile = None,
    models: Models = [],  # noqa: B006  typer reads the default, nobody changes it
    indicators: Annotated[
        str | None, Option(help="names with commas between; default: all that can be")
    ] = None,
    reward_form: Annotated[
        Literal["oasst", "pair"] | None,
        Option(help="how the reward model is given a row: with OASST's marks, or as a pair of "
               "texts; default: the model's own form"),
    ] = None,
    allow_standins: Annotated[
        bool, Option("--allow-standins", help="let small stand-ins take the place of real models")
    ] = False,
    on_error: Annotated[
        Literal["raise", "collect"],
        Option(help="malformed records: keep their rows without values and list them, or stop"),
    ] = "collect",
    paths: Annotated[
        Literal["best", "all"], Option(help="OASST trees: the best-ranked path, or every path")
    ] = "best",
    columns: Annotated[
        str | None, Option(metavar="OURS=YOURS,...", help="which columns hold what, where they "
                           "have other names: question=input,answer=target or messages=talk")
    ] = None,
    encoding: Annotated[
        str | None, Option(help="of text that is neither UTF-8 nor UTF-16: cp1252, gb18030, ...")
    ] = None,
    revision: Annotated[str, Option(help="of hub sets; the commit is recorded")] = "main",
    reference: Annotated[
        Path | None, Option(metavar="FILE.npz", help="reference of knn_6 that an earlier run saved")
    ] = None,
    bank: Annotated[
        Path | None, Option(metavar="DIR", help="folder where model scores are kept")
    ] = None,
    chunk_rows: Annotated[
        int | None, Option(min=1, help="rows held in memory: 10,000; with Ray, of a task: 1,000")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], Option(help="this process, or a Ray cluster (RAY_ADDRESS, or that "
                                        "of this machine)")
    ] = "local",
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Compute indicators of every row."""
    from .score import Inputs, open_scorer, reference_of, score_files

    names = indicators.split(",") if indicators else None
    rows = chunk_rows or {"local": 10_000, "ray": 1_000}[engine]
    with Inputs(files, out, paths, revision, on_error, rows, columns, encoding) as inputs:
        scorer = open_scorer(models, names, profile=profile, bank=bank, form=reward_form,
                             allow_standins=allow_standins)  # fmt: skip
        if any(one.pool_relative for one in scorer.indicators):
            reference_of(scorer, inputs, reference, profile, show=not quiet)
        score_files(scorer, inputs, show=not quiet, engine=engine)


@app.command("select", epilog=SELECT)
def _select(
    scores: Annotated[str, Argument(help="score table of `instructmining score`")],
    rule: Rule,
    top: Annotated[
        str, Option(parser=_top, metavar="K|auto", help="rows to keep; auto: the size that the "
                    "rule's search found")
    ],
    out: Annotated[
        str, Option("-o", "--out", help="rows to write: .json .jsonl .csv .tsv .parquet, also .gz")
    ],
    data: Annotated[
        list[str], Option("--data", metavar="FILE", help="where a scored file is now, if it moved; "
                          "matched by sha256; give the option once for each")
    ] = [],  # noqa: B006
    allow_mismatch: Mismatch = False,
    strict: Annotated[
        bool, Option("--strict", help="refuse data outside what the rule was fitted on")
    ] = False,
    verify: Annotated[
        bool, Option("--verify", help="finetune on the selection and on random draws, and compare")
    ] = False,
    profile: Annotated[
        str | None, Option(help="for --verify: base model, evaluation sets, repeats; its encoder "
                           "measures how diverse the selection is, for the report")
    ] = None,
    models: Annotated[
        list[str], Option("--models", metavar="encoder=ID", help="an encoder for the report's "
                          "diversity, in place of the profile's")
    ] = [],  # noqa: B006
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write the best rows by a rule."""
    from .models import asked_models, opened_study
    from .select import select_to

    if verify and not profile:
        raise ValueError("--verify needs --profile: it names the base model that is finetuned "
                         "and the evaluation sets")  # fmt: skip
    study = opened_study(profile) if verify else None
    select_to(
        out, scores, rule, top, moved=data, allow_mismatch=allow_mismatch, strict=strict,
        encoder=asked_models(profile, models).get("encoder"), study=study, show=not quiet,
    )  # fmt: skip


@app.command("explain", epilog=EXPLAIN)
def _explain(
    id: Annotated[str, Argument(help="a row's id in the score table")],
    scores: Annotated[str, Option(help="score table")],
    rule: Rule,
    allow_mismatch: Mismatch = False,
) -> None:
    """Show a row's score as a sum of its indicators' contributions."""
    from .rule import explanation

    sys.stdout.write(explanation(id, scores, rule, allow_mismatch) + "\n")


@app.command("fit", epilog=FIT)
def _fit(
    out: Annotated[str, Option("-o", "--out", help="rule card to write (.json)")],
    runs: Annotated[str | None, Argument(help="table of runs (.parquet or .csv)")] = None,
    profile: Annotated[str | None, Option(help="take the runs of this profile's study")] = None,
    scores: Annotated[
        str | None, Option(help="score table of the fitting pool, beside RUNS")
    ] = None,
    indicators: Annotated[
        str | None, Option(help="columns of the rule, with commas between")
    ] = None,
    permutations: Annotated[int, Option(help="draws of the test of the rule")] = 999,
    auto_size: Annotated[
        int | None, Option(help="rows that `select --top auto` shall keep")
    ] = None,
    not_for: Annotated[str, Option(help="said on the card")] = NOT_FOR,
) -> None:
    """Fit a rule to finetuning runs."""
    from instructmining_core.files import refuse_overwrite

    from ..reports import card_markdown
    from .rule import fitted_card, study_material, table_material

    if bool(runs) == bool(profile):
        raise ValueError("give either RUNS with --scores, or --profile")
    refuse_overwrite(out, filter(None, (runs, scores)))
    names = indicators.split(",") if indicators else []
    material = study_material(profile, names) if profile else table_material(runs, scores, names)
    card = fitted_card(material, not_for, permutations, auto_size)
    card.save(out)
    sys.stdout.write(card_markdown(card) + f"\nwritten to {out}\n")


@app.command("plan", epilog=PLAN)
def _plan(
    profile: Annotated[str, Option(help="preset or YAML file")],
    pilot: Annotated[
        bool, Option("--pilot", help="measure the noise first: 4 sets on 3 seeds each, runs that "
                     "the sweep keeps")
    ] = False,
    target: Annotated[
        float, Option(metavar="HALF_WIDTH", help="half-width to reach, log loss per sd of a row "
                      "(0.01: one per cent of the loss)")
    ] = 0.01,
    sigma: Annotated[
        float | None, Option(help="assumed sd of the log loss between runs, in place of a measured "
                             "one; default: that of the sweep where it has been run, else 0.01")
    ] = None,
) -> None:  # fmt: skip
    """Tell how wide the intervals of a study's slopes will be."""
    from .rule import planned

    if pilot and sigma is not None:
        raise ValueError("--pilot measures the noise that --sigma assumes: give one of them")
    sys.stdout.write(planned(profile, pilot, sigma, target) + "\n")


@app.command("pin", epilog=PIN)
def _pin(
    profile: Annotated[str, Argument(help="YAML file or preset")],
    out: Annotated[
        str | None, Option("-o", "--out", help="file to write; default: the profile's own")
    ] = None,
) -> None:
    """Write the commits of a profile's models and sets into its YAML."""
    from .models import pin_profile

    sys.stdout.write("\n".join(pin_profile(profile, out)) + "\n")


@app.command("references", epilog=REFERENCES)
def _references(
    prompts: Annotated[str, Argument(metavar="FILE", help="prompts: file, '-' or hub name")],
    out: Annotated[Path, Option("-o", "--out", help="answers to write (.jsonl), not yet there")],
    base_url: Annotated[str, Option(help="of the server, such as http://localhost:8000/v1")],
    model: Annotated[str, Option(help="the teacher, as the server names it")],
    budget: Annotated[int, Option(min=1, help="calls in all, failed tries counted")] = 2000,
    workers: Annotated[int, Option(min=1, help="calls under way at once")] = 8,
    timeout: Annotated[float, Option(help="seconds for one call")] = 300.0,
    max_tokens: Annotated[
        int | None, Option(min=1, help="of an answer; default: the server's own limit")
    ] = None,
) -> None:  # fmt: skip
    """Make an evaluation set's answers with a teacher at a server."""
    from .references import make_references

    sys.stdout.write("\n".join(make_references(
        prompts, out, base_url, model, budget=budget, workers=workers, timeout=timeout,
        max_tokens=max_tokens,
    )) + "\n")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    returns : exit status: 0, 1 for an error told in words, 2 for options that cannot be read, 130
        if stopped
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in arguments if not word.startswith("-")), "")
    try:
        app(arguments, prog_name="instructmining")
    except SystemExit as ended:  # typer's way to end: help, options that cannot be read, the end
        return int(ended.code or 0)
    except (ValueError, RuntimeError, OSError) as error:
        # Every room's own errors derive from these and say what to do.
        sys.stderr.write(f"instructmining {command}: {error}\n")
        return 1
    except MemoryError:
        sys.stderr.write(f"instructmining {command}: out of memory; free some, or let the command "
                         "hold less at a time (score: --chunk-rows)\n")  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
