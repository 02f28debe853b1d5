"""What the native forward is told of a model: its sizes, what its family does, and the names of its weights.

A blueprint is read off a Hugging Face model once. It is plain values, so a file can keep it beside the
weights, and a forward then stands without transformers. Names are those of the model's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from typing_extensions import TypedDict

from coral.native.packing import LANES
from coral.target.families import rotations, windowed

if TYPE_CHECKING:
    from coral.target.target import Target

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma3_text")
"""RMSNorm around attention and a gated MLP, rotated queries and keys; with their own module names."""
_ACTIVATIONS: dict[str, Literal["silu", "gelu"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "longrope")  # of one frequency up to `context_length`
_LLAMA = {"input_norm": "input_layernorm", "norm": "post_attention_layernorm"}
_NORMS = {  # of a layer: `Layer.norms` -> the family's own names
    "gemma3_text": {
        "input_norm": "input_layernorm",
        "attended_norm": "post_attention_layernorm",
        "norm": "pre_feedforward_layernorm",
        "fed_norm": "post_feedforward_layernorm",
    },
    "olmo2": {"attended_norm": "post_attention_layernorm", "fed_norm": "post_feedforward_layernorm"},
}
_HEAD_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}


class Matrix(TypedDict):
    """Matrices that are multiplied with the same rows, one below another, and the bias of each, or none."""

    weights: list[str]
    biases: list[str]


class Layer(TypedDict):
    """Names of a layer's weights.

    norms: "input_norm" and "norm" stand before attention and the MLP, "attended_norm" and "fed_norm" after
        them, "query_norm" and "key_norm" before rotation; some of these.
    matrices: "qkv", "o", "gate_up" and "down".
    rotation: which one of the blueprint's.
    windowed: it sees no further back than the window.
    """

    norms: dict[str, str]
    matrices: dict[str, Matrix]
    rotation: int
    windowed: bool


class Rotation(TypedDict):
    """Float32 inverse frequencies of half of the dimensions that turn; `scaling` multiplies cos and sin."""

    frequencies: list[float]
    scaling: float


@dataclass(frozen=True)
class Blueprint:
    """`Blueprint(**json.loads(json.dumps(asdict(blueprint))))` is equal to `blueprint`, bit for bit.

    Attributes:
        scale: what products of queries and keys are multiplied by.
        embedding_scale: what rows of the embedding are multiplied by, once rounded to the model's dtype.
        activation: the MLP's; "gelu" is that by tanh.
        normed_at_once: a norm rounds once; else before its weights, too.
        normed_together: queries of all heads are normalised together, and so are keys; else head by head.
        rotated_at_once: a rotation rounds once; else cos, sin and its products, too.
        norm_offset: what is added to the weights of norms.
        window: how far layers that are `windowed` see; None: there are none.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    scale: float
    embedding_scale: float
    activation: Literal["silu", "gelu"]
    normed_at_once: bool
    normed_together: bool
    rotated_at_once: bool
    norm_offset: float
    window: int | None
    rotations: list[Rotation]
    embedding: str
    norm: str
    head: Matrix
    layers: list[Layer]

    @classmethod
    def of(cls, target: Target) -> Blueprint:
        """Of a target that `why_not` knows nothing against."""
        config, model, decoder = target.config, target.model, target.decoder
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        gemma, olmo = (config.model_type == family for family in ("gemma3_text", "olmo2"))
        attention = decoder.layers[0].self_attn
        kinds = config.layer_types if gemma else [None] * len(decoder.layers)
        turns = sorted(set(kinds))  # the kinds of layers that have a rotation of their own
        layers: list[Layer] = [
            {
                "norms": _norms(layer, config.model_type, names),
                "matrices": {name: _matrix(parts, names) for name, parts in _products(layer).items()},
                "rotation": turns.index(kind),
                "windowed": short,
            }
            for layer, kind, short in zip(decoder.layers, kinds, windowed(config), strict=True)
        ]
        q, kv = _widths(decoder.layers[0])
        return cls(
            hidden=target.hidden_size,
            heads=q // attention.head_dim,
            kv_heads=kv // attention.head_dim,
            head_size=attention.head_dim,
            eps=float(config.rms_norm_eps),
            scale=float(attention.scaling),
            embedding_scale=float(getattr(model.get_input_embeddings(), "embed_scale", 1.0)),
            activation=_ACTIVATIONS[_activation(config)],
            normed_at_once=gemma or olmo,
            normed_together=olmo,
            rotated_at_once=olmo,
            norm_offset=float(gemma),
            window=target.window,
            rotations=[_rotation(target, kind) for kind in turns],
            embedding=names[id(target.embedding_weight)],
            norm=names[id(decoder.norm.weight)],
            head=_matrix([model.get_output_embeddings()], names),
            layers=layers,
        )


