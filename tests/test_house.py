"""The manners of the house that a machine can hold: rooms, directions, files, pinned versions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.house import (
    ALL_FILES,
    ALL_LINES,
    CORE,
    CORE_FILES,
    CORE_LINES,
    FUNCTION_LINES,
    LINES,
    SPLINTER,
    STUDY,
    House,
    within,
)

ROOT = Path(__file__).resolve().parent.parent
REASONS = {  # files under 40 lines, and why they are files
    f"{STUDY}.__main__": "`python -m instructmining`",
}


@pytest.fixture(scope="module")
def house() -> House:
    return House()


def test_imports_go_one_way(house):
    assert house.cycles() == [] and house.climbs() == []


def test_a_climb_and_a_cycle_are_seen(house):
    """The two checks above can fail: a made-up import upwards is named."""
    odd = House()
    odd.trees[f"{CORE}.data.records"] = ast.parse(f"def f():\n    from {CORE}.models import hub")
    odd.trees[f"{CORE}.files"] = ast.parse(f"import {STUDY}.study")
    assert f"{CORE}.data.records -> {CORE}.models.hub" in odd.climbs()
    assert f"{CORE}.files -> {STUDY}.study" in odd.climbs()
    assert any(f"{CORE}.files" in cycle for cycle in odd.cycles())


def test_rooms_and_files_have_their_measure(house):
    core = [name for name in house.paths if within(name, CORE)]
    assert len(core) <= CORE_FILES and len(house.paths) <= ALL_FILES
    assert sum(house.lines[name] for name in core) <= CORE_LINES
    assert sum(house.lines.values()) <= ALL_LINES
    long = {name: n for name, n in house.lines.items() if n > LINES}
    assert not long
    functions = {f"{m}.{f}": n for m, f, node in house.functions()
                 if (n := node.end_lineno - node.lineno + 1) > FUNCTION_LINES}  # fmt: skip
    assert not functions
    small = {name for name, n in house.lines.items()
             if n < SPLINTER and house.paths[name].name != "__init__.py"}  # fmt: skip
    assert small == set(REASONS)


def test_one_name_means_one_thing(house):
    assert house.namesakes() == {}


def test_parameters_are_there_to_be_set(house):
    unset, _ = house.unset_parameters()
    assert len(unset) < 30, unset


def test_importing_the_core_loads_nothing_heavy():
    code = (
        "import sys, instructmining_core, instructmining.cli;"
        "print([m for m in ('torch', 'transformers', 'pandas', 'statsmodels') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_pickle_and_no_remote_code():
    for path in [*(ROOT / CORE).rglob("*.py"), *(ROOT / STUDY).rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                assert "joblib" not in names, path
            if isinstance(node, ast.ImportFrom):
                assert node.module != "pickle", path
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pickle":
                assert node.attr == "UnpicklingError", path  # what torch raises at a refusal
            if isinstance(node, ast.Call):
                for word in node.keywords:
                    if word.arg == "trust_remote_code":
                        assert isinstance(word.value, ast.Constant) and not word.value.value, path
                    if word.arg == "weights_only":
                        assert isinstance(word.value, ast.Constant) and word.value.value, path


def test_environment_file_names_the_pinned_set():
    spec = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in spec["dependencies"] if isinstance(d, dict))
    assert pip == ["-c constraints.txt", "-e .[study,book]"]
    assert any(str(d).startswith("python") for d in spec["dependencies"])


def test_constraints_pin_what_the_project_asks_for():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        asked += extra
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower().replace("_", "-"): line.partition("==")[2]
            for line in lines if "==" in line}  # fmt: skip
    from packaging.requirements import Requirement

    for text in asked:
        need = Requirement(text)
        name = need.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not in constraints.txt"
        assert need.specifier.contains(pins[name]), f"{text} refuses the pinned {pins[name]}"
    assert pins["torch"] == "2.13.0"


def test_ranges_admit_the_older_gpu_set():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {Requirement(text).name: Requirement(text) for text in project["dependencies"]}
    assert needs["torch"].specifier.contains("2.11.0")
    assert needs["transformers"].specifier.contains("5.17.0")
