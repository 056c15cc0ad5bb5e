"""The configurations of examples/, each with the stack that it is for: a real exchange, the backend killed and started again, a drain.

Clients come back by what their libraries have for that. What deliberately is not here: a browser (interop/run has it elsewhere), and
the frameworks themselves, of which tidegate sees no more than their protocol.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from clients import ProcessClient, PythonClient
from harness import INTEROP, REPOSITORY, WORK, Failed, Process, Proxy, Report, expect, json_line
from multiplexed import connections_to

PEERS = INTEROP / "peers"
# The slowest is RabbitMQ: 8 s on an idle core, for which others may ask too.
START_SECONDS = 120
WATCHERS = 50
POSITIONS = 50
LOST = {"code": 1012, "clean": True}
DRAINED = {"code": 1001, "clean": True}
# Ports of this run.
GIVEN: set[int] = set()


def free_port() -> int:
    """One that stays free while its server is away: the kernel gives those below its range for clients to nobody."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    below = range(min(10_000, first - 1), first)
    # The last is the kernel's choice after all, where it has left next to none.
    for port in [*random.sample(below, min(1000, len(below))), 0]:
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            port = tried.getsockname()[1]
            if port not in GIVEN:
                GIVEN.add(port)
                return port
    raise Failed("no free port")


class Stack:
    """A backend that can be started again at the same address."""

    def __init__(self, name: str, ready: Callable[[str], object]) -> None:
        self.name = name
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._ready = ready
        self._process = Process(name)
        # What those said that were killed.
        self._before: list[str] = []

    def command(self) -> list:
        raise NotImplementedError

    @property
    def lines(self) -> list[str]:
        return [*self._before, *self._process.lines]

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_) -> None:
        await self._process.stop()

    async def start(self) -> None:
        self._before = self.lines
        self._process = Process(self.name)
        await self._process.start(*self.command())
        await self._process.ready(self._ready, "readiness", START_SECONDS)

    async def kill(self) -> None:
        await self._process.stop(signal.SIGKILL)


class NodeStack(Stack):
    def __init__(self, name: str) -> None:
        super().__init__(name, json_line(event="listening"))

    def command(self) -> list:
        return ["node", PEERS / f"{self.name}.mjs", "serve", self.port]


class Ganache(Stack):
    def __init__(self) -> None:
        super().__init__("ganache", lambda line: "RPC Listening on" in line)

    def command(self) -> list:
        cli = INTEROP / "node_modules" / "ganache" / "dist" / "node" / "cli.js"
        return ["node", cli, "--server.host", "127.0.0.1", "--server.port", self.port]


class Demo(Stack):
    """`tidegate demo`: to those in front of it a backend like another, whose SIGKILL takes it away as a whole."""

    def __init__(self) -> None:
        super().__init__("demo", json_line(message="listening"))

    def command(self) -> list:
        settings = {"TIDEGATE_ADMIN__ADDRESS": "off", "TIDEGATE_LOG__FORMAT": "json"}
        return ["env", *(f"{name}={value}" for name, value in settings.items()), Proxy.binary(), "demo", "--listen", self.address]


class BaseStack(Stack):
    """One that keeps files of its own."""

    async def __aenter__(self):
        WORK.mkdir(exist_ok=True)
        self.base = tempfile.TemporaryDirectory(prefix=f"{self.name}-", dir=WORK, ignore_cleanup_errors=True)
        return await super().__aenter__()

    async def __aexit__(self, *_) -> None:
        await super().__aexit__()
        self.base.cleanup()


class Tomcat(BaseStack):
    def __init__(self) -> None:
        super().__init__("tomcat", lambda line: f'Starting ProtocolHandler ["http-nio-127.0.0.1-{self.port}"]' in line)

    def command(self) -> list:
        return [INTEROP / "tomcat" / "start", self.base.name, self.port]


