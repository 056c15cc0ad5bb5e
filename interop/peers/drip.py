"""Slow clients, in a process of their own, so that whoever is measured meanwhile does not wait for them: `drip.py PLAN`, a JSON object.

{"address", "count", "kinds", "interval", "seconds", "late"}: so many connections, in turn of the kinds, each of which sends a byte at each interval
until it is cut or the seconds are over; the first one at once, or so late. Says {"event": "dripping"} once all are there, and at the end a list of [kind, seconds from its connect,
how it ended, bytes sent, the first bytes it got].

{"address", "header": bytes}: one connection with one header, byte by byte as fast as they are taken. At the first byte of an answer it says
{"event": "answered", "sent"}, waits for a line, and goes on as if there was none; and at the end {"event": "header", "sent", "seconds", "got", "end"}.
"""

import asyncio
import contextlib
import json
import resource
import select
import socket
import ssl
import sys
import time

# What comes before the first byte that drips, and what drips then.
BEGINNINGS = {
    # Nothing but the request line, then a header, and then a header behind a good request on the same connection.
    "line": (b"", b"GET /dripping HTTP/1.1\r\nHost: probe.test\r\n\r\n"),
    "header": (b"GET / HTTP/1.1\r\nHost: probe.test\r\nX: ", b"x" * 1000),
    "websocket": (
        b"GET /101/1 HTTP/1.1\r\nHost: probe.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX: ",
        b"x" * 1000,
    ),
    "second": (b"GET / HTTP/1.1\r\nHost: probe.test\r\n\r\n", b"GET /dripping HTTP/1.1\r\nHost: probe.test\r\n\r\n"),
    "empty lines": (b"", b"\r\n" * 500),
    "silent": (b"", b""),
    "body": (b"POST / HTTP/1.1\r\nHost: probe.test\r\nContent-Length: 1000\r\n\r\n", b"x" * 1000),
    "chunked": (b"POST / HTTP/1.1\r\nHost: probe.test\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 200),
}


# Whom it speaks with does not matter here.
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
TLS.check_hostname, TLS.verify_mode = False, ssl.CERT_NONE


def client_hello() -> bytes:
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        TLS.wrap_bio(ssl.MemoryBIO(), out, server_hostname="probe.test").do_handshake()
    return out.read()


BEGINNINGS["hello"] = (b"", client_hello())


async def drip(plan: dict, kind: str, places: asyncio.Semaphore, begun: list[str]) -> list:
    host, port = plan["address"].split(":")
    context = TLS if kind.startswith("tls ") else None
    first, rest = BEGINNINGS[kind.removeprefix("tls ")]
    start = time.monotonic()
    sent, got, how = 0, b"", "alive"
    async with places:
        try:
            reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        except OSError as error:
            return [kind, time.monotonic() - start, f"no connection: {error}", 0, ""]
        finally:
            begun.append(kind)
    # From here: what waits for its turn with its own TLS handshake is this process.
    start = time.monotonic()

    async def read() -> str:
        nonlocal got
        try:
            while data := await reader.read(65536):
                got += data[: 200 - len(got)]
        except OSError:
            return "reset"
        return "fin"

    writer.write(first)
    sent += len(first)
    reading = asyncio.ensure_future(read())
    end = start + plan["seconds"]
    if late := plan.get("late"):
        await asyncio.wait([reading], timeout=late)
    for byte in rest:
        if reading.done() or time.monotonic() > end:
            break
        with contextlib.suppress(OSError):
            writer.write(bytes([byte]))
            sent += 1
        await asyncio.wait([reading], timeout=plan["interval"])
    if not reading.done():
        await asyncio.wait([reading], timeout=max(0.0, end - time.monotonic()))
    took = time.monotonic() - start
    if reading.done():
        how = reading.result()
    reading.cancel()
    writer.close()
    return [kind, took, how, sent, got[:60].decode("latin-1")]


async def drippers(plan: dict) -> None:
    places, begun = asyncio.Semaphore(100), []
    kinds = [plan["kinds"][index % len(plan["kinds"])] for index in range(plan["count"])]
    tasks = [asyncio.ensure_future(drip(plan, kind, places, begun)) for kind in kinds]
    while len(begun) < len(tasks):
        await asyncio.sleep(0.02)
    print(json.dumps({"event": "dripping"}), flush=True)
    print(json.dumps({"event": "dripped", "ends": await asyncio.gather(*tasks)}), flush=True)


def header(plan: dict) -> None:
    host, port = plan["address"].split(":")
    client = socket.create_connection((host, int(port)))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    start, sent, end = time.monotonic(), 0, "alive"
    client.sendall(b"GET / HTTP/1.1\r\nHost: probe.test\r\nX: ")
    is_answered = False
    try:
        while sent < plan["header"]:
            sent += client.send(b"x")
            if not is_answered and sent % 256 == 0 and select.select([client], [], [], 0)[0]:
                is_answered = True
                print(json.dumps({"event": "answered", "sent": sent}), flush=True)
                sys.stdin.readline()
        client.shutdown(socket.SHUT_WR)
    except OSError:
        end = "cut"
    got = b""
    with contextlib.suppress(OSError):
        while data := client.recv(65536):
            got += data
        end = "fin" if end == "alive" else end
    print(
        json.dumps(
            {
                "event": "header",
                "sent": sent,
                "seconds": time.monotonic() - start,
                "got": got[:60].decode("latin-1"),
                "end": end,
            }
        )
    )


if __name__ == "__main__":
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    plan = json.loads(sys.argv[1])
    if "header" in plan:
        header(plan)
    else:
        asyncio.run(drippers(plan))
