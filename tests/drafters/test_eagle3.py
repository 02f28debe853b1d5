"""Drafters of fused states: what decoding computes is what training sees, and nothing of the product is for
one kind only.
"""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_distributed import FSDP, in_two_processes
from test_train import interrupt_at_first, metrics, run, weights
from test_unroll import STEPS, B, L, packed_starts, propose_chains, random_inputs
from tiny import Recorder, prompt_of, tiny_model, write
from tiny_pair import save_target
from tiny_training import tiny_data, tiny_target

import coral
from coral.bench.acceptance import acceptance
from coral.data.features import feature_batch
from coral.decoding.sampling import Sampling
from coral.drafters import checkpoint, kinds
from coral.drafters.eagle3.fused_learn import FusedLearner
from coral.drafters.eagle3.fused_network import FusedConfig, FusedDrafter
from coral.drafters.eagle3.fused_options import FusedLoss, FusedOptions, Options
from coral.drafters.eagle3.fused_propose import Fused
from coral.drafters.recurrent.alignment import AlignmentConfig
from coral.drafters.recurrent.unroll import unroll
from coral.errors import CoralError
from coral.export import write as write_export
from coral.hub.card import card
from coral.target.record import TargetRecord
from coral.target.target import Target
from coral.training.recipe import Limits, OptimiserConfig, Reports, config_type
from coral.training.start import new_drafter
from coral.tree import TreeSize

SLIDING = ["sliding_attention", "full_attention"] * 2
FAMILIES = {"llama": {}, "phi3": {}, "gemma3": {"layer_types": SLIDING}}


def deep_target(family="llama"):
    """Of four layers, so that three can be fused."""
    return Target(tiny_model(family, num_hidden_layers=4, **FAMILIES[family]), name=family)


def fused_drafter(target, draft_vocab_size=20, layers=(1, 2, 3), **options):
    torch.manual_seed(1)
    sizes = {"layers": layers, "draft_vocab_size": draft_vocab_size, **options}
    drafter = FusedDrafter(FusedConfig.for_target(target.config, **sizes))
    drafter.draft_only(torch.randperm(target.vocab_size)[:draft_vocab_size].sort().values)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.3)  # far from linear
    return drafter.eval()


