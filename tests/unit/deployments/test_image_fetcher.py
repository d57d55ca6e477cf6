"""Pictures by URL: only from hosts that are allowed, only from where their names may lead, and
within limits, whatever the host does. The hosts are real servers on the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from deployments.image_fetcher import (
    AllowedHosts,
    ImageFetcher,
    PictureHostFailed,
    PictureNotFetched,
    is_public,
    is_web_url,
)
from models.errors import InvalidRequest
from tests.unit.deployments.harness import NEVER_S, PATIENCE_S

FILE = b"a picture's bytes"
Handler = Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]


@contextlib.asynccontextmanager
async def host(handler: Handler) -> AsyncIterator[str]:
    """A web server; yields its "127.0.0.1:port"."""
    server = web.Server(handler, handler_cancellation=True)  # type: ignore[arg-type]
    runner = web.ServerRunner(server, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def fetch(
    *urls: str,
    allowed: list[str],
    max_bytes: int = 1000,
    max_total_bytes: int = 1500,
    timeout_s: float = PATIENCE_S,
) -> list[bytes]:
    fetcher = ImageFetcher(
        allowed, max_bytes=max_bytes, max_total_bytes=max_total_bytes, timeout_s=timeout_s
    )
    sources = [(f"picture{i}", url) for i, url in enumerate(urls)]
    return await asyncio.wait_for(fetcher.fetch(sources), PATIENCE_S)


async def refusal(*urls: str, **options: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        await fetch(*urls, **options)
    message = str(caught.value)
    assert "0x" not in message
    assert "127.0.0.1" not in message
    return caught.value


def answering(body: bytes = FILE, **options: Any) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body, **options)

    return handler


def names(monkeypatch: pytest.MonkeyPatch, **found: list[str]) -> list[str]:
    """Names lead where the test wants them; returns the book of what was looked up."""
    asked: list[str] = []

    def getaddrinfo(name: Any, port: Any, *args: Any, **kwargs: Any) -> list[Any]:
        asked.append(name)
        addresses = found[name.split(".")[0]]
        return [
            (socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "",
             (a, port, 0, 0) if ":" in a else (a, port))
            for a in addresses
        ]  # fmt: skip

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


async def test_files_come_in_the_order_of_their_urls() -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(0.02 if request.path == "/a" else 0)
        return web.Response(body=request.path.encode())

    async with host(handler) as address:
        urls = [f"http://{address}/{name}" for name in "abc"]
        assert await fetch(*urls, allowed=[address]) == [b"/a", b"/b", b"/c"]
    assert await fetch(allowed=[]) == []


async def test_nothing_of_the_servers_own_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[web.Request] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request)
        reply = web.Response(body=FILE)
        reply.set_cookie("a", "b")
        return reply

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with host(handler) as address:
        for _ in range(2):
            await fetch(f"http://{address}/x?y=1#z", allowed=[address])
    for request in seen:
        assert not {"Authorization", "Cookie", "Referer"} & set(request.headers)
        assert request.headers["Accept-Encoding"] == "identity"
    assert [str(request.rel_url) for request in seen] == ["/x?y=1"] * 2


class TestHosts:
    @pytest.mark.parametrize(
        ("url", "entries"),
        [
            ("http://a.org/x", ["a.org"]), ("https://a.org/x", ["a.org"]),
            ("http://A.ORG./x", ["a.org"]), ("http://a.org:80/x", ["a.org"]),
            ("https://a.org:444/x", ["a.org:444"]), ("http://b.a.org/", ["*.a.org"]),
            ("http://anything.example/", ["*"]), ("http://10.0.0.1/", ["10.0.0.1"]),
            ("http://[::1]:8080/", ["[::1]:8080"]),
            ("http://b\u00fccher.de/", ["xn--bcher-kva.de"]),
            ("http://93.184.215.14/", ["*"]),
        ],
    )  # fmt: skip
    def test_allowed(self, url: str, entries: list[str]) -> None:
        assert AllowedHosts(entries).allow(URL(url))

    @pytest.mark.parametrize(
        ("url", "entries"),
        [
            ("http://a.org/", []), ("http://b.org/", ["a.org"]), ("http://a.org.evil/", ["a.org"]),
            ("http://evil-a.org/", ["*.a.org"]), ("http://a.org/", ["*.a.org"]),
            ("http://a.org:8080/", ["a.org"]), ("http://a.org:22/", ["*"]),
            ("http://a.org/", ["a.org:444"]), ("http://127.0.0.1/", ["*"]),
            ("http://10.0.0.1/", ["*"]), ("http://[::1]/", ["*"]),
            ("http://169.254.169.254/", ["*"]),
            ("http://[::ffff:127.0.0.1]/", ["*"]), ("http://127.0.0.1/", ["*.0.0.1"]),
        ],
    )  # fmt: skip
    def test_not_allowed(self, url: str, entries: list[str]) -> None:
        assert not AllowedHosts(entries).allow(URL(url))

    @pytest.mark.parametrize(
        "address",
        ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1",
         "0.0.0.0", "224.0.0.1", "255.255.255.255", "240.0.0.1", "::1", "::", "fc00::1", "fe80::1",
         "fe80::1%eth0", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
         "2001:db8::1", "fec0::1", "::7f00:1", "64:ff9b:1::7f00:1", "5f00::1", "localhost", ""],
    )  # fmt: skip
    def test_addresses_that_are_not_public(self, address: str) -> None:
        assert not is_public(address)

    @pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::1111", "64:ff9b::5db8:d70e"])
    def test_addresses_that_are(self, address: str) -> None:
        assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://a.org\\@evil.org/", "http://user@a.org/", "http://user:pass@a.org/",
        "http://a.org/\nx", "http://a.org/ b", "http://evil.org/?http://a.org", "http://a.org@evil/",
        "http:///x", "http://", "http:a.org", "file:///etc/passwd", "ftp://a.org/", "//a.org/",
        "http://a.org:99999/", "http://[::1/", "https://", "", "gopher://a.org/",
    ],
)  # fmt: skip
async def test_urls_that_are_never_fetched(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = names(monkeypatch)
    assert (await refusal(url, allowed=["a.org"])).field == "picture0"
    assert asked == []


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f.1", "0x7f000001", "127.1", "0177.0.0.1", "127.0.0.1.", "127.1.", "0"],
)
async def test_other_ways_to_write_an_address_lead_nowhere(host: str) -> None:
    """The system would read each as an address of this machine."""
    problem = await refusal(f"http://{host}/", allowed=["*"])
    assert "fetches" in str(problem)


class TestNames:
    @pytest.mark.parametrize(
        "addresses", [["127.0.0.1"], ["10.0.0.1"], ["::1"], ["93.184.215.14", "127.0.0.1"]]
    )
    async def test_that_lead_into_this_network_are_not_followed(
        self, addresses: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names(monkeypatch, inside=addresses)
        for allowed in (["*"], ["*.org"]):
            problem = await refusal("http://inside.org/", allowed=allowed)
            assert not isinstance(problem, PictureHostFailed)  # nobody tried to connect
            assert addresses[-1] not in str(problem)

    async def test_that_are_listed_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with host(answering()) as address:
            port = address.split(":")[1]
            names(monkeypatch, inside=["127.0.0.1"])
            url = f"http://inside.org:{port}/"
            assert await fetch(url, allowed=[f"inside.org:{port}"]) == [FILE]

    async def test_a_listed_port_opens_no_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names(monkeypatch, inside=["127.0.0.1"])
        problem = await refusal("http://inside.org/", allowed=["*", "inside.org:8080"])
        assert not isinstance(problem, PictureHostFailed)

    async def test_are_resolved_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So nothing can change between the check and the connection."""
        async with host(answering()) as address:
            port = address.split(":")[1]
            asked = names(monkeypatch, inside=["127.0.0.1"])
            await fetch(f"http://inside.org:{port}/", allowed=[f"inside.org:{port}"])
        assert asked.count("inside.org") == 1

    async def test_that_lead_nowhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def getaddrinfo(*_: Any, **__: Any) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, "secret resolver text")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        problem = await refusal("http://nowhere.org/", allowed=["*"])
        assert isinstance(problem, PictureHostFailed)
        assert "secret" not in str(problem)


