"""The command line: `instructmining score | select | explain | fit | plan | pin`.

Each command is thin over the functions that the notebooks call. Nothing heavy is imported before
a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

EXAMPLES = """examples:
  instructmining score my_data.jsonl -o scores.parquet
  instructmining score my_data.jsonl -o scores.parquet --profile colab
  instructmining select scores.parquet --rule rule.json --top 1000 -o best.jsonl
  instructmining explain my_data-17 --scores scores.parquet --rule rule.json
  instructmining fit --profile laptop -o rule.json

`instructmining COMMAND --help` tells more of each.
"""

SCORE = """examples:
  instructmining score data.json more.jsonl.gz -o scores.parquet
      model-free indicators: lengths in words, MTLD, compression, script, turns
  instructmining score data.jsonl -o scores.parquet --profile colab
      all nine of the paper, with the models of a profile
  instructmining score data.csv -o scores.parquet --models ppl=HuggingFaceTB/SmolLM2-135M \\
      --indicators ppl,len_out
  instructmining score data.jsonl -o scores.parquet --profile laptop --allow-standins
  zcat data.jsonl.gz | instructmining score - -o scores.parquet
  instructmining score databricks/databricks-dolly-15k:train -o scores.parquet

Files may be Alpaca, Dolly, ShareGPT, messages, OASST trees, self-instruct, MT-Bench, LIMA, hh-rlhf
or prompt/completion, as JSON, JSONL, CSV, TSV or Parquet, also gzipped.
"""

SELECT = """examples:
  instructmining select scores.parquet --rule rule.json --top 1000 -o best.jsonl
  instructmining select scores.parquet --rule rule.json --top auto -o best.parquet
  instructmining select scores.parquet --rule v3 --top 1000 -o best.json --allow-mismatch
      the published rule on other models: a ranking in its form, no conclusion
  instructmining select scores.parquet --rule rule.json --top 1000 -o best.jsonl \\
      --verify --profile laptop
      then finetune on the selection and on its rivals, and compare
  instructmining select scores.parquet --rule rule.json --top 500 -o best.csv \\
      --data /moved/my_data.csv

The files that were scored are read again, and refused where they have changed. OUT has their own
columns and `score`, the predicted log loss (lower is better), best first. OUT.report.json tells
why each row was kept or dropped, and the 95 % interval of its prediction. With --verify,
OUT.verdict.md says whether the rows are better than random ones, and than the longest and the
shortest, at equal rows and at equal tokens, or that there is no evidence of it.
"""


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    main_parser = argparse.ArgumentParser(
        prog="instructmining",
        description="Score instruction data by cheap indicators, and select with a fitted rule.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _score(_command(commands, "score", "instructmining.cli.score", SCORE,
                    "compute indicators of every row"))  # fmt: skip
    _select(_command(commands, "select", "instructmining.cli.select", SELECT,
                     "write the best rows by a rule"))  # fmt: skip
    _explain(_command(commands, "explain", "instructmining.cli.rule", """example:
  instructmining explain alpaca-17 --scores scores.parquet --rule rule.json
""", "show a row's score as a sum of its indicators' contributions"))  # fmt: skip
    _fit(_command(commands, "fit", "instructmining.cli.rule", """examples:
  instructmining fit --profile laptop -o rule.json
      from the sweep of a study (`make study PROFILE=laptop`)
  instructmining fit runs.parquet --scores scores.parquet -o rule.json
      runs: one row a finetuning run, with log_loss, share_<source> and set means
""", "fit a rule to finetuning runs"))  # fmt: skip
    _plan(_command(commands, "plan", "instructmining.cli.rule", """examples:
  instructmining plan --profile laptop --pilot --target 0.005
      measures the noise by 12 runs of the sweep, then tells how many runs each slope needs
  instructmining plan --profile laptop --sigma 0.01
""", "tell how wide the intervals of a study's slopes will be"))  # fmt: skip
    _pin(_command(commands, "pin", "instructmining.cli.pin", """examples:
  instructmining pin mine.yaml
  instructmining pin colab -o colab_pinned.yaml
