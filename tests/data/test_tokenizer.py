"""Tokenizers: nobody types a control token, EOS and BOS come exactly once, and configs of both layouts are read."""

import json

import pytest
import tokenizers

from gvjax.data import tokenizer as module
from gvjax.data.tokenizer import ByteTokenizer, Tokenizer

TEXTS = [
    "",
    "Hello, wörld!",
    "a\n\n2024",
    "日本語 🙂",
    "<|im_end|>",
    "<|im_start|>user",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(bpe, bytes_tokenizer, text):
    for each in (bpe, bytes_tokenizer):
        assert each.decode(each.encode(text), skip_special=False) == text
        assert all(0 <= token < each.vocab_size for token in each.encode(text))


def test_special_ids_come_from_the_configs(bpe):
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id) == (0, 2, 2)
    assert bpe.eos_ids == {2}
    assert bpe.special_tokens["eos_token"] == "<|im_end|>"
    assert not bpe.add_bos


def test_nobody_types_a_control_token(bpe):
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        ids = bpe.encode(f"a{token}b")
        assert not {0, 1, 2} & set(ids)
        assert bpe.decode(ids) == f"a{token}b"
    assert bpe.encode_control("<|im_start|>") == [1]
    # Asking for control ids in between must not change how text is encoded.
    assert 2 not in bpe.encode("<|im_end|>")


def test_saved_truncation_and_padding_are_switched_off(bpe):
    assert len(bpe.encode("What is the largest planet in the solar system? 12345")) > 8
    assert len(bpe.encode("a")) == 1


def test_end_writes_exactly_one_eos(bpe):
    text = bpe.encode("Paris")
    assert module.end(bpe, text) == [*text, 2]
    assert module.end(bpe, [*text, 2]) == [*text, 2]
    assert module.end(bpe, [*text, 2, 198, 2]) == [*text, 2]
    assert module.end(bpe, []) == [2]


def test_begin_writes_bos_once_where_wanted(bpe, tmp_path, write_model_folder):
    assert module.begin(bpe, [7]) == [7]
    wanting = Tokenizer(write_model_folder(tmp_path, add_bos_token=True))
    assert module.begin(wanting, wanting.encode("a")) == [0, *wanting.encode("a")]
    assert wanting.fingerprint != Tokenizer(write_model_folder(tmp_path)).fingerprint


def test_a_post_processor_that_adds_bos_means_that_one_is_wanted(
    tmp_path, write_model_folder
):
    folder = write_model_folder(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    model.save(str(folder / "tokenizer.json"))
    wanting = Tokenizer(folder)
    assert wanting.add_bos
    assert 0 not in wanting.encode("a")
    assert 0 not in wanting.encode_control("a")


def test_ids_from_config_files_alone(tmp_path, write_model_folder):
    folder = write_model_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 0})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    found = Tokenizer(folder)
    assert (found.bos_id, found.eos_id, found.pad_id) == (0, 2, 2)
    assert found.eos_ids == {0, 2}
    assert found.special_tokens == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
    }


def test_what_cannot_work_is_refused(tmp_path, write_model_folder):
    with pytest.raises(ValueError, match="has no tokenizer"):
        Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="'<eos>', which is not in the vocabulary"):
        Tokenizer(write_model_folder(tmp_path / "a", eos_token="<eos>"))
    folder = write_model_folder(tmp_path / "b", eos_token=None)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no end of sequence"):
        Tokenizer(folder)
    folder = write_model_folder(tmp_path / "c", eos_token="a")
    with pytest.raises(ValueError, match="can be typed by a user"):
        Tokenizer(folder)
    folder = write_model_folder(tmp_path / "d")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 5000}))
    with pytest.raises(ValueError, match="5000 is outside the vocabulary"):
        Tokenizer(folder)


def test_a_tokenizer_with_prefix_spaces_is_refused(tmp_path, write_model_folder):
    folder = write_model_folder(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="blank before every text"):
        Tokenizer(folder)


def test_bytes():
    each = ByteTokenizer()
    assert each.encode("é") == [0xC3, 0xA9]
    assert module.begin(each, each.encode("a")) == [257, 97]
    assert each.decode([257, 97, 258, 256]) == "a"
    assert each.decode([257, 97, 258], skip_special=False) == "<bos>a<eos>"
    assert each.fingerprint != ByteTokenizer(add_bos=False).fingerprint
    assert module.begin(ByteTokenizer(add_bos=False), [97]) == [97]
