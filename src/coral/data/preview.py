"""Show examples as a person reads them: what is trained on stands out, special tokens are visible."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from coral.data.chat_format import ChatFormat, Example
from coral.data.conversations import BadRecordError, Dropped, read
from coral.data.prepare import because
from coral.data.sources import Source
from coral.errors import CoralError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text of others must not drive the terminal: control characters are shown as their symbols, U+2400 and on.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def preview(examples: Iterable[Example], tokenizer: "PreTrainedTokenizerBase", console: Console) -> None:
    """Print `examples`: trained tokens in colour, the rest dim; without colour, trained text is in [[ ]]."""
    special_ids = ChatFormat(tokenizer).special_ids
    for number, example in enumerate(examples, start=1):
        console.rule(
            f"example {number}: {len(example.input_ids)} tokens, {sum(example.loss_mask)} trained on",
            style="dim",
        )
        console.print(marked(example, tokenizer, special_ids, colour=console.color_system is not None))
    console.print(
        Text("bright or in [[ ]]: what the target is to write, and the drafter is trained on", "dim")
    )


def preview_sources(
    sources: Source | Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    console: Console,
    *,
    count: int = 3,
    last_turn_only: bool = False,
) -> None:
    """Print the first `count` usable conversations of the sources as `prepare` would train on them.

    Raises:
        CoralError: a source cannot be read, or none of them holds a usable conversation.
    """
    chat, dropped = ChatFormat(tokenizer), Dropped()

    def usable() -> Iterator[Example]:
        for conversation in read(sources, dropped):
            try:
                yield chat.encode(conversation, last_turn_only=last_turn_only)
            except BadRecordError as error:
                dropped.add(conversation.where, str(error), error.detail)

    examples = list(islice(usable(), count))
    if not examples:
        raise CoralError(f"the sources hold no usable conversation{because(dropped)}")
    preview(examples, tokenizer, console)


def marked(
    example: Example, tokenizer: "PreTrainedTokenizerBase", special_ids: set[int], *, colour: bool
) -> Text:
    """The example as one text: runs of tokens, trained or not and special or not, each in its style."""
    text = Text()
    tokens = zip(example.input_ids, example.loss_mask, strict=True)
    for trained, run in groupby(tokens, key=lambda token: bool(token[1])):
        text.append("[[" if trained and not colour else "")
        for special, part in groupby((token for token, _ in run), key=special_ids.__contains__):
            piece = tokenizer.decode([*part], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert isinstance(piece, str)
            style = (
                ("bold magenta" if special else "green") if trained else ("magenta dim" if special else "dim")
            )
            text.append(piece.translate(_VISIBLE), style)
        text.append("]]" if trained and not colour else "")
    return text
