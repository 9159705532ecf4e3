"""Indicators: examples in, one column of numbers (or a few) out.

`INDICATORS` lists them with all that a caller needs to know, so that nothing heavy is imported
before it is used. To add one, write a module with one function and add one entry:

    # mine/questions.py
    \"\"\"Question marks in the response. (Name the paper here.)\"\"\"
    from instructmining_core.indicators.turns import each_turn, mean_over_turns

    def compute_questions(conversations, model=None):
        values = [turn.response.count("?") for turn in each_turn(conversations)]
        return {"questions": mean_over_turns(conversations, values)}

    INDICATORS["questions"] = Indicator(
        "questions", "1", ("questions",), where="mine.questions:compute_questions",
        paper="your paper")

It gets checked conversations (`turns.read`) and returns a `turns.Column` for each name in
`columns`: float64 values, NaN where there is none, with a reason. Raise `version` whenever values
change: it is part of the score cache's key. With `role` it also gets the opened model of that role;
with `pool_relative` also `reference=` (a `neighbours.Reference`) and `row_hashes=`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from ..config import InstructMiningError

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
    shared : True if its function computes several indicators in one pass; it is told which by the
        keyword `columns`
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
    shared: bool = False

    def load(self) -> Callable:
        """Import the function that computes this indicator."""
        module, name = self.where.split(":")
        function = getattr(importlib.import_module(module), name)
        return partial(function, columns=self.columns) if self.shared else function


def _entry(name: str, version: str, columns: tuple[str, ...], paper: str, **more) -> Indicator:
    where = more.pop("where", f"{name}:compute_{name}")
    return Indicator(name, version, columns, f"{__name__}.{where}", paper, **more)


INDICATORS: dict[str, Indicator] = {
    entry.name: entry
    for entry in (
        _entry("length", "tokens-1", ("len_in", "len_out"), "InstructMining v3, Table 1 "
               "(arXiv 2307.06290)", role="base", role_optional=True,
               version_without="regex-words-1", where="surface:compute_length"),
        _entry("mtld", "1", ("mtld",), "McCarthy & Jarvis 2010, doi 10.3758/BRM.42.2.381",
               where="surface:compute_mtld"),
        _entry("compression", "1", ("compression",), "Yin et al. 2024, arXiv 2407.06645",
               where="surface:compute_compression"),
        _entry("script", "1", ("script",), "Unicode UAX 24; Kreutzer et al., arXiv 2103.12028",
               where="surface:compute_script"),
        _entry("turns", "1", ("turns",), "Zhou et al. 2023 (LIMA), arXiv 2305.11206",
               where="surface:compute_turns"),
        _entry("ppl", "3", ("ppl", "log_ppl"), "InstructMining v3, Table 1", role="ppl",
               where="perplexity:compute_perplexity", shared=True),
        _entry("reward", "1", ("reward",), "InstructMining v3, Table 1; Open-Assistant, "
               "arXiv 2304.07327", role="reward"),
        _entry("unieval", "1", ("naturalness", "coherence", "understandability"),
               "Zhong et al. 2022 (UniEval), arXiv 2210.07197", role="unieval"),
        _entry("knn", "2", ("knn_6",), "InstructMining v3, Table 1; Reimers & Gurevych 2019, "
               "arXiv 1908.10084", role="encoder", pool_relative=True,
               where="neighbours:compute_neighbours", shared=True),
        _entry("ifd", "2", ("ifd",), "Li et al. 2023, arXiv 2308.12032; "
               "Superfiltering, arXiv 2402.00530", role="ppl", default=False,
               where="perplexity:compute_perplexity", shared=True),
        _entry("diversity", "2", ("diversity",), "Friedman & Dieng 2022 (Vendi score), "
               "arXiv 2210.02410", role="encoder", pool_relative=True, default=False,
               where="neighbours:compute_neighbours", shared=True),
    )
}  # fmt: skip


def chosen_indicators(
    names: Sequence[str] | None, roles: Collection[str]
) -> list[Indicator]:
    """Indicators by their own name or by the name of one of their columns, each once.

    names : None for all that need no model and those of the paper whose model is there
    roles : that have a model; an indicator without its model is an error
    """
    if names is None:
        return [
            i for i in INDICATORS.values()
            if i.default and (i.role is None or i.role_optional or i.role in roles)
        ]  # fmt: skip
    by_column = {column: entry for entry in INDICATORS.values() for column in entry.columns}
    known = {**by_column, **INDICATORS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InstructMiningError(
            f"unknown indicator {', '.join(map(repr, unknown))}; known: {', '.join(sorted(known))}"
        )
    chosen = list({known[name].name: known[name] for name in names}.values())
    for indicator in chosen:
        if indicator.role and not indicator.role_optional and indicator.role not in roles:
            raise InstructMiningError(
                f"{indicator.name} needs a model for the role {indicator.role!r}: give one in "
                "`models` (on the command line: --profile or --models)"
            )
    return chosen
