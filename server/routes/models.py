"""Models: what can be sampled."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from model_core.bundle import BundleError
from server.context import Ctx
from server.problems import ProblemError, responses
from server.schemas import ModelList, ModelView

router = APIRouter(tags=["models"])


@router.get("/models", operation_id="listModels", summary="All models", responses=responses(503))
async def list_models(context: Ctx) -> ModelList:
    """Models with their classes, defaults, versions and limits."""
    fleet = await context.store.fleet()
    return ModelList(models=[context.catalog.view(n, len(fleet.of(n))) for n in context.catalog.latest()])


@router.get("/models/{name}", operation_id="getModel", summary="One model", responses=responses(404, 422, 503))
async def get_model(name: Annotated[str, Path(max_length=64)], context: Ctx) -> ModelView:
    """A model with its classes, defaults, versions and limits."""
    fleet = await context.store.fleet()
    try:
        if "@" in name:
            raise BundleError(f"there is no model {name!r}; versions are listed with the model")
        return context.catalog.view(name, len(fleet.of(name)))
    except BundleError as error:
        raise ProblemError(404, str(error)) from None
