"""The house in figures: files, rooms, directions, namesakes and parameters that nobody sets.

    python -m tests.house

Read from the code's text alone; nothing of the package is imported or run. `tests/test_house.py`
holds the figures to their limits.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE, STUDY = "instructmining_core", "instructmining"
FLOORS = (  # lowest first; a file imports from its own floor or a lower one
    (f"{CORE}.config", f"{CORE}.files"),
    (f"{CORE}.data",),
    (f"{CORE}.models",),
    (f"{CORE}.indicators", f"{CORE}.finetuning"),
    (f"{CORE}.regression",),
    (f"{CORE}.selection",),
    (CORE,),
    (STUDY,),
)
STRANGERS = (  # rooms that know nothing of each other, though their floors would let them
    (f"{CORE}.indicators", f"{CORE}.finetuning"),
    (f"{CORE}.regression", f"{CORE}.models"),
    (f"{CORE}.regression", f"{CORE}.finetuning"),
    (f"{CORE}.selection", f"{CORE}.models"),
)
LINES, FUNCTION_LINES, SPLINTER = 600, 60, 40
BUDGET = {  # files and lines of the core, then of both packages, that each purpose may take
    "the study on a real model": (58, 11_740, 85, 18_620),
    "every file that people have": (1, 1_298, 1, 1_328),
    "the replication and evidence that grows": (3, 460, 10, 1_960),
    "judges, tasks with right answers, the size search": (2, 700, 6, 1_400),
    "a cluster, and faults": (0, 100, 1, 500),
}
CORE_FILES, CORE_LINES, ALL_FILES, ALL_LINES = map(sum, zip(*BUDGET.values(), strict=True))


class House:
    """Every module of both packages, parsed once."""

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {}
        for package in (CORE, STUDY):
            for path in sorted((ROOT / package).rglob("*.py")):
                parts = path.relative_to(ROOT).with_suffix("").parts
                self.paths[".".join(parts).removesuffix(".__init__")] = path
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.paths.items()}
        self.lines = {name: path.read_text().count("\n") for name, path in self.paths.items()}

    def imports(self, name: str) -> set[str]:
        """Modules of the two packages that a module imports, also inside a function."""
        package = name if self.paths[name].name == "__init__.py" else name.rpartition(".")[0]
        found = set()
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                modules = {f"{base}.{alias.name}" for alias in node.names} & self.paths.keys()
                found |= modules or {base}
        return {one for one in found if one in self.paths and one != name}

    def cycles(self) -> list[str]:
        """Import cycles, each as a path of module names."""
        found, state = [], {}

        def visit(name: str, path: tuple[str, ...]) -> None:
            if state.get(name) == "open":
                found.append(" -> ".join([*path[path.index(name):], name]))
            if name in state:
                return
            state[name] = "open"
            for other in sorted(self.imports(name)):
                visit(other, (*path, name))
            state[name] = "done"

        for name in self.paths:
            visit(name, ())
        return found

    def climbs(self) -> list[str]:
        """Imports that go up a floor, or between rooms that know nothing of each other."""
        bad = []
        for name in self.paths:
            for other in sorted(self.imports(name)):
                strange = any(within(name, a) and within(other, b) or
                              within(name, b) and within(other, a) for a, b in STRANGERS)
                if strange or floor(other) > floor(name):
                    bad.append(f"{name} -> {other}")
        return bad

    def public(self) -> dict[str, list[str]]:
        """Public top-level functions and classes, name -> the modules that define it."""
        found = defaultdict(list)
        for name, tree in self.trees.items():
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                    found[node.name].append(name)
        return found

    def namesakes(self) -> dict[str, list[str]]:
        """Public names that are defined in more than one module."""
        return {name: where for name, where in self.public().items() if len(where) > 1}

    def functions(self):
        """(module, qualified name, node) of every function and method."""
        for name, tree in self.trees.items():
            stack = [(tree, "")]
            while stack:
                node, prefix = stack.pop()
                for child in ast.iter_child_nodes(node):
                    inside = prefix
                    if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                        yield name, prefix + child.name, child
                        inside = f"{prefix}{child.name}."
                    elif isinstance(child, ast.ClassDef):
                        inside = f"{prefix}{child.name}."
                    stack.append((child, inside))

    def unset_parameters(self) -> tuple[list[str], int]:
        """Parameters with a default that no call sets, and how many parameters with one there are.

        Calls are looked for by the function's name in the packages, notebooks and benchmarks, not
        in the tests: a parameter that only a test sets is one too many. A call that hands on
        `**options` or `*arguments` sets all of them. Commands are called by their framework.
        """
        calls = defaultdict(list)
        readers = [*self.trees.values()]
        for folder in ("notebooks", "bench"):
            readers += [ast.parse(p.read_text()) for p in (ROOT / folder).glob("*.py")]
        handed_on = {  # functions that are passed as a value: whoever calls them may set all
            word for tree in self.trees.values() for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            for word in re.findall(r":(\w+)$", node.value)  # "module:function" of the registry
        } | {name for _, name, _ in self.functions() if name.startswith("compute_")}
        for tree in readers:
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    name = called(node.func)
                    if name == "partial" and node.args and called(node.args[0]):
                        handed = ast.Call(node.args[0], node.args[1:], node.keywords)
                        calls[called(node.args[0])].append(handed)
                    elif name:
                        calls[name].append(node)
                    for value in [*node.args, *(word.value for word in node.keywords)]:
                        if isinstance(value, ast.Name):
                            handed_on.add(value.id)
        unset, count = [], 0
        for module, name, node in self.functions():
            short = name.split(".")[-1]
            if module.startswith(f"{STUDY}.cli") and node.decorator_list:
                continue
            mine = calls[name.split(".")[-2] if short == "__init__" else short]
            arguments, method = node.args, "." in name
            plain = [*arguments.posonlyargs, *arguments.args]
            first = len(plain) - len(arguments.defaults)
            for i, argument in enumerate(plain[first:], start=first):
                count += 1
                at = i - (1 if method and plain[0].arg in ("self", "cls") else 0)
                if short not in handed_on and not any(sets(c, argument.arg, at) for c in mine):
                    unset.append(f"{module}.{name}({argument.arg})")
            for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
                if default is None:
                    continue
                count += 1
                if short not in handed_on and not any(sets(c, argument.arg, None) for c in mine):
                    unset.append(f"{module}.{name}({argument.arg})")
        return sorted(unset), count

    def errors(self) -> list[str]:
        """Exception classes of the packages."""
        return sorted(
            f"{name}.{node.name}" for name, tree in self.trees.items() for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "Mismatch"))
        )


def called(function: ast.expr) -> str:
    """The last name of what is called, "" for a call of something nameless."""
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def sets(call: ast.Call, name: str, position: int | None) -> bool:
    """Whether a call gives a value to the parameter `name` at `position` (None: keyword only)."""
    if any(word.arg in (name, None) for word in call.keywords):
        return True
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return True
    return position is not None and len(call.args) > position


def within(name: str, room: str) -> bool:
    """Whether a module is a room or lies in it."""
    return name == room or name.startswith(room + ".")


def floor(name: str) -> int:
    """The number of the floor on which a module stands; the longest room's name counts."""
    rooms = [(len(room), number) for number, rooms in enumerate(FLOORS) for room in rooms
             if within(name, room)]  # fmt: skip
    return max(rooms)[1]


