"""Pictures by URL, fetched without becoming a way into the network that this server stands in.

Only from hosts that configuration lists. One parser (yarl) reads a URL, and what it has understood
is what is fetched; a name is resolved once, its addresses are checked, and the connection goes to
them; every redirect is checked as the first URL was. No credentials, cookies or proxies take part,
nothing is decompressed, and bytes and time are bounded over all pictures of a request.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Sequence
from typing import TypeAlias

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from models.errors import InvalidRequest

logger = logging.getLogger("ray.serve")

MAX_REDIRECTS = 3
MAX_CONNECTIONS = 8
WEB_PORTS = (80, 443)
CHUNK_BYTES = 64 << 10
REDIRECTS = frozenset({301, 302, 303, 307, 308})
WEB_URL = re.compile(r"\s*https?:", re.IGNORECASE)
PREFIX_CHARS = 32
NAT64 = ipaddress.ip_network("64:ff9b::/96")
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
"""All that is assigned. `is_global` also holds outside of it, for site-local addresses for one."""

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"


class PictureNotFetched(InvalidRequest):
    """The host says that there is no such picture, or nothing that is one: its URL is wrong."""


class PictureHostFailed(InvalidRequest):
    """The host cannot be reached, is too slow, or has failed; the same URL may work later."""


class _NotPublic(Exception):
    """A name leads to an address that is not public."""


def is_web_url(source: str | bytes) -> bool:
    """Whether it is to be fetched."""
    return isinstance(source, str) and WEB_URL.match(source, 0, PREFIX_CHARS) is not None


class ImageFetcher:
    """Fetches pictures from the hosts that configuration allows."""

    def __init__(
        self,
        allowed_hosts: Sequence[str],
        *,
        max_bytes: int,
        max_total_bytes: int,
        timeout_s: float,
    ) -> None:
        """
        Args:
            allowed_hosts: as in `AllowedHosts`.
            max_bytes: of one picture.
            max_total_bytes: of all pictures of a request.
            timeout_s: for all pictures of a request, redirects included.
        """
        self._hosts = AllowedHosts(allowed_hosts)
        self._max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes
        self._timeout_s = timeout_s

    async def fetch(self, sources: Sequence[tuple[str, str]]) -> list[bytes]:
        """The files behind URLs.

        Args:
            sources: (what to call it in messages, its URL).

        Raises:
            InvalidRequest: a URL that is none, is not allowed, or leads to too much.
            PictureNotFetched: the host does not have it.
            PictureHostFailed: the host does not answer, or not in time.
        """
        if not sources:
            return []
        budget = _Budget(self._max_total_bytes)
        async with self._session() as session:
            fetches = [
                asyncio.create_task(self._fetch(session, field, url, budget))
                for field, url in sources
            ]
            try:
                done, pending = await asyncio.wait(
                    fetches, timeout=self._timeout_s, return_when=asyncio.FIRST_EXCEPTION
                )
                files = [fetch.result() for fetch in fetches if fetch in done]
                if pending:
                    late = sources[min(fetches.index(fetch) for fetch in pending)][0]
                    raise PictureHostFailed(
                        late,
                        f"had not arrived after {self._timeout_s:g} s; send the picture itself as "
                        "a data: URL",
                    )
                return files
            finally:
                for fetch in fetches:
                    fetch.cancel()
                await asyncio.gather(*fetches, return_exceptions=True)

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            resolver=_CheckedResolver(self._hosts),
            use_dns_cache=False,
            limit=MAX_CONNECTIONS,
            force_close=True,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            auto_decompress=False,
            trust_env=False,
            headers={
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "tinychat-serve",
            },
        )

    async def _fetch(
        self, session: aiohttp.ClientSession, field: str, address: str, budget: _Budget
    ) -> bytes:
        try:
            url = self._checked(field, address)
            for _ in range(MAX_REDIRECTS + 1):
                async with session.get(url, allow_redirects=False) as response:
                    if response.status not in REDIRECTS:
                        return await self._read(field, response, budget)
                    location = response.headers.get("Location", "")
                url = self._checked(field, location, base=url)
        except _NotPublic:
            raise _forbidden(field) from None
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            # Its text can hold the addresses that a name has inside this network.
            logger.info("%s could not be fetched: %s", field, type(error).__name__)
            raise PictureHostFailed(
                field, "its host could not be reached; send the picture itself as a data: URL"
            ) from None
        raise PictureNotFetched(field, f"is redirected more than {MAX_REDIRECTS} times")

    def _checked(self, field: str, address: str, base: URL | None = None) -> URL:
        address = address.strip()
        # A backslash or a control character is read differently by different parsers.
        if not address or "\\" in address or not address.isprintable() or " " in address:
            raise InvalidRequest(field, "is not a URL that can be fetched")
        try:
            url = URL(address) if base is None else base.join(URL(address))
            host, port = url.raw_host, url.port
        except ValueError:
            raise InvalidRequest(field, "is not a URL that can be fetched") from None
        if url.scheme not in {"http", "https"} or not host or port is None:
            raise InvalidRequest(field, "is not a URL that can be fetched")
        if url.user is not None or url.password is not None:
            raise InvalidRequest(field, "has credentials in it; URLs are fetched without any")
        if not self._hosts.allow(url):
            raise _forbidden(field)
        return url.with_fragment(None)

    async def _read(self, field: str, response: aiohttp.ClientResponse, budget: _Budget) -> bytes:
        status = response.status
        if 400 <= status < 500:
            raise PictureNotFetched(field, f"its host answered {status}; check the URL")
        if status != 200:
            raise PictureHostFailed(field, f"its host answered {status}; try again later")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise PictureNotFetched(field, "was sent compressed, which was not asked for")
        too_large = InvalidRequest(field, f"is larger than {self._max_bytes} bytes")
        if (response.content_length or 0) > self._max_bytes:
            raise too_large
        data = bytearray()
        async for part in response.content.iter_chunked(CHUNK_BYTES):
            data += part
            budget.spend(len(part))
            if len(data) > self._max_bytes:
                raise too_large
        return bytes(data)


class _Budget:
    """Bytes that all pictures of a request may have together."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._left = total

    def spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise InvalidRequest(
                "image_url", f"all pictures together are larger than {self._total} bytes"
            )


