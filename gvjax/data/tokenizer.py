"""Tokenizers: text to ids without an opinion on prompts, and the one place where a sequence is ended.

Two encodings of text are kept apart. `encode` is for what people and models wrote: a control token typed there
("<|im_end|>") becomes ordinary pieces. `encode_control` is for what a template wrote: its control tokens become
control ids. Neither adds BOS or EOS; `begin` and `end` do.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import tokenizers


class TextTokenizer(Protocol):
    """What the pipeline needs of a tokenizer.

    Attributes:
      vocab_size: number of ids.
      pad_id: what fills the space after a sequence; may equal an EOS id, since masks come from lengths.
      bos_id: the id that begins a sequence, or None.
      add_bos: whether plain text begins with `bos_id`.
      eos_id: the id that `end` writes.
      eos_ids: all ids at which generation stops; holds `eos_id`.
      special_tokens: names as templates know them ("bos_token", "eos_token", ...) -> text.
      fingerprint: hex digest of everything that decides the ids.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def eos_ids(self) -> frozenset[int]: ...
    @property
    def special_tokens(self) -> Mapping[str, str]: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Ids of untrusted text; never a control id."""
        ...

    def encode_control(self, text: str) -> list[int]:
        """Ids of a template's own text."""
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids."""
        ...


def begin(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[int]:
    """The ids of plain text with BOS before them, if the tokenizer wants one; exactly one either way."""
    if not tokenizer.add_bos or tokenizer.bos_id is None:
        return list(ids)
    return [tokenizer.bos_id, *ids]


def end(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[int]:
    """The ids of a whole completion with exactly one EOS, which is last.

    Where a template has written an EOS already ("<|im_end|>" and a line break) the ids end there. Every EOS in every batch
    comes through this function.
    """
    for i, token in enumerate(ids):
        if token in tokenizer.eos_ids:
            return list(ids[: i + 1])
    return [*ids, tokenizer.eos_id]


class ByteTokenizer:
    """One id a byte of UTF-8, then pad, BOS and EOS: no files, no merges, no seams.

    Args:
      add_bos: whether plain text begins with BOS.
    """

    vocab_size = 259
    pad_id = 256
    bos_id = 257
    eos_id = 258
    eos_ids = frozenset({258})
    special_tokens: Mapping[str, str] = {}

    def __init__(self, *, add_bos: bool = True):
        self.add_bos = add_bos
        self.fingerprint = hashlib.sha256(
            f"bytes, add_bos={add_bos}".encode()
        ).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids in [0, 255]."""
        return list(text.encode("utf-8"))

    def encode_control(self, text: str) -> list[int]:
        """As `encode`: bytes have no control tokens."""
        return self.encode(text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD, and special ids their names unless skipped."""
        names = {self.pad_id: b"<pad>", self.bos_id: b"<bos>", self.eos_id: b"<eos>"}
        parts = (
            bytes([i]) if i < 256 else b"" if skip_special else names[i]
            for i in map(int, ids)
        )
        return b"".join(parts).decode("utf-8", "replace")


class Tokenizer:
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` library alone.

    Args:
      directory: holds tokenizer.json, and tokenizer_config.json, config.json and generation_config.json as far as there
        are any: special ids are read from them, in the layouts of transformers 4 and 5.

    Raises:
      ValueError: where there is no EOS, where a special token named in the configs is not in the vocabulary, or where
        the tokenizer cannot encode texts in parts.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        directory = pathlib.Path(directory)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{directory} has no tokenizer.json; save the tokenizer with transformers' save_pretrained first"
            )
        source = file.read_text("utf-8")
        # Two objects, since whether special tokens are parsed is a state of the object.
        self._control = tokenizers.Tokenizer.from_str(source)
        self._text = tokenizers.Tokenizer.from_str(source)
        for each in (self._control, self._text):
            # A saved file may carry the truncation and padding of whoever saved it.
            each.no_truncation()
            each.no_padding()
        self._text.encode_special_tokens = True
        self.vocab_size = self._control.get_vocab_size(with_added_tokens=True)

        config, generation, texts = (
            _read_json(directory / name)
            for name in (
                "config.json",
                "generation_config.json",
                "tokenizer_config.json",
            )
        )
        mapping = _read_json(directory / "special_tokens_map.json")
        self.special_tokens = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _token_text(texts.get(name, mapping.get(name)))) is not None
        }
        ends = [
            token
            for settings in (generation, config)
            for token in _as_list(settings.get("eos_token_id"))
        ]
        eos = self._id("eos_token", None)
        if eos is None and not ends:
            raise ValueError(
                f"{directory} names no end of sequence; set eos_token in tokenizer_config.json or eos_token_id in "
                "config.json"
            )
        self.eos_id: int = ends[0] if eos is None else eos
        self.eos_ids = frozenset([self.eos_id, *ends])
        bos = next(iter(_as_list(config.get("bos_token_id"))), None)
        self.bos_id = self._id("bos_token", bos)
        pad = next(
            (
                found
                for settings in (generation, config)
                for found in _as_list(settings.get("pad_token_id"))
            ),
            None,
        )
        pad = self._id("pad_token", pad)
        self.pad_id: int = self.eos_id if pad is None else pad
        self.add_bos = self._wants_bos(texts.get("add_bos_token"))
        self._fill_in_texts()
        self._check(directory)
        identity = [
            self.pad_id,
            self.bos_id,
            self.add_bos,
            self.eos_id,
            sorted(self.eos_ids),
        ]
        self.fingerprint = hashlib.sha256(
            f"{source}{json.dumps(identity)}".encode("utf-8", "surrogatepass")
        ).hexdigest()

    def _id(self, name: str, otherwise: int | None) -> int | None:
        text = self.special_tokens.get(name)
        if text is None:
            return otherwise
        found = self._control.token_to_id(text)
        if found is None:
            raise ValueError(
                f"{name} is {text!r}, which is not in the vocabulary of tokenizer.json"
            )
        return found

    def _wants_bos(self, declared: bool | None) -> bool:
        if self.bos_id is None:
            return False
        if declared is not None:
            return declared
        return self._control.encode("a").ids[:1] == [self.bos_id]

    def _fill_in_texts(self) -> None:
        for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            text = None if token is None else self._control.id_to_token(token)
            if name not in self.special_tokens and text is not None:
                self.special_tokens[name] = text

    def _check(self, directory: pathlib.Path) -> None:
        for token in sorted({*self.eos_ids, self.pad_id}):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{directory}: special id {token} is outside the vocabulary of {self.vocab_size}"
                )
            text = self._control.id_to_token(token)
            if token in self.eos_ids and token in self.encode(text or ""):
                raise ValueError(
                    f"{directory}: the end of sequence {text!r} can be typed by a user; mark it as special in "
                    "tokenizer.json"
                )
        if self.decode([*self.encode("a"), *self.encode("b")]) != "ab":
            raise ValueError(
                f"{directory}: this tokenizer puts a blank before every text, so texts cannot be encoded in parts; use "
                "one without a prefix space"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of untrusted text; special tokens in it become ordinary pieces."""
        return self._text.encode(text, add_special_tokens=False).ids

    def encode_control(self, text: str) -> list[int]:
        """Ids of a template's own text; special tokens in it become their ids."""
        return self._control.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids, as far as special ids are not skipped with them."""
        return self._control.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special
        )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _as_list(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _token_text(value: str | Mapping[str, Any] | None) -> str | None:
    # An added token is written as its text, or as an object that holds it.
    return value["content"] if isinstance(value, Mapping) else value
