"""HTTP/1.1 on raw sockets: a client that sends any bytes, and a backend that records all it gets.

The backend reads as trustingly as the worst of those that exist: LF ends a line, any list with `chunked` at its end is chunked, `int()` reads a
length. What it had to forgive is written down with the request: whatever another reader could read in another way is a problem of
whoever sent it. So "no problems" means one framing, for every reader. A problem begins with its kind: `framing` and `line` (where something ends),
`form` (target and Host), `upgrade` (another protocol than WebSocket), `hop` (what is for one connection only).

What is deliberately not here: any knowledge of the proxy in between, and of frames.
"""

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_MESSAGE_BYTES = 4 * 1024 * 1024

TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# Origin form, or the asterisk of OPTIONS (RFC 9112 3.2).
TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*|\*")
HOST = re.compile(rb"([0-9A-Za-z._~%!$&'()*+;=-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")
FIELD_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
# What may be said of this one connection: whatever else is listed there would be removed by the next hop.
OPTIONS = {b"close", b"keep-alive", b"upgrade", b"te"}
# "a sender MUST NOT generate a trailer field unless ..." (RFC 9110 6.5.1): framing, routing and the like never.
NOT_IN_TRAILERS = {b"content-length", b"transfer-encoding", b"host", b"connection", b"upgrade", b"te", b"trailer"}


class Broken(Exception):
    """Not even a trusting reader can go on."""


@dataclass
class Message:
    """A request or a response, and what is wrong with it."""

    line: bytes
    fields: list[tuple[bytes, bytes]]
    problems: list[str] = field(default_factory=list)
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def all(self, name: bytes) -> list[bytes]:
        return [value for found, value in self.fields if found == name]

    def tokens(self, name: bytes) -> list[bytes]:
        return [token.strip().lower() for value in self.all(name) for token in value.split(b",") if token.strip()]

    @property
    def method(self) -> bytes:
        return self.line.split(b" ", 1)[0]

    @property
    def target(self) -> bytes:
        return (self.line.split(b" ") + [b""])[1]

    @property
    def status(self) -> int:
        return int(self.line.split(b" ")[1])


def lines_of(block: bytes, problems: list[str]) -> list[bytes]:
    lines = []
    for line in block.split(b"\n"):
        if line.endswith(b"\r"):
            line = line[:-1]
        else:
            problems.append(f"line: one that ends in LF alone: {line[:60]!r}")
        if b"\r" in line:
            problems.append(f"line: a bare CR in {line[:60]!r}")
        lines.append(line)
    return lines


def fields_of(lines: list[bytes], problems: list[str]) -> list[tuple[bytes, bytes]]:
    fields: list[tuple[bytes, bytes]] = []
    for line in lines:
        if line[:1] in (b" ", b"\t"):
            problems.append(f"line: a folded one: {line[:60]!r}")
            if fields:
                fields[-1] = (fields[-1][0], fields[-1][1] + b" " + line.strip())
            continue
        name, colon, value = line.partition(b":")
        if not colon or not TOKEN.fullmatch(name):
            problems.append(f"line: no name of a field: {line[:60]!r}")
        if not FIELD_VALUE.fullmatch(value):
            problems.append(f"line: no value of a field: {line[:60]!r}")
        fields.append((name.strip().lower(), value.strip(b" \t\r")))
    return fields


def head_of(buffer: bytes) -> tuple[Message, int] | None:
    """The header at the beginning, and its length; None: it is not whole."""
    end = re.search(rb"\r?\n\r?\n", buffer)
    if end is None:
        if len(buffer) > MAX_MESSAGE_BYTES:
            raise Broken("a header without an end")
        return None
    problems: list[str] = []
    if buffer[end.start() : end.end()] != b"\r\n\r\n":
        problems.append("line: a header that ends in LF alone")
    first, *rest = lines_of(buffer[: end.start()] + b"\r", problems)
    return Message(first, fields_of(rest, problems), problems), end.end()


def framing_problems(message: Message) -> list[str]:
    lengths, codings = message.all(b"content-length"), message.all(b"transfer-encoding")
    problems = []
    if lengths and codings:
        problems.append("framing: Content-Length and Transfer-Encoding")
    # A reader with 63 bits is enough.
    if len(lengths) > 1 or any(not re.fullmatch(rb"[0-9]{1,25}", length) or int(length) >> 63 for length in lengths):
        problems.append(f"framing: Content-Length: {lengths}")
    if codings and [coding.lower() for coding in codings] != [b"chunked"]:
        problems.append(f"framing: Transfer-Encoding: {codings}")
    return problems


