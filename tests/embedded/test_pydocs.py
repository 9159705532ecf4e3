"""The embedded corpus: what is read from a docstring, and that no row leaks between splits."""

from __future__ import annotations

import re
import subprocess
import sys

import pandas as pd
import pytest

from instructmining.embedded import corpus as corpus_module
from instructmining.embedded.corpus import (
    ROLES,
    Corpus,
    SplitSizes,
    build_corpus,
    find_library,
    held_hashes,
    read_library,
    split_rows,
)
from instructmining.embedded.docstrings import clean, pieces
from instructmining_core.config import InstructMiningError

NUMPY_DOC = """Estimate the power of a signal.

Welch's method averages over parts of the signal.

Parameters
----------
x : array_like
    Time series of measurement values.

    A second paragraph that is not used.
fs : float, optional
    Sampling frequency of the series in hertz. Defaults to
    1.0 when nothing is given.

Returns
-------
f : ndarray
    Array of the sample frequencies found.

Raises
------
ValueError
    If the window is longer than the signal.

Examples
--------
>>> welch(x)
"""


def test_pieces_of_a_numpy_docstring():
    found = {(p.question, p.about): p.text for p in pieces(NUMPY_DOC)}
    assert found == {
        ("long", ""): "Estimate the power of a signal. "
        "Welch's method averages over parts of the signal.",
        ("parameter", "fs"): "Sampling frequency of the series in hertz. Defaults to 1.0 when "
        "nothing is given.",
        ("returns", ""): "Array of the sample frequencies found.",
        ("raises", "ValueError"): "If the window is longer than the signal.",
    }  # the five words on `x` are too few


def test_pieces_of_google_and_sphinx_docstrings():
    google = "Load a model from a folder.\n\nArgs:\n    name (`str`, *optional*):\n" \
             "        The name of the model that is loaded.\n    other: Too short.\n\n" \
             "Returns:\n    The model, ready to be used for training.\n"
    assert {(p.question, p.about): p.text for p in pieces(google)} == {
        ("summary", ""): "Load a model from a folder.",
        ("parameter", "name"): "The name of the model that is loaded.",
        ("returns", ""): "The model, ready to be used for training.",
    }
    sphinx = "Close the connection to the server.\n\n:param wait: seconds to wait before it is\n" \
             "  closed by force\n:return: whether the connection was open\n"
    assert {(p.question, p.about): p.text for p in pieces(sphinx)} == {
        ("summary", ""): "Close the connection to the server.",
        ("parameter", "wait"): "seconds to wait before it is closed by force.",
    }  # the five words on what is returned are too few


@pytest.mark.parametrize("text", [
    "Too few words here",
    "Call it as >>> f(x) and look at what it gives back",
    "See https://example.org for all of the many details of it",
    "alpha = 1 and beta = 2 and gamma = 3 and so on for ever",
    " ".join(["word"] * 91),
    "The following options can be given to this function:",
])  # fmt: skip
def test_what_is_no_prose_gives_nothing(text):
    assert clean(text) == ""


def test_clean_takes_markup_away():
    text = "Return a :class:`~pkg.Thing` or ``None``, see `the guide <http>`_ for *all* cases"
    assert clean(text) == "Return a `pkg.Thing` or `None`, see the guide for *all* cases."


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The full corpus, from the cache that the study itself uses."""
    return build_corpus("full")


READINGS = {
    "letters and digits": lambda text: re.findall(r"[a-z0-9]+", text),
    "words": lambda text: re.findall(r"\w+", text),
    "punctuation taken out": lambda text: re.sub(r"[^\w\s]|_", "", text).split(),
}


@pytest.mark.parametrize("reading", READINGS)
def test_no_evaluation_row_or_near_copy_is_trained_on(corpus, reading):
    """Counted anew, in plain Python: no run of 8 words of one split is in another."""
    owner: dict[tuple, str] = {}
    crossing = []
    table = corpus.table[["split", "prompt", "response"]]
    for split, prompt, response in table.itertuples(index=False):
        words = READINGS[reading](f"{prompt} {response}".lower())
        for start in range(len(words) - 7):
            run = tuple(words[start : start + 8])
            if owner.setdefault(run, split) != split:
                crossing.append((split, owner[run], " ".join(run)))
    assert len(owner) > 300_000
    assert crossing == []


def test_a_function_is_in_one_split(corpus):
    assert (corpus.table.groupby("symbol")["split"].nunique() == 1).all()
    assert not corpus.table["id"].duplicated().any()
    assert not corpus.table.duplicated(["prompt", "response"]).any()


def test_who_gives_what(corpus):
    counts = corpus.table.groupby(["source", "split"]).size().unstack(fill_value=0)
    roles = {role: [s for s in counts.index if ROLES[s] == role]
             for role in ("candidate", "unseen", "standin", "base")}  # fmt: skip
    assert len(roles["candidate"]) >= 12
    # a set of one source takes 128 rows, and a source gives at most 40 % of its rows
    assert (counts.loc[roles["candidate"], "candidates"] >= 320).all()
    assert (counts.loc[roles["unseen"], "candidates"] == 0).all()
    assert (counts.loc[roles["unseen"], "pool"] >= 400).all()
    asked = counts.loc[roles["candidate"] + roles["unseen"], ["eval_1", "eval_2"]]
    assert (asked == asked.iloc[0, 0]).all().all()
    others = counts.loc[roles["standin"] + roles["base"]]
    assert others[["candidates", "pool", "eval_1", "eval_2"]].to_numpy().sum() == 0
    assert (counts.loc[roles["standin"], "base_text"] == 0).all()


def test_held_hashes(corpus):
    """A pinned version's text is the one that was read when its hash was committed."""
    different = corpus.versions[corpus.versions["held"] == "different"]
    assert different.empty, different.to_string()
    assert set(corpus.versions["held"]) <= {"same", "unknown version"}
    held = held_hashes()
    assert set(held) == set(ROLES)
    assert all(re.fullmatch(r"[0-9a-f]{16}", h) for of in held.values() for h in of.values())


