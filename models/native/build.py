"""The C++ beside this file -> a shared library in a folder of the user's own.

It takes some two seconds, once: the library's name holds a digest of the sources and of the
command, so that another version never meets an old library, and a library that was built where
there was a compiler (in an image's build, say) serves where there is none.

The library is code that will run, so it is only taken from a folder and a file that belong to
this user and that no one else can write to.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
COMPILE = (
    "-std=c++17", "-O3", "-march=x86-64-v4", "-mavx512bf16", "-fopenmp", "-fPIC",
    "-fno-exceptions", "-fno-rtti", "-c",
)  # fmt: skip
LINK = ("-shared", "-nostdlib", "-Wl,-z,now", "-Wl,-z,noexecstack")
"""Without libgomp: torch's own, already in the process, serves instead. A second one would come
with a second set of threads."""
TIMEOUT_S = 120


class BuildError(Exception):
    """There is no library; says why."""


def build() -> Path:
    """The library's path, which is compiled where it is not there yet.

    Raises:
        BuildError
    """
    digest = hashlib.sha256(repr((COMPILE, LINK)).encode())
    for source in (*SOURCES, *HEADERS):
        digest.update(source.read_bytes())
    try:
        folder = _private_folder()
        path = folder / f"kernels-{digest.hexdigest()[:16]}.so"
        # Replicas that start together wait for the first one's.
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(path)
        _check_owner(path)
    except OSError as error:
        raise BuildError(str(error)) from error
    return path


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tinychat-serve" / "native"


def _private_folder() -> Path:
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    return folder


def _check_owner(path: Path) -> None:
    status = path.lstat()
    if (
        status.st_uid != os.getuid()
        or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        or stat.S_ISLNK(status.st_mode)
    ):
        raise BuildError(f"{path} must belong to this user, writable by no one else")


def _compile(path: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"there is no C++ compiler ({compiler[0]}; CXX names another)")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [f"{scratch}/{source.stem}.o" for source in SOURCES]
        for source, target in zip(SOURCES, objects, strict=True):
            _run([*compiler, *COMPILE, "-o", target, str(source)])
        built = f"{scratch}/{path.name}"
        _run([*compiler, *LINK, "-o", built, *objects])
        os.chmod(built, 0o700)
        os.replace(built, path)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
        raise BuildError(f"{command[0]} failed: {lines[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {TIMEOUT_S} s") from error
