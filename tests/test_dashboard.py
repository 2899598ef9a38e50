"""The Grafana dashboard and the alerting rules ask only for what the running metrics page tells."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from assistant.canary_watch import CanaryWatch
from assistant.shadow_watch import ShadowWatch
from storage.records import Turn
from storage.shadows import record_shadow_answer
from storage_fixtures import shadow_answer
from web_fixtures import QUESTION, Site, make_site, start_canary

GRAFANA = Path(__file__).parent.parent / "docs" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "kotae.json").read_text())
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGET_LABELS = {"instance", "job"}
"""What Prometheus itself adds to every series."""
OPERATORS = {"and", "or", "unless", "bool", "offset"}


@dataclass(frozen=True)
class Reading:
    """One metric in an expression, with the labels that it is selected by."""

    metric: str
    labels: frozenset[str]


def readings(expression: str) -> Iterator[Reading]:
    """Yield what a PromQL expression reads: names that are neither functions, operators nor lists of labels."""
    expression = re.sub(r'"[^"]*"', '""', expression)
    expression = re.sub(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", " ", expression)
    expression = re.sub(r"\[[^\]]*\]", " ", expression)
    selector = r"\b([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\s*\()(?![\w:])"
    outside_selectors = [
        match for match in re.finditer(selector, expression) if not in_braces(expression, match)
    ]
    for match in outside_selectors:
        if match[1] not in OPERATORS:
            yield Reading(match[1], frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", match[2] or "")))


def in_braces(expression: str, match: re.Match[str]) -> bool:
    before = expression[: match.start()]
    return before.count("{") > before.count("}")


def grouped_by(expression: str) -> set[str]:
    """Return the labels that an expression groups or joins by."""
    lists = re.findall(r"\b(?:by|on|ignoring|without)\s*\(([^)]*)\)", expression)
    return {label.strip() for names in lists for label in names.split(",")}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield where an expression stands, and the expression."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"panel {panel['title']!r}", target["expr"]
    for rule in RULES:
        yield f"alert {rule['alert']}", rule["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        yield f"variable {variable['name']}", f"sum by ({label}) ({metric})"


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Return metric → labels of the page of a server that has seen everything: answers, feedback, a canary and a shadow."""
    site = make_site(tmp_path_factory.mktemp("site"))
    client = site.client()
    sides = client.post("/api/pairs", json={"messages": QUESTION}).json()
    turn_ids = {"left_turn_id": sides["left"]["turn_id"], "right_turn_id": sides["right"]["turn_id"]}
    client.post("/api/comparisons", json={**turn_ids, "choice": "left"}).raise_for_status()
    rating = {"turn_id": turn_ids["left_turn_id"], "verdict": "up"}
    client.post("/api/ratings", json=rating).raise_for_status()
    start_canary(site, share=0.25)
    start_canary(site, share=1.0, role="shadow")
    turn, shadow = site.store.get(Turn, turn_ids["left_turn_id"]), site.services.release.served.shadow
    assert shadow is not None
    record_shadow_answer(site.store, shadow_answer(turn, shadow))
    CanaryWatch(site.store).look()
    ShadowWatch(site.store).look()
    with site.services.release.lease("conversation_1"):
        return metrics_of(site)


def metrics_of(site: Site) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"up": set()}  # Prometheus' own, about the scrape
    for line in site.client("operator").get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, labels = re.match(r"(\w+)(?:\{(.*)\})? ", line).groups()  # type: ignore[union-attr]
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels or ""))
    return found


@pytest.mark.parametrize(("where", "expression"), [pytest.param(*one, id=one[0]) for one in expressions()])
def test_every_metric_and_label_that_is_asked_for_is_exposed(
    exposed: dict[str, set[str]], where: str, expression: str
) -> None:
    read = list(readings(expression))
    assert read, "the expression reads nothing"
    for reading in read:
        assert reading.metric in exposed, (
            f"{where} reads {reading.metric}, which the metrics page does not have"
        )
        assert reading.labels <= exposed[reading.metric] | TARGET_LABELS, (
            f"{where}: labels of {reading.metric}"
        )
    known = TARGET_LABELS.union(*(exposed[reading.metric] for reading in read))
    assert grouped_by(expression) <= known, where


def test_every_metric_that_is_exposed_is_on_the_dashboard(exposed: dict[str, set[str]]) -> None:
    shown = {
        reading.metric
        for panel in PANELS
        for target in panel["targets"]
        for reading in readings(target["expr"])
    }
    ends = ("_sum", "_count")  # of histograms, whose buckets are shown
    told_by_alerts = {"up", "kotae_canary_verdict_timestamp_seconds"}
    assert {name for name in exposed if not name.endswith(ends)} - told_by_alerts == shown


def test_expressions_are_read_as_prometheus_reads_them() -> None:
    found = list(
        readings('sum by (a, b) (rate(x_total{c="{d}",e=~"f"}[5m])) / on (g) group_left () y or vector(0)')
    )
    assert found == [Reading("x_total", frozenset({"c", "e"})), Reading("y", frozenset())]


@pytest.mark.parametrize("fires", [True, False])
def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(fires: bool) -> None:
    cases = yaml.safe_load((GRAFANA / "alerts_test.yml").read_text())["tests"]
    asked = [
        asked for case in cases for asked in case["alert_rule_test"] if bool(asked["exp_alerts"]) == fires
    ]
    assert {one["alertname"] for one in asked} == {rule["alert"] for rule in RULES}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool, which comes with Prometheus")
def test_alerts_fire_when_they_should_and_not_before() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", str(GRAFANA / "alerts_test.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_has_a_title_a_unit_a_description_and_the_datasource_of_the_import(
    panel: dict[str, Any],
) -> None:
    assert panel["title"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert len(panel["description"]) > 40
    assert panel["description"].endswith(".")
    for asked in (panel, *panel["targets"]):
        assert asked["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}


def test_panels_have_ids_of_their_own_and_do_not_lie_on_each_other() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (column, line)
        for panel in panels
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for line in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(column for column, _ in cells) < 24


def test_the_dashboard_can_be_imported_anywhere() -> None:
    assert [one["name"] for one in DASHBOARD["__inputs"]] == ["DS_PROMETHEUS"]
    assert DASHBOARD["id"] is None
    assert {"panel", "grafana", "datasource"} == {one["type"] for one in DASHBOARD["__requires"]}
    needed = {one["id"] for one in DASHBOARD["__requires"] if one["type"] == "panel"}
    assert needed == {panel["type"] for panel in PANELS}


def test_every_alert_says_what_it_means_and_how_bad_it_is() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith(".")


def test_every_panel_and_alert_is_explained_in_the_document() -> None:
    document = (GRAFANA.parent / "operations.md").read_text()
    missing = [panel["title"] for panel in PANELS if panel["title"] not in document]
    missing += [rule["alert"] for rule in RULES if rule["alert"] not in document]
    assert not missing