@pytest.mark.parametrize("options", [{}, {"norm_output": True}, {"draft_vocab_size": 31}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_unroll_is_what_a_real_decode_computes(options, packed):
    """Stops a diagonal one column off, a norm of the wrong half, a residual or feedback that is normed."""
    drafter = fused_drafter(deep_target(), **options).double()
    embeddings, _ = random_inputs()
    states = torch.randn(B, L, 48, dtype=torch.float64)
    features = drafter.fuse(states)
    starts = packed_starts() if packed else None
    outputs = unroll(drafter, embeddings, features, starts, STEPS)
    compared = 0
    for sequence in range(B):
        edges = starts[sequence].nonzero().squeeze(1).tolist() if packed else [0]
        for first, end in zip(edges, [*edges[1:], L], strict=True):
            document = slice(first, end)
            inputs = embeddings[sequence, document], features[sequence, document]
            for (row, step), expected in propose_chains(drafter, *inputs, STEPS).items():
                found = outputs[step - 1][sequence, first + row]
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
                compared += 1
    assert compared > 4 * L


@torch.no_grad()
def test_the_layer_is_that_of_the_published_code():
    """Stops embedding and feature in the wrong order, or a residual that is normed: engines would load the
    weights and accept nothing.
    """
    drafter = fused_drafter(deep_target()).double()
    layer, attention = drafter.midlayer, drafter.midlayer.self_attn
    embedding, state = torch.randn(16).double(), torch.randn(48).double()

    def normed(x, norm):
        return x / (x.square().mean() + drafter.config.rms_norm_eps).sqrt() * norm.weight

    feature = drafter.fc.weight @ state
    row = torch.cat([normed(embedding, layer.input_layernorm), normed(feature, layer.hidden_norm)])
    value = attention.v_proj.weight @ row  # the one key has all the weight
    value = value.view(2, -1).repeat_interleave(2, 0).flatten()
    x = feature + attention.o_proj.weight @ value
    y, mlp = normed(x, layer.post_attention_layernorm), layer.mlp
    gate = mlp.gate_proj.weight @ y
    x = x + mlp.down_proj.weight @ (gate * gate.sigmoid() * (mlp.up_proj.weight @ y))
    made = drafter(embedding[None, None], drafter.fuse(state)[None, None], torch.tensor([[7]]))[0, 0]
    torch.testing.assert_close(made, x)
    logits = drafter.lm_head.weight @ normed(x, drafter.norm)
    torch.testing.assert_close(drafter.logits(made), logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("coupled", [True, False])
def test_texts_are_those_of_plain_decoding(family, temperature, coupled):
    """Stops an id that is not the draft vocabulary's, states of other layers, a tree that changes a text."""
    target = deep_target(family)
    prompts = [prompt_of(n) for n in (1, 2, 9)]
    for drafter in (fused_drafter(target), fused_drafter(target, 31, (0, 2, 3))):
        proposer = Fused(drafter, target, coupled)
        sampling = Sampling(temperature, seed=3)
        for size in (TreeSize(4, 4, 15), TreeSize(1, 5, 5)):
            expected = write(target, None, prompts, 24, sampling)
            together = write(target, proposer, prompts, 24, sampling, size)
            assert together.texts == expected.texts
            alone = write(target, proposer, prompts[2:], 24, sampling, size)
            assert temperature or alone.texts[0] == expected.texts[2]
            assert max(cycle.num_drafted for cycle in together.cycles) > 4


@torch.no_grad()
def test_decoding_drafts_what_the_unroll_says():
    """Stops states that are fused one row late, the feature of another layer, an id one place off: the chain
    that decoding proposes is the likeliest of the unroll on the target's own states.
    """
    target = deep_target()
    drafter = fused_drafter(target)
    prompt = prompt_of(12)
    trees = []

    class Watched(Fused):
        def propose(self, states, tree_size):
            trees.extend(made := super().propose(states, tree_size))
            return made

    ids = torch.tensor([prompt])
    states = target.model(ids[:, :-1], output_hidden_states=True).hidden_states
    fused = drafter.fuse(torch.cat([states[layer] for layer in (1, 2, 3)], -1))
    write(target, Watched(drafter, target), [prompt], 8, tree_size=TreeSize(1, 3, 3))
    (output,) = unroll(drafter, target.embed(ids[:, 1:]), fused, None, 1)
    best = drafter.ids[drafter.logits(output[0, -1]).argmax()]
    assert trees[0].tokens.tolist()[:2] == [prompt[-1], int(best)]


def test_layers_and_vocabularies_that_cannot_be_are_refused():
    """Stops layers that are fused twice, which vLLM dies of, and an id that points outside the target."""
    kind, target = kinds.find("eagle3"), deep_target()
    with pytest.raises(CoralError, match=r"would be \[2, 2, 1\], but three different ones of the target's 4"):
        kind.inner(target, kind.Options())
    options = kind.Options()
    named = replace(options, drafter=replace(options.drafter, layers=(0, 1, 3)))
    assert kind.inner(target, named) == (0, 1, 3)
    with pytest.raises(CoralError, match="are not three"):
        fused_drafter(target, layers=(1, 1, 2))
    with pytest.raises(CoralError, match="more than the target's 31"):
        fused_drafter(target, 32)
    drafter = fused_drafter(target)
    tensors = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    for odd in (31, -31):
        with pytest.raises(CoralError, match="d2t does not name 20 of the target's 31 ids"):
            drafter.load_state_dict({**tensors, "d2t": tensors["d2t"] + odd})
    with pytest.raises(CoralError, match=r"the layers \[1, 2, 3\], but llama has 2"):
        drafter.config.check_sizes(Target(tiny_model(), name="llama"))


OPTIONS = Options(
    steps=3,
    drafter=FusedOptions(layers=(1, 2, 3), draft_vocab_size=20),
    loss=FusedLoss(top_k_weight=0.5, top_k=4),
)


def a_batch(target, rows=(0, 1, 2, 3)):
    return feature_batch(target, tiny_data().dataset, rows, (1, 2, 3))


def a_learner(target, options=OPTIONS, **changes):
    kind, options = kinds.find("eagle3"), replace(options, **changes)
    counts = torch.arange(31)
    drafter = kind.new(target, options, a_batch(target), 0, lambda: counts)
    return FusedLearner(drafter.float().train(), options)


def learn(learner, batch, target):
    generator = torch.Generator().manual_seed(0)
    return learner(batch, target.head_weight, target.head_bias, generator)


def test_a_new_drafter_starts_from_the_targets_head_and_sees_all_three_states():
    """Stops a head of other ids than d2t says, a final norm that a family counts from one, a state that
    drowns the others.
    """
    for family in FAMILIES:
        target = deep_target(family)
        drafter = a_learner(target).drafter
        assert drafter.ids.tolist() == list(range(11, 31))  # the most frequent, ascending
        assert drafter.t2d.nonzero().squeeze(1).equal(drafter.ids)
        assert drafter.lm_head.weight.equal(target.head_weight[drafter.ids])
        x = torch.randn(5, 16)
        expected = target.head(target.decoder.norm(x))[:, drafter.ids]
        torch.testing.assert_close(drafter.logits(x), expected, rtol=1e-3, atol=1e-3)
        inner = a_batch(target).inner * torch.tensor([1.0, 30.0, 900.0]).repeat_interleave(16)
        drafter.balance_states(inner)
        for part in range(3):
            alone = torch.zeros_like(inner)
            alone[..., part * 16 : (part + 1) * 16] = inner[..., part * 16 : (part + 1) * 16]
            assert 0.4 < drafter.fuse(alone).square().mean().sqrt() < 0.8


@pytest.mark.parametrize(
    "loss", [{}, {"renormalised": True}, {"candidates": 24}, {"divergence": "lk"}], ids=str
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_batch_is_learnt(loss, precision):
    """Stops targets shifted by a row, a head or states without gradient, ids of another vocabulary."""
    target = deep_target()
    batch = a_batch(target)
    learner = a_learner(
        target, loss=replace(OPTIONS.loss, **loss), alignment=AlignmentConfig(kind="csra", max_rows=8)
    )
    learner.precision = precision
    optimiser, outcomes = torch.optim.AdamW(learner.parameters(), lr=1e-2), []
    for _ in range(40):
        outcome = learn(learner, batch, target)
        outcome.loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in learner.parameters())
        optimiser.step()
        optimiser.zero_grad()
        outcomes.append(outcome)
    first, last = outcomes[0].sums, outcomes[-1].sums
    assert (last["correct"] > first["correct"] + 0.2 * first["rows"]).all()
    assert last["cross_entropy"].sum() < 0.8 * first["cross_entropy"].sum()
    assert 0.3 < last["covered"] / last["rows"][0] < 0.95


def test_a_frozen_head_stays():
    """Stops a head that learns although it is not to, and a process that waits for its gradient."""
    target = deep_target()
    learner = a_learner(target, train_head=False)
    learn(learner, a_batch(target), target).loss.backward()
    assert learner.drafter.lm_head.weight.grad.eq(0).all()
    assert learner.drafter.fc.weight.grad.abs().sum() > 0


def test_candidates_stand_for_all_ids():
    """Stops candidates whose gradient leans to one side: the mean over many draws is that of all ids."""
    target = deep_target()
    batch, gradients = a_batch(target), []
    for count, draws in ((0, 1), (20, 150)):
        learner = a_learner(target, loss=FusedLoss(candidates=count))
        for seed in range(draws):
            generator = torch.Generator().manual_seed(seed)
            learner(batch, target.head_weight, None, generator).loss.backward()
        gradients.append(learner.drafter.lm_head.weight.grad / draws)
    exact, mean = gradients
    assert (mean - exact).norm() < 0.15 * exact.norm()


CONFIG = config_type("eagle3")(
    steps=3,
    batch_size=3,
    accumulate=2,
    drafter=OPTIONS.drafter,
    loss=FusedLoss(candidates=24, aligned_top=9),
    alignment=AlignmentConfig(kind="csra", max_rows=8, target_view=True),
    optimiser=OptimiserConfig(learning_rate=5e-3, matrices="muon"),
    limits=Limits(updates=8),
    reports=Reports(log_every=1, acceptance_every=4),
)


def test_a_run_is_stopped_resumed_and_loaded(tmp_path):
    """Stops a draft vocabulary, a head or moments that a resumed run makes anew, and a checkpoint of integers
    that cannot be read, or is read as weights.
    """
    target = tiny_target(num_layers=4)
    outcome, _ = run(tmp_path / "whole", CONFIG, target)
    run(tmp_path / "parts", CONFIG, target, acceptance=interrupt_at_first)
    assert outcome.update == 8 and checkpoint.load(tmp_path / "parts").ids.shape == (20,)
    run(tmp_path / "parts", CONFIG, target)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole["d2t"].dtype == torch.int64 and whole["t2d"].dtype == torch.bool
    assert whole["lm_head.weight"].dtype == torch.float32
    line = metrics(tmp_path / "whole")[-1]
    assert 0.3 < line["covered"] < 1 and len(line["accuracy"]) == 3
    half = checkpoint.load(tmp_path / "whole", target, dtype=torch.bfloat16)
    assert half.ids.equal(checkpoint.load(tmp_path / "whole").ids) and half.fc.weight.dtype == torch.bfloat16
    told = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert told["architectures"] == ["LlamaForCausalLMEagle3"] and told["draft_vocab_size"] == 20
    assert told["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    started = replace(OPTIONS.drafter, init_drafter=str(tmp_path / "whole"))
    again = new_drafter(target, replace(CONFIG, drafter=started), tiny_data().dataset)
    assert again.state_dict()["lm_head.weight"].equal(whole["lm_head.weight"])
    with pytest.raises(CoralError, match="its draft_vocab_size is 20, but 21 is asked for"):
        odd = replace(CONFIG, drafter=replace(started, draft_vocab_size=21))
        new_drafter(target, odd, tiny_data().dataset)
    tensors = {**whole, "d2t": whole["d2t"].float()}
    save_file(tensors, tmp_path / "whole" / "model.safetensors")
    with pytest.raises(CoralError, match=r"d2t is stored as torch\.float32"):
        checkpoint.load(tmp_path / "whole")


def test_an_engines_file_holds_the_published_names(tmp_path):
    """Stops a tensor that vLLM, SGLang or SafeAILab's code would look for in vain."""
    config = FusedConfig.for_target(deep_target().config, layers=(1, 2, 3), draft_vocab_size=31)
    layer = {f"midlayer.{name}.weight" for name in (
        "input_layernorm", "hidden_norm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
        "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
    published = layer | {"fc.weight", "norm.weight", "lm_head.weight"}
    assert FusedDrafter(config).state_dict().keys() == published  # d2t and t2d only where ids are left out
    few = FusedDrafter(replace(config, draft_vocab_size=20, fc_norm=True))
    assert few.state_dict().keys() - published == {"d2t", "t2d", *(f"fc_norm.{i}.weight" for i in range(3))}
    assert few.midlayer.self_attn.q_proj.weight.shape == (16, 32) and few.fc.weight.shape == (16, 48)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_library_decodes_with_its_directory(tmp_path, temperature):
    """Stops a loader, lookup beside it or a fallback that takes every drafter for one of features."""
    save_target(tmp_path / "target", num_hidden_layers=4)
    target = Target.load(tmp_path / "target")
    drafter = fused_drafter(target, target.vocab_size - 40)
    checkpoint.save(drafter, tmp_path / "drafter", target=TargetRecord.of(target))
    options = {"temperature": temperature, "max_new_tokens": 40, "ignore_eos": True}
    expected = coral.load(tmp_path / "target").generate("a coral reef", **options)
    for source, fallback in ((tmp_path / "drafter", True), (f"{tmp_path / 'drafter'}+ngram", False)):
        pair = coral.load(tmp_path / "target", source, fallback=fallback)
        assert pair.generate("a coral reef", **options) == expected
    found = acceptance(target, checkpoint.load(tmp_path / "drafter"), [[5, 6, 7]], 8)
    assert found.keys() == {"chain", "tree"}
    assert not write_export.lacks("vllm", checkpoint.read_config(tmp_path / "drafter"))
    assert "a small network that proposes tokens" in card(tmp_path / "drafter", "me/eagle3")


TOGETHER = replace(CONFIG, batch_size=2, optimiser=OptimiserConfig(learning_rate=5e-3))


def half_of_it(output, environment):
    os.environ.update(environment)
    torch.set_num_threads(1)
    run(output, replace(TOGETHER, train_head=output.name != "frozen"), tiny_target(num_layers=4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name, environment", [("ddp", {}), ("frozen", {}), ("fsdp2", FSDP)], ids=str)
def test_two_processes_learn_what_one_does(tmp_path, monkeypatch, name, environment):
    """Stops a head whose gradient is not exchanged or stays on its shard, and ids that processes average."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = replace(TOGETHER, accumulate=4, train_head=name != "frozen")
    in_two_processes(half_of_it, tmp_path / name, environment)
    run(tmp_path / "one", alone, tiny_target(num_layers=4))
    ours, theirs = weights(tmp_path / name), weights(tmp_path / "one")
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_steps_draft_the_same(traced):
    """Stops padding rows that are attended to, and a draft step that is traced with states, not features."""
    target, size = deep_target(), TreeSize(top_k=3, max_depth=3, num_nodes=6)
    fast = target.on("graphs", (1, 7))
    drafter = fused_drafter(target)
    eager, padded = Recorder(Fused(drafter, target)), Recorder(Fused(drafter, fast))
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        for one, proposer in ((target, eager), (fast, padded)):
            text = write(one, proposer, [prompt_of(9)], 24, sampling, size).texts
            assert text == write(target, None, [prompt_of(9)], 24, sampling).texts
    assert padded.trees == eager.trees
