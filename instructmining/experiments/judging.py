"""Which judge a profile names, how good it is, and what it says of selected and random models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import pandas as pd

from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.duplicates import without_copies_of
from instructmining_core.data.fields import Messages
from instructmining_core.data.records import row_hash, with_row_hash
from instructmining_core.files import root, write_json
from instructmining_core.regression.rule_card import RuleCard
from instructmining_core.selection import judge
from instructmining_core.selection.served_model import ServedModel

from ..study import PlannedRun, Study
from ..study_data import read_pairs, read_source, short_prompts
from .comparisons import draw_prompts, repeated, size_pool

SIDES, PAIR = ("selected", "random"), ("prompt", "chosen", "rejected")  # columns
PLANTED = "planted defects"  # the check of the embedded corpus: a clean row against its twin
_COMPARED = 4096  # tokens of a comparison that a likelihood judge reads at most
_PROMPT_WORDS = 500  # of a prompt that is answered, which may have 1,024 tokens


def open_judge(study: Study) -> tuple[str, judge.Judge]:
    """The profile's judge with its name: kind, model and, where it is asked in words, version."""
    config, models = study.profile.judge, study.profile.models
    if config.kind == "api":
        options = {} if config.temperature is None else {"temperature": config.temperature}
        served = ServedModel(
            config.base_url, config.model.id, study.folder / "replies", budget=config.budget,
            workers=config.workers, timeout=config.timeout, options=options,
        )  # fmt: skip
        return f"{served.model}, {judge.VERSION}", judge.api_judge(served)
    if config.kind == "likelihood":
        ref = config.model or models.base
        return f"likelihood of {ref.id}, {judge.VERSION}", _by_likelihood(study, ref)
    ref = config.model or models.reward
    return f"reward of {ref.id}", _by_reward(study, ref)


def _by_reward(study: Study, ref: ModelRef) -> judge.Judge:
    from instructmining_core.indicators.scorer import score

    def rewards(talks: list[Messages]) -> Sequence[float]:
        table = with_row_hash(pd.DataFrame({
            "id": [str(i) for i in range(len(talks))], "source": "answers", "messages": talks,
            "file": "", "row": range(len(talks)),
        }))  # fmt: skip
        return score(table, {"reward": ref}, indicators=("reward",), bank=study.bank,
                     standins=study.standins(ref), progress=True)["reward"]  # fmt: skip

    return judge.reward_judge(rewards)


def _by_likelihood(study: Study, ref: ModelRef) -> judge.Judge:
    from instructmining_core.data.tokenization import encode_many
    from instructmining_core.models.causal_lm import response_nll

    lm = study.lm if ref == study.profile.models.base else study.load(ref)
    most = int(min(_COMPARED, lm.max_positions()))

    def nll(talks: list[Messages]) -> Sequence[float]:
        rows = encode_many(lm.tokenizer, talks, max_tokens=most, template=lm.template)
        whole = [not (row.dropped or row.truncated) for row in rows]  # else no verdict
        return response_nll(lm, rows, progress=True)["nll_first"].where(whole)

    return judge.likelihood_judge(nll)


def judge_models(judged_by: judge.Judge, pairs: pd.DataFrame) -> pd.DataFrame:
    """The judge's preference for each pair of answers, in both orders.

    pairs : from `generate_pairs`; returns the frame of `judge.judge_pairs`, all pairs of models.
    """
    return pd.concat([
        judge.judge_pairs(*(part[name].tolist() for name in ("prompt", *SIDES)), judged_by,
                          pair=pair) for pair, part in pairs.groupby("pair")
    ], ignore_index=True)  # fmt: skip


def check_judge(study: Study, name: str, judged_by: judge.Judge) -> pd.DataFrame:
    """How good the judge is, one row a judge and check (`judge.judge_quality`), with the preference
    for length alone beside it."""
    rows = []
    for check, pairs in preference_sets(study).items():
        for who, one in ((name, judged_by), ("the longer answer", judge.longer_judge)):
            judged = judge.judge_pairs(*(pairs[name].tolist() for name in PAIR), one)
            rows.append({"judge": who, "check": check, **judge.judge_quality(judged)})
    return pd.DataFrame(rows)


