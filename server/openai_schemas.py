"""OpenAI's images API: its requests and answers, as far as a class-conditional model can serve them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from server.schemas import Answer, SamplingOptions

OutputFormat = Literal["png", "jpeg", "webp"]
_IGNORED = "Accepted, without effect."


class ImagesRequest(SamplingOptions):
    """``POST /v1/images/generations``; the fields that API does not have go into ``extra_body`` of its client."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "emoji32",
                    "prompt": "heart",
                    "n": 2,
                    "size": "32x32",
                    "response_format": "b64_json",
                    "seed": 7,
                }
            ]
        },
    )

    prompt: Annotated[str, StringConstraints(max_length=1000)] = Field(
        description="Names a class: its name or index, or words that name one and no other. For a model "
        "without classes: its own name, or nothing.",
        examples=["heart"],
    )
    model: Annotated[str, StringConstraints(max_length=100)] | None = Field(
        default=None, description="`name` or `name@version`; default: the one model there is.", examples=["emoji32"]
    )
    n: int | None = Field(default=None, ge=1, le=100_000, description="Pictures; default: 1.")
    size: Annotated[str, StringConstraints(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = Field(
        default=None,
        description="`auto`: the model's; else a size the model makes, alone or with an upsampler.",
        examples=["32x32"],
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None, description="How pictures come; default: both ways."
    )
    output_format: OutputFormat | None = Field(default=None, description="Default: png.")
    output_compression: int | None = Field(default=None, ge=100, le=100, description="Only 100.")
    background: Literal["auto", "opaque"] | None = Field(default=None, description="Pictures are opaque.")
    stream: bool | None = Field(default=None, description="Answer with events; for one picture.")
    partial_images: int | None = Field(
        default=None, ge=0, le=3, description="With `stream`: previews on the way, at most 64x64; default: 0."
    )
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description=_IGNORED
    )
    style: Literal["vivid", "natural"] | None = Field(default=None, description=_IGNORED)
    moderation: Literal["auto", "low"] | None = Field(default=None, description=_IGNORED)
    complexity: Literal["low", "medium", "high"] | None = Field(default=None, description=_IGNORED)
    safety_identifier: Annotated[str, StringConstraints(max_length=1000)] | None = Field(
        default=None, description=_IGNORED
    )
    user: Annotated[str, StringConstraints(max_length=1000)] | None = Field(default=None, description=_IGNORED)

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream and (self.n or 1) > 1:
            raise ValueError("n: with stream only 1 is possible")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images: needs stream")
        return self

    def options(self) -> dict[str, Any]:
        """The sampling options that were given."""
        given = {name: getattr(self, name) for name in SamplingOptions.model_fields}
        return {name: value for name, value in given.items() if value is not None}


class OpenAIImage(Answer):
    """One picture."""

    b64_json: str | None = Field(default=None, description="The file in base64.")
    url: str | None = Field(default=None, description="Where it can be fetched; where keys are needed, for an hour.")
    revised_prompt: str | None = Field(default=None, description="The class.")
    seed: int = Field(description="Makes this picture again.")


class ImagesResponse(Answer):
    """The pictures."""

    created: int = Field(description="Unix time, s.")
    data: list[OpenAIImage]
    size: str
    output_format: OutputFormat
    background: Literal["opaque"] = "opaque"
    job: str = Field(description="Id of the job, for `GET /jobs/{id}`.")


class TokenUsage(Answer):
    """No model here counts tokens."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0


class PictureEvent(Answer):
    """A server-sent event of a picture: on its way, or done."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    created_at: int
    size: str
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    partial_image_index: int | None = None
    usage: TokenUsage | None = None
    seed: int
    job: str


class OpenAIModel(Answer):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When it was published, Unix time, s.")
    owned_by: str = "guided-sampling-server"


class OpenAIModelList(Answer):
    """The models that can be sampled."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class OpenAIError(Answer):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="Field at fault.")
    code: str | None


class OpenAIProblem(Answer):
    """An error of the endpoints below `/v1`."""

    error: OpenAIError
