"""The target's forward in one native call against its slow twin, transformers' own code."""

import shutil

import pytest
import tiny
import torch
from tiny import Bushes, prompt_of, random_tree, root_path, tiny_model, tree_of, write

from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import State
from coral.errors import CoralError
from coral.target.grouped_sdpa import GROUPED_SDPA
from coral.target.native import why_not_native
from coral.target.target import Target
from coral.tree import TreeSize

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")

SIZES = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 48}
KINDS = [
    "llama",
    "llama-tied",
    "llama-ungrouped",
    "llama-llama3",
    "mistral",
    "mistral-sliding",
    "qwen2",
    "qwen2-sliding",
    "qwen3",
    "qwen3-sliding",
    "gemma3",
    "phi3",
    "phi3-sliding",
    "phi3-partial",
    "phi3-longrope",
    "olmo2",
]
LONGROPE = tiny.LONGROPE | {"short_factor": [1 + i / 9 for i in range(8)], "long_factor": [9.0] * 8}
CHANGES = {"phi3-longrope": {"rope_parameters": LONGROPE}}  # whose factors are as many as numbers that turn
DTYPES = [torch.float32, torch.bfloat16]


def targets(kind="llama", dtype=torch.float32, attention=GROUPED_SDPA, **changes):
    """A target as it is, and with its native forward."""
    changes = SIZES | CHANGES.get(kind, {}) | changes
    slow = Target(tiny_model(kind, attention, **changes).bfloat16().to(dtype))
    return slow, slow.on()


def states_of(target, lengths, room=40):
    states = [
        State(prompt_of(n, seed=n), n + room, target.new_cache(n + room), sequence_id=i)
        for i, n in enumerate(lengths)
    ]
    for state in states:
        state.prefill(target, (-1,))
    return states


def caches(states):
    return [state.cache for state in states]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_features_and_cache_are_the_models(kind, dtype):
    """Stops: a bias, a norm or a scale that is left out, heads on another head's keys, rotation at the node's
    index instead of its depth, and a node that sees a sibling or another sequence.
    """
    slow, fast = targets(kind, dtype)
    exact, _ = targets(kind)
    assert fast._native is not None
    for lengths, sizes in (((9,), (1,)), ((1,), (8,)), ((14, 2, 23), (8, 1, 17))):
        trees = [random_tree(size, seed=size) for size in sizes]
        results = []
        for target in (slow, fast, exact):
            states = states_of(target, lengths)
            logits, features = target.verify(caches(states), trees)
            rows = [rows[:, :, : state.cache.length] for state in states for rows in state.cache.storage]
            assert [state.cache.length for state in states] == [
                n - 1 + size for n, size in zip(lengths, sizes, strict=True)
            ]
            results.append([*logits, *features, *rows])
        for model, own, wide in zip(*results, strict=True):
            assert own.dtype == dtype and own.shape == model.shape
            if dtype == torch.float32:
                torch.testing.assert_close(own, model, rtol=1e-4, atol=1e-4)
            else:
                assert (own - model).float().norm() <= 2 * (wide - model).norm() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, size", [((4, 4), 48), ((4, 2), 64), ((6, 1), 16), ((12, 1), 32)])
def test_heads_of_any_size_and_group(heads, size, dtype):
    """Stops a query head on the wrong key head, and a group or a head that fills no vector or several."""
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": size}
    slow, fast = targets("llama", dtype, **sizes)
    exact, _ = targets("llama", **sizes)
    trees = [random_tree(11, seed=3), random_tree(4, seed=5)]
    model, own, wide = (
        torch.cat(target.verify(caches(states_of(target, (21, 5))), trees)[0])
        for target in (slow, fast, exact)
    )
    if dtype == torch.float32:
        torch.testing.assert_close(own, model, rtol=1e-4, atol=1e-4)
    else:
        assert (own - model).float().norm() <= 2 * (wide - model).norm() + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_rounded_where_the_model_rounds(kind):
    """Stops an operation that rounds nowhere, or twice. Attention, where kernels differ, has one key here."""
    slow, fast = targets(kind, torch.bfloat16)
    same = []
    for token in range(20):
        results = [
            target.verify(caches(states_of(target, [1])), [tree_of([token], [-1])]) for target in (slow, fast)
        ]
        same += [(own == model).float().mean() for (model,), (own,) in zip(*results, strict=True)]
    assert sum(same) / len(same) > 0.99


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 70])
def test_pairs_and_the_matrix_unit_compute_what_vectors_do(kind, rows):
    """Stops a tile of the wrong shape: rows above 16 or 32, inputs or outputs that do not fill one."""
    sizes = {"hidden_size": 272, "head_dim": 16, "intermediate_size": 304, "vocab_size": 77}
    fast = Target(tiny_model(kind, GROUPED_SDPA, **sizes).bfloat16()).on("native")
    if fast._native._job.unit == 0:
        pytest.skip("nothing here multiplies bfloat16")
    tree, results = random_tree(rows, seed=rows), []
    for unit in (fast._native._job.unit, 0):
        fast._native._job.unit = unit
        logits, features = fast.verify(caches(states_of(fast, [9], room=90)), [tree])
        results.append(torch.cat([logits[0], features[0]], 1).float())
    own, by_vectors = results
    assert (own - by_vectors).norm() < 0.02 * by_vectors.norm()


