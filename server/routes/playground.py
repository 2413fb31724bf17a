"""The page at ``/`` for people: files of ``server/playground``, which call this API and nothing else."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parents[1] / "playground"
_CACHE = {"Cache-Control": "no-cache"}
"""Browsers ask each time whether a file has changed: a new release shows at once."""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    """The playground."""
    return FileResponse(FOLDER / "index.html", headers=_CACHE)


class Files(StaticFiles):
    """The page's scripts, styles and fonts, below ``/playground``."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file."""
        response = await super().get_response(path, scope)
        response.headers.update(_CACHE)
        return response