class TestRedirects:
    async def test_are_followed_where_they_may_lead(self) -> None:
        async def handler(request: web.Request) -> web.Response:
            if request.path == "/end":
                return web.Response(body=FILE)
            return web.Response(status=302, headers={"Location": "/end"})

        async with host(handler) as address:
            assert await fetch(f"http://{address}/", allowed=[address]) == [FILE]

    @pytest.mark.parametrize(
        "location",
        ["http://127.0.0.1:9/", "http://169.254.169.254/latest", "file:///etc/passwd", "",
         "http://u:p@127.0.0.1/", "//evil.org/", "http://a.org\\@b"],
    )  # fmt: skip
    async def test_are_checked_as_the_first_url(self, location: str) -> None:
        asked: list[str] = []

        async def handler(request: web.Request) -> web.Response:
            asked.append(request.path)
            return web.Response(status=302, headers={"Location": location})

        async with host(handler) as address:
            problem = await refusal(f"http://{address}/", allowed=[address])
        assert not isinstance(problem, PictureHostFailed)
        assert len(asked) == 1

    async def test_have_an_end(self) -> None:
        async def handler(request: web.Request) -> web.Response:
            return web.Response(status=307, headers={"Location": f"{request.path}x"})

        async with host(handler) as address:
            problem = await refusal(f"http://{address}/", allowed=[address])
        assert isinstance(problem, PictureNotFetched)


