"""Models: what can be sampled."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import FileResponse

from model_core.bundle import Bundle, BundleError
from server.context import Context, Ctx
from server.problems import ProblemError, responses
from server.schemas import ModelList, ModelView

router = APIRouter(tags=["models"])

ModelName = Annotated[str, Path(max_length=64)]
_CACHE = {"Cache-Control": "private, max-age=300"}


@router.get("/models", operation_id="listModels", summary="All models", responses=responses(503))
async def list_models(context: Ctx) -> ModelList:
    """Models with their classes, defaults, versions and limits."""
    fleet = await context.store.fleet()
    return ModelList(models=[context.catalog.view(n, len(fleet.of(n))) for n in context.catalog.latest()])


@router.get("/models/{name}", operation_id="getModel", summary="One model", responses=responses(404, 422, 503))
async def get_model(name: ModelName, context: Ctx) -> ModelView:
    """A model with its classes, defaults, versions and limits."""
    fleet = await context.store.fleet()
    try:
        return context.catalog.view(_newest(name, context).name, len(fleet.of(name)))
    except BundleError as error:
        raise ProblemError(404, str(error)) from None


@router.get(
    "/models/{name}/examples",
    operation_id="getExamples",
    summary="An example of each class",
    response_class=FileResponse,
    responses={
        200: {
            "description": "Squares in the order of the classes, row by row, `ceil(sqrt(num_classes))` to a row.",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        },
        **responses(404, 422),
    },
)
async def get_examples(name: ModelName, context: Ctx) -> FileResponse:
    """One picture with an example of each class of the model's newest version; 404 if its bundle has none."""
    try:
        sheet = _newest(name, context).examples
    except BundleError as error:
        raise ProblemError(404, str(error)) from None
    if not sheet.is_file():
        raise ProblemError(404, f"model {name!r} comes without examples")
    return FileResponse(sheet, media_type="image/png", headers=_CACHE)


def _newest(name: str, context: Context) -> Bundle:
    if "@" in name:
        raise BundleError(f"there is no model {name!r}; versions are listed with the model")
    return context.catalog.find(name)
