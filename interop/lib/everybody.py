"""All clients at once, each with a session, and the end that each of them sees."""

import contextlib

from clients import CLIENTS
from harness import Process, Proxy, Report, expect

# Clients that report 1006 or an unclean end when FIN, RST or a Close is missing.
ENDING_SECONDS = 20


@contextlib.asynccontextmanager
async def everybody(report: Report, proxy: Proxy, backend: Process, what: str):
    """Yields all clients, each with one session that has been used."""
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        async with report.check(f"{what}: everybody is connected", backend, proxy, seconds=90):
            for flavour, make in CLIENTS.items():
                client = await stack.enter_async_context(make())
                await client.prepare(proxy.url("/page", "http"))
                await client.open(flavour, proxy.url(f"/echo?name={flavour}"))
                expect(f"{flavour}'s echo", (await client.echo(flavour, text="hello"))["same"], True)
                clients[flavour] = client
        yield clients


async def expect_everywhere(
    report: Report, clients: dict, witnesses: tuple, what: str, code: int, clean: bool = True
) -> None:
    for flavour, client in clients.items():
        async with report.check(f"{what}: {flavour} sees {code}, clean", client, *witnesses, seconds=ENDING_SECONDS):
            end = await client.closed(flavour)
            expect("(code, clean)", (end["code"], end["clean"]), (code, clean))
