"""The clients: Python `websockets` in this process; `ws`, `undici` and Chromium as processes, all with one interface.

open, send, receive, echo, burst, ping, close and closed answer with the same plain data whoever the client is (see
peers/socket.js). `lines` is the transcript for a report.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import tempfile
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from harness import INTEROP, WORK, Failed, Process, json_line

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")


class ProcessClient(Process):
    can_ping = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._ids = itertools.count(1)

    async def __aenter__(self):
        await self.start(*self.command())
        await self.ready(json_line(value="ready"), '"ready"', 60)
        return self

    async def __aexit__(self, *_) -> None:
        # The end of stdin lets it close what it opened; a signal would leave Chromium's children behind.
        self._child.stdin.close()
        with contextlib.suppress(Failed):
            await self.ended()
        await self.stop()

    def command(self) -> list:
        return ["node", INTEROP / "peers" / "node.mjs", self.name]

    async def call(self, op: str, **fields: object):
        request = next(self._ids)
        line = json.dumps({"id": request, "op": op, **fields})
        await self._take(f"> {line}")
        self.write(line)
        answer = await self.wait_for_line(json_line(id=request), f"answer to {line[:200]}")
        if "error" in answer:
            raise Failed(f"{op}: {answer['error']}")
        return answer["value"]

    async def open(self, name, url, protocols=()):
        return await self.call("open", name=name, url=url, protocols=list(protocols))

    async def send(self, name, text):
        return await self.call("send", name=name, text=text)

    async def receive(self, name):
        return await self.call("receive", name=name)

    async def echo(self, name, **message):
        return await self.call("echo", name=name, **message)

    async def burst(self, name, count):
        return await self.call("burst", name=name, count=count)

    async def ping(self, name, data):
        return await self.call("ping", name=name, data=data)

    async def close(self, name, code, reason):
        return await self.call("close", name=name, code=code, reason=reason)

    async def closed(self, name):
        return await self.call("closed", name=name)

    async def status(self, url) -> int | None:
        """Of a refused handshake; None where the client does not tell, but did not open either."""
        if self.name == "ws":
            return await self.call("status", url=url)
        try:
            await self.open("refused", url)
        except Failed:
            return None
        raise Failed("opened")

    async def prepare(self, page: str) -> None:
        """Before the first socket."""


class ChromiumClient(ProcessClient):
    can_ping = False

    def __init__(self) -> None:
        super().__init__("chromium")
        self._profile = None

    def command(self) -> list:
        WORK.mkdir(exist_ok=True)
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", dir=WORK, ignore_cleanup_errors=True)
        return ["node", INTEROP / "peers" / "chromium.mjs", CHROMIUM, self._profile.name]

    async def __aexit__(self, *_) -> None:
        await super().__aexit__()
        self._profile.cleanup()

    async def prepare(self, page: str) -> None:
        await self.call("page", url=page)


class _Connection(ClientConnection):
    """Remembers how the TCP connection ended, which the library does not tell."""

    def connection_made(self, transport):
        self.lost = asyncio.get_running_loop().create_future()
        super().connection_made(transport)

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self.lost.set_result(exc)


class PythonClient:
    can_ping = True

    def __init__(self) -> None:
        self.name = "websockets"
        self.lines: list[str] = []
        self._sockets: dict[str, _Connection] = {}

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_) -> None:
        for socket in self._sockets.values():
            socket.transport.abort()

    def _say(self, line: str) -> None:
        self.lines.append(line)

    async def prepare(self, page: str) -> None:
        pass

    async def open(self, name, url, protocols=()):
        self._say(f"> open {name} {url}")
        socket = await connect(
            url,
            subprotocols=list(protocols) or None,
            create_connection=_Connection,
            max_size=64 * 1024 * 1024,
            # Longer than every bound of the proxy's: it is the proxy that must end the handshake.
            close_timeout=20,
            proxy=None,
        )
        self._sockets[name] = socket
        return {
            "protocol": socket.subprotocol or "",
            "extensions": ", ".join(extension.name for extension in socket.protocol.extensions),
        }

    async def send(self, name, text):
        self._say(f"> send {name} {text[:200]}")
        await self._sockets[name].send(text)

    async def receive(self, name):
        try:
            message = await self._sockets[name].recv()
        except ConnectionClosed as error:
            raise Failed(f"closed: {error}") from error
        self._say(f"< {len(message)} {message[:200]!r}")
        if isinstance(message, str):
            return {"kind": "text", "size": len(message), "text": message[:1024]}
        return {"kind": "binary", "size": len(message)}

    async def echo(self, name, text="", repeat=1, bytes=None):
        sent = text * repeat if bytes is None else random.Random(12345).randbytes(bytes)
        self._say(f"> echo {name} {len(sent)} {sent[:100]!r}")
        await self._sockets[name].send(sent)
        try:
            received = await self._sockets[name].recv()
        except ConnectionClosed as error:
            raise Failed(f"closed: {error}") from error
        return {
            "kind": "text" if isinstance(received, str) else "binary",
            "size": len(received),
            "same": received == sent,
        }

    async def burst(self, name, count):
        socket = self._sockets[name]
        self._say(f"> burst {name} {count}")

        async def send():
            for i in range(count):
                await socket.send(f"message {i}")

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            for i in range(count):
                if await socket.recv() != f"message {i}":
                    return i
        return count

    async def ping(self, name, data):
        await asyncio.wait_for(await self._sockets[name].ping(data), 10)
        return data

    async def close(self, name, code, reason):
        self._say(f"> close {name} {code} {reason}")
        # Without waiting, as in the other clients' API; closed() waits.
        self._closing = asyncio.create_task(self._sockets[name].close(code, reason))

    async def closed(self, name):
        socket = self._sockets[name]
        exc = await asyncio.shield(socket.lost)
        await socket.wait_closed()
        protocol = socket.protocol
        end = {
            "code": int(protocol.close_code),
            "reason": protocol.close_reason,
            "clean": protocol.close_rcvd is not None and protocol.close_sent is not None and exc is None,
        }
        self._say(f"< closed {name} {end} {exc!r}")
        return end

    async def status(self, url) -> int | None:
        self._say(f"> open {urlsplit(url).path}")
        try:
            await self.open("refused", url)
        except InvalidStatus as error:
            return error.response.status_code
        raise Failed("opened")


CLIENTS = {
    "websockets": PythonClient,
    "ws": lambda: ProcessClient("ws"),
    "undici": lambda: ProcessClient("undici"),
    "chromium": ChromiumClient,
}
