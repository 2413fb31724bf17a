from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.stack import Stack

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = (DEPLOY / "alerts.yml").read_text()


def panels() -> Iterator[tuple[str, str]]:
    """Title and expression of each query of the dashboard."""
    board = json.loads((DEPLOY / "grafana/dashboards/guided.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@pytest.fixture(scope="module")
def exported(stack: Stack) -> set[str]:
    """Names of all samples the API and a worker export."""
    done = stack.generate(200, headers={"Prefer": "wait=30"}, class_label=1, steps=2)
    assert done["status"] == "finished"
    (report,) = [json.loads(stack.redis().get(k) or b"") for k in stack.redis().keys("guided:worker:*")]
    text = stack.http.get("/metrics").text + httpx.get(report["metrics_url"]).text
    families = list(text_string_to_metric_families(text))
    # A counter that has not counted anything has no samples yet.
    return {sample.name for family in families for sample in family.samples} | {
        f"{family.name}_total" for family in families if family.type == "counter"
    }


@pytest.mark.parametrize(("title", "expression"), [*panels(), ("alerts", ALERTS)])
def test_every_metric_asked_for_is_exported(exported: set[str], title: str, expression: str) -> None:
    asked = set(re.findall(r"\b(?:guided|process)_\w+", expression))
    assert asked <= exported
    assert asked or title == "Alerts"


def test_every_alert_is_tested() -> None:
    tests = (DEPLOY / "alerts_test.yml").read_text()
    names = re.findall(r"- alert: (\w+)", ALERTS)
    fired = re.findall(r"alertname: (\w+)\n\s+exp_alerts:\n\s+- exp_labels", tests)
    assert sorted(set(fired)) == sorted(names)
