"""A model's folder in; prints whether the first TurboQuant request imports its scheme on the event loop's thread."""

import asyncio
import sys
from contextlib import closing

import httpx

from serve.api.app import create_app
from serve.config import ServeConfig
from serve.runtime import Runtime

SCHEME = "serve.cache.turbo"


class Watch:
    """Told of every import, finds nothing."""

    on_loop: bool | None = None

    def find_spec(self, name: str, *_: object) -> None:
        if name != SCHEME:
            return
        try:
            asyncio.get_running_loop()
            self.on_loop = True
        except RuntimeError:
            self.on_loop = False


async def ask(runtime: Runtime) -> int:
    transport = httpx.ASGITransport(create_app(runtime))
    async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as http:
        body = {"model": "m", "prompt": "one two", "max_tokens": 2, "kv_bits": 3.5}
        return (await http.post("/v1/completions", json=body)).status_code


if __name__ == "__main__":
    runtime = Runtime.start(ServeConfig(model=sys.argv[1], name="m"))
    with closing(runtime):
        watch = Watch()
        assert SCHEME not in sys.modules
        sys.meta_path.insert(0, watch)
        status = asyncio.run(ask(runtime))
    print(status, watch.on_loop)