""", "write the commits of a profile's models and sets into its YAML"))  # fmt: skip
    return main_parser


def _command(commands, name: str, module: str, examples: str, help: str):
    one = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(module=module)
    return one


def _score(one: argparse.ArgumentParser) -> None:
    one.add_argument("files", nargs="+", metavar="FILE", help="file, '-' or hub name owner/name")
    one.add_argument("-o", "--out", required=True, help="score table to write (.parquet)")
    one.add_argument("--profile", help="profile that names the models: a preset or a YAML file")
    one.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="ROLE=ID",
        help="models by role (base, ppl, reward, unieval, encoder); ID[@REVISION]",
    )
    one.add_argument("--indicators", help="names with commas between; default: all that can be")
    one.add_argument(
        "--reward-form",
        choices=("oasst", "pair"),
        help="how the reward model is given a row: with OASST's marks, or as a pair of texts; "
        "default: the model's own form",
    )
    one.add_argument(
        "--allow-standins",
        action="store_true",
        help="let small stand-in models take the place of real ones",
    )
    one.add_argument(
        "--on-error",
        choices=("raise", "collect"),
        default="collect",
        help="malformed records: keep their rows without values, with the reason, and list them "
        "(collect, the default), or stop at the first one (raise)",
    )
    one.add_argument(
        "--paths",
        choices=("best", "all"),
        default="best",
        help="OASST trees: the best-ranked path, or every path as a row",
    )
    one.add_argument("--revision", default="main", help="of hub sets; the commit is recorded")
    one.add_argument(
        "--reference", metavar="FILE.npz", help="reference of knn_6 that an earlier run saved"
    )
    one.add_argument("--bank", metavar="DIR", help="folder where model scores are kept")
    one.add_argument(
        "--chunk-rows",
        type=int,
        default=10_000,
        metavar="N",
        help="rows held in memory at a time (default 10,000)",
    )
    one.add_argument("--quiet", action="store_true", help="no progress bar")


def _select(one: argparse.ArgumentParser) -> None:
    one.add_argument("scores", help="score table of `instructmining score`")
    one.add_argument("--rule", required=True, help="rule.json, or a published rule: v1, v3")
    one.add_argument(
        "--top",
        required=True,
        type=_top,
        metavar="K|auto",
        help="rows to keep; auto: the size that the rule's search found",
    )
    one.add_argument(
        "-o",
        "--out",
        required=True,
        help="rows to write: .json .jsonl .csv .tsv .parquet, also .gz",
    )
    one.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="where the scored files are now, if they moved; matched by sha256",
    )
    one.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="use a rule of other models; a ranking, no conclusion",
    )
    one.add_argument(
        "--strict", action="store_true", help="refuse data outside what the rule was fitted on"
    )
    one.add_argument(
        "--verify",
        action="store_true",
        help="finetune on the selection and on random draws, and compare",
    )
    one.add_argument(
        "--profile",
        help="for --verify: base model, evaluation sets, repeats; its encoder measures how "
        "diverse the selection is, for the report",
    )
    one.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="encoder=ID",
        help="an encoder for the report's diversity, in place of the profile's",
    )
    one.add_argument("--quiet", action="store_true", help="no progress bar")


def _explain(one: argparse.ArgumentParser) -> None:
    one.add_argument("id", help="a row's id in the score table")
    one.add_argument("--scores", required=True, help="score table")
    one.add_argument("--rule", required=True, help="rule.json, or v1, v3")
    one.add_argument("--allow-mismatch", action="store_true", help="as in `select`")


def _fit(one: argparse.ArgumentParser) -> None:
    one.add_argument("runs", nargs="?", help="table of runs (.parquet or .csv)")
    one.add_argument("--profile", help="take the runs of this profile's study")
    one.add_argument("--scores", help="score table of the fitting pool, beside RUNS")
    one.add_argument("-o", "--out", required=True, help="rule card to write (.json)")
    one.add_argument("--indicators", help="columns of the rule, with commas between")
    one.add_argument("--permutations", type=int, default=999, help="draws of the test of the rule")
    one.add_argument("--auto-size", type=int, help="rows that `select --top auto` shall keep")
    one.add_argument(
        "--not-for",
        default="other models, other reference sets, other languages; "
        "rows outside the range of the fitted sets",
        help="said on the card",
    )


def _plan(one: argparse.ArgumentParser) -> None:
    one.add_argument("--profile", required=True, help="preset or YAML file")
    one.add_argument(
        "--pilot",
        action="store_true",
        help="measure the noise first: 4 sets on 3 seeds each, runs that the sweep keeps",
    )
    one.add_argument(
        "--target",
        type=float,
        default=0.01,
        metavar="HALF_WIDTH",
        help="half-width to reach, log loss per sd of a row (default 0.01: one per cent of the "
        "loss)",
    )
    one.add_argument(
        "--sigma",
        type=float,
        help="assumed sd of the log loss between runs, in place of a measured one; default: that "
        "of the sweep where it has been run, else 0.01",
    )


def _pin(one: argparse.ArgumentParser) -> None:
    one.add_argument("profile", help="YAML file or preset")
    one.add_argument("-o", "--out", help="file to write; default: the profile's own")


def _top(text: str) -> int | str:
    if text == "auto":
        return text
    number = int(text.replace(",", "").replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError("must be above 0, or 'auto'")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for an error told in words, 130 if stopped."""
    args = parser().parse_args(arguments)
    try:
        command = getattr(importlib.import_module(args.module), args.command)
        command(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `instructmining explain ... | head`
        sys.stderr.close()
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        # Every room's own errors derive from these and say what to do.
        sys.stderr.write(f"instructmining {args.command}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
