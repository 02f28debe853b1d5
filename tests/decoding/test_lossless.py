"""With one seed accelerated output is plain output, whatever is drafted, and it has the target's law."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import (
    HEADS,
    Bushes,
    Oracle,
    Recorder,
    V,
    Wrong,
    new_state,
    prompt_of,
    random_drafter,
    soft_target,
    write,
)
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from coral.decoding.cycle import acceptance_length, generate
from coral.decoding.merged import Merged
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.drafters.feature.propose import Feature
from coral.drafters.lookup import NGram
from coral.target.forward import ModelForward
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize

TREE_SIZE = TreeSize(top_k=3, max_depth=4, num_nodes=10)
SAMPLINGS = {
    "T=0": Sampling(seed=5),
    "T=0.7": Sampling(0.7, seed=5),
    "T=1": Sampling(1.0, seed=5),
    "T=0.7 top-p": Sampling(0.7, top_p=0.8, seed=5),
    "T=1 top-k top-p": Sampling(1.0, top_k=4, top_p=0.9, seed=5),
}
PROPOSERS = {
    "random": lambda target, texts: random_drafter(target),
    "random, not coupled": lambda target, texts: random_drafter(target, coupled=False),
    "ngram": lambda target, texts: NGram(2),
    **{
        name: lambda target, texts, head=head: Feature(random_drafter(target).drafter, target, head(target))
        for name, head in HEADS.items()
    },
    "merged, in context": lambda target, texts: Merged(
        Feature(random_drafter(target).drafter, target, HEADS["in context"](target)), NGram(2)
    ),
    "merged": lambda target, texts: Merged(random_drafter(target), NGram(2)),
    "bushes": lambda target, texts: Bushes(texts, target.vocab_size),
    "oracle": lambda target, texts: Oracle(texts, target.vocab_size),
    "wrong": lambda target, texts: Wrong(texts, target.vocab_size),
}
PROMPTS = [prompt_of(9), prompt_of(1), prompt_of(17)]
TAU = {"oracle": TREE_SIZE.max_depth + 1.0, "wrong": 1.0}


@pytest.fixture(params=SAMPLINGS)
def sampling(request):
    return SAMPLINGS[request.param]


@pytest.fixture(scope="module")
def plain():
    """Plain texts of three prompts of different length, each written alone; computed once a sampling."""
    target, known = soft_target(V), {}

    def texts(sampling):
        if sampling not in known:
            known[sampling] = []
            for i, prompt in enumerate(PROMPTS):
                state = new_state(target, prompt, 15, sampling, sequence_id=i)
                for _ in generate(target, Plain(), [state], TREE_SIZE):
                    pass
                known[sampling].append(state.tokens)
        return known[sampling]

    return texts


@pytest.mark.parametrize("name", PROPOSERS)
def test_accelerated_output_is_plain_output(plain, sampling, name):
    """Stops any draft from showing in the text; three sequences in one batch, each equal to itself alone."""
    target, expected = soft_target(V), plain(sampling)
    assert sampling.temperature == 0 or len(set(expected[0])) > 8
    written = write(target, PROPOSERS[name](target, expected), PROMPTS, 15, sampling, TREE_SIZE)
    assert written.texts == expected
    assert name not in TAU or acceptance_length(written.cycles) == TAU[name]
    if name == "bushes":
        assert 1.2 < acceptance_length(written.cycles) < 4


def test_seed_and_sequence_choose_the_text(plain):
    """Stops a seed that is ignored, and samples of one prompt that are all alike."""
    target, seeds = soft_target(V), [Sampling(1.0, seed=seed) for seed in (5, 5, 6)]
    first, again, other = [write(target, None, [PROMPTS[0]] * 2, 15, sampling).texts for sampling in seeds]
    assert first == again and first[0] == plain(seeds[0])[0]
    assert len({tuple(text) for text in first + other}) == 4


def test_each_sequence_of_a_batch_has_its_own_sampling(plain):
    """Stops one temperature, seed or end for the whole batch; sequences leave it at different times."""
    target, kinds = soft_target(V), list(SAMPLINGS.values())[:3]
    texts = [plain(sampling)[i] for i, sampling in enumerate(kinds)]
    states = [
        new_state(target, prompt, new, sampling, sequence_id=i)
        for i, (prompt, new, sampling) in enumerate(zip(PROMPTS, (15, 4, 11), kinds, strict=True))
    ]
    sizes = [len(cycles) for cycles in generate(target, Bushes(texts, V), states, TREE_SIZE)]
    for state, text in zip(states, texts, strict=True):
        assert state.tokens == text[: len(state.tokens)] and state.remaining == 0
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 3 and sizes[-1] == 1


@pytest.mark.parametrize("name", ["oracle", "bushes", "wrong"])
@pytest.mark.parametrize("end", ["length", "eos", "stop"])
def test_ends_inside_a_path(plain, name, end):
    """Stops tokens behind the end, a cache that holds them, and cut cycles counted in tau."""
    target, text = soft_target(V), plain(SAMPLINGS["T=1"])[0]
    start, answer = len(PROMPTS[0]), text[len(PROMPTS[0]) :]
    for n in (1, 2, 4, 5, 6, 9):
        options = {
            "length": {"new": n},
            "eos": {"new": 15, "eos_ids": frozenset([answer[n - 1], V + 7])},
            "stop": {"new": 15, "stop": lambda written, n=n: written[-2:] == answer[max(0, n - 2) : n]},
        }[end]
        proposer = PROPOSERS[name](target, [text])
        expected = write(target, None, [PROMPTS[0]], sampling=SAMPLINGS["T=1"], **options)
        written = write(
            target, proposer, [PROMPTS[0]], sampling=SAMPLINGS["T=1"], tree_size=TREE_SIZE, **options
        )
        assert written.texts == expected.texts == [text[: len(written.texts[0])]]
        assert len(written.texts[0]) <= start + n
        assert sum(len(cycle.tokens) for cycle in written.cycles) == len(written.texts[0]) - start
        assert all(cycle.cut == (len(cycle.tokens) <= cycle.num_accepted) for cycle in written.cycles)
        assert not any(cycle.cut for cycle in written.cycles[:-1])
        if name == "oracle" and end == "length":
            assert [len(cycle.tokens) for cycle in written.cycles] == [5] * (n // 5) + [n % 5] * (n % 5 > 0)


# The law, and planted bugs.

TEXTS, SMALL = 1000, 5
PROMPT = [3]  # one token: nothing is to be read before the first cycle


class Fixed:
    """The same tree in every cycle: four ids below the root, and two more below the first of them."""

    layers = ()

    def propose(self, states, tree_size):
        parents = torch.tensor([-1, 0, 0, 0, 0, 1, 1])
        return [
            DraftTree(torch.tensor([state.tokens[-1], 2, 0, 1, 3, 4, 0]), parents, torch.zeros(7))
            for state in states
        ]


def two_tokens(proposer, sampling):
    """The first two tokens of many texts, which differ in their sequence id alone."""
    target = soft_target(SMALL)
    states = [new_state(target, PROMPT, 2, sampling, sequence_id=i) for i in range(TEXTS)]
    for first in range(0, TEXTS, 50):
        for _ in generate(target, proposer, states[first : first + 50], TreeSize(4, 4, 15)):
            pass
    return [tuple(state.written) for state in states]


@torch.no_grad()
def exact_law(sampling):
    """[V, V] probabilities of the first two tokens, by Hugging Face's model and warpers."""
    model = soft_target(SMALL).model
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    first = warpers(None, model(torch.tensor([PROMPT])).logits[:, -1]).double().softmax(-1)[0]
    second = model(torch.tensor([[*PROMPT, i] for i in range(SMALL)])).logits[:, -1]
    return first[:, None] * warpers(None, second).double().softmax(-1)


