#!/usr/bin/env python3
"""Counts what an echo, a session and a drained session cost tidegate, and compares that with guard.toml (.ci/guard says how to use it).

    guard.py TIDEGATE COUNTING [--write]

TIDEGATE is the release build, COUNTING the same with an allocator that counts (guard.rs). Nothing is asked of the clock: instructions in
user mode are callgrind's, system calls strace's, allocations and bytes the allocator's. Each figure is the difference of two processes, or
of two moments of one, of which the second has had more to do, divided by what it had more: so a start and an end do not count. Only a
session's system calls are the fewest of many. Only the worker's thread counts, but for memory: the others work by the clock, or by what
has piled up.

Load and backend are this process. It does one thing at a time, and waits until the worker sleeps before it does the next. So the worker
finds the same events in the same order each time, however slow the machine is and whatever else it does. What is left of chance is which
of two threads comes first when one wakes the other, random keys, and where memory lies.

Not in it: TLS, HTTP/2, plain requests, shared WebSockets; what many sessions at once cost one another; what the kernel does in a call.
"""

import argparse
import base64
import contextlib
import hashlib
import os
import pathlib
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, replace

FILE = pathlib.Path(__file__).with_suffix(".toml")
# Far beyond what anything here takes on a slow machine under valgrind: for what hangs.
TIMEOUT_S = 60
# RFC 6455, 1.3.
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
KEY = base64.b64encode(b"the guard's key.").decode()
MASK = b"mask"
GOING_AWAY = (1001).to_bytes(2, "big")


def frame(opcode, payload, masked):
    length = len(payload)
    head = bytes([0x80 | opcode]) + (
        bytes([length | masked << 7]) if length < 126 else bytes([126 | masked << 7]) + length.to_bytes(2, "big")
    )
    if not masked:
        return head + payload
    return head + MASK + bytes(byte ^ MASK[index % 4] for index, byte in enumerate(payload))


def exactly(stream, length):
    got = bytearray()
    while len(got) < length:
        more = stream.recv(length - len(got))
        if not more:
            raise EOFError(f"the end after {len(got)} of {length} bytes")
        got += more
    return bytes(got)


def header(stream):
    got = b""
    while not got.endswith(b"\r\n\r\n"):
        more = stream.recv(4096)
        if not more:
            raise EOFError(f"the end in a header: {got}")
        got += more
    return got


def close_frame(stream):
    """Reads one frame, which has to be a Close, and returns its payload as it is on the wire."""
    first, second = exactly(stream, 2)
    if first != 0x88:
        raise ValueError(f"not a Close: {first:#x}")
    return exactly(stream, (second & 0x7F) + (4 if second & 0x80 else 0))


def at_once(stream, data):
    """The last bytes and the FIN, in one segment: whether two would be one event or two for the other side is chance."""
    stream.send(data, socket.MSG_MORE)
    stream.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Load:
    """What a tidegate is given to do, all of it one after the other."""

    echo_64: int = 20
    echo_16k: int = 20
    session: int = 20
    drained_session: int = 5


# What the second process of each pair has more to do: so much that the difference stands out of what is left of chance.
MORE = {"echo_64": 1000, "echo_16k": 500, "session": 100, "drained_session": 50}
# How far a figure may be above that of guard.toml. Instructions vary by less than a hundredth, under any load, but by a twentieth with what
# the compiler puts together when other code changes; with another compiler, C library or valgrind by more, which says nothing. Counts are
# whole numbers, but for the wakes of one thread by another, of which there are few.
INSTRUCTIONS, INSTRUCTIONS_ELSEWHERE = 0.08, 0.12
COUNTS = {"echo_64": 0.05, "echo_16k": 0.05, "session": 0.5, "drained_session": 0.5}
# Bytes are exact, but for what the log's thread has not written yet.
BYTES, BYTES_AT_LEAST = 0.02, 16
# Made, or not, by the channel of the log and by the allocator: which of two threads comes first is chance.
BY_CHANCE = {"futex", "sched_yield", "madvise", "mmap", "munmap"}
# The main thread tells all sessions of a drain at once. Whether the worker wakes for each of them or for all, and who writes to its
# eventfd, is chance.
BY_CHANCE_IN_DRAIN = {"epoll_wait", "epoll_pwait", "ioctl", "write"}
# Sessions of which allocations are counted: so many that what the log's thread has not written yet is little for each.
COUNTED = 400
# Of idle sessions that are there at both moments of which memory is the difference: tables that double in size do it once in between.
IDLE = (512, 1024)
# The same for all hosts: what tidegate allows depends on it. For both legs of the idle sessions.
DESCRIPTORS = 4096


