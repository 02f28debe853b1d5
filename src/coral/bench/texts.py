"""Every turn of a prompt written by every method: one record a text, unless the log holds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from coral.bench.equality import Logits, Verdict, verdict_of
from coral.bench.log import Log
from coral.bench.methods import Method
from coral.bench.records import KEY, Record
from coral.decoding.sampling import Sampling
from coral.suites.prompts import Prompt, answer, render
from coral.target.target import Target


@dataclass(frozen=True)
class Writing:
    """How all methods write: the same prompts with the same sampling, up to the same ends.

    methods: plain decoding first, whose texts the others are compared with.
    length: most tokens of a turn.
    references: see `equality.references`.
    """

    target: Target
    methods: Sequence[Method]
    sampling: Sampling
    length: int
    eos_ids: frozenset[int]
    references: tuple[Logits, Logits] | None
    log: Log

    def conversation(self, suite: str, prompt: Prompt) -> Iterator[str | None]:
        """Write all turns. A second turn continues with the plain answer to the first, whatever the method.

        Yields None after each text, or once why the rest is left out.
        """
        answers: list[str] = []
        for turn in range(prompt.num_turns):
            ids = render(self.target.tokenizer, prompt, answers)
            if len(ids) + self.length > self.target.context_length:
                tokens = f"{len(ids)} + {self.length} tokens"
                yield f"{suite}/{prompt.id} turn {turn + 1}: {tokens} exceed the context"
                return
            plain: list[int] | None = None
            for method in self.methods:
                record = self._record(method, (suite, prompt.id, turn), ids, plain)
                plain = record.tokens if plain is None else plain
                yield None
            assert plain is not None
            answers.append(answer(self.target.tokenizer, plain, self.target.eos_ids))

    def _record(
        self, method: Method, text: tuple[str, str, int], ids: list[int], plain: list[int] | None
    ) -> Record:
        """The record of (suite, prompt, turn) by one method, compared with what plain decoding wrote."""
        key = (self.target.precision, self.sampling.temperature, method.coupled, method.name, *text)
        if (found := self.log.find(key)) is not None:
            return found
        sequence_id = crc32("/".join(map(str, text)).encode())
        written = method.write(ids, self.sampling, sequence_id, self.length, self.eos_ids)
        verdict: Verdict | None = None
        # transformers draws other noise, and its weights are rounded where ours are packed.
        foreign = method.name.startswith("hf_")
        if not foreign or (self.sampling.temperature == 0 and self.target.blocks is None):
            expected = written.tokens if plain is None else plain
            verdict = verdict_of(ids, expected, written.tokens, self.sampling, sequence_id, self.references)
        asked: dict[str, Any] = dict(zip(KEY, key, strict=True))
        record = Record(**asked, kind=method.kind, **vars(written), verdict=verdict)
        self.log.add(record)
        return record
