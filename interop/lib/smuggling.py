"""Whether a request can be brought past the proxy within another: the vectors, tried one after the other, and a verdict on each.

Each is sent on a new connection, on one that was used before, and in small pieces. Behind it comes a request with a mark, then one of a
new client, and other clients ask all the while over the same connections to the backend: each must get its own answer.
"""

import asyncio
import posixpath
import re
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from answers import ANSWERS, METHODS, recorder, strange
from fronts import Tidegate
from harness import WORK, Failed, Report
from tls import Authority
from vectors import EITHER, PASS, REFUSE, VECTORS, Vector
from wire import Client, Connection, Ended, Message, Recorder, plain_answer

MODES = ("new", "used", "pieces")
# To an answer; who does not answer gets FIN, and as long again.
ANSWER_SECONDS = 4.0
NEIGHBOURS = 2
OURS = re.compile(rb"/(other|mark|next|before)/")


def leads_to_canary(target: bytes) -> bool:
    """Whether a backend may take this for a path below /canary/: decoded, without parameters and dots."""
    path = unquote(target.split(b"?")[0].decode("latin-1")).replace("\\", "/")
    path = re.sub(r";[^/]*", "", re.sub("^https?://[^/]*", "", path))
    return posixpath.normpath("/" + path.lstrip("/")).startswith("/canary")


@dataclass
class Outcome:
    """What became of a vector."""

    vector: Vector
    mode: str
    answers: list[Message] = field(default_factory=list)
    # How the connection ended before the mark was answered.
    end: Ended | None = None
    is_marked: bool = False
    waited: bool = False
    whole: list[Message] = field(default_factory=list)
    guarded: list[Message] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)
    smuggled: list[str] = field(default_factory=list)
    desynchronised: list[str] = field(default_factory=list)
    said: str = ""

    @property
    def status(self) -> int:
        """Of the first answer; 0: none."""
        return self.answers[0].status if self.answers else 0

    @property
    def is_passed(self) -> bool:
        return any(not leads_to_canary(request.target) for request in self.whole)

    def faults(self) -> list[str]:
        """What a backend, or another client, may suffer from."""
        return self.smuggled + self.ambiguous + self.desynchronised

    def deviations(self) -> list[str]:
        """Where it is not what the RFC says, without anybody's harm."""
        vector, found = self.vector, []
        if self.is_passed and vector.right == REFUSE:
            found.append("is passed on")
        if not self.is_passed and vector.right == PASS:
            found.append(f"is legal, and gets {self.status or 'no answer'}")
        if vector.right == REFUSE and self.guarded:
            found.append("what stands behind it is read as a request")
        if vector.must_close and self.is_marked:
            found.append("the connection goes on")
        if not self.is_passed and not vector.is_cut and not vector.is_foreign and self.status < 400:
            found.append(f"is not passed on, and gets {self.status or 'no answer'}")
        if self.end is not None and self.end.reset:
            found.append("the client sees RST")
        if self.waited and vector.right != EITHER and not vector.is_cut:
            found.append("is waited with")
        return found


