"""A tiny target with its tokenizer, and an untrained drafter for it, as directories on disk."""

from pathlib import Path

import torch
from tiny_tokenizer import EOT, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from coral.drafter import checkpoint
from coral.drafter.drafter import Drafter, DrafterConfig
from coral.target import Target


def save_target(directory: Path, seed: int = 0, vocab_size: int | None = None) -> None:
    """A random target of the vocabulary of `tiny_tokenizer`, with a context of 512."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=EOT,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_drafter(directory: Path, target: Path) -> None:
    torch.manual_seed(2)
    loaded = Target.load(target)
    drafter = Drafter(DrafterConfig.for_target(loaded.config))
    checkpoint.save(drafter, directory, target=checkpoint.TargetRecord.of(loaded))
