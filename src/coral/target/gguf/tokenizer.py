"""The vocabulary in a GGUF file -> a Hugging Face tokenizer that makes llama.cpp's ids.

A file holds tokens, their kinds, merges or scores, and the *name* of what splits a text before merging
(`tokenizer.ggml.pre`). What each name stands for is what llama.cpp b11549 does with it.
"""

from __future__ import annotations

import warnings
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from coral.errors import CoralError
from coral.target.gguf.file import File
from coral.target.gguf.splits import GPT2, SPLIT, WHOLE_WORDS

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_READ = {
    "model",
    "pre",
    "tokens",
    "token_type",
    "merges",
    "scores",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
}
_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")
# Ids and flags that no text or end depends on, in a decoder of text.
_ASIDE = {"add_sep_token", "remove_extra_whitespaces", "precompiled_charsmap", "token_type_count"} | {
    f"{name}_token_id"
    for name in (
        "seperator", "mask", "cls", "prefix", "suffix", "middle", "fim_pre", "fim_suf", "fim_mid", "fim_pad",
        "fim_rep", "fim_sep",
    )
}  # fmt: skip


def read_tokenizer(file: File) -> PreTrainedTokenizerFast:
    """The tokenizer of the model in `file`, with its chat templates.

    Warns:
        UserWarning: it names a way to split texts that is not known here; GPT-2's is used.

    Raises:
        CoralError: no tokenizer, one of another kind than BPE or SentencePiece, or a key that is not known.
    """
    keys = {k.removeprefix(_PREFIX): v for k, v in file.metadata.items() if k.startswith(_PREFIX)}
    kind = keys.get("model")
    if kind not in ("gpt2", "llama") or not len(keys.get("tokens", ())):
        raise CoralError(
            f"{file.name} holds a tokenizer of kind {kind!r}; only gpt2 (byte-level BPE) and llama "
            "(SentencePiece) are supported as GGUF."
        )
    if odd := keys.keys() - _READ - _ASIDE - {f"{name}_token_id" for name in _IDS}:
        raise CoralError(f"{file.name} says {_PREFIX}{min(odd)}, which is not known here; use another file.")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(keys["tokens"])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise CoralError(f"{file.name} holds the same token twice in its vocabulary; use another file.")
    special = {
        name: tokens[int(keys[f"{name}_token_id"])]
        for name in _IDS
        if int(keys.get(f"{name}_token_id", len(tokens))) < len(tokens)
    }
    try:
        build = _byte_level if kind == "gpt2" else _sentencepiece
        tokenizer = build(file, keys, tokens, vocabulary, special.get("unknown"))
    except Exception as error:  # what tokenizers raises is a bare Exception
        if isinstance(error, CoralError):
            raise
        raise CoralError(f"{file.name} holds a vocabulary that does not fit its merges: {error}.") from error
    _add_tokens(tokenizer, file, keys, tokens)
    _frame(tokenizer, file, keys, kind, special, vocabulary)
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{role: special.get(name) for role, name in roles.items()},
    )
    made.chat_template = _templates(file)
    return made


_PREFIX = "tokenizer.ggml."


def _byte_level(
    file: File, keys: dict[str, Any], tokens: list[str], vocabulary: dict[str, int], unknown: str | None
) -> Tokenizer:
    pre = str(keys.get("pre", "default"))
    if pre not in SPLIT:
        warnings.warn(
            f"{file.name}: {_PREFIX}pre is {pre!r}, which is not known here; texts are split as GPT-2 does, "
            "so some may get other tokens than the model was trained on.",
            stacklevel=2,
        )
    merges = []
    for merge in keys.get("merges", ()):
        middle = merge.find(" ", 1)  # a piece may begin with a blank
        merges.append((merge[:middle], merge[middle + 1 :]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS))
    splits: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLIT.get(pre, (GPT2,))
    ]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    file: File, keys: dict[str, Any], tokens: list[str], vocabulary: dict[str, int], unknown: str | None
) -> Tokenizer:
    """Merging two pieces is worth the score of what they make, so the merges follow from the scores."""
    kinds, scores = keys.get("token_type"), keys.get("scores")
    if kinds is None or scores is None:
        raise CoralError(f"{file.name} lacks the scores or kinds of its tokens; use another file.")
    merged = [
        i for i, kind in enumerate(kinds.tolist()) if kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    ]
    ranked = []
    for i in merged:
        token = tokens[i]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-float(scores[i]), i, vocabulary[left], left, right))
    ranked.sort(key=lambda merge: merge[:3])
    merges = [(left, right) for *_, left, right in ranked]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    blanks = normalizers.Replace(" ", "▁")
    plain: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if keys.get("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
        plain.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = blanks
    tokenizer.decoder = decoders.Sequence(plain)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, file: File, keys: dict[str, Any], tokens: list[str]) -> None:
    """Tokens that are found in a text as a whole, before anything is split or merged."""
    kinds = keys.get("token_type", ())
    phi3 = any(name in str(file.metadata.get("general.name", "")).lower() for name in ("phi-3", "phi3"))
    for special, wanted in ((True, (_CONTROL, _UNKNOWN)), (False, (_USER_DEFINED,))):
        found = [
            AddedToken(
                token,
                normalized=False,
                special=special,
                rstrip=phi3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
            )
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(found)


def _frame(
    tokenizer: Tokenizer,
    file: File,
    keys: dict[str, Any],
    kind: str,
    special: dict[str, str],
    vocabulary: dict[str, int],
) -> None:
    """The tokens that stand around a plain text."""
    begins = keys.get("add_bos_token", kind == "llama" or keys.get("pre") in WHOLE_WORDS)
    around = {"bos": bool(begins), "eos": bool(keys.get("add_eos_token", False))}
    if missing := [name for name, wanted in around.items() if wanted and name not in special]:
        raise CoralError(
            f"{file.name} puts a {missing[0]} token around texts, but names none; use another file."
        )
    used = [special[name] for name, wanted in around.items() if wanted]
    if not used:
        return
    before, behind = ([special[name]] if around[name] else [] for name in ("bos", "eos"))
    single = [*before, "$A", *behind]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *(f"{part}:1" for part in [*before, "$B", *behind])],
        special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys(used)],
    )


def _templates(file: File) -> str | dict[str, str] | None:
    own = file.metadata.get("tokenizer.chat_template")
    names = file.metadata.get("tokenizer.chat_templates", ())
    named = {name: file.metadata.get(f"tokenizer.chat_template.{name}") for name in names}
    others = {name: text for name, text in named.items() if text is not None}
    if own is None or not others:
        return own
    return {"default": own, **others}