def p_value(pairs, law):
    """Of the chi-square test; pairs expected fewer than 5 times share a cell."""
    counts = torch.zeros(SMALL, SMALL, dtype=torch.float64)
    for a, b in pairs:
        counts[a, b] += 1
    rare = law * len(pairs) < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([law[~rare], law[rare].sum()[None]]) * len(pairs)
    if expected[-1] < 1:  # nothing or next to nothing is left for the shared cell
        assert observed[-1] <= 5
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


LAWS = {"T=1": Sampling(1.0, seed=3), "T=0.7 top-p": Sampling(0.7, top_p=0.85, seed=3)}


@pytest.fixture(scope="module")
def counted():
    """Plain texts, once for each law."""
    return {name: two_tokens(Plain(), sampling) for name, sampling in LAWS.items()}


@pytest.mark.parametrize("name", LAWS)
def test_law_is_the_targets(counted, name):
    """Stops a bias of the sampler or of the walk. Never flakes: seeds are fixed, bound p = 1e-4."""
    law = exact_law(LAWS[name])
    assert law.sum().item() == pytest.approx(1.0) and (law > 0.01).sum() > 8
    accelerated = two_tokens(Fixed(), LAWS[name])
    assert accelerated == counted[name]
    assert p_value(accelerated, law) > 1e-4


def emit_the_draft(monkeypatch):
    """A walk that takes the first drafted child, whatever the target says."""
    monkeypatch.setattr(DraftTree, "walk", lambda tree, samples: [0, 1])


def wrong_position(monkeypatch):
    """Rows behind the prompt stand three positions too far."""
    forward = ModelForward._forward

    def shifted(target, ids, positions, *rest, **named):
        positions = torch.where(positions >= len(PROMPT), positions + 3, positions)
        return forward(target, ids, positions, *rest, **named)

    monkeypatch.setattr(ModelForward, "_forward", shifted)