@pytest.mark.parametrize("kind", ["gemma3", "llama", "mistral-sliding", "phi3-sliding", "olmo2"])
def test_eager_attention_is_the_same_in_float32(kind):
    """Stops a model that eager attention keeps from being run here, though nothing is rounded between."""
    slow, fast = targets(kind, attention="eager")
    assert fast._native is not None
    tree = random_tree(9)
    (model,), (own,) = (target.verify(caches(states_of(target, [12])), [tree])[0] for target in (slow, fast))
    torch.testing.assert_close(own, model, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "phi3-sliding", "olmo2"])
def test_a_row_does_not_depend_on_the_rows_beside_it(kind, dtype):
    """Stops a verification that rounds otherwise than plain steps, so that ties fall otherwise."""
    _, fast = targets(kind, dtype)
    (state,), tokens = states_of(fast, [9]), prompt_of(7, seed=2)
    chain = tree_of(tokens, range(-1, len(tokens) - 1))
    together = fast.verify([state.cache], [chain])
    state.cache.keep(8)
    alone = [fast.verify([state.cache], [tree_of([token], [-1])]) for token in tokens]
    for (rows,), steps in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(rows, torch.cat([row for (row,) in steps]))
    batch = states_of(fast, [4, 9, 2])
    (_, rows, _), _ = fast.verify(caches(batch), [random_tree(5), chain, random_tree(9)])
    assert torch.equal(rows, together[0][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2, 40, 94])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "phi3-sliding", "olmo2"])
def test_a_prompt_is_read_as_its_tokens_are_written(kind, length, dtype, monkeypatch):
    """Stops a prompt's rows, or a long prompt's pieces, that are not those of plain steps over its tokens;
    and a window that is another for rows that attend together.
    """
    monkeypatch.setattr("coral.decoding.state._PREFILL_CHUNK", 70)
    _, fast = targets(kind, dtype)
    assert fast._native is not None
    tokens = prompt_of(length)
    read, written = (State(tokens, length + 9, fast.new_cache(length + 9)) for _ in range(2))
    read.prefill(fast, (-1,))
    steps = [fast.verify([written.cache], [tree_of([token], [-1])])[1][0] for token in tokens[:-1]]
    assert torch.equal(read.unread.features, torch.cat(steps))
    for one, other in zip(read.cache.storage, written.cache.storage, strict=True):
        assert torch.equal(one[:, :, : length - 1], other[:, :, : length - 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi3-sliding", "phi3-partial", "olmo2"])
def test_a_node_does_not_depend_on_other_branches(kind, dtype):
    """Stops sums over keys whose order follows the places of a path's rows in the cache, and a window that
    is counted in places, not in positions.
    """
    _, fast = targets(kind, dtype)
    for seed in range(8):
        (state,), tree = states_of(fast, [20 + seed]), random_tree(12, seed=seed)
        (logits,), (features,) = fast.verify([state.cache], [tree])
        for node in range(len(tree)):
            state.cache.keep(19 + seed)
            path = tree.tokens[root_path(tree, node)].tolist()
            steps = [fast.verify([state.cache], [tree_of([token], [-1])]) for token in path]
            assert torch.equal(steps[-1][0][0][0], logits[node])
            assert torch.equal(steps[-1][1][0][0], features[node])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "mistral-sliding", "phi3-sliding", "olmo2"])
def test_texts_stay_the_same(kind, sequences, dtype):
    """Stops a forward that loses rows when a cache grows or is cut, or of a prompt of one token; also with
    trees of many rows.
    """
    slow, fast = targets(kind, dtype)
    for length, sampling in ((1, Sampling()), (9, Sampling(1.0, seed=3))):
        prompts = [prompt_of(length + i, seed=i) for i in range(sequences)]
        plain = write(fast, Plain(), prompts, 40, sampling)
        bushes = Bushes(plain.texts)
        assert write(fast, bushes, prompts, 40, sampling, TreeSize(4, 4, 9)).texts == plain.texts
        if dtype == torch.float32:
            assert write(slow, Plain(), prompts, 40, sampling).texts == plain.texts
            many = TreeSize(4, 4, 64)
            assert write(fast, bushes, prompts, 40, sampling, many).texts == plain.texts


def test_threads_share_the_work():
    """Stops parts of a product that no thread does, and threads that read before others have written."""
    _, fast = targets()
    tree, results = random_tree(13), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(fast.verify(caches(states_of(fast, [11])), [tree])[0][0])
    finally:
        torch.set_num_threads(1)
    for logits in results[1:]:
        torch.testing.assert_close(logits, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama-dynamic", {}),
        ("llama", {"attention": "eager", "dtype": torch.bfloat16}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 8}),
        ("llama", {"dtype": torch.float16}),
    ],
)
def test_what_it_cannot_run_is_left_to_transformers(kind, changes):
    """Stops a model that is run wrongly in silence."""
    slow, fast = targets(kind, **changes)
    assert why_not_native(slow) and fast.backend == "transformers"
    with pytest.raises(CoralError, match="cannot run natively: "):
        slow.on("native")


def test_code_that_is_not_transformers_own_is_left_to_transformers():
    """Stops a model that bears a family's name and does something else: adapters, or remote code."""
    slow, _ = targets()
    linear = slow.decoder.layers[1].mlp.up_proj
    linear.__class__ = type("Adapted", (torch.nn.Linear,), {})
    assert why_not_native(slow)
    linear.__class__ = torch.nn.Linear
    assert why_not_native(slow) is None
    slow.model.__class__ = type("Remote", (type(slow.model),), {"__module__": "elsewhere"})
    assert why_not_native(slow)