class TestLimits:
    async def test_a_file_that_is_announced_as_too_large_is_not_read(self) -> None:
        async with host(answering(b"x" * 2000)) as address:
            assert "larger than" in str(await refusal(f"http://{address}/", allowed=[address]))

    @pytest.mark.parametrize("pause_s", [0.0, 0.02])
    async def test_a_file_without_end(self, pause_s: float) -> None:
        """At full speed it is too large; dripping, it is too late."""

        async def handler(request: web.Request) -> web.StreamResponse:
            reply = web.StreamResponse()
            await reply.prepare(request)
            with contextlib.suppress(ConnectionError):
                while True:
                    await reply.write(b"x" if pause_s else b"x" * 1000)
                    await asyncio.sleep(pause_s)
            return reply

        async with host(handler) as address:
            began = time.monotonic()
            problem = await refusal(f"http://{address}/", allowed=[address], timeout_s=0.3)
        assert isinstance(problem, PictureHostFailed) == bool(pause_s)
        assert time.monotonic() - began < PATIENCE_S / 2

    async def test_all_pictures_together(self) -> None:
        async with host(answering(b"x" * 900)) as address:
            problem = await refusal(*[f"http://{address}/"] * 2, allowed=[address])
            assert "together" in str(problem)

    async def test_a_host_that_says_nothing(self) -> None:
        async def handler(request: web.Request) -> web.Response:
            await asyncio.sleep(NEVER_S)
            raise AssertionError

        async with host(handler) as address:
            problem = await refusal(f"http://{address}/", allowed=[address], timeout_s=0.1)
        assert isinstance(problem, PictureHostFailed)

    async def test_what_was_compressed_unasked_is_not_unpacked(self) -> None:
        reply = answering(b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
        async with host(reply) as address:
            problem = await refusal(f"http://{address}/", allowed=[address])
        assert isinstance(problem, PictureNotFetched)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, PictureNotFetched), (403, PictureNotFetched), (500, PictureHostFailed),
     (503, PictureHostFailed), (204, PictureHostFailed)],
)  # fmt: skip
async def test_whose_fault_a_status_is(status: int, kind: type[Exception]) -> None:
    async with host(answering(b"", status=status)) as address:
        problem = await refusal(f"http://{address}/", allowed=[address])
    assert type(problem) is kind


async def test_a_host_that_refuses_the_connection() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert isinstance(await refusal(f"http://{address}/", allowed=[address]), PictureHostFailed)


async def test_one_failure_ends_the_other_fetches() -> None:
    ended = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        if request.path == "/bad":
            return web.Response(status=404)
        try:
            await asyncio.sleep(NEVER_S)
        finally:
            ended.set()
        raise AssertionError

    async with host(handler) as address:
        problem = await refusal(
            f"http://{address}/slow", f"http://{address}/bad", allowed=[address]
        )
        assert problem.field == "picture1"
        await asyncio.wait_for(ended.wait(), PATIENCE_S)


@pytest.mark.parametrize("source", ["http://a", " HTTPS://a", "https:a"])
def test_what_is_taken_for_a_web_url(source: str) -> None:
    assert is_web_url(source)


@pytest.mark.parametrize("source", [b"http://a", "data:image/png;base64,http", "aHR0cDovLw=="])
def test_what_is_not(source: str | bytes) -> None:
    assert not is_web_url(source)
