"""Which backend a layer of a GPU gets: by timings, which are measured, kept and found again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.awq import QuantizedWeight, W4A16Linear, backends_of, linear, quantize_rtn
from models.awq.backends import CHOICE, choice, measuring, timings
from models.awq.backends.base import Backend, BackendMismatch, Packed, Shape
from models.awq.backends.choice import ROWS, Chooser, rank, rows_measured
from models.awq.backends.reference import Reference
from models.awq.backends.timings import Environment, Timing, Timings, layer_key

CPU = torch.device("cpu")
SHAPE = Shape(32, 128, 64)
HERE = Environment("Some GPU", (9, 0), "kernels", {"torch": "2"})


class Fake(Reference):
    """Computes what the reference does, says how, and what it cannot."""

    def __init__(self, *plans: str, cannot: str | None = None) -> None:
        self.ways = plans or ("",)
        self.cannot = cannot
        self.ran: list[tuple[str, int]] = []

    def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
        return self.cannot

    def plans(self, shape: Shape, rows: int, device: torch.device) -> tuple[str, ...]:
        return self.ways

    def run(self, plan: str, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        self.ran.append((plan, x.shape[0]))
        return self.matmul(x, packed, shape)


class Broken(Fake):
    """Packs nothing that it would recognise."""

    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        raise BackendMismatch("it was all a misunderstanding")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeMeasure:
    """Answers from `speeds`: microseconds by backend; each number of rows takes `seconds`."""

    def __init__(self, speeds: Mapping[str, float], clock: Clock, seconds: float = 1.0) -> None:
        self.speeds, self.clock, self.seconds = speeds, clock, seconds
        self.asked: list[list[int]] = []

    def __call__(
        self, backends: Mapping[str, Backend], shape: Shape, rows: Iterable[int],
        device: torch.device, dtype: torch.dtype,
    ) -> Iterator[tuple[int, dict[str, Timing]]]:  # fmt: skip
        self.asked.append(list(rows))
        for count in rows:
            self.clock.now += self.seconds
            yield count, {n: Timing(f"{n} at {count}", self.speeds[n]) for n in backends}


def chooser(
    backends: Mapping[str, Backend], speeds: Mapping[str, float], known: Timings | None = None,
    *, seconds: float = 1e9,
) -> tuple[Chooser, FakeMeasure]:  # fmt: skip
    clock = Clock()
    measure = FakeMeasure(speeds, clock)
    return Chooser(backends, known or Timings(HERE), measure, seconds=seconds, clock=clock), measure


def names(chooser: Chooser, dtype: torch.dtype = torch.float16) -> list[str]:
    return [name for name, _ in chooser.choose(SHAPE, CPU, dtype)]


# ---- the choice -----------------------------------------------------------------------------


def test_the_fastest_is_chosen_and_runs_by_its_fastest_plan() -> None:
    slow, fast = Fake("a", "b"), Fake("c")
    choose, measure = chooser({"slow": slow, "fast": fast}, {"slow": 9.0, "fast": 3.0})
    (name, backend), *rest = choose.choose(SHAPE, CPU, torch.float16)
    assert name == "fast" and [name for name, _ in rest] == ["slow"]
    assert measure.asked == [list(ROWS)]
    weight = quantize_rtn(torch.randn(32, 128), 64)
    packed = backend.pack(weight, CPU, torch.float32)
    for rows in (1, 3, 5000):
        backend.matmul(torch.randn(rows, 128), packed, SHAPE)
    assert fast.ran == [("fast at 1", 1), ("fast at 4", 3), ("fast at 4096", 5000)]


def test_a_shape_is_measured_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    choose, measure = chooser({"x": Fake(), "y": Fake()}, {"x": 1, "y": 2})
    with caplog.at_level(logging.INFO):
        assert names(choose) == names(choose) == ["x", "y"]
    assert len(measure.asked) == 1
    assert caplog.text.count("32x128 g64 float16 is computed by x") == 1
    names(choose, torch.bfloat16)
    assert len(measure.asked) == 2, "another dtype is another matter"


def test_nothing_is_measured_where_there_is_nothing_to_choose() -> None:
    backends = {"able": Fake(), "unable": Fake(cannot="no")}
    choose, measure = chooser(backends, {"able": 1})
    assert names(choose) == ["able"] and measure.asked == []
    backends["able"] = Fake("one way", "another")
    assert names(choose) == ["able"] and len(measure.asked) == 1


def test_that_nothing_fast_can_do_a_layer_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    choose, _ = chooser({"x": Fake(cannot="too odd"), "y": Fake(cannot="too old")}, {})
    assert names(choose) == names(choose) == []
    assert (
        caplog.text.count("no fast backend can do 32x128 g64 float16: x: too odd; y: too old") == 1
    )


def test_unmeasured_backends_are_taken_in_their_order_and_by_their_own_plan() -> None:
    first = Fake("mine", "other")
    choose, measure = chooser({"first": first, "second": Fake()}, {}, seconds=0)
    assert names(choose) == ["first", "second"] and measure.asked == []
    _, backend = choose.choose(SHAPE, CPU, torch.float16)[0]
    packed = backend.pack(quantize_rtn(torch.randn(32, 128), 64), CPU, torch.float32)
    backend.matmul(torch.randn(2, 128), packed, SHAPE)
    assert first.ran == [], "its own matmul was asked, which has a plan of its own"


def test_measuring_stops_when_its_time_is_up_and_goes_on_at_the_next_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    known, backends = Timings(HERE), {"x": Fake(), "y": Fake()}
    choose, measure = chooser(backends, {"x": 2, "y": 1}, known, seconds=2.5)
    with caplog.at_level(logging.WARNING):
        assert names(choose) == ["y", "x"], "as far as it is known"
    assert "the rest is measured at the next start" in caplog.text
    assert sorted(known.of(SHAPE, torch.float16)) == [1, 2, 4]
    names(choose)
    assert len(measure.asked) == 1, "this process has no time left"
    later, measure = chooser(backends, {"x": 2, "y": 1}, known)
    names(later)
    assert measure.asked == [list(ROWS[3:])]


def test_measuring_that_finds_no_memory_leaves_the_order_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def measure(*_: object) -> Iterator[tuple[int, dict[str, Timing]]]:
        yield 1, {"y": Timing("", 1.0), "x": Timing("", 2.0)}
        raise torch.OutOfMemoryError("full")

    choose = Chooser({"x": Fake(), "y": Fake()}, Timings(HERE), measure)
    assert names(choose) == ["y", "x"], "what was measured before counts"
    assert "there is no memory to measure 32x128 g64 float16: full" in caplog.text


@pytest.mark.parametrize(("timings", "expected"), [
    ({}, ["a", "b", "c"]),
    ({1: {"b": 1.0, "a": 2.0}}, ["b", "a", "c"]),
    # Few rows count double.
    ({1: {"a": 1.0, "b": 2.0}, 512: {"a": 2.0, "b": 1.0}}, ["a", "b", "c"]),
    ({1: {"a": 1.0, "b": 1.2}, 512: {"a": 4.0, "b": 1.0}}, ["b", "a", "c"]),
    # What fails for some rows comes behind what can do all.
    ({1: {"a": 1.0, "b": 9.0}, 64: {"b": 9.0}}, ["b", "a", "c"]),
    # Nor does it matter what is not there any more.
    ({1: {"gone": 0.1, "c": 1.0, "a": 2.0, "b": 3.0}}, ["c", "a", "b"]),
])  # fmt: skip
def test_ranks(timings: dict[int, dict[str, float]], expected: list[str]) -> None:
    by_rows = {
        rows: {name: Timing("", microseconds) for name, microseconds in by_name.items()}
        for rows, by_name in timings.items()
    }
    assert rank(["a", "b", "c"], by_rows) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (4096, 4096), (9999, 4096)],
)
def test_rows_take_the_plan_of_the_next_larger_number(rows: int, expected: int) -> None:
    assert rows_measured(rows) == expected and expected in ROWS


def test_a_layer_takes_the_best_that_really_packs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backends = {"best": Broken(), "good": Fake(), "bad": Fake()}
    choose, _ = chooser(backends, {"best": 1, "good": 2, "bad": 3})
    monkeypatch.setattr(linear, "choose", choose.choose)
    monkeypatch.setattr(linear, "_warned", set())
    weight = quantize_rtn(torch.randn(32, 128), 64)
    with caplog.at_level(logging.WARNING):
        layers = torch.nn.ModuleList(
            W4A16Linear.from_quantized(
                weight, None, backend=CHOICE, device=CPU, dtype=torch.float32
            )
            for _ in range(2)
        )
    (record,) = caplog.records
    assert "best" in record.getMessage() and "misunderstanding" in record.getMessage()
    assert backends_of(layers) == "good"
    x = torch.randn(4, 128)
    assert torch.allclose(layers[0](x), x @ weight.dequantize(torch.float32).T, atol=1e-5)


def test_the_backends_of_a_model_are_counted() -> None:
    weight = quantize_rtn(torch.randn(32, 128), 64)
    layers = [
        W4A16Linear.from_quantized(weight, None, backend=name, device=CPU, dtype=dtype)
        for name, dtype in [("reference", torch.float32)] * 2 + [("cpu_int4", torch.bfloat16)]
    ]
    assert backends_of(torch.nn.ModuleList(layers)) == ("reference (2 layers), cpu_int4 (1 layers)")
    assert backends_of(torch.nn.Linear(2, 2)) == "torch"


# ---- measuring ------------------------------------------------------------------------------


class Wrong(Fake):
    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        return super().matmul(x, packed, shape).flip(-1)


class Failing(Fake):
    def run(self, plan: str, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        if x.shape[0] > 1:
            raise RuntimeError("out of resource: shared memory")
        return super().run(plan, x, packed, shape)


def test_measuring_finds_the_fastest_plan_and_leaves_out_what_is_wrong_or_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = Fake("slow", "fast")
    backends = {"right": right, "wrong": Wrong(), "broken": Broken()}

    def stopwatch(calls: Sequence[Callable[[], object]], rows: int) -> float:
        calls[0]()
        return {"slow": 3e-6, "fast": 2e-6}[right.ran[-1][0]]

    found = dict(
        measuring.measure(backends, SHAPE, [1, 4], CPU, torch.float32, stopwatch=stopwatch)
    )
    assert found == {rows: {"right": Timing("fast", 2.0)} for rows in (1, 4)}
    assert "wrong () computes something else for 4 row(s)" in caplog.text
    assert "broken is not measured" in caplog.text


def test_what_fails_for_some_rows_has_a_timing_for_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = measuring.measure(
        {"failing": Failing()}, SHAPE, [1, 4], CPU, torch.float32, stopwatch=lambda *_: 1e-6
    )
    assert dict(found) == {1: {"failing": Timing("", 1.0)}, 4: {}}
    assert "out of resource" in caplog.text


def test_products_are_timed_on_the_cpu() -> None:
    found = dict(
        measuring.measure(
            {"reference": Reference()}, SHAPE, [2], CPU, torch.float32,
            stopwatch=measuring.time_on_cpu,
        )
    )  # fmt: skip
    assert 0 < found[2]["reference"].microseconds < 1e6


# ---- files ----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timings, "TUNED", tmp_path / "tuned")
    return tmp_path / "tinychat-serve" / "w4a16" / "some-gpu.json"


KEY = layer_key(SHAPE, torch.float16)
LAYERS = {KEY: {1: {"x": Timing("a plan", 1.5)}, 64: {"x": Timing("", 3.0), "y": Timing("", 2.0)}}}


def test_what_was_measured_is_found_again(cache: Path) -> None:
    backends = {"x": Fake(), "y": Fake()}
    choose, measure = chooser(backends, {"x": 2, "y": 1}, Timings.load(HERE))
    assert names(choose) == ["y", "x"] and len(measure.asked) == 1
    assert json.loads(cache.read_text())["gpu"] == "Some GPU"
    assert list(cache.parent.iterdir()) == [cache], "no temporary file is left"
    again, measure = chooser(backends, {}, Timings.load(HERE))
    assert names(again) == ["y", "x"] and measure.asked == []


@pytest.mark.parametrize(("other", "word"), [
    (Environment("Some  GPU", (9, 0), "kernels", {"torch": "2"}), "gpu"),
    (Environment("Some GPU", (8, 0), "kernels", {"torch": "2"}), "capability"),
    (Environment("Some GPU", (9, 0), "other kernels", {"torch": "2"}), "kernels"),
    (Environment("Some GPU", (9, 0), "kernels", {"torch": "2", "gemlite": "1"}), "packages"),
])  # fmt: skip
def test_what_was_measured_elsewhere_is_not_used(
    cache: Path, caplog: pytest.LogCaptureFixture, other: Environment, word: str
) -> None:
    timings.write(cache, other, LAYERS)
    with caplog.at_level(logging.INFO):
        assert Timings.load(HERE).layers == {}
    assert str(cache) in caplog.text and f"they are of {word}" in caplog.text


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1}', b"null",
    json.dumps({"format": 1, **HERE.as_json(), "layers": {"k": {"one": {}}}}).encode(),
    json.dumps({"format": 1, **HERE.as_json(), "layers": {"k": {"1": {"x": ["plan"]}}}}).encode(),
    json.dumps({"format": 1, **HERE.as_json(), "layers": [1]}).encode(),
])  # fmt: skip
def test_a_damaged_file_counts_as_none_and_is_replaced(
    cache: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    known = Timings.load(HERE)
    assert known.layers == {} and "are not used" in caplog.text and str(cache) in caplog.text
    known.layers.update(LAYERS)
    known.save()
    assert Timings.load(HERE).layers == LAYERS


def test_a_committed_file_serves_other_versions_and_is_corrected_by_this_machines(
    cache: Path, tmp_path: Path
) -> None:
    older = Environment("Some GPU", (9, 0), "kernels", {"torch": "1"})
    timings.write(tmp_path / "tuned" / "some-gpu.json", older, LAYERS)
    assert Timings.load(HERE).layers == LAYERS
    mine = {KEY: {1: {"x": Timing("mine", 1.0)}}}
    timings.write(cache, HERE, mine)
    assert Timings.load(HERE).layers == {KEY: {**LAYERS[KEY], **mine[KEY]}}


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    Timings(HERE, dict(LAYERS), tmp_path / "file" / "x.json").save()
    assert "could not be kept" in caplog.text


def test_committed_files_are_valid() -> None:
    for path in timings.TUNED.glob("*.json"):
        content = json.loads(path.read_text())
        environment = Environment(
            content["gpu"], tuple(content["capability"]), content["kernels"], content["packages"]
        )
        assert environment.file_name == path.name
        assert timings._read(path, environment, same_packages=True)


def test_the_environment_names_what_is_installed_here() -> None:
    here = Environment.of(CPU)
    assert here.packages["torch"] == torch.__version__.split("+")[0] or "torch" in here.packages
    assert here.file_name == "cpu.json" and len(here.kernels) == 16


def test_the_time_for_measuring_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.awq.backends import cuda
    from models.errors import ConfigurationError

    assert cuda._limit() == choice.MEASURING_SECONDS
    monkeypatch.setenv(cuda.LIMIT, "0")
    assert cuda._limit() == 0
    monkeypatch.setenv(cuda.LIMIT, "soon")
    with pytest.raises(ConfigurationError, match="'soon'; it must be a number of seconds"):
        cuda._limit()
