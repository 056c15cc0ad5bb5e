"""A backend that is fast and takes any number of connections, for those whose load is not to be that of whoever measures: says {"address": ...}.

It answers /101/... with a 101, /large with 1 MiB, and everything else, once its body is there, with a few bytes. Requests are taken for what they seem.
"""

import asyncio
import base64
import hashlib
import json
import re
import resource

LARGE = b"x" * 65536
LARGE_COUNT = 16


class Connection(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.buffer = bytearray()
        # Bytes of a body, and pieces of an answer, that are still to come; a chunked body is over with its last chunk.
        self.left = self.to_write = 0
        self.is_chunked = self.is_tunnel = self.is_paused = False

    def data_received(self, data: bytes) -> None:
        if self.is_tunnel:
            return
        self.buffer += data
        while self.left or self.is_chunked or b"\r\n\r\n" in self.buffer:
            if self.is_chunked:
                if not self.buffer.endswith(b"0\r\n\r\n"):
                    # Its end is all that is looked for.
                    del self.buffer[:-8]
                    return
                self.buffer.clear()
                self.is_chunked = False
                self.small()
                continue
            if self.left:
                taken = min(self.left, len(self.buffer))
                self.left -= taken
                del self.buffer[:taken]
                if self.left:
                    return
                self.small()
                continue
            head, _, rest = bytes(self.buffer).partition(b"\r\n\r\n")
            self.buffer = bytearray(rest)
            key = re.search(rb"\r\nsec-websocket-key: (\S+)", head, re.I)
            length = re.search(rb"\r\ncontent-length: (\d+)", head, re.I)
            if head.startswith(b"GET /101/") and key:
                accept = base64.b64encode(hashlib.sha1(key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
                self.transport.write(
                    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
                    + accept
                    + b"\r\n\r\n"
                )
                self.is_tunnel = True
                return
            if length and int(length[1]):
                self.left = int(length[1])
            elif re.search(rb"\r\ntransfer-encoding:", head, re.I):
                self.is_chunked = True
            elif head.split(b" ")[1].startswith(b"/large"):
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(LARGE) * LARGE_COUNT))
                self.to_write += LARGE_COUNT
                self.go_on()
            else:
                self.small()

    def small(self) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nseen")

    def go_on(self) -> None:
        while self.to_write and not self.is_paused:
            self.to_write -= 1
            self.transport.write(LARGE)

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False
        self.go_on()


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=4096)
    print(json.dumps({"address": "127.0.0.1:%d" % server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    asyncio.run(main())
