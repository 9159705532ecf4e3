"""A causal LM: the study's losses on responses, at any batch size, and greedy answers.

Logits are made at target positions only and in chunks: 8 x 2,048 tokens x 152k vocabulary would be
5 GB in bfloat16. So the decoder and the output projection are called apart. Some families change
the logits after it: Gemma caps them (`final_logit_softcapping`), Cohere multiplies (`logit_scale`),
Granite divides by `logits_scaling`, another multiplies by that name. So names are hints only: each
candidate is held against the model's own logits, and a model that fits none uses its own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..config import InstructMiningError, ModelRef
from ..data.tokenization import Encoded, Message, encode_many, end_ids
from .batching import Failed, map_batches, pad
from .cpu import quickest
from .loading import LoadedModel, open_model

_PROMPT_TOKENS = 1024  # of a prompt that is answered, at most
_ANSWER_TOKENS = 8192  # padded tokens of a batch, prompts and answers; halved when memory runs out
FIRST = 64  # target tokens of the `nll_first64` column
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 28}  # logits made at once, tokens x vocabulary
_LEAST = 128  # tokens whose logits are made at once at least: fewer mostly read the output matrix
COLUMNS = (
    "nll", "tokens", "nll_first64", "tokens_first64", "nll_eos", "tokens_eos",
    "nll_first", "tokens_first", "reason",
)  # fmt: skip
NOT_FINITE = "the model's loss is not finite on this row"


@dataclass(frozen=True)
class Head:
    """Hidden states to logits.

    way : "direct" (projection as it is), "softcap", "scale", "divide" (with the projection), or
        "forward" (the model's own forward with `logits_to_keep`, slower, always right).
    """

    way: str
    project: Callable[[Tensor], Tensor] | None  # (n, dim) -> (n, vocabulary), model's dtype


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face causal LM inside a PeftModel (adapters stay injected), or `model`."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal LM that ends in hidden states, last norm included."""
    return unwrapped(model).base_model


def find_head(model: nn.Module) -> Head:
    """How `model`'s logits come from its decoder's hidden states; see the module's text.

    Tries on 8 made-up tokens, in evaluation mode. Raises InstructMiningError where the model's own
    logits there are not finite: nothing could be compared.
    """
    inner = unwrapped(model)
    training, device = inner.training, next(inner.parameters()).device
    inner.eval()
    try:
        with torch.no_grad():
            vocabulary = inner.get_input_embeddings().weight.shape[0]
            ids = (torch.arange(8, device=device)[None] * 7 + 3) % vocabulary
            own = inner(input_ids=ids, use_cache=False).logits[0]
            if not torch.isfinite(own).all():
                raise InstructMiningError(
                    "The model's logits are not finite on a plain input; its weights are broken, "
                    "or its dtype overflows (try float32).")
            linear = inner.get_output_embeddings()
            if linear is not None and inner.base_model is not inner:
                hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
                for way, project in _candidates(inner, linear):
                    if hidden.shape[-1] == linear.weight.shape[-1] and _same(project(hidden), own):
                        return Head(way, project)
            return Head("forward", None)
    finally:
        inner.train(training)


def _same(ours: Tensor, own: Tensor) -> bool:
    # bfloat16 keeps 8 bits: two orders of the same scaling may differ in the last one.
    tolerance = 1e-5 if own.dtype == torch.float32 else 2e-2
    return torch.allclose(ours.float(), own.float(), rtol=tolerance, atol=tolerance)


def _candidates(inner, linear) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    text = inner.config.get_text_config()

    def plain(hidden: Tensor) -> Tensor:
        return linear(hidden.to(linear.weight.dtype))  # some decoders end in float32

    yield "direct", plain
    cap = getattr(text, "final_logit_softcapping", None)
    if cap:
        yield "softcap", lambda h: torch.tanh(plain(h) / cap) * cap
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        scale = getattr(text, name, None)
        if isinstance(scale, (int, float)) and scale:
            yield "scale", lambda h, s=scale: plain(h) * s
            yield "divide", lambda h, s=scale: plain(h) / s


@dataclass
class LM(LoadedModel):
    """A causal LM with all that a loss needs.

    model : Hugging Face causal LM, or a PeftModel around one.
    template : in which rows are scored and prompts answered, as in `tokenization.encode_many`.
    trunk : `trunk.Trunk` in use: rows whose states it keeps are computed above its cut alone.
    packed : `packing.PackedModel` in use: losses are computed on packed rows.
    pooled : `pooled.Pooled` in use: heads read this model too, and what their pass finds of an
        answer's likelihood is not computed again.
    """

    # On a CPU small ones, whose activations stay in its caches: twice as fast as 16,384.
    batch_tokens: ClassVar[dict[str, int]] = {"cpu": 2048, "cuda": 65536}

    template: str = "auto"
    trunk: Any = field(default=None, repr=False)
    packed: Any = field(default=None, repr=False)
    pooled: Any = field(default=None, repr=False)
    _found: tuple[nn.Module, Head] | None = field(default=None, repr=False)

    @property
    def head(self) -> Head:
        """How logits come from hidden states; found once for each model object."""
        if self._found is None or self._found[0] is not self.model:
            self._found = (self.model, find_head(self.model))
        return self._found[1]

    @property
    def config(self):
        """The decoder's configuration."""
        return unwrapped(self.model).config.get_text_config()

    def logit_rows(self) -> float:
        """Tokens whose logits are made at once."""
        if self.head.way == "forward":
            return float("inf")
        chunk = _CHUNK[torch.device(self.device).type]
        return max(_LEAST, chunk // int(self.config.vocab_size))

    def max_positions(self) -> float:
        """Tokens that a row may have; infinite where the configuration names no limit."""
        return getattr(self.config, "max_position_embeddings", None) or float("inf")

    def in_batches(
        self, fn: Callable, lengths: Sequence[int], desc: str, on_batch: Callable, *,
        tokens: int | None = None, progress: bool = False,
    ) -> None:  # fmt: skip
        """`map_batches` with the model in evaluation mode, at `tokens` or what memory holds."""
        self.model.eval()
        with quickest(unwrapped(self.model), self.device):
            map_batches(fn, lengths, self.first_batch(tokens, self.config), progress, desc,
                        on_batch=on_batch, on_halved=self.halved)  # fmt: skip


def load_lm(
    ref: ModelRef, device: str | None = None, *, standins=None, template: str = "auto"
) -> LM:
    """Load tokenizer and weights of a causal LM; arguments and errors as in `open_model`."""
    opened = open_model(ref, AutoModelForCausalLM, device=device, standins=standins)
    return LM(**vars(opened), template=template)


def response_nll(
    lm: LM, rows: Sequence[Encoded], *, batch_tokens: int | None = None, progress: bool = False,
    padding_side: str = "right",
) -> pd.DataFrame:  # fmt: skip
    """Negative log-likelihood of each row's target tokens.

    rows : token ids with target marks; `tokenization.encode` makes them.
    batch_tokens : padded tokens of a batch, halved when memory runs out; None takes
        `LM.batch_tokens`, or fewer where the free memory holds fewer.
    padding_side : "right"; "left" is there to show that it does not matter.

    Returns one row for each of `rows`, in their order:
        nll : float64, sum over target tokens, nats; NaN with a `reason` where it cannot be had.
        tokens : number of target tokens.
        nll_first64, tokens_first64 : the same over the first 64 target tokens.
        nll_eos, tokens_eos : the same over the token that ends a response; NaN and 0 if it was cut.
        nll_first, tokens_first : the same over the first token of each response's text; NaN and 0
            where no response has any. What is left without first and end is the body.
        reason : "" or why `nll` is NaN.

    In float32 a row's values agree at any batch size, order and padding side to 1e-5 relative.
    The log-softmax is float32 also where the weights are not. The first token of a row has no
    prediction, so it must not be a target.
    """
    limit, ends = lm.max_positions(), end_ids(lm.tokenizer)
    found = [_nan(_unusable(row, limit)) for row in rows]
    chosen = np.flatnonzero([not reason for *_, reason in found])

    def batch(numbers: np.ndarray) -> list[tuple]:
        part = [rows[i] for i in chosen[numbers]]
        nll = _padded_nll(lm, part, padding_side) if lm.packed is None else lm.packed.nll(part)
        cuts = np.cumsum([sum(row.targets[1:]) for row in part])[:-1]
        each = np.split(nll.double().cpu().numpy(), cuts)
        return [_summary(row, one, ends) for row, one in zip(part, each, strict=True)]

    def keep(numbers: np.ndarray, results: Sequence) -> None:
        for row, result in zip(chosen[numbers], results, strict=True):
            found[row] = _nan(result.reason) if isinstance(result, Failed) else result

    if len(chosen):
        lm.in_batches(batch, [len(rows[i]) for i in chosen], f"loss of {len(rows)} rows", keep,
                      tokens=batch_tokens, progress=progress)  # fmt: skip
    return pd.DataFrame(found, columns=list(COLUMNS))


def _unusable(row: Encoded, limit: float) -> str:
    """Why a row cannot have a loss, or ""."""
    if len(row.ids) > limit:
        return f"{len(row.ids)} tokens are more than the model's {limit} positions"
    if any(row.targets[1:]):
        return ""
    return "no response token within max_tokens" if row.truncated else "no response token"


def _nan(reason: str) -> tuple:
    return (np.nan, 0) * 4 + (reason,)


def _padded_nll(lm: LM, rows: Sequence[Encoded], side: str) -> Tensor:
    ids, mask = pad([row.ids for row in rows], lm.pad_id, side)
    wanted, _ = pad([row.targets for row in rows], 0, side)
    wanted[:, 0] = 0
    with nullcontext() if lm.trunk is None else lm.trunk.of_rows(rows, side):
        return token_nll(lm, ids, mask, wanted.astype(bool))


def _summary(row: Encoded, nll: np.ndarray, ends: frozenset[int]) -> tuple:
    """One row of `response_nll`; nll : of its targets, in their order."""
    targets = (False, *row.targets[1:], False)
    places = [i for i, target in enumerate(targets) if target]
    at_end = np.array([row.ids[i] in ends and not targets[i + 1] for i in places], dtype=bool)
    at_start = np.array([not targets[i - 1] for i in places], dtype=bool) & ~at_end
    reason = "" if np.isfinite(nll).all() else NOT_FINITE
    total = nll.sum() if not reason else np.nan
    first = nll[:FIRST]
    return (
        total, len(nll), first.sum(), len(first), *_part(nll, at_end), *_part(nll, at_start), reason
    )


def _part(nll: np.ndarray, chosen: np.ndarray) -> tuple[float, int]:
    return (nll[chosen].sum() if chosen.any() else np.nan), int(chosen.sum())


@torch.inference_mode()
def token_nll(lm: LM, ids: np.ndarray, mask: np.ndarray, wanted: np.ndarray) -> Tensor:
    """Negative log-likelihood of each wanted token, row by row.

    ids, mask, wanted : shape (rows, width); token ids, 1 at real tokens, True at target tokens
        (never in the first column). Returns float32, shape (number of wanted tokens,), nats.
    """
    device = next(lm.model.parameters()).device
    inputs = {"input_ids": torch.from_numpy(ids).to(device), "use_cache": False}
    # With padding at the right no real token can see it: the causal mask alone is exact, and
    # without a padding mask attention takes its fast path.
    if not mask[:, 0].all():
        # At the left real tokens would see it, and their positions would be shifted.
        inputs["attention_mask"] = torch.from_numpy(mask).to(device)
        positions = (mask.cumsum(1) - 1).clip(min=0)
        inputs["position_ids"] = torch.from_numpy(positions).to(device)
    before = torch.from_numpy(np.roll(wanted, -1, axis=1)).to(device)
    goal = torch.from_numpy(ids[wanted]).to(device)
    if lm.head.way == "forward":
        return _forward_nll(lm, inputs, before, goal)
    hidden = decoder(lm.model)(**inputs).last_hidden_state[before]
    return target_nll(lm, hidden, goal)


def target_nll(lm: LM, hidden: Tensor, goal: Tensor) -> Tensor:
    """The same from hidden states below the projection, shape (targets, dim), and targets' ids."""
    step = int(lm.logit_rows())
    parts = [
        nn.functional.cross_entropy(lm.head.project(h).float(), g, reduction="none")
        for h, g in zip(hidden.split(step), goal.split(step), strict=True)
    ]
    return torch.cat(parts)


def _forward_nll(lm: LM, inputs: dict, before: Tensor, goal: Tensor) -> Tensor:
    """By the model's own forward, for heads that `find_head` cannot take apart."""
    inner = unwrapped(lm.model)
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        keep = before.any(0).nonzero()[:, 0]
        logits, before = inner(**inputs, logits_to_keep=keep).logits, before[:, keep]
    else:
        logits = inner(**inputs).logits
    return nn.functional.cross_entropy(logits[before].float(), goal, reduction="none")


def losses(frame: pd.DataFrame) -> dict[str, float]:
    """The study's losses: means of a frame of `response_nll`, in nats per token.

    body_prompt_mean, body_token_mean : over the body of the responses, which is all but each
        response's first token and the token that ends it: mean over rows of each row's mean, and
        total over total, where long responses weigh more. The study's two losses.
    first_token, end_of_text : mean over rows of what the body leaves out.
    prompt_mean, token_mean : both means over all target tokens.
    first64 : mean over rows, each on its first 64 target tokens.
    without_eos : mean over rows, the token that ends a response left out.
    effective_n : rows that the token mean rests on, (sum t)^2 / sum t^2 for t tokens a row.
    rows, missing : rows in the means, and rows without any target token, which are left out.

    A row whose loss is not finite or did not fit into memory makes every mean NaN: a mean over
    the other rows would be another quantity.
    """
    empty = frame["reason"].str.startswith("no response token").to_numpy()
    kept = frame[~empty]
    nll, tokens = _columns(kept, "")
    eos, eos_tokens = _columns(kept, "_eos")
    first, first_tokens = _columns(kept, "_first")
    text, text_tokens = nll - eos, tokens - eos_tokens
    body, body_tokens = text - first, text_tokens - first_tokens
    return {
        "prompt_mean": _mean(nll, tokens),
        "token_mean": _ratio(nll.sum(), tokens.sum()),
        "body_prompt_mean": _mean(body, body_tokens),
        "body_token_mean": _ratio(body.sum(), body_tokens.sum()),
        "first_token": _mean(first, first_tokens),
        "end_of_text": _mean(eos, eos_tokens),
        "first64": _mean(*_columns(kept, "_first64")),
        "without_eos": _mean(text, text_tokens),
        "effective_n": _ratio(tokens.sum() ** 2, (tokens**2).sum()),
        "rows": len(kept), "missing": int(empty.sum()),
    }  # fmt: skip


def evaluate(
    lm: LM, encoded: Sequence[Encoded], *, batch_tokens: int | None = None
) -> tuple[dict[str, float], pd.DataFrame]:
    """Losses of `lm` on an evaluation set (see `losses`), and the frame for each example."""
    frame = response_nll(lm, encoded, batch_tokens=batch_tokens)
    return losses(frame), frame


def _columns(frame: pd.DataFrame, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Nll and tokens of a part of the responses; 0 where a row lacks it, NaN where a row failed."""
    tokens, nll = (frame[f"{name}{part}"].to_numpy(float) for name in ("tokens", "nll"))
    return np.where(frame["nll"].isna(), np.nan, np.where(tokens > 0, nll, 0.0)), tokens


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count else float("nan")


def _mean(nll: np.ndarray, tokens: np.ndarray) -> float:
    """Mean over the rows that have the part, or that failed, of each row's mean."""
    rows = (tokens > 0) | np.isnan(nll)
    if not rows.any():
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.mean(nll[rows] / tokens[rows]))


def generate(
    lm: LM, prompts: Sequence[Sequence[Message]], max_new_tokens: int, *, progress: bool = False
) -> list[str]:
    """The model's greedy answer to each prompt, until the token that ends an answer.

    An answer does not depend on which prompts share its batch, up to ties that rounding breaks.

    prompts : messages without the answer, the last from the user; a long one loses whole messages
        from the left.
    max_new_tokens : tokens of an answer at most.

    Raises InstructMiningError for a prompt whose last message has more than 1,024 tokens, or more
    than the model's positions less the answer's, or that alone does not fit into memory.
    """
    limit = int(min(_PROMPT_TOKENS, lm.max_positions() - max_new_tokens))
    encoded = encode_many(lm.tokenizer, prompts, max_tokens=max(1, limit), template=lm.template)
    for number, row in enumerate(encoded):
        if row.truncated:
            text = f"Prompt {number}'s last message has more than {limit} tokens."
            raise InstructMiningError(text)
    answers = map_batches(
        lambda rows: _answers(lm, [encoded[i].ids for i in rows], max_new_tokens),
        [len(row) + max_new_tokens for row in encoded], _ANSWER_TOKENS, progress,
        f"answers to {len(prompts)} prompts",
    )  # fmt: skip
    for number, answer in enumerate(answers):
        if isinstance(answer, Failed):
            raise InstructMiningError(f"Prompt {number}: {answer.reason}")
    return answers


@torch.inference_mode()
def _answers(lm: LM, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    lm.model.eval()
    device, ends = next(lm.model.parameters()).device, end_ids(lm.tokenizer)
    ids, mask = pad(rows, lm.pad_id, "left")  # at the left, so that all answers start together
    out = unwrapped(lm.model).generate(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), pad_token_id=lm.pad_id,
        do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    new = [list(takewhile(lambda token: token not in ends, row))
           for row in out[:, ids.shape[1] :].tolist()]
    return lm.tokenizer.batch_decode(new, skip_special_tokens=True)
