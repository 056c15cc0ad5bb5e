"""WebSockets that share HTTP/2 connections (RFC 8441) with backends that nobody wrote for tidegate, and those that can't.

What counts: echoes and ends at the clients, and TCP connections toward the backend as the kernel lists them.
"""

import asyncio
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from clients import PythonClient
from harness import INTEROP, WORK, Backend, Failed, Process, Proxy, Report, expect, json_line

MIB = 1024 * 1024
SUBPROTOCOL = "tidegate.interop"
IDLE_SECONDS = 2
MULTIPLEXED = {"TIDEGATE_POOL__MODE": "multiplexed", "TIDEGATE_POOL__IDLE_TIMEOUT": f"{IDLE_SECONDS}s"}
SAID = "each WebSocket gets a connection of its own to this backend"


class Peer(Process):
    """A backend that says where it listens."""

    def __init__(self, name: str, *command: object) -> None:
        super().__init__(name)
        self._command = command
        self.address = ""

    async def __aenter__(self):
        await self.start(*self._command)
        self.address = (await self.ready(json_line(event="listening"), "its address"))["address"]
        return self

    async def __aexit__(self, *_) -> None:
        await self.stop()


def hypercorn() -> Peer:
    return Peer("hypercorn", sys.executable, INTEROP / "peers" / "asgi.py", "hypercorn")


def uvicorn() -> Peer:
    return Peer("uvicorn", sys.executable, INTEROP / "peers" / "asgi.py", "uvicorn")


def node() -> Peer:
    return Peer("node", "node", INTEROP / "peers" / "http2.mjs")


