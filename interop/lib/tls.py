"""TLS between tidegate and backends that nobody wrote for it, with certificates made for this run.

Of the protocols above it as much as shows that the bytes arrive and that sessions end as they do without TLS; `multiplexed` and the
groups of the clients have the rest. Clients don't speak TLS here: it is for the backend's side, and `endings-tls` for theirs.
"""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

from clients import PythonClient
from everybody import everybody, expect_everywhere
from harness import INTEROP, WORK, Failed, Proxy, Report, expect, json_line
from multiplexed import MULTIPLEXED, SAID, Peer, crowd, session

# What the certificates are for, beside 127.0.0.1.
NAME = "backend.interop"


class Authority:
    """One that signs: its certificate, and one for a backend with its key, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.ca, self.key, self.certificate = (folder / name for name in ("ca.pem", "key.pem", "certificate.pem"))
        self._ca_key = folder / "ca-key.pem"

    async def make(self) -> "Authority":
        self.ca.parent.mkdir()
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        await openssl(
            "req", "-x509", *curve, "-keyout", self._ca_key, "-out", self.ca, "-subj", "/CN=interop",
            "-addext", "keyUsage=critical,keyCertSign",
        )  # fmt: skip
        await openssl(
            "req", "-x509", *curve, "-keyout", self.key, "-out", self.certificate, "-subj", f"/CN={NAME}",
            "-CA", self.ca, "-CAkey", self._ca_key, "-addext", f"subjectAltName=IP:127.0.0.1,DNS:{NAME}",
            "-addext", "basicConstraints=critical,CA:FALSE",
        )  # fmt: skip
        return self

    def settings(self, **more: str) -> dict[str, str]:
        return {"TIDEGATE_UPSTREAM__TLS": "true", "TIDEGATE_UPSTREAM__TLS_CA": str(self.ca), **more}

    def node(self, kind: str) -> Peer:
        return Peer(f"node {kind}", "node", INTEROP / "peers" / "tls.mjs", kind, self.key, self.certificate)

    def hypercorn(self) -> Peer:
        asgi = INTEROP / "peers" / "asgi.py"
        return Peer("hypercorn", sys.executable, asgi, "hypercorn", self.key, self.certificate)


async def openssl(*arguments: object) -> None:
    child = await asyncio.create_subprocess_exec(
        "openssl", *map(str, arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    printed, _ = await child.communicate()
    if child.returncode != 0:
        raise Failed(f"openssl {arguments[0]}: {printed.decode(errors='replace')}")


async def one_session(report: Report, what: str, version: str, client, backend: Peer, proxy: Proxy) -> None:
    """Also closed by the backend, and over the HTTP that was meant."""
    witnesses = (client, backend, proxy)
    await session(report, what, client, proxy, witnesses)
    async with report.check(f"{what}: over HTTP/{version}, closed by the backend", *witnesses):
        expect("version", (await backend.wait_for_line(json_line(event="open", name="main"), "open"))["version"], version)
        await client.open("second", f"ws://{proxy.address}/echo?name=second")
        await client.send("second", "!close 4001 had_enough")
        end = await client.closed("second")
        expect("the end", (end["code"], end["reason"], end["clean"]), (4001, "had_enough", True))


async def drained(report: Report, what: str, backend: Peer, proxy: Proxy) -> None:
    """SIGTERM of tidegate, with every client on it: 1001 for both sides, and an orderly end of TLS below."""
    async with everybody(report, proxy, backend, what) as clients:
        proxy.kill(signal.SIGTERM)
        await expect_everywhere(report, clients, (backend, proxy), what, 1001)
        for flavour in clients:
            async with report.check(f"{what}: the backend sees {flavour} close with 1001", backend, proxy):
                seen = await backend.wait_for_line(json_line(event="close", name=flavour), f"close of {flavour!r}", 15)
                expect("(code, reset)", (seen["code"], seen["reset"]), (1001, False))
        async with report.check(f"{what}: exit status 0", proxy):
            expect("exit status", await proxy.ended(), 0)


def fallbacks(proxy: Proxy) -> int:
    return sum(SAID in line for line in proxy.lines)


async def tls(report: Report, options) -> None:
    if options.direct:
        print("skip tls: it is tidegate's work")
        return
    workers = min(max(2, os.cpu_count() or 2), 4)
    WORK.mkdir(exist_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tls-", dir=WORK)))
        authority, stranger = await asyncio.gather(*(Authority(folder / name).make() for name in ("ours", "other")))
        client = await stack.enter_async_context(PythonClient())

        async with authority.node("https") as backend:
            async with Proxy(backend.address, settings=authority.settings(TIDEGATE_POOL__PREWARM="2")) as proxy:
                await one_session(report, "tls, https and ws", "1.1", client, backend, proxy)
                await drained(report, "tls, https and ws: SIGTERM", backend, proxy)
            for mode in ("dedicated", "multiplexed"):
                settings = {**MULTIPLEXED, **stranger.settings(TIDEGATE_POOL__MODE=mode)}
                async with (
                    Proxy(backend.address, settings=settings) as proxy,
                    report.check(f"tls, {mode}: whom nobody vouches for gets nothing, and the log says what to do", proxy),
                ):
                    expect("status", await client.status(f"ws://{proxy.address}/echo?name=nobody"), 502)
                    line = await proxy.wait_for_line(json_line(message="request failed"), '"request failed"')
                    if "upstream.tls_ca" not in line["error"]:
                        raise Failed(f"no way out: {line}")
                    expect("sessions at the backend", [l for l in backend.lines if '"nobody"' in l], [])
            async with Proxy(backend.address, settings={**MULTIPLEXED, **authority.settings()}) as proxy:
                async with report.check("tls, https and ws, which can't share: nobody notices, said once", backend, proxy):
                    for name in ("first", "second"):
                        await client.open(name, f"ws://{proxy.address}/echo?name={name}")
                        expect("echo", (await client.echo(name, text="hello"))["same"], True)
                    expect("lines", fallbacks(proxy), 1)

        shared = {**MULTIPLEXED, **authority.settings(TIDEGATE_UPSTREAM__TLS_SERVER_NAME=NAME)}
        async with authority.node("http2") as backend:
            async with Proxy(backend.address, settings=shared) as proxy:
                await one_session(report, "tls, http2 and ws", "2", client, backend, proxy)
                most = 200 // 64 + workers
                await crowd(report, "tls, http2 and ws", 200, most, proxy, backend.address, (backend, proxy))
                await drained(report, "tls, http2 and ws: SIGTERM", backend, proxy)
                async with report.check("tls, http2 and ws: no fallback", backend, proxy):
                    expect("fallbacks", fallbacks(proxy), 0)
        # Asked for HTTP/1.1 alone, the same port has that.
        async with authority.node("http2") as backend, Proxy(backend.address, settings=authority.settings()) as proxy:
            await one_session(report, "tls, http2 and ws, dedicated", "1.1", client, backend, proxy)

        async with authority.hypercorn() as backend, Proxy(backend.address, settings=shared) as proxy:
            await one_session(report, "tls, hypercorn", "2", client, backend, proxy)
            await crowd(report, "tls, hypercorn", 200, 200 // 64 + workers, proxy, backend.address, (backend, proxy))
            async with report.check("tls, hypercorn: no fallback, tidegate ends with 0", backend, proxy):
                expect("fallbacks", fallbacks(proxy), 0)
                expect("exit status", await proxy.stop(), 0)
