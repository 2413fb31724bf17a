"""Python client and command line.

from clients import Client
"""

from clients.aio import AsyncClient
from clients.calls import Event, Preview
from clients.client import Client
from clients.errors import ApiError, JobEndedBadly, Unreachable

__all__ = ["ApiError", "AsyncClient", "Client", "Event", "JobEndedBadly", "Preview", "Unreachable"]
