"""From texts to the table of real.py: every formula that it prints.

Speeds are sums over sums within a round, since rounds write the same prompts; what is shown of several rounds
is their median, least and most. A ratio is of the texts that both methods wrote in a round, and the median
over rounds: what slows the machine for a while slows the two alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

HF, PLAIN, LLAMA = "hf_generate", "plain", "llama_bf16"
PACKED = "_packed"  # ends the names of ours that decode with the file's own blocks
BASES = {HF: "over HF `generate`", PLAIN: "over our plain", LLAMA: "over llama.cpp, BF16"}


@dataclass(frozen=True)
class Method:
    """A way of writing.

    name: the key of its texts; label: what the table calls it. engine: whose client runs it, ours,
    transformers, llama or vllm. model: which weights that reads; precision: what the table calls them.
    settings: what goes into its job beside.
    """

    name: str
    label: str
    engine: str
    model: str
    precision: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> str | None:
        """The method of the same weights whose texts these are to equal."""
        if self.name.endswith(PACKED):
            return PLAIN + PACKED
        return PLAIN if self.precision == "BF16" else None


@dataclass(frozen=True)
class Text:
    """One prompt's text, by one method in one round.

    tokens: the end token included. seconds: from the prompt's ids to the last token. decode_seconds: its part
    after the prefill; decoded: tokens written in it, forwards: of the target in it. Where the prefill gives
    the first token, `decoded` is one less than all.
    """

    method: str
    round: int
    prompt: str
    tokens: list[int]
    seconds: float
    decode_seconds: float
    decoded: int
    forwards: int

    @property
    def key(self) -> tuple[str, int, str]:
        return self.method, self.round, self.prompt


Rounds = dict[int, dict[str, Text]]
"""By round and prompt: what one method wrote."""


def by_method(texts: Sequence[Text]) -> dict[str, Rounds]:
    found: dict[str, Rounds] = {}
    for text in texts:
        found.setdefault(text.method, {}).setdefault(text.round, {})[text.prompt] = text
    return found


def speed(texts: Sequence[Text], decode: bool) -> float | None:
    """Tokens a second, without or with prefill; None where nothing took time."""
    tokens = sum(text.decoded if decode else len(text.tokens) for text in texts)
    seconds = sum(text.decode_seconds if decode else text.seconds for text in texts)
    return tokens / seconds if seconds > 0 else None


def spread(rounds: Rounds, decode: bool) -> dict[str, float] | None:
    """Median, least and most of the rounds' speeds."""
    speeds = [one for texts in rounds.values() if (one := speed([*texts.values()], decode)) is not None]
    if not speeds:
        return None
    return {"median": median(speeds), "least": min(speeds), "most": max(speeds)}


def ratio(own: Rounds, base: Rounds, decode: bool) -> float | None:
    """How many times the base's speed; None where no round has texts of both."""
    ratios = []
    for number in own.keys() & base.keys():
        shared = own[number].keys() & base[number].keys()
        pair = [speed([side[number][prompt] for prompt in shared], decode) for side in (own, base)]
        if pair[0] and pair[1]:
            ratios.append(pair[0] / pair[1])
    return median(ratios) if ratios else None


def tau(rounds: Rounds) -> float | None:
    """Tokens for each forward of the target after the prefill, the last of a text included."""
    texts = [text for written in rounds.values() for text in written.values()]
    forwards = sum(text.forwards for text in texts)
    return sum(text.decoded for text in texts) / forwards if forwards else None


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two texts part (behind the shorter one, if it begins the other); None if they are equal."""
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def differences(own: Rounds, plain: Rounds) -> dict[str, int | None]:
    """By prompt that both wrote: where the method's text first leaves plain decoding's in any round."""
    reference: dict[str, list[int]] = {}
    for written in plain.values():
        for prompt, text in written.items():
            reference.setdefault(prompt, text.tokens)
    found: dict[str, int | None] = {}
    for written in own.values():
        for prompt, text in written.items():
            if prompt in reference:
                at = first_difference(reference[prompt], text.tokens)
                earlier = found.get(prompt)
                found[prompt] = earlier if at is None else at if earlier is None else min(at, earlier)
    return found


def rows(
    methods: Sequence[Method], texts: Sequence[Text], verdicts: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """One row for each method that has written, in the order of `methods`.

    Args:
        verdicts: by method, near_tie or wrong for each text that differs, see `coral.bench.equality`.
    """
    written = by_method(texts)
    found = []
    for method in methods:
        if method.name not in written:
            continue
        own = written[method.name]
        parted = differences(own, written.get(method.reference or "", {}))
        found.append(
            {
                "method": method.name,
                "label": method.label,
                "precision": method.precision,
                "rounds": len(own),
                "texts": sum(map(len, own.values())),
                "decode": spread(own, True),
                "with_prefill": spread(own, False),
                "over": {
                    base: {"decode": ratio(own, written[base], True), "all": ratio(own, written[base], False)}
                    for base in BASES
                    if base in written
                },
                "tau": tau(own),
                "first_differences": parted,
                "verdicts": list(verdicts.get(method.name, [])),
            }
        )
    return found


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown. A ratio is of decoding, in brackets with prefill; the range is of the rounds."""
    heads = ("method", "weights", "tokens/s", "with prefill", *BASES.values(), "tau", "same text")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in found:
        ratios = [_ratio(row["over"].get(base)) for base in BASES]
        length = "-" if row["tau"] is None else f"{row['tau']:.2f}"
        cells = [row["label"], row["precision"], _range(row["decode"]), _range(row["with_prefill"]), *ratios]
        lines.append(f"| {' | '.join([*cells, length, _same(row)])} |")
    return lines


def _range(speeds: Mapping[str, float] | None) -> str:
    if speeds is None:
        return "-"
    middle, least, most = (f"{speeds[name]:.1f}" for name in ("median", "least", "most"))
    return middle if least == most else f"{middle} ({least} to {most})"


def _ratio(found: Mapping[str, float | None] | None) -> str:
    if found is None or found["decode"] is None or found["all"] is None:
        return "-"
    return f"{found['decode']:.2f}x ({found['all']:.2f}x)"


def _same(row: Mapping[str, Any]) -> str:
    parted = row["first_differences"]
    if not parted:
        return "-"
    at = sorted(place for place in parted.values() if place is not None)
    if not at:
        return "yes"
    equal = f"{len(parted) - len(at)} of {len(parted)}, others from token {median(at):.0f} on"
    wrong = row["verdicts"].count("wrong")
    known = "near ties" if not wrong else f"{wrong} by more than rounding"
    return f"{equal} ({known})" if row["verdicts"] else equal
