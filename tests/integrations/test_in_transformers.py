"""`model.generate(custom_generate=coral.for_transformers(...))` returns what `model.generate` returns."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lossless import p_value
from tiny import Bushes, Oracle, prompt_of, soft_target, tiny_model
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

import coral
from coral.drafters import checkpoint
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.errors import CoralError
from coral.target.default import DRAFTER, TOY
from coral.target.target import Target

NEW = 14
TREE_SIZE = coral.TreeSize(top_k=3, max_depth=4, num_nodes=9)
KINDS = (
    "llama",
    "llama-tied",
    "llama-dynamic",
    "mistral-sliding",
    "qwen2-sliding",
    "qwen3",
    "phi3-partial",
    "olmo2",
    "gemma3",
)


def drafter_of(model: PreTrainedModel) -> Drafter:
    torch.manual_seed(1)
    return Drafter(DrafterConfig.for_target(model.config))


def faster(drafter: Any, **options: Any) -> Any:
    """Whether drafting pays must not depend on the clock: then a test would not always test the same."""
    return coral.for_transformers(drafter, tree=TREE_SIZE, fallback=False, **options)


def batch(lengths: tuple[int, ...] = (9, 4, 7)) -> dict[str, Tensor]:
    """Prompts of these lengths, padded on the left with an id that also occurs in texts."""
    width = max(lengths)
    rows = [[0] * (width - n) + prompt_of(n) for n in lengths]
    mask = [[0] * (width - n) + [1] * n for n in lengths]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def oracle(
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    kind: type[Oracle] = Oracle,
) -> Any:
    """A function that drafts what the model would write, so that every end falls inside a path; with Bushes
    only now and then, so that some texts run ahead of others.
    """
    texts = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 40), value=1).bool()
    rows = [text[keep].tolist() for text, keep in zip(texts, mask, strict=True)]
    monkeypatch.setattr("coral.drafters.drafting.Drafting.proposer", lambda *_: kind(rows))
    return faster("ngram")


def early_end(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """An id that each text holds elsewhere, or not at all: as an end token, texts differ in length."""
    texts = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:].tolist()

    def lengths(end: int) -> list[int]:
        return [text.index(end) if end in text else NEW for text in texts]

    return max(
        sorted({i for text in texts for i in text}), key=lambda i: (len({*lengths(i)}), min(lengths(i)))
    )


@pytest.mark.parametrize("drafting", ["drafter", "oracle"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_are_those_of_generate(
    kind: str, drafting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops wrong positions or masks under padding, ends that are missed inside a path, and wrong padding."""
    model, inputs = tiny_model(kind), batch()
    function = faster(drafter_of(model)) if drafting == "drafter" else oracle(monkeypatch, model, inputs)
    end = early_end(model, inputs)
    for options in ({}, {"eos_token_id": end}, {"eos_token_id": [end, 30], "pad_token_id": 3}):
        asked = {**inputs, "max_new_tokens": NEW, "do_sample": False, **options}
        expected = model.generate(**asked)
        written = model.generate(**asked, custom_generate=function)
        assert torch.equal(written, expected) and written.dtype == expected.dtype, options
    assert (expected[:, -1] == 3).any() and (expected[:, -2:] != 3).any(), "nothing is padded"
    # Without a mask, one text, and with a result that is named.
    alone = {"inputs": torch.tensor([prompt_of(1)]), "max_length": 20, "do_sample": False}
    named = model.generate(**alone, custom_generate=faster("ngram"), return_dict_in_generate=True)
    assert torch.equal(named.sequences, model.generate(**alone))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_is_left_as_it_was(attention: str) -> None:
    """Stops a model that cannot be trained any more, runs another kernel, or copies a drafter with itself."""
    model = tiny_model("llama", attention)
    before = set(model.__dict__)
    asked = {**batch((6,)), "max_new_tokens": 4, "do_sample": False}
    drafter = drafter_of(model)
    expected = model.generate(**asked)
    assert torch.equal(model.generate(**asked, custom_generate=faster(drafter)), expected)
    assert model.config._attn_implementation == attention
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {type(module) for module in model.modules()} == {type(m) for m in tiny_model().modules()}
    assert set(model.__dict__) - before == {"_coral"} and len(model._coral) == 1
    with pytest.raises(CoralError, match="repetition_penalty"):
        model.generate(**asked, repetition_penalty=1.2, custom_generate=faster(drafter))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied._coral == {}
        assert torch.equal(copied.generate(**asked, custom_generate=faster(drafter)), expected)


