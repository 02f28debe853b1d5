"""Where a target's model comes from: Hugging Face's object, or what a first start wrote down of it.

Both have the same attributes:

    facts: what is known of the model without its code
    embedding_weight [V, h], head_weight [V, h], head_bias [V] or None
    model: Hugging Face's object
    is_stale: whether the model got another embedding or LM head since
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from coral.errors import CoralError
from coral.target.facts import Facts
from coral.target.families import check_supported
from coral.target.ids import outer_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Loaded:
    """A model with its code.

    Args:
        freeze: take it out of training mode and its parameters out of autograd, for good.

    Raises:
        CoralError: it cannot be a target.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, freeze: bool
    ) -> None:
        from coral.target.grouped_sdpa import GROUPED_SDPA  # transformers, which has this model, is imported

        check_supported(model.config)
        if model.config._attn_implementation not in ("sdpa", "eager", GROUPED_SDPA):
            raise CoralError(
                f"attention {model.config._attn_implementation!r} takes no arbitrary mask, which trees need; "
                f"load the model with attn_implementation='sdpa' or 'eager'."
            )
        embedding: Any = model.get_input_embeddings()
        head = model.get_output_embeddings()
        if any(parameter.is_meta for end in (embedding, head) for parameter in end.parameters()):
            raise CoralError(
                "the model's embedding or LM head is offloaded to the CPU or disk; only layers may be: use a "
                "device map that keeps these two on a device."
            )
        assert isinstance(head, nn.Linear)
        self.model = model.eval().requires_grad_(False) if freeze else model
        self.facts = Facts.of(model, tokenizer)
        self.embedding_weight: Tensor = embedding.weight
        self.head_weight: Tensor = head.weight
        self.head_bias: Tensor | None = getattr(head, "bias", None)
        self._outer = outer_weights(model)

    @property
    def is_stale(self) -> bool:
        return outer_weights(self.model) != self._outer
