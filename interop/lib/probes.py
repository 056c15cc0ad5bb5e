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

from fronts import FRONTS, front, version
from harness import run
from smuggling import Outcome, Probes, backends, smuggle
from vectors import EITHER, PASS, REFUSE, VECTORS

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


async def requests(name: str, kinds: list[str], with_faults: bool) -> dict[str, Counter]:
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
        table["(others' answers that went astray)"] = Counter({"astray": len(probes.strangers)})
        if with_faults:
            for line in probes.strangers[:20]:
                print(f"{name}: {line}")
    return table


def row(cells: list[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


async def main() -> int:
    arguments = argparse.ArgumentParser(prog="interop/probes", description=__doc__.splitlines()[0])
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FRONTS)} (all of them)")
    arguments.add_argument("--faults", action="store_true", help="a line for each vector that is neither refused nor passed on as it should")
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
    print(row(["kind", "vectors", *(f"{name}: {column}" for name in names for column in COLUMNS)]))
    for kind in tables[names[0]]:
        of_kind = [vector for vector in VECTORS if vector.kind == kind]
        rights = Counter(vector.right for vector in of_kind)
        print(row([kind, f"{len(of_kind)} ({rights[REFUSE]}, {rights[PASS]}, {rights[EITHER]})", *(tables[n][kind][c] for n in names for c in COLUMNS)]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main()))
