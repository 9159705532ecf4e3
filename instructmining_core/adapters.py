"""LoRA adapters as plain tensors: which layers they sit on, their first values, peft's files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from .profiles import FinetuneConfig


def peft_config(config: FinetuneConfig) -> LoraConfig:
    """peft's own configuration of an adapter: LoRA, rsLoRA or DoRA."""
    targets = config.target_modules
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=config.method == "rslora",
        use_dora=config.method == "dora",
    )


def scaling(config: FinetuneConfig) -> float:
    """What an adapter's output is multiplied by: alpha / rank; rsLoRA: alpha / sqrt(rank)."""
    return config.alpha / (math.sqrt(config.rank) if config.method == "rslora" else config.rank)


def target_layers(model: nn.Module, config: FinetuneConfig) -> dict[str, nn.Module]:
    """The layers peft would put an adapter on, by name, in the model's order.

    peft chooses (it knows that "all-linear" leaves out the output layer, and GPT-2's Conv1D); its
    adapter is removed again at once.
    """
    wrapped = get_peft_model(model, peft_config(config))
    names = [n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    wrapped.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return {name: model.get_submodule(name) for name in names}


def target_names(model: nn.Module, layers: Collection[str]) -> set[str]:
    """What to call these layers so that peft finds them again, and no others.

    Their last parts, as peft itself writes them; full names where the model has further layers
    that end in the same part.
    """
    short = {name.rsplit(".", 1)[-1] for name in layers}
    reached = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in short}
    return short if reached <= set(layers) else set(layers)


def first_values(name: str, rank: int, fan_in: int, init_seed: int) -> torch.Tensor:
    """The first value of a layer's A, float32, shape (rank, fan_in); B starts at zero.

    The distribution is peft's: uniform in +-1/sqrt(fan_in) (Kaiming with a = sqrt 5). The seed is
    mixed with the layer's name, so the values depend neither on the order of layers nor on how
    many adapters are trained together: the same seed is the same adapter for every set.
    """
    digest = hashlib.sha256(f"{init_seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(rank, fan_in).uniform_(-bound, bound, generator=generator)


def set_first_values(wrapped: nn.Module, init_seed: int) -> None:
    """Give every LoRA layer of a PeftModel its `first_values`."""
    for name, layer in wrapped.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.lora_A["default"].weight
            with torch.no_grad():
                weight.copy_(first_values(name, *weight.shape, init_seed))


def save_adapter(
    folder: str | Path,
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    config: FinetuneConfig,
    targets: set[str],
    base: str,
) -> None:
    """Write an adapter as peft does, for `PeftModel.from_pretrained`.

    tensors : layer name -> A, shape (rank, d_in), and B, shape (d_out, rank)
    targets : peft's `target_modules`; see `target_names`
    base : the base model's name, for peft's `base_model_name_or_path`
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {}
    for name, (a, b) in tensors.items():
        flat[f"base_model.model.{name}.lora_A.weight"] = a.detach().float().cpu().contiguous()
        flat[f"base_model.model.{name}.lora_B.weight"] = b.detach().float().cpu().contiguous()
    save_file(flat, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = peft_config(config)
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    settings.target_modules = targets
    settings.save_pretrained(str(folder))
