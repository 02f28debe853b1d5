"""The target that a drafter of llama.cpp is for: its sizes and tokenizer, from its GGUF file or its config.

llama.cpp hands out the inner states of some architectures only (b11434: `t_layer_inp` in src/models), and
ends the whole process where it has none.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from coral.errors import CoralError
from coral.target.gguf import names
from coral.target.gguf.file import File, read
from coral.target.gguf.splits import SPLIT
from coral.target.loading import load_config, load_tokenizer

HOOKED = {
    "llama", "qwen3", "qwen3moe", "qwen3next", "qwen35", "qwen35moe", "qwen4exp", "gemma4", "gpt-oss",
    "minimax-m2", "minimax-01", "mimo2", "nemotron_h", "nemotron_h_moe", "lfm2", "hunyuan_vl", "bailingmoe3",
    "deepseek4", "nanbeige", "muse-glimmer",
}  # fmt: skip
_OF_FAMILY = {"mistral": "llama", "gemma3_text": "gemma3"}  # where GGUF's word is another
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_OF_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class ServedTarget:
    """keys: metadata of its tokenizer, `tokenizer.*`, with as many tokens as it has ids.
    file: the GGUF file that is served; None: it is yet to be made.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    keys: dict[str, Any]
    file: str | None

    def check(self) -> None:
        """Raise CoralError where llama.cpp cannot draft for it."""
        if self.architecture not in HOOKED:
            raise CoralError(
                f"llama.cpp has no EAGLE-3 for {self.architecture} models such as {self.name}: it does not "
                "hand out what enters their layers, and would end with `layer input tensor is null`; export "
                "to vllm or sglang, or use `coral serve`."
            )


def find(source: str, revision: str | None = None, trust_remote_code: bool = False) -> ServedTarget:
    """What a GGUF file, or a Hugging Face directory or hub id, says of itself; no weights are read.

    Raises:
        CoralError: there is none, it cannot be read, or has a tokenizer of a kind that is not known here.
    """
    if (paths := names.find(source, revision)) is not None:
        return _from_gguf(read(paths))
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(source, source, **common)
    tokenizer = load_tokenizer(source, source, **common)
    kind = config.model_type
    return ServedTarget(
        source,
        _OF_FAMILY.get(kind, kind),
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
        tokenizer_keys(tokenizer, config.vocab_size, source),
        None,
    )


def _from_gguf(file: File) -> ServedTarget:
    keys, path = file.keys(), file.paths[0]
    try:
        vocab_size, hidden_size = file.tensors["token_embd.weight"].shape
        num_layers = int(keys["block_count"])
    except (KeyError, ValueError, TypeError) as error:
        raise CoralError(f"{path} holds no language model ({error} is missing); use another file.") from error
    own = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    return ServedTarget(file.name, file.architecture, num_layers, hidden_size, vocab_size, own, str(path))


def tokenizer_keys(tokenizer: Any, vocab_size: int, name: str) -> dict[str, Any]:
    """The metadata of a Hugging Face tokenizer, byte-level or SentencePiece. A drafter is given ids, so how
    texts are split is named only where that is known here.

    Raises:
        CoralError: it is of another kind.
    """
    try:
        made = json.loads(tokenizer.backend_tokenizer.to_str())
        model = made["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    except (AttributeError, KeyError, ValueError) as error:
        raise CoralError(
            f"the tokenizer of {name} is no BPE of the tokenizers library; give the target's GGUF file as "
            "--target, which holds one."
        ) from error
    added = {int(each["id"]): bool(each["special"]) for each in made.get("added_tokens", ())}
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    spells_bytes = bool(model.get("byte_fallback"))

    def kind(i: int, token: str) -> int:
        if i not in by_id:
            return _UNUSED
        if token == tokenizer.unk_token:
            return _UNKNOWN
        if i in added:
            return _CONTROL if added[i] else _USER_DEFINED
        return _BYTE if spells_bytes and _OF_BYTE.fullmatch(token) else _NORMAL

    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    keys: dict[str, Any] = {"tokens": tokens, "token_type": [kind(*each) for each in enumerate(tokens)]}
    if spells_bytes:
        rank = {merge.replace(" ", ""): -float(i) for i, merge in enumerate(merges)}
        scores = [rank.get(token, -float(len(merges))) for token in tokens]
        keys |= {"model": "llama", "scores": scores}
    else:
        keys |= {"model": "gpt2", "pre": _split(made.get("pre_tokenizer") or {}), "merges": merges}
    for key, role in {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}.items():
        if (token_id := getattr(tokenizer, f"{role}_token_id")) is not None:
            keys[f"{key}_token_id"] = int(token_id)
    found = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if isinstance(template := tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = template
    return found


def _split(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of how texts are split; GPT-2's where it is not known."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = tuple(part["pattern"]["Regex"] for part in parts if "Regex" in part.get("pattern", {}))
    return next((name for name, known in SPLIT.items() if known == patterns), "gpt-2")
