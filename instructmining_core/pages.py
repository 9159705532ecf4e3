"""From executed notebooks to pages: what is taken out, what is generated, and the build."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

from . import paths
from .profiles import Profile

FRONT_FIGURE = "08_selection.ipynb"  # whose first figure is on the front page: selected, random
BESIDE = ("06_finetune_sweep.ipynb", "08_selection.ipynb")  # whose first figures a summary shows


class PageError(RuntimeError):
    """The book did not build."""


def build_book(folder: Path, profile: Profile) -> Path:
    """Build the book from a staged copy, so that the committed pages stay as they are."""
    stage = folder / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(paths.root() / "book", stage / "book", ignore=_not_notebooks)
    for executed in (folder / "notebooks").glob("*.ipynb"):
        write_page(executed, stage / "book" / "notebooks" / executed.name)
    shutil.copy2(paths.root() / "_config.yml", stage / "_config.yml")
    write_front_page(folder, profile, stage / "book")
    tool = Path(sys.executable).parent / "jupyter-book"  # of this environment, on PATH or not
    command = [str(tool), "build", "book", "-n", "-W", "--keep-going"]
    log = folder / "book.log"
    with log.open("w") as stream:
        done = subprocess.run(command, cwd=stage, stdout=stream, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-30:])
        raise PageError(f"the book did not build; the whole log is {log}\n{tail}")
    html = folder / "html"
    shutil.rmtree(html, ignore_errors=True)
    shutil.move(stage / "_build" / "html", html)
    shutil.rmtree(stage)
    return html / "index.html"


def write_front_page(folder: Path, profile: Profile, book: Path) -> None:
    """The generated part of the front page, and its figure, into `book/_generated/`."""
    import pandas as pd

    from .claims import front_page

    page = front_page(pd.read_csv(folder / "verdict.csv"), profile.name, profile.description)
    generated = book / "_generated"
    generated.mkdir(exist_ok=True)
    (generated / "front.md").write_text(page, encoding="utf-8")
    (generated / "front.png").write_bytes(_first_figure(folder / "notebooks" / FRONT_FIGURE))


def write_summary(folder: Path, profile: Profile, book: Path) -> None:
    """What a run beside the book's own found: `book/_generated/<profile>.md` and its figures.

    No text of the data is in it, so a run on others' data may be shown.
    """
    import pandas as pd

    from .claims import front_page

    generated = book / "_generated"
    page = front_page(pd.read_csv(folder / "verdict.csv"), profile.name, profile.description)
    (generated / f"{profile.name}.md").write_text(page, encoding="utf-8")
    for name in BESIDE:
        figure = generated / f"{profile.name}_{name[:2]}.png"
        figure.write_bytes(_first_figure(folder / "notebooks" / name))


def write_page(executed: Path, target: Path) -> None:
    """Write an executed notebook as a page: no progress bars, no log, no path of this machine."""
    import nbformat

    book = nbformat.read(executed, as_version=4)
    book.metadata.pop("papermill", None)
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_noise(output)]
    text = nbformat.writes(book).replace(str(paths.root()), ".")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def _first_figure(notebook: Path) -> bytes:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = (output for cell in cells for output in cell.get("outputs", []))
    images = (output["data"]["image/png"] for output in outputs
              if "image/png" in output.get("data", {}))  # fmt: skip
    return base64.b64decode(next(images))


def _is_noise(output: dict) -> bool:
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget or output.get("name") == "stderr"


def _not_notebooks(folder: str, names: list[str]) -> list[str]:
    return [n for n in names if n == "notebooks"]
