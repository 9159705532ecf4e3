"""The manners of the house that a machine can hold: imports, files, the one pinned set."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "instructmining_core"
PACKAGE = "instructmining_core"


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(CORE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_of(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, at its top or inside a function."""
    nodes = ast.walk(ast.parse(path.read_text()))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return {one for one in found if one in known and one != name}


def test_imports_go_one_way():
    """No import cycle, counting also imports inside functions."""
    known = modules()
    graph = {n: imports_of(n, p, set(known)) for n, p in known.items()}
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"import cycle: {' -> '.join([*path, name])}"
        if state.get(name):
            return
        state[name] = 1
        for other in sorted(graph[name]):
            visit(other, (*path, name))
        state[name] = 2

    for name in graph:
        visit(name, ())


FORBIDDEN = [
    # (these modules, may not import those, even inside a function)
    (("indicators", "finetune", "stacked", "evaluate"), ("ledger", "regression", "study")),
    (("finetune", "evaluate", "lm"), ("indicators",)),
    (("regression", "inference", "within", "ols"), ("lm", "finetune", "ledger", "study")),
    (("records", "formats", "batching", "templates"), ("lm", "study", "embedded")),
    (("sources", "selection", "card", "scoring"), ("embedded", "study")),
]


@pytest.mark.parametrize("these,those", FORBIDDEN)
def test_rooms_that_know_nothing_of_each_other(these, those):
    known = modules()

    def inside(name: str, rooms: tuple[str, ...]) -> bool:
        rest = name.removeprefix(PACKAGE + ".")
        return any(rest == room or rest.startswith(room + ".") for room in rooms)

    checked = [name for name in known if inside(name, these)]
    assert checked, f"none of {these} is there any more; bring this list up to date"
    for name in checked:
        bad = [o for o in imports_of(name, known[name], set(known)) if inside(o, those)]
        assert not bad, f"{name} imports {bad}"


def test_importing_the_core_loads_nothing_heavy():
    code = (
        "import sys, instructmining_core, instructmining_core.cli;"
        "print([m for m in ('torch', 'transformers', 'pandas', 'statsmodels') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_pickle_and_no_remote_code():
    for path in CORE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                assert "pickle" not in names and "joblib" not in names, path
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


def test_files_stay_readable():
    long = {p.name: n for p in CORE.rglob("*.py") if (n := p.read_text().count("\n")) > 300}
    assert not long, long