def request_problems(message: Message) -> list[str]:
    problems = framing_problems(message)
    parts = message.line.split(b" ")
    if len(parts) != 3 or not TOKEN.fullmatch(parts[0]) or parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        problems.append(f"form: the request line {message.line[:80]!r}")
    hosts = message.all(b"host")
    target = message.target
    # "a server MUST accept the absolute-form in requests" (RFC 9112 3.2.2), where it says what Host says.
    if absolute := re.match(rb"https?://([^/?#]*)", target):
        target = target[absolute.end() :] or b"/"
        if hosts != [absolute[1]]:
            problems.append(f"form: {message.target[:80]!r} and Host: {hosts}")
    if not TARGET.fullmatch(target):
        problems.append(f"form: the target {message.target[:80]!r}")
    is_old = parts[-1] == b"HTTP/1.0"
    if is_old and message.all(b"transfer-encoding"):
        problems.append("framing: Transfer-Encoding in HTTP/1.0")
    if len(hosts) > 1 or not (hosts or is_old) or not all(HOST.fullmatch(host) for host in hosts):
        problems.append(f"form: Host: {hosts}")
    if upgrades := message.all(b"upgrade"):
        if [name.lower() for name in upgrades] != [b"websocket"] or message.method != b"GET":
            problems.append(f"upgrade: {message.method} with Upgrade: {upgrades}")
        elif message.all(b"transfer-encoding") or message.all(b"content-length") not in ([], [b"0"]):
            problems.append("upgrade: a handshake with a body")
    if message.all(b"http2-settings"):
        problems.append("upgrade: HTTP2-Settings")
    if others := set(message.tokens(b"connection")) - OPTIONS:
        problems.append(f"hop: Connection lists {sorted(others)}")
    return problems


def chunked_body(buffer: bytes, at: int, message: Message) -> int | None:
    """Reads a chunked body from `at` into `message`; the position behind it, or None."""
    body = bytearray()
    while True:
        end = buffer.find(b"\n", at)
        if end < 0:
            return None
        line = buffer[at : end + 1]
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}\r\n", line):
            message.problems.append(f"framing: the size of a chunk: {line[:60]!r}")
        try:
            size = int(line.split(b";")[0].strip(), 16)
        except ValueError:
            raise Broken(f"no size of a chunk: {line[:60]!r}") from None
        if size < 0:
            raise Broken(f"no size of a chunk: {line[:60]!r}")
        at = end + 1
        if size == 0:
            break
        if len(buffer) < at + size + 2:
            return None
        body += buffer[at : at + size]
        at += size
        if buffer[at : at + 2] != b"\r\n":
            raise Broken(f"a chunk that goes on with {buffer[at : at + 20]!r}")
        at += 2
    message.body = bytes(body)
    if buffer.startswith(b"\r\n", at):
        return at + 2
    end = re.compile(rb"\r?\n\r?\n").search(buffer, at)
    if end is None:
        return None
    message.trailers = fields_of(lines_of(buffer[at : end.start()] + b"\r", message.problems), message.problems)
    message.problems += [f"framing: {name!r} in trailers" for name, _ in message.trailers if name in NOT_IN_TRAILERS]
    return end.end()


def body_of(buffer: bytes, at: int, message: Message) -> int | None:
    """The position behind the body of a request."""
    if message.tokens(b"transfer-encoding")[-1:] == [b"chunked"]:
        return chunked_body(buffer, at, message)
    length = 0
    if lengths := message.all(b"content-length"):
        try:
            length = int(lengths[0])
        except ValueError:
            raise Broken(f"Content-Length: {lengths[0][:60]!r}") from None
        if length < 0:
            raise Broken(f"Content-Length: {lengths[0][:60]!r}")
    if len(buffer) < at + length:
        return None
    message.body = buffer[at : at + length]
    return at + length


@dataclass
class Connection:
    """What one connection of the proxy brought."""

    raw: bytearray = field(default_factory=bytearray)
    requests: list[Message] = field(default_factory=list)
    # The header of a request that is not, or never became, whole.
    begun: Message | None = None
    broken: str | None = None
    # Where what is no whole request begins.
    read: int = 0

    def rest(self) -> bytes:
        return bytes(self.raw[self.read :])


Answer = Callable[[Message], bytes]
Early = Callable[[Message], bytes | None]


def plain_answer(request: Message, *fields: str, status: str = "200 OK") -> bytes:
    """Says what was asked for, so that whoever gets it knows whether it is theirs."""
    saw = request.target.decode("latin-1").encode("unicode_escape")[:200].decode()
    body = "" if request.method == b"HEAD" else "seen"
    head = [f"HTTP/1.1 {status}", f"X-Saw: {saw}", *fields, f"Content-Length: {len('seen')}"]
    return "\r\n".join([*head, "", body]).encode()