class Rabbit(BaseStack):
    """RabbitMQ with Web STOMP, and the name server without which Erlang does not start."""

    def __init__(self) -> None:
        super().__init__("rabbitmq", lambda line: "Server startup complete" in line)
        self._epmd = Process("epmd")
        self._epmd_port, self._node_port = free_port(), free_port()

    async def __aenter__(self):
        (epmd,) = (WORK / "rabbitmq" / "usr" / "lib" / "erlang").glob("erts-*/bin/epmd")
        await self._epmd.start(epmd, "-port", self._epmd_port, "-address", "127.0.0.1")
        try:
            return await super().__aenter__()
        except BaseException:
            await self._epmd.stop()
            raise

    async def __aexit__(self, *_) -> None:
        try:
            await super().__aexit__()
        finally:
            await self._epmd.stop()

    def command(self) -> list:
        return [INTEROP / "rabbitmq" / "start", self.base.name, self.port, self._node_port, self._epmd_port]


class StackClient(ProcessClient):
    """The library of a stack in a process of its own, whose events are numbered for each name."""

    def command(self) -> list:
        return ["node", PEERS / f"{self.name}.mjs", "client"]

    async def event(self, event: str, name: str, nth: int = 1, seconds: float = 60) -> dict:
        wanted = json_line(event=event, name=name, nth=nth)
        return await self.wait_for_line(wanted, f"{event} {nth} of {name!r}", seconds)

    async def end(self, event: str, name: str, nth: int, wanted: dict) -> dict:
        seen = await self.event(event, name, nth)
        expect(f"{name}'s end", {key: seen[key] for key in wanted}, wanted)
        return seen

    def count(self, event: str, name: str) -> int:
        return sum(bool(json_line(event=event, name=name)(line)) for line in self.lines)


def example(name: str, stack: Stack, options) -> Proxy:
    """tidegate with that very file; where it and its backend listen, and how long a drain takes, is the run's."""
    return Proxy(stack.address, options.direct, config=REPOSITORY / "examples" / name / "proxy.toml")


