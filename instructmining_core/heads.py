"""How a causal LM turns hidden states into logits, found out by trying.

The loss needs logits at target positions only, so the decoder and the output projection are called
apart. Some families change the logits after the projection: Gemma caps them
(`final_logit_softcapping`), Cohere multiplies (`logit_scale`), Granite divides by `logits_scaling`
where another family multiplies by the same name. So names are hints only: each candidate is held
against the model's own logits on a few tokens, and a model that fits none uses its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class HeadError(RuntimeError):
    """A model whose logits cannot be had."""


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
    inner = unwrapped(model)
    return inner.base_model


def find_head(model: nn.Module) -> Head:
    """How `model`'s logits come from its decoder's hidden states; see the module's text.

    Tries on 8 made-up tokens, in evaluation mode. Raises HeadError where the model's own logits
    there are not finite: nothing could be compared.
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
                raise HeadError("The model's logits are not finite on a plain input; its weights "
                                "are broken, or its dtype overflows (try float32).")
            return _matching(inner, ids, own)
    finally:
        inner.train(training)


def _matching(inner: nn.Module, ids: Tensor, own: Tensor) -> Head:
    linear = inner.get_output_embeddings()
    if linear is not None and inner.base_model is not inner:
        hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        for way, project in _candidates(inner, linear):
            if hidden.shape[-1] == linear.weight.shape[-1] and _same(project(hidden), own):
                return Head(way, project)
    return Head("forward", None)


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
