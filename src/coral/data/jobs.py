"""Conversations whose answers are to be written: one job each, and what answers them."""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from coral.data.account import Outcome
from coral.data.conversations import Dropped, Message, read
from coral.data.sources import Source


@dataclass
class Job:
    """One conversation on its way: a turn moves from `users` to `messages` when it is asked."""

    source: str
    sequence_id: int  # number of the record among those that can be read
    temperature: float
    users: list[Message]
    messages: list[Message]
    digest: str = ""  # of the turns that are to be asked
    asked: bool = False
    tokens: int = 0  # written for it
    problem: str = "no usable answer"  # why, if nothing was answered: the same for all with the same fault
    detail: str = ""  # what only this one has to say of it
    lasting: bool = True  # asking again would end in the same way
    before: Outcome | None = None  # of an earlier run; then nothing is asked

    @property
    def answered(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)

    @property
    def outcome(self) -> Outcome:
        if self.before:
            return self.before
        if self.answered:
            return Outcome(unfinished="finished" in self.messages[-1])
        return Outcome(problem=self.problem, detail=self.detail)

    def take(self, text: str, finished: bool, keep_unfinished: bool) -> bool:
        """Add the answer to the last turn asked; returns whether the next turn is to be asked.

        A conversation ends with the answers it has at one that is empty, or unfinished.
        """
        if not text.strip() or not (finished or keep_unfinished):
            self.messages.pop()  # the user turn that has no answer
            return False
        answer: Message = {"role": "assistant", "content": text}
        self.messages.append(answer if finished else answer | {"finished": False})
        return finished and bool(self.users)


# Asks the turns of the jobs and hands each job to the second argument, in any order, once it is through.
Answer: TypeAlias = Callable[[Iterator[Job], Callable[[Job], None]], None]


def jobs_of(
    sources: Sequence[Source], temperatures: Sequence[float], max_turns: int | None, skipped: Dropped
) -> Iterator[Job]:
    """One job for each record that can be read and does not repeat another; the rest goes to `skipped`."""
    seen: set[int] = set()
    for index, conversation in enumerate(read(sources, skipped, prompts_only=True)):
        temperature = temperatures[index % len(temperatures)]
        if temperature == 0:
            turns = hash(tuple(m["content"] for m in conversation.messages if m["role"] != "assistant"))
            if turns in seen:
                skipped.counts["same turns as an earlier record at temperature 0"] += 1
                continue
            seen.add(turns)
        users = [message for message in conversation.messages if message["role"] == "user"][:max_turns]
        system = [message for message in conversation.messages if message["role"] == "system"]
        said = json.dumps([[message["role"], message["content"]] for message in (*system, *users)])
        digest = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
        yield Job(conversation.where, index, temperature, users, system, digest)


def draw(jobs: Iterator[Job], count: int, seed: int, skipped: Dropped) -> list[Job]:
    """Draw `count` jobs uniformly in one pass: those with the smallest keyed digests."""
    seen = 0

    def digest(job: Job) -> bytes:
        nonlocal seen
        seen += 1
        return hashlib.blake2b(f"{seed} {job.source}".encode(), digest_size=12).digest()

    drawn = heapq.nsmallest(count, jobs, key=digest)
    if seen > count:
        skipped.counts["beyond the limit (--limit)"] += seen - count
    return drawn
