"""Webhooks: telling a URL that a job has ended."""

from __future__ import annotations

import json
import logging
import time
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from worker.jobs import SampleJob
from worker.records import Outcome

log = logging.getLogger(__name__)

ATTEMPTS = 3


def send_webhook(job: SampleJob, outcome: Outcome, hosts: tuple[str, ...]) -> None:
    """Tell the request's URL, if it has one, how it ended: a POST of JSON, tried three times."""
    if job.webhook_url is None:
        return
    if urlsplit(job.webhook_url).hostname not in hosts:
        log.warning("job %s: no webhook: its host is not in webhook_hosts", job.id)
        return
    body = {"id": job.id, "status": outcome.status, "error": outcome.error.model_dump() if outcome.error else None}
    request = Request(job.webhook_url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST")
    for attempt in range(ATTEMPTS):
        try:
            with urlopen(request, timeout=10):
                return
        except OSError as error:
            log.warning("job %s: webhook failed: %s", job.id, error)
            time.sleep(2.0**attempt)