@pytest.fixture
def few_libraries(tmp_path, monkeypatch):
    """Three libraries in the place of all, and a cache of their own."""
    roles = {name: ROLES[name] for name in ("seaborn", "joblib", "networkx")}
    monkeypatch.setattr(corpus_module, "ROLES", roles)
    monkeypatch.setattr(corpus_module, "MIN_CANDIDATE_LIBRARIES", 1)
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path / "a"))


@pytest.mark.usefixtures("few_libraries")
def test_unknown_version_is_recorded(monkeypatch):
    monkeypatch.setattr(corpus_module, "held_hashes", lambda: {"seaborn": {"0.0.1": "0" * 16}})
    versions = build_corpus("full").versions.set_index("source")
    assert versions["held"].tolist() == ["unknown version"] * 3
    assert versions.loc["seaborn", "hash"] != "0" * 16


@pytest.mark.usefixtures("few_libraries")
def test_built_twice_is_the_same_and_cached(tmp_path, monkeypatch):
    one = build_corpus("smoke")
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path / "b"))
    two = build_corpus("smoke")
    pd.testing.assert_frame_equal(one.table, two.table)
    monkeypatch.setattr(corpus_module, "_read_and_split", None)  # a second reading would fail
    again = build_corpus("smoke")
    pd.testing.assert_frame_equal(one.table, again.table)
    pd.testing.assert_frame_equal(one.versions, again.versions)


def test_nothing_is_imported():
    code = "import sys; from instructmining.embedded import corpus\n" \
           "f = corpus.find_library('seaborn'); corpus.read_library(f, 50)\n" \
           "print([m for m in ('seaborn', 'matplotlib', 'torch', 'transformers') " \
           "if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_symbols_and_prompts():
    assert corpus_module._symbol("scipy", "signal/_spectral_py.py", "welch") == "scipy.signal.welch"
    assert corpus_module._symbol("pandas", "core/frame.py", "DataFrame.merge") == \
        "pandas.frame.DataFrame.merge"
    assert corpus_module._symbol("stdlib", "json/decoder.py", "JSONDecoder") == "json.JSONDecoder"
    library = find_library("seaborn")
    rows = read_library(library, 200)
    assert rows["prompt"].str.contains(r"seaborn\.").all()
    first = rows.iloc[0]
    lines = (library.root / first["file"]).read_text().splitlines()
    assert first["symbol"].rsplit(".", 1)[-1] in "".join(lines[first["row"] : first["row"] + 1])


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(InstructMiningError, match="known: full, smoke"):
        build_corpus("huge")
    monkeypatch.setattr(corpus_module, "MIN_CANDIDATE_LIBRARIES", 99)
    with pytest.raises(InstructMiningError, match="99 are needed; install the pinned"):
        build_corpus("smoke")
    assert find_library("no_such_library_here") is None


def test_crossing_groups_keep_one_split():
    run = "alpha beta gamma delta epsilon zeta eta theta"
    rows = pd.DataFrame({
        "id": range(6), "source": ["lib"] * 3 + ["aid"] * 3, "symbol": list("abcdef"),
        "prompt": "", "response": [f"{run} {i}" if i in (0, 3, 4) else f"w{i}" for i in range(6)],
    })  # fmt: skip
    kept = split_rows(rows, {"lib": "base", "aid": "standin"}, SplitSizes(), seed=0)
    assert kept["id"].tolist() == [1, 2, 3, 4, 5]  # two copies in standin outweigh one in base_text
