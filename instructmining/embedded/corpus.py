"""The embedded corpus: docstrings of the standard library and of installed packages as records.

"What does scipy.signal.welch do?" is answered by the first words of its docstring; parameters,
returned values, errors and notes give further kinds of question. Each library is a source; only
what the study's pinned constraints install is named. Files are found with
`importlib.util.find_spec` and parsed with `ast`: nothing is imported or run.

Rows are split for base model, stand-ins, candidates, pool and two evaluation sets with two
promises: all rows of one function are in one split, and no row of a split is a near copy of a row
of another split.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from instructmining_core import files
from instructmining_core.config import InstructMiningError
from instructmining_core.data.duplicates import boilerplate, groups, word_runs
from instructmining_core.data.records import with_row_hash

from . import docstrings

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


_distributions = cache(metadata.packages_distributions)


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


def source_files(library: Library) -> dict[str, Path]:
    """The library's source files by path relative to its root, without tests and vendored code."""
    roots = [library.root]
    if library.name == STDLIB:
        modules = [library.root / name for name in STDLIB_MODULES]
        roots = [p.with_suffix(".py") if p.with_suffix(".py").is_file() else p for p in modules]
    found, own = {}, _SKIPPED_OF.get(library.name, _SKIPPED)
    for root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            inside = path.relative_to(root).as_posix()  # "." for a module of one file
            if not (_SKIPPED.search(inside) or own.search(inside)):
                found[path.relative_to(library.root).as_posix()] = path
    return found


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


SEED = 20230711
VERSION = "1"  # raised when code changes what is read; part of the corpus' name
HASHES = Path(__file__).with_name("hashes.json")
MIN_CANDIDATE_LIBRARIES = 12
ROLES = {
    **dict.fromkeys(CANDIDATES, "candidate"), **dict.fromkeys(UNSEEN, "unseen"),
    **dict.fromkeys(STANDIN, "standin"), **dict.fromkeys(BASE_ONLY, "base"),
}  # fmt: skip
_PRIVATE_PARTS = {"core", "src", "python", "api", "base", "main", "py"}
# Few fixed words beside the name: two questions share no run of 8 words merely because they were
# asked in the same way.
_WORDINGS = {
    "class": ("What is {name}?", "Summarise {name}.", "{name}: what is it for?"),
    "summary": ("What does {name} do?", "Summarise {name}.", "{name}: what is it for?"),
    "long": ("Describe {name} in detail.", "Explain {name}.", "Tell me more about {name}."),
    "parameter": ("{name}: what is `{about}`?", "In {name}, what does `{about}` do?",
                  "{name}: explain `{about}`."),
    "attribute": ("{name}: which attribute is `{about}`?", "In {name}, what holds `{about}`?"),
    "returns": ("What does {name} return?", "What is returned by {name}?",
                "{name}: what comes back?"),
    "raises": ("When does {name} raise {about}?", "{name}: when is {about} raised?"),
    "notes": ("What should one know about {name}?", "{name}: any notes?"),
}  # fmt: skip

SPLITS = ("base_text", "standin", "candidates", "pool", "eval_1", "eval_2")
EVALS = ("eval_1", "eval_2")


@dataclass(frozen=True)
class SplitSizes:
    """Rows per library; what is left of a library goes to the base model's text."""

    read: int = 2400  # rows read of one library at most
    evaluation: int = 12  # rows in each evaluation set, the same for every library
    candidates: int = 600  # rows of a candidate library
    pool: int = 300  # rows of a candidate library that no set may use
    unseen_pool: int = 1000  # rows of a library that is in no set
    candidate_share: float = 0.72  # of a small library's rows
    pool_share: float = 0.2  # of what is left after that
    most_copies: int = 3  # texts that may share one run of 8 words; more is boilerplate


SIZES = {
    "full": SplitSizes(),
    "smoke": SplitSizes(read=240, evaluation=2, candidates=90, pool=24, unseen_pool=90),
}


@dataclass(frozen=True)
class Corpus:
    """The embedded corpus.

    table : record table (id, source, messages, file, row) with columns `symbol` (the function's
        dotted name), `question` (its kind), `prompt`, `response`, `split`, `group` (near-copy
        group), and empty `kind` and `twin` (filled when defects are planted)
    versions : columns source, version, licence, rows, hash (of its rows as read), held ("same" as
        the committed hash of that version, "different", or "unknown version": no failure)
    key : hash of versions, sizes and the code that reads: the cache's key
    """

    table: pd.DataFrame
    versions: pd.DataFrame
    key: str

    def split(self, name: str) -> pd.DataFrame:
        """Rows of one split: base_text, standin, candidates, pool, eval_1 or eval_2."""
        if name not in SPLITS:
            raise InstructMiningError(f"Split {name!r} is unknown; known: {', '.join(SPLITS)}.")
        return self.table[self.table["split"] == name].reset_index(drop=True)


