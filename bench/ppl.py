"""Perplexity: `perplexity.compute_perplexity` as it ships, against the two ways done elsewhere.

Peers, both plain transformers with the same model object, dtype, template and token ids, and both
tokenising as they go, as ours does:
- `file order, 32`: batches of 32 in file order, right-padded batch by batch, one forward with full
  logits, float32 cross-entropy over all positions with the prompt (and the closing eos) ignored.
- `one row per call`: the same with one row (no padding, no mask), as most public scorers do.
All three run in turn in each repetition. They must agree: in float32 on some rows to 1e-4 relative,
where nothing but an error can part them, and on all rows in the dtype that is timed to 5 %, the
rounding of two orders of sums in bfloat16. Models are randomly initialised LLaMAs: the time does
not depend on the weights' values.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import data
from .models import build_lm, told
from .pairs import in_turn, largest_difference, limit_row, row

LIMIT_PADDING = 1.05  # padded tokens per real token
EXACT, ROUNDED = 1e-4, 0.05  # relative differences: float32, the dtype that is timed
REPEATS = 3  # fewer where one takes long (`pairs.ENOUGH`)
WAYS = {"ppl_vs_file_order": 32, "ppl_vs_row": 1}  # bench -> rows of a call


def ours(lm, conversations) -> np.ndarray:
    """Perplexity of each response."""
    from instructmining_core.indicators import perplexity

    return perplexity.compute_perplexity(conversations, lm)["ppl"].values


def theirs(lm, conversations, rows_a_call: int) -> np.ndarray:
    """The same numbers, by batches in file order with full logits; NaN without a response."""
    import torch

    from instructmining_core.indicators.perplexity import encode_turns
    from instructmining_core.indicators.turns import each_turn

    turns, found = list(each_turn(conversations)), []
    with torch.inference_mode():
        for start in range(0, len(turns), rows_a_call):
            encoded = encode_turns(turns[start : start + rows_a_call], lm)
            found += _full_logits(lm, encoded)
    return np.exp(np.array(found))


def _full_logits(lm, encoded) -> list[float]:
    import torch

    width = max(len(e.ids) for e in encoded)
    ids = torch.zeros(len(encoded), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, one in enumerate(encoded):
        n, row_ids = len(one.ids), torch.tensor(one.ids)
        ids[i, :n], mask[i, :n] = row_ids, 1
        wanted = torch.tensor(one.targets) & (row_ids != lm.tokenizer.eos_token_id)
        labels[i, :n] = torch.where(wanted, row_ids, -100)
    padded = {"attention_mask": mask} if len(encoded) > 1 else {}
    logits = lm.model(input_ids=ids, use_cache=False, **padded).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    ).view(len(encoded), -1)
    return (nll.sum(1) / (labels[:, 1:] != -100).sum(1)).tolist()


def compared(size: str, rows: int, repeats: int, exact_rows: int = 16) -> dict:
    """Seconds of the three ways, and the largest relative differences of their perplexities.

    Raises Disagreement where they differ by more than rounding.
    """
    from instructmining_core.indicators.turns import read

    found, origin = data.conversations(rows)
    talks = [read(messages) for messages in found]
    lm = build_lm(size, data.texts(found))
    plain, few = build_lm(size, data.texts(found), dtype="float32"), talks[:exact_rows]
    exact = max(_apart(ours(plain, few), theirs(plain, few, n), EXACT) for n in WAYS.values())
    sides: dict[str, Callable] = {"ours": lambda: ours(lm, talks)}
    for bench, rows_a_call in WAYS.items():
        sides[bench] = lambda n=rows_a_call: theirs(lm, talks, n)
    seconds, values, repeats = in_turn(sides, repeats)
    apart = {bench: _apart(values["ours"], values[bench], ROUNDED) for bench in WAYS}
    return {"lm": lm, "seconds": seconds, "apart": apart, "exact": exact, "rows": len(talks),
            "origin": origin, "repeats": repeats}


def _apart(one: np.ndarray, other: np.ndarray, limit: float) -> float:
    """The largest relative difference, by logarithms."""
    return largest_difference(np.log(one), np.log(other), limit, "logarithms of perplexities")


def both_ways(size: str, rows: int, repeats: int, ending: str = "") -> list[dict]:
    """The rows of `ppl_vs_file_order` and `ppl_vs_row` (with `ending`) of one model."""
    from instructmining_core.data.tokenization import PLAIN

    found = compared(size, rows, repeats)
    rate = {side: found["rows"] / seconds for side, seconds in found["seconds"].items()}
    made = []
    for bench, rows_a_call in WAYS.items():
        way = f"batches of {rows_a_call} in file order" if rows_a_call > 1 else "one row per call"
        made.append(row(
            bench + ending, f"transformers `model(...)`, {way}, full logits, tokenised as it goes",
            rate["ours"], rate[bench], "rows/s", on=size, dtype=_name(found["lm"].dtype),
            data=f"{found['rows']} contiguous rows of {found['origin']}",
            template=PLAIN,
            note=f"{told(found['lm'])}; medians of {found['repeats']} in turn; perplexities agree "
                 f"to {found['exact']:.1e} relative in float32, {found['apart'][bench]:.0e} timed",
        ))  # fmt: skip
    return made


def small() -> list[dict]:
    """`ppl_vs_file_order` and `ppl_vs_row` at about 1 and 15 M parameters."""
    return [*both_ways("1m", 2048, REPEATS), *both_ways("15m", 2048, REPEATS)]


def medium() -> list[dict]:
    """The same at about 60 M, on 256 rows."""
    return both_ways("60m", 256, REPEATS, "_60m")


def padding(rows: int = 2048) -> list[dict]:
    """`ppl_padding`: tokens that our batches put through the model, per real token."""
    from instructmining_core.data.tokenization import PLAIN
    from instructmining_core.indicators.perplexity import encode_turns
    from instructmining_core.indicators.turns import each_turn, read

    found, origin = data.conversations(rows)
    talks = [read(messages) for messages in found]
    lm = build_lm("1m", data.texts(found))
    lengths = np.array([len(e) for e in encode_turns(list(each_turn(talks)), lm)])
    through = _tokens_through(lm, lambda: ours(lm, talks))
    parts = np.array_split(lengths, max(1, len(lengths) // 32))
    in_order = sum(len(part) * part.max() for part in parts) / lengths.sum()
    return [limit_row(
        "ppl_padding", f"limit {LIMIT_PADDING}; batches of 32 in file order take "
        f"{in_order:.2f}",
        float(through / lengths.sum()), LIMIT_PADDING, "padded tokens per real token", on="1m",
        dtype=_name(lm.dtype), data=f"{len(talks)} contiguous rows of {origin}",
        template=PLAIN, note="counted at the model's embedding layer",
    )]  # fmt: skip


def _tokens_through(lm, call: Callable) -> int:
    """Tokens, padding included, that reach the embedding layer during the call."""
    assert lm.head  # asked before the count: finding it out runs the model too
    counted: list[int] = []
    hook = lm.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: counted.append(inputs[0].numel())
    )
    try:
        call()
    finally:
        hook.remove()
    return sum(counted)


def _name(dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}, both"


BENCHES: dict[str, Callable[[], list[dict]]] = {
    "ppl_vs_file_order": small,
    "ppl_vs_row": small,
    "ppl_vs_file_order_60m": medium,
    "ppl_vs_row_60m": medium,
    "ppl_padding": padding,
}
