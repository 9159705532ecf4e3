"""The reward model class behind `OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5`.

Its checkpoint names the model type `gpt_neox_reward_model`, which transformers does not know
(transformers issue 22791). The class is a GPT-NeoX body and one linear layer with a bias; the
weight names (`gpt_neox.*`, `out_proj.*`) are those of the published checkpoint. Importing this
module registers it with `AutoConfig` and `AutoModelForSequenceClassification`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class GPTNeoXRewardConfig(GPTNeoXConfig):
    """pooling : "last" (hidden state of the last real token) or "mean" (over the real tokens)."""

    model_type = "gpt_neox_reward_model"
    pooling: str | None = "last"


class GPTNeoXRewardModel(GPTNeoXPreTrainedModel):
    """GPT-NeoX body, one pooled hidden state per row, one linear layer with one output."""

    config_class = GPTNeoXRewardConfig
    # buffers that old checkpoints carry and newer transformers compute
    _keys_to_ignore_on_load_unexpected = [
        r"attention.bias", r"attention.masked_bias", r"rotary_emb.inv_freq",
    ]

    def __init__(self, config: GPTNeoXRewardConfig) -> None:
        super().__init__(config)
        self.pooling = config.pooling or "last"
        if self.pooling not in ("last", "mean"):
            raise ValueError(f"pooling {config.pooling!r} is unknown; use 'last' or 'mean'")
        self.num_labels = 1
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_
    ) -> SequenceClassifierOutput:
        """Reward of each row: `logits`, shape (rows, 1); a larger value is a better answer.

        input_ids : shape (rows, tokens); attention_mask : same shape, 1 for real tokens
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        hidden = self.gpt_neox(
            input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        pooled = pool(hidden, attention_mask, self.pooling)
        return SequenceClassifierOutput(logits=self.out_proj(pooled))


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per row, shape (rows, dim), from the hidden states of its real tokens.

    hidden : shape (rows, tokens, dim); mask : shape (rows, tokens), 1 for real tokens
    """
    if pooling == "mean":
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


AutoConfig.register(GPTNeoXRewardConfig.model_type, GPTNeoXRewardConfig, exist_ok=True)
AutoModelForSequenceClassification.register(GPTNeoXRewardConfig, GPTNeoXRewardModel, exist_ok=True)
