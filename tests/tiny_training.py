"""A tiny random target and data for training tests, built in milliseconds."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from coral.drafters.feature.network import Drafter, DrafterConfig


class TinyTarget:
    """The part of a target that training reads."""

    def __init__(self, model: Any, name: str = "tiny", revision: str | None = None) -> None:
        self.model, self.name, self.revision = model.eval().requires_grad_(False), name, revision
        self.config = model.config
        self.vocab_size, self.hidden_size = model.config.vocab_size, model.config.hidden_size
        self.head_weight, self.head_bias = model.lm_head.weight, None
        self.device = model.lm_head.weight.device
        self.facts = SimpleNamespace(family="llama", num_layers=model.config.num_hidden_layers)
        self.tokenizer, self.eos_ids = None, frozenset({2})

    @torch.no_grad()
    def states(
        self, input_ids: Tensor, document_starts: Tensor | None = None, layers: tuple[int, ...] = (-1,)
    ) -> Tensor:
        if document_starts is None:
            output = self.model.model(input_ids, output_hidden_states=True)
            features = output.last_hidden_state
            return torch.cat([features if i == -1 else output.hidden_states[i] for i in layers], -1)
        states = []  # document by document, row by row
        for ids, starts in zip(input_ids, document_starts, strict=True):
            begins = [0, *(int(i) for i in starts.nonzero() if i)]
            sizes = [b - a for a, b in zip(begins, [*begins[1:], len(ids)], strict=True)]
            parts = ids.split(sizes)
            states.append(torch.cat([self.states(part[None], None, layers)[0] for part in parts]))
        return torch.stack(states)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)


def tiny_target(
    vocab_size: int = 31, hidden_size: int = 16, seed: int = 0, num_layers: int = 2
) -> TinyTarget:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)  # decisive, so that the loss is not mostly the target's own entropy
    return TinyTarget(model)


def tiny_drafter(seed: int = 1, **options: Any) -> Drafter:
    torch.manual_seed(seed)
    drafter = Drafter(DrafterConfig.for_target(tiny_target().config, **options))
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(5.0)  # far from linear, so that a wrong mask cannot hide
    return drafter


def tiny_data(rows: int = 24, vocab_size: int = 31, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    dataset = []
    for _ in range(rows):
        length = int(torch.randint(9, 14, (1,), generator=generator))
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        mask = [i >= 4 for i in range(length)]
        dataset.append({"input_ids": ids, "loss_mask": mask, "document_starts": [0]})
    return SimpleNamespace(dataset=dataset)


def tiny_info(rows: int = 24) -> dict[str, Any]:
    """What coral.json says of such data."""
    counts = ("examples", "rows", "tokens", "trained_tokens", "held_out", "kept_from_training")
    return {
        "format_version": 1,
        "tokenizer": "tiny",
        "vocab_size": 31,
        "vocabulary": "0" * 16,
        "max_length": 16,
        **dict.fromkeys(counts, rows),
        "dropped": {},
        "dropped_notes": [],
    }
