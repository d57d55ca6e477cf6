"""The Grafana dashboard asks for what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "monitoring" / "grafana-dashboard.json"
SERVE_LABELS = {"model_name", "application", "deployment", "replica"}
SERIES = {name: metric for metric in METRICS for name in metric.scraped_as}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def test_every_series_exists_and_is_used_as_what_it_is(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        names = re.findall(r"\bray_\w+", query)
        assert names, query
        for name in names:
            assert name in SERIES, f"{name} in {query}"
            is_gauge = SERIES[name].kind == "gauge"
            assert is_gauge == (f"rate({name}" not in query), query
            assert name.endswith("_bucket") == (f"by (le) (rate({name}" in query), query


def test_every_label_exists(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        (name, *_) = re.findall(r"\bray_\w+", query)
        known = {*SERVE_LABELS, *SERIES[name].labels, "le"}
        selected = re.findall(r"(\w+)=~", query)
        grouped = [label for group in re.findall(r"by \(([^)]*)\)", query)
                   for label in group.split(", ")]  # fmt: skip
        assert {*selected, *grouped} <= known, query


def test_legends_name_labels_that_are_grouped_by(panels: list[dict[str, Any]]) -> None:
    for panel in panels:
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert f"by ({label})" in target["expr"] or "sum" not in target["expr"]


def test_every_panel_obeys_the_variables_and_the_data_source(
    dashboard: dict[str, Any], panels: list[dict[str, Any]]
) -> None:
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "model", "application", "replica"]
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            selectors = re.findall(r"{(model_name[^}]*)}", target["expr"])
            assert len(selectors) == len(re.findall(r"\bray_", target["expr"]))
            for selector in selectors:
                assert {"$model", "$application", "$replica"} <= set(re.findall(r"\$\w+", selector))


def test_panels_do_not_overlap_and_have_ids_of_their_own(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_every_metric_is_on_the_dashboard_or_can_be_read_from_another(
    dashboard: dict[str, Any],
) -> None:
    used = {SERIES[name] for query in queries(dashboard)
            for name in re.findall(r"\bray_\w+", query)}  # fmt: skip
    left_out = {metric.name for metric in METRICS if metric not in used}
    assert left_out == {"vllm_request_inference_time_seconds"}  # prefill and decode together


def test_every_metric_is_documented_by_its_scraped_name() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(ray_\w+)`", text, re.MULTILINE))
    assert documented == {metric.scraped_as[0].removesuffix("_bucket") for metric in METRICS}


def test_prometheus_finds_rays_nodes_where_ray_lists_them() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (files,) = job["file_sd_configs"]
    assert [Path(file).name for file in files["files"]] == [PROMETHEUS_SERVICE_DISCOVERY_FILE]
