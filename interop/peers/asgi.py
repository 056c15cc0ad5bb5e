"""The same echo backend as echo.py as an ASGI application, under servers that speak HTTP/2: `asgi.py hypercorn|uvicorn`.

One JSON object per line on stdout. Over HTTP/2 and HTTP/1.1, on one port, without TLS; `asgi.py hypercorn KEY CERTIFICATE`: with it.
"""

import asyncio
import json
import signal
import socket
import sys
from urllib.parse import parse_qs

SUBPROTOCOL = "tidegate.interop"


def report(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


async def app(scope, receive, send) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"a page from the backend\n"})
        return
    await receive()
    if scope["path"] == "/refused":
        # Before it was accepted: 403.
        await send({"type": "websocket.close", "code": 1008})
        return
    name = parse_qs(scope["query_string"].decode()).get("name", [""])[0]
    quiet = scope["path"] == "/plain"
    subprotocol = SUBPROTOCOL if SUBPROTOCOL in scope["subprotocols"] else None
    await send({"type": "websocket.accept", "subprotocol": subprotocol})
    if not quiet:
        report("open", name=name, subprotocol=subprotocol, version=scope.get("http_version"))
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            break
        text = message.get("text")
        if not quiet and text is not None and text.startswith("!close "):
            _, code, reason = text.split(" ", 2)
            await send({"type": "websocket.close", "code": int(code), "reason": reason})
        elif text is not None:
            await send({"type": "websocket.send", "text": text})
        else:
            await send({"type": "websocket.send", "bytes": message["bytes"]})
    if not quiet:
        report("close", name=name, code=message.get("code"))


async def hypercorn(listener: socket.socket, identity: list[str]) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"fd://{listener.fileno()}"]
    if identity:
        config.keyfile, config.certfile = identity
    config.h2_max_concurrent_streams = 100
    config.websocket_max_message_size = 64 * 1024 * 1024
    config.websocket_ping_interval = None
    config.accesslog = None
    config.backlog = 4096
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await serve(app, config, shutdown_trigger=stop.wait)


def uvicorn(listener: socket.socket) -> None:
    import uvicorn

    # With these it advertises extended CONNECT, and asks the application as if it were any request.
    config = uvicorn.Config(app, http="zttp", http2=True, ws="wsproto", log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", 0))
    listening.listen(4096)
    listening.set_inheritable(True)
    report("listening", address="{}:{}".format(*listening.getsockname()))
    if sys.argv[1] == "hypercorn":
        asyncio.run(hypercorn(listening, sys.argv[2:]))
    else:
        uvicorn(listening)
