"""The access log: one JSON line for each request, and nothing of what it was about unless asked."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

from deployments.request_log import RequestEntry

logger = logging.getLogger("ray.serve")

MAX_BYTES = 64 << 20
BACKUPS = 3
PROBES = frozenset({"/health", "/ping", "/worker_get_status"})
"""Asked every few seconds by whatever watches over the server; logged only when they fail."""


class AccessLog:
    """Writes the lines of one replica."""

    def __init__(self, model_name: str, handler: logging.Handler) -> None:
        self._model_name = model_name
        self._logger = logging.Logger("tinychat.access")
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._logger.addHandler(handler)

    def write(self, entry: RequestEntry) -> None:
        if entry.route in PROBES and entry.status is not None and entry.status < 400:
            return
        self._logger.info("%s", json.dumps(entry.as_json(self._model_name)))


def open_access_log(where: str, model_name: str) -> tuple[Callable[[RequestEntry], None], str]:
    """What writes an entry, and where to, in words.

    Args:
        where: as in AppConfig: file, console or off.
    """
    if where == "off":
        return lambda _: None, "off"
    path = _path_beside_serves_log() if where == "file" else None
    if path is None:
        # Serve has put its own log's handler in the place of sys.stderr in some configurations.
        return AccessLog(model_name, logging.StreamHandler(sys.__stderr__)).write, "console"
    handler = RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
    return AccessLog(model_name, handler).write, str(path)


def _path_beside_serves_log() -> Path | None:
    """`replica_NAME.log` -> `access_NAME.jsonl`; None where Serve writes no file."""
    for handler in logger.handlers:
        target = getattr(handler, "target", handler)
        if isinstance(target, logging.FileHandler):
            log = Path(target.baseFilename)
            return log.with_name(f"access_{log.stem.removeprefix('replica_')}.jsonl")
    return None
