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
from collections.abc import Sequence
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


class _Refused(Exception):
    """Why an address is not fetched."""


class _Answer(NamedTuple):
    body: bytes
    location: str | None


def fetch(url: str, name: str, max_bytes: int, limits: MediaLimits = MediaLimits()) -> bytes:
    """The bytes at an http or https address; to be called on a thread that may wait, for limits.fetch_s at most.

    RequestError that begins with `name` and has it as its param.
    """
    shown = _shown(url)
    try:
        return asyncio.run(_within(url, max_bytes, limits))
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


async def _within(url: str, max_bytes: int, limits: MediaLimits) -> bytes:
    async with asyncio.timeout(limits.fetch_s):
        transport = httpx.AsyncHTTPTransport(verify=_certificates(), retries=0)
        async with httpx.AsyncClient(
            transport=transport, timeout=limits.fetch_s, follow_redirects=False, trust_env=False
        ) as client:
            at = httpx.URL(url)
            for _ in range(limits.max_redirects + 1):
                answer = await _get(client, at, max_bytes, limits)
                if answer.location is None:
                    return answer.body
                at = at.join(answer.location)
            raise _Refused(f"redirects more than {limits.max_redirects} times")


async def _get(client: httpx.AsyncClient, url: httpx.URL, max_bytes: int, limits: MediaLimits) -> _Answer:
    """What one address answers, from the first of its hosts that can be connected to."""
    if url.scheme not in _PORTS or not url.host:
        raise _Refused(f"found {str(url)[:80]}; expected an http or https address")
    if url.userinfo:
        raise _Refused("holds a user name; expected an address without")
    addresses = await _addresses(url, limits)
    for address in addresses[:-1]:
        try:
            return await _ask(client, url, address, max_bytes)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            continue
    return await _ask(client, url, addresses[-1], max_bytes)


async def _addresses(url: httpx.URL, limits: MediaLimits) -> list[Address]:
    """All addresses of a host, checked."""
    port = url.port or _PORTS[url.scheme]
    host = url.raw_host.decode("ascii").strip("[]")
    found = [ipaddress.ip_address(text.partition("%")[0]) for text in await _looked_up(host, port)]
    if not found:
        raise _Refused(f"{url.host} has no address")
    inside = next((address for address in found if not is_public(address)), None)
    if inside is not None and not limits.allow_private_hosts:
        raise _Refused(
            f"{url.host} is at {inside}, which is no public address; pictures are fetched from public hosts alone "
            "(allow_private_hosts)"
        )
    return found


async def _looked_up(host: str, port: int) -> Sequence[str]:
    """Addresses by the system's resolver; nothing interrupts it, so its thread is left behind if it hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[str]] = loop.create_future()

    def tell(result: list[str] | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result or [])

    def look_up() -> None:
        result: list[str] | None = None
        error: BaseException | None = None
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            result = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
        except (OSError, UnicodeError) as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(tell, result, error)
        except RuntimeError:
            return  # nobody waits any more

    threading.Thread(target=look_up, daemon=True).start()
    try:
        return await future
    except socket.gaierror as error:
        raise _Refused(f"{host} cannot be looked up: {error.strerror}") from None


async def _ask(client: httpx.AsyncClient, url: httpx.URL, address: Address, max_bytes: int) -> _Answer:
    host = url.raw_host.decode("ascii")
    at = f"[{host}]" if ":" in host and not host.startswith("[") else host
    headers = {
        "host": at if url.port is None else f"{at}:{url.port}",
        "accept": "*/*",
        "accept-encoding": "identity",
        "user-agent": "lathe",
    }
    request = client.build_request(
        "GET",
        url.copy_with(host=str(address)),
        headers=headers,
        extensions={"sni_hostname": host.strip("[]")},
    )
    response = await client.send(request, stream=True)
    try:
        if response.status_code in _REDIRECTS and "location" in response.headers:
            return _Answer(b"", response.headers["location"])
        if response.status_code != 200:
            raise _Refused(f"answers with status {response.status_code}")
        return _Answer(await _body(response, max_bytes), None)
    finally:
        await response.aclose()


async def _body(response: httpx.Response, max_bytes: int) -> bytes:
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise _Refused("answers compressed, which was not asked for")
    told = response.headers.get("content-length", "")
    if told.isdecimal() and int(told) > max_bytes:
        raise _Refused(f"holds {int(told):,} bytes; at most {max_bytes:,} are read")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise _Refused(f"holds more than the {max_bytes:,} bytes that are read")
    return bytes(body)


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def _shown(url: str) -> str:
    """Enough of an address to know it by, without what its query may hold."""
    bare = url.partition("?")[0]
    return ascii(bare[:80] + ("…" if len(bare) > 80 else ""))[1:-1]