def build_corpus(size: str) -> Corpus:
    """The corpus of the installed libraries, from the user's cache when nothing has changed.

    size : "full" or "smoke" (a few hundred rows of every split)
    Raises InstructMiningError if fewer than 12 of the candidate libraries are installed.
    """
    if size not in SIZES:
        raise InstructMiningError(f"Corpus size {size!r} is unknown; known: {', '.join(SIZES)}.")
    found = [f for name in ROLES if (f := find_library(name))]
    candidates = [f.name for f in found if ROLES[f.name] == "candidate"]
    if len(candidates) < MIN_CANDIDATE_LIBRARIES:
        raise InstructMiningError(
            f"Only {len(candidates)} candidate libraries are installed ({', '.join(candidates)}), "
            f"{MIN_CANDIDATE_LIBRARIES} are needed; install the pinned constraints (`make study`)."
        )
    names = [(f.name, f.version) for f in found]
    # the standard library's text changes with the patch version alone
    what = json.dumps([names, asdict(SIZES[size]), VERSION, SEED], sort_keys=True)
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    place = files.cache() / "pydocs" / f"{key}.parquet"
    if not place.exists():
        _write(place, *_read_and_split(found, size))
    table, about = pd.read_parquet(place), json.loads(place.with_suffix(".json").read_text())
    table = with_row_hash(table.assign(messages=messages(table["prompt"], table["response"])))
    table["kind"], table["twin"] = "", ""
    return Corpus(table, pd.DataFrame(about["versions"]), key)


def held_hashes() -> dict[str, dict[str, str]]:
    """Committed hashes: source -> version -> hash of its rows."""
    return json.loads(HASHES.read_text())


def read_library(library: Library, most: int) -> pd.DataFrame:
    """All usable rows of one library, before near copies are looked at.

    most : rows after which no further file is opened; files come in the order of their names' hash
    returns : columns id, source, file (relative to the library), row (0-based line of the
        definition), symbol, question, prompt, response; one row a piece of a docstring. Of two
        definitions with one name the first is kept.
    """
    rows: list[tuple] = []
    seen: set[str] = set()
    texts = source_files(library)
    for relative in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(rows) >= most:
            break
        for qualified, node, docstring in _definitions(parse(texts[relative])):
            symbol = _symbol(library.name, relative, qualified)
            if symbol in seen:
                continue
            seen.add(symbol)
            is_class = isinstance(node, ast.ClassDef)
            for piece in docstrings.pieces(docstring):
                rows.append((
                    f"{library.name}:{symbol}:{piece.question}:{piece.about}", library.name,
                    relative, node.lineno - 1, symbol, piece.question,
                    _prompt(symbol, is_class, piece), piece.text,
                ))  # fmt: skip
    columns = ["id", "source", "file", "row", "symbol", "question", "prompt", "response"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates("id", ignore_index=True)


def source_hash(rows: pd.DataFrame) -> str:
    """First 16 hex digits of the sha256 of a source's ids, prompts and responses."""
    lines = sorted("\x1f".join(row) for row in rows[["id", "prompt", "response"]].to_numpy())
    return hashlib.sha256("\x1e".join(lines).encode()).hexdigest()[:16]


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST, str]]:
    """(qualified name, node, docstring) of public functions, classes and their methods."""
    stack = [("", tree)]
    while stack:
        prefix, parent = stack.pop()
        for node in parent.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith(("_", "test_")):
                continue
            if docstring := ast.get_docstring(node):
                yield prefix + node.name, node, docstring
            if isinstance(node, ast.ClassDef):
                stack.append((f"{prefix}{node.name}.", node))


def _symbol(library: str, file: str, qualified: str) -> str:
    """The name users know: "scipy", "signal/_spectral_py.py", "welch" -> "scipy.signal.welch"."""
    parts = [p for p in file.removesuffix(".py").split("/") if p != "__init__"]
    public = [p for p in parts if not p.startswith("_") and p not in _PRIVATE_PARTS]
    head = public[:1] if library == STDLIB else [library, *public[:1]]
    return ".".join([*head, qualified])


def _prompt(symbol: str, is_class: bool, piece: docstrings.DocstringPiece) -> str:
    wordings = _WORDINGS["class" if is_class and piece.question == "summary" else piece.question]
    pick = hashlib.sha256(f"{symbol}|{piece.question}|{piece.about}".encode()).digest()[0]
    return wordings[pick % len(wordings)].format(name=symbol, about=piece.about)


