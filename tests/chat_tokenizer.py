"""A byte-level tokenizer of `transformers` that adds BOS, with chat templates like those of real models."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Text as content, tools as JSON, tool calls as JSON; it writes BOS itself.
CHAT = (
    "{{ bos_token }}{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# A message that only calls tools is one without content.
NO_CONTENT = (
    "{% for m in messages %}{% if m['content'] is not defined %}<call>{{ m.tool_calls | tojson }}"
    "{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}</>{% endfor %}"
)
# Content is always a text.
TEXT_CONTENT = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"


def chat_tokenizer(template: str = CHAT, ends: bool = False) -> PreTrainedTokenizerFast:
    """256 bytes after <s> and </s>. With ``ends`` it appends EOS, too, as some are configured to."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: 2 + i for i, letter in enumerate(letters)}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A" + " </s>" * ends, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer
