"""Clients that take their time: drippers, slowhttptest's four, and one very long header; and what others notice of them.

`interop/run slow` is a sample with a short `http.header_timeout`, in which only events and counts are asserted. `interop/slow` is for a machine with
nothing else to do: full numbers, the default deadline, slowhttptest (from apt), and figures of time, CPU and memory with their bounds.
"""

import argparse
import asyncio
import contextlib
import csv
import json
import resource
import ssl
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from handshakes import handshake
from harness import INTEROP, WORK, Failed, Process, Proxy, Report, expect, json_line, run
from tls import Authority
from wire import Client

# All of them are cut when a header has to be whole; bodies have another rule, see `bodies`.
PLAIN = ["line", "header", "websocket", "second", "empty lines", "silent"]
# The bytes of a ClientHello, and headers within TLS.
SECURE = ["hello", "tls line", "hello", "tls header", "hello", "tls websocket", "hello", "silent"]
# Beyond the deadline, for whoever cuts and whoever notices; and on a machine that has other things to do.
GRACE_SECONDS = 1.0
BUSY_GRACE_SECONDS = 6.0
P99_MS = 50.0
HEADER_BYTES = 20_000_000
HEADER_CPU_MS = 50.0
HEADER_RSS_BYTES = 1024 * 1024


class Plain(Process):
    """peers/plain.py"""

    def __init__(self) -> None:
        super().__init__("backend")
        self.address = ""

    async def __aenter__(self):
        await self.start(sys.executable, INTEROP / "peers" / "plain.py")
        self.address = (await self.ready(json_line(), "its address"))["address"]
        return self

    async def __aexit__(self, *_) -> None:
        await self.stop()


class Slow(Process):
    """peers/drip.py"""

    def __init__(self, **plan: object) -> None:
        super().__init__("drippers")
        self._plan = plan

    async def __aenter__(self):
        await self.start(sys.executable, INTEROP / "peers" / "drip.py", json.dumps(self._plan))
        return self

    async def __aexit__(self, *_) -> None:
        await self.stop()


class Handshakes:
    """A client that opens one WebSocket after the other, and how long each took."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None, interval: float = 0.01) -> None:
        self._address, self._tls, self._interval = address, tls, interval
        self.seconds: list[float] = []
        self.failed: list[str] = []

    async def _go(self) -> None:
        while True:
            start = time.perf_counter()
            try:
                client = await Client.open(self._address, self._tls)
                client.send(handshake("/101/1").encode())
                status = (await client.response()).status
                if status != 101:
                    self.failed.append(str(status))
                self.seconds.append(time.perf_counter() - start)
                client.close()
            except Exception as error:  # Whatever it is: somebody could not connect.
                self.failed.append(repr(error))
            await asyncio.sleep(self._interval)

    async def __aenter__(self):
        self._task = asyncio.create_task(self._go())
        return self

    async def __aexit__(self, *_) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def figures(self) -> tuple[float, float, float]:
        """p50, p99 and the longest, in milliseconds."""
        times = sorted(self.seconds)
        return tuple(1000 * times[min(len(times) - 1, int(len(times) * part))] for part in (0.5, 0.99, 1.0))


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.ca))


def cpu_ms(pid: int) -> float:
    """Of all threads, by the scheduler's own count: /proc/PID/stat has steps of 10 ms."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def cut(
    report: Report,
    what: str,
    proxy: Proxy,
    kinds: list[str],
    count: int,
    deadline: float,
    tls: ssl.SSLContext | None = None,
    strict: bool = False,
) -> None:
    """So many drippers: all cut by their deadline, and none before it; others go on, and nothing is left of them."""
    pid = proxy.pid
    before = descriptors(pid)
    plan = {"address": proxy.address, "count": count, "kinds": kinds, "interval": 1.0, "seconds": deadline + 15}
    async with report.check(f"{what}: {count:,} drippers are cut at {deadline:g} s", proxy, seconds=deadline + 60):
        async with Slow(**plan) as slow:
            await slow.wait_for_line(json_line(event="dripping"), "the last of them", 60)
            most = resident(pid)
            async with Handshakes(proxy.address, tls) as others:
                ends = (await slow.wait_for_line(json_line(event="dripped"), "their ends", deadline + 40))["ends"]
        times = [end[1] for end in ends]
        hows = Counter(end[2] for end in ends)
        said = Counter(end[4].split("\r\n")[0][:40] for end in ends)
        print(
            f"     cut after {min(times):.2f} to {max(times):.2f} s: {dict(hows)}, having sent {sum(e[3] for e in ends):,} bytes; they got {dict(said)};"
            f" {most / count / 1024:.1f} KiB each at most (RSS as a whole)"
        )
        p50, p99, longest = others.figures()
        print(
            f"     meanwhile {len(others.seconds)} handshakes of another client: p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {longest:.1f} ms"
        )
        expect("ends", set(hows), {"fin"})
        grace = GRACE_SECONDS if strict else BUSY_GRACE_SECONDS
        if max(times) > deadline + grace:
            late = Counter(end[0] for end in ends if end[1] > deadline + grace)
            raise Failed(f"cut after {max(times):.2f} s: {dict(late)}")
        # They did drip: a byte a second until then, but for those that say nothing.
        idle = [end for end in ends if end[0] != "silent" and end[1] < deadline - 0.5]
        expect("cut before their time", idle[:5], [])
        expect("handshakes that failed", others.failed, [])
        if len(others.seconds) < 10:
            raise Failed(f"only {len(others.seconds)} handshakes")
        if strict and p99 >= P99_MS:
            raise Failed(f"p99 {p99:.1f} ms")
    async with report.check(f"{what}: nothing is left of them", proxy):
        # Whoever connected last may still be let go of.
        while descriptors(pid) > before + 2:
            await asyncio.sleep(0.1)


async def late(report: Report, proxy: Proxy, deadline: float) -> None:
    """Whose first byte comes late has as long again from there (proxy.toml says so): twice the deadline at most."""
    plan = {
        "address": proxy.address,
        "count": 20,
        "kinds": ["line", "header"],
        "interval": 1.0,
        "seconds": deadline * 3,
        "late": deadline * 0.8,
    }
    async with report.check("slow: a first byte that comes late", proxy, seconds=deadline + 45):
        async with Slow(**plan) as slow:
            ends = (await slow.wait_for_line(json_line(event="dripped"), "their ends", deadline + 30))["ends"]
        expect("ends", {end[2] for end in ends}, {"fin"})
        of = {kind: max(end[1] for end in ends if end[0] == kind) for kind in plan["kinds"]}
        print(f"     first byte at once: cut after {of['header']:.2f} s; after {plan['late']:g} s: {of['line']:.2f} s")
        if of["header"] > deadline + BUSY_GRACE_SECONDS or of["line"] > 2 * deadline + BUSY_GRACE_SECONDS:
            raise Failed(f"cut after {of}")


async def long_header(report: Report, proxy: Proxy, strict: bool) -> None:
    """CVE-2023-43669: a header that is searched anew with each byte."""
    what = f"a header of {HEADER_BYTES // 1_000_000} MB, byte by byte"
    pid = proxy.pid
    cpu, memory = cpu_ms(pid), resident(pid)
    most = memory

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, resident(pid))
            await asyncio.sleep(0.01)

    looking = asyncio.create_task(look())
    async with Slow(address=proxy.address, header=HEADER_BYTES) as slow:
        async with report.check(f"{what}: 431 as soon as it is too long", proxy, seconds=60):
            answered = await slow.wait_for_line(json_line(event="answered"), "an answer", 50)
            used = cpu_ms(pid) - cpu
            print(f"     an answer after {answered['sent']:,} bytes, {used:.1f} ms of CPU")
            if answered["sent"] > 2 * 32 * 1024:
                raise Failed(f"{answered['sent']} bytes")
            if strict and used >= HEADER_CPU_MS:
                raise Failed(f"{used:.1f} ms of CPU")
        async with report.check(f"{what}: cut", proxy, seconds=60):
            cpu = cpu_ms(pid)
            slow.write("go on")
            end = await slow.wait_for_line(json_line(event="header"), "its end", 50)
            after, grown = cpu_ms(pid) - cpu, most - memory
            print(
                f"     cut after {end['sent']:,} bytes and {end['seconds']:.1f} s; {after:.1f} ms of CPU behind the answer; {grown / 1024:.0f} KiB more in memory"
            )
            if "431" not in end["got"]:
                raise Failed(f"{end['got']!r}")
            # A refused client is read for a second, so that its answer is not lost by a RST.
            if strict and after >= HEADER_CPU_MS:
                raise Failed(f"{after:.1f} ms of CPU behind the answer")
            if strict and grown >= HEADER_RSS_BYTES:
                raise Failed(f"{grown:,} bytes")
    looking.cancel()


async def secured(stack: contextlib.AsyncExitStack) -> tuple[dict[str, str], ssl.SSLContext]:
    """Settings for TLS from clients, and a client's that believes in it."""
    WORK.mkdir(exist_ok=True)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slow-", dir=WORK)))
    authority = await Authority(folder / "ours").make()
    settings = {
        "TIDEGATE_LISTEN__TLS_CERTIFICATE": str(authority.certificate),
        "TIDEGATE_LISTEN__TLS_KEY": str(authority.key),
    }
    return settings, trusting(authority)


async def slow(report: Report, options) -> None:
    if options.direct:
        print("skip slow: it is tidegate's work")
        return
    deadline = 3
    async with contextlib.AsyncExitStack() as stack:
        settings, tls = await secured(stack)
        main = await stack.enter_async_context(Plain())
        short = {"TIDEGATE_HTTP__HEADER_TIMEOUT": f"{deadline}s"}
        plain = await stack.enter_async_context(Proxy(main.address, settings=short))
        secure = await stack.enter_async_context(Proxy(main.address, settings={**short, **settings}))
        await asyncio.gather(
            cut(report, "slow", plain, PLAIN, 100, deadline),
            cut(report, "slow, TLS", secure, SECURE, 100, deadline, tls),
            late(report, plain, deadline),
        )


# What it does, its options, and how old one of its connections may get. Who reads slowly has its kernel's and ours to read from when tidegate
# has let it go, and sees our FIN only behind that: None, and tidegate is asked how many it still has.
SLOWHTTPTEST = {
    "-H": ("slow headers", ["-i", "1", "-x", "10"], 11),
    "-B": ("slow bodies", ["-i", "1", "-s", "8192", "-x", "10"], 11),
    "-R": ("ranges", ["-a", "10", "-b", "3000"], 11),
    "-X": ("slow reading", ["-w", "10", "-y", "20", "-n", "2", "-z", "32", "-k", "1"], None),
}
SLOWHTTPTEST_CONNECTIONS = 1000
# In a second.
SLOWHTTPTEST_RATE = 500
SLOWHTTPTEST_SECONDS = 25


async def slowhttptest(report: Report, upstream: str, strict: bool) -> None:
    for flag, (what, more, most_seconds) in SLOWHTTPTEST.items():
        name = f"slowhttptest {flag}, {what}: others go on"
        # A process for each: what one has left behind is not the next one's.
        async with (
            Proxy(upstream) as proxy,
            report.check(name, seconds=SLOWHTTPTEST_SECONDS + 60),
        ):
            pid, before = proxy.pid, resident(proxy.pid)
            with tempfile.TemporaryDirectory(prefix="slowhttptest-", dir=WORK) as folder:
                tool = Process("slowhttptest")
                path = "/large" if flag == "-X" else "/"
                command = [
                    "slowhttptest",
                    flag,
                    "-c",
                    SLOWHTTPTEST_CONNECTIONS,
                    "-r",
                    SLOWHTTPTEST_RATE,
                    "-l",
                    SLOWHTTPTEST_SECONDS,
                    "-p",
                    3,
                    "-g",
                    "-o",
                    f"{folder}/s",
                ]
                cpu, most, start = cpu_ms(pid), before, time.monotonic()
                async with Handshakes(proxy.address) as others:
                    await tool.start(*command, *more, "-u", f"http://{proxy.address}{path}")
                    # Those that tidegate had at once at most, when the last of them came, and when it was rid of them. The others' are sessions,
                    # or about to be.
                    had, full, rid = 0, start, None
                    while tool.is_running and time.monotonic() < start + SLOWHTTPTEST_SECONDS + 20:
                        most = max(most, resident(pid))
                        await asyncio.sleep(0.1)
                        if most_seconds is None and rid is None:
                            status = json.loads(await proxy.command("status", "--format", "json"))
                            held = status["connections"] - status["sessions"]
                            if held > had:
                                had, full = held, time.monotonic()
                            elif had >= SLOWHTTPTEST_CONNECTIONS and held < SLOWHTTPTEST_CONNECTIONS / 50:
                                rid = time.monotonic() - full
                    took = time.monotonic() - start
                    # What follows an attack that is over soon counts as well.
                    await asyncio.sleep(max(0.0, 10 - took))
                await tool.stop()
                lines = Path(folder, "s.csv").read_text().splitlines()
                rows = [{key: value for key, value in row.items() if key} for row in csv.DictReader(lines)]
            over = next((line for line in tool.lines if "exit status" in line.lower()), "").rpartition("m")[2].strip()
            p50, p99, longest = others.figures()
            print(f"     it ended after {took:.1f} s ({over}); last it said {rows[-1]}")
            print(
                f"     meanwhile {len(others.seconds)} handshakes: p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {longest:.1f} ms;"
                f" {cpu_ms(pid) - cpu:.0f} ms of CPU, {(most - before) / 1024 / 1024:.1f} MiB more in memory"
            )
            expect("handshakes that failed", others.failed, [])
            if strict and p99 >= P99_MS:
                raise Failed(f"p99 {p99:.1f} ms")
            if most_seconds is None:
                print(f"     tidegate had {had} of them, and was rid of them {rid and round(rid, 1)} s after the last came")
                if rid is None or rid > 11:
                    raise Failed("tidegate has them for longer than 11 s")
                continue
            # A row for each second: whoever was there so long ago must be gone.
            there = {int(row["Seconds"]): int(row["Connected"]) + int(row["Closed"]) for row in rows}
            late = [row for row in rows if int(row["Closed"]) < there.get(int(row["Seconds"]) - most_seconds, 0)]
            if late or "No open connections" not in over:
                raise Failed(f"older than {most_seconds} s: {late[:2]}, {over}")


async def bodies(report: Report, proxy: Proxy, deadline: float) -> None:
    """Bodies that drip: printed, and not asserted. `http.header_timeout` is for one that stands still."""
    async with Slow(
        address=proxy.address, count=200, kinds=["body", "chunked"], interval=1.0, seconds=deadline * 2
    ) as slow:
        ends = (await slow.wait_for_line(json_line(event="dripped"), "their ends", deadline * 3))["ends"]
    print(f"     200 bodies that drip, after {deadline * 2:g} s: {dict(Counter(end[2] for end in ends))}")


async def main() -> int:
    arguments = argparse.ArgumentParser(prog="interop/slow", description=__doc__.splitlines()[0])
    arguments.add_argument(
        "--drippers", type=int, default=1000, help="on each of the two listeners, with and without TLS (1000)"
    )
    arguments.add_argument(
        "--lenient", action="store_true", help="print figures of time, CPU and memory, and pass whatever they are"
    )
    options = arguments.parse_args()
    strict, deadline = not options.lenient, 10
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    report = Report()
    async with contextlib.AsyncExitStack() as stack:
        settings, tls = await secured(stack)
        upstream = await stack.enter_async_context(Plain())
        plain = await stack.enter_async_context(Proxy(upstream.address))
        await long_header(report, plain, strict)
        secure = await stack.enter_async_context(Proxy(upstream.address, settings=settings))
        await asyncio.gather(
            cut(report, "drippers", plain, PLAIN, options.drippers, deadline, strict=strict),
            cut(report, "drippers, TLS", secure, SECURE, options.drippers, deadline, tls, strict),
        )
        await bodies(report, plain, deadline)
        await slowhttptest(report, upstream.address, strict)
    return report.summary()


if __name__ == "__main__":
    sys.exit(run(main()))
