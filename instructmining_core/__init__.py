"""InstructMining: fit a rule that predicts finetuning loss from cheap indicators; select with it.

The thin core, in six rooms: `data`, `models`, `indicators`, `finetuning`, `regression` and
`selection`. The names below are what a script of one's own needs most; each is fetched from its
room when it is first asked for, so that importing the core loads no torch and no pandas.

>>> from instructmining_core import load_rule, read_records, score, select
"""

from importlib import import_module

__version__ = "0.1.0"

_ROOMS = {
    "config": ("FinetuneConfig", "ModelRef"),
    "data.records": ("read_records", "row_hash"),
    "indicators": ("INDICATORS",),
    "indicators.scorer": ("Scorer", "score"),
    "indicators.score_table": ("read_scores",),
    "finetuning.finetune": ("finetune",),
    "models.causal_lm": ("evaluate",),
    "finetuning.sweep": ("run_sweep",),
    "finetuning.ledger": ("Ledger",),
    "regression.rule": ("fit_rule",),
    "regression.rule_card": ("RuleCard", "load_rule"),
    "selection.select": ("select",),
}
_WHERE = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
