"""Answers of a backend of which two readers may see different ends, each with another answer behind it, or within it, that nobody asked for.

Whatever the proxy makes of the first one (it may pass it on in one meaning, or say 502): the other must never be the answer to the next request, of
this client or of another.
"""

import asyncio

from wire import Client, Ended, Message, Recorder, plain_answer

# Whoever gets this gets somebody else's.
STOLEN = "HTTP/1.1 200 OK\r\nX-Saw: /stolen\r\nContent-Length: 4\r\n\r\nseen"
TRIES = 2
# To a strange answer; a proxy that waits for more of it gets another client, as any would.
ANSWER_SECONDS = 0.2


def answer_with(*fields: str, body: str = "", status: str = "HTTP/1.1 200 OK") -> str:
    return "\r\n".join([status, "X-Saw: /answer", *fields, "", body])


def chunk(text: str) -> str:
    return f"{len(text):x}\r\n{text}\r\n"


COUNTED, CHUNKED = f"Content-Length: {len(STOLEN)}", "Transfer-Encoding: chunked"
BEHIND, WITHIN = "0\r\n\r\n" + STOLEN, chunk(STOLEN) + "0\r\n\r\n"

ANSWERS: dict[str, str] = {
    "another behind it": answer_with("Content-Length: 4", body="seen" + STOLEN),
    "another behind an empty one": answer_with("Content-Length: 0", body=STOLEN),
    "another behind a chunked one": answer_with(CHUNKED, body=BEHIND),
    "204 with a body": answer_with(COUNTED, body=STOLEN, status="HTTP/1.1 204 No Content"),
    "204 with chunks": answer_with(CHUNKED, body=WITHIN, status="HTTP/1.1 204 No Content"),
    "304 with a body": answer_with(COUNTED, body=STOLEN, status="HTTP/1.1 304 Not Modified"),
    "100 with a length": answer_with(COUNTED, status="HTTP/1.1 100 Continue")
    + answer_with("Content-Length: 0", body=STOLEN),
    "103, then it": answer_with(status="HTTP/1.1 103 Early Hints") + answer_with("Content-Length: 0", body=STOLEN),
    "101 that nobody asked for": answer_with("Upgrade: x", "Connection: Upgrade", status="HTTP/1.1 101 Switching") + STOLEN,
    "CL and TE": answer_with(f"Content-Length: {len(BEHIND)}", CHUNKED, body=BEHIND),
    "TE and CL": answer_with(CHUNKED, "Content-Length: 4", body=WITHIN),
    "two lengths": answer_with("Content-Length: 0", COUNTED, body=STOLEN),
    "the long one first": answer_with(COUNTED, "Content-Length: 0", body=STOLEN),
    "a list of lengths": answer_with(f"Content-Length: 0, {len(STOLEN)}", body=STOLEN),
    "+": answer_with(f"Content-Length: +{len(STOLEN)}", body=STOLEN),
    "-": answer_with("Content-Length: -1", body=STOLEN),
    "0x": answer_with(f"Content-Length: 0x{len(STOLEN):x}", body=STOLEN),
    "no number": answer_with("Content-Length: x", body=STOLEN),
    "2^64": answer_with(f"Content-Length: {2**64}", body=STOLEN),
    "a space before the colon": answer_with(f"Content-Length : {len(STOLEN)}", body=STOLEN),
    "xchunked": answer_with("Transfer-Encoding: xchunked", COUNTED, body=WITHIN),
    "chunked, identity": answer_with("Transfer-Encoding: chunked, identity", COUNTED, body=WITHIN),
    "chunked twice": answer_with(CHUNKED, CHUNKED, body=BEHIND),
    "chunked in HTTP/1.0": answer_with(CHUNKED, COUNTED, body=BEHIND, status="HTTP/1.0 200 OK"),
    "folded": answer_with("X: y", f" {COUNTED}", body=STOLEN),
    "behind a bare CR": answer_with(f"X: y\r{COUNTED}", body=STOLEN),
    "behind a bare LF": answer_with(f"X: y\n{COUNTED}", body=STOLEN),
    "a NUL": answer_with("X: y\0", "Content-Length: 0", body=STOLEN),
    "LF throughout": answer_with("Content-Length: 0").replace("\r\n", "\n") + STOLEN,
    "a size with 0x": answer_with(CHUNKED, body=f"0x{len(STOLEN):x}\r\n{STOLEN}\r\n0\r\n\r\n"),
    "a size with -": answer_with(CHUNKED, body=f"-1\r\n{STOLEN}\r\n0\r\n\r\n"),
    "a size beyond 64 bits": answer_with(CHUNKED, body=f"1{'0' * 15}{len(STOLEN):x}\r\n{STOLEN}\r\n0\r\n\r\n"),
    "a chunk that is longer than it says": answer_with(CHUNKED, body=f"4\r\nseen{STOLEN}\r\n0\r\n\r\n"),
    "an extension with an LF": answer_with(CHUNKED, body=f"0;\nx\r\n\r\n{STOLEN}"),
    "trailers with a length": answer_with(CHUNKED, body=f"0\r\n{COUNTED}\r\n\r\n{STOLEN}"),
    "HTTP/2.0": answer_with("Content-Length: 0", body=STOLEN, status="HTTP/2.0 200 OK"),
    "a status of two digits": answer_with("Content-Length: 0", body=STOLEN, status="HTTP/1.1 20 OK"),
    "a status of four digits": answer_with("Content-Length: 0", body=STOLEN, status="HTTP/1.1 2000 OK"),
    "no status": answer_with("Content-Length: 0", body=STOLEN, status="HTTP/1.1"),
    "an empty line before": "\r\n" + answer_with("Content-Length: 0", body=STOLEN),
}  # fmt: skip
METHODS = ("GET", "HEAD", "POST")


