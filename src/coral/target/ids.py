"""Token ids and the weights that have rows for them, checked before native code is told about either.

Native code is given addresses of weights and numbers of rows, and believes both: an id outside the embedding
would read foreign memory, and so would any id after the embedding was resized or converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coral.device import has_queue
from coral.errors import CoralError

if TYPE_CHECKING:
    from torch import Tensor

    from coral.target.target import Target


def outer_weights(model: Any) -> list[Any]:
    """What tells a model's embedding and LM head, as they are now, from what they were or may become.

    Raises:
        CoralError: their shapes differ.
    """
    weights = [end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings())]
    if weights[0].shape != weights[1].shape:
        raise CoralError(
            f"the model's embedding has shape {tuple(weights[0].shape)}, but its LM head "
            f"{tuple(weights[1].shape)}; both need a row for each token id: resize both, or use another "
            "model."
        )
    return [(id(weight), weight.data_ptr(), weight.dtype) for weight in weights]


def check_ids(target: Target, ids: Sequence[int]) -> None:
    """Raise CoralError for ids that the target has no rows for, or where its model is no longer what it was
    when the target was made.
    """
    if target.is_stale:
        raise CoralError(
            f"the embedding or LM head of {target.name} was resized, converted or moved after it was loaded "
            "here; do that to the model first, and then load it again with coral.load."
        )
    size = target.vocab_size
    if not ids or 0 <= min(ids) <= max(ids) < size:
        return
    odd = next(i for i in ids if not 0 <= i < size)
    tokens = 0 if target.tokenizer is None else len(target.tokenizer)
    raise CoralError(
        f"the prompt holds the token id {odd}, but those of {target.name} are 0 to {size - 1}; "
        + (f"its tokenizer has {tokens} tokens: " if tokens > size else "")
        + "use the tokenizer that the model was trained with."
    )


def check_scores(target: Target, scores: Tensor) -> None:
    """Raise CoralError where the largest of a row [N, V] of logits is no number: its token would be any. On a
    GPU nothing is checked, for a cycle would wait for it.
    """
    if not has_queue(scores.device) and not scores.amax(-1).isfinite().all():
        raise CoralError(
            f"the scores of {target.name} are not finite, so its text would mean nothing: its weights are "
            f"damaged, or too large for {target.precision}; copy them again, or take another dtype."
        )
