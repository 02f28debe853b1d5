"""Tiny targets of every supported family and proposers with a known fate, built in milliseconds."""

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

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

from coral.decoding.cycle import Proposer, generate
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle, State
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.drafters.feature.propose import Feature
from coral.drafters.heads.groups import contiguous
from coral.drafters.heads.in_context import InContextHead
from coral.drafters.heads.low_rank import LowRankHead, factorise
from coral.drafters.heads.routed import RoutedHead, Router
from coral.drafters.heads.static import StaticHead
from coral.drafters.heads.store import Head
from coral.target.grouped_sdpa import GROUPED_SDPA
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize

V = 31
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "max_position_embeddings": 96,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.2],
            "long_factor": [2.0, 9.0], "original_max_position_embeddings": 34}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE | {"tie_word_embeddings": True}),
    "llama-ungrouped": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}, attention_bias=True, mlp_bias=True),
    "llama-llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-dynamic": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-sliding": MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=False, sliding_window=7),
    "qwen2-sliding": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "qwen3-sliding": Qwen3Config(
        **SHAPE, head_dim=8, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "phi3": Phi3Config(**SHAPE, sliding_window=None),
    "phi3-sliding": Phi3Config(**SHAPE, sliding_window=7),
    "phi3-partial": Phi3Config(
        **SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ),
    "phi3-longrope": Phi3Config(**SHAPE, rope_parameters=LONGROPE, original_max_position_embeddings=34),
    "olmo2": Olmo2Config(**SHAPE),
    "gemma3": Gemma3TextConfig(
        **SHAPE
        | {
            "tie_word_embeddings": True,
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "initializer_range": 0.1,
        },
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
}


def tiny_model(kind: str = "llama", attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """Random weights, the same for every attention; norms and biases random too, so that none is missed."""
    config = copy.deepcopy(CONFIGS[kind])
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if "o_proj" in name:
                parameter.mul_(2.0)  # what came before matters, so that texts do not run into a loop at once
    return model.eval()


@cache
def tiny_target(kind: str = "llama", attention: str = GROUPED_SDPA) -> Target:
    return Target(tiny_model(kind, attention), name=kind)


@cache
def soft_target(vocab_size: int = 5) -> Target:
    """Few ids and no certainty: the law of short texts can be counted."""
    model = tiny_model(vocab_size=vocab_size)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
    return Target(model, name="soft")


def prompt_of(length: int, vocab_size: int = V, seed: int = 0) -> list[int]:
    draw = random.Random(1000 * seed + length)
    return [draw.randrange(1, vocab_size) for _ in range(length)]


def low_rank_head(target: Target) -> LowRankHead:
    """So low a rank that likely ids are often missed."""
    return LowRankHead(target, *factorise(target.head_weight, torch.eye(target.hidden_size), 3), 5)


def routed_head(target: Target, active: int = 1, groups: int = 4, core: int = 0) -> RoutedHead:
    """A routed head with a random router, so that likely ids are often left out; its core: the lowest ids."""
    torch.manual_seed(3)
    router = Router(target.hidden_size, groups + (core > 0))
    torch.nn.init.normal_(router.w1.weight)
    ids = contiguous(target.vocab_size - core, groups)
    return RoutedHead(target, router, torch.where(ids < 0, ids, ids + core), active)


HEADS: dict[str, Callable[[Target], Head]] = {
    "routed": routed_head,
    "routed with a core": lambda target: routed_head(target, core=5),
    "static": lambda target: StaticHead(target, torch.arange(3, 20)),
    "low rank": low_rank_head,
    "in context": lambda target: InContextHead(target, 12),
}
"""One of each kind that leaves likely ids out."""


def random_drafter(target: Target, coupled: bool = True) -> Feature:
    """The real proposer with an untrained drafter."""
    torch.manual_seed(1)
    drafter = Drafter(DrafterConfig.for_target(target.config))
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(5.0)  # far from linear, so that a wrong mask cannot hide
    return Feature(drafter, target, coupled=coupled)


class Recorder:
    """Keeps the trees that a proposer proposes, as (tokens, parents), by sequence id."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer, self.layers = proposer, proposer.layers
        self.trees: defaultdict[int, list[tuple[list[int], list[int]]]] = defaultdict(list)

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        trees = self.proposer.propose(states, tree_size)
        for state, tree in zip(states, trees, strict=True):
            self.trees[state.sequence_id].append((tree.tokens.tolist(), tree.parents.tolist()))
        return trees


class Oracle:
    """Drafts what the target will say, among wrong siblings; texts[i] is the whole text of sequence i."""

    layers = ()

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int = V) -> None:
        self.texts, self.vocab_size = texts, vocab_size

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        return [self.tree(state, tree_size.within(state.remaining)) for state in states]

    def tree(self, state: State, tree_size: TreeSize) -> DraftTree:
        here = len(state.tokens)
        tokens, parents, node = [state.tokens[-1]], [-1], 0
        for token in self.texts[state.sequence_id][here : here + tree_size.max_depth]:
            drafted = self.drafts(token)
            parents += [node] * len(drafted)
            tokens += drafted
            node = len(tokens) - 1
        return tree_of(tokens, parents)

    def drafts(self, token: int) -> list[int]:
        """Children drafted where the target says `token`; the last one is extended."""
        return [(token + 1) % self.vocab_size, token]


class Wrong(Oracle):
    """Never drafts what the target will say."""

    def drafts(self, token: int) -> list[int]:
        return [(token + 2) % self.vocab_size, (token + 1) % self.vocab_size]


class Bushes(Oracle):
    """Random trees, another one in every cycle, in which about half of the nodes are what the target says."""

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int = V, seed: int = 0) -> None:
        super().__init__(texts, vocab_size)
        self.draw = random.Random(seed)

    def tree(self, state: State, tree_size: TreeSize) -> DraftTree:
        draw, text = self.draw, self.texts[state.sequence_id]
        tokens, parents, depths, taken = [state.tokens[-1]], [-1], [0], set()
        for _ in range(draw.randrange(tree_size.num_nodes + 1)):
            parent = draw.randrange(len(tokens))
            position = len(state.tokens) + depths[parent]
            truth = text[position] if position < len(text) else 0
            token = truth if draw.random() < 0.5 else draw.randrange(self.vocab_size)
            if depths[parent] == tree_size.max_depth or (parent, token) in taken:
                continue
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
        return tree_of(tokens, parents)


def tree_of(tokens: Sequence[int], parents: Sequence[int]) -> DraftTree:
    return DraftTree(torch.tensor(tokens), torch.tensor(parents), torch.zeros(len(tokens)))


def random_tree(size: int, vocab_size: int = V, seed: int = 0) -> DraftTree:
    """Any parents; siblings never share a token."""
    draw = random.Random(seed)
    parents = [-1, *(draw.randrange(i) for i in range(1, size))]
    order = draw.sample(range(vocab_size), vocab_size)
    return tree_of([order[i % vocab_size] for i in range(size)], parents)


def root_path(tree: DraftTree, node: int) -> list[int]:
    """Node indices from the root to `node`, by following parents."""
    path = [node]
    while path[-1] != 0:
        path.append(int(tree.parents[path[-1]]))
    return path[::-1]


class Written(NamedTuple):
    """texts: prompt and answer of each sequence; cycles: of all sequences, in order."""

    texts: list[list[int]]
    cycles: list[Cycle]
    states: list[State]


def new_state(
    target: Target, prompt: list[int], new: int = 16, sampling: Sampling | None = None, **options: Any
) -> State:
    end = min(len(prompt) + new, target.context_length)
    return State(list(prompt), end, target.new_cache(end + 16), sampling or Sampling(), **options)


def write(
    target: Target,
    proposer: Proposer | None,
    prompts: Sequence[list[int]],
    new: int = 16,
    sampling: Sampling | None = None,
    tree_size: TreeSize | None = None,
    **options: Any,
) -> Written:
    """Write after every prompt in one batch; the sequence id is the index of the prompt."""
    states = [
        new_state(target, prompt, new, sampling, sequence_id=i, **options) for i, prompt in enumerate(prompts)
    ]
    batches = list(generate(target, proposer or Plain(), states, tree_size or TreeSize(4, 4, 15)))
    for state in states:
        assert state.done and state.cache.length == len(state.tokens) - 1
    return Written(
        [state.tokens for state in states], [cycle for batch in batches for cycle in batch], states
    )
