"""The checks of interop/run: real clients and real backends with tidegate between them.

Each group has its own backend and its own tidegate, both on ports the kernel chose. What is checked is what the peers
saw; tidegate's own word counts only for its exit status.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from clients import CLIENTS, ChromiumClient, ProcessClient, PythonClient
from everybody import everybody, expect_everywhere
from examples import examples
from handshakes import handshakes
from harness import (
    INTEROP,
    WORK,
    Backend,
    Failed,
    Proxy,
    Report,
    Tomcat,
    expect,
    json_line,
    run,
)
from multiplexed import multiplexed
from page import page
from shared import shared
from slow import slow
from smuggling import smuggling
from tls import Authority, tls

MIB = 1024 * 1024
SUBPROTOCOL = "tidegate.interop"


class Options:
    direct = False


async def clients_and_echo(report: Report, options: Options, flavour: str) -> None:
    """One client against the echo backend: all that a session consists of."""
    async with (
        Backend() as backend,
        Proxy(backend.address, options.direct) as proxy,
        CLIENTS[flavour]() as client,
    ):
        seen_by = (client, backend, proxy)
        url = f"ws://{proxy.address}/echo?name="

        async with report.check(f"{flavour}: connects, subprotocol and permessage-deflate end to end", *seen_by):
            await client.prepare(proxy.url("/page", "http"))
            opened = await client.open("main", url + "main", ["other.protocol", SUBPROTOCOL])
            expect("subprotocol at the client", opened["protocol"], SUBPROTOCOL)
            if "permessage-deflate" not in opened["extensions"]:
                raise Failed(f"extensions at the client: {opened['extensions']!r}")
            seen = await backend.event("open", "main")
            expect("subprotocol at the backend", seen["subprotocol"], SUBPROTOCOL)
            expect("extensions at the backend", seen["extensions"], ["permessage-deflate"])

        async with report.check(f"{flavour}: text, empty text, binary", *seen_by):
            for message in ({"text": "grüße, 世界"}, {"text": ""}, {"bytes": 70_000}, {"bytes": 0}):
                echo = await client.echo("main", **message)
                expect(
                    f"echo of {message}",
                    (echo["kind"], echo["same"]),
                    ("text" if "text" in message else "binary", True),
                )

        async with report.check(f"{flavour}: 1 MiB that compresses, 1 MiB that does not", *seen_by):
            for message in ({"text": "tidegate" * 16, "repeat": MIB // 128}, {"bytes": MIB}):
                echo = await client.echo("main", **message)
                expect("echo", (echo["size"], echo["same"]), (MIB, True))

        async with report.check(f"{flavour}: 2,000 messages at once, in order", *seen_by):
            expect("messages in order", await client.burst("main", 2000), 2000)

        async with report.check(f"{flavour}: ping of the backend is answered", *seen_by):
            await client.send("main", "!ping")
            expect("answer", (await client.receive("main"))["text"], "ponged")

        if client.can_ping:
            async with report.check(f"{flavour}: ping of the client is answered", *seen_by):
                expect("payload", await client.ping("main", "from the client"), "from the client")

        async with report.check(f"{flavour}: close by the client, 4000 and a reason", *seen_by):
            await client.close("main", 4000, "done here")
            end = await client.closed("main")
            expect("the end at the client", (end["code"], end["reason"], end["clean"]), (4000, "done here", True))
            seen = await backend.event("close", "main")
            expect("the end at the backend", (seen["code"], seen["reason"], seen["reset"]), (4000, "done here", False))

        async with report.check(f"{flavour}: close by the backend, 4001 and a reason", *seen_by):
            await client.open("second", url + "second")
            await client.send("second", "!close 4001 had_enough")
            end = await client.closed("second")
            expect("the end at the client", (end["code"], end["reason"], end["clean"]), (4001, "had_enough", True))
            seen = await backend.event("close", "second")
            expect("the end at the backend", (seen["code"], seen["reset"]), (4001, False))

        async with report.check(f"{flavour}: a handshake the backend refuses stays refused", *seen_by):
            status = await client.status(f"ws://{proxy.address}/refused")
            if status is not None:
                expect("status", status, 403)

        await check_stop(report, proxy, flavour)


async def check_stop(report: Report, proxy: Proxy, flavour: str) -> None:
    if not proxy.direct:
        async with report.check(f"{flavour}: tidegate ends with 0", proxy):
            proxy.kill(signal.SIGTERM)
            expect("exit status", await proxy.ended(), 0)


async def endings(report: Report, options: Options) -> None:
    """What the peers see when the other side, or tidegate, ends without a word or politely."""
    if options.direct:
        print("skip endings: they are tidegate's work")
        return
    await all_endings(report, {}, "")


async def secure_endings(report: Report, options: Options) -> None:
    """The same where clients speak TLS. They believe whoever the environment names; Chromium believes anybody, for want of a file."""
    if options.direct:
        print("skip endings-tls: they are tidegate's work")
        return
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tls-", dir=WORK) as folder:
        authority = await Authority(Path(folder) / "ours").make()
        settings = {
            "TIDEGATE_LISTEN__TLS_CERTIFICATE": str(authority.certificate),
            "TIDEGATE_LISTEN__TLS_KEY": str(authority.key),
        }
        os.environ |= {"NODE_EXTRA_CA_CERTS": str(authority.ca), "SSL_CERT_FILE": str(authority.ca)}
        try:
            async with Backend() as backend, Proxy(backend.address, settings=settings) as proxy:
                # It asks for no WebSocket over HTTP/2 but where a page came by that, and SETTINGS offer it.
                async with report.check("tls: chromium's WebSocket is a stream of its page's connection", proxy, seconds=60):
                    async with CLIENTS["chromium"]() as client:
                        await client.prepare(proxy.url("/page", "http"))
                        await client.open("main", proxy.url("/echo?name=main"))
                        expect("the echo", (await client.echo("main", text="hello"))["same"], True)
                        line = await proxy.wait_for_line(json_line(message="open"), '"open"')
                        expect("the version of HTTP", line["http"], "h2")
            await all_endings(report, settings, "tls, ")
        finally:
            for name in ("NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE"):
                del os.environ[name]


async def all_endings(report: Report, settings: dict[str, str], over: str) -> None:
    what = f"{over}backend killed"
    async with Backend() as backend, Proxy(backend.address, settings=settings) as proxy:
        async with everybody(report, proxy, backend, what) as clients:
            backend.kill(signal.SIGKILL)
            await expect_everywhere(report, clients, (proxy,), what, 1012)
            async with report.check(f"{what}: a new connection gets 502, 503 or 504", proxy):
                client = PythonClient()
                status = await client.status(proxy.url("/echo?name=late"))
                if status not in (502, 503, 504):
                    raise Failed(f"status {status}")

    what = f"{over}backend stopped politely"
    async with Backend() as backend, Proxy(backend.address, settings=settings) as proxy:
        async with everybody(report, proxy, backend, what) as clients:
            backend.kill(signal.SIGTERM)
            await expect_everywhere(report, clients, (backend, proxy), what, 1001)

    for what, by_signal in (("SIGTERM of tidegate", True), ("tidegate drain --no-wait", False)):
        what = f"{over}{what}"
        async with Backend() as backend, Proxy(backend.address, settings=settings) as proxy:
            async with everybody(report, proxy, backend, what) as clients:
                start = time.monotonic()
                if by_signal:
                    proxy.kill(signal.SIGTERM)
                else:
                    async with report.check(f"{what}: begins, and says so", proxy):
                        status = json.loads(await proxy.command("drain", "--no-wait"))
                        if status["phase"] == "running":
                            raise Failed(f"{status}")
                await expect_everywhere(report, clients, (backend, proxy), what, 1001)
                for flavour in clients:
                    async with report.check(f"{what}: the backend sees {flavour} close with 1001", backend, proxy):
                        seen = await backend.event("close", flavour)
                        expect("(code, reset)", (seen["code"], seen["reset"]), (1001, False))
                if not by_signal:
                    async with report.check(f"{what}: drained, it stays until SIGTERM", proxy):
                        # Whoever waits for a drain that is over hears of it at once.
                        expect("phase", json.loads(await proxy.command("drain", "--wait"))["phase"], "drained")
                        proxy.kill(signal.SIGTERM)
                async with report.check(f"{what}: exit status 0", proxy):
                    expect("exit status", await proxy.ended(), 0)
                    print(f"     all of it took {time.monotonic() - start:.2f} s, with drain.window = 1s")

    what = f"{over}client killed"
    async with Backend() as backend, Proxy(backend.address, settings=settings) as proxy, ProcessClient("ws") as client:
        async with report.check(f"{what}: the backend sees an orderly 1001", client, backend, proxy):
            await client.open("victim", proxy.url("/echo?name=victim"))
            await client.echo("victim", text="hello")
            client.kill(signal.SIGKILL)
            seen = await backend.event("close", "victim")
            expect("(code, reset)", (seen["code"], seen["reset"]), (1001, False))


def get(url: str) -> tuple[int, str, bytes]:
    try:
        # Never by way of a proxy that the environment names.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=15) as response:
            return response.status, response.headers.get_content_type(), response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get_content_type(), error.read()


async def receive_until(client, name: str, wanted: str) -> str:
    """Skips what others say in the same room."""
    while True:
        message = await client.receive(name)
        if wanted in message.get("text", ""):
            return message["text"]


async def tomcat(report: Report, options: Options) -> None:
    """Tomcat 10 and the WebSocket examples it comes with."""
    async with (
        Tomcat() as backend,
        Proxy(backend.address, options.direct) as proxy,
        PythonClient() as client,
        ProcessClient("ws") as other,
    ):
        seen_by = (client, other, backend, proxy)
        base = f"ws://{proxy.address}/examples/websocket/"

        async with report.check("tomcat: the examples page by plain HTTP", *seen_by):
            url = f"http://{proxy.address}/examples/websocket/"
            status, _, page = await asyncio.to_thread(get, url + "chat.xhtml")
            expect("status", status, 200)
            if b"WebSocket connection opened" not in page:
                raise Failed(f"another page: {page[:200]!r}")
            expect("status of a page that is not there", (await asyncio.to_thread(get, url + "none"))[0], 404)

        async with report.check("tomcat: echo of text and binary", *seen_by):
            opened = await client.open("echo", base + "echoAnnotation")
            if "permessage-deflate" not in opened["extensions"]:
                raise Failed(f"extensions: {opened['extensions']!r}")
            for message in ({"text": "grüße, 世界"}, {"bytes": 5000}, {"text": "x", "repeat": 100_000}):
                expect(f"echo of {message}", (await client.echo("echo", **message))["same"], True)
            expect("pong", await client.ping("echo", "tomcat?"), "tomcat?")

        async with report.check("tomcat: close by the client", *seen_by):
            await client.close("echo", 4000, "done here")
            end = await client.closed("echo")
            expect("(code, clean)", (end["code"], end["clean"]), (4000, True))

        async with report.check("tomcat: chat between two clients", *seen_by):
            await client.open("chat", base + "chat")
            await other.open("chat", base + "chat")
            # Tomcat has told of its 101 before the newcomer is in the room: what is said until then passes them by, without a proxy too.
            await receive_until(other, "chat", "has joined")
            await client.send("chat", "hello from Python")
            await receive_until(other, "chat", "hello from Python")
            await other.send("chat", "hello from Node")
            await receive_until(client, "chat", "hello from Node")
            await other.close("chat", 1000, "")
            end = await other.closed("chat")
            expect("(code, clean)", (end["code"], end["clean"]), (1000, True))
            await receive_until(client, "chat", "has disconnected")

        async with report.check("tomcat: close by Tomcat, 1009 for a text beyond its buffer", *seen_by):
            # In one frame that tells its length: Tomcat answers at the header, with most of it still on its way.
            await client.send("chat", "x" * 100_000)
            end = await client.closed("chat")
            expect("(code, clean)", (end["code"], end["clean"]), (1009, True))

        async with report.check("tomcat: snake", *seen_by):
            await client.open("snake", base + "snake")
            await receive_until(client, "snake", '"type": "join"')
            await client.send("snake", "west")
            await receive_until(client, "snake", '"type": "update"')
            await client.close("snake", 1000, "")
            expect("code", (await client.closed("snake"))["code"], 1000)

        async with report.check("tomcat: drawboard draws for the other", *seen_by):
            for each in (client, other):
                await each.open("draw", base + "drawboard")
                expect("first", (await each.receive("draw"))["text"][0], "2")
                expect("image", (await each.receive("draw"))["kind"], "binary")
            # "1" message number "|" type, colour, thickness, two corners.
            await client.send("draw", "11|1,0,0,255,255,3.0,10.0,10.0,60.0,60.0,1")
            await receive_until(other, "draw", "10.0,10.0,60.0,60.0")
            for each in (client, other):
                await each.close("draw", 1000, "")
                expect("code", (await each.closed("draw"))["code"], 1000)

        async with ChromiumClient() as chromium:
            async with report.check("tomcat: its chat page in Chromium", chromium, *seen_by, seconds=60):
                await chromium.call("page", url=f"http://{proxy.address}/examples/websocket/chat.xhtml")
                await chromium.call("text", selector="#console", contains="has joined")
                await chromium.call("fill", selector="#chat", value="hello from a page")
                await chromium.call("press", selector="#chat", key="Enter")
                await chromium.call("text", selector="#console", contains="hello from a page")

        async with report.check("tomcat: stopped, it closes with 1001", *seen_by, seconds=40):
            await client.open("stop", base + "chat")
            await other.open("stop", base + "chat")
            await receive_until(client, "stop", "has joined")
            backend.kill(signal.SIGTERM)
            for each in (client, other):
                end = await each.closed("stop")
                expect(f"{each.name}'s (code, clean)", (end["code"], end["clean"]), (1001, True))

        await check_stop(report, proxy, "tomcat")


async def demo(report: Report, options: Options) -> None:
    """`tidegate demo`, as somebody would meet it who tries it for the first time."""
    if options.direct:
        print("skip demo: it is tidegate's own")
        return
    async with (
        Proxy(None) as proxy,
        PythonClient() as client,
        ProcessClient("ws") as other,
        ChromiumClient() as chromium,
    ):
        seen_by = (client, other, proxy)

        async with report.check("demo: the page by plain HTTP", *seen_by):
            status, kind, page = await asyncio.to_thread(get, f"http://{proxy.address}/")
            expect("(status, type)", (status, kind), (200, "text/html"))
            if b"WebSocket" not in page:
                raise Failed(f"no script in the page: {page[:200]!r}")

        for each in (client, other):
            async with report.check(f"demo: echo with {each.name}", *seen_by):
                await each.open("echo", f"ws://{proxy.address}/echo")
                expect("echo", (await each.echo("echo", text="hello, tidegate"))["same"], True)
                expect("echo of bytes", (await each.echo("echo", bytes=1000))["same"], True)
                await each.close("echo", 1000, "")
                end = await each.closed("echo")
                expect("(code, clean)", (end["code"], end["clean"]), (1000, True))

        async with report.check("demo: broadcast from one to the other and back", *seen_by):
            for each in (client, other):
                await each.open("room", f"ws://{proxy.address}/broadcast")
            await client.send("room", "hello from Python")
            await receive_until(other, "room", "hello from Python")
            await other.send("room", "hello from Node")
            await receive_until(client, "room", "hello from Node")

        async with report.check("demo: the page in Chromium connects and gets its echo", chromium, proxy, seconds=60):
            await chromium.call("page", url=f"http://{proxy.address}/")
            await chromium.call("text", selector="#status", **{"is": "connected"})
            await chromium.call("fill", selector="#message", value="hello from the page")
            await chromium.call("click", selector="#send")
            await chromium.call("text", selector="#log", contains="hello from the page")
            # The page may show what it sends, too.
            while "hello from the page" not in await chromium.call("framesReceived"):
                await asyncio.sleep(0.1)
            await chromium.call("screenshot", path=str(WORK / "demo.png"))

        async with report.check("demo: SIGTERM closes with 1001 and ends with 0", *seen_by):
            proxy.kill(signal.SIGTERM)
            for each in (client, other):
                end = await each.closed("room")
                expect(f"{each.name}'s (code, clean)", (end["code"], end["clean"]), (1001, True))
            expect("exit status", await proxy.ended(), 0)


GROUPS = {
    **{
        flavour: (lambda report, options, flavour=flavour: clients_and_echo(report, options, flavour))
        for flavour in CLIENTS
    },
    "endings": endings,
    "endings-tls": secure_endings,
    "tomcat": tomcat,
    "demo": demo,
    "examples": examples,
    "page": page,
    "multiplexed": multiplexed,
    "shared": shared,
    "tls": tls,
    "smuggling": smuggling,
    "handshakes": handshakes,
    "slow": slow,
}


async def main() -> int:
    arguments = argparse.ArgumentParser(prog="interop/run", description=__doc__.splitlines()[0])
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(GROUPS)} (all of them)")
    arguments.add_argument("--direct", action="store_true", help="without tidegate: is it the peers?")
    options = arguments.parse_args()
    if unknown := set(options.names) - set(GROUPS):
        arguments.error(f"no check is called {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if not (INTEROP / "node_modules" / "ws").exists():
        arguments.error("run interop/setup first")
    report = Report()
    for name in options.names or GROUPS:
        start = time.monotonic()
        # What a group cannot start without is a failed check of its own.
        before = report.passed + report.failed
        try:
            await GROUPS[name](report, options)
        except Exception as error:
            report.failed += 1
            print(f"FAIL {name}: {error if isinstance(error, Failed) else repr(error)}")
        print(f"     {name}: {report.passed + report.failed - before} checks, {time.monotonic() - start:.1f} s")
    return report.summary()


if __name__ == "__main__":
    sys.exit(run(main()))
