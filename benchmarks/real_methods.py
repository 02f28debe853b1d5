"""The methods that real.py compares, in the order of its table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fnmatch import fnmatch

from real_table import HF, PACKED, PLAIN, Method

from coral.errors import CoralError

# llama.cpp's n-gram methods with its own sizes; one with an n-gram and a draft that are as short as others'.
LLAMA_NGRAMS: tuple[tuple[str, list[int] | None], ...] = (
    ("ngram-simple", None),
    ("ngram-map-k", None),
    ("ngram-mod", None),
    ("ngram-simple", [4, 8]),
)
VLLM_NGRAM = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def every_method(options: argparse.Namespace) -> list[Method]:
    """All that there are for this drafter. What vLLM drafts with is to lie in OUTPUT/vllm-drafter."""

    def ours(name: str, label: str, drafter: str | None) -> list[Method]:
        """With dequantised weights, and with the file's own blocks."""
        label, settings = f"**{label}**", {"drafter": drafter}
        packed = settings | {"dtype": "packed"}
        return [
            Method(name, label, "ours", "directory", "BF16", settings),
            Method(name + PACKED, label, "ours", "file", "", packed),
        ]

    def transformers(name: str, label: str, **options: int) -> Method:
        return Method(name, f"Hugging Face{label}", "transformers", "directory", "BF16", {"options": options})

    methods = [
        transformers(HF, " `generate`"),
        transformers("hf_prompt_lookup", ", prompt lookup", prompt_lookup_num_tokens=10),
    ]
    for model, precision in (("bf16", "BF16"), ("q8_0", "Q8_0"), ("file", "")):
        methods.append(
            Method(f"llama_{model}", "llama.cpp", "llama", model, precision, {"speculative": None})
        )
        for kind, sizes in LLAMA_NGRAMS if model != "q8_0" else ():
            name = f"llama_{model}_{kind.replace('-', '_')}" + ("_short" if sizes else "")
            label = f"llama.cpp, {kind}" + (f", {sizes[0]} and {sizes[1]}" if sizes else "")
            settings = {"speculative": kind, "sizes": sizes}
            methods.append(Method(name, label, "llama", model, precision, settings))
    served = {"method": "eagle", "model": str(options.output.resolve() / "vllm-drafter")}
    for name, label, config in (
        ("vllm", "vLLM", None),
        ("vllm_ngram", "vLLM, n-gram", VLLM_NGRAM),
        ("vllm_drafter", "vLLM, our drafter", served),
    ):
        config = config and config | {"num_speculative_tokens": options.draft_tokens}
        methods.append(Method(name, label, "vllm", "directory", "BF16", {"speculative": config}))
    mine = [ours(PLAIN, "plain", None), ours("ngram", "n-gram", "ngram")]
    if options.drafter is None:
        methods = [method for method in methods if method.name != "vllm_drafter"]
    else:
        mine += [
            ours("coral", "CORAL", options.drafter),
            ours("coral_lookup", "CORAL and lookup", f"{options.drafter}+ngram"),
        ]
    return [*methods, *(one for one, _ in mine), *(packed for _, packed in mine)]


def chosen(methods: Sequence[Method], only: str) -> list[Method]:
    """Those that a pattern of `only` names.

    Raises:
        CoralError: a pattern that names none.
    """
    patterns = [pattern.strip() for pattern in only.split(",")]
    for pattern in patterns:
        if not any(fnmatch(method.name, pattern) for method in methods):
            names = ", ".join(method.name for method in methods)
            raise CoralError(f"--only {pattern!r} names no method; there are {names}.")
    return [method for method in methods if any(fnmatch(method.name, pattern) for pattern in patterns)]
