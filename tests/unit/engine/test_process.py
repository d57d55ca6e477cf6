"""The engine in a process of its own: the same answers, and nobody left behind by a death."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models import Engine, GenerationDelta, SamplingParams, load_engine
from models.engine.process import ProcessHost
from models.engine.wire import receive
from models.errors import CheckpointError, ConfigurationError, EngineDead, RequestAborted
from tests.tiny import write_tiny_llava

SCORED = SamplingParams(temperature=0, max_new_tokens=3, prompt_logprobs=1)
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_new_tokens=900, ignore_eos=True)
PICTURE = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
PROMPTS = [("USER: <image>\nWhat is this? ASSISTANT:", [PICTURE]), ("hello", []), ("tell me", [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava")


def load(folder: Path, *, own_process: bool = True) -> Engine:
    return load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", max_num_seqs=2, num_threads=1,
        own_process=own_process,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Engine]:
    with load(folder) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    wait_until(lambda: shared.stats().num_running + shared.stats().num_waiting == 0)
    stats = shared.stats()
    assert stats.blocks_used == 0
    assert stats.blocks_free + stats.blocks_cached == stats.blocks_total


@pytest.fixture
def mortal(folder: Path) -> Iterator[Engine]:
    with load(folder) as engine:
        yield engine


def process_of(engine: Engine) -> subprocess.Popen[bytes]:
    assert isinstance(engine._host, ProcessHost)
    return engine._host._process


def wait_until(condition: object, seconds: float = 20) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def exists(pid: int) -> bool:
    """Whether it still runs; a dead child that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def rest(stream: AsyncIterator[GenerationDelta]) -> str:
    return "".join([delta.text async for delta in stream])


async def test_answers_are_those_of_an_engine_in_this_process(folder: Path, engine: Engine) -> None:
    with load(folder, own_process=False) as here:
        expected = here.generate_batch(PROMPTS, GREEDY)
        scores = next(iter(here.generate(*PROMPTS[0], SCORED))).prompt_logprobs
        assert here.count_tokens(PROMPTS[0][0]) == engine.count_tokens(PROMPTS[0][0])
        assert here.stop_token_ids == engine.stop_token_ids
        assert here.context_length == engine.context_length
        timed = {"loaded_in"}
        assert {k: v for k, v in here.description().items() if k not in timed} == {
            k: v for k, v in engine.description().items() if k not in timed
        }
    assert engine.generate_batch(PROMPTS, GREEDY) == expected
    streamed = await asyncio.gather(*(rest(engine.stream(*p, GREEDY)) for p in PROMPTS))
    assert streamed == expected
    scored = [d async for d in engine.stream(*PROMPTS[0], SCORED, min_interval_s=0.1)]
    assert [score for delta in scored for score in delta.prompt_logprobs] == list(scores) != []
    last = [delta async for delta in engine.stream(*PROMPTS[0], GREEDY)][-1]
    assert (last.finish_reason, last.usage.completion_tokens) == ("length", 12)


async def test_what_nobody_waits_for_costs_no_message_and_figures_stay_fresh(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = 0

    def counted(connection: Connection[Any, Any]) -> Any:
        nonlocal messages
        messages += 1
        return receive(connection)

    monkeypatch.setattr("models.engine.process.receive", counted)
    before = engine.stats().num_generated_tokens
    stream = engine.stream("tell me", params=LONG, min_interval_s=1000)
    first = await anext(stream)
    assert len(first.token_ids) == 1 and first.timing is not None
    rest = asyncio.create_task(anext(stream))
    seen = set()
    while not rest.done():
        seen.add(engine.stats().num_generated_tokens - before)
        await asyncio.sleep(0.005)
    last = await rest
    assert (len(last.token_ids), last.finish_reason) == (899, "length")
    assert last.timing is not None and last.timing.started and last.timing.last_token
    seconds = last.timing.last_token - last.timing.started
    assert len(seen) >= 2 * seconds
    assert messages <= 11 * seconds + 10
    assert engine.stats().num_generated_tokens - before == 900


async def test_leaving_and_aborting_free_everything(engine: Engine) -> None:
    left = engine.stream("tell me", params=LONG)
    await anext(left)
    aborted = engine.stream("tell me", params=LONG, request_id="mine")
    await anext(aborted)
    assert engine.stats().num_running == 2
    assert engine.stats().blocks_used > 0
    await left.aclose()
    engine.abort("mine")
    with pytest.raises(RequestAborted):
        await rest(aborted)
    wait_until(lambda: engine.stats().blocks_used == 0)
    assert not engine.stats().dead


async def test_a_killed_process_leaves_nobody_waiting(mortal: Engine) -> None:
    streams = [mortal.stream("tell me", params=LONG) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    waiting = asyncio.create_task(rest(mortal.stream("me too", params=LONG)))
    while len(mortal._subscribers) < 3:
        await asyncio.sleep(0.005)
    os.kill(process_of(mortal).pid, signal.SIGKILL)
    for reading in (*map(rest, streams), waiting):
        with pytest.raises(EngineDead, match="killed by SIGKILL"):
            await reading
    assert mortal.stats().dead
    with pytest.raises(EngineDead):
        mortal.check_health()
    with pytest.raises(EngineDead):
        await anext(mortal.stream("hello", params=GREEDY))


def test_closing_ends_what_runs_and_the_process(folder: Path) -> None:
    engine = load(folder)
    stream = engine.generate("tell me", params=LONG)
    next(stream)
    engine.close()
    assert process_of(engine).returncode == 0
    with pytest.raises(EngineDead, match="has been closed"):
        list(stream)
    engine.close()


def test_an_interrupt_from_the_terminal_is_the_parents_business(engine: Engine) -> None:
    os.kill(process_of(engine).pid, signal.SIGINT)
    assert engine.generate_batch([("hello", [])], GREEDY) != [""]


def test_it_ends_with_its_parent(folder: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.unit.engine.test_process import load, process_of\n"
        "engine = load(Path(sys.argv[1]))\n"
        "print(process_of(engine).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent:
        child = int(parent.stdout.readline())
        assert exists(child)
        parent.kill()
    wait_until(lambda: not exists(child))


def test_what_is_wrong_with_a_checkpoint_or_an_option_comes_as_itself(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        load_engine(folder / "absent", own_process=True)
    with pytest.raises(ConfigurationError, match="dtype is 'int3'"):
        load_engine(folder, dtype="int3", own_process=True)


def test_a_process_that_dies_while_loading_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineDead, match="while it was loading \\(exit status 1\\)"):
        load(folder)
