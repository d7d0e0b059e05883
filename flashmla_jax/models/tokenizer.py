"""The tokenizer and the chat template of a Hugging Face checkpoint.

`tokenizer.json` is read by the `tokenizers` package. A chat template is Jinja, in
`chat_template.jinja` or in `tokenizer_config.json`, and is rendered by `jinja2` in the way of
transformers: in a sandbox, for it comes with the weights. Both packages are imported when they are
needed, and come with `pip install 'flashmla-jax[hf]'`.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads the tokenizer of a checkpoint.

    Args:
      path: a folder with `tokenizer.json` and, for chat templates and special tokens,
        `tokenizer_config.json` and `chat_template.jinja`, if it has them.

    Raises:
      FileNotFoundError: there is no `tokenizer.json`.
      ValueError: a file is damaged.
      ImportError: the `tokenizers` package is missing.
    """
    path = Path(path)
    file = path / _TOKENIZER
    if not file.is_file():
        others = [n for n in ("tiktoken.model", "tokenizer.model") if (path / n).is_file()]
        has = f"; it has {', '.join(others)}, which is not read here" if others else ""
        raise FileNotFoundError(f"{path} has no {_TOKENIZER}{has}")
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "a tokenizer needs the tokenizers package: pip install 'flashmla-jax[hf]'"
        ) from error
    try:
        model = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"{file} is damaged: {error}") from error

    config: dict[str, Any] = {}
    if (path / _CONFIG).is_file():
        try:
            config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path / _CONFIG} is no JSON: {error}") from error
    template = _default_template(config.get("chat_template"))
    if (path / _TEMPLATE).is_file():
        template = (path / _TEMPLATE).read_text(encoding="utf-8")
    return Tokenizer(model, config, template, str(path))


class Tokenizer:
    """Text to token ids and back; `load_tokenizer` makes it."""

    def __init__(
        self, model: Any, config: Mapping[str, Any], template: str | None, source: str
    ) -> None:
        """Takes a `tokenizers.Tokenizer`, `tokenizer_config.json`, a template, and their folder."""
        self._model = model
        self._template = template
        self._source = source
        # Written as text, or as an object that has it among properties.
        tokens = {name: token for name, token in config.items() if name.endswith("_token")}
        self._special = {
            name: token["content"] if isinstance(token, Mapping) else token
            for name, token in tokens.items()
            if isinstance(token, str | Mapping)
        }
        # transformers' classes add it by this field, whatever tokenizer.json does.
        bos = self._special.get("bos_token") if config.get("add_bos_token") else None
        self._bos = None if bos is None else model.token_to_id(bos)

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows, special ones included; every id is below it."""
        size: int = self._model.get_vocab_size()
        return size

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has one."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; by default with what the model expects around it, as a first token.

        Special tokens written out in `text` are read as such.
        """
        ids: list[int] = self._model.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, by default without special tokens."""
        ids = [int(i) for i in ids]
        text: str = self._model.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def stream(self) -> TextStream:
        """For the text of token ids that come one by one, without special tokens."""
        return TextStream(self.decode)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, as `chat_text` writes it."""
        text = self.chat_text(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)  # the template writes them

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """A conversation as the model was trained to read it.

        Args:
          messages: each with a "role", as "system", "user" or "assistant", and mostly a "content".
          add_generation_prompt: whether it ends with the beginning of the assistant's answer.
          variables: what else the template knows, as `thinking` or `tools`.

        Raises:
          ValueError: the checkpoint has no template, or it refuses the messages.
          ImportError: the `jinja2` package is missing.
        """
        if self._template is None:
            raise ValueError(
                f"{self._source} has no chat template: neither {_TEMPLATE} nor chat_template in "
                f"{_CONFIG}"
            )
        if not all(isinstance(message, Mapping) and "role" in message for message in messages):
            raise ValueError(f"messages must be mappings with a role each, got {messages!r}")
        try:
            import jinja2
            import jinja2.ext
            import jinja2.sandbox
        except ImportError as error:
            raise ImportError(
                "a chat template needs the jinja2 package: pip install 'flashmla-jax[hf]'"
            ) from error

        def refuse(message: str) -> NoReturn:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self._template).render(
                {
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                    "tools": None,  # transformers defines these two always
                    "documents": None,
                    **self._special,
                    **variables,
                }
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template of {self._source} does not take the messages: {error}"
            ) from error


class TextStream:
    """The text of a sequence, piece by piece; `Tokenizer.stream` makes it.

    All pieces together are what decoding all tokens gives, and no piece ends within a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Takes what gives the text of token ids."""
        self._decode = decode
        self._ids: list[int] = []  # the last ones whose text was given, and those after them
        self._given = 0  # how many the former are

    def step(self, token: int) -> str:
        """The text that this token completes; empty if it ends within a character."""
        self._ids.append(token)
        return self._take(whole=True)

    def finish(self) -> str:
        """What was held back, at the end of the sequence."""
        return self._take(whole=False)

    def _take(self, whole: bool) -> str:
        text = self._decode(self._ids)
        if whole and text.endswith("\ufffd"):
            return ""
        # What a token looks like may depend on those before it, as a space at the very beginning.
        new = text[len(self._decode(self._ids[: self._given])) :]
        if new:
            self._ids = self._ids[self._given :]
            self._given = len(self._ids)
        return new


def _default_template(template: Any) -> str | None:
    """The template of `tokenizer_config.json`: text, or a list of named ones."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