def answer(request: Message) -> bytes:
    """The answer with the number that is in the path, or one that says what was asked for."""
    if request.target.startswith(b"/answer/"):
        return list(ANSWERS.values())[int(request.target.split(b"/")[2])].encode("latin-1")
    return plain_answer(request)


def recorder() -> Recorder:
    return Recorder("backend with strange answers", answer=answer)


async def ask(client: Client, method: str, target: str, wrong: list[str]) -> bool:
    """Whether this got an answer, and the connection goes on; what is not right with it goes to `wrong`."""
    body = "Content-Length: 4\r\n\r\nbody" if method == "POST" else "\r\n"
    client.send(f"{method} {target} HTTP/1.1\r\nHost: probe.test\r\n{body}".encode())
    response = await client.response(method.encode())
    wrong += [f"{target}: {problem}" for problem in response.problems]
    saw = b"".join(response.all(b"x-saw")).decode()
    if saw and saw != (target if target.startswith("/mine/") else "/answer"):
        wrong.append(f"{method} {target} is answered for {saw}")
    return b"close" not in response.tokens(b"connection")


async def strange(address: str) -> dict[str, list[str]]:
    """Each answer to each method: what went wrong with it, for who asked, on the same connection, and for the next ones."""
    faults: dict[str, list[str]] = {}
    for index, name in enumerate(ANSWERS):
        for method in METHODS:
            wrong = faults.setdefault(f"{name}, to {method}", [])
            for target in (f"/answer/{index}", *(f"/mine/{index}/{method}/{n}" for n in range(TRIES))):
                client = await Client.open(address)
                try:
                    if target.startswith("/mine/"):
                        async with asyncio.timeout(5):
                            await ask(client, "GET", target, wrong)
                        continue
                    async with asyncio.timeout(ANSWER_SECONDS):
                        goes_on = await ask(client, method, target, wrong)
                    async with asyncio.timeout(5):
                        if goes_on:
                            await ask(client, "GET", f"/mine/{index}/{method}/same", wrong)
                except TimeoutError:
                    if target.startswith("/mine/"):
                        wrong.append(f"{target}: no answer")
                except Ended as ended:
                    # Less than a whole answer is an error that the client sees; bytes that are none would be its next answer.
                    if b"/stolen" in ended.rest.split(b"\r\n\r\n")[0] or target.startswith("/mine/"):
                        wrong.append(f"{target}: {ended}")
                finally:
                    client.close()
    return {name: wrong for name, wrong in faults.items() if wrong}
