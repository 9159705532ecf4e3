"""Run the notebooks in order, once each; keep, publish, ship and compare; check the notebooks.

    python -m instructmining.book run --profile laptop
    python -m instructmining.book keep --profile laptop
    python -m instructmining.book publish --profile laptop
    python -m instructmining.book ship --profile laptop
    python -m instructmining.book compare --profile laptop --dtype float32 --threads 1 --runs 20
    python -m instructmining.book check

A stage is done when its stamp equals the hash of its notebook, the profile, the modules that the
notebook uses, the data it reads and the stage before it; whatever changes, that stage and all
after it run again. What is dear inside a stage (scores, finetunes) has its own memory.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import instructmining_core
from instructmining_core import files
from instructmining_core.config import InstructMiningError
from instructmining_core.finetuning.ledger import Ledger, RunArchive
from instructmining_core.indicators.score_table import read_scores, write_scores
from instructmining_core.regression.rule_card import RULES, load_rule

from .profile import Profile, load_profile, profile_path
from .ray_engine import engine

NUMBERS = (
    "scores.parquet", "roles.parquet", "sets.parquet", "plan.parquet", "rule.json", "verdict.csv",
    "null.parquet", "screens.parquet", "variants.parquet", "comparison.parquet",
    "contrasts.parquet", "doses.parquet", "truth.parquet", "sizes.parquet", "search.parquet",
    "robustness.parquet", "transfer.parquet", "ablation.parquet",
    "ablation_runs.parquet", "judge.parquet", "judge_checks.parquet", "loss_proxy.parquet",
    "damage.parquet", "front.parquet", "improvement.parquet", "others.parquet", "revised.parquet",
)  # fmt: skip
MAX_CODE_CELLS = 14
VERIFY = "verify"  # purpose of the runs of `select --verify`
PACKAGES = Path(__file__).resolve().parent.parent  # the folder that holds both packages
TABLES = "instructmining*/*/*.json"  # what modules read: published rules, hashes of the corpus


def build_book(folder: Path, profile: Profile) -> Path:
    """Build the book from a staged copy, so that the committed pages stay as they are."""
    stage = folder / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(files.root() / "book", stage / "book",
                    ignore=shutil.ignore_patterns("notebooks"))  # fmt: skip
    for executed in (folder / "notebooks").glob("*.ipynb"):
        write_page(executed, stage / "book" / "notebooks" / executed.name)
    shutil.copy2(files.root() / "_config.yml", stage / "_config.yml")
    write_summary(folder, stage / "book", "front")
    tool = Path(sys.executable).parent / "jupyter-book"  # of this environment, on PATH or not
    command = [str(tool), "build", "book", "-n", "-W", "--keep-going"]
    log = folder / "book.log"
    with log.open("w") as stream:
        done = subprocess.run(command, cwd=stage, stdout=stream, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-30:])
        raise InstructMiningError(f"the book did not build; the whole log is {log}\n{tail}")
    html = folder / "html"
    shutil.rmtree(html, ignore_errors=True)
    shutil.move(stage / "_build" / "html", html)
    shutil.rmtree(stage)
    return html / "index.html"


def write_summary(folder: Path, book: Path, name: str) -> None:
    """What a run found, as `book/_generated/<name>.md` and `<name>.png`.

    No text of the data is in them, so a run on others' data may be shown.
    """
    import pandas as pd

    from . import figures, reports

    effects = pd.read_parquet(folder / reports.EFFECTS)
    page = reports.front_page(effects, pd.read_csv(folder / "verdict.csv"))
    files.write_atomic(book / "_generated" / f"{name}.md", page)
    with files.being_written(book / "_generated" / f"{name}.png") as part:
        figures.plot_forest(effects).savefig(part, format="png")


def write_page(executed: Path, target: Path) -> None:
    """Write an executed notebook as a page: no progress bars, no log, no path of this machine."""
    import nbformat

    book = nbformat.read(executed, as_version=4)
    for part in (book, *book.cells):
        for key in ("papermill", "widgets", "execution"):
            part.metadata.pop(key, None)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if output.get("name") != "stderr"
                and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            ]  # fmt: skip
    text = nbformat.writes(book).replace(str(files.root()), ".")
    files.write_atomic(target, text)


def notebooks() -> list[Path]:
    """The source notebooks, in order."""
    return sorted((files.root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def stage_hash(notebook: Path, profile: Profile, before: str, *, figures: bool = True) -> str:
    """What a stage depends on. `before`: the stage before it without its figures, "" for the first.

    Without figures it is what the stage hands on: a changed figure draws anew only the notebooks
    that show it.
    """
    digest = hashlib.sha256()
    script = notebook.with_suffix(".py")
    for source in (script, *sources_of(script, figures=figures), *sorted(PACKAGES.glob(TABLES))):
        digest.update(source.read_bytes())
    digest.update(profile.hash().encode())
    for data in _data_files(profile):
        state = data.stat()
        digest.update(f"{data.name} {state.st_size} {state.st_mtime_ns}".encode())
    digest.update(before.encode())
    return digest.hexdigest()[:16]


def sources_of(script: Path, *, figures: bool = True) -> list[Path]:
    """The project's modules that a script imports, itself or through what it imports.

    figures : with the room `figures` and what only it uses
    """
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        used = _imported(waiting.pop()) - found
        if not figures:
            used = {file for file in used if file.parent.name != "figures"}
        waiting += used
        found |= used
    return sorted(found)


def _imported(script: Path) -> set[Path]:
    text = script.read_text(encoding="utf-8")
    found: set[Path] = set()
    for level, whole, names in _import_lines(text):
        room = script.parents[level - 1].relative_to(PACKAGES).parts if level else ()
        base = ".".join((*room, *filter(None, [whole])))
        if base == "instructmining_core":  # which fetches its public names when asked for one
            names = [instructmining_core._WHERE.get(name, name) for name in names]
        found.update(*(_files_of(f"{base}.{name}".strip(".")) for name in names or [""]))
    if script.name == "__init__.py" and "import_module" in text:  # by a name made at run time
        found.update(script.parent.glob("*.py"))
    return found


@cache
def _import_lines(text: str) -> list[tuple[int, str | None, list[str]]]:
    """Every import of a script, wherever it stands: dots, module, names (none: the module)."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            lines += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            lines.append((node.level, node.module, [alias.name for alias in node.names]))
    return lines