async def check_file(report: Report, name: str) -> None:
    async with report.check(f"{name}: tidegate check finds nothing to say"):
        env = {key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE")}
        child = await asyncio.create_subprocess_exec(
            Proxy.binary(),
            "check",
            "--config",
            REPOSITORY / "examples" / name / "proxy.toml",
            env=env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await child.communicate()
        lines = said.decode().splitlines()
        expect("(status, lines, the first word)", (child.returncode, len(lines), lines[0].split()[0]), (0, 1, "ok:"))


async def check_origins(report: Report, name: str, url: str, seen_by: tuple, **more: object) -> None:
    """Where a file names the pages that may open WebSockets."""
    async with report.check(f"{name}: a page of the file's origin connects, another one gets 403", *seen_by):
        async with connect(url, origin="https://app.example", proxy=None, **more):
            pass
        try:
            async with connect(url, origin="https://other.example", proxy=None, **more):
                raise Failed("a page of another origin connected")
        except InvalidStatus as error:
            expect("status", error.response.status_code, 403)


async def killed(report: Report, name: str, stack: Stack, seen_by: tuple) -> None:
    async with report.check(f"{name}: {stack.name} is killed", *seen_by):
        await stack.kill()


async def spring_stomp(report: Report, options) -> None:
    """STOMP with @stomp/stompjs, by RabbitMQ; and Tomcat, in which Spring would do the same."""
    name = "spring-stomp"
    if not options.direct:
        await check_file(report, name)
    async with Rabbit() as stack, example(name, stack, options) as proxy, StackClient("stomp") as client:
        seen_by, url, both = (client, stack, proxy), proxy.url("/ws"), ("ann", "ben")

        async with report.check(f"{name}: CONNECT, SUBSCRIBE with receipt, heart-beats agreed on", *seen_by):
            for each in both:
                await client.call("connect", name=each, url=url, heartbeat=2000)
                connected = await client.event("connected", each)
                expect("(version, heart-beat)", (connected["version"], connected["heartbeat"]), ("1.2", "2000,2000"))
                if not connected["server"].startswith("RabbitMQ/"):
                    raise Failed(f"another broker: {connected['server']!r}")
                await client.event("subscribed", each)

        async with report.check(f"{name}: SEND, and MESSAGE for both, 100 times in order", *seen_by):
            for number in range(100):
                await client.call("send", name=both[number % 2], body=f"{number} grüße {'x' * number * 20}")
            # Of two senders each has its own order.
            for each in both:
                bodies = [(await client.event("message", each, nth + 1))["body"] for nth in range(100)]
                numbers = [int(body.split()[0]) for body in bodies]
                for parity in (0, 1):
                    sent = list(range(parity, 100, 2))
                    expect(f"{each} hears {both[parity]}", [one for one in numbers if one % 2 == parity], sent)
                expect("longest", max(map(len, bodies)), len(f"99 grüße {'x' * 99 * 20}"))

        async with report.check(f"{name}: heart-beats both ways, twice each", *seen_by):
            for each in both:
                await client.event("heartbeat-sent", each, 2)
                await client.event("heartbeat", each, 2)

        async with report.check(f"{name}: DISCONNECT, a receipt, 1000", *seen_by):
            await client.call("connect", name="cid", url=url, heartbeat=0)
            await client.event("subscribed", "cid")
            await client.call("disconnect", name="cid")
            await client.end("close", "cid", 1, {"code": 1000, "clean": True})

        if options.direct:
            return
        await check_origins(report, name, url, seen_by, subprotocols=["v12.stomp"])
        await killed(report, name, stack, seen_by)
        async with report.check(f"{name}: stompjs sees 1012, clean", *seen_by):
            for each in both:
                await client.end("close", each, 1, LOST)
        async with report.check(f"{name}: started again, it comes back, subscribes and hears", *seen_by, seconds=START_SECONDS):
            await stack.start()
            for each in both:
                await client.event("subscribed", each, 2)
            await client.call("send", name="ann", body="again")
            for each in both:
                expect("message", (await client.event("message", each, 101))["body"], "again")
        await drained(report, name, proxy, seen_by, [client.end("close", each, 2, DRAINED) for each in both])
        await check_counts(report, name, client, both, error=0, close=2, subscribed=2, message=101)

    async with (
        Tomcat() as stack,
        example(name, stack, options) as proxy,
        PythonClient() as client,
        ProcessClient("ws") as other,
    ):
        seen_by = (client, other, stack, proxy)

        async def chat(visit: str) -> None:
            async with report.check(f"{name}: tomcat, {visit}: chat between two clients", *seen_by):
                for each in (client, other):
                    await each.open(visit, proxy.url("/examples/websocket/chat"))
                await client.send(visit, "hello from Python")
                while "hello from Python" not in (await other.receive(visit))["text"]:
                    pass

        async def ended(visit: str, wanted: dict) -> None:
            for each in (client, other):
                end = await each.closed(visit)
                expect(f"{each.name}'s end", {key: end[key] for key in wanted}, wanted)

        await chat("first visit")
        if options.direct:
            return
        await killed(report, name, stack, seen_by)
        async with report.check(f"{name}: tomcat: both see 1012, clean", *seen_by):
            await ended("first visit", LOST)
        async with report.check(f"{name}: tomcat: it is started again", *seen_by, seconds=START_SECONDS):
            await stack.start()
        await chat("second visit")
        await drained(report, f"{name}: tomcat", proxy, seen_by, [ended("second visit", DRAINED)])


async def drained(report: Report, name: str, proxy: Proxy, seen_by: tuple, ends: list) -> None:
    async with report.check(f"{name}: SIGTERM of tidegate: all see 1001, clean, and it ends with 0", *seen_by):
        proxy.kill(signal.SIGTERM)
        await asyncio.gather(*ends)
        expect("exit status", await proxy.ended(), 0)


async def check_counts(report: Report, name: str, client: StackClient, names: tuple, **wanted: int) -> None:
    async with report.check(f"{name}: nothing else was told", client):
        for each in names:
            expect(f"events of {each}", {event: client.count(event, each) for event in wanted}, wanted)


async def socket_io(report: Report, options) -> None:
    """socket.io's own server and client: polling, the upgrade to a WebSocket, and a WebSocket at once."""
    name = "socket.io"
    ways = {"upgraded": ["polling", "websocket"], "websocket": ["websocket"], "polling": ["polling"]}
    if not options.direct:
        await check_file(report, name)
    async with NodeStack("socketio") as stack, example(name, stack, options) as proxy, StackClient("socketio") as client:
        seen_by, url = (client, stack, proxy), proxy.url("/", "http")

        async with report.check(f"{name}: connects by polling and upgrades, by WebSocket, by polling alone", *seen_by):
            for way, transports in ways.items():
                await client.call("connect", name=way, url=url, transports=transports)
                expect("transport", (await client.event("open", way))["transport"], transports[0])
                await client.event("connect", way)
            expect("upgrade", (await client.event("upgrade", "upgraded"))["transport"], "websocket")

        async with report.check(f"{name}: emit with acknowledgement, all hear it, 100 times in order", *seen_by):
            for number in range(100):
                answer = await client.call("say", name=list(ways)[number % 3], text=f"grüße {number}")
                expect("answer", answer, len(f"grüße {number}"))
            for way in ways:
                heard = [(await client.event("said", way, nth + 1))["text"] for nth in range(100)]
                expect(f"{way} hears", heard, [f"grüße {number}" for number in range(100)])

        async with report.check(f"{name}: 700,000 bytes and back", *seen_by):
            # A poll has them in base64, and its server's limit is a million.
            for way in ways:
                expect(way, await client.call("bytes", name=way, size=700_000), True)

        async with report.check(f"{name}: its own heart-beat, three times each", *seen_by):
            for way in ways:
                await client.event("ping", way, 3)

        if options.direct:
            return
        await check_origins(report, name, proxy.url("/socket.io/?EIO=4&transport=websocket"), seen_by)
        await killed(report, name, stack, seen_by)
        async with report.check(f"{name}: WebSockets see 1012, clean, polls an error", *seen_by):
            for way in ("upgraded", "websocket"):
                await client.end("disconnect", way, 1, {"reason": "transport close", **LOST})
            await client.end("disconnect", "polling", 1, {"reason": "transport error"})
        async with report.check(f"{name}: started again, all come back and are heard", *seen_by, seconds=START_SECONDS):
            await stack.start()
            for way in ways:
                await client.event("connect", way, 2)
            await client.event("upgrade", "upgraded", 2)
            for way in ways:
                await client.call("say", name=way, text=f"again, {way}")
            for way in ways:
                heard = [(await client.event("said", way, 101 + nth))["text"] for nth in range(3)]
                expect(f"{way} hears", heard, [f"again, {each}" for each in ways])
        ends = [client.end("disconnect", way, 2, {"reason": "transport close", **DRAINED}) for way in ("upgraded", "websocket")]
        await drained(report, name, proxy, seen_by, [*ends, client.event("disconnect", "polling", 2)])
        await check_counts(report, name, client, tuple(ways), disconnect=2, connect=2, said=103)


async def graphql_ws(report: Report, options) -> None:
    """graphql-ws's own server, with npm ws, and its client."""
    name, both = "graphql-ws", ("ann", "ben")
    if not options.direct:
        await check_file(report, name)
    async with NodeStack("graphql") as stack, example(name, stack, options) as proxy, StackClient("graphql") as client:
        seen_by, url = (client, stack, proxy), proxy.url("/graphql")

        async with report.check(f"{name}: connects, and subscribes", *seen_by):
            for each in both:
                await client.call("connect", name=each, url=url)
                expect("subprotocol", (await client.event("connected", each))["protocol"], "graphql-transport-ws")
                expect("first", (await client.event("position", each))["positions"], "start")

        async with report.check(f"{name}: a mutation and a query on the same connection, and 100 positions in order", *seen_by):
            for number in range(100):
                moved = await client.call("run", name=both[number % 2], query=f'mutation {{ move(to: "{number}") }}')
                expect("answer", moved, {"data": {"move": str(number)}})
            for each in both:
                heard = [(await client.event("position", each, nth + 2))["positions"] for nth in range(100)]
                expect(f"{each} hears", heard, [str(number) for number in range(100)])
                expect("query", await client.call("run", name=each, query="{ position }"), {"data": {"position": "99"}})

        async with report.check(f"{name}: its own ping is answered, twice each", *seen_by):
            for each in both:
                await client.event("pong", each, 2)

        if options.direct:
            return
        await check_origins(report, name, url, seen_by, subprotocols=["graphql-transport-ws"])
        await killed(report, name, stack, seen_by)
        async with report.check(f"{name}: the client sees 1012, clean", *seen_by):
            for each in both:
                await client.end("close", each, 1, LOST)
        async with report.check(f"{name}: started again, its subscription goes on by itself", *seen_by, seconds=START_SECONDS):
            await stack.start()
            for each in both:
                # As from the start: the new process knows of no move.
                expect("first", (await client.event("position", each, 102))["positions"], "start")
            await client.call("run", name="ann", query='mutation { move(to: "again") }')
            for each in both:
                expect("position", (await client.event("position", each, 103))["positions"], "again")
        await drained(report, name, proxy, seen_by, [client.end("close", each, 2, DRAINED) for each in both])
        await check_counts(report, name, client, both, error=0, complete=0, close=2, position=103)


def post(url: str, request: object) -> object:
    # Never by way of a proxy that the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json"}
    with opener.open(urllib.request.Request(url, json.dumps(request).encode(), headers), timeout=20) as response:
        return json.load(response)


async def json_rpc(report: Report, options) -> None:
    """Ganache, an Ethereum node for development, with rpc-websockets as its client."""
    name, both = "json-rpc", ("ann", "ben")
    if not options.direct:
        await check_file(report, name)
    async with Ganache() as stack, example(name, stack, options) as proxy, StackClient("jsonrpc") as client:
        seen_by, url = (client, stack, proxy), proxy.url("/")

        async def call(each: str, method: str, *params: object):
            return await client.call("call", name=each, method=method, params=params)

        async with report.check(f"{name}: connects, calls, and eth_subscribe", *seen_by):
            for each in both:
                await client.call("connect", name=each, url=url)
                await client.event("subscribed", each)
                expect("chain", await call(each, "eth_chainId"), "0x539")

        async with report.check(f"{name}: 20 blocks, which both are told of in order", *seen_by):
            for number in range(20):
                await call(both[number % 2], "evm_mine")
            for each in both:
                heard = [(await client.event("head", each, nth + 1))["number"] for nth in range(20)]
                expect(f"{each} hears", heard, list(range(1, 21)))
                expect("eth_blockNumber", await call(each, "eth_blockNumber"), hex(20))

        async with report.check(f"{name}: the same by POST", *seen_by):
            request = {"jsonrpc": "2.0", "id": 1, "method": "eth_blockNumber", "params": []}
            answer = await asyncio.to_thread(post, proxy.url("/", "http"), request)
            expect("answer", answer, {"jsonrpc": "2.0", "id": 1, "result": hex(20)})

        async with report.check(f"{name}: messages of 1 MB, there and back", *seen_by):
            expect("the same", await client.call("code", name="ann", size=500_000), True)
            # Ganache makes a block of it.
            for each in both:
                await client.event("head", each, 21)

        if options.direct:
            return
        await killed(report, name, stack, seen_by)
        async with report.check(f"{name}: the client sees 1012, clean", *seen_by):
            for each in both:
                await client.end("close", each, 1, LOST)
        async with report.check(f"{name}: started again, it comes back and hears of a block", *seen_by, seconds=START_SECONDS):
            await stack.start()
            for each in both:
                await client.event("subscribed", each, 2)
            await call("ben", "evm_mine")
            for each in both:
                # A new chain.
                expect("block", (await client.event("head", each, 22))["number"], 1)
        await drained(report, name, proxy, seen_by, [client.end("close", each, 2, DRAINED) for each in both])
        await check_counts(report, name, client, both, close=2, subscribed=2, head=22)


class Watcher:
    """Python's websockets, which connects again by itself; what was heard and how each connection ended."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ends: list[dict] = []
        self.connections = 0

    async def watch(self, url: str, news: asyncio.Condition) -> None:
        async for each in connect(url, proxy=None, close_timeout=20):
            self.connections += 1
            await tell_all(news)
            with contextlib.suppress(ConnectionClosed):
                async for message in each:
                    self.heard.append(json.loads(message)["number"])
                    await tell_all(news)
            is_clean = each.protocol.close_rcvd is not None and each.protocol.close_sent is not None
            self.ends.append({"code": each.close_code, "clean": is_clean})
            await tell_all(news)

    def last_run(self) -> list[int]:
        """Since the last gap, or since the backend began anew."""
        start = max((at for at in range(1, len(self.heard)) if self.heard[at] != self.heard[at - 1] + 1), default=0)
        return self.heard[start:]


async def tell_all(news: asyncio.Condition) -> None:
    async with news:
        news.notify_all()


@contextlib.asynccontextmanager
async def watching(url: str, news: asyncio.Condition) -> AsyncIterator[list[Watcher]]:
    watchers = [Watcher() for _ in range(WATCHERS)]
    tasks = [asyncio.create_task(each.watch(url, news)) for each in watchers]
    try:
        yield watchers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def live_positions(report: Report, options) -> None:
    """The demo's feed: one connection for all who watch, which comes back under them."""
    name = "live-positions"
    if options.direct:
        print(f"skip {name}: its backend is tidegate's own")
        return
    await check_file(report, name)
    news = asyncio.Condition()
    async with Demo() as stack, example(name, stack, options) as proxy:
        seen_by = (stack, proxy)
        async with watching(proxy.url("/feed"), news) as watchers:

            async def until(is_so: Callable[[Watcher], bool]) -> None:
                async with news:
                    await news.wait_for(lambda: all(is_so(each) for each in watchers))

            async def all_end(wanted: dict) -> None:
                await until(lambda each: len(each.ends) == 1)
                expect("ends", [each.ends[-1] for each in watchers], [wanted] * WATCHERS)

            what = f"{name}: {WATCHERS} watchers on one connection, each hears {POSITIONS} positions in order"
            async with report.check(what, *seen_by, seconds=60):
                await until(lambda each: len(each.heard) >= POSITIONS)
                expect("without a gap", {len(each.heard) - len(each.last_run()) for each in watchers}, {0})
                expect("connections", connections_to(stack.address), 1)
            await killed(report, name, stack, seen_by)
            what = f"{name}: started again, all hear {POSITIONS} of its positions, and not one was ended"
            async with report.check(what, *seen_by, seconds=60):
                await stack.start()
                # It counts from 0 again.
                await until(lambda each: POSITIONS <= len(each.last_run()) < len(each.heard))
                expect("(connections, ends)", {(each.connections, len(each.ends)) for each in watchers}, {(1, 0)})
                expect("connections", connections_to(stack.address), 1)
            await drained(report, name, proxy, seen_by, [all_end(DRAINED)])


async def examples(report: Report, options) -> None:
    """Every file of examples/ has its stack here."""
    stacks = {
        "graphql-ws": graphql_ws,
        "json-rpc": json_rpc,
        "live-positions": live_positions,
        "socket.io": socket_io,
        "spring-stomp": spring_stomp,
    }
    there = sorted(path.parent.name for path in (REPOSITORY / "examples").glob("*/proxy.toml"))
    expect("examples with a stack to test them", sorted(stacks), there)
    for name, stack in stacks.items():
        # What does not start is a failed check of its own, and no reason to leave out the others.
        try:
            await stack(report, options)
        except Exception as error:
            report.failed += 1
            print(f"FAIL {name}: {error if isinstance(error, Failed) else repr(error)}")
