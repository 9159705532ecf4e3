"""Indicators: examples in, one column of numbers (or a few) out. One idea a file.

`INDICATORS` lists them. Everything a caller needs to know stands there, so that nothing heavy is
imported before it is used; `INDICATORS["ppl"].load()` imports the module.

To add an indicator, write a module with one function and add one entry:

    # mine/questions.py
    \"\"\"Question marks in the response. (Name the paper here.)\"\"\"
    from instructmining_core.indicators.text import each_turn, mean_over_turns

    def compute_questions(conversations, model=None, *, progress=False):
        values = [turn.response.count("?") for turn in each_turn(conversations)]
        return {"questions": mean_over_turns(conversations, values)}

    INDICATORS["questions"] = Indicator(
        "questions", "1", ("questions",), where="mine.questions:compute_questions",
        paper="your paper")

It gets checked conversations (`text.read`) and returns a `text.Column` for each name in
`columns`: float64 values, NaN where there is none, with a reason. Raise `version` whenever values
change: it is part of the score bank's key. With `role` it also gets the opened model of that role;
with `pool_relative` also `reference=` (a `reference.Reference`) and `row_hashes=`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from ..data.tokenization import TEMPLATE_VERSION

ROLES = ("base", "ppl", "reward", "unieval", "encoder")


@dataclass(frozen=True)
class Indicator:
    """What is known of an indicator without importing it.

    name : as typed in `--indicators`
    version : part of every cache key; raised when values change
    columns : the names of its columns
    where : "module:function" of what computes it, the module by its full name
    paper : where it comes from
    role : which model it needs (one of `ROLES`), None for none
    role_optional : True if it also works without that model, then with `version_without`
    pool_relative : True if its value depends on a reference set
    default : False if it is computed only when asked for by name
    """

    name: str
    version: str
    columns: tuple[str, ...]
    where: str
    paper: str
    role: str | None = None
    role_optional: bool = False
    version_without: str = ""
    pool_relative: bool = False
    default: bool = True

    def load(self) -> Callable:
        """Import the function that computes this indicator."""
        module, function = self.where.split(":")
        return getattr(importlib.import_module(module), function)


def _entry(name: str, version: str, columns: tuple[str, ...], paper: str, **more) -> Indicator:
    where = more.pop("where", f"{name}:compute_{name}")
    return Indicator(name, version, columns, f"{__name__}.{where}", paper, **more)


_LENGTH = _entry(
    "length", "tokens-1", ("len_in", "len_out"), "InstructMining v3, Table 1 (arXiv 2307.06290)",
    role="base", role_optional=True, version_without="regex-words-1",
    where="surface:compute_length",
)
_UNIEVAL_COLUMNS = ("naturalness", "coherence", "understandability")

INDICATORS: dict[str, Indicator] = {
    entry.name: entry
    for entry in (
        _LENGTH,
        _entry("mtld", "1", ("mtld",), "McCarthy & Jarvis 2010, doi 10.3758/BRM.42.2.381"),
        _entry("compression", "1", ("compression",), "Yin et al. 2024, arXiv 2407.06645",
               where="surface:compute_compression"),
        _entry("script", "1", ("script",), "Unicode UAX 24; Kreutzer et al., arXiv 2103.12028",
               where="surface:compute_script"),
        _entry("turns", "1", ("turns",), "Zhou et al. 2023 (LIMA), arXiv 2305.11206",
               where="surface:compute_turns"),
        _entry("ppl", f"1+{TEMPLATE_VERSION}", ("ppl",), "InstructMining v3, Table 1", role="ppl",
               where="perplexity:compute_perplexity"),
        _entry("reward", "1", ("reward",), "InstructMining v3, Table 1; Open-Assistant, "
               "arXiv 2304.07327", role="reward"),
        _entry("unieval", "1", _UNIEVAL_COLUMNS, "Zhong et al. 2022 (UniEval), arXiv 2210.07197",
               role="unieval"),
        _entry("knn", "2", ("knn_6",), "InstructMining v3, Table 1; Reimers & Gurevych 2019, "
               "arXiv 1908.10084", role="encoder", pool_relative=True,
               where="neighbours:compute_knn"),
        _entry("ifd", f"1+{TEMPLATE_VERSION}", ("ifd",), "Li et al. 2023, arXiv 2308.12032; "
               "Superfiltering, arXiv 2402.00530", role="ppl", default=False,
               where="perplexity:compute_ifd"),
        _entry("diversity", "2", ("diversity",), "Friedman & Dieng 2022 (Vendi score), "
               "arXiv 2210.02410", role="encoder", pool_relative=True, default=False,
               where="neighbours:compute_diversity"),
    )
}  # fmt: skip


class UnknownIndicator(ValueError):
    """A name that is neither an indicator nor one of the columns."""


def choose(names: list[str] | tuple[str, ...]) -> list[Indicator]:
    """Indicators by their own name or by the name of one of their columns, each once."""
    by_column = {column: entry for entry in INDICATORS.values() for column in entry.columns}
    known = {**by_column, **INDICATORS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownIndicator(
            f"unknown indicator {', '.join(map(repr, unknown))}; known: {', '.join(sorted(known))}"
        )
    return list({known[name].name: known[name] for name in names}.values())
