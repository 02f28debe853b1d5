"""What a person should know of a prompt and its model before the text is written, a line each."""

from __future__ import annotations

from typing import Any

from coral.api import LLM
from coral.data.chat_format import special_texts
from coral.decoding.sampling import Sampling
from coral.integrations.transformers.generate_options import not_applied


def of_model(pair: LLM, options: dict[str, Any]) -> list[str]:
    """That it is slower than it might be, and that its generation_config asks for what is not done."""
    found = [f"runs as transformers' own code, which is slower: {pair.why}"] if pair.why else []
    sampling = Sampling(*(options[name] for name in ("temperature", "top_k", "top_p", "seed")))
    asked = not_applied(pair.target.facts.generation, sampling)
    if asked:
        found.append(
            f"not applied, though the model's generation_config has it: {', '.join(asked)} (--temperature, "
            "--top-p and --top-k sample; penalties are not offered)"
        )
    return found


def of_prompt(pair: LLM, prompt: str, chat: bool) -> list[str]:
    """That a text becomes other tokens than it may seem to."""
    tokenizer, found = pair.tokenizer, []
    bos = tokenizer.bos_token_id
    if bos is not None and pair.encode(prompt, chat)[:2] == [bos, bos]:
        found.append(f"the text begins with {tokenizer.bos_token}, and the tokenizer puts another before it")
    if chat and (spelled := [text for text in special_texts(tokenizer) if text in prompt]):
        found.append(f"the prompt spells {', '.join(spelled)}, read as special tokens, not as text")
    return found
