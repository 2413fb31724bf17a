"""OpenAI's images API: the same walk as ``POST /generate``, in that API's words."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from model_core.bundle import Bundle, BundleError
from server.catalog import Catalog
from server.context import Context, Ctx
from server.openai_schemas import ImagesRequest, ImagesResponse, OpenAIImage, OpenAIModel, OpenAIModelList
from server.openai_stream import PictureStream, cancel
from server.problems import ProblemError, invalid, openai_responses
from server.prompts import NoClassError, find_class, normalised
from server.schemas import FieldError, GenerateRequest
from server.security import Caller, Who, requires
from server.sizes import upsampler_for
from server.store import Seen
from server.submission import ended, submit
from server.views import failure
from worker.artifacts import convert

router = APIRouter(prefix="/v1", tags=["OpenAI"])

DEADLINE_S = 590.0
"""Seconds for which a call waits if it names no deadline, as OpenAI's clients do."""
_NAMES = {"class_label": "prompt", "num_images": "n"}
"""Fields of ``POST /generate`` by their names here."""


@router.post(
    "/images/generations",
    operation_id="openaiImages",
    summary="Pictures, as OpenAI's API makes them",
    dependencies=[requires("generate")],
    response_model=ImagesResponse,
    responses={
        200: {"description": "The pictures.", "content": {"text/event-stream": {"schema": {"type": "string"}}}},
        **openai_responses(400, 404, 409, 413, 429, 500, 503, 504),
    },
)
async def images(body: ImagesRequest, request: Request, context: Ctx, caller: Who) -> Response | ImagesResponse:
    """Pictures of the class that `prompt` names. The answer comes when they are done, or in events with `stream`.

    If the caller goes away, the job is cancelled.
    """
    asked, meant, size = await run_in_threadpool(_asked, body, context)  # comparing names may take a while
    try:
        if body.stream and body.partial_images:
            steps = context.planner.plan(asked).steps
            asked = asked.model_copy(update={"preview_every": max(1, steps // (body.partial_images + 1))})
        job_id = await submit(context, caller, asked, None, b"")
    except ProblemError as problem:
        problem.errors = [FieldError(field=_NAMES.get(e.field, e.field), message=e.message) for e in problem.errors]
        raise
    if body.stream:
        stream = PictureStream(context, job_id, body.partial_images or 0, size, body.output_format or "png")
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream.events(_finished), media_type="text/event-stream", headers=headers)
    seen = await _ended_or_left(context, request, job_id)
    job = seen.record.job
    return ImagesResponse(
        created=int(job.created),
        data=[
            OpenAIImage(
                seed=job.seed_of(index),
                revised_prompt=meant,
                **await _ways(context, caller, request, body, seen, index),
            )
            for index in range(job.num_images)
        ],
        size=size,
        output_format=body.output_format or "png",
        job=job.id,
    )


def _asked(body: ImagesRequest, context: Context) -> tuple[GenerateRequest, str | None, str]:
    """The request as ``POST /generate`` would have it, the class it is understood to name, and the pictures' size."""
    bundle = _model(context.catalog, body.model)
    label, meant = _class_of(body.prompt, bundle)
    size, upsampler = upsampler_for(body.size, body.upsample, bundle, context.catalog)
    options = {"deadline_s": min(DEADLINE_S, context.settings.max_deadline_s), **body.options()}
    asked = GenerateRequest(
        **(options | ({"upsample": upsampler} if upsampler else {})),
        model=f"{bundle.name}@{bundle.version}" if body.model and "@" in body.model else bundle.name,
        class_label=label,
        num_images=body.n or 1,
        format=body.output_format or "png",
    )
    return asked, meant, f"{size}x{size}"


@router.get(
    "/models",
    operation_id="openaiModels",
    summary="Models, as OpenAI's API lists them",
    responses=openai_responses(503),
)
async def models(context: Ctx) -> OpenAIModelList:
    """The models that can be sampled."""
    catalog = context.catalog
    return OpenAIModelList(data=[_describe(catalog.latest()[name], name) for name in catalog.served()])


@router.get(
    "/models/{model}",
    operation_id="openaiModel",
    summary="One model, as OpenAI's API shows it",
    responses=openai_responses(400, 404, 503),
)
async def model(model: Annotated[str, Path(max_length=100)], context: Ctx) -> OpenAIModel:
    """A model by `name` or `name@version`."""
    return _describe(_model(context.catalog, model), model)


def _model(catalog: Catalog, reference: str | None) -> Bundle:
    """The model a request names, or the only one there is.

    Raises:
        ProblemError: 404 for one that is not there, 422 where one must be named.
    """
    served = catalog.served()
    if reference is None:
        if len(served) != 1:
            raise invalid([("model", f"is needed; there are: {', '.join(served) or 'none'}")])
        return catalog.latest()[served[0]]
    try:
        bundle = catalog.find(reference)
    except BundleError as error:
        raise _not_found(str(error)) from None
    if bundle.config.kind != "diffusion":
        raise _not_found(f"{reference} is an upsampler; 'size' or 'upsample' ask for it (models: {', '.join(served)})")
    return bundle


def _not_found(detail: str) -> ProblemError:
    return ProblemError(404, detail, [FieldError(field="model", message=detail)], code="model_not_found")


def _describe(bundle: Bundle, name: str) -> OpenAIModel:
    return OpenAIModel(id=name, created=int(bundle.path.stat().st_mtime))


def _class_of(prompt: str, bundle: Bundle) -> tuple[int | None, str | None]:
    """Class a prompt names, and its name.

    Raises:
        ProblemError: 422, with the classes there are.
    """
    count, names = bundle.config.num_classes, bundle.config.class_names
    if count is None:
        if normalised(prompt) in ("", normalised(bundle.name)):
            return None, None
        raise invalid([("prompt", f"{bundle.name} knows no classes; the prompt must be its name, or empty")])
    try:
        index = find_class(prompt, names, count)
    except NoClassError as error:
        raise invalid([("prompt", str(error))]) from None
    return index, names[index] if names else str(index)


async def _ended_or_left(context: Context, request: Request, job_id: str) -> Seen:
    """The finished job; it is cancelled if the caller goes away first.

    Raises:
        ProblemError: if it did not finish.
    """
    waiting = asyncio.create_task(ended(context, job_id, None))
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return _finished(waiting.result())
        await cancel(context, job_id)
        raise ProblemError(409, "the caller went away")
    finally:
        waiting.cancel()
        leaving.cancel()


def _finished(seen: Seen) -> Seen:
    """An ended job, if it finished.

    Raises:
        ProblemError: 504 after its deadline, 409 if somebody cancelled it, else 500.
    """
    job_id = seen.record.job.id
    if seen.status == "finished":
        return seen
    told = failure(seen)
    if told is None:
        raise ProblemError(409, f"job {job_id} was cancelled", code="cancelled")
    raise ProblemError(504 if told.kind == "deadline" else 500, f"job {job_id}: {told.message}", code=told.kind)


async def _left(request: Request) -> None:
    """Until the caller goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _ways(
    context: Context, caller: Caller, request: Request, body: ImagesRequest, seen: Seen, index: int
) -> dict[str, str]:
    """How one picture is handed over: in the answer, as a link, or both."""
    job, ways = seen.record.job, {}
    if body.response_format != "url":
        png = await run_in_threadpool(context.artifacts.read, job.id, index)
        file = png if body.output_format in (None, "png") else await run_in_threadpool(convert, png, body.output_format)
        ways["b64_json"] = base64.b64encode(file).decode()
    if body.response_format != "b64_json":
        path = f"/jobs/{job.id}/images/{index}"
        signed = path if caller.key is None else await run_in_threadpool(context.links.sign, path)
        ways["url"] = str(request.base_url).rstrip("/") + signed
    return ways