def sibling_seen(monkeypatch):
    """Every row sees all rows before it."""
    monkeypatch.setattr(
        DraftTree, "mask", property(lambda tree: torch.ones(len(tree), len(tree)).tril().bool())
    )
    monkeypatch.setattr(DraftTree, "depth", property(lambda tree: torch.tensor([0, 1, 1, 1, 1, 2, 2])))


@pytest.mark.parametrize("plant", [emit_the_draft, wrong_position, sibling_seen])
def test_planted_bug_is_caught_twice(counted, monkeypatch, plant):
    """Stops a guard that guards nothing: equality and chi-square must each see the bug."""
    plant(monkeypatch)
    planted = two_tokens(Fixed(), LAWS["T=1"])
    monkeypatch.undo()
    assert planted != counted["T=1"]
    assert p_value(planted, exact_law(LAWS["T=1"])) < 1e-4


# Coupled drafting.


class Knowing(torch.nn.Module):
    """A drafter with q = p, for a target whose next token depends on the last token alone."""

    def __init__(self, target):
        super().__init__()
        self.target, self.layers = target, [None]

    def forward(self, embeddings, features, positions, cache, mask):
        rows = torch.zeros(1, 1, embeddings.shape[1], 1)
        cache[0].update(rows, rows)
        each = embeddings[0][:, None]  # every row is a sequence of its own
        return self.target.decoder(inputs_embeds=each, use_cache=False).last_hidden_state[None, :, 0]

    def feedback(self, draft_features):
        return draft_features


@pytest.fixture(scope="module")
def forgetful():
    """Without attention a feature depends on its own token alone."""
    target = Target(soft_target(V).model)
    with torch.no_grad():
        for layer in target.decoder.layers:
            layer.self_attn.o_proj.weight.zero_()
    return target


def test_coupled_drafter_with_the_targets_law_drafts_what_is_sampled(forgetful, sampling):
    """Stops noise of another position, temperature or sequence: with q = p every draft must be accepted."""
    tree_size = TreeSize(top_k=1, max_depth=4, num_nodes=4)
    proposer = Feature(Knowing(forgetful), forgetful)
    prompts = [prompt_of(5), prompt_of(8)]
    written = write(forgetful, proposer, prompts, 15, sampling, tree_size)
    assert written.texts == write(forgetful, None, prompts, 15, sampling).texts
    assert acceptance_length(written.cycles) == 5.0
    assert write(forgetful, proposer, prompts, 15, sampling, TREE_SIZE).texts == written.texts


def test_coupling_can_be_switched_off(forgetful):
    """Stops a switch that does nothing: without the noise many draft tokens are refused."""
    tree_size, sampling = TreeSize(top_k=1, max_depth=4, num_nodes=4), Sampling(1.0, seed=5)
    coupled, independent = (
        write(
            forgetful,
            Feature(Knowing(forgetful), forgetful, coupled=c),
            [prompt_of(5)],
            25,
            sampling,
            tree_size,
        )
        for c in (True, False)
    )
    assert coupled.texts == independent.texts
    assert math.isclose(acceptance_length(coupled.cycles), 5.0)
    assert acceptance_length(independent.cycles) < 3.0


def test_a_level_that_will_hardly_be_reached_is_not_drafted():
    """Stops a rule that reads another level's scores, and a depth that is cut although likely."""
    target = soft_target(V)
    proposer, state = random_drafter(target), new_state(target, prompt_of(9), 20)
    state.prefill(target, (-1,))
    rows = state.unread

    def grown(min_gain: float) -> DraftTree:
        state.unread = rows  # the prompt is read again
        (tree,) = proposer.propose([state], TreeSize(3, 4, 99, min_gain))
        return tree

    whole = grown(0.0)
    reached = [float(whole.scores[whole.depth == depth].max().exp()) for depth in range(1, 4)]
    assert reached == sorted(reached, reverse=True) and whole.num_forwards == 4
    for depth, mass in enumerate(reached, 1):
        assert grown(mass * 0.99).num_forwards > depth
        assert grown(mass * 1.01).num_forwards == depth


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_sequences_together_grow_the_trees_that_they_grow_alone(name, coupled):
    """Stops a draft step in which sequences see each other, or one's ending that stops or shifts another."""
    target = soft_target(V)
    prompts, lengths = [prompt_of(n, seed=n) for n in (1, 3, 9)], (12, 20, 7)

    def trees(*members):
        recorder = Recorder(random_drafter(target, coupled=coupled))
        states = [new_state(target, prompts[i], lengths[i], SAMPLINGS[name], sequence_id=i) for i in members]
        for _ in generate(target, recorder, states, replace(TREE_SIZE, min_gain=0.1)):
            pass
        return recorder.trees

    together = trees(0, 1, 2)
    assert together == {**trees(0), **trees(1), **trees(2)}
    assert any(len(tokens) > 1 for tokens, _ in together[2])