class Recorder:
    """The backend. `answer` is asked with each whole request; `early` with its header, and may answer before the body is there."""

    def __init__(self, name: str, answer: Answer = plain_answer, early: Early = lambda _: None) -> None:
        self.name = name
        self.lines: list[str] = []
        self.connections: list[Connection] = []
        # Those that brought bytes, or are new, since whoever looks at this has emptied it.
        self.touched: list[Connection] = []
        # Of all connections, in the order in which they became whole.
        self.requests: list[Message] = []
        self._answer, self._early = answer, early
        self._writers: set[asyncio.StreamWriter] = set()
        self.address = ""

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1024 * 1024)
        self.address = "127.0.0.1:%d" % self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection()
        self.connections.append(connection)
        self._writers.add(writer)
        # OSError: FIN to a peer that has reset.
        with contextlib.suppress(OSError):
            try:
                is_tunnel = await self._requests(connection, reader, writer)
            except Broken as error:
                is_tunnel, connection.broken = False, str(error)
                self.lines.append(f"broken: {error}")
                writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await writer.drain()
            if not is_tunnel:
                writer.write_eof()
            # What still comes is recorded too: a tunnel does not ask whether anybody reads.
            while data := await reader.read(65536):
                connection.raw += data
                self.touched.append(connection)
        self._writers.discard(writer)
        writer.close()

    async def _requests(self, connection: Connection, reader, writer) -> bool:
        """True: the last answer was a 101."""
        is_answered = False
        while True:
            # RFC 9112 2.2: empty lines before a request are nothing.
            while connection.raw.startswith(b"\r\n", connection.read):
                connection.read += 2
            buffer = connection.rest()
            if found := head_of(buffer):
                request, at = found
                request.problems += request_problems(request)
                is_new, connection.begun = connection.begun is None, request
                end = body_of(buffer, at, request)
                if is_new:
                    early = self._early(request)
                    if is_answered := early is not None:
                        writer.write(early)
                    elif end is None and request.tokens(b"expect") == [b"100-continue"]:
                        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                if end is not None:
                    self.lines.append(f"{request.line[:120]!r} {request.problems or ''}")
                    connection.requests.append(request)
                    self.requests.append(request)
                    connection.begun = None
                    connection.read += end
                    answer = b"" if is_answered else self._answer(request)
                    writer.write(answer)
                    await writer.drain()
                    if answer.startswith(b"HTTP/1.1 101"):
                        return True
                    if b"close" in request.tokens(b"connection") or b"Connection: close" in answer:
                        return False
                    continue
            data = await reader.read(65536)
            if not data:
                return False
            connection.raw += data
            self.touched.append(connection)


class Ended(Exception):
    """A client's connection is over; `reset`: by a RST."""

    def __init__(self, reset: bool, rest: bytes) -> None:
        super().__init__(f"{'RST' if reset else 'FIN'} after {rest[:60]!r}")
        self.reset, self.rest = reset, rest


class Client:
    """One connection of a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._buffer = b""

    @staticmethod
    async def open(address: str, tls: ssl.SSLContext | None = None) -> "Client":
        host, port = address.split(":")
        return Client(*await asyncio.open_connection(host, int(port), ssl=tls, limit=1024 * 1024))

    def send(self, data: bytes) -> None:
        # What fails shows when reading.
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._writer.write(data)

    async def send_in_pieces(self, data: bytes, sizes: list[int]) -> None:
        at = index = 0
        while at < len(data):
            size = sizes[index % len(sizes)]
            self.send(data[at : at + size])
            at, index = at + size, index + 1
            # The other side gets a look at each piece, or at some together: both happen.
            await asyncio.sleep(0)

    async def drained(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    def fin(self) -> None:
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            self._writer.write_eof()

    async def more(self) -> bytes:
        try:
            data = await self._reader.read(65536)
        except ConnectionError:
            raise Ended(True, self._buffer) from None
        if not data:
            raise Ended(False, self._buffer)
        return data

    async def response(self, method: bytes = b"GET") -> Message:
        """The next final response; 1xx before it are passed over, but for 101."""
        while True:
            while (found := head_of(self._buffer)) is None:
                self._buffer += await self.more()
            response, at = found
            if not re.match(rb"HTTP/1\.[01] [1-5][0-9][0-9]", response.line):
                raise Ended(False, self._buffer)
            if 100 <= response.status < 200 and response.status != 101:
                self._buffer = self._buffer[at:]
                continue
            break
        response.problems += framing_problems(response)
        if method == b"HEAD" or response.status in (101, 204, 304):
            self._buffer = self._buffer[at:]
            return response
        if not response.all(b"content-length") and not response.all(b"transfer-encoding"):
            try:
                while True:
                    self._buffer += await self.more()
            except Ended as ended:
                if ended.reset:
                    raise
            response.body, self._buffer = self._buffer[at:], b""
            return response
        while (end := body_of(self._buffer, at, response)) is None:
            self._buffer += await self.more()
        self._buffer = self._buffer[end:]
        return response

    async def until_end(self) -> Ended:
        """Reads to the end, whatever comes."""
        while True:
            try:
                self._buffer += await self.more()
            except Ended as ended:
                return ended

    def close(self) -> None:
        self._writer.close()