# The thread whose costs are counted.
WORKER = "worker-0"
# Without what goes by the clock, and so is more on a slow machine, and with time for it. Under valgrind, which has no vDSO, a scrape of
# the admin listener would end the process. Values as in TOML.
SETTINGS = {
    "listen.workers": "1",
    "listen.backlog": "128",
    "limits.memory": '"off"',
    "drain.delay": '"0s"',
    "drain.window": '"0s"',
    "drain.timeout": '"10m"',
    "websocket.ping_interval": '"50s"',
    "close.handshake_timeout": '"10m"',
    "admin.address": '"off"',
    "reload.watch": '"0s"',
    "log.format": '"json"',
}


class Proxy:
    """A tidegate with one worker, this process being its clients and its backend. `settings` are beside SETTINGS, or instead of them."""

    def __init__(self, folder, command, settings=None, **more):
        self.backend = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.backend.settimeout(TIMEOUT_S)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = free.getsockname()
        addresses = {
            "listen.address": f'"127.0.0.1:{self.address[1]}"',
            "upstream.address": f'"127.0.0.1:{self.backend.getsockname()[1]}"',
        }
        config = folder / "proxy.toml"
        config.write_text("".join(f"{key} = {value}\n" for key, value in (SETTINGS | addresses | (settings or {})).items()))
        self.process, self.pid, self.asleep = None, None, None
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        ready.bind(str(folder / "ready"))
        ready.settimeout(1)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("TIDEGATE", "LISTEN_"))}
        with ready:
            self.process = subprocess.Popen(
                [*command, "run", "--config", config],
                env=environment | {"NOTIFY_SOCKET": str(folder / "ready")},
                stdout=subprocess.DEVNULL,
                **more,
            )
            self.pid = self.process.pid
            try:
                deadline, said = time.monotonic() + TIMEOUT_S, b""
                while b"READY=1" not in said:
                    with contextlib.suppress(TimeoutError):
                        said = ready.recv(4096)
                    if self.process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"{command[0]} did not become ready, exit code {self.process.returncode}")
                # Under strace it is strace's child.
                if children := pathlib.Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
                    self.pid = int(children[0])
                # The worker's thread is there, and has its name, when it has served somebody. valgrind knows threads by how many were
                # before them, strace by their ids.
                session = self.open()
                tasks = sorted(int(task.name) for task in pathlib.Path(f"/proc/{self.pid}/task").iterdir())
                self.threads = [pathlib.Path(f"/proc/{self.pid}/task/{task}/comm").read_text().strip() for task in tasks]
                self.worker_id = tasks[self.threads.index(WORKER)]
                self.asleep = pathlib.Path(f"/proc/{self.pid}/task/{self.worker_id}")
                self.close(session)
            except BaseException:
                self.kill()
                raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """What is still there when something went wrong."""
        self.backend.close()
        if self.process.poll() is None:
            for pid in {self.pid, self.process.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(TIMEOUT_S)

    def quiet(self):
        """Waits until the worker sleeps: what it does next then answers one event, and not two that happened to be one."""
        if not self.asleep:
            return
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            where = (self.asleep / "wchan").read_text()
            if where in ("ep_poll", "do_epoll_wait"):
                return
            # A kernel that does not say where somebody sleeps says whether.
            if where == "0" and (self.asleep / "stat").read_text().rpartition(")")[2].split()[0] == "S":
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the worker does not sleep in epoll, but in {where}")
            os.sched_yield()

    def open(self):
        client = socket.create_connection(self.address, timeout=TIMEOUT_S)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.quiet()
        client.sendall(
            f"GET /guard HTTP/1.1\r\nHost: guard\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {KEY}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        server, _ = self.backend.accept()
        server.settimeout(TIMEOUT_S)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked = header(server)
        key = re.search(rb"(?i)sec-websocket-key: *(\S+)", asked)[1].decode()
        accept = base64.b64encode(hashlib.sha1((key + GUID).encode()).digest()).decode()
        self.quiet()
        server.sendall(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
        )
        if not header(client).startswith(b"HTTP/1.1 101 "):
            raise ValueError("no 101")
        return client, server

    def echo(self, session, payload, times):
        client, server = session
        asked, answered = frame(2, payload, True), frame(2, payload, False)
        for _ in range(times):
            self.quiet()
            client.sendall(asked)
            exactly(server, len(asked))
            self.quiet()
            server.sendall(answered)
            exactly(client, len(answered))

    def close(self, session):
        client, server = session
        self.quiet()
        client.sendall(frame(8, GOING_AWAY, True))
        close_frame(server)
        self.quiet()
        at_once(server, frame(8, GOING_AWAY, False))
        close_frame(client)
        self.end(session)

    def end(self, session):
        for stream in session:
            the_end(stream)
            self.quiet()
            stream.close()

    def drain(self, sessions):
        """SIGTERM; all sides answer the Closes that come. Returns when the process has ended."""
        self.quiet()
        os.kill(self.pid, signal.SIGTERM)
        for client, server in sessions:
            close_frame(server)
            self.quiet()
            at_once(server, frame(8, GOING_AWAY, False))
            close_frame(client)
            self.quiet()
            at_once(client, frame(8, GOING_AWAY, True))
            # The last session takes the worker with it: it is not waited for any more.
            the_end(client)
            client.close()
            the_end(server)
            server.close()
        if code := self.process.wait(TIMEOUT_S):
            raise RuntimeError(f"tidegate exited with {code}")

    def serve(self, times):
        for _ in range(times):
            session = self.open()
            self.echo(session, bytes(64), 1)
            self.close(session)

    def bear(self, load):
        """All of a load, to the end of the process."""
        self.serve(load.session)
        for size, times in ((64, load.echo_64), (16384, load.echo_16k)):
            session = self.open()
            self.echo(session, bytes(size), times)
            self.close(session)
        self.drain([self.open() for _ in range(load.drained_session)])

    def idle(self, sessions, count):
        """Opens sessions until there are so many, each with an echo behind it."""
        while len(sessions) < count:
            sessions.append(self.open())
            self.echo(sessions[-1], bytes(16384), 1)
        self.quiet()


def the_end(stream):
    if more := stream.recv(1):
        raise ValueError(f"more than a Close: {more}")


def callgrind(tidegate, load, settings=None):
    """What callgrind wrote of each thread, by the thread's name; only what is done in user mode is in it."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        command = ["valgrind", "-q", "--tool=callgrind", "--separate-threads=yes", f"--callgrind-out-file={folder}/out", tidegate]
        with Proxy(folder, command, settings) as proxy:
            proxy.bear(load)
        # Threads are numbered from 1, in the order of their beginnings.
        return {name: (folder / f"out-{nth:02}").read_text() for nth, name in enumerate(proxy.threads, 1)}


def own_instructions(text):
    """Those of each function itself, by its name, of what callgrind wrote."""
    names, found, function, is_call = {}, Counter(), None, False
    for line in text.splitlines():
        if named := re.match(r"(c?)fn=\((\d+)\)(?: (.*))?$", line):
            if named[3]:
                names[named[2]] = named[3]
            function = function if named[1] else named[2]
        elif line.startswith("calls="):
            # The next line has what was called.
            is_call = True
        elif re.match(r"[\d+*-]", line):
            if not is_call:
                found[function] += int(line.split()[1])
            is_call = False
    by_name = Counter()
    for function, count in found.items():
        by_name[names[function]] += count
    return by_name


def instructions(tidegate, load, settings=None):
    """Of each thread in user mode."""
    return Counter({
        name: int(re.findall(r"^totals: (\d+)$", text, re.M)[-1]) for name, text in callgrind(tidegate, load, settings).items()
    })


def more_instructions(tidegate, kinds, settings=None):
    """Of one more of each kind, in each thread."""
    base = Load()
    without = instructions(tidegate, base, settings)
    with_more = {kind: instructions(tidegate, replace(base, **{kind: getattr(base, kind) + MORE[kind]}), settings) for kind in kinds}
    return {
        kind: {name: round((count - without[name]) / MORE[kind]) for name, count in threads.items()} for kind, threads in with_more.items()
    }


def sessions_calls(tidegate, load, settings=None):
    """The worker's system calls by name: for each session those from its accept to the next one's."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        with Proxy(folder, ["strace", "-qq", "-ff", "-e", "signal=none", "-o", f"{folder}/out", tidegate], settings) as proxy:
            proxy.bear(load)
            lines = (folder / f"out.{proxy.worker_id}").read_text().splitlines()
    sessions = []
    for line in lines:
        if re.match(r"accept4?\(.* = \d+$", line):
            sessions.append(Counter())
        name = re.match(r"(\w+)\(", line)
        if sessions and name and name[1] not in BY_CHANCE:
            sessions[-1][name[1]] += 1
    # The first is from before the load; each kind of echo has one of its own.
    if len(sessions) != 1 + load.session + 2 + load.drained_session:
        raise ValueError(f"{len(sessions)} sessions were accepted with {load}")
    return sessions


def usual_calls(sessions, load):
    """Of an echo of each size and of a session, by name, of what sessions_calls() found."""
    names = sorted(set().union(*sessions))
    # That with the fewest, since what waits at an end is looked at by the clock: on a slow machine most have some more, but never all.
    fewest = min(sessions[1:load.session + 1], key=Counter.total)
    usual = {name: fewest[name] for name in names}
    found = {}
    for kind, session in zip(("echo_64", "echo_16k"), sessions[load.session + 1:], strict=False):
        # All but the one that any session has.
        found[kind] = {name: (session[name] - usual[name]) / (getattr(load, kind) - 1) for name in names}
    return found | {"session": usual}


def in_all(calls):
    """Rounded, with their sum."""
    return {"all": round(sum(calls.values()), 1)} | {name: round(count, 1) for name, count in calls.items() if round(count, 1)}


def system_calls(tidegate):
    """Of each kind, by name."""
    base = Load()
    load = replace(base, **{kind: MORE[kind] for kind in ("echo_64", "echo_16k", "session")})
    sessions = sessions_calls(tidegate, load)
    found = usual_calls(sessions, load)
    more = sessions_calls(tidegate, replace(load, drained_session=base.drained_session + MORE["drained_session"]))
    without, with_more = sum(sessions, Counter()), sum(more, Counter())
    names = sorted(set().union(*sessions, *more) - BY_CHANCE_IN_DRAIN)
    found["drained_session"] = {name: (with_more[name] - without[name]) / MORE["drained_session"] for name in names}
    return {kind: in_all(calls) for kind, calls in found.items()}


def counted(binary):
    """Allocations of each kind, and bytes for a session."""
    allocations, held = {}, {}
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with tempfile.TemporaryDirectory() as folder, Proxy(pathlib.Path(folder), [binary], **pipes) as proxy:

        def now():
            proxy.quiet()
            proxy.process.stdin.write(b"?")
            for line in proxy.process.stderr:
                if line.startswith(b"counted "):
                    return tuple(map(int, line.split()[1:]))
            raise EOFError("the counting tidegate has ended")

        # What is made once, by the first of its kind, is not counted.
        proxy.serve(20)
        before = now()
        proxy.serve(COUNTED)
        after = now()
        allocations["session"] = (after[0] - before[0]) / COUNTED
        held["ended_session"] = (after[1] - before[1]) / COUNTED
        session = proxy.open()
        for kind, size in (("echo_64", 64), ("echo_16k", 16384)):
            proxy.echo(session, bytes(size), 20)
            before = now()
            proxy.echo(session, bytes(size), MORE[kind])
            allocations[kind] = (now()[0] - before[0]) / MORE[kind]
        proxy.close(session)
        sessions = []
        proxy.idle(sessions, IDLE[0])
        before = now()
        proxy.idle(sessions, IDLE[1])
        held["idle_session"] = (now()[1] - before[1]) / (IDLE[1] - IDLE[0])
        proxy.drain(sessions)
    return allocations, held


def resident(tidegate):
    """What an idle session makes the shipped program larger, in bytes of RSS: its allocator, and pages that are not full, are in it."""
    with tempfile.TemporaryDirectory() as folder, Proxy(pathlib.Path(folder), [tidegate]) as proxy:

        def now():
            return 1024 * int(re.search(r"^VmRSS:\s*(\d+) kB$", pathlib.Path(f"/proc/{proxy.pid}/status").read_text(), re.M)[1])

        sessions = []
        proxy.idle(sessions, IDLE[0])
        before = now()
        proxy.idle(sessions, IDLE[1])
        after = now()
        proxy.drain(sessions)
    return (after - before) / (IDLE[1] - IDLE[0])


def measured(tidegate, counting):
    allocations, held = counted(counting)
    return {
        "instructions": {kind: threads[WORKER] for kind, threads in more_instructions(tidegate, MORE).items()},
        "system_calls": system_calls(tidegate),
        "allocations": {kind: round(allocations[kind], 2) for kind in MORE if kind in allocations},
        "bytes": {kind: round(size) for kind, size in held.items()},
        "hints": {"idle_session_rss": round(resident(tidegate))},
    }


def made_with():
    def first_line(*command):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]

    return {
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "rustc": first_line("rustc", "--version"),
        "valgrind": first_line("valgrind", "--version"),
    }


def compared(was, found, same_tools):
    """Rows (verdict, what, was, is, allowed) of everything that is compared."""

    def row(what, before, now, allowed):
        verdict = "WORSE" if now > before + allowed else "better" if now < before - allowed else "ok"
        return verdict, what, before, now, allowed

    part = INSTRUCTIONS if same_tools else INSTRUCTIONS_ELSEWHERE
    for kind in MORE:
        before = was["instructions"][kind]
        yield row(f"instructions, {kind}", before, found["instructions"][kind], before * part)
    for kind, allowed in COUNTS.items():
        yield row(f"system calls, {kind}", was["system_calls"][kind]["all"], found["system_calls"][kind]["all"], allowed)
    for kind, count in found["allocations"].items():
        yield row(f"allocations, {kind}", was["allocations"][kind], count, COUNTS[kind])
    for kind, size in found["bytes"].items():
        before = was["bytes"][kind]
        yield row(f"bytes, {kind}", before, size, max(before * BYTES, BYTES_AT_LEAST))


def less_of(found, again):
    """The smaller figure of each kind."""

    def size(figure):
        return figure["all"] if isinstance(figure, dict) else figure

    return {
        section: {kind: min(figure, again[section][kind], key=size) for kind, figure in figures.items()}
        for section, figures in found.items()
    }


def number(figure):
    return f"{figure:>9,.9g}"


def written(found):
    lines = [
        "# What .ci/guard counted, and lets nobody make worse. `.ci/guard --write` renews it, in the commit that changes it and says why.",
        "# Of the only worker's thread, for each echo (a message and its answer), session (connect, upgrade, an echo of 64 B, Close",
        "# handshake), and session that a drain ends (connect, upgrade, Close handshake). Bytes are what the allocator was asked for.",
    ]
    for section, values in found.items():
        tables = {section: values} if section != "system_calls" else {f"{section}.{kind}": names for kind, names in values.items()}
        for name, table in tables.items():
            lines += ["", f"[{name}]" + (" # not compared" if section == "hints" else "")]
            lines += [f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value:.9g}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def main():
    options = argparse.ArgumentParser()
    options.add_argument("tidegate")
    options.add_argument("counting")
    options.add_argument("--write", action="store_true", help="renew guard.toml instead of comparing with it")
    options = options.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        sys.exit(f"this takes {DESCRIPTORS} descriptors, and {hard} are allowed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))

    tools = made_with()
    if options.write:
        FILE.write_text(written({"made_with": tools} | measured(options.tidegate, options.counting)))
        print(f"written: {FILE}")
        return 0

    was = tomllib.loads(FILE.read_text())
    if was["made_with"]["machine"] != tools["machine"]:
        print(f"nothing is compared: {FILE.name} was made on {was['made_with']['machine']}, and this is {tools['machine']}")
        return 0
    other = [f"{was['made_with'][name]} then, {now} now" for name, now in tools.items() if was["made_with"][name] != now]
    found = measured(options.tidegate, options.counting)
    if any(verdict == "WORSE" for verdict, *_ in compared(was, found, not other)):
        # What is really worse is so twice.
        found = less_of(found, measured(options.tidegate, options.counting))
    rows = list(compared(was, found, not other))
    for verdict, what, before, now, allowed in rows:
        change = f"{100 * (now / before - 1):+.1f} %" if before else f"{now - before:+g}"
        print(f"{verdict:<6} {what:<31} was {number(before)}   is {number(now)}   {change:>8}   allowed +{allowed:,.6g}")
        kind = what.removeprefix("system calls, ")
        if verdict != "ok" and kind != what:
            before, now = was["system_calls"][kind], found["system_calls"][kind]
            names = [name for name in sorted(before | now) if name != "all" and before.get(name) != now.get(name)]
            print(f"       {', '.join(f'{name} {before.get(name, 0):g} -> {now.get(name, 0):g}' for name in names)}")
    rss = "idle_session_rss"
    print(f"       RSS of an idle session (a hint) was {number(was['hints'][rss])}   is {number(found['hints'][rss])}")
    verdicts = {verdict for verdict, *_ in rows}
    if other:
        print(f"{INSTRUCTIONS_ELSEWHERE * 100:.0f} % more instructions are allowed, since the tools are others: {'; '.join(other)}.")
    if "WORSE" in verdicts:
        print("\nWorse than .ci/guard.toml says. If that is the price of the change: `.ci/guard --write`, and say so in the commit.")
        return 1
    if "better" in verdicts:
        print("\nBetter than .ci/guard.toml says: `.ci/guard --write` in the same commit, so that it stays so.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
