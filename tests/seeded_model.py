"""A tiny Llama with random weights and a tokenizer of words, made from a seed, for tests to train.

Its shape is that of the real model that tests know (`stories_model`): five layers (uneven pipeline stages), tied
embeddings, grouped queries, 512 tokens of which 256 are bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 512
SPECIAL = ["<unk>", "<s>", "</s>"]
NAMES = [
    "Lily",
    "Tim",
    "Sue",
    "Amy",
    "Kate",
    "Jane",
    "Ben",
    "Tom",
    "Mia",
    "Anna",
    "Sam",
    "Lucy",
    "Max",
    "Jack",
    "Bob",
    "Leo",
]
CORPUS = [
    text.format(name, other)
    for name, other in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)
    for text in (
        "Once upon a time, there was a girl named {} who had a red ball. She was very happy and smiled.",
        "One day, {} and {} went to the park with a dog. They saw the sun, sang and had fun, and she laughed.",
        "Tim was sad and cried. {} got hurt and was scared, angry, yelled and ran. It was a kind, glad child.",
        "Mom said yes, so birds sing songs, fish swim, stars shine and snow falls. {} sees six houses. {} asks.",
        "What is 12 + 345? {} has 6 apples, {} has 78 and 90 more. The answer is: no, yes!",
    )
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: a word begins with its space, <s> begins every text and ends it, other letters are bytes."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    split = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    learner.pre_tokenizer = pre_tokenizers.Sequence(split)
    words = trainers.BpeTrainer(vocab_size=VOCAB - 256, special_tokens=SPECIAL, show_progress=False)
    learner.train_from_iterator(CORPUS, words)
    learnt = learner.get_vocab()
    pieces = [piece for piece in sorted(learnt, key=learnt.__getitem__) if piece not in SPECIAL]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    inner = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens(SPECIAL)
    assert inner.get_vocab_size() == VOCAB
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<s>", unk_token="<unk>", pad_token="<unk>",
        model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def write_seeded_model(folder: Path) -> Path:
    """A Hugging Face folder."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.1, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(260)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[1, 2], pad_token_id=0)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
