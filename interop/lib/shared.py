"""One backend WebSocket for many clients (`pool.shared = "broadcast"`): npm `ws` and Python `websockets` watch a feed of Node's.

What counts: what they hear, how their connections end, and how many the backend says that it has.
"""

import asyncio
import contextlib
import json
import signal
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from clients import PythonClient
from examples import START_SECONDS, NodeStack, StackClient
from harness import WORK, Failed, Proxy, Report, expect, json_line

EACH = 20
MESSAGES = 25
ROUTE = """
[[route]]
path = "/feed"
pool.mode = "shared"
pool.shared = "broadcast"
pool.idle_timeout = "500ms"
pool.reconnect_grace = "{grace}"
"""


class Feed(NodeStack):
    """peers/feed.mjs"""

    def __init__(self) -> None:
        super().__init__("feed")

    async def terminate(self) -> None:
        await self._process.stop(signal.SIGTERM)

    async def counts(self) -> dict:
        def get() -> dict:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://{self.address}/connections", timeout=15) as response:
                return json.load(response)

        return await asyncio.to_thread(get)

    async def event(self, **wanted: object) -> dict:
        return await self._process.wait_for_line(json_line(**wanted), f"{wanted}", 15)


@contextlib.asynccontextmanager
async def front(feed: Feed, grace: str) -> AsyncIterator[Proxy]:
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shared-", dir=WORK) as folder:
        config = Path(folder) / "proxy.toml"
        config.write_text(ROUTE.format(grace=grace))
        async with Proxy(feed.address, config=config) as proxy:
            yield proxy


class NodeWatchers(StackClient):
    """peers/feed.mjs"""

    def __init__(self) -> None:
        super().__init__("feed")

    async def open(self, url: str, protocols: list[str]) -> list[dict]:
        return await self.call("open", url=url, protocols=protocols, count=EACH)

    async def hear(self, count: int, gaps: int) -> list:
        return await self.call("hear", count=count, gaps=gaps)

    async def ends(self) -> list[dict]:
        return await self.call("ends")


class PythonWatchers:
    """The same with Python's `websockets`, which reads as fast as it can."""

    def __init__(self) -> None:
        self.name = "websockets"
        self.lines: list[str] = []
        self._watching: list[asyncio.Task] = []
        self._news = asyncio.Condition()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_) -> None:
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)

    async def _watch(self, socket: ClientConnection, seen: dict) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for message in socket:
                number = json.loads(message)["number"]
                follows = seen["last"] in (None, number - 1)
                seen["gaps"] += not follows
                seen["run"] = seen["run"] + 1 if follows else 1
                seen["last"] = number
                async with self._news:
                    self._news.notify_all()
        is_clean = socket.protocol.close_rcvd is not None and socket.protocol.close_sent is not None
        seen["end"] = {"code": socket.close_code, "clean": is_clean}
        self.lines.append(f"< {seen}")
        async with self._news:
            self._news.notify_all()

    async def open(self, url: str, protocols: list[str]) -> list[dict]:
        sockets = await asyncio.gather(*(connect(url, subprotocols=protocols, close_timeout=20, proxy=None) for _ in range(EACH)))
        self._seen = [{"last": None, "gaps": 0, "run": 0, "end": None} for _ in sockets]
        self._watching += [asyncio.create_task(self._watch(*each)) for each in zip(sockets, self._seen)]
        return [{"protocol": one.subprotocol, "extensions": "".join(map(str, one.protocol.extensions))} for one in sockets]

    async def _until(self, is_so: Callable[[dict], object]) -> None:
        async with self._news:
            await self._news.wait_for(lambda: all(is_so(each) for each in self._seen))

    async def hear(self, count: int, gaps: int) -> list:
        await self._until(lambda each: each["end"] or (each["gaps"] >= gaps and each["run"] >= count))
        return [str(each["end"]) if each["end"] else each["gaps"] for each in self._seen]

    async def ends(self) -> list[dict]:
        await self._until(lambda each: each["end"])
        return [each["end"] for each in self._seen]


