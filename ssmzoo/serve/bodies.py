"""The bodies of OpenAI's routes: the fields that this server takes, with their bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator

Stop = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Several = Field(min_length=1, fail_fast=True)  # a list ends at its first fault: one of a million is told as quickly
Ids = Annotated[list[StrictInt], Several]
Id = Annotated[StrictStr, Field(pattern="^(0|[1-9][0-9]{0,18})$")]  # one text for each, so that none comes twice
Bias = Annotated[float, Field(ge=-100, le=100)]
Texts = Annotated[list[StrictStr], Several]
IdLists = Annotated[list[Ids], Several]


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class Body(BaseModel):
    """What completions and chats share.

    Fields that change no answer, such as ``user``, are ignored; others that this server has not got are refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    model: StrictStr
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=1e6, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=1e-6, le=1e6, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**62)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[Id, Bias], Field(max_length=1024, fail_fast=True)] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def sampling(self) -> dict[str, Any]:
        """How tokens are drawn, as :meth:`ssmzoo.Engine.submit` takes it."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": {int(id): bias for id, bias in (self.logit_bias or {}).items()},
        }

    @property
    def count(self) -> int | None:
        """Most new tokens; None where the client leaves it open."""
        raise NotImplementedError

    @property
    def top(self) -> int | None:
        """How many likely tokens are told beside each; None where no log-probabilities are asked for."""
        raise NotImplementedError


class Completion(Body):
    """``/v1/completions``."""

    prompt: StrictStr | Texts | Ids | IdLists
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=1)
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def count(self) -> int | None:
        return self.max_tokens

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[id for id in self.prompt if isinstance(id, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class Part(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    content: StrictStr | Annotated[list[Part], Field(fail_fast=True)]
    name: StrictStr | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class Chat(Body):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Several]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("top_logprobs")
    @classmethod
    def _goes_with_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("must go with `logprobs`: true")
        return value

    @property
    def count(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
