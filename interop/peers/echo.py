"""A WebSocket echo backend that does what it is told and reports what it sees, one JSON object per line on stdout.

It is the side that must not need tidegate's help: nothing here knows whether a proxy stands in between.
A text that begins with "!" is a command ("!close CODE REASON", "!ping"), unless the path is /plain.
"""

import argparse
import asyncio
import http
import json
import signal
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Response

PAGE = b"<!doctype html><meta charset=utf-8><title>interop</title><p>a page from the backend\n"

SUBPROTOCOL = "tidegate.interop"


def report(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


class Connection(ServerConnection):
    """Remembers how the TCP connection ended, which the library does not tell."""

    lost: asyncio.Future[Exception | None]

    def connection_made(self, transport):
        self.lost = asyncio.get_running_loop().create_future()
        super().connection_made(transport)

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self.lost.set_result(exc)


def answer_plain_requests(connection, request):
    path = urlsplit(request.path).path
    if path == "/page":
        headers = Headers([("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(PAGE)))])
        return Response(http.HTTPStatus.OK, "OK", headers, PAGE)
    if path == "/refused":
        return connection.respond(http.HTTPStatus.FORBIDDEN, "refused by the backend\n")
    return None


async def obey(connection, command: str) -> None:
    word, *rest = command[1:].split(" ", 2)
    if word == "close":
        await connection.close(int(rest[0]), rest[1])
    elif word == "ping":
        await asyncio.wait_for(await connection.ping(b"from the backend"), 10)
        await connection.send("ponged")


async def echo(connection) -> None:
    url = urlsplit(connection.request.path)
    name = parse_qs(url.query).get("name", [""])[0]
    quiet = url.path == "/plain"
    if not quiet:
        report(
            "open",
            name=name,
            subprotocol=connection.subprotocol,
            extensions=[extension.name for extension in connection.protocol.extensions],
        )
    try:
        async for message in connection:
            if not quiet and isinstance(message, str) and message.startswith("!"):
                await obey(connection, message)
            else:
                await connection.send(message)
    except ConnectionClosed:
        pass
    # A bound, so that a peer which never ends its TCP connection shows up as a missing event and not as a leak.
    exc = await asyncio.wait_for(connection.lost, 30)
    received = connection.protocol.close_rcvd
    if not quiet:
        report(
            "close",
            name=name,
            code=received.code if received else None,
            reason=received.reason if received else None,
            reset=isinstance(exc, ConnectionError),
        )


async def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--port", type=int, default=0)
    port = arguments.parse_args().port
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with serve(
        echo,
        "127.0.0.1",
        port,
        create_connection=Connection,
        process_request=answer_plain_requests,
        # A client that asks for none is welcome too.
        select_subprotocol=lambda _, offered: SUBPROTOCOL if SUBPROTOCOL in offered else None,
        max_size=64 * 1024 * 1024,
        ping_interval=None,
    ) as server:
        host, port = server.sockets[0].getsockname()
        report("listening", address=f"{host}:{port}")
        await stop.wait()


asyncio.run(main())