class AllowedHosts:
    """
    "images.example.org"    this name, at its scheme's own port, whatever address it has
    "10.0.0.7:8080"         a port, or an address, of which the same is true
    "*.example.org"         names below this one, if they lead to public addresses
    "*"                     every host with a public address
    """

    def __init__(self, entries: Sequence[str]) -> None:
        """
        Raises:
            ValueError: an entry is no host.
        """
        self._listed: set[tuple[str, int | None]] = set()
        self._endings: list[str] = []
        self._any = False
        for entry in entries:
            if entry == "*":
                self._any = True
            elif entry.startswith("*."):
                self._endings.append(f".{_host(URL(f'http://{entry[2:]}'))}")
            else:
                url = URL(f"http://{entry}")
                self._listed.add((_host(url), url.explicit_port))

    def allow(self, url: URL) -> bool:
        """Whether it may be fetched, as far as can be told before its name is resolved."""
        host = _host(url)
        # aiohttp takes these for addresses and never resolves them; the system then reads 127.1
        # or 2130706433 as 127.0.0.1.
        if _literal(host) is None and (":" in host or host.replace(".", "").isdigit()):
            return False
        if self.list_by_name(host, url.port or 0):
            return True
        if not url.is_default_port():
            return False
        named = self._any or any(host.endswith(ending) for ending in self._endings)
        return named and (_literal(host) is None or is_public(host))

    def list_by_name(self, host: str, port: int) -> bool:
        """Whether a host is listed as it is, so that its addresses need not be public."""
        host = host.lower().rstrip(".")
        return (host, port) in self._listed or ((host, None) in self._listed and port in WEB_PORTS)


def is_public(address: str) -> bool:
    """Whether an IP address can be anybody's: no loopback, private, link-local, shared,
    multicast or reserved one, nor an IPv6 form of one."""
    ip = _literal(address)
    if ip is None:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
        elif ip not in GLOBAL_IPV6:
            return False
    return ip.is_global and not ip.is_multicast


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _host(url: URL) -> str:
    host = url.raw_host
    if not host:
        raise ValueError("no host")
    return host.lower().rstrip(".")


def _forbidden(field: str) -> InvalidRequest:
    return InvalidRequest(
        field,
        "its host is none from which this server fetches pictures; send the picture itself as a "
        "data: URL",
    )


class _CheckedResolver(AbstractResolver):
    """Resolves names to public addresses only. aiohttp connects to what it returns, so nothing
    can change in between; addresses in URLs never come here and are checked before."""

    def __init__(self, hosts: AllowedHosts) -> None:
        self._hosts = hosts
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if not self._hosts.list_by_name(host, port) and not all(
            is_public(entry["host"]) for entry in found
        ):
            raise _NotPublic
        return found

    async def close(self) -> None:
        await self._resolver.close()