class Probes:
    """Tries vectors at a front, and has its two backends."""

    def __init__(self, address: str, main: Recorder, guard: Recorder, tls: ssl.SSLContext | None = None) -> None:
        self.address, self.main, self.guard, self.tls = address, main, guard, tls
        self.strangers: list[str] = []
        self.neighbours_asked = 0
        self._number = 0

    async def neighbour(self, name: str) -> None:
        """Asks on and on over connections that are kept, and sees whether the answers are its own."""
        asked = 0
        while True:
            client = await Client.open(self.address, self.tls)
            try:
                while True:
                    asked += 1
                    target = f"/other/{name}/{asked}"
                    client.send(f"GET {target} HTTP/1.1\r\nHost: probe.test\r\n\r\n".encode())
                    response = await client.response()
                    self.neighbours_asked += 1
                    if saw(response) != target:
                        self.strangers.append(f"{target} is answered by {response.line!r}, {saw(response)}")
                    await asyncio.sleep(0.005)
            except Ended as ended:
                # A connection may be closed between two requests, and by nothing else than FIN.
                if ended.reset or ended.rest:
                    self.strangers.append(f"/other/{name}/{asked}: {ended}")
            finally:
                client.close()

    async def attempt(self, vector: Vector, mode: str) -> Outcome:
        self._number += 1
        number = self._number
        outcome = Outcome(vector, mode)
        # What is there by now is not this one's.
        before = [len(recorder.requests) for recorder in (self.main, self.guard)]
        self.main.touched.clear()
        client = await Client.open(self.address, self.tls)
        try:
            await self._converse(client, vector, number, mode, outcome)
        finally:
            client.close()
        other = await Client.open(self.address, self.tls)
        try:
            other.send(f"GET /next/{number} HTTP/1.1\r\nHost: probe.test\r\nConnection: close\r\n\r\n".encode())
            async with asyncio.timeout(5):
                response = await other.response()
            if saw(response) != f"/next/{number}":
                outcome.desynchronised.append(f"the next client got {response.line!r}, {saw(response)}")
        except (Ended, TimeoutError) as error:
            outcome.desynchronised.append(f"the next client got {error!r}")
        finally:
            other.close()
        outcome.whole = [r for r in self.main.requests[before[0] :] if not OURS.match(r.target)]
        outcome.guarded = self.guard.requests[before[1] :]
        self._judge(outcome)
        return outcome

    async def _converse(self, client: Client, vector: Vector, number: int, mode: str, outcome: Outcome) -> None:
        data = vector.data(number)
        try:
            async with asyncio.timeout(10):
                if mode == "used":
                    client.send(f"GET /before/{number} HTTP/1.1\r\nHost: probe.test\r\n\r\n".encode())
                    if saw(await client.response()) != f"/before/{number}":
                        outcome.desynchronised.append("the request before has another's answer")
                if mode == "pieces":
                    most = max(19, len(data) // 50)
                    await client.send_in_pieces(data, [1, 2, most, 7, 3])
                else:
                    client.send(data)
                if vector.is_cut:
                    await asyncio.sleep(0.02)
                    client.fin()
                try:
                    async with asyncio.timeout(ANSWER_SECONDS):
                        outcome.answers.append(await client.response(vector.method))
                except TimeoutError:
                    outcome.waited = True
                    client.fin()
                    outcome.answers.append(await client.response(vector.method))
                mark = f"/mark/{number}"
                if not (vector.is_cut or outcome.waited):
                    client.send(f"GET {mark} HTTP/1.1\r\nHost: probe.test\r\nConnection: close\r\n\r\n".encode())
                while True:
                    response = await client.response()
                    outcome.answers.append(response)
                    if saw(response) == mark:
                        outcome.is_marked = True
        except Ended as ended:
            outcome.end = ended
            if ended.rest and not vector.is_foreign:
                outcome.desynchronised.append(f"the client got {ended.rest[:80]!r}, which is no response")
        except TimeoutError:
            outcome.said = "no end within 10 s"

    def _judge(self, outcome: Outcome) -> None:
        vector = outcome.vector
        for request in outcome.whole:
            where = f"{request.line[:80]!r} at the backend"
            if leads_to_canary(request.target):
                outcome.smuggled.append(where)
            outcome.ambiguous += [f"{problem} ({where})" for problem in request.problems]
            if not any(value.endswith(b"127.0.0.1") for value in request.all(b"x-forwarded-for")):
                outcome.ambiguous.append(f"hop: no X-Forwarded-For of the proxy ({where})")
        mine = [r for r in outcome.whole if not leads_to_canary(r.target)]
        if len(mine) > 1:
            outcome.ambiguous.append(f"framing: {len(mine)} requests of one: {[r.line for r in mine]}")
        for request in mine:
            if vector.body is not None and request.body != vector.data_of(vector.body, self._number):
                outcome.ambiguous.append(f"framing: the body is {request.body[:80]!r}")
            if vector.target is not None and request.target != vector.data_of(vector.target, self._number):
                outcome.ambiguous.append(f"form: the target is {request.target[:80]!r}")
            if vector.host is not None and request.all(b"host") != [vector.host.encode()]:
                outcome.ambiguous.append(f"form: Host is {request.all(b'host')}")
        for connection in {id(connection): connection for connection in self.main.touched}.values():
            if connection.broken:
                outcome.ambiguous.append(f"framing: the backend can't read it: {connection.broken}")
            elif begun := unfinished(connection):
                # A body that turned out to be none was on its way: the header is all that may be wrong then.
                outcome.ambiguous += [f"{problem} (begun, {begun.line[:60]!r})" for problem in begun.problems]
                if leads_to_canary(begun.target):
                    outcome.smuggled.append(f"{begun.line[:80]!r}, without an end")
        if outcome.guarded and vector.right != REFUSE and not vector.is_honest:
            outcome.desynchronised.append(f"{outcome.guarded[0].line!r} was found in a body")
        # Answers come in the order of what was asked, and are for nobody else.
        for index, answer in enumerate(outcome.answers):
            seen = saw(answer)
            if seen is None or (index == 0 and not seen.startswith(("/mark/", "/other/", "/next/", "/before/"))):
                continue
            if seen == f"/mark/{self._number}" and index > 0:
                continue
            if leads_to_canary(seen.encode()) and outcome.guarded and (vector.is_honest or vector.right == REFUSE):
                continue
            outcome.desynchronised.append(f"answer {index + 1} is for {seen}")
        if outcome.answers and outcome.answers[0].status == 101:
            outcome.smuggled.append("a tunnel")


def unfinished(connection: Connection) -> Message | None:
    begun = connection.begun
    return begun if begun is not None and not OURS.match(begun.target) else None


def saw(response: Message) -> str | None:
    """The target that the backend answered; None: the proxy's own answer."""
    values = response.all(b"x-saw")
    return values[0].decode() if values else None


def too_early(request: Message) -> bytes | None:
    if request.target.startswith(b"/early/"):
        return plain_answer(request, status="417 Expectation Failed")
    return None


async def smuggle(probes: Probes, vectors: list[Vector], modes: tuple[str, ...] = MODES) -> list[Outcome]:
    neighbours = [asyncio.create_task(probes.neighbour(str(index))) for index in range(NEIGHBOURS)]
    try:
        return [await probes.attempt(vector, mode) for mode in modes for vector in vectors]
    finally:
        for neighbour in neighbours:
            neighbour.cancel()
        await asyncio.gather(*neighbours, return_exceptions=True)


def backends() -> tuple[Recorder, Recorder]:
    return Recorder("main backend", early=too_early), Recorder("backend of /canary/")


def told(o: Outcome) -> list[str]:
    """All that is wrong with an attempt, one line each."""
    wrong = o.faults() + o.deviations() + ([o.said] if o.said else [])
    return [f"{o.vector.name} ({o.mode}, {o.vector.right}, {o.vector.why}): {fault}" for fault in wrong]


async def judged(report: Report, what: str, probes: Probes, proxy: Tidegate, modes: tuple[str, ...]) -> list[Outcome]:
    """All vectors, a check for each kind of them; and what others saw meanwhile."""
    outcomes: list[Outcome] = []
    for kind in dict.fromkeys(vector.kind for vector in VECTORS):
        # Within TLS a client here can't end its own direction alone.
        vectors = [vector for vector in VECTORS if vector.kind == kind and not (probes.tls and vector.is_cut)]
        async with report.check(
            f"{what}, {kind}: {len(vectors)} vectors, ways to send each: {len(modes)}", proxy, seconds=120
        ):
            found = await smuggle(probes, vectors, modes)
            outcomes += found
            wrong = [line for o in found for line in told(o)]
            if wrong:
                raise Failed("\n     ".join([f"{len(wrong)} faults", *wrong]))
    async with report.check(f"{what}: who asks meanwhile gets their own answers", proxy):
        # How often they asked is a matter of the machine; that they did, all the time, is what counts.
        if probes.strangers or probes.neighbours_asked < 100:
            raise Failed(f"of {probes.neighbours_asked}: {probes.strangers[:10]}")
    async with report.check(f"{what}: the backend's connections were shared, and never broken", proxy):
        broken = [connection.broken for connection in probes.main.connections if connection.broken]
        used = sum(len(connection.requests) > 1 for connection in probes.main.connections)
        if broken or not used:
            raise Failed(f"broken: {broken}, used more than once: {used}")
    return outcomes


async def smuggling(report: Report, options) -> None:
    if options.direct:
        print("skip smuggling: it is tidegate's work")
        return
    main, guard = backends()
    async with main, guard, Tidegate(main.address, guard.address) as proxy:
        probes = Probes(proxy.address, main, guard)
        outcomes = await judged(report, "smuggling", probes, proxy, MODES)
        passed = sum(outcome.is_passed for outcome in outcomes)
        print(
            f"     {len(VECTORS)} vectors, {len(outcomes)} attempts: {passed} passed on in one meaning, {len(outcomes) - passed} not;"
            f" {probes.neighbours_asked} requests of others meanwhile"
        )
    async with recorder() as backend, Tidegate(backend.address, backend.address) as proxy:
        what = f"smuggling, answers: {len(ANSWERS)} strange ones, to {len(METHODS)} methods each"
        async with report.check(what, proxy, seconds=60):
            faults = await strange(proxy.address)
            wrong = [f"{name}: {line}" for name, lines in faults.items() for line in lines]
            if wrong:
                raise Failed("\n     ".join([f"{len(wrong)} faults", *wrong]))
    main, guard = backends()
    with tempfile.TemporaryDirectory(prefix="smuggling-", dir=WORK) as folder:
        authority = await Authority(Path(folder) / "ours").make()
        settings = {
            "TIDEGATE_LISTEN__TLS_CERTIFICATE": str(authority.certificate),
            "TIDEGATE_LISTEN__TLS_KEY": str(authority.key),
        }
        async with main, guard, Tidegate(main.address, guard.address, settings) as proxy:
            tls = ssl.create_default_context(cafile=str(authority.ca))
            await judged(report, "smuggling, TLS", Probes(proxy.address, main, guard, tls), proxy, ("used",))
