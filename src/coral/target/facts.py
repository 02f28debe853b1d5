"""What is known of a target without its code: numbers and names, all of which JSON can hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coral.json_file import STRICT
from coral.target.families import context_length, eos_ids, sliding_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Facts:
    """What decoding asks of a config.

    family: transformers' model type. context_length: the longest sequence that is decoded exactly.
    eos_ids: ids that end a text. window: the sliding window of the layers that have one; None where none has.
    generation: the generation config, as far as it is set.
    """

    __pydantic_config__ = STRICT
    family: str
    num_layers: int
    context_length: int
    eos_ids: list[int]
    window: int | None
    generation: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Facts:
        config, generation = model.config, model.generation_config
        return cls(
            family=config.model_type,
            num_layers=config.num_hidden_layers,
            context_length=context_length(config),
            eos_ids=sorted(eos_ids(model, tokenizer)),
            window=sliding_window(config),
            generation={} if generation is None else json.loads(generation.to_json_string()),
        )
