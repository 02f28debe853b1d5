"""A tiny target with its tokenizer, and an untrained drafter for it, as directories on disk."""

from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import EOT, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from coral.drafters import checkpoint
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.target.record import TargetRecord
from coral.target.target import Target

FAMILIES: dict[str, Any] = {
    "gemma3": Gemma3TextConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "olmo2": Olmo2Config,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,  # with biases of q, k and v
    "qwen3": Qwen3Config,
}
NATIVE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
          "head_dim": 16}  # fmt: skip
"""Sizes that fill vectors, so that the native forward takes the model where it knows family and dtype."""


def save_target(
    directory: Path,
    seed: int = 0,
    vocab_size: int | None = None,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> None:
    """A random target of the vocabulary of `tiny_tokenizer`, with a context of 512, stored in `dtype`."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": vocab_size or len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": EOT,
    }
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**sizes | changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a new model, where one that is left out would not be missed
                parameter.normal_(std=0.5)
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_drafter(directory: Path, target: Path) -> None:
    torch.manual_seed(2)
    loaded = Target.load(target)
    drafter = Drafter(DrafterConfig.for_target(loaded.config))
    checkpoint.save(drafter, directory, target=TargetRecord.of(loaded))