def _read_and_split(found: Sequence[Library], size: str) -> tuple:
    sizes = SIZES[size]
    bar = tqdm(found, desc="reading docstrings", unit="library", disable=None)  # on a terminal
    frames = [read_library(library, sizes.read) for library in bar]
    held = held_hashes() if size == "full" else {}
    versions = []
    for library, rows in zip(found, frames, strict=True):
        digest = source_hash(rows)
        known = held.get(library.name, {}).get(library.version)
        state = "unknown version" if known is None else "same" if known == digest else "different"
        versions.append({
            "source": library.name, "version": library.version, "licence": library.licence,
            "rows": len(rows), "hash": digest, "held": state,
        })  # fmt: skip
    table = split_rows(pd.concat(frames, ignore_index=True), ROLES, sizes, SEED)
    return table, pd.DataFrame(versions)


def _write(place: Path, table: pd.DataFrame, versions: pd.DataFrame) -> None:
    """Versions first: a table in the cache always has its versions beside it."""
    about = {"versions": versions.to_dict("records")}
    files.write_atomic(place.with_suffix(".json"), json.dumps(about, indent=1))
    with files.being_written(place) as part:
        table.to_parquet(part)


def messages(prompts: Sequence[str], responses: Sequence[str]) -> list[list[dict[str, str]]]:
    """One conversation of two messages for each prompt and response."""
    return [
        [{"role": "user", "content": p}, {"role": "assistant", "content": r}]
        for p, r in zip(prompts, responses, strict=True)
    ]


def split_rows(
    rows: pd.DataFrame, roles: dict[str, str], sizes: SplitSizes, seed: int
) -> pd.DataFrame:
    """Rows with their split, near-copy group, and only those that keep both promises.

    rows : columns source, symbol, prompt, response
    roles : library -> "candidate", "unseen", "standin" or "base"
    returns : the rows kept, with columns `split` and `group` (int). Left out are boilerplate, near
        copies of another split's rows, a second row of a function in an evaluation set, and rows
        past a split's size.
    """
    texts = (rows["prompt"] + "\n" + rows["response"]).tolist()
    runs = word_runs(texts)
    common = boilerplate(runs, sizes.most_copies)
    runs = runs[~runs["text"].isin(common)]
    table = rows.assign(group=groups(runs, len(rows))).drop(index=rows.index[common])
    lonely = _lonely_symbols(table)
    parts = [_split_library(part, roles[source], sizes, lonely, seed)
             for source, part in table.groupby("source", sort=False)]  # fmt: skip
    table = table.assign(split=pd.concat(parts))
    kept = _one_split_per_group(table[table["split"] != ""])
    return kept.assign(group=pd.factorize(kept["group"])[0]).reset_index(drop=True)


def _order(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}|{key}".encode()).digest()


def _lonely_symbols(table: pd.DataFrame) -> set[str]:
    """Functions without a near copy in another function: only they may be asked in evaluation."""
    symbols_of_group = table.groupby("group")["symbol"].transform("nunique")
    shared = set(table.loc[symbols_of_group > 1, "symbol"])
    return set(table["symbol"]) - shared


def _split_library(
    part: pd.DataFrame, role: str, sizes: SplitSizes, lonely: set[str], seed: int
) -> pd.Series:
    """Split name of every row of one library, "" for rows not used."""
    if role in ("standin", "base"):
        return pd.Series("standin" if role == "standin" else "base_text", index=part.index)
    chosen = pd.Series("", index=part.index)
    symbols = sorted(part["symbol"].unique(), key=lambda s: _order(s, seed))
    asked = [s for s in symbols if s in lonely][: 2 * sizes.evaluation]
    rows_of = part.groupby("symbol").indices
    for position, symbol in enumerate(asked):
        index = part.index[rows_of[symbol]]
        one = min(index, key=lambda i: _order(f"row {part.at[i, 'id']}", seed))
        chosen[one] = EVALS[position % 2]
    rest = [s for s in symbols if s not in set(asked)]
    count = np.array([len(rows_of[s]) for s in rest])
    for name, rank in zip(_fill(role, sizes, count), rest, strict=True):
        chosen[part.index[rows_of[rank]]] = name
    return chosen


def _fill(role: str, sizes: SplitSizes, count: np.ndarray) -> list[str]:
    """Split of each function, in order: candidates, then pool, then the base model's text."""
    total = int(count.sum())
    if role == "unseen":
        first, second = 0, min(sizes.unseen_pool, int(0.7 * total))
    else:
        first = min(sizes.candidates, int(sizes.candidate_share * total))
        second = min(sizes.pool, int(sizes.pool_share * total))
    reached = np.cumsum(count)
    return ["candidates" if r <= first else "pool" if r <= first + second else "base_text"
            for r in reached]  # fmt: skip


def _one_split_per_group(table: pd.DataFrame) -> pd.DataFrame:
    """Of a group that stands in several splits, the rows of the split with most of them.

    Ties go to the split that stands later in SPLITS, the scarcer one.
    """
    rank = table["split"].map({name: i for i, name in enumerate(SPLITS)})
    size = table.groupby(["group", "split"])["split"].transform("size")
    best = (size * len(SPLITS) + rank).groupby(table["group"]).transform("max")
    return table[size * len(SPLITS) + rank == best]
