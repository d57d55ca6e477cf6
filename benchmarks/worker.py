"""A real worker: started, found ready, measured and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

ROOT = Path(__file__).resolve().parents[1]
MARK = "TINYCHAT_BENCHMARK"
"""An environment variable, by which all processes of a worker are found; Ray's are among them."""
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.1

Way = Literal["launcher", "serve run", "make serve"]


class Worker:
    """
    Attributes:
        port: where it listens, on this machine.
        started: `time.monotonic()` at which its command was started.
    """

    def __init__(
        self,
        way: Way,
        model_path: str,
        max_num_seqs: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            way: "launcher" is `python -m deployments`, with TinyChat's flags; "serve run" has Ray's
                own proxy, "make serve" the ingress that is chosen for it.
            options: further ones of the application's; the launcher takes none.
        """
        self.way = way
        self.port = _free_port()
        self.started = 0.0
        self._model_path = str(Path(model_path).resolve())
        self._max_num_seqs = max_num_seqs
        self._options = dict(options or {})
        self._mark = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="tcb", ignore_cleanup_errors=True)

    async def start(self) -> None:
        """Returns once it is healthy."""
        with (Path(self._folder.name) / "log.txt").open("w") as log:
            command = self._launcher() if self.way == "launcher" else self._serve_run()
            self.started = time.monotonic()
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(), stdout=log, stderr=subprocess.STDOUT
            )
        while not await asyncio.to_thread(self._is_healthy):
            if self._process.poll() is not None or self._age_s > START_TIMEOUT_S:
                log_text = (Path(self._folder.name) / "log.txt").read_text()
                raise RuntimeError(f"the worker did not start:\n{log_text[-4000:]}")
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM if self.way == "launcher" else signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._folder.cleanup()

    def processes(self) -> list[int]:
        """Of the command, of Ray and of all that they have started."""
        mark = f"{MARK}={self._mark}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                with contextlib.suppress(OSError):
                    if mark in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
        return found

    def memory_bytes(self) -> int:
        """Of all its processes: their proportional set sizes, so that shared pages count once."""
        return sum(map(_pss_bytes, self.processes()))

    @property
    def _age_s(self) -> float:
        return time.monotonic() - self.started

    def _launcher(self) -> list[str]:
        return [
            sys.executable, "-m", "deployments", "--model-path", self._model_path, "--no-register",
            "--host", "127.0.0.1", "--port", str(self.port),
            "--limit-model-concurrency", str(self._max_num_seqs),
        ]  # fmt: skip

    def _serve_run(self) -> list[str]:
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
        config["http_options"] = {"host": "127.0.0.1", "port": self.port}
        (application,) = config["applications"]
        application["args"] |= {
            "model_path": self._model_path, "max_num_seqs": self._max_num_seqs, **self._options,
        }  # fmt: skip
        path = Path(self._folder.name) / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("serve")), "run", str(path)]
        if self.way == "serve run":
            return command
        choose = f'eval "$({shlex.quote(sys.executable)} -m deployments.ingress)"'
        return ["sh", "-c", f"{choose}; exec {shlex.join(command)}"]

    def _environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
        return inherited | {
            MARK: self._mark, "RAY_TMPDIR": self._folder.name, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
        }  # fmt: skip

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return bool(reply.status == 200 and b'"ok"' in reply.read())
        except (OSError, urllib.error.URLError):
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
