"""A deepened target that wrote other text, or had another cost than said, would falsify every table."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from coral.bench.deepen import deepen, plain_bytes
from coral.drafters.kinds import num_bytes
from coral.errors import CoralError

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 997,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, mlp_bias=True, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "phi3": Phi3Config(**SHAPE),
    "olmo2": Olmo2Config(**SHAPE),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=4, sliding_window=5, sliding_window_pattern=2),
}


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_same_function(family: str) -> None:
    """Stops a missed bias or post-norm, a wrong layer_idx (caches would mix) and a short layer_types."""
    model = tiny(family)
    ids = torch.arange(1, 14)[None]
    with torch.no_grad():
        before = model(ids).logits
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        width = deepen(model, 5, cost_ratio=0.3)
        assert torch.equal(before, model(ids).logits)
        again = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(text, again)
    layers = model.get_decoder().layers
    assert len(layers) == 5 and [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3, 4]
    assert layers[4].mlp.down_proj.weight.shape == (16, width)
    assert layers[4].self_attn.config is model.config


def test_cost_is_real() -> None:
    """Stops shared storage or zero weights (caches or sparsity skip them) and a width that misses c."""
    model = tiny("llama")
    deepen(model, 6, cost_ratio=0.10)
    parameters = [p for layer in model.get_decoder().layers for p in layer.parameters()]
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    last = dict(model.get_decoder().layers[5].named_parameters())
    assert all(last[f"mlp.{name}.weight"].count_nonzero() > 0.99 * last[f"mlp.{name}.weight"].numel()
               for name in ("gate_proj", "up_proj"))  # fmt: skip
    fc_and_layer = torch.nn.ModuleList([torch.nn.Linear(32, 16, bias=False), tiny("llama").model.layers[0]])
    draft = num_bytes(fc_and_layer) + num_bytes(model.get_output_embeddings())
    assert draft / plain_bytes(model) == pytest.approx(0.10, rel=0.06)


def test_refusals() -> None:
    """Stops a silent no-op and a negative width."""
    with pytest.raises(CoralError, match="has 2 layers"):
        deepen(tiny("llama"), 2)
    with pytest.raises(CoralError, match="already costs more"):
        deepen(tiny("llama"), 4, cost_ratio=0.99)
