#!/usr/bin/env python3
"""Counts what pings, limits, logs and metrics cost an echo and a session of tidegate: each is switched off, and then all of them
(.ci/costs says how to use it).

    costs.py TIDEGATE UNCOUNTED [--rounds N] [--functions]

TIDEGATE is the release build, UNCOUNTED the same without counters (`--cfg uncounted`): there is no switch for these. All is counted by
guard.py, in the same way: instructions in user mode and system calls of the only worker's thread, for an echo of 64 B and for a session,
which is connect, upgrade, one such echo and the Close handshake. What the log's own thread does for a session is told beside it.

Not in it: what the kernel does in a call, and what goes by the clock, such as the Pings themselves, of which a session that talks has none.
"""

import argparse
import statistics
import sys

sys.dont_write_bytecode = True

import guard  # noqa: E402 (no bytecode beside it)

# As tidegate is by default, where guard.py has it otherwise, but for the limit of memory: who looks how much there is left can't do so
# under valgrind. It is another thread, and a worker adds to a number for each connection.
DEFAULTS = {"websocket.ping_interval": '"25s"'}
NO_PINGS = {"websocket.ping_interval": '"0s"'}
# All that can be lifted; what can't be is as high as may be. By default rates and what is per address are lifted already.
NO_LIMITS = {
    "websocket.max_control_rate": "0",
    "websocket.max_message": '"1024GiB"',
    "websocket.max_frame": '"1024GiB"',
    "http.body_rate": "0",
}
ALL_LIMITS = {
    "limits.max_connections_per_address": "1000",
    "limits.handshakes_per_second": "100000",
    "limits.handshakes_per_address": '"100000/s"',
}
NO_LINES = {"log.sample": "0"}
NO_LOGS = {"log.filter": '"off"'}
KINDS = ("echo_64", "session")
LOAD = guard.replace(guard.Load(), **{kind: guard.MORE[kind] for kind in KINDS})


def costs(tidegate, settings):
    """Instructions and system calls of each kind, and the instructions of a session in the log's thread."""
    settings = DEFAULTS | settings
    found = guard.more_instructions(tidegate, KINDS, settings)
    calls = guard.usual_calls(guard.sessions_calls(tidegate, LOAD, settings), LOAD)
    return (
        [(found[kind][guard.WORKER], guard.in_all(calls[kind])["all"]) for kind in KINDS],
        found["session"].get("log", 0),
    )


def functions(tidegate, settings):
    """The functions of which a session has the most instructions, each with how many."""
    base = guard.Load()
    with_more = guard.replace(base, session=base.session + guard.MORE["session"])
    by_name = [
        guard.own_instructions(guard.callgrind(tidegate, load, DEFAULTS | settings)[guard.WORKER]) for load in (base, with_more)
    ]
    more = {name: (count - by_name[0][name]) / guard.MORE["session"] for name, count in by_name[1].items()}
    return sorted(more.items(), key=lambda pair: -pair[1])


def main():
    options = argparse.ArgumentParser()
    options.add_argument("tidegate")
    options.add_argument("uncounted")
    options.add_argument("--rounds", type=int, default=5, help="how often each is counted; the figures are medians (default: 5)")
    options.add_argument("--functions", action="store_true", help="also tell which functions a session's instructions are in")
    options = options.parse_args()
    rows = [
        ("as it is by default", options.tidegate, {}),
        ("with every limit", options.tidegate, ALL_LIMITS),
        ("without Pings", options.tidegate, NO_PINGS),
        ("without limits", options.tidegate, NO_LIMITS),
        ("without lines of sessions", options.tidegate, NO_LINES),
        ("without logs", options.tidegate, NO_LOGS),
        ("without metrics", options.uncounted, {}),
        ("without all four", options.uncounted, NO_PINGS | NO_LIMITS | NO_LOGS),
    ]

    def next_to(now, before):
        return f"{now:,.9g} ({now / before - 1:+.1%})".replace("%", " %") if now != before else f"{now:,.9g}"

    print("| | an echo, 64 B: instructions | system calls | a session: instructions | system calls | in the log's thread |")
    print("|---|---:|---:|---:|---:|---:|")
    # When a worker wakes is chance, and a session's instructions are a percent more or less with it: so in rounds, and the medians.
    found = [[costs(tidegate, settings) for _, tidegate, settings in rows] for _ in range(options.rounds)]
    first = None
    for (name, *_), rounds in zip(rows, zip(*found, strict=True), strict=True):
        kinds = [[statistics.median(figures) for figures in zip(*kind, strict=True)] for kind in zip(*(kinds for kinds, _ in rounds), strict=True)]
        log = statistics.median(log for _, log in rounds)
        first = first or kinds
        figures = [next_to(now, before) for kind, was in zip(kinds, first, strict=True) for now, before in zip(kind, was, strict=True)]
        print(f"| {name} | {' | '.join(figures)} | {log:,} |", flush=True)
    if options.functions:
        for name, count in functions(options.tidegate, {})[:40]:
            print(f"{count:9,.0f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
