"""WebSocket handshakes of which no tunnel may come: bad ones at a backend that answers anything, good ones that are answered wrongly, and what a
client sends behind its handshake before the answer is there.

Behind each handshake comes a request for /canary/, as it is and within a frame, and both again behind the answer: in a tunnel they would arrive.
tests/it/handshake.rs has what clients are told, and how connections end; here it counts what got through, at tidegate and others alike.
"""

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from fronts import Tidegate, front
from harness import Failed, Report, expect
from vectors import KEY
from wire import Client, Ended, Message, Recorder, head_of, plain_answer

STATUSES = (101, 200, 204, 301, 400, 403, 426, 500)
PIPELINED = 10_000
AT_ONCE = 16
# To what may still come once there was an answer. Nothing that should come depends on it.
QUIET_SECONDS = 0.1

Edit = Callable[[str], str]


def accept(key: bytes) -> str:
    return base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()).decode()


def handshake(target: str) -> str:
    fields = (
        "Host: probe.test",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
    )
    return "\r\n".join([f"GET {target} HTTP/1.1", *fields, "", ""])


def put(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        if old not in text:
            raise ValueError(old)
        return text.replace(old, new, 1)

    return edit


def method(name: str) -> Edit:
    return put("GET ", f"{name} ")


def also(*lines: str, body: str = "") -> Edit:
    return lambda text: text.removesuffix("\r\n") + "".join(f"{line}\r\n" for line in lines) + "\r\n" + body


def field(name: str, value: str | None) -> Edit:
    return lambda text: re.sub(rf"\r\n{name}: [^\r]*", "" if value is None else f"\r\n{name}: {value}", text, count=1)


UPGRADE, CONNECTION, WS_KEY, WS_VERSION = "Upgrade", "Connection", "Sec-WebSocket-Key", "Sec-WebSocket-Version"
CHUNKS = "5\r\nhello\r\n0\r\n\r\n"

# By what is wrong with them.
BAD: dict[str, dict[str, Edit]] = {
    "method, version of HTTP": {
        **{name: method(name) for name in ("POST", "PUT", "HEAD", "OPTIONS", "get", "PROBE")},
        "CONNECT": method("CONNECT"),
        "HTTP/1.0": put("HTTP/1.1", "HTTP/1.0"),
        "HTTP/1.2": put("HTTP/1.1", "HTTP/1.2"),
        "HTTP/2.0": put("HTTP/1.1", "HTTP/2.0"),
    },
    "key": {
        "none": field(WS_KEY, None),
        "empty": field(WS_KEY, ""),
        "two": also(f"{WS_KEY}: {KEY}"),
        "a list": field(WS_KEY, f"{KEY}, {KEY}"),
        "15 bytes": field(WS_KEY, "dGhlIHNhbXBsZSBub25j"),
        "17 bytes": field(WS_KEY, "dGhlIHNhbXBsZSBub25jZWU="),
        "no padding": field(WS_KEY, "dGhlIHNhbXBsZSBub25jZQ"),
        "no base64": field(WS_KEY, "dGhlIHNhbXBsZSBub25j*Q=="),
    },
    "version of WebSocket": {
        "none": field(WS_VERSION, None),
        **{value: field(WS_VERSION, value) for value in ("12", "14", "013", "13, 8", "13,13")},
        "two": also(f"{WS_VERSION}: 13"),
    },
    "Upgrade": {
        "none": field(UPGRADE, None),
        "websocket/13": field(UPGRADE, "websocket/13"),
        "websocket, h2c": field(UPGRADE, "websocket, h2c"),
        "h2c, websocket": field(UPGRADE, "h2c, websocket"),
        "h2c in another line": also("Upgrade: h2c"),
        "twice": also("Upgrade: websocket"),
        "folded": put("Upgrade: websocket", "Upgrade:\r\n websocket"),
        "a space before the colon": put("Upgrade:", "Upgrade :"),
        "a bare CR": put("websocket", "web\rsocket"),
        "a NUL": put("websocket", "websocket\0"),
    },
    "h2c": {
        "alone": field(UPGRADE, "h2c"),
        "with settings": lambda t: also("HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")(
            field(CONNECTION, "Upgrade, HTTP2-Settings")(field(UPGRADE, "h2c")(t))
        ),
        "that Connection does not name": lambda t: also("HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")(
            field(CONNECTION, None)(field(UPGRADE, "h2c")(t))
        ),
        "kept alive": lambda t: field(CONNECTION, "keep-alive")(field(UPGRADE, "h2c")(t)),
    },
    "Connection": {
        "none": field(CONNECTION, None),
        "keep-alive": field(CONNECTION, "keep-alive"),
        "names the key": field(CONNECTION, "Upgrade, Sec-WebSocket-Key"),
        "names the version": field(CONNECTION, "sec-websocket-version, Upgrade"),
        "names Host": field(CONNECTION, "Upgrade, Host"),
    },
    "body": {
        "counted": also("Content-Length: 5", body="hello"),
        "chunked": also("Transfer-Encoding: chunked", body=CHUNKS),
        "CL and TE": also("Content-Length: 0", "Transfer-Encoding: chunked", body=CHUNKS),
        "two lengths": also("Content-Length: 0", "Content-Length: 5"),
    },
    "Host, target": {
        "no Host": put("Host: probe.test\r\n", ""),
        "two Hosts": also("Host: elsewhere.test"),
    },
}

ACCEPT = "Sec-WebSocket-Accept"
# What is wrong with a 101. "If the response lacks ..., or ... contains a value ... other than ..., the client MUST _Fail the WebSocket Connection_" (RFC 6455 4.1).
WRONG: dict[str, Edit] = {
    "another Accept": lambda t: re.sub(rf"{ACCEPT}: \S*", f"{ACCEPT}: ICX+Yqv66kxgM0FcWaLWlFLwTAI=", t),
    "Accept in lower case": lambda t: re.sub(rf"({ACCEPT}: )(\S*)", lambda m: m[1] + m[2].lower(), t),
    "Accept with more behind it": lambda t: re.sub(rf"({ACCEPT}: \S*)", r"\1, x", t),
    "no Accept": field(ACCEPT, None),
    "an empty Accept": field(ACCEPT, ""),
    "two Accepts": lambda t: also(re.search(rf"{ACCEPT}: \S*", t)[0])(t),
    "no Upgrade": field(UPGRADE, None),
    "Upgrade: h2c": field(UPGRADE, "h2c"),
    "no Connection": field(CONNECTION, None),
    "Connection: close": field(CONNECTION, "close"),
    "nothing but the status": lambda t: t.split("\r\n")[0] + "\r\n\r\n",
    "HTTP/1.0": put("HTTP/1.1", "HTTP/1.0"),
}


def switching(request: Message) -> str:
    key = (request.all(b"sec-websocket-key") or [b""])[0]
    fields = ("Upgrade: websocket", "Connection: Upgrade", f"{ACCEPT}: {accept(key)}")
    return "\r\n".join(["HTTP/1.1 101 Switching Protocols", *fields, "", ""])


def answer(request: Message) -> bytes:
    """As the first part of the path says: a status, or what is to be wrong with a 101. That comes with a first frame behind it."""
    how = request.target.split(b"/")[1].decode()
    if how == "101":
        return switching(request).encode()
    if how.startswith("wrong-"):
        return WRONG[list(WRONG)[int(how.removeprefix("wrong-"))]](switching(request)).encode() + b"\x81\x05hello"
    if how == "204":
        return b"HTTP/1.1 204 No Content\r\nX-Saw: /\r\n\r\n"
    return (
        plain_answer(request, "Upgrade: websocket", "Location: /", status=f"{how} As Asked")
        if how.isdigit()
        else plain_answer(request)
    )


def canary(number: int) -> bytes:
    return f"GET /canary/{number:05} HTTP/1.1\r\nHost: probe.test\r\n\r\n".encode()


def frame(payload: bytes) -> bytes:
    # A mask of zeros is one (RFC 6455 5.3), and leaves the payload to be found.
    return bytes([0x82, 0x80 | len(payload), 0, 0, 0, 0]) + payload


def unmasked(data: bytes) -> bytes:
    """The payload of the small masked frame at the beginning."""
    if len(data) < 6 or not data[1] & 0x80:
        return b""
    return bytes(byte ^ data[2 + index % 4] for index, byte in enumerate(data[6 : 6 + (data[1] & 0x7F)]))


@dataclass
class Attempt:
    """A handshake, and what became of it."""

    kind: str
    name: str
    text: str
    number: int = 0
    status: int = 0
    reset: bool = False
    tunnelled: bool = False


async def try_one(address: str, attempt: Attempt) -> None:
    client = await Client.open(address)
    try:
        canaries = canary(attempt.number) + frame(canary(attempt.number))
        client.send(attempt.text.encode("latin-1") + canaries)
        async with asyncio.timeout(10):
            attempt.status = (await client.response(attempt.text.split(" ")[0].encode())).status
        # As a client would that believes itself in a tunnel.
        client.send(frame(canary(attempt.number)) + canary(attempt.number))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(QUIET_SECONDS):
                attempt.reset = (await client.until_end()).reset
                return
        client.fin()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await client.until_end()
    except Ended as ended:
        attempt.reset = ended.reset
    except TimeoutError:
        pass
    finally:
        client.close()


async def try_all(address: str, main: Recorder, attempts: list[Attempt]) -> list[Attempt]:
    # A handshake that is not passed on costs nothing, one that is a connection of its own: some at once.
    places = asyncio.Semaphore(AT_ONCE)

    async def one(attempt: Attempt) -> None:
        async with places:
            await try_one(address, attempt)

    await asyncio.gather(*(one(attempt) for attempt in attempts))
    got = b"".join(bytes(connection.raw) for connection in main.connections)
    for attempt in attempts:
        attempt.tunnelled = f"/canary/{attempt.number:05}".encode() in got
    return attempts


def bad_attempts() -> list[Attempt]:
    """Each bad handshake at each answer, and good ones at all answers but a 101."""
    attempts = []
    for status in STATUSES:
        names = [(kind, name, edit) for kind, edits in BAD.items() for name, edit in edits.items()]
        if status != 101:
            names.append(("none: refused by the backend", "", lambda text: text))
        for kind, name, edit in names:
            number = len(attempts) + 1
            target = f"/{status}/{number:05}"
            attempts.append(Attempt(kind, f"{name}, answered {status}", edit(handshake(target)), number))
    return attempts


def wrong_attempts() -> list[Attempt]:
    return [
        Attempt("a wrong 101", name, handshake(f"/wrong-{index}/{20000 + index}"), 20000 + index)
        for index, name in enumerate(WRONG)
    ]


class Holding:
    """A backend that lets a handshake wait, and counts what comes meanwhile."""

    def __init__(self, how: str) -> None:
        # Bytes behind the handshake: by the time of its answer, and in all.
        self.early = self.late = 0
        self.go = asyncio.Event()
        self.ended = asyncio.Event()
        self.has_head = asyncio.Event()
        self._how = how

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = "127.0.0.1:%d" % self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = b""
        with contextlib.suppress(ConnectionError):
            while (found := head_of(raw)) is None:
                data = await reader.read(65536)
                if not data:
                    return
                raw += data
            request, length = found
            self.has_head.set()

            self.late = len(raw) - length

            async def read() -> None:
                while data := await reader.read(65536):
                    self.late += len(data)

            reading = asyncio.ensure_future(read())
            await self.go.wait()
            self.early = self.late
            writer.write(
                switching(request).encode() if self._how == "101" else plain_answer(request, status=f"{self._how} No")
            )
            await reading
            writer.close()
        self.ended.set()


async def pipelined(name: str, how: str) -> tuple[int, int]:
    """10,000 requests behind a handshake that has to wait: bytes on the connection to the backend before its answer, and in all."""
    async with (
        Holding(how) as backend,
        Recorder("guard") as guard,
        front(name, backend.address, guard.address) as proxy,
    ):
        client = await Client.open(proxy.address)
        requests = b"".join(canary(number) for number in range(PIPELINED))
        client.send(handshake("/held").encode())
        await asyncio.wait_for(backend.has_head.wait(), 10)
        client.send(requests)
        # Nobody can tell that nothing more comes; what comes later is counted as well.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(client.drained(), 1)
        await asyncio.sleep(0.3)
        backend.go.set()
        with contextlib.suppress(Ended, TimeoutError):
            async with asyncio.timeout(5):
                await client.response()
                await client.until_end()
        client.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(backend.ended.wait(), 2)
        return backend.early, backend.late


async def handshakes(report: Report, options) -> None:
    if options.direct:
        print("skip handshakes: it is tidegate's work")
        return
    main, guard = Recorder("main backend", answer=answer), Recorder("backend of /canary/")
    async with main, guard, Tidegate(main.address, guard.address) as proxy:
        async with report.check("handshakes: a good one is a tunnel, here too", main, proxy):
            client = await Client.open(proxy.address)
            client.send(handshake("/101/30000").encode() + frame(canary(30000)))
            expect("status", (await client.response()).status, 101)
            while not (rest := main.connections[0].rest()):
                await asyncio.sleep(0.01)
            expect("the frame at the backend", unmasked(rest), canary(30000))
            client.close()
        main.connections.clear()

        attempts = bad_attempts()
        async with report.check(
            f"handshakes: of {len(attempts)} bad or refused ones none is a tunnel", proxy, seconds=60
        ):
            await try_all(proxy.address, main, attempts)
            wrong = [
                f"{a.kind}: {a.name}: {a.status}, tunnelled: {a.tunnelled}, RST: {a.reset}"
                for a in attempts
                if a.tunnelled or a.reset or a.status == 101
            ]
            wrong += [f"{a.kind}: {a.name}: no answer" for a in attempts if not a.status]
            problems = {problem for request in main.requests for problem in request.problems}
            if wrong or problems:
                raise Failed("\n     ".join([*wrong, *problems]))
        async with report.check(f"handshakes: {len(WRONG)} kinds of wrong 101, and no tunnel", main, proxy, seconds=60):
            attempts = await try_all(proxy.address, main, wrong_attempts())
            wrong = [
                f"{a.name}: {a.status}, tunnelled: {a.tunnelled}" for a in attempts if a.tunnelled or a.status != 502
            ]
            if wrong:
                raise Failed("; ".join(wrong))
        async with report.check("handshakes: and no request for /canary/ at the main backend", main, proxy):
            expect("requests", [r.line for r in main.requests if b"canary" in r.line], [])
    for how in ("101", "403"):
        async with report.check(f"handshakes: {PIPELINED:,} requests behind a handshake, none early, answered {how}"):
            early, late = await pipelined("tidegate", how)
            # After a 101 they are taken for frames, and are none: Close, with nothing of them before it.
            expect("(bytes before the answer, a frame's bytes after it)", (early, late <= 64), (0, True))
