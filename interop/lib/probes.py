"""The same probes at tidegate, nginx and HAProxy: `interop/probes [--faults] [--only KIND] [NAME...]` prints the tables of docs/probes.md.

What stands in a table is what happened, not what ought to: nothing here fails.
"""

import argparse
import datetime
import logging
import os
import platform
import sys
from collections import Counter

from answers import ANSWERS, METHODS, recorder, strange
from fronts import FRONTS, front, version
from handshakes import PIPELINED, answer, bad_attempts, pipelined, try_all, wrong_attempts
from harness import run
from smuggling import Outcome, Probes, backends, smuggle
from vectors import EITHER, PASS, REFUSE, VECTORS
from wire import Recorder

MODES = ("new", "used", "pieces")


# From harmless to harmful; the worst that happened to a vector, in all the ways that it was sent, is its column.
COLUMNS = {
    "refused": "the client got an error, and the backend nothing",
    "passed on": "in one meaning",
    "legal, refused": "what is legal did not pass",
    "tolerated": "what must be refused was passed on in one meaning, or read over",
    "hop": "fields reached the backend that were for the proxy alone",
    "form": "the backend got a Host or a target that is none, or another than the proxy went by",
    "upgrade": "the backend was offered another protocol than WebSocket, or a handshake with a body",
    "two meanings": "the backend got what two readers may see end in two places",
    "astray": "an answer went to another request than its own",
    "reached": "the hidden request got past the proxy's rules to the backend",
}


def column(outcomes: list[Outcome]) -> str:
    kinds = {line.split(":")[0] for outcome in outcomes for line in outcome.ambiguous}
    right = outcomes[0].vector.right
    passed = [outcome.is_passed for outcome in outcomes]
    found = {
        "reached": any(outcome.smuggled for outcome in outcomes),
        "astray": any(outcome.desynchronised for outcome in outcomes),
        "two meanings": kinds & {"framing", "line"},
        "upgrade": "upgrade" in kinds,
        "form": "form" in kinds,
        "hop": "hop" in kinds,
        "tolerated": right == REFUSE and (any(passed) or any(outcome.guarded for outcome in outcomes)),
        "legal, refused": right == PASS and not all(passed),
        "passed on": any(passed),
    }
    return next((name for name, has in found.items() if has), "refused")


async def requests(name: str, kinds: list[str], with_faults: bool) -> tuple[dict[str, Counter], str]:
    """What became of the vectors, by kind; and how many answers to others went astray, of how many."""
    main, guard = backends()
    table: dict[str, Counter] = {}
    async with main, guard, front(name, main.address, guard.address) as proxy:
        probes = Probes(proxy.address, main, guard)
        for kind in kinds:
            vectors = [vector for vector in VECTORS if vector.kind == kind]
            outcomes = await smuggle(probes, vectors, MODES)
            table[kind] = Counter()
            for vector in vectors:
                mine = [outcome for outcome in outcomes if outcome.vector is vector]
                word = column(mine)
                table[kind][word] += 1
                if with_faults and word not in ("refused", "passed on"):
                    seen = [line for o in mine for line in o.faults() + o.deviations()]
                    print(f"{name}: {kind}: {vector.name} ({vector.right}, {vector.why}): {word}: {(seen or [''])[0]}")
        if with_faults:
            for line in probes.strangers[:20]:
                print(f"{name}: {line}")
    return table, f"{len(probes.strangers)} of {probes.neighbours_asked:,}"


async def tunnels(name: str, with_faults: bool) -> dict[str, str]:
    """Of the handshakes of each kind: how many were tried, and how many became a tunnel."""
    main, guard = Recorder("main backend", answer=answer), Recorder("backend of /canary/")
    table: dict[str, list[int]] = {}
    async with main, guard, front(name, main.address, guard.address) as proxy:
        for attempt in await try_all(proxy.address, main, [*bad_attempts(), *wrong_attempts()]):
            kind = attempt.kind
            if kind != "a wrong 101":
                kind = (
                    f"bad {kind}; the backend answers 101"
                    if attempt.name.endswith("101")
                    else "bad in whatever, or good; the backend answers no 101"
                )
            counts = table.setdefault(kind, [0, 0, 0])
            counts[0] += 1
            counts[1] += attempt.tunnelled
            counts[2] += attempt.reset
            if with_faults and attempt.tunnelled:
                print(f"{name}: {attempt.kind}: {attempt.name}: {attempt.status}, tunnelled")
    found = {kind: f"{tunnelled} of {tried}" for kind, (tried, tunnelled, _) in table.items()}
    async with recorder() as backend, front(name, backend.address, backend.address) as proxy:
        faults = await strange(proxy.address)
        # What somebody else gets, and what the client itself may read in two ways.
        astray = [n for n, lines in faults.items() if any("answered for" in line or "/mine/" in line for line in lines)]
        found["strange answers of the backend that went to another request"] = f"{len(astray)} of {len(ANSWERS) * len(METHODS)}"
        found["strange answers that reached their client in two meanings"] = f"{len(faults) - len(astray)} of {len(ANSWERS) * len(METHODS)}"
        if with_faults:
            for kind, lines in faults.items():
                print(f"{name}: answers: {kind}: {lines[0]}")
    found["RST seen by the client"] = str(sum(counts[2] for counts in table.values()))
    early, late = await pipelined(name, "403")
    found[f"{PIPELINED:,} requests behind a handshake: bytes at the backend before its answer, a 403"] = f"{early:,}"
    found["and in all"] = f"{late:,}"
    return found


def row(cells: list[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def table_head(cells: list[object]) -> str:
    return "\n".join([row(cells), row(["---", *("---:" for _ in cells[1:])])])


async def main() -> int:
    arguments = argparse.ArgumentParser(prog="interop/probes", description=__doc__.splitlines()[0])
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FRONTS)} (all of them)")
    arguments.add_argument(
        "--faults",
        action="store_true",
        help="a line for each vector that is neither refused nor passed on as it should",
    )
    arguments.add_argument("--only", help="vectors of this kind alone")
    options = arguments.parse_args()
    # It tells of each write to a connection that a peer has reset.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    names = options.names or list(FRONTS)
    kinds = [kind for kind in dict.fromkeys(vector.kind for vector in VECTORS) if options.only in (None, kind)]
    versions = {name: await version(name) for name in names}
    print(
        f"{', '.join(f'{name} {versions[name]}' for name in names)}; {datetime.date.today()}, Linux {platform.release().split('-')[0]},"
        f" {os.cpu_count()} cores, Python {platform.python_version()}\n"
    )
    tables = {name: await requests(name, kinds, options.faults) for name in names}
    print(table_head(["kind", "vectors (to be refused, legal, either)", "", *COLUMNS]))
    for kind in kinds:
        of_kind = [vector for vector in VECTORS if vector.kind == kind]
        rights = Counter(vector.right for vector in of_kind)
        count = f"{len(of_kind)} ({rights[REFUSE]}, {rights[PASS]}, {rights[EITHER]})"
        for name in names:
            print(row([kind, count, name, *(tables[name][0][kind][column] or "" for column in COLUMNS)]))
    print(f"\nAnswers to others that went astray: {', '.join(f'{name} {tables[name][1]}' for name in names)}.\n")
    if options.only is None:
        found = {name: await tunnels(name, options.faults) for name in names}
        print(table_head(["tunnels", *names]))
        for kind in found[names[0]]:
            print(row([kind, *(found[name][kind] for name in names)]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main()))
