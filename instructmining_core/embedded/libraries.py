"""Which libraries the embedded corpus reads, where they lie, and which of their files count.

Only what the study's own pinned constraints install is named. Packages are found with
`importlib.util.find_spec` and files are parsed with `ast`: nothing is imported or run.
"""

from __future__ import annotations

import ast
import gc
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

STDLIB = "stdlib"
STDLIB_MODULES = (
    "abc argparse ast asyncio base64 bdb binascii bisect bz2 calendar cgi chunk cmd code codecs "
    "codeop collections colorsys compileall concurrent configparser contextlib contextvars copy "
    "copyreg cProfile csv ctypes curses dataclasses datetime dbm decimal difflib dis doctest email "
    "enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext "
    "glob graphlib gzip hashlib heapq hmac html http imaplib importlib inspect io ipaddress json "
    "keyword linecache locale logging lzma mailbox mimetypes modulefinder multiprocessing netrc "
    "ntpath numbers opcode operator optparse os pathlib pdb pickle pickletools pkgutil platform "
    "plistlib poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue quopri random "
    "reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib "
    "socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable "
    "sysconfig tabnanny tarfile telnetlib tempfile textwrap threading timeit tkinter token "
    "tokenize tomllib trace traceback tracemalloc turtle types typing unittest urllib uuid venv "
    "warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo"
).split()
CANDIDATES = (
    STDLIB, "numpy", "scipy", "pandas", "statsmodels", "sklearn", "torch", "transformers",
    "matplotlib", "seaborn", "sympy", "sphinx", "datasets", "huggingface_hub", "peft",
    "fontTools",
)  # fmt: skip
UNSEEN = ("networkx", "sqlalchemy")
STANDIN = (
    "IPython", "docutils", "pydantic", "accelerate", "sentence_transformers",
    "prompt_toolkit", "rich", "narwhals", "optuna", "flaml", "pyarrow", "fsspec", "joblib",
    "tornado", "PIL", "anyio",
)  # fmt: skip
BASE_ONLY = (
    "jinja2", "alembic", "traitlets", "click", "babel", "bs4", "pyparsing",
    "requests", "urllib3", "jupytext", "nbformat", "jupyter_client", "ipykernel", "formulaic",
    "pybtex", "myst_nb", "myst_parser", "jedi", "parso", "zmq", "packaging", "platformdirs",
    "typer", "httpx2", "tokenizers", "attr", "markdown_it",
)  # fmt: skip
_LICENCES = {"torch": "BSD-3-Clause"}  # its metadata names none
_SKIPPED = re.compile(
    r"(^|/)(tests?|testing|_vendor|vendored|_vendored|externals|_extern|conftest|benchmarks|"
    r"examples?|locale|array_api_\w+|site-packages|idle_test|test_\w+|_test_\w+)(/|\.py$)")
_SKIPPED_OF = {
    "torch": re.compile(r"(^|/)_\w+/|^onnx/_internal|^ao/|^distributed/elastic"),
    "transformers": re.compile(r"^models/|testing_utils|^cli/"),
    "pyarrow": re.compile(r"^src/"),
    "sympy": re.compile(r"^parsing/(latex|autolev)/_|^polys/benchmarks"),
}


class CorpusError(RuntimeError):
    """The installed packages do not give enough text."""


@dataclass(frozen=True)
class Library:
    """Where one source's files lie.

    version : of the installed package; for the standard library the exact patch version of Python
    """

    name: str
    version: str
    licence: str
    root: Path


def find_library(name: str) -> Library | None:
    """The installed library of that import name, None where it is not installed."""
    if name == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return Library(name, platform.python_version(), "PSF-2.0", root)
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    version, licence = _package_metadata(name)
    return Library(name, version, licence, Path(list(spec.submodule_search_locations)[0]))


def _package_metadata(name: str) -> tuple[str, str]:
    """Version without its local part ("2.13.0", not "2.13.0+cpu") and licence."""
    owners = _distributions().get(name) or [name]
    try:
        found = metadata.metadata(owners[0])
    except metadata.PackageNotFoundError:
        return "unknown", "unknown"
    licence = found.get("License-Expression") or (found.get("License") or "").split("\n")[0]
    if not licence or len(licence) > 60:
        classes = [c for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
        licence = classes[0].split(" :: ")[-1] if classes else _LICENCES.get(name, "unknown")
    return found["Version"].split("+")[0], licence


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def source_files(library: Library) -> dict[str, Path]:
    """The library's source files by path relative to its root, without tests and vendored code."""
    return {path.relative_to(library.root).as_posix(): path for path in _files(library)}


def parse(path: Path) -> ast.Module:
    """Syntax tree of a file; an empty one for a template or another Python's syntax."""
    collecting = gc.isenabled()
    gc.disable()  # a tree is thousands of small objects without cycles: half of the parse time
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])
    finally:
        if collecting:
            gc.enable()


def _files(library: Library) -> Iterator[Path]:
    if library.name == STDLIB:
        for module in STDLIB_MODULES:
            place = library.root / module
            yield from [place.with_suffix(".py")] if place.with_suffix(".py").is_file() else (
                _python_files(place, None) if place.is_dir() else [])
        return
    yield from _python_files(library.root, _SKIPPED_OF.get(library.name))


def _python_files(folder: Path, skipped: re.Pattern | None) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder).as_posix()
        if not _SKIPPED.search(relative) and not (skipped and skipped.search(relative)):
            yield path