def _files_of(name: str) -> set[Path]:
    """The files that importing `a.b.c` runs, where `a` is one of our packages."""
    parts = name.split(".")
    if parts[0] not in ("instructmining", "instructmining_core"):
        return set()
    places = [PACKAGES.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    modules = [one for place in places for one in (place / "__init__.py", Path(f"{place}.py"))]
    return {module for module in modules if module.is_file()}


def run(name_or_yaml: str, only: list[str] | None = None, with_book: bool = True) -> Path:
    """Run every stage whose stamp is stale and build that run's book; returns `html/index.html`.

    Raises InstructMiningError naming the notebook, the cell's error and where the broken copy lies.
    """
    profile = load_profile(name_or_yaml)
    folder = files.results(profile.name)
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    before, ran = "", 0
    for notebook in notebooks():
        wanted = stage_hash(notebook, profile, before)
        before = stage_hash(notebook, profile, before, figures=False)
        if only and notebook.stem[:2] not in only:
            continue
        stamp = folder / "stamps" / f"{notebook.stem}.json"
        if stamp.is_file() and json.loads(stamp.read_text())["hash"] == wanted:
            _say(f"{notebook.stem}: done before, nothing has changed")
            continue
        started = time.monotonic()
        _execute(notebook, folder, name_or_yaml)
        files.write_atomic(stamp, json.dumps({"hash": wanted}))
        ran += 1
        _say(f"{notebook.stem}: done in {time.monotonic() - started:.0f} s")
    index = folder / "html" / "index.html"
    if with_book and (ran or not index.is_file()):
        index = build_book(folder, profile)
    _say(f"The book of this run: {index}")
    return index


def keep(name_or_yaml: str) -> None:
    """Add this machine's finished runs that the evidence lacks to it, as one Parquet part.

    Nothing that is there is touched, no notebook is needed, and a second call adds nothing. Runs of
    `select --verify` stay here: they are of somebody's own file, and bear its name.
    """
    name = load_profile(name_or_yaml).name
    own = Ledger(files.results(name) / "ledger").records().values()
    part = RunArchive(files.evidence(name) / "ledger").append(
        record for record in own if record["spec"]["purpose"] != VERIFY)
    _say(f"kept {part}" if part else f"{name}: no finished run that is not kept already")


def publish(name_or_yaml: str, beside: bool = False) -> None:
    """Copy a finished run's notebooks to `book/notebooks/` and its numbers to `evidence/`.

    beside : leave the book's own pages; write this run's summary to `book/_generated/` instead
    No text of others' data travels and no path of this machine: scores are numbers and hashes, runs
    have hashes. Runs that are kept already stay as they are, and so do comparisons.
    """
    profile = load_profile(name_or_yaml)
    folder, evidence = files.results(profile.name), files.evidence(profile.name)
    pages = {folder / "notebooks" / one.name: files.root() / "book" / "notebooks" / one.name
             for one in notebooks()}  # fmt: skip
    if missing := [page.name for page in pages if not page.is_file()]:
        raise InstructMiningError(
            f"{folder} lacks {missing[0]}; run `make study PROFILE={name_or_yaml}`."
        )
    write_summary(folder, files.root() / "book", profile.name if beside else "front")
    for executed, page in () if beside else pages.items():
        write_page(executed, page)
    keep(name_or_yaml)
    _copy_numbers(folder, evidence)
    _say(f"published {'a summary' if beside else f'{len(pages)} notebooks'} and {evidence}")


def _copy_numbers(folder: Path, evidence: Path) -> None:
    """What a run found, in place of what an earlier one did; of files it names the last part."""
    for part in ("claims", "runs"):
        shutil.rmtree(evidence / part, ignore_errors=True)
        for one in (folder / part).glob("*.json"):
            files.write_atomic(evidence / part / one.name, one.read_text(encoding="utf-8"))
    (evidence / "runs" / f"{VERIFY}.json").unlink(missing_ok=True)
    for name in NUMBERS:
        (evidence / name).unlink(missing_ok=True)
        if not (folder / name).is_file():
            continue
        if name == "scores.parquet":
            scores = read_scores(folder / name)
            bare = [Path(one).name if Path(one).is_absolute() else one for one in scores["file"]]
            write_scores(scores.assign(file=bare), evidence / name)
        else:
            shutil.copy2(folder / name, evidence / name)


def ship(name_or_yaml: str) -> None:
    """Make a study's rule one that the package brings along, with the rows that `knn_6` needs.

    `score --profile NAME` and `select --rule NAME` then work where the study's data are not.
    """
    from .study import Study

    study = Study.open(name_or_yaml)
    path = study.find("rule.json")
    card, place = load_rule(path), RULES / f"{study.name}.json"
    if card.knn_reference:
        reference = study.scorer().reference
        if reference.hash != card.knn_reference.hash:
            raise InstructMiningError(f"{path} was fitted against other reference rows than the "
                                      "study has now; run its notebooks again.")
        reference.save(place.with_suffix(".npz"), half=True)
    shutil.copy2(path, place)
    _say(f"shipped {place}")


def compare(name_or_yaml: str, count: int, dtype: str, threads: int) -> None:
    """Do finished runs again on this machine; the table goes to the evidence, its sums are said."""
    from .experiments.machines import add_comparison, differences, gains, repeat_runs
    from .study import Study

    study = Study.open(name_or_yaml)
    table = repeat_runs(study, count, dtype=dtype, threads=threads)
    whole = add_comparison(study, table)
    _say(f"{len(table)} runs done again, {len(whole)} in evidence/{study.name}/compared.parquet")
    for sums in (differences(table), gains(table)):
        _say(sums.to_string(index=False))


def check_notebooks() -> None:
    """The manners of the source notebooks; raises InstructMiningError with every breach.

    Paired percent script, no outputs, a `parameters` cell, at most `MAX_CODE_CELLS` code cells, and
    badge and Colab cell that follow the repository constant of `_config.yml`.
    """
    breaches = [line for notebook in notebooks() for line in _breaches(notebook)]
    if len(notebooks()) != 12:
        breaches.append(f"{len(notebooks())} notebooks; the study has 12")
    if breaches:
        raise InstructMiningError("\n".join(breaches))


def _breaches(notebook: Path) -> list[str]:
    import jupytext
    import yaml

    config = yaml.safe_load((files.root() / "_config.yml").read_text(encoding="utf-8"))
    url = config["repository"]["url"]
    place = f"{url.removeprefix('https://github.com/')}/blob/main/notebooks/{notebook.name}"
    badge = f"https://colab.research.google.com/github/{place}"
    cells = jupytext.read(notebook).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    text = "".join(cell.source for cell in cells)
    script = notebook.with_suffix(".py")
    twin = jupytext.read(script).cells if script.is_file() else []
    both = [[(cell.cell_type, cell.source.strip()) for cell in one] for one in (cells, twin)]
    found = {
        "no paired percent script": not script.is_file(),
        "outputs in a source notebook": any(cell.outputs for cell in code),
        f"more than {MAX_CODE_CELLS} code cells": len(code) > MAX_CODE_CELLS,
        "no cell tagged `parameters`": not any(
            "parameters" in cell.metadata.get("tags", []) for cell in code
        ),
        f"no badge {badge}": badge not in text,
        f"no Colab cell cloning {url}": f" {url} " not in text,
        "percent script and .ipynb differ; run `make sync`": bool(twin) and both[0] != both[1],
    }
    return [f"{notebook.name}: {what}" for what, broken in found.items() if broken]


def _execute(notebook: Path, folder: Path, profile: str) -> None:
    import papermill

    out = folder / "notebooks" / notebook.name
    part = folder / "running" / notebook.name
    part.parent.mkdir(parents=True, exist_ok=True)
    named = str(profile_path(profile).resolve()) if Path(profile).suffix else profile
    try:
        papermill.execute_notebook(
            notebook, part, parameters={"profile": named}, cwd=notebook.parent,
            kernel_name="python3", progress_bar=False, log_output=False,
            stderr_file=sys.stderr,  # the bars of scoring and of the sweep
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        words = f"{notebook.stem} failed; its copy lies at {part}\n{error}"
        raise InstructMiningError(words) from None
    os.replace(part, out)


def _data_files(profile: Profile) -> list[Path]:
    """Local files that a profile names; what the hub gives is known by its recorded revision."""
    data = profile.data
    exams = (data.eval_1, data.eval_2, *data.eval_more, data.human, *data.choices)
    judged = (*profile.judge.checks, profile.judge.asks, profile.outside.pairs)
    named = [one.where for one in (*data.sources, *data.unseen, *exams, *judged) if one]
    paths = [files.root() / data.folder / name for name in (*named, profile.outside.index)]
    return [path for path in paths if path.is_file()]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _command() -> None:
    """The command behind `make study`, `make publish` and a part of `make lint`."""
    parser = argparse.ArgumentParser(prog="instructmining.book", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("run", "keep", "publish", "ship", "compare"):
        verbs.add_parser(verb).add_argument("--profile", default="laptop")
    verbs.choices["run"].add_argument("--only", nargs="*", help="two-digit stage numbers")
    verbs.choices["run"].add_argument("--engine", choices=["local", "ray"], default=engine())
    verbs.choices["publish"].add_argument(
        "--beside", action="store_true", help="numbers and a summary; the book keeps its pages")
    again = verbs.choices["compare"]
    again.add_argument("--runs", type=int, default=20, help="how many (default 20)")
    again.add_argument("--dtype", choices=["float32", "bfloat16"], default="",
                       help="in place of the runs' own")  # fmt: skip
    again.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own number")
    verbs.add_parser("check")
    options = parser.parse_args()
    try:
        if options.verb == "run":
            os.environ["INSTRUCTMINING_ENGINE"] = options.engine  # for the notebooks' kernels
            run(options.profile, options.only)
        elif options.verb == "keep":
            keep(options.profile)
        elif options.verb == "compare":
            compare(options.profile, options.runs, options.dtype, options.threads)
        elif options.verb == "publish":
            publish(options.profile, options.beside)
        elif options.verb == "ship":
            ship(options.profile)
        else:
            check_notebooks()
    except InstructMiningError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _command()
