"""Every supported family writes what Hugging Face writes; the others are refused with the reason."""

import json
import weakref

import pytest
import torch
from tiny import (
    CONFIGS,
    SHAPE,
    Oracle,
    Wrong,
    new_state,
    prompt_of,
    random_drafter,
    tiny_model,
    tiny_target,
    tree_of,
    write,
)
from transformers import LlamaConfig

from coral.decoding.cycle import acceptance_length
from coral.drafters.feature.network import DrafterConfig
from coral.drafters.lookup import NGram
from coral.errors import CoralError
from coral.target.grouped_sdpa import GROUPED_SDPA
from coral.target.target import Target
from coral.tree import TreeSize

NEW = 15  # beyond every sliding window
TREE_SIZE = TreeSize(top_k=3, max_depth=4, num_nodes=7)
ATTENTION = {"sdpa": GROUPED_SDPA, "eager": "eager"}


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture(params=ATTENTION)
def attention(request):
    return ATTENTION[request.param]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Prompts of 9 tokens are read in three pieces."""
    monkeypatch.setattr("coral.decoding.state._PREFILL_CHUNK", 4)


def hugging_face(kind, attention, prompt, new):
    ids = torch.tensor([prompt])
    model = tiny_model(kind, "eager" if attention == "eager" else "sdpa")
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    return output[0].tolist()


def test_written_as_hugging_face_writes(kind, attention):
    """Stops a wrong mask, window, position, scaling, bias or head, in plain and in accelerated decoding."""
    target, prompt = tiny_target(kind, attention), prompt_of(9)
    expected = hugging_face(kind, attention, prompt, NEW)
    assert len(set(expected[9:])) > 3, "a text that only repeats itself would prove little"
    assert write(target, None, [prompt], NEW).texts == [expected]
    for proposer, new, tau in (
        (random_drafter(target), 9, None),
        (NGram(3), 9, None),
        (Oracle([expected]), 15, 5.0),
        (Wrong([expected]), 6, 1.0),
    ):
        written = write(target, proposer, [prompt], new, tree_size=TREE_SIZE)
        assert written.texts == [expected[: 9 + new]], type(proposer).__name__
        assert tau is None or acceptance_length(written.cycles) == tau


@torch.no_grad()
def test_feature_is_the_input_of_the_head(kind, attention, monkeypatch):
    """Stops a feature taken before the final norm, logits that are scaled after the head, and a window that
    is lost between blocks of rows.
    """
    monkeypatch.setattr("coral.target.attention.BLOCK", 6)
    target, prompt = tiny_target(kind, attention), prompt_of(20)
    ids = torch.tensor([prompt, prompt_of(20, seed=1)])
    logits = tiny_model(kind, "eager" if attention == "eager" else "sdpa")(ids).logits
    torch.testing.assert_close(target.head(target.states(ids)), logits, rtol=1e-4, atol=1e-4)
    read = new_state(target, prompt)
    read.prefill(target, (-1,))
    torch.testing.assert_close(target.head(read.unread.features), logits[0, :-1], rtol=1e-4, atol=1e-4)
    assert read.unread_tokens == prompt[1:]


@torch.no_grad()
def test_states_are_those_that_enter_the_layers(kind):
    """Stops states of another layer, of another order, or without the final norm."""
    target, prompt = tiny_target(kind), prompt_of(9)
    output = target.decoder(torch.tensor([prompt]), output_hidden_states=True)
    expected = torch.cat([output.hidden_states[0], output.last_hidden_state, output.hidden_states[1]], -1)[0]
    for way in (target, target.on()):
        state = new_state(way, prompt)
        state.prefill(way, (0, -1, 1))
        _, (states,) = way.verify([state.cache], [tree_of([prompt[-1]], [-1])], (0, -1, 1))
        torch.testing.assert_close(torch.cat([state.unread.features, states]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(kind, monkeypatch):
    """Stops features of packed training rows that differ from those of each document alone, also where a
    block of rows ends within one.
    """
    monkeypatch.setattr("coral.target.attention.BLOCK", 6)
    target = tiny_target(kind)
    documents = [prompt_of(11), prompt_of(3, seed=1), prompt_of(9, seed=2)]
    starts = torch.zeros(1, 23, dtype=torch.bool)
    starts[0, [0, 11, 14]] = True
    rows = torch.tensor([[token for document in documents for token in document]])
    packed = target.states(rows, starts, (1, -1, 0))
    alone = [target.states(torch.tensor([document]), None, (1, -1, 0)) for document in documents]
    alone = torch.cat(alone, 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_states_of_other_layers_are_not_kept():
    """Stops a training batch that holds what enters each of a large target's layers for the sake of three."""
    target = Target(tiny_model("llama", GROUPED_SDPA, num_hidden_layers=12))
    alive: list[weakref.ref[torch.Tensor]] = []
    for layer in target.decoder.layers:
        layer.register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0])))
    held: list[int] = []
    target.decoder.norm.register_forward_pre_hook(
        lambda *_: held.append(sum(state() is not None for state in alive[:-1]))
    )
    target.states(torch.tensor([prompt_of(9)]), None, (2, 6, 9))
    assert len(alive) == 12 and held == [4]  # with the embeddings, which the model holds


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_a_window_that_the_model_does_not_know_is_none(kind):
    """Stops a key of the config that a family's code does not read, and that would cut what rows see."""
    model = tiny_model(kind, GROUPED_SDPA, sliding_window=7)
    ids = torch.tensor([prompt_of(20)])
    logits = tiny_model(kind)(ids).logits
    torch.testing.assert_close(Target(model).head(Target(model).states(ids)), logits, rtol=1e-4, atol=1e-4)


