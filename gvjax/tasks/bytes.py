"""A tokenizer without a vocabulary file: one id per UTF-8 byte and three specials."""

from collections.abc import Iterable

PAD_ID = 256
BOS_ID = 257
EOS_ID = 258
VOCAB_SIZE = 259


def encode(text: str) -> list[int]:
    """The bytes of `text` in UTF-8 as ids 0 .. 255; no specials are added.

    Text that UTF-8 cannot hold (lone surrogates) becomes question marks.
    """
    return list(text.encode("utf-8", errors="replace"))


def decode(tokens: Iterable[int]) -> str:
    """The text of ids, total on anything.

    PAD and BOS are dropped, EOS is written `<eos>`, and bytes that are no UTF-8 and ids that do not exist become U+FFFD.
    """
    # 0xFF never occurs in UTF-8, so it decodes to exactly one replacement character.
    pieces = {PAD_ID: b"", BOS_ID: b"", EOS_ID: b"<eos>"}
    return b"".join(
        bytes([token]) if 0 <= token < 256 else pieces.get(token, b"\xff")
        for token in tokens
    ).decode("utf-8", errors="replace")
