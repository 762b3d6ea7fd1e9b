"""A small byte-level BPE tokenizer in a model folder, as transformers would write it, and the real samples."""

import pathlib

import pytest
from model_folder import write_model_folder

from gvjax.data.templates import ChatTemplate
from gvjax.data.tokenizer import ByteTokenizer, Tokenizer


@pytest.fixture(scope="session", name="write_model_folder")
def _write_model_folder():
    return write_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> pathlib.Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def bpe(model_folder) -> Tokenizer:
    return Tokenizer(model_folder)


@pytest.fixture(scope="session")
def chatml(model_folder, bpe) -> ChatTemplate:
    return ChatTemplate.from_directory(model_folder, bpe.special_tokens)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def bytes_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()
