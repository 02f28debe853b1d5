"""The draft model of Hugging Face's assisted generation: any small causal LM of the target's vocabulary."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from coral.data.prepared import vocabulary_digest
from coral.errors import CoralError
from coral.target.target import Target


def load_assistant(source: str | Path, target: Target) -> PreTrainedModel:
    """Load `source` as the target is (dtype, device, attention, packed weights), so that it is as fast.

    It drafts by transformers' defaults: as long as it is confident, 20 tokens at most, and past end tokens,
    which no method of a bench stops at.

    Raises:
        CoralError: it cannot be loaded, or has another vocabulary than the target.
    """
    try:
        loaded = Target.load(
            source, dtype=str(target.dtype).removeprefix("torch."), device=str(target.device)
        )
    except CoralError as error:
        raise CoralError(f"the assistant {source} cannot be used: {error}") from error
    sizes, tokenizers = {loaded.vocab_size, target.vocab_size}, (loaded.tokenizer, target.tokenizer)
    digests = {vocabulary_digest(tokenizer) for tokenizer in tokenizers if tokenizer is not None}
    if len(sizes) > 1 or len(digests) > 1:
        raise CoralError(
            f"the assistant {source} has another vocabulary ({loaded.vocab_size} ids) than the target "
            f"({target.vocab_size}); name a model with the target's tokenizer and number of ids."
        )
    loaded.model.generation_config = GenerationConfig()
    return loaded.model