def test_a_kernel_that_takes_no_tree_is_replaced_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a refusal of models loaded for flash attention, and a kernel that stays replaced on failure."""
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    asked = {**batch((6,)), "max_new_tokens": 4, "do_sample": False}
    written = model.generate(**asked, custom_generate=faster("ngram"))
    assert torch.equal(written, tiny_model().generate(**asked))
    monkeypatch.setattr("coral.integrations.transformers.hook.decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(**asked, custom_generate=faster("ngram"))
    assert model.config._attn_implementation == "flash_attention_2"


class Heard(StoppingCriteria):
    """Ends texts by a rule, and notes what it was asked about."""

    def __init__(self, rule: Any) -> None:
        self.rule, self.asked = rule, []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        assert scores is None
        self.asked.append(input_ids.tolist())
        return torch.as_tensor(self.rule(input_ids))


class EosOnTheSecond(StoppingCriteria):
    """A criterion with end tokens that is not transformers' own: texts end at the second one."""

    def __init__(self, end: int) -> None:
        self.eos_token_id = torch.tensor([end])

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (input_ids[:, 9:] == self.eos_token_id).sum(-1) >= 2


RULES = {
    "one text": lambda ids: torch.tensor([ids.shape[1] >= 12, False, False])[: len(ids)],
    "all at once": lambda ids: torch.full((len(ids),), bool((ids[:, -1] % 2 == 0).all())),
    "what was written": lambda ids: (ids[:, 9:] == 22).sum(-1) >= 2,
    "at once": lambda ids: torch.ones(len(ids), dtype=torch.bool),
}


