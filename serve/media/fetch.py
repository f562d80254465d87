"""An address -> its bytes, from hosts that anyone may reach, within a size and a time.

A name is looked up once, each of its addresses is checked, and the connection goes to the address that was checked;
so it is for every redirect. The time is one for all of it, however slowly a server answers. Proxies of the
environment are not used, since they would look the name up again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import httpx

from serve.errors import RequestError
from serve.media.settings import MediaLimits

_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
"""IPv6 addresses that stand for the IPv4 address in their last bits (NAT64)."""
_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Sequence[str]]


class _Refused(Exception):
    """Why an address is not fetched."""


class _Answer(NamedTuple):
    body: bytes
    location: str | None


def look_up(host: str, port: int) -> Sequence[str]:
    """A host's addresses, by the system's resolver. Raises OSError; waits as long as that does."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def fetch(
    url: str,
    name: str,
    max_bytes: int,
    limits: MediaLimits = MediaLimits(),
    resolve: Resolver = look_up,
) -> bytes:
    """The bytes at an http or https address; to be called on a thread that may wait, for limits.fetch_s at most.

    RequestError that begins with `name` and has it as its param.
    """
    shown = _shown(url)
    try:
        return asyncio.run(_Fetch(max_bytes, limits, resolve).get(url))
    except TimeoutError:
        raise RequestError(
            f"{name}: {shown} gave no whole answer within {limits.fetch_s:g} s", name
        ) from None
    except _Refused as refused:
        raise RequestError(f"{name}: {shown}: {refused}", name) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError, ValueError) as error:
        said = str(error) or type(error).__name__
        raise RequestError(f"{name}: {shown} cannot be fetched: {said[:200]}", name) from None


def is_public(address: Address) -> bool:
    """Whether an address is one that anyone on the internet may reach, what it stands for too."""
    if isinstance(address, ipaddress.IPv6Address):
        within = [address.ipv4_mapped, address.sixtofour]
        if any(address in network for network in _TRANSLATED) or int(address) >> 32 == 0:
            within.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.teredo is not None:
            within += address.teredo
        if not all(is_public(inner) for inner in within if inner is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast


class _Fetch:
    """One address and those that it redirects to."""

    def __init__(self, max_bytes: int, limits: MediaLimits, resolve: Resolver) -> None:
        self._max_bytes = max_bytes
        self._limits = limits
        self._resolve = resolve

    async def get(self, url: str) -> bytes:
        """Its body. TimeoutError, _Refused, and whatever httpx raises."""
        limits = self._limits
        async with asyncio.timeout(limits.fetch_s):
            transport = httpx.AsyncHTTPTransport(verify=_certificates(), retries=0)
            async with httpx.AsyncClient(
                transport=transport, timeout=limits.fetch_s, follow_redirects=False, trust_env=False
            ) as client:
                at = httpx.URL(url)
                for _ in range(limits.max_redirects + 1):
                    answer = await self._hop(client, at)
                    if answer.location is None:
                        return answer.body
                    at = at.join(answer.location)
                raise _Refused(f"redirects more than {limits.max_redirects} times")

    async def _hop(self, client: httpx.AsyncClient, url: httpx.URL) -> _Answer:
        """What one address answers, from the first of its host's that can be connected to."""
        if url.scheme not in _PORTS or not url.host:
            raise _Refused(f"leads to {_shown(str(url))}; expected an http or https address")
        if url.port is not None and not 0 < url.port < 1 << 16:
            raise _Refused(f"found port {url.port}; expected one up to 65535")
        if url.userinfo:
            raise _Refused("holds a user name; expected an address without")
        addresses = await self._addresses(url)
        for address in addresses[:-1]:
            try:
                return await self._ask(client, url, address)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._ask(client, url, addresses[-1])

    async def _addresses(self, url: httpx.URL) -> list[Address]:
        """All addresses of a host, checked."""
        host = url.raw_host.decode("ascii").strip("[]")
        told = await self._looked_up(host, url.port or _PORTS[url.scheme])
        found = [ipaddress.ip_address(text.partition("%")[0]) for text in told]
        if not found:
            raise _Refused(f"{url.host} has no address")
        allowed = self._limits.allow_private_hosts
        if allowed is True or (allowed and url.host in allowed):
            return found
        inside = next((address for address in found if not is_public(address)), None)
        if inside is not None:
            raise _Refused(f"{url.host} is at {inside}, and media are fetched from public addresses alone")
        return found

    async def _looked_up(self, host: str, port: int) -> Sequence[str]:
        """By the resolver, which nothing interrupts: on a thread of its own, left behind if it hangs."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[str]] = loop.create_future()

        def tell(result: Sequence[str], error: BaseException | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        def work() -> None:
            result: Sequence[str] = ()
            error: BaseException | None = None
            try:
                result = self._resolve(host, port)
            except (OSError, UnicodeError) as raised:
                error = raised
            with suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(tell, result, error)

        threading.Thread(target=work, daemon=True, name="lathe-resolve").start()
        try:
            return await future
        except socket.gaierror as error:
            raise _Refused(f"{host} cannot be looked up: {error.strerror}") from None

    async def _ask(self, client: httpx.AsyncClient, url: httpx.URL, address: Address) -> _Answer:
        host = url.raw_host.decode("ascii").strip("[]")
        at = f"[{host}]" if ":" in host else host
        headers = {
            "host": at if url.port is None else f"{at}:{url.port}",
            "accept": "*/*",
            "accept-encoding": "identity",
            "user-agent": "lathe",
        }
        # To the address that was checked; certificates and virtual hosts go by the name.
        there = url.copy_with(host=str(address))
        request = client.build_request("GET", there, headers=headers, extensions={"sni_hostname": host})
        response = await client.send(request, stream=True)
        try:
            if response.status_code in _REDIRECTS and "location" in response.headers:
                return _Answer(b"", response.headers["location"])
            if response.status_code != 200:
                raise _Refused(f"answers with status {response.status_code}")
            return _Answer(await self._body(response), None)
        finally:
            await response.aclose()

    async def _body(self, response: httpx.Response) -> bytes:
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise _Refused("answers compressed, which was not asked for")
        told = response.headers.get("content-length", "")
        if told.isdecimal() and int(told) > self._max_bytes:
            raise _Refused(f"holds {int(told):,} bytes; at most {self._max_bytes:,} are read")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self._max_bytes:
                raise _Refused(f"holds more than the {self._max_bytes:,} bytes that are read")
        return bytes(body)


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def _shown(url: str) -> str:
    """Enough of an address to know it by, without what its query may hold."""
    bare = url.partition("?")[0]
    return ascii(bare[:80] + ("…" if len(bare) > 80 else ""))[1:-1]
