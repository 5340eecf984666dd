"""From what a client sends to token ids: text, ids, or a conversation through the tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmzoo.serve.errors import Refused
from ssmzoo.serve.templates import ChatTemplate, EndlessTemplateError, TemplateError
from ssmzoo.train.vocabulary import Vocabulary

CONFIG, TEMPLATE, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"


class Prompter:
    """A vocabulary, with what the files beside a tokenizer say of it.

    Args:
        vocabulary: text to ids and back.
        folder: of the model; its ``tokenizer_config.json``, ``chat_template.jinja`` and ``generation_config.json`` are
            read where they are there.
        ends: ids that end an answer, besides those that the files name.

    Attributes:
        ends: the ids that end an answer.
        template: the chat template; None if there is none.

    Raises:
        ValueError: a file that holds something else.
    """

    def __init__(self, vocabulary: Vocabulary, folder: Path | None = None, ends: Sequence[int] = ()):
        self.vocabulary = vocabulary
        config = _json(folder, CONFIG)
        tokens = {name: _text(value) for name, value in config.items() if name.endswith("_token")}
        self.special = {name: text for name, text in tokens.items() if text is not None}
        self.template = _template(folder, config)
        found = [*ends, *_ids(_json(folder, GENERATION).get("eos_token_id"))]
        if (end := self.special.get("eos_token")) is not None:
            found += [id for id in [vocabulary.token_id(end)] if id is not None]
        self.ends = list(dict.fromkeys(found))

    def of_text(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt."""
        ids = self.vocabulary.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise Refused(400, "`prompt` must hold at least one token; got an empty text", "prompt")
        return ids

    def of_messages(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the answer begins.

        Raises:
            Refused: there is no template, or it takes no such conversation.
        """
        if self.template is None:
            raise Refused(
                400,
                f"this model has no chat template, neither in {CONFIG} nor in {TEMPLATE}; use /v1/completions",
                "messages",
            )
        try:
            text = self.template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self.special
            )
        except TemplateError as error:
            raise Refused(400, f"the model's chat template refuses `messages`: {error}", "messages") from None
        except EndlessTemplateError as error:
            raise Refused(500, f"the model's chat template {error}", "messages") from None
        ids = self.vocabulary.encode(text)
        if not ids:
            raise Refused(400, "the model's chat template makes an empty prompt of `messages`", "messages")
        return ids


def _template(folder: Path | None, config: dict[str, Any]) -> ChatTemplate | None:
    """The template of a file of its own, or of the tokenizer's config, where several may have names."""
    source = config.get("chat_template")
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[-1].get("template") if named else None
    if folder is not None and (folder / TEMPLATE).is_file():
        try:
            source = (folder / TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / TEMPLATE} must be UTF-8: {error}") from None
    if not isinstance(source, str):
        return None
    try:
        return ChatTemplate(source)
    except TemplateError as error:
        raise ValueError(f"{folder}: the chat template is no valid Jinja: {error}") from None
    except EndlessTemplateError as error:
        raise ValueError(f"{folder}: the chat template {error} while it was compiled") from None


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(found).__name__}")
    return found


def _text(token: object) -> str | None:
    """A special token, which may be described by an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _ids(value: object) -> list[int]:
    """An id, several, or none."""
    return [id for id in (value if isinstance(value, list) else [value]) if type(id) is int]
