"""Byte-level tokenizers of about 270 tokens with a chat template, built in milliseconds and without files."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<|pad|>", "<|bos|>", "<|eot|>", "<|user|>", "<|assistant|>", "<|system|>"]
PAD, BOS, EOT, USER, ASSISTANT, SYSTEM = range(6)
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), ("Ġ", "a"), ("Ġ", "the"), ("Ċ", "Ċ")]

# Turns behind one another, each closed by <|eot|>.
PLAIN = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# As in ChatML: a newline follows the role and the end token.
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# As in Phi-3: a finished text is closed by one more special token, which no later turn shows.
CLOSED = CHATML + "{% if not add_generation_prompt %}{{ '<|pad|>' }}{% endif %}"
# As in Qwen3: an answer that is history loses its empty thought.
FORGETFUL = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# As many do: the thought is left out of every answer.
STRIPS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ '<|eot|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# As in DeepSeek-R1: and the generation prompt begins the thought.
PREFILLS = STRIPS.replace("{{ '<|assistant|>' }}{% endif", "{{ '<|assistant|><think>\n' }}{% endif")
# As in Gemma: no system message.
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
# Plain text, where nothing special ends an answer.
TEXT_ONLY = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *alphabet, *(a + b for a, b in MERGES)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # As in Llama: plain text gets a <|bos|>, which a template has put there already.
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eot|>",
        extra_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        chat_template=chat_template,
    )
