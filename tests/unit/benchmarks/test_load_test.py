"""What is read from guidellm's report, and how it is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.load_test import COLUMNS, command, figures_of


def metric(mean: float, median: float, p95: float) -> dict[str, Any]:
    return {"successful": {"mean": mean, "median": median, "percentiles": {"p95": p95}}}


def test_its_figures_by_the_number_of_streams() -> None:
    metrics = {
        "request_totals": {"successful": 12, "errored": 1, "incomplete": 3, "total": 16},
        "requests_per_second": metric(3.5, 0, 0),
        "output_tokens_per_second": metric(105.0, 0, 0),
        "time_to_first_token_ms": metric(0, 80.0, 120.0),
        "inter_token_latency_ms": metric(0, 11.0, 0),
    }
    report = {"benchmarks": [{"config": {"strategy": {"streams": 4}}, "metrics": metrics}]}
    assert figures_of(report) == {
        4: dict(zip(COLUMNS, (12, 1, 3.5, 105.0, 80.0, 120.0, 11.0), strict=True))
    }


def test_it_is_asked_for_every_number_of_streams_and_for_nothing_from_outside() -> None:
    options = argparse.Namespace(
        model_path=Path("model"), streams=[1, 8], tokens=64, seconds=20
    )  # fmt: skip
    words = command("guidellm", "http://127.0.0.1:1", options, Path("report.json"))
    assert words[words.index("--override") + 1 :][:2] == ["profile.streams", "1,8"]
    tokenizer = words[words.index("--tokenizer") + 1]
    assert tokenizer.endswith(f"model={Path('model').resolve()}")  # a folder, no name on the Hub
    assert {w.split(",")[0] for w in words if "synthetic" in w} == {
        "kind=synthetic_image", "kind=synthetic_text",
    }  # fmt: skip
