"""A tokenizer that was written down: text to ids and back without transformers, whose import takes seconds.

The tokens are those of Hugging Face's `tokenizers`, which its own classes call too; the chat template is run
as they run it. What else is asked for is asked of the whole tokenizer, loaded then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from coral.json_file import STRICT

_GENERATION = re.compile(r"{%-?\s*generation\b")
"""A tag that transformers adds to the language of templates."""


@dataclass(frozen=True)
class TokenizerRecord:
    """What a tokenizer has beside its tokens.

    length: number of tokens, added ones included. special: the special tokens by their names, bos_token and
    so on. special_ids: of all of them.
    """

    __pydantic_config__ = STRICT
    name_or_path: str
    chat_template: str | None
    length: int
    special: dict[str, str]
    special_ids: list[int]

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerRecord | None:
        """None: it does more than its tokens and its template say."""
        template, special = tokenizer.chat_template, dict(tokenizer.special_tokens_map)
        plain = all(isinstance(token, str) for token in special.values())
        if not getattr(tokenizer, "is_fast", False) or not plain or isinstance(template, dict):
            return None
        if tokenizer.clean_up_tokenization_spaces or _GENERATION.search(template or ""):
            return None
        return cls(tokenizer.name_or_path, template, len(tokenizer), special, tokenizer.all_special_ids)


class Encoding(dict[str, list[int]]):
    """Token ids under "input_ids", as a key and as an attribute."""

    @property
    def input_ids(self) -> list[int]:
        return self["input_ids"]


class RecordedTokenizer:
    """The part of `PreTrainedTokenizerFast` that decoding needs.

    Args:
        tokens: the tokenizer of `tokenizers`.
        whole: loads the whole tokenizer.
    """

    def __init__(self, record: TokenizerRecord, tokens: Tokenizer, whole: Callable[[], Any]) -> None:
        self._record, self._tokens, self._load = record, tokens, whole
        self.name_or_path, self.chat_template = record.name_or_path, record.chat_template
        self.all_special_ids = record.special_ids

    def __len__(self) -> int:
        return self._record.length

    def __call__(self, text: Any, *, add_special_tokens: bool = True, **options: Any) -> Any:
        if not isinstance(text, str) or options.keys() - {"verbose"}:
            return self._whole(text, add_special_tokens=add_special_tokens, **options)
        return Encoding(input_ids=self._tokens.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **options: Any) -> Any:
        if not isinstance(ids, list) or any(options.values()):
            return self._whole.decode(ids, skip_special_tokens=skip_special_tokens, **options)
        return self._tokens.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        if options or not self.chat_template or not conversation:
            options |= {"add_generation_prompt": add_generation_prompt, "return_dict": return_dict}
            return self._whole.apply_chat_template(conversation, tokenize=tokenize, **options)
        text = self._template.render(
            messages=conversation,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._record.special,
        )
        if not tokenize:
            return text
        encoding = self(text, add_special_tokens=False)
        return encoding if return_dict else encoding.input_ids

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        found = self._tokens.token_to_id(tokens) if isinstance(tokens, str) else None
        return self._whole.convert_tokens_to_ids(tokens) if found is None else found

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        return (
            self._tokens.id_to_token(ids) if isinstance(ids, int) else [*map(self._tokens.id_to_token, ids)]
        )

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return self._tokens.get_added_tokens_decoder()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask before there is anything
            raise AttributeError(name)
        if name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            token = self._record.special.get(name.removesuffix("_id"))
            return None if token is None else self._tokens.token_to_id(token)
        if name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            return self._record.special.get(name)
        return getattr(self._whole, name)

    @cached_property
    def _whole(self) -> Any:
        return self._load()

    @cached_property
    def _template(self) -> Any:
        """The chat template, in the environment that transformers gives it."""
        from jinja2 import TemplateError, ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.chat_template or "")
