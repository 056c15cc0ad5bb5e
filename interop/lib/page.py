"""The live page at the admin root, in Chromium: what it shows is compared with what the clients saw.

Screenshots of each state go to .work/page/. readme.png is docs/live-page.png: `PAGE_SECONDS=75 interop/run page` lets clients talk for
so long before it is taken.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import tempfile
import urllib.request
from pathlib import Path

from clients import ChromiumClient, PythonClient
from harness import WORK, Backend, Failed, Proxy, Report, expect

# Clients talk for so long before the page is looked at.
TALK_SECONDS = float(os.environ.get("PAGE_SECONDS", "6"))
# Of a core, while the page is open; without traffic, so that nothing else is in it.
MOST_CPU = 0.01
CPU_SECONDS = 10

# Clients of this path share a WebSocket.
SHARED = """
[[route]]
path = "/feed"
pool.mode = "shared"
pool.shared = "broadcast"
pool.reconnect_grace = "30s"
"""

VIEWS = {
    "light": {"width": 1280, "height": 900, "scheme": "light"},
    "dark": {"width": 1280, "height": 900, "scheme": "dark"},
    "narrow": {"width": 360, "height": 740, "scheme": "light"},
    "narrow-dark": {"width": 360, "height": 740, "scheme": "dark"},
}


def reset(client: PythonClient, name: str) -> None:
    """It goes with a RST, as a process that crashes with something unread."""
    transport = client._sockets[name].transport
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def status(admin: str) -> dict:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{admin}/live.json", timeout=15) as response:
        return json.load(response)


def cpu_ms(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


async def rows_until(chromium: ChromiumClient, selector: str, wanted: list[list[str]], without: int | None = None) -> None:
    """The page is at most a second behind what has happened. Leaves out a column."""
    found = None
    for _ in range(100):
        rows = await chromium.call("rows", selector=selector)
        found = [[cell for index, cell in enumerate(row) if index != without] for row in rows]
        if found == wanted:
            return
        await asyncio.sleep(0.1)
    raise Failed(f"{selector} shows {found}, not {wanted}")


async def look(chromium: ChromiumClient, name: str, *views: str) -> None:
    """A screenshot of it in each view, and what is asked of it in all of them."""
    (WORK / "page").mkdir(parents=True, exist_ok=True)
    for view in views:
        await chromium.call("look", **VIEWS[view])
        await chromium.call("screenshot", path=str(WORK / "page" / f"{name}-{view}.png"), full=True)
        expect(f"pixels that {name}, {view} can be scrolled sideways", await chromium.call("sideways"), 0)
        found = await chromium.call("axe")
        expect(f"what axe-core finds in {name}, {view}", found["serious"], [])
        if found["passes"] < 10:
            raise Failed(f"axe-core looked at nothing: {found}")
    await chromium.call("look", **VIEWS["light"])


async def talk(client: PythonClient, names: list[str]) -> int:
    """Each says something now and then, and hears it again. How many messages that were."""
    said, end = 0, asyncio.get_running_loop().time() + TALK_SECONDS
    while asyncio.get_running_loop().time() < end:
        for name in random.sample(names, max(1, len(names) // 3)):
            expect("echo", (await client.echo(name, text="hello " * random.randint(1, 50)))["same"], True)
            said += 1
        await asyncio.sleep(random.uniform(0.02, 0.2))
    return said


async def page(report: Report, options) -> None:
    if options.direct:
        print("skip page: it is tidegate's own")
        return
    settings = {"TIDEGATE_DRAIN__WINDOW": "6s", "TIDEGATE_DRAIN__DELAY": "2s"}
    async with ChromiumClient() as chromium:
        async with Backend() as backend, Proxy(backend.address, settings=settings) as proxy, PythonClient() as client:
            seen_by = (chromium, client, backend, proxy)
            admin, echo = await proxy.admin(), f"ws://{proxy.address}/echo?name="

            async with report.check("page: empty, it says what to do", *seen_by, seconds=60):
                await chromium.call("look", **VIEWS["light"])
                await chromium.call("page", url=f"http://{admin}/")
                await chromium.call("text", selector="#link", **{"is": "● live"})
                await chromium.call("text", selector="#empty", contains=f"curl -i http://{proxy.address}/")
                await chromium.call("text", selector="#problems", contains="Nothing that tidegate can see")
                await chromium.call("text", selector="#config", contains=f'address = "{backend.address}"')
                expect("plots", await chromium.call("count", selector="#plots svg"), 6)
                await look(chromium, "empty", "light", "narrow-dark")

            async with report.check(f"page: open for {CPU_SECONDS} s, it costs tidegate less than 1 % of a core", *seen_by):
                before = cpu_ms(proxy.pid)
                await asyncio.sleep(CPU_SECONDS)
                part = (cpu_ms(proxy.pid) - before) / 1000 / CPU_SECONDS
                print(f"     {part:.2%} of a core")
                if part > MOST_CPU:
                    raise Failed(f"{part:.2%} of a core")

            names = [f"c{index}" for index in range(24)]
            async with report.check("page: sessions and their messages", *seen_by, seconds=TALK_SECONDS + 60):
                for name in names:
                    await client.open(name, echo + name)
                await chromium.call("text", selector="#where", contains="24 sessions")
                expect("the empty state is shown", await chromium.call("isVisible", selector="#empty"), False)
                said = await talk(client, names)
                seen = await asyncio.to_thread(status, admin)
                expect("messages both ways", seen["windows"]["15m"]["messages"], [said, said])
                # Clients may have talked for longer than the minute of the second column.
                await rows_until(chromium, "#refused", [["handshake: accepted", str(len(names))]], without=1)

            async with report.check("page: ends by the client, by the backend, and by RST", *seen_by, seconds=60):
                for name in names[:4]:
                    await client.close(name, 1000, "")
                    expect("the client's code", (await client.closed(name))["code"], 1000)
                for name in names[4:7]:
                    await client.send(name, "!close 4001 had_enough")
                    expect("the client's code", (await client.closed(name))["code"], 4001)
                for name in names[7:9]:
                    reset(client, name)
                    await backend.event("close", name)
                await rows_until(
                    chromium,
                    "#ends",
                    [
                        ["client", "✕ cut", "2", "2", "no code × 2"],
                        ["backend", "✓ clean", "3", "3", "4xxx × 3"],
                        ["client", "✓ clean", "4", "4", "1000 × 4"],
                    ],
                )
                await rows_until(chromium, "#causes", [["client_reset", "2", "2"]])
                await chromium.call("text", selector="#where", contains="15 sessions")
                await chromium.call("text", selector="#problems", contains="normal, unless there are many")

            async with report.check("page: nothing of a name is HTML", *seen_by):
                expect("elements in what is text", await chromium.call("count", selector="#config *, #problems script"), 0)

            async with report.check("page: the backend killed: 1012, and what to do", *seen_by, seconds=90):
                backend.kill(signal.SIGKILL)
                for name in names[9:]:
                    expect("the client's code", (await client.closed(name))["code"], 1012)
                refused = await client.status(echo + "late")
                expect("the status of a new one", refused, 502)
                await chromium.call("text", selector="#problems", contains="that could not be connected to the backend (502): 1")
                rows = await chromium.call("rows", selector="#ends")
                expect("by the backend, cut", [row[:4] for row in rows if row[:2] == ["backend", "✕ cut"]], [["backend", "✕ cut", "15", "15"]])
                if "error" not in await chromium.call("text", selector="#problems", contains="Close 1012"):
                    raise Failed("no error is said")
                await look(chromium, "busy", "light", "dark", "narrow")
                # For the README: what is seen without scrolling.
                await chromium.call("look", width=1180, height=648, scheme="light")
                await chromium.call("screenshot", path=str(WORK / "page" / "readme.png"))

            async with report.check("page: no complaint of Chromium's", *seen_by):
                expect("complaints", await chromium.call("complaints"), [])

        async with Backend() as backend, Proxy(backend.address, settings=settings) as proxy, PythonClient() as client:
            seen_by = (chromium, client, backend, proxy)
            admin, echo = await proxy.admin(), f"ws://{proxy.address}/echo?name="
            async with report.check("page: a drain, with its countdown", *seen_by, seconds=90):
                await chromium.call("page", url=f"http://{admin}/")
                names = [f"d{index}" for index in range(30)]
                for name in names:
                    await client.open(name, echo + name)
                await chromium.call("text", selector="#where", contains="30 sessions")
                await proxy.command("drain", "--no-wait")
                await chromium.call("text", selector="#phases [aria-current]", **{"is": "delay: still accepting"})
                await chromium.call("text", selector="#order", contains="tidegate drain --undo")
                await chromium.call("text", selector="#phases [aria-current]", **{"is": "window: sessions end"})
                await chromium.call("text", selector="#left", contains="left of 6 s")
                # Some have ended, and some have not.
                while not 0 < float(await chromium.call("attribute", selector="#done", name="value") or 0) < 30:
                    await asyncio.sleep(0.05)
                await look(chromium, "drain", "light", "narrow-dark")
                for name in names:
                    expect("the client's code", (await client.closed(name))["code"], 1001)
                await chromium.call("text", selector="#left", **{"is": "Everything has ended"})
                await rows_until(chromium, "#ends", [["tidegate", "✓ clean", "30", "30", "1001 × 30"]])
                expect("complaints", await chromium.call("complaints"), [])

            async with report.check("page: the process gone, the page says that it is old", *seen_by, seconds=60):
                proxy.kill(signal.SIGTERM)
                expect("exit status", await proxy.ended(), 0)
                await chromium.call("text", selector="#stale", contains="tries again by itself")
                await look(chromium, "gone", "light")
                # Its stream was brought to an end; what comes then is that nobody is there.
                rest = {text for text in await chromium.call("complaints") if "ERR_CONNECTION_REFUSED" not in text}
                expect("complaints besides", rest, set())
        await shared(chromium, report)
    with contextlib.suppress(FileNotFoundError):
        sizes = {path.name: path.stat().st_size for path in sorted((WORK / "page").glob("*.png"))}
        print(f"     screenshots in interop/.work/page: {sizes}")


async def shared(chromium: ChromiumClient, report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="page-", dir=WORK) as folder:
        config = Path(folder) / "proxy.toml"
        config.write_text(SHARED)
        async with Backend() as backend, Proxy(backend.address, config=config) as proxy, PythonClient() as client:
            seen_by = (chromium, client, backend, proxy)
            admin = await proxy.admin()
            async with report.check("page: a WebSocket that clients share, and its backend lost", *seen_by, seconds=60):
                await chromium.call("page", url=f"http://{admin}/")
                await chromium.call("text", selector="#link", **{"is": "● live"})
                # Of the page before, whose process was gone.
                await chromium.call("complaints")
                expect("without any, their card is shown", await chromium.call("isVisible", selector="#hubs"), False)
                names = [f"s{index}" for index in range(3)]
                for name in names:
                    await client.open(name, f"ws://{proxy.address}/feed?name=shared")
                key = (await asyncio.to_thread(status, admin))["websockets"][0]["key"]
                about = f"/feed\nbroadcast {key}\n{backend.address}"
                await rows_until(chromium, "#websockets", [[about, "open", "3", "0"]])
                await look(chromium, "shared", "light", "narrow-dark")
                backend.kill(signal.SIGKILL)
                await chromium.call("text", selector="#websockets", contains="searching")
                await chromium.call("text", selector="#problems", contains="is looked for: 1, with 3 clients that wait")
                await look(chromium, "shared-lost", "narrow")
                for name in names:
                    await client.close(name, 1000, "")
                    expect("the client's code", (await client.closed(name))["code"], 1000)
                expect("complaints", await chromium.call("complaints"), [])