def why_not(target: Target) -> str | None:
    """Why there is no blueprint of a target, as the end of a sentence; None: there is."""
    config = target.config
    ropes = {rope.get("rope_type", "default") for rope in rotations(config).values()}
    if config.model_type not in FAMILIES:
        return f"its family, {config.model_type}, has no native forward"
    if not type(target.model).__module__.startswith("transformers.models."):
        return "its code is not transformers' own"
    if odd := ropes - {*_FIXED_ROPE}:
        return f"its rotary frequencies ({', '.join(sorted(odd))}) follow the length of the text"
    if _activation(config) not in _ACTIVATIONS:
        return f"its activation is {_activation(config)}"
    return _why_not_its_modules(target)


def linears(target: Target) -> list[Any]:
    """Every layer that multiplies with a matrix, the LM head included."""
    modules = target.decoder.layers.modules()
    found = [m for m in modules if m._parameters.get("weight") is not None and m.weight.dim() == 2]
    return [*found, target.model.get_output_embeddings()]


def _why_not_its_modules(target: Target) -> str | None:
    """The same for the modules, which may have been changed since the model was made."""
    decoder, multiplying = target.decoder, linears(target)
    head_size = decoder.layers[0].self_attn.head_dim
    if any(type(linear) is not nn.Linear for linear in multiplying):
        return "some of its layers are not plain linear ones"
    if any(size % LANES for size in (head_size, *(linear.in_features for linear in multiplying))):
        return f"its sizes are no multiples of {LANES}"
    if any(2 * len(frequencies) > head_size for frequencies in decoder.rotary_emb.buffers()):
        return "it rotates more than its heads"
    alike = len({_widths(layer) for layer in decoder.layers}) == 1
    if not alike or not all(_is_whole(layer, target.hidden_size, head_size) for layer in decoder.layers):
        return "the sizes of its layers do not go together"
    return None if target.embedding_weight.is_contiguous() else "its embedding is not one block of memory"


def _is_whole(layer: Any, hidden: int, head_size: int) -> bool:
    """Whether the sizes of a layer go together, which may have been changed since it was made."""
    products, (q, kv), inner = _products(layer), _widths(layer), layer.mlp.down_proj.in_features
    outputs = {"qkv": [q, kv, kv], "o": [hidden], "gate_up": [inner, inner], "down": [hidden]}
    inputs = {"qkv": hidden, "o": q, "gate_up": hidden, "down": inner}
    return q % head_size == kv % head_size == q % kv == 0 and all(
        [part.out_features for part in parts] in (outputs[name], [sum(outputs[name])])
        and {(part.in_features, part.bias is None) for part in parts}
        == {(inputs[name], parts[0].bias is None)}
        for name, parts in products.items()
    )


def _widths(layer: Any) -> tuple[int, int]:
    """Of all queries, and of all keys."""
    a = layer.self_attn
    if hasattr(a, "qkv_proj"):
        return a.config.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    return a.q_proj.out_features, a.k_proj.out_features


def _products(layer: Any) -> dict[str, list[Any]]:
    """The linear layers of each matrix of a layer."""
    a, mlp = layer.self_attn, layer.mlp
    fused = hasattr(a, "qkv_proj")
    return {
        "qkv": [a.qkv_proj] if fused else [a.q_proj, a.k_proj, a.v_proj],
        "o": [a.o_proj],
        "gate_up": [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }


def _norms(layer: Any, family: str, names: dict[int, str]) -> dict[str, str]:
    around, heads = _NORMS.get(family, _LLAMA), layer.self_attn
    found = {norm: getattr(layer, name) for norm, name in around.items()}
    found |= {norm: getattr(heads, name) for norm, name in _HEAD_NORMS.items() if hasattr(heads, name)}
    return {norm: names[id(module.weight)] for norm, module in found.items()}


def _matrix(parts: list[Any], names: dict[int, str]) -> Matrix:
    biases = [] if parts[0].bias is None else [names[id(part.bias)] for part in parts]
    return {"weights": [names[id(part.weight)] for part in parts], "biases": biases}


def _rotation(target: Target, kind: str | None) -> Rotation:
    """Of the layers of a kind; None: of all."""
    rotary, prefix = target.decoder.rotary_emb, "" if kind is None else f"{kind}_"
    long = rotations(target.config)[kind].get("rope_type") == "longrope"  # a long text leaves its own behind
    frequencies = getattr(rotary, f"{prefix}{'original_' if long else ''}inv_freq")
    scaling = getattr(rotary, f"{prefix}attention_scaling")
    return {"frequencies": frequencies.float().tolist(), "scaling": float(scaling)}


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_act", None) or config.hidden_activation)