class Watchers:
    """Clients of both kinds."""

    def __init__(self) -> None:
        self.clients = [PythonWatchers(), NodeWatchers()]

    async def __aenter__(self):
        for client in self.clients:
            await client.__aenter__()
        return self

    async def __aexit__(self, *_) -> None:
        for client in self.clients:
            await client.__aexit__()

    async def _all(self, calls) -> list:
        return [one for each in await asyncio.gather(*calls) for one in each]

    async def open(self, proxy: Proxy) -> list[dict]:
        return await self._all(client.open(proxy.url("/feed"), ["other", "feed"]) for client in self.clients)

    async def hear(self, count: int, gaps: int = 0) -> None:
        """Each so many messages without a gap, since there was the one that the last loss of the backend has made."""
        expect("gaps", set(await self._all(client.hear(count, gaps) for client in self.clients)), {gaps})

    async def end(self, code: int) -> None:
        ends = await self._all(client.ends() for client in self.clients)
        expect("(code, clean) of all", {(end["code"], end["clean"]) for end in ends}, {(code, True)})


async def shared(report: Report, options) -> None:
    if options.direct:
        print("skip shared: it is tidegate's work")
        return
    async with Feed() as feed, Watchers() as watchers, front(feed, "60s") as proxy:
        seen_by = (*watchers.clients, feed, proxy)

        async with report.check(f"shared: {EACH} watchers of websockets and {EACH} of ws, on one connection", *seen_by, seconds=60):
            opened = await watchers.open(proxy)
            expect("extensions and subprotocols", {(one["extensions"], one["protocol"]) for one in opened}, {("", "other")})
            expect("connections", await feed.counts(), {"open": 1, "opened": 1})

        async with report.check(f"shared: each hears {MESSAGES} messages in order", *seen_by):
            await watchers.hear(MESSAGES)

        async with report.check("shared: another cookie is another connection, which has it", *seen_by):
            for nth, cookie in enumerate(("user=ann", "user=ben")):
                async with connect(proxy.url("/feed"), additional_headers={"Cookie": cookie}, proxy=None) as one:
                    await one.recv()
                    expect("connections", await feed.counts(), {"open": 2, "opened": 2 + nth})
                await feed.event(event="open", nth=2 + nth, cookie=cookie)
                while (await feed.counts())["open"] > 1:
                    await asyncio.sleep(0.05)

        async with report.check("shared: who says something gets 1008, and nobody else anything", *seen_by):
            async with connect(proxy.url("/feed"), proxy=None) as client:
                await client.send("may I?")
                await client.wait_closed()
                is_clean = client.protocol.close_rcvd is not None and client.protocol.close_sent is not None
                expect("(code, clean)", (client.close_code, is_clean), (1008, True))
            expect("heard by the backend", any(json_line(event="heard")(line) for line in feed.lines), False)
            await watchers.hear(5)

        for gap, what, end in ((1, "killed", feed.kill), (2, "stopped, with Close 1001", feed.terminate)):
            async with report.check(f"shared: the backend is {what}, and started again: all stay, and hear it", *seen_by, seconds=START_SECONDS):
                await end()
                await feed.start()
                await watchers.hear(MESSAGES, gap)
                expect("connections", await feed.counts(), {"open": 1, "opened": 1})

        async with report.check("shared: SIGTERM of tidegate: all see 1001, clean; the backend one Close", *seen_by):
            proxy.kill(signal.SIGTERM)
            await watchers.end(1001)
            expect("exit status", await proxy.ended(), 0)
            code = (await feed.event(event="close"))["code"]
            if code not in (1000, 1001):
                raise Failed(f"the backend sees {code}")

    async with Feed() as feed, Watchers() as watchers, front(feed, "500ms") as proxy:
        seen_by = (*watchers.clients, feed, proxy)
        async with report.check("shared: the backend is killed, and stays away: all see 1012, clean", *seen_by, seconds=60):
            await watchers.open(proxy)
            await watchers.hear(5)
            await feed.kill()
            await watchers.end(1012)
        async with report.check("shared: who comes then gets 502", *seen_by):
            expect("status", await PythonClient().status(proxy.url("/feed")), 502)
        async with report.check("shared: started again, they come back", *seen_by, seconds=START_SECONDS):
            await feed.start()
            await watchers.open(proxy)
            await watchers.hear(5)
