"""Chat templates: conversations to ids, with what the template wrote kept apart from what people wrote.

A template is rendered with a mark in place of every message, the rendering is split at the marks, and the parts are
encoded one by one: the template's own text with its control tokens, the messages with none. Ids of the parts are
concatenated, so what stands after the prompt can never change the prompt's ids.
"""

import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from gvjax.data import tokenizer as tokenizers
from gvjax.data.schema import Message
from gvjax.data.tokenizer import TextTokenizer


class Part(NamedTuple):
    """A stretch of a rendered conversation.

    Attributes:
      text: what it says.
      control: True where the template wrote it, False where a message did.
    """

    text: str
    control: bool


# A line break right after a block would be trimmed away, hence the breaks within expressions.
HH_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '\n\nHuman: ' ~ message.content }}"
    "{% elif message.role == 'assistant' %}{{ '\n\nAssistant: ' ~ message.content }}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""The dialogue marks of hh-rlhf, for base models without a template of their own."""

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML without a system message of its own."""


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what the assistant says in training templates: what stands in it, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


# A private-use character: it survives `trim`. Only renderings without the messages' words are searched for it, so words may
# hold it, and no tokenizer ever sees it.
_MARK = "\ue000"

_TRIMS: Sequence[Callable[[str], str]] = (str, str.strip, str.lstrip, str.rstrip)


class ChatTemplate:
    """A jinja2 chat template in a sandbox.

    `tools` and `documents` are None, as in transformers where there are none. `strftime_now` is left undefined on purpose:
    with it the same row would have other ids tomorrow.

    Args:
      source: the template.
      special_tokens: names that the template may use ("bos_token", "eos_token") -> text.

    Attributes:
      fingerprint: hex digest of the template and those names.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template is not valid jinja2, line {error.lineno}: {error}"
            ) from error
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.fingerprint = hashlib.sha256(
            json.dumps([source, sorted(self.special_tokens.items())]).encode()
        ).hexdigest()

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike[str], special_tokens: Mapping[str, str]
    ) -> "ChatTemplate | None":
        """The template of a model folder, or None: chat_template.jinja, else tokenizer_config.json's `chat_template`."""
        directory = pathlib.Path(directory)
        file = directory / "chat_template.jinja"
        if file.is_file():
            return cls(file.read_text("utf-8"), special_tokens)
        config = directory / "tokenizer_config.json"
        source = (
            json.loads(config.read_text("utf-8")).get("chat_template")
            if config.is_file()
            else None
        )
        if isinstance(source, list):
            # Several named templates; the one for plain chat is called "default".
            source = {each["name"]: each["template"] for each in source}.get("default")
        return None if source is None else cls(source, special_tokens)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> str:
        """str: the conversation as the model reads it, up to the assistant's turn if asked for.

        Raises:
          ValueError: where the template refuses the conversation.
        """
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            return self._template.render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template refuses this conversation ({error}): {turns!r}"
            ) from error

    def parts(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> list[Part]:
        """The rendering, split into the template's text and the messages'.

        Raises:
          ValueError: where the template does more to a message than trim it, so that the two cannot be told apart.
        """
        marked, texts = self._marked(messages, add_generation_prompt)
        return _split(marked, texts)

    def _marked(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[str, list[str]]:
        """The rendering with marks for the messages, and what the marks stand for."""
        # An empty message stays empty: templates ask whether there is one.
        marked = self.render(
            [
                Message(turn.role, f"{_MARK}{i}{_MARK}" if turn.content else "")
                for i, turn in enumerate(messages)
            ],
            add_generation_prompt=add_generation_prompt,
        )
        wanted = self.render(messages, add_generation_prompt=add_generation_prompt)
        # Some templates trim every message, some only the assistant's.
        for others, assistant in itertools.product(_TRIMS, repeat=2):
            texts = [
                (assistant if turn.role == "assistant" else others)(turn.content)
                for turn in messages
            ]
            if "".join(part.text for part in _split(marked, texts)) == wanted:
                return marked, texts
        raise ValueError(
            "the chat template rewrites messages, so their text cannot be told from the template's; use a template that "
            f"prints each message as it is. The conversation: {_show(messages)}"
        )

    def encode_prompt(
        self, tokenizer: TextTokenizer, prompt: Sequence[Message]
    ) -> list[int]:
        """Ids of a prompt, up to where the assistant's answer begins."""
        return encode_parts(tokenizer, self.parts(prompt, add_generation_prompt=True))

    def encode_completion(
        self,
        tokenizer: TextTokenizer,
        prompt: Sequence[Message],
        completion: Sequence[Message],
    ) -> list[int]:
        """Ids of an answer to a prompt, with exactly one EOS, which is last.

        What the template writes after the answer belongs to the completion as far as its first EOS ("<|im_end|>" yes, the
        line break after it no). Where it writes none, one follows the template's text.

        Raises:
          ValueError: where the rendered prompt is not the beginning of the rendered whole: such a template would train
            the model on prompts that it never sees.
        """
        before, texts = self._marked(prompt, True)
        whole, whole_texts = self._marked([*prompt, *completion], False)
        if not whole.startswith(before) or whole_texts[: len(texts)] != texts:
            raise ValueError(
                "the chat template breaks the prefix property: with a generation prompt the conversation renders to "
                f"{self.render(prompt, add_generation_prompt=True)!r}, which does not begin the whole, "
                f"{self.render([*prompt, *completion])!r}; use another template. The row: {_show([*prompt, *completion])}"
            )
        answer = _split(whole[len(before) :], whole_texts)
        ids = encode_parts(tokenizer, answer)
        if not tokenizer.eos_ids.intersection(ids) and answer and answer[-1].control:
            answer[-1] = Part(answer[-1].text.rstrip(), True)
            ids = encode_parts(tokenizer, answer)
        return tokenizers.end(tokenizer, ids)


def _show(messages: Sequence[Message]) -> str:
    return repr([{"role": turn.role, "content": turn.content} for turn in messages])


def _split(marked: str, texts: Sequence[str]) -> list[Part]:
    """Parts of a marked rendering.

    Blanks right before a message join it: tokenizers tie a blank to the word that follows.
    """
    parts: list[Part] = []
    position = 0
    for found in re.finditer(f"{_MARK}(\\d+){_MARK}", marked):
        control = marked[position : found.start()]
        kept = control.rstrip(" ")
        parts.append(Part(kept, True))
        parts.append(Part(control[len(kept) :] + texts[int(found[1])], False))
        position = found.end()
    parts.append(Part(marked[position:], True))
    return [part for part in parts if part.text]


def encode_parts(tokenizer: TextTokenizer, parts: Sequence[Part]) -> list[int]:
    """Ids of parts, encoded one by one and concatenated."""
    return [
        token
        for part in parts
        for token in (
            tokenizer.encode_control(part.text)
            if part.control
            else tokenizer.encode(part.text)
        )
    ]
