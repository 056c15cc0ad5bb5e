"""Processes and checks: starts backends, proxies and clients, bounds every wait, and ends only what it started, by pid.

What is deliberately not here: any knowledge of WebSockets.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

INTEROP = Path(__file__).resolve().parent.parent
REPOSITORY = INTEROP.parent
WORK = INTEROP / ".work"

CHECK_SECONDS = 30
START_SECONDS = 30
STOP_SECONDS = 15


class Failed(Exception):
    """A peer saw something else than it ought to."""


def expect(what: str, seen: object, wanted: object) -> None:
    if seen != wanted:
        raise Failed(f"{what}: {seen!r}, not {wanted!r}")


def run(main: Coroutine[object, object, int]) -> int:
    """asyncio.run, with SIGTERM treated as Ctrl-C is: whatever was started is ended on the way out."""

    async def cancellable() -> int:
        task = asyncio.ensure_future(main)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        return asyncio.run(cancellable())
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


class Process:
    """A child whose output is read as it comes, so that it never blocks on a full pipe and is there for a report."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: list[str] = []
        self._child: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task] = []
        self._news = asyncio.Condition()
        self._open_pipes = 0

    async def start(self, *command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        self._child = await asyncio.create_subprocess_exec(
            *map(str, command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
            cwd=cwd,
            limit=16 * 1024 * 1024,
            # A Ctrl-C at the terminal is the runner's to deal with: it ends its children in order.
            start_new_session=True,
        )
        self._open_pipes = 2
        self._readers = [asyncio.create_task(self._read(stream)) for stream in (self._child.stdout, self._child.stderr)]

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            await self._take(line.decode(errors="replace").rstrip("\n"))
        async with self._news:
            self._open_pipes -= 1
            self._news.notify_all()

    async def _take(self, line: str) -> None:
        async with self._news:
            self.lines.append(line)
            self._news.notify_all()

    async def wait_for_line(self, matches: Callable[[str], object], what: str, seconds: float = START_SECONDS):
        """The first truthy answer of `matches` to a line, those already printed included."""
        seen = 0
        try:
            async with asyncio.timeout(seconds), self._news:
                while True:
                    for line in self.lines[seen:]:
                        if found := matches(line):
                            return found
                    seen = len(self.lines)
                    if self._open_pipes == 0:
                        raise Failed(f"{self.name} ended without {what}")
                    await self._news.wait()
        except TimeoutError:
            raise Failed(f"{self.name}: no {what} within {seconds} s") from None

    async def ready(self, matches: Callable[[str], object], what: str, seconds: float = START_SECONDS):
        """As wait_for_line, right after the start: what does not get ready is not left running, and its log is told."""
        try:
            return await self.wait_for_line(matches, what, seconds)
        except Failed as error:
            await self.stop()
            raise Failed("\n     ".join([str(error), *self.lines[-40:]])) from None
        except BaseException:
            await self.stop()
            raise

    def write(self, line: str) -> None:
        self._child.stdin.write(line.encode() + b"\n")

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def is_running(self) -> bool:
        return self._child.returncode is None

    def kill(self, number: signal.Signals) -> None:
        if self._child.returncode is None:
            self._child.send_signal(number)

    async def ended(self, seconds: float = STOP_SECONDS) -> int:
        """The exit status; negative: the signal that killed it."""
        try:
            async with asyncio.timeout(seconds):
                return await self._child.wait()
        except TimeoutError:
            raise Failed(f"{self.name} did not end within {seconds} s") from None

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Asks, waits, and kills if need be. None: it had to be killed."""
        if self._child is None:
            return None
        status = None
        self.kill(number)
        try:
            status = await self.ended()
        except Failed:
            self.kill(signal.SIGKILL)
            await self._child.wait()
        # A grandchild (Chromium's) may hold the pipes for a moment longer.
        if self._readers:
            await asyncio.wait(self._readers, timeout=5)
            for reader in self._readers:
                reader.cancel()
        return status


def json_line(**wanted: object) -> Callable[[str], dict | None]:
    """Matches a JSON object with these fields; tracing's JSON may keep an event's fields under "fields"."""

    def matches(line: str) -> dict | None:
        try:
            found = json.loads(line)
        except ValueError:
            return None
        if not isinstance(found, dict):
            return None
        found = {**found, **(found.get("fields") or {})}
        return found if all(found.get(key) == value for key, value in wanted.items()) else None

    return matches


class Backend(Process):
    """peers/echo.py"""

    def __init__(self) -> None:
        super().__init__("backend")
        self.address = ""

    async def __aenter__(self):
        await self.start(sys.executable, INTEROP / "peers" / "echo.py")
        self.address = (await self.ready(json_line(event="listening"), "its address"))["address"]
        return self

    async def __aexit__(self, *_) -> None:
        await self.stop()

    async def event(self, event: str, name: str) -> dict:
        """What the backend saw of the connection with this name."""
        return await self.wait_for_line(json_line(event=event, name=name), f"{event} of {name!r}", 15)


class Tomcat(Process):
    """Tomcat with its WebSocket examples, with a base directory of its own."""

    def __init__(self) -> None:
        super().__init__("tomcat")
        self.address = ""

    async def __aenter__(self):
        self._base = tempfile.TemporaryDirectory(prefix="tomcat-", dir=WORK, ignore_cleanup_errors=True)
        await self.start(INTEROP / "tomcat" / "start", self._base.name)

        def port(line: str) -> str | None:
            found = re.search(r'Starting ProtocolHandler \["http-nio-127\.0\.0\.1-auto-\d+-(\d+)"\]', line)
            return found and found.group(1)

        self.address = "127.0.0.1:" + await self.ready(port, "its port", 90)
        return self

    async def __aexit__(self, *_) -> None:
        await self.stop()
        self._base.cleanup()


class Proxy(Process):
    """A tidegate process; or nothing at all (`direct`), to tell a fault of the proxy from one of the peers."""

    def __init__(
        self,
        upstream: str | None,
        direct: bool = False,
        settings: dict[str, str] | None = None,
        config: Path | None = None,
    ) -> None:
        super().__init__("tidegate")
        self._settings = settings or {}
        self._config = config
        self.address = upstream or ""
        self.direct = direct
        self._upstream = upstream
        self._is_secure = "TIDEGATE_LISTEN__TLS_CERTIFICATE" in self._settings

    def url(self, path: str, scheme: str = "ws") -> str:
        """As its clients have to write it."""
        return f"{scheme}{'s' if self._is_secure else ''}://{self.address}{path}"

    @staticmethod
    def binary() -> Path:
        binary = Path(os.environ.get("TIDEGATE", REPOSITORY / "target" / "release" / "tidegate"))
        if not binary.exists():
            raise Failed(f"{os.path.relpath(binary)} is not there: build it, or set TIDEGATE")
        return binary.resolve()

    async def __aenter__(self):
        if self.direct:
            return self
        binary = self.binary()
        env = {key: value for key, value in os.environ.items() if key != "TIDEGATE"}
        env |= {
            "TIDEGATE_ADMIN__ADDRESS": "127.0.0.1:0",
            "TIDEGATE_DRAIN__DELAY": "0ms",
            "TIDEGATE_DRAIN__WINDOW": "1s",
            "TIDEGATE_LOG__FORMAT": "json",
            **self._settings,
        }
        if self._upstream is None:
            command, env["TIDEGATE_LISTEN__ADDRESS"] = ["demo"], "127.0.0.1:0"
        else:
            command = ["run", "--listen", "127.0.0.1:0", "--upstream", self._upstream]
            if self._config:
                command += ["--config", self._config]
        WORK.mkdir(exist_ok=True)
        # Started where no proxy.toml lies about.
        await self.start(binary, *command, env=env, cwd=WORK)
        self.address = (await self.ready(json_line(message="listening"), '"listening"'))["address"]
        return self

    async def admin(self) -> str:
        """Where its admin listener is."""
        return (await self.wait_for_line(json_line(message="admin listening"), '"admin listening"'))["address"]

    async def command(self, *arguments: str) -> str:
        """What a subcommand that asks this process by way of its admin listener prints."""
        admin = await self.admin()
        child = await asyncio.create_subprocess_exec(
            self.binary(), *arguments, "--admin", admin, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        printed, complaint = await child.communicate()
        if child.returncode != 0:
            raise Failed(f"{' '.join(arguments)}: status {child.returncode}, {complaint.decode(errors='replace')}")
        return printed.decode()

    async def __aexit__(self, *_) -> None:
        await self.stop()


class Report:
    """Counts, prints, and on a failure says everything that is known."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed = 0
        # How much of what a witness said has been printed already, so that no log is printed twice.
        self._printed: dict[int, int] = {}

    @contextlib.asynccontextmanager
    async def check(self, name: str, *witnesses: object, seconds: float = CHECK_SECONDS):
        """One check. Witnesses are processes and clients; at a failure the news of what they said is printed."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                yield
        except Exception as error:
            self.failed += 1
            shown = f"not done within {seconds} s" if isinstance(error, TimeoutError) else error
            print(f"FAIL {name}: {shown if str(shown) else repr(error)}")
            if not isinstance(error, (Failed, TimeoutError)):
                print(f"     ({type(error).__name__})")
            for witness in witnesses:
                news = witness.lines[self._printed.get(id(witness), 0) :]
                self._printed[id(witness)] = len(witness.lines)
                # The first lines tell the settings, the last ones the end.
                if len(news) > 80:
                    news[20:-60] = [f"({len(news) - 80} lines left out)"]
                for line in news or ["(nothing new)"]:
                    print(f"     {witness.name}: {line[:400]}")
        else:
            self.passed += 1
            print(f"ok   {name} ({time.monotonic() - start:.2f} s)")
        sys.stdout.flush()

    def summary(self) -> int:
        print(f"{self.passed} passed, {self.failed} failed")
        return 0 if self.failed == 0 and self.passed > 0 else 1
