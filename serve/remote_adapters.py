"""A running server's adapters from outside: what `lathe adapters list, load, unload, rollback, pin, unpin` do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from serve.errors import ConfigError
from serve.remote import connect, refusal, trouble
from serve.tables import Table, numbers, words

MIB = 2**20


class RemoteAdapters:
    """The adapters at an address. What the server refuses is raised in its own words; ConfigError if none answers."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url
        self._api_key = api_key

    def listing(self) -> dict[str, Any]:
        """As GET /v1/adapters answers."""
        found: dict[str, Any] = self._ask("GET", "/v1/adapters").json()
        return found

    def load(self, name: str, path: str, *, replace: bool) -> str:
        """What the server says. A path that is here is sent whole; any other is the server's to find."""
        there = str(Path(path).expanduser().absolute()) if Path(path).expanduser().exists() else path
        fields = {"lora_name": name, "lora_path": there, "load_inplace": replace}
        return self._ask("POST", "/v1/load_lora_adapter", fields).text

    def unload(self, name: str) -> str:
        """What the server says."""
        return self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}).text

    def change(self, name: str, verb: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """rollback, pin or unpin; the adapter as it is then."""
        found: dict[str, Any] = self._ask(
            "POST", f"/v1/adapters/{quote(name, safe='')}/{verb}", fields
        ).json()
        return found

    def _ask(self, method: str, path: str, fields: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            with connect(self._url, self._api_key) as http:
                answer = http.request(method, path, json=fields)
        except httpx.HTTPError as error:
            raise ConfigError(f"{self._url}: no server answers there ({trouble(error)})") from error
        if answer.status_code >= 400:
            raise refusal(answer.status_code, answer.text)
        return answer


def table(listing: Mapping[str, Any]) -> Table:
    """One line a version, the current one of a name first."""
    made = Table(
        "version", "state", *numbers("slot", "rank", "modules", "MiB", "hits", "requests"), words("path")
    )
    for adapter in listing["data"]:
        pinned = ", pinned" if adapter["pinned"] else ""
        for version in sorted(adapter["versions"], key=lambda each: each["id"] != adapter["current"]):
            is_current = version["id"] == adapter["current"]
            low, high = version["rank"]["min"], version["rank"]["max"]
            made.add(
                f"{version['id']}{'' if is_current else ' (earlier)'}",
                f"{version['state']}{pinned if is_current else ''}",
                "-" if version["slot"] is None else str(version["slot"]),
                str(low) if low == high else f"{low}-{high}",
                str(version["modules"]),
                f"{version['bytes']['content'] / MIB:.1f}",
                str(version["hits"]),
                str(version["held_by"]["requests"]),
                version["path"],
            )
    return made


def summary(listing: Mapping[str, Any]) -> str:
    """What all of them take."""
    slots, sizes = listing["slots"], listing["bytes"]
    return (
        f"{len(listing['data'])} adapters; {slots['taken']} of {slots['max']} slots, {sizes['device'] / MIB:.1f} MiB "
        f"on the device of {sizes['device_budget'] / MIB:.1f}, {sizes['host'] / MIB:.1f} MiB in host memory; "
        f"{listing['hits']} hits, {listing['misses']} misses, {listing['evicted']} evicted"
    )


def told(adapter: Mapping[str, Any]) -> str:
    """An adapter as it is after a change, in a line."""
    pinned = ", pinned" if adapter["pinned"] else ""
    return f"{adapter['name']} is {adapter['current']} ({adapter['state']}{pinned})"
