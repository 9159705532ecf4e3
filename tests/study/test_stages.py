"""The runner of the notebooks, on notebooks of its own."""

from __future__ import annotations

import json

import jupytext
import nbformat
import pytest

from instructmining import book
from instructmining.profile import load_profile
from instructmining_core import files
from instructmining_core.config import InstructMiningError

NOTEBOOK = """\
# %% tags=["parameters"]
profile = "smoke"

# %%
from pathlib import Path
with open({log!r}, "a") as log:
    log.write({name!r} + " ")
{more}
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A home with two notebooks that write down when they are run."""
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    write(tmp_path, "01_first")
    write(tmp_path, "02_second")
    return tmp_path


def write(home, name, more=""):
    text = NOTEBOOK.format(log=str(home / "log"), name=name, more=more)
    script = home / "notebooks" / f"{name}.py"
    script.write_text(text)
    pair = jupytext.read(script)
    pair.metadata["kernelspec"] = {"name": "python3", "display_name": "x", "language": "python"}
    nbformat.write(pair, script.with_suffix(".ipynb"))


def ran(home):
    log = (home / "log").read_text().split()
    (home / "log").unlink()
    return log


def test_a_stage_runs_once_and_a_change_runs_it_and_what_follows(house):
    book.run("smoke", with_book=False)
    assert ran(house) == ["01_first", "02_second"]
    book.run("smoke", with_book=False)
    assert not (house / "log").exists()
    write(house, "02_second", "changed = 1")
    book.run("smoke", with_book=False)
    assert ran(house) == ["02_second"]
    write(house, "01_first", "changed = 1")
    book.run("smoke", with_book=False)
    assert ran(house) == ["01_first", "02_second"]


def test_a_stage_depends_on_the_modules_that_it_imports_and_on_no_others(house):
    notebook = house / "notebooks" / "01_first.ipynb"
    script = notebook.with_suffix(".py")
    script.write_text("from instructmining import figures\n"
                      "from instructmining.experiments import pilot\n"
                      "from instructmining_core import select")

    def used(**more):
        found = book.sources_of(script, **more)
        return {str(file.relative_to(book.PACKAGES)) for file in found}

    assert {"instructmining/experiments/pilot.py", "instructmining/study.py",
            "instructmining/figures/style.py",
            "instructmining_core/finetuning/run.py",  # through study, which imports it late
            "instructmining_core/selection/select.py",  # a public name of the core
            "instructmining_core/indicators/surface.py"} <= used()  # by name, from the registry
    assert not {"instructmining/book.py", "instructmining/claims.py",
                "instructmining/tables.py"} & used()
    assert used() - used(figures=False) >= {"instructmining/figures/style.py"}
    profile = load_profile("smoke")
    shown, handed_on = (book.stage_hash(notebook, profile, "", figures=f) for f in (True, False))
    assert shown != handed_on != book.stage_hash(notebook, profile, "x", figures=False)


def test_a_failing_notebook_is_named_and_has_no_stamp(house):
    write(house, "02_second", "raise RuntimeError('the well is dry')")
    with pytest.raises(InstructMiningError, match="02_second failed.*") as caught:
        book.run("smoke", with_book=False)
    assert "the well is dry" in str(caught.value)
    assert not (files.results("smoke") / "stamps" / "02_second.json").exists()
    assert (files.results("smoke") / "notebooks" / "01_first.ipynb").is_file()


def test_publish_refuses_an_unfinished_run(house):
    with pytest.raises(InstructMiningError, match="lacks 01_first.ipynb"):
        book.publish("smoke")


def test_pages_carry_no_machine_path_and_no_progress_bars(house):
    cell = nbformat.v4.new_code_cell(f"# {house}/results")
    bar = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        nbformat.v4.new_output("display_data", data=bar),
        nbformat.v4.new_output("stream", name="stdout", text="kept"),
    ]
    executed = nbformat.v4.new_notebook(cells=[cell])
    executed.metadata["papermill"] = {"input_path": str(house)}
    nbformat.write(executed, house / "executed.ipynb")
    book.write_page(house / "executed.ipynb", house / "book" / "page.ipynb")
    page = json.loads((house / "book" / "page.ipynb").read_text())
    assert str(house) not in json.dumps(page) and "papermill" not in page["metadata"]
    assert [output["text"] for output in page["cells"][0]["outputs"]] == [["kept"]]


def test_the_projects_own_notebooks_keep_their_manners():
    book.check_notebooks()


def test_a_notebook_with_too_many_code_cells_is_named(house):
    (house / "_config.yml").write_text("repository: {url: https://github.com/a/b}\n")
    write(house, "02_second", more="\n# %%\n1" * (book.MAX_CODE_CELLS - 1))
    with pytest.raises(InstructMiningError) as told:
        book.check_notebooks()
    assert f"02_second.ipynb: more than {book.MAX_CODE_CELLS} code cells" in str(told.value)
    assert "01_first.ipynb: more than" not in str(told.value)