class Configured(Process):
    """HAProxy or nginx between tidegate and a backend, with a configuration of its own and a port that was free.

    With `ca` it is HAProxy as a client of TLS: what comes goes on encrypted, and nothing of it is looked at.
    """

    def __init__(self, name: str, behind: str, ca: Path | None = None) -> None:
        super().__init__(name)
        self._ca = ca
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._behind = behind

    async def __aenter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix=f"{self.name}-", dir=WORK)
        folder = Path(self._folder.name)
        file = folder / "conf"
        if self.name == "haproxy":
            mode, proto, tls = ("http", "proto h2", "") if self._ca is None else ("tcp", "", f"ssl verify required ca-file {self._ca}")
            file.write_text(
                "global\n  maxconn 4000\n"
                f"defaults\n  mode {mode}\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
                "  timeout tunnel 60s\n"
                f"frontend in\n  bind {self.address} {proto}\n  default_backend out\n"
                f"backend out\n  server app {self._behind} {tls}\n"
            )
            command = ["haproxy", "-db", "-f", file]
        else:
            file.write_text(
                f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/error.log;\n"
                "events { worker_connections 2000; }\nhttp {\n  access_log off;\n"
                + "".join(
                    f"  {kind}_temp_path {folder}/{kind};\n"
                    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
                )
                + f"  server {{\n    listen {self.address};\n    location / {{\n      proxy_pass http://{self._behind};\n"
                "      proxy_http_version 1.1;\n      proxy_set_header Upgrade $http_upgrade;\n"
                '      proxy_set_header Connection "upgrade";\n    }\n  }\n}\n'
            )
            command = ["nginx", "-p", folder, "-c", file]
        await self.start(*command, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
        host, port = self.address.split(":")
        for _ in range(100):
            try:
                socket.create_connection((host, int(port)), 1).close()
                return self
            except OSError:
                await asyncio.sleep(0.05)
        await self.stop()
        raise Failed(f"{self.name} does not listen: {self.lines[-5:]}")

    async def __aexit__(self, *_) -> None:
        await self.stop()
        self._folder.cleanup()


def connections_to(address: str) -> int:
    """Established TCP connections to a port of 127.0.0.1, counted at the side that connected."""
    wanted = f"0100007F:{int(address.split(':')[1]):04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(1 for line in lines if line.split()[2] == wanted and line.split()[3] == "01")


async def session(report: Report, name: str, client, proxy: Proxy, witnesses: tuple) -> None:
    """What a session consists of."""
    url = f"ws://{proxy.address}/echo?name="
    async with report.check(f"{name}: subprotocol, text, binary, 1 MiB, a burst", *witnesses):
        opened = await client.open("main", url + "main", ["other.protocol", SUBPROTOCOL])
        expect("subprotocol", opened["protocol"], SUBPROTOCOL)
        for message in ({"text": "grüße, 世界"}, {"bytes": 70_000}, {"bytes": MIB}):
            echo = await client.echo("main", **message)
            expect(f"echo of {message}", echo["same"], True)
        expect("messages in order", await client.burst("main", 500), 500)
        expect("pong", await client.ping("main", "there?"), "there?")
    async with report.check(f"{name}: close by the client", *witnesses):
        await client.close("main", 4000, "done here")
        end = await client.closed("main")
        expect("(code, clean)", (end["code"], end["clean"]), (4000, True))
    async with report.check(f"{name}: a handshake the backend refuses stays refused", *witnesses):
        expect("status", await client.status(f"ws://{proxy.address}/refused"), 403)


async def crowd(report: Report, name: str, count: int, most: int, proxy: Proxy, address: str, seen_by: tuple) -> None:
    """So many at the same time: as few connections as they need, and none when they have gone."""
    client = PythonClient()
    try:
        async with report.check(f"{name}: {count} sessions on at most {most} connections", *seen_by, seconds=120):
            names = [f"n{index}" for index in range(count)]
            for batch in (names[at : at + 50] for at in range(0, count, 50)):
                await asyncio.gather(*(client.open(n, f"ws://{proxy.address}/echo?name={n}") for n in batch))
            echoes = await asyncio.gather(*(client.echo(n, text=f"this is {n}") for n in names))
            expect("echoes that are right", sum(echo["same"] for echo in echoes), count)
            used = connections_to(address)
            print(f"     {count} sessions, {used} connections")
            if not 0 < used <= most:
                raise Failed(f"{used} connections")
            for n in names:
                await client.close(n, 1000, "")
            ends = [await client.closed(n) for n in names]
            expect("clean ends", sum(end["clean"] and end["code"] == 1000 for end in ends), count)
        async with report.check(f"{name}: they are gone after pool.idle_timeout", *seen_by):
            expect("still there", connections_to(address) > 0, True)
            begun = time.monotonic()
            while connections_to(address):
                await asyncio.sleep(0.05)
            print(f"     gone {time.monotonic() - begun:.1f} s after the last Close")
    finally:
        await client.__aexit__()


async def multiplexed(report: Report, options) -> None:
    if options.direct:
        print("skip multiplexed: it is tidegate's work")
        return
    workers = min(max(2, os.cpu_count() or 2), 4)

    async with hypercorn() as backend, Proxy(backend.address, settings=MULTIPLEXED) as proxy, PythonClient() as client:
        await session(report, "hypercorn", client, proxy, (client, backend, proxy))
        async with report.check("hypercorn: it was asked over HTTP/2", backend, proxy):
            expect("version", (await backend.wait_for_line(json_line(event="open", name="main"), "open"))["version"], "2")
        async with report.check("hypercorn: close by the backend", client, backend, proxy):
            await client.open("second", f"ws://{proxy.address}/echo?name=second")
            await client.send("second", "!close 4001 had_enough")
            end = await client.closed("second")
            expect("the end", (end["code"], end["reason"], end["clean"]), (4001, "had_enough", True))
        # One DATA frame on a stream that it has forgotten, and Hypercorn 0.18 ends the connection (its issue 329).
        async with report.check("hypercorn: ends of others on its connection leave a session alone", client, backend, proxy):
            one = f"ws://{proxy.address}/echo?name="
            await client.open("stays", one + "stays")
            for index in range(20):
                await client.open(f"goes{index}", f"{one}goes{index}")
                if index % 2:
                    await client.close(f"goes{index}", 1000, "")
                else:
                    await client.send(f"goes{index}", "!close 4001 had_enough")
                expect("clean", (await client.closed(f"goes{index}"))["clean"], True)
                expect("refused", await client.status(f"ws://{proxy.address}/refused"), 403)
                expect("echo", (await client.echo("stays", text=f"still here after {index}"))["same"], True)
            await client.close("stays", 1000, "")
            end = await client.closed("stays")
            expect("(code, clean)", (end["code"], end["clean"]), (1000, True))
        # Each worker may have one that is not full.
        await crowd(report, "hypercorn", 1000, 1000 // 64 + workers, proxy, backend.address, (backend, proxy))
        async with report.check("hypercorn: no fallback, no reset, tidegate ends with 0", backend, proxy):
            expect("fallbacks", sum(SAID in line for line in proxy.lines), 0)
            expect("exit status", await proxy.stop(), 0)
    # As many streams as it allows: with two workers, ten connections and one that is not full.
    full = {**MULTIPLEXED, "TIDEGATE_POOL__MAX_STREAMS": "100", "TIDEGATE_LISTEN__WORKERS": "2"}
    async with hypercorn() as backend, Proxy(backend.address, settings=full) as proxy:
        await crowd(report, "hypercorn, max_streams = 100", 1000, 12, proxy, backend.address, (backend, proxy))
        async with report.check("hypercorn, max_streams = 100: no fallback, tidegate ends with 0", backend, proxy):
            expect("fallbacks", sum(SAID in line for line in proxy.lines), 0)
            expect("exit status", await proxy.stop(), 0)

    async with node() as backend, Proxy(backend.address, settings=MULTIPLEXED) as proxy, PythonClient() as client:
        await session(report, "node", client, proxy, (client, backend, proxy))
        await crowd(report, "node", 300, 300 // 64 + workers, proxy, backend.address, (backend, proxy))
        async with report.check("node: no fallback", backend, proxy):
            expect("fallbacks", sum(SAID in line for line in proxy.lines), 0)

    async with (
        Backend() as app,
        Configured("haproxy", app.address) as haproxy,
        Proxy(haproxy.address, settings=MULTIPLEXED) as proxy,
        PythonClient() as client,
    ):
        await session(report, "haproxy", client, proxy, (client, haproxy, proxy))
        await crowd(report, "haproxy", 300, 300 // 64 + workers, proxy, haproxy.address, (haproxy, proxy))
        async with report.check("haproxy: no fallback", haproxy, proxy):
            expect("fallbacks", sum(SAID in line for line in proxy.lines), 0)

    async with uvicorn() as backend, Proxy(backend.address, settings=MULTIPLEXED) as proxy, PythonClient() as client:
        await session(report, "uvicorn, which can't", client, proxy, (client, backend, proxy))
        async with report.check("uvicorn, which can't: said once", backend, proxy):
            expect("lines", sum(SAID in line for line in proxy.lines), 1)

    async with (
        Backend() as app,
        Configured("nginx", app.address) as nginx,
        Proxy(nginx.address, settings=MULTIPLEXED) as proxy,
        PythonClient() as client,
    ):
        await session(report, "nginx, which can't", client, proxy, (client, nginx, proxy))
        async with report.check("nginx, which can't: said once", nginx, proxy):
            expect("lines", sum(SAID in line for line in proxy.lines), 1)