def preference_sets(study: Study) -> dict[str, pd.DataFrame]:
    """The pairs that judges are checked on, by name; columns prompt (messages), chosen, rejected.

    Those that the profile names, and of the embedded corpus its planted defects.
    """
    config, data = study.profile.judge, study.profile.data
    found = {one.name: read_pairs(one, data, root()) for one in config.checks}
    if data.kind == "embedded":
        found[PLANTED] = _planted(study)
    for name, pairs in found.items():
        if pairs.empty:
            raise InstructMiningError(f"the judge's check {name!r} has no pair of two answers")
    return {
        name: pairs.sample(min(config.check_pairs or len(pairs), len(pairs)),
                           random_state=data.seed).reset_index(drop=True)
        for name, pairs in found.items()
    }  # fmt: skip


def _planted(study: Study) -> pd.DataFrame:
    rows = study.data.everything
    clean = rows[rows["kind"] == ""].set_index("id")["messages"]
    twins = rows[rows["twin"].isin(clean.index)].drop_duplicates("row_hash")
    pairs = [(bad[:-1], clean[twin][-1]["content"], bad[-1]["content"])
             for twin, bad in zip(twins["twin"], twins["messages"], strict=True)]  # fmt: skip
    return pd.DataFrame(pairs, columns=PAIR)


def generate_pairs(study: Study, rule: RuleCard) -> pd.DataFrame:
    """Finetune pairs of models and let them answer the same prompts, greedily.

    The prompts are drawn from all sources of eval_2, or of the set `judge.asks`, by the profile's
    data seed (`draw_prompts`). A model's answers are kept, so that a run goes on where it ended.
    Returns columns pair (int), prompt_id, prompt (messages), selected, random (answers).
    """
    config = study.profile.judge
    prompts = draw_prompts(_asked(study), config.prompts, study.profile.data.seed)
    questions = [messages[:-1] for messages in prompts["messages"]]
    pool, size = size_pool(study), study.profile.selection.size
    frames = []
    for pair in range(config.model_pairs):
        answers = {side: _answers(study, repeated(study, rule, pool, side, size, 1, pair)[0],
                                  questions) for side in SIDES}  # fmt: skip
        told = {"pair": pair, "prompt_id": prompts["id"], "prompt": questions, **answers}
        frames.append(pd.DataFrame(told))
    return pd.concat(frames, ignore_index=True)


def _asked(study: Study) -> pd.DataFrame:
    source = study.profile.judge.asks
    if source is None:
        return study.data.eval_2
    data = study.profile.data
    short = short_prompts(read_source(source, data, root()), data.max_prompt_words or _PROMPT_WORDS)
    # as of the evaluation sets: none that shares a run of words with what a rule is fitted on
    return without_copies_of(short, pd.concat([study.data.everything, study.data.eval_1]))


def _answers(study: Study, plan: PlannedRun, questions: list[Messages]) -> list[str]:
    """One model's answers, from its file where they were given before."""
    from instructmining_core.models.causal_lm import generate

    lm, most = study.lm, study.profile.judge.max_new_tokens
    asked = {
        "base": [lm.resolved.id.rpartition("/")[2], lm.resolved.revision, str(lm.dtype)],
        "finetune": dataclasses.asdict(study.profile.finetune), "rows": plan.row_hashes,
        "seeds": [plan.init_seed, plan.order_seed], "most": most,
        "questions": [row_hash(messages) for messages in questions],
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    path = study.folder / "answers" / f"{name}.json"
    if not path.exists():
        with study.tuned(plan) as tuned:
            given = generate(tuned.lm, questions, max_new_tokens=most, progress=True)
        write_json(path, {"asked": asked, "answers": given})
    return json.loads(path.read_text(encoding="utf-8"))["answers"]