def table() -> list[tuple[str, str, str]]:
    """Rows of (what, now, limit)."""
    house = House()
    core = [n for n in house.paths if within(n, CORE)]
    unset, count = house.unset_parameters()
    rooms = [sorted({n.split(".")[1] for n in house.paths if within(n, package)
                     and house.paths[n].parent.parent.name == package})
             for package in (CORE, STUDY)]  # fmt: skip
    return [
        ("core: files", f"{len(core)}", f"{CORE_FILES}"),
        ("core: lines", f"{sum(house.lines[n] for n in core):,}", f"{CORE_LINES:,}"),
        ("both packages: files", f"{len(house.paths)}", f"{ALL_FILES}"),
        ("both packages: lines", f"{sum(house.lines.values()):,}", f"{ALL_LINES:,}"),
        ("rooms of the core", f"{len(rooms[0])}: {', '.join(rooms[0])}", "6"),
        ("rooms of the study", f"{len(rooms[1])}: {', '.join(rooms[1])}", "4 at most"),
        ("import cycles", f"{len(house.cycles())}", "0"),
        ("imports that climb", f"{len(house.climbs())}", "0"),
        ("longest file", f"{max(house.lines.values())}", str(LINES)),
        ("longest function",
         f"{max(n.end_lineno - n.lineno + 1 for _, _, n in house.functions())}",
         str(FUNCTION_LINES)),
        ("public names with a namesake", f"{len(house.namesakes())}", "0"),
        ("parameters that nobody sets", f"{len(unset)} of {count}", "< 30"),
        ("exception classes", f"{len(house.errors())}", "one base and those that are caught"),
    ]


if __name__ == "__main__":
    for what, now, limit in table():
        print(f"{what:<32}{now:<56}{limit}")
    house = House()
    for title, rows in (("climbs", house.climbs()), ("cycles", house.cycles()),
                        ("namesakes", [f"{k}: {', '.join(v)}" for k, v in
                                       sorted(house.namesakes().items())]),
                        ("never set", house.unset_parameters()[0])):
        print(f"\n{title}:", *rows, sep="\n  ")