@pytest.mark.parametrize("eos", [True, False], ids=["end tokens", "none"])
@pytest.mark.parametrize("rule", RULES)
def test_criteria_are_asked_what_generate_asks(rule: str, eos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a criterion that sees drafts, misses a token, or sees texts of different steps in one batch."""
    model, inputs = tiny_model(), batch()
    function = oracle(monkeypatch, model, inputs, Bushes)
    asked = {**inputs, "max_new_tokens": NEW, "do_sample": False}
    asked["eos_token_id"] = early_end(model, inputs) if eos else None
    theirs, ours = Heard(RULES[rule]), Heard(RULES[rule])
    expected = model.generate(**asked, stopping_criteria=[theirs])
    written = model.generate(**asked, stopping_criteria=[ours], custom_generate=function)
    assert torch.equal(written, expected)
    assert ours.asked == theirs.asked


def test_other_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops an end that only our own loop knows from being taken for all there is."""
    model, inputs = tiny_model(), batch()
    function = oracle(monkeypatch, model, inputs)
    common = {**inputs, "do_sample": False}
    end = early_end(model, inputs)
    for options in (
        {"max_length": 12},
        {"max_new_tokens": 1},
        {"max_new_tokens": NEW, "max_time": 0.0},
        {"max_new_tokens": NEW, "stopping_criteria": [EosOnTheSecond(end)], "pad_token_id": 0},
        {"max_new_tokens": NEW, "stopping_criteria": [EosTokenCriteria(end)], "pad_token_id": 0},
        {"generation_config": GenerationConfig(max_new_tokens=3, eos_token_id=end, pad_token_id=2)},
    ):
        expected = model.generate(**common, **options)
        assert torch.equal(model.generate(**common, **options, custom_generate=function), expected), options


def test_stop_strings() -> None:
    """Stops text behind a stop string, in both of the ways in which one can be asked for."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    asked = {**batch((9, 9)), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    text = tokenizer.decode(model.generate(**asked)[0, 9:])
    stop = text[len(text) // 3 :][:2]
    expected = model.generate(**asked, stop_strings=stop, tokenizer=tokenizer)
    assert expected.shape[1] < 39 or (expected[0] == 0).any()
    function = faster("ngram", tokenizer=tokenizer)
    assert torch.equal(model.generate(**asked, stop_strings=stop, custom_generate=function), expected)
    criterion = StopStringCriteria(tokenizer, stop)
    written = model.generate(**asked, stopping_criteria=[criterion], custom_generate=faster("ngram"))
    assert torch.equal(written, expected)
    with pytest.raises(CoralError, match=r"for_transformers\(drafter, tokenizer\)"):
        model.generate(**asked, stop_strings=stop, custom_generate=faster("ngram"))


LAWS = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.5},
    "all": {"top_k": 4, "top_p": 0.8, "temperature": 1.5},
}


@torch.no_grad()
def law(model: PreTrainedModel, prompt: list[int], options: dict[str, Any]) -> Tensor:
    """The probability [V, V] of every two tokens, by transformers' own processors."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.get("temperature", 1.0))])
    warpers += [TopKLogitsWarper(options["top_k"])] if options["top_k"] else []
    warpers += [TopPLogitsWarper(options["top_p"])] if "top_p" in options else []

    def following(text: list[int]) -> Tensor:
        ids = torch.tensor([text])
        return warpers(ids, model(ids).logits[:, -1]).double().softmax(-1)[0]

    first = following(prompt)
    return torch.stack([first[a] * following([*prompt, a]) for a in range(len(first))])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_sampling_has_the_law_of_generate(name: str) -> None:
    """Stops a wrong temperature, a lost top-k or top-p, texts of a batch that share their noise, and seeds
    that are not independent. Chi-square over both tokens: a right sampler fails for one seed in 10^4, and
    this one is fixed.
    """
    model = soft_target().model
    prompt = prompt_of(6, vocab_size=5)
    function = coral.for_transformers(drafter_of(model), tree=coral.TreeSize(2, 1, 2), fallback=False)
    torch.manual_seed(11)
    asked = {"max_new_tokens": 2, "do_sample": True, "num_return_sequences": 20, **LAWS[name]}
    pairs = []
    for _ in range(20):
        written = model.generate(torch.tensor([prompt]), **asked, custom_generate=function)
        pairs += written[:, 6:].tolist()
    expected = law(model, prompt, LAWS[name])
    assert all(expected[a, b] > 0 for a, b in pairs)
    assert p_value(pairs, expected) > 1e-4
    for other in LAWS.keys() - {name}:  # these pairs are enough to tell the laws apart
        assert p_value(pairs, law(model, prompt, LAWS[other]).clamp(min=1e-3)) < 1e-4, other


def test_seeds_come_from_torch() -> None:
    """Stops samples that cannot be repeated, that repeat unasked, or greedy texts that consume randomness."""
    model = tiny_model()
    asked = {**batch(), "max_new_tokens": 8, "do_sample": True, "custom_generate": faster(drafter_of(model))}
    torch.manual_seed(5)
    first, second = model.generate(**asked), model.generate(**asked)
    torch.manual_seed(5)
    assert torch.equal(model.generate(**asked), first) and not torch.equal(first, second)
    before = torch.get_rng_state()
    model.generate(**asked | {"do_sample": False})
    assert torch.equal(torch.get_rng_state(), before)


class Pieces:
    """Notes what a streamer is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, ids: Tensor) -> None:
        self.given.append((tuple(ids.shape), ids.tolist(), ids.device.type))

    def end(self) -> None:
        self.given.append("end")


def test_streamers_get_what_generate_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a lost prompt, tokens behind the end, and text that only comes when all is written."""
    model, inputs = tiny_model(), batch((9,))
    oracle(monkeypatch, model, inputs)
    asked = {**inputs, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": early_end(model, inputs)}
    theirs, ours = Pieces(), Pieces()
    model.generate(**asked, streamer=theirs)
    model.generate(**asked, custom_generate=faster("ngram", streamer=ours))
    assert ours.given == theirs.given and len(ours.given) > 5
    tokenizer, printed = tiny_tokenizer(), []
    for extra in ({"streamer": TextStreamer(tokenizer)}, None):
        out = io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        options = extra or {"custom_generate": faster("ngram", streamer=TextStreamer(tokenizer))}
        model.generate(**asked, **options)
        printed.append(out.getvalue())
    assert printed[0] == printed[1] and printed[0]


REFUSED = {
    "num_beams": ({"num_beams": 3}, "num_beams=3 is not offered: beam search follows several texts"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6 .* contrastive"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 .*'ngram' is our prompt lookup"),
    "cache": ({"cache_implementation": "static"}, "cache_implementation='static' .* its own cache"),
    "repetition": ({"repetition_penalty": 1.2}, "RepetitionPenalty.* depend on .*repetition_penalty=1.0"),
    "ngrams": ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=0"),
    "bad words": ({"bad_words_ids": [[3]]}, "NoBadWords.* depend on the text"),
    "bias": ({"sequence_bias": {(3,): 1.0}}, "SequenceBias.* depend on the text"),
    "least length": ({"min_new_tokens": 3, "eos_token_id": 4}, "MinLength.* depend on .*min_new_tokens=None"),
    "forced end": ({"forced_eos_token_id": 4}, "ForcedEOS.*forced_eos_token_id=None"),
    "allowed": ({"prefix_allowed_tokens_fn": lambda *_: [1, 2]}, "PrefixConstrained.* depend on the text"),
    "guidance": ({"guidance_scale": 1.5}, "Guidance.*guidance_scale=None"),
    "min-p": ({"do_sample": True, "min_p": 0.1}, "MinP.* temperature, top_k and top_p only.*min_p=None"),
    "typical": ({"do_sample": True, "typical_p": 0.9}, "TypicalLogits.*typical_p=1.0"),
    "epsilon": ({"do_sample": True, "epsilon_cutoff": 0.1}, "EpsilonLogits"),
    "eta": ({"do_sample": True, "eta_cutoff": 0.1}, "EtaLogits"),
    "suppressed": ({"suppress_tokens": [3]}, "SuppressTokensLogits.* top_p only"),
    "normalised": ({"renormalize_logits": True}, "LogitNormalization"),
    "own": ({"logits_processor": [MinPLogitsWarper(0.1)]}, "MinPLogitsWarper is not offered"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores .* verifies a tree"),
    "logits": ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
    "states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    "weights": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "own cache": ({"past_key_values": DynamicCache()}, "past_key_values would not be filled"),
    "too long": ({"max_new_tokens": 500}, "grow to 506 tokens.* context is 96.*max_new_tokens=90"),
    "positions": ({"position_ids": torch.arange(2, 8)[None]}, "position_ids that do not count from 0"),
    "padded right": ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, "pad on the left"),
    "holes": ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}, "pad on the left"),
    "empty": ({"attention_mask": torch.zeros(1, 6, dtype=torch.long)}, "a prompt is empty"),
    "order": (
        {"logits_processor": [TopPLogitsWarper(0.5), TopKLogitsWarper(3)], "do_sample": False},
        "TopKLogitsWarper comes twice or out of order",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_offered_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    """Stops an option that is silently ignored: the text would not be what was asked for."""
    model = tiny_model()
    inputs: dict[str, Any] = {**batch((6,)), "max_new_tokens": 4, "do_sample": False, **options}
    with pytest.raises(CoralError, match=reason):
        model.generate(**inputs, custom_generate=faster("ngram"))


def test_models_that_are_refused() -> None:
    """Stops dropout in a text that is to be exact, unsupported models, and drafters of another model."""
    asked = {**batch((6,)), "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(CoralError, match=r"model\.eval\(\)"):
        tiny_model().train().generate(**asked, custom_generate=faster("ngram"))
    wide = drafter_of(tiny_model(vocab_size=40))
    with pytest.raises(CoralError, match="vocab_size is 40, but llama has 31"):
        tiny_model().generate(**asked, custom_generate=faster(wide))
    with pytest.raises(CoralError, match="a loaded drafter brings none"):
        tiny_model().generate(**asked, custom_generate=faster(drafter_of(tiny_model()), head="static"))
    model = tiny_model()
    model.config.model_type = "gpt2"
    with pytest.raises(CoralError, match="architecture 'gpt2' is not supported"):
        model.generate(**asked, custom_generate=faster("ngram"))


def test_a_second_call_loads_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops minutes of loading at each call, and a drafter that stays behind when the model changes."""
    model = AutoModelForCausalLM.from_pretrained(models / "target")
    asked = {**batch((6,)), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**asked)
    loads, load = [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    for source in (models / "drafter", str(models / "drafter")):
        assert torch.equal(model.generate(**asked, custom_generate=faster(source)), expected)
    assert len(loads) == 1
    half = model.to(torch.bfloat16)
    half.generate(**asked, custom_generate=faster(models / "drafter"))
    assert len(loads) == 2
    pair = list(half._coral.values())[-1]
    assert pair.proposer.drafter.fc.weight.dtype == torch.bfloat16


def test_a_loaded_drafter_is_not_changed() -> None:
    """Stops a drafter that comes back in the model's dtype."""
    model, drafter = tiny_model().to(torch.bfloat16), drafter_of(tiny_model())
    asked = {**batch((6,)), "max_new_tokens": 4, "do_sample": False}
    model.generate(**asked, custom_generate=faster(drafter))
    assert drafter.fc.weight.dtype == torch.float32
    target = Target(model, freeze=False)
    assert target.dtype == torch.bfloat16


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where transformers copies custom code to."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_the_directory_itself_can_be_named(
    models: Path, modules_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops a saved drafter that transformers does not know what to do with."""
    model = AutoModelForCausalLM.from_pretrained(models / "target")
    tokenizer, drafter = tiny_tokenizer(), str(models / "drafter")
    text = "A reef is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    theirs, ours = Pieces(), Pieces()
    stop = tokenizer.decode(model.generate(ids, max_new_tokens=9, do_sample=False)[0, -2:])
    asked = {"max_new_tokens": 20, "do_sample": False, "tokenizer": tokenizer, "stop_strings": stop}
    expected = model.generate(ids, **asked, streamer=theirs)
    form = {"custom_generate": drafter, "trust_remote_code": True}
    assert torch.equal(model.generate(ids, **asked, **form, streamer=ours), expected)
    assert ours.given == theirs.given
    assert [type(pair.proposer.proposer).__name__ for pair in model._coral.values()] == ["Feature"]
    model.generate(ids, max_new_tokens=3, **form)
    assert len(model._coral) == 1
    with pytest.raises(CoralError, match="leave out one of the two"):
        model.generate(ids, **form, assistant_model=model)
    monkeypatch.setitem(sys.modules, "coral.integrations.transformers.hook", None)
    with pytest.raises(ImportError, match="pip install coral-drafter"):
        model.generate(ids, **form)


def test_every_drafter_carries_the_same_function(models: Path) -> None:
    """Stops a shipped drafter, or a saved one, with a function that is out of date."""
    for directory in (models / "drafter", DRAFTER, TOY / "drafter"):
        for name in ("generate.py", "requirements.txt"):
            ours = (checkpoint.CUSTOM_GENERATE / name).read_bytes()
            assert (directory / "custom_generate" / name).read_bytes() == ours
