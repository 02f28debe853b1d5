"""vLLM's EAGLE drafter with a head of ours. N = rows, h = hidden size, V = vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM

from coral.drafters.heads import store as heads
from coral.drafters.heads.full import FullHead
from coral.errors import CoralError


@dataclass(frozen=True)
class LMHead:
    """What a head asks of a target, from vLLM's LM head."""

    head_weight: Tensor  # [V, h]
    head_bias: Tensor | None

    @classmethod
    def of(cls, layer: Any, vocab_size: int) -> LMHead:
        """Raises CoralError where the layer does not hold all rows as they are."""
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if getattr(layer, "tp_size", 1) > 1 or weight is None or not weight.is_floating_point():
            raise CoralError(
                "CORAL's heads need the target's LM head in one piece, neither quantised nor split by "
                "tensor parallelism; serve the drafter with its full head (`coral export --to vllm`)."
            )
        # vLLM pads the vocabulary.
        return cls(weight.detach()[:vocab_size], None if bias is None else bias.detach()[:vocab_size])

    @property
    def vocab_size(self) -> int:
        return self.head_weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.head_weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype


class EagleCoralLlamaForCausalLM(EagleLlamaForCausalLM):
    """Drafts with the checkpoint's routed, static or low-rank head; ids that it leaves out get -inf.

    The head is the directory's own, as `coral export --to vllm-coral` writes it.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        draft = vllm_config.speculative_config.draft_model_config
        self._source = f"{draft.model}@{draft.revision}" if draft.revision else draft.model
        self._head: Any = None

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self._head is None:  # vLLM hands over the target's LM head only after the weights are loaded
            self._head = self._load_head()
        return super().forward(input_ids, positions, hidden_states, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [N, h] -> log-probabilities [N, V] float32."""
        return self._head.log_probs(hidden_states)

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """The likeliest id of each row [N], with no scores for all V; vLLM asks for it with
        `use_local_argmax_reduction`.
        """
        alike = torch.zeros(len(hidden_states), device=hidden_states.device)
        return self._head.topk(hidden_states, 1, (), alike)[0][:, 0]

    def _load_head(self) -> Any:
        target: Any = LMHead.of(self.lm_head, self.config.vocab_size)
        found = heads.load(self._source, target)
        if not hasattr(found, "log_probs") or isinstance(found, FullHead):
            raise CoralError(
                f"the drafter {self._source} holds no head to serve; write it with `coral export --to "
                "vllm-coral`."
            )
        return found
