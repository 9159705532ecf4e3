"""One study, wired: a profile with its data, models, scores, sets and runs, where the rooms meet.

Results lie in `results/<profile>/`; a notebook opened without them reads the committed evidence of
the same profile, or of any published one, and a warning says so.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from instructmining_core import files
from instructmining_core.config import FinetuneConfig, InstructMiningError, ModelRef
from instructmining_core.data.choices import Question
from instructmining_core.finetuning.ledger import (
    RELEVANCE,
    ContinuedLedger,
    Ledger,
    RunArchive,
    tidy,
)
from instructmining_core.finetuning.run_spec import EvalSets, RunSpec
from instructmining_core.finetuning.sets import (
    TrainingSet,
    anchors,
    equal_token_sets,
    fusion_sets,
    set_means,
)
from instructmining_core.regression.run_table import run_table

from .design import chosen, of_sources
from .profile import Profile, load_profile
from .study_data import StudyData, questions_of, read_study_data, under_other_prompts

USUAL = ("eval_1", "eval_2", RELEVANCE)  # evaluation sets of a run


class MissingInput(InstructMiningError):
    """A stage was opened before the one that makes its input, and no evidence is committed."""


@dataclass(frozen=True)
class PlannedRun:
    """One finetune to be done: which rows, which seeds, and what to call it."""

    row_hashes: tuple[str, ...]
    label: dict = field(default_factory=dict)  # goes to the ledger beside the run, not hashed
    init_seed: int = 0
    order_seed: int = 0
    by_epoch: bool = False  # also evaluate after each epoch; names no other run
    config: FinetuneConfig | None = None  # in place of the study's
    exams: tuple[str, ...] = USUAL  # evaluation sets


class Study:
    """A profile with its data, models, scores, sets and runs, each made once and kept."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.name = profile.name
        self.folder = files.results(profile.name)
        self._noted: set[str] = set()
        self._asked: dict[str, dict[str, None]] = {}
        self._evals: dict[tuple, EvalSets] = {}

    @classmethod
    def open(cls, name_or_yaml: str | Path) -> Study:
        """The study of a preset or of a profile file."""
        return cls(load_profile(name_or_yaml))

    # Files

    def find(self, name: str) -> Path:
        """The file `name` of this study: from its results, else from the committed evidence.

        Raises MissingInput naming the command that makes it.
        """
        here = self.folder / name
        if here.exists():
            return here
        published = [files.evidence(self.name)]
        published += sorted((files.root() / "evidence").glob("*"))
        for folder in published:
            if (folder / name).exists():
                self._note(f"{name} is read from the committed evidence of `{folder.name}`.")
                return folder / name
        raise MissingInput(
            f"{here} is not there and no evidence holds it; run "
            f"`make study PROFILE={self.name}`, or the notebooks before this one."
        )

    def _note(self, note: str) -> None:
        if note not in self._noted:
            self._noted.add(note)
            warnings.warn(note, stacklevel=4)

    def has_own(self, name: str) -> bool:
        """True where `find` gives this profile's own file, not another profile's evidence."""
        return (self.folder / name).exists() or (files.evidence(self.name) / name).exists()

    def frame(self, name: str) -> pd.DataFrame:
        """A saved frame by file name (`.parquet` or `.csv`)."""
        path = self.find(name)
        return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)

    def save(self, frame: pd.DataFrame, name: str) -> None:
        """Write a frame whole or not at all."""
        with files.being_written(self.folder / name) as part:
            if name.endswith(".csv"):
                frame.to_csv(part, index=False)
            else:
                frame.to_parquet(part, index=False)

    def record_claim(self, claim: str, *, ours: str, detectable: str, verdict: str) -> None:
        """Record what this run says of one of the paper's claims (`paper.claims`)."""
        record = {"claim": claim, "ours": ours, "detectable": detectable, "verdict": verdict}
        files.write_atomic(self.folder / "claims" / f"{claim}.json", json.dumps(record, indent=2))

    def list_runs(self, purpose: str, run_ids: list[str]) -> None:
        """Which runs a purpose asked for, in all calls of this object."""
        asked = self._asked.setdefault(purpose, {})
        asked |= dict.fromkeys(run_ids)
        files.write_atomic(self.folder / "runs" / f"{purpose}.json", json.dumps(list(asked)))

    # Data, models, scores

    @cached_property
    def data(self) -> StudyData:
        """Candidates, pools and the two evaluation sets."""
        if self.profile.data.kind == "embedded":
            from .embedded.defects import study_data

            return study_data(self.profile.data)
        return read_study_data(self.profile.data, files.root())

    def standins(self, *refs: ModelRef) -> Path | None:
        """The folder that holds the stand-ins among `refs`, None where there are none."""
        from .embedded.standins import build_standins

        return build_standins(refs)

    def load(self, ref: ModelRef):
        """A base model, opened by the same code whether it is real or a stand-in."""
        from instructmining_core.models.causal_lm import load_lm

        return load_lm(
            ref, standins=self.standins(ref), template=self.profile.finetune.template
        )

    @cached_property
    def lm(self):
        """The base model that is finetuned, loaded once."""
        return self.load(self.profile.models.base)

    @property
    def bank(self) -> Path:
        """Where scores are kept between runs, for all profiles."""
        return files.cache() / "bank"

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Every candidate and pool row with its indicators (notebook 03)."""
        from instructmining_core.indicators.score_table import read_scores

        return read_scores(self.find("scores.parquet"))

    @property
    def candidate_scores(self) -> pd.DataFrame:
        """The scores of the rows that the sets are drawn from."""
        return self.pool_scores("candidates")

    def pool_scores(self, pool: str) -> pd.DataFrame:
        """The scores of one pool's rows, or of the "candidates"."""
        roles = self.frame("roles.parquet")
        wanted = roles.loc[roles["role"] == pool, "id"]
        by_id = self.scores.drop_duplicates("id").set_index("id", drop=False)
        part = by_id.loc[wanted].reset_index(drop=True)
        part.attrs = self.scores.attrs
        return part

    def scorer(self):
        """The indicators with this study's models opened; knn_6 is measured against a fixed,
        seeded sample of the candidates. What is in the bank is not computed again.
        """
        from instructmining_core.indicators.scorer import Scorer

        from .ray_engine import RayScorer, engine

        profile, roles = self.profile, self.profile.models.roles()
        baselines = ["compression", *({"ifd"} & set(profile.selection.rivals))]  # of the gate
        scorer = Scorer(
            roles, indicators=(*profile.indicators, *baselines), bank=self.bank,
            standins=self.standins(*roles.values()), reward_form=profile.models.reward_form,
            template=profile.finetune.template,
            keep_layers=profile.finetune.layers if roles["base"] == roles["ppl"] else 0,
        )  # fmt: skip
        rows = self.data.candidates
        size = min(profile.models.reference_rows, len(rows))
        scorer.make_reference(rows, size=size, seed=profile.data.seed)
        return RayScorer(scorer) if engine() == "ray" else scorer

    # Sets and runs

    def draw_sets(self) -> list[TrainingSet]:
        """Draw the design: fusion, designed and equal-token sets, the anchors' further seeds.

        Equal-token sets have as many response tokens as an average set of the design's size.
        """
        plan, scores = self.profile.design, self.candidate_scores
        columns = self.profile.rule_columns()
        designed = chosen(scores, plan, columns, plan.candidates)
        fused = of_sources(scores, plan.fusion_sources)
        sets = fusion_sets(fused, plan.fusion, plan.size, plan.seed) + designed
        if plan.tokens:
            tokens = round(plan.size * float(scores["len_out"].mean()))
            sets += equal_token_sets(scores, plan.tokens, tokens, plan.strength, plan.seed,
                                     columns=columns)  # fmt: skip
        return sets + anchors(designed, plan.anchors, tuple(range(1, plan.anchor_seeds + 1)))

    @cached_property
    def sets(self) -> list[TrainingSet]:
        """The designed training sets (notebook 04)."""
        frame = self.frame("sets.parquet")
        return [TrainingSet.from_dict(json.loads(text)) for text in frame["set"]]

    @cached_property
    def ledger(self) -> ContinuedLedger:
        """This study's run records: its own, and those that its evidence holds."""
        evidence = files.evidence(self.name) / "ledger"
        return ContinuedLedger(self.folder / "ledger", RunArchive(evidence))

    def ledger_of(self, found: Path) -> Ledger | RunArchive:
        """The records beside what `find` found: a pilot's runs alone are not another list's."""
        evidence = files.root() / "evidence"
        if not found.is_relative_to(evidence):
            return self.ledger
        return RunArchive(evidence / found.relative_to(evidence).parts[0] / "ledger")

    def run(
        self,
        purpose: str,
        plans: Sequence[PlannedRun],
        *,
        config: FinetuneConfig | None = None,
        base: ModelRef | None = None,
        tables: Sequence[pd.DataFrame] = (),
        listed: str = "",
        progress: bool = True,
    ) -> pd.DataFrame:
        """Finetune and evaluate every plan that the ledger does not hold; one row a plan.

        config, base : in place of the profile's; tables : further rows that the plans may name;
        listed : name of the list of runs, where it is not the purpose (which run ids depend on)
        """
        from instructmining_core.finetuning.sweep import run_sweep

        from .ray_engine import RaySweep, engine

        lm = self.lm if base is None else self.load(base)
        config = config or self.profile.finetune
        specs = self.specs(purpose, plans, lm, config)
        hashes = {h for plan in plans for h in plan.row_hashes}
        rows = self.encoded_rows(lm, config, hashes, tables)
        self.list_runs(listed or purpose, [spec.run_id for spec in specs])
        if kept := self.ledger.kept(spec.run_id for spec in specs):
            self._note(f"{kept} runs of {purpose!r} are those of the committed evidence.")
        by_epoch = [s.run_id for s, plan in zip(specs, plans, strict=True) if plan.by_epoch]
        frames = []
        for exams in dict.fromkeys(plan.exams for plan in plans):
            own = [i for i, plan in enumerate(plans) if plan.exams == exams]
            frame = run_sweep([specs[i] for i in own], lm, rows,
                              self.encoded_evals(lm, config, exams), self.ledger,
                              by_epoch=by_epoch, progress=progress,
                              cluster=RaySweep() if engine() == "ray" else None)  # fmt: skip
            frames.append(frame.set_axis(own))
        return pd.concat(frames).sort_index() if frames else tidy([])

    def specs(
        self, purpose: str, plans: Sequence[PlannedRun], lm, config: FinetuneConfig
    ) -> list[RunSpec]:
        """The plans' specifications: what their runs are called.

        A plan's own settings may differ from `config` in what no encoding hangs on.
        """
        return [
            RunSpec.of(purpose, lm, plan.config or config, plan.row_hashes,
                       self.encoded_evals(lm, config, plan.exams), init_seed=plan.init_seed,
                       order_seed=plan.order_seed, label=plan.label)
            for plan in plans
        ]  # fmt: skip

    @contextmanager
    def tuned(self, plan: PlannedRun) -> Iterator:
        """One finetune, kept open for answering; the base is given back at the end."""
        from instructmining_core.finetuning.finetune import finetune

        config = self.profile.finetune
        rows = self.encoded_rows(self.lm, config, set(plan.row_hashes))
        tuned = finetune(self.lm, [rows[h] for h in plan.row_hashes], config,
                         init_seed=plan.init_seed, order_seed=plan.order_seed)  # fmt: skip
        try:
            yield tuned
        finally:
            tuned.close()

    def encoded_rows(
        self, lm, config: FinetuneConfig, hashes: set[str], tables: Sequence[pd.DataFrame] = ()
    ) -> dict:
        """Training rows, tokenised once, by row hash."""
        from instructmining_core.data.tokenization import encode_many

        tables = [self.data.candidates, *self.data.pools.values(), *tables]
        rows = pd.concat([table[["row_hash", "messages"]] for table in tables])
        rows = rows[rows["row_hash"].isin(hashes)].drop_duplicates("row_hash")
        encoded = encode_many(lm.tokenizer, rows["messages"].tolist(),
                              max_tokens=config.max_tokens, template=config.template)  # fmt: skip
        return dict(zip(rows["row_hash"], encoded, strict=True))

    @cached_property
    def choices(self) -> dict[str, list[Question]]:
        """The questions of the profile's multiple-choice tasks, by the task's name."""
        trained = self.data.everything["messages"].tolist()
        return {one.name: questions_of(one, self.profile.data, files.root(), trained)
                for one in self.profile.data.choices}  # fmt: skip

    def encoded_evals(
        self, lm, config: FinetuneConfig, exams: tuple[str, ...] = USUAL
    ) -> EvalSets:
        """The evaluation sets, tokenised once for each tokeniser, length and template: those of
        `StudyData.exams`, and of RELEVANCE eval_1's answers under other prompts."""
        from instructmining_core.data.choices import encode_choices
        from instructmining_core.data.tokenization import encode_many

        longest = self.profile.data.eval_tokens or config.max_tokens
        key = (lm.resolved.id, lm.resolved.revision, longest, config.template, exams)
        if key not in self._evals:
            tables = {name: exam["messages"].tolist() for name, exam in self.data.exams.items()}
            tables[RELEVANCE] = under_other_prompts(tables["eval_1"])
            self._evals[key] = EvalSets({
                name: encode_many(lm.tokenizer, tables[name], max_tokens=longest,
                                  template=config.template)
                for name in exams
            }, choices={name: encode_choices(lm.tokenizer, questions)
                        for name, questions in self.choices.items()})  # fmt: skip
        return self._evals[key]

    def runs(self, purpose: str) -> pd.DataFrame:
        """Finished runs that a purpose asked for, from the ledger (or the committed evidence)."""
        listed = self.find(f"runs/{purpose}.json")
        wanted = json.loads(listed.read_text(encoding="utf-8"))
        frame = self.ledger_of(listed).load()
        return frame[frame["run_id"].isin(wanted) & (frame["status"] == "done")]

    def base_of_sweep(self) -> dict[str, str]:
        """Id, revision and dtype of the base that the sweep finetuned, from its first record."""
        listed = self.find("runs/sweep.json")
        first = json.loads(listed.read_text(encoding="utf-8"))[0]
        return self.ledger_of(listed).read(first)["spec"]["base"]

    def sweep(self) -> pd.DataFrame:
        """The sweep's runs, `joined`."""
        return self.joined(self.runs("sweep"))

    def joined(self, runs: pd.DataFrame, scores: pd.DataFrame | None = None) -> pd.DataFrame:
        """Runs of designed sets with the sets' means, shares and three log losses."""
        scores = self.scores if scores is None else scores
        means = set_means(self.sets, scores, list(self.profile.indicators))
        frame = run_table(runs, means, "loss_eval_1")
        frame["log_loss_token"] = np.log(frame["loss_eval_1_token"])
        frame["log_loss_eval_2"] = np.log(frame["loss_eval_2"])
        return frame.sort_values(["set_id", "init_seed"]).reset_index(drop=True)

    def set_frame(self) -> pd.DataFrame:
        """One row a set, before any run: `set_id`, `arm`, `share_<source>` and indicator means."""
        planned = [{"set_id": s.set_id, "arm": s.arm, "source": s.source, "shares": dict(s.shares),
                    "loss": 1.0} for s in self.sets if not s.anchor]  # fmt: skip
        means = set_means(self.sets, self.scores, list(self.profile.indicators))
        return run_table(pd.DataFrame(planned), means, "loss").drop(columns=["loss", "log_loss"])
