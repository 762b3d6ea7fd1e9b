"""A small byte-level BPE tokenizer in a model folder, as transformers would write it."""

import json
import pathlib

import tokenizers

from gvjax.data.templates import CHATML_TEMPLATE

CORPUS = [
    "The capital of France is Paris.",
    "What is the largest planet in the solar system? It is Jupiter, but it's not the only one.",
    "user assistant system Human Assistant Question Answer POST TITLE SUBREDDIT TL;DR",
    "How many cookies does she have left to take home? She has 11 cookies.",
] * 4


def write_model_folder(directory: pathlib.Path, **tokenizer_config) -> pathlib.Path:
    """A folder with tokenizer.json (ids 0..2 special), config files and a ChatML template; pad is EOS."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    # As saved by someone who had used it with truncation and padding.
    model.enable_truncation(4)
    model.enable_padding(length=8)
    directory.mkdir(parents=True, exist_ok=True)
    model.save(str(directory / "tokenizer.json"))
    texts = {
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "pad_token": "<|im_end|>",
        **tokenizer_config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(texts))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (directory / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    return directory