def test_a_drafter_reads_the_embedding_as_the_target_does():
    """Stops a drafter of Gemma that gets rows without their factor, or the frequencies of local layers."""
    target, ids = tiny_target("gemma3"), torch.arange(9)
    config = DrafterConfig.for_target(target.config)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
    own = target.embed(ids) * config.embedding_scale
    torch.testing.assert_close(own, target.model.get_input_embeddings()(ids))
    assert DrafterConfig.for_target(tiny_target("llama").config).embedding_scale == 1


@torch.no_grad()
def test_loaded_models_of_either_kernel(attention):
    """Stops the grouped kernel from computing anything else than Hugging Face's own."""
    target, loaded = tiny_target("llama", attention), Target.load(tiny_model("llama"))
    ids = torch.tensor([prompt_of(20)])
    starts = torch.arange(20)[None] == 7
    torch.testing.assert_close(target.states(ids, starts), loaded.states(ids, starts))


@pytest.mark.parametrize(("kind", "limit"), [("phi3-longrope", 34), ("llama-dynamic", 96), ("llama", 96)])
def test_context_ends_before_frequencies_change(kind, limit):
    """Stops text past a length where rotary frequencies change: cached keys would be of another model."""
    target = tiny_target(kind)
    assert target.context_length == limit
    written = write(target, NGram(3), [prompt_of(limit - 5)], new=50, tree_size=TREE_SIZE)
    assert len(written.texts[0]) == limit
    state = new_state(target, prompt_of(limit - 1))
    state.prefill(target, (-1,))
    with pytest.raises(CoralError, match="context"):
        target.verify([state.cache], [tree_of([1, 2, 3], [-1, 0, 1])])


def config_directory(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


LLAMA = LlamaConfig(**SHAPE).to_dict()
GEMMA = CONFIGS["gemma3"].to_dict()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not supported"),
        ({"model_type": "gemma2"}, "architecture 'gemma2' is not supported"),
        (
            LLAMA | {"layer_types": ["linear_attention", "full_attention"]},
            "linear_attention keep a state that cannot be cut",
        ),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised targets"),
        (GEMMA | {"final_logit_softcapping": 30.0}, "sets final_logit_softcapping"),
        (GEMMA | {"use_bidirectional_attention": True}, "sets use_bidirectional_attention"),
        ({"model_type": "nothing-of-the-kind"}, "cannot read a model config"),
    ],
    ids=["gpt2", "gemma2", "linear", "quantised", "soft caps", "both ways", "unknown"],
)
def test_refused_before_weights_are_read(tmp_path, config, reason):
    """Stops minutes of download before a refusal: no weights are here, yet the reason is the config's."""
    with pytest.raises(CoralError, match=reason):
        Target.load(config_directory(tmp_path, **config))


def test_flash_attention_is_refused(tmp_path):
    """Stops a kernel that ignores the tree mask: every branch would see its siblings."""
    with pytest.raises(CoralError, match=r"flash_attention_2.*use sdpa or eager"):
        Target.load(config_directory(tmp_path, **LLAMA), attention="flash_attention_2")
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(CoralError, match="attn_implementation='sdpa' or 'eager'"):
        Target.load(model)


@pytest.mark.parametrize("missing", ["directory", "config", "weights"])
def test_nothing_to_load(tmp_path, missing):
    """Stops a traceback of Hugging Face where one sentence says what is missing."""
    if missing == "weights":
        config_directory(tmp_path, **LLAMA)
    path = tmp_path / "absent" if missing == "directory" else tmp_path
    with pytest.raises(CoralError, match=str(path)):
        Target.load(path)
