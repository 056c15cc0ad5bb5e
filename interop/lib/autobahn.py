"""Autobahn cases direct and through tidegate: a relay is right when nobody can tell the two apart.

Not "every case is OK", which would be the backend's merit: what passes is a case whose outcomes through tidegate have
all been seen direct. Some cases race by themselves, therefore sets of outcomes over several runs are compared.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from harness import WORK, Backend, Failed, Proxy, run
from multiplexed import MULTIPLEXED, SAID, Configured
from tls import Authority

CHAPTERS = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"]
# A thousand messages with compression a case: minutes of the machine's time, and nothing in them that could race.
LONG_CHAPTERS = ["12.*", "13.*"]
ONE_RUN = "--one-run"

# case -> outcome -> the fuzzer's words about it
Outcomes = dict[str, dict[str, str]]


def one_run(url: str, output: str, parallel: str, *cases: str) -> None:
    """In a process of its own: writes one JSON object, case -> [outcome, explanation]."""
    from kosoku import FailureError, run_fuzzingclient

    try:
        results = asyncio.run(run_fuzzingclient(url, list(cases) or None, None, concurrency=int(parallel)))
    except FailureError as failure:
        # That a case failed is no failure of this run; the error carries the results of all cases.
        results = failure.results
    except ValueError as error:
        sys.exit(f"kosoku: {error}")
    found = {}
    for result in results:
        code = "no Close" if result.remote_close_code is None else f"Close {result.remote_close_code}"
        clean = "clean" if result.was_clean else f"unclean ({result.was_not_clean_reason})"
        outcome = f"{result.behavior.value}, {result.behavior_close.value}, {code}, {clean}"
        found[result.case_id] = [outcome, f"{result.result} {result.result_close}"]
    Path(output).write_text(json.dumps(found))
    # kosoku 0.1.0 now and then aborts while the interpreter ends; its work is done by then.
    os._exit(0)


async def run_cases(address: str, cases: list[str], parallel: int, seconds: float) -> tuple[dict, float]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="autobahn-", dir=WORK) as directory:
        output = Path(directory) / "outcomes.json"
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            ONE_RUN,
            f"ws://{address}/plain",
            str(output),
            str(parallel),
            *cases,
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(seconds):
                status = await child.wait()
        except TimeoutError:
            raise Failed(f"a run of the cases did not end within {seconds:g} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if status != 0 or not output.exists():
            raise Failed(f"a run of the cases ended with status {status}")
        return json.loads(output.read_text()), time.monotonic() - start


def merge(outcomes: Outcomes, found: dict) -> None:
    for case, (outcome, explanation) in found.items():
        outcomes[case][outcome] = explanation


def order(case: str) -> list[int]:
    return [int(part) for part in case.split(".")]


def is_better(news: set[str], direct: set[str]) -> bool:
    """Whether what was seen only through tidegate differs from direct outcomes in being OK where they are NON-STRICT.

    Such a case asks whether an echo still gets out before the next frame turns out to be wrong. That is a race at the
    backend, which one more hop shifts to the better; direct it may come out this way once in twenty runs.
    """
    return bool(news) and all(
        outcome.startswith("OK, ") and outcome.replace("OK, ", "NON-STRICT, ", 1) in direct for outcome in news
    )


def print_table(direct: Outcomes, through: Outcomes | None, cases: list[str]) -> None:
    print(f"{'case':9} {'':8} outcome: behavior, at the close, code, end")
    for case in cases:
        label = case
        for side, outcomes in (("direct", direct), ("tidegate", through)):
            if outcomes is None:
                continue
            for outcome in sorted(outcomes[case]) or ["(no outcome)"]:
                print(f"{label:9} {side:8} {outcome}")
                label = ""
        for outcome in sorted(set((through or direct)[case]) - set(direct[case])):
            print(f"{'':9} {'':8} ({through[case][outcome]})")


async def compare(options: argparse.Namespace) -> int:
    cases = [*CHAPTERS, "9.*"] if options.all else options.cases or CHAPTERS
    WORK.mkdir(exist_ok=True)
    direct: Outcomes = defaultdict(dict)
    through: Outcomes = defaultdict(dict)
    took: dict[str, list[float]] = {"direct": [], "tidegate": []}
    async with contextlib.AsyncExitStack() as stack:
        backend = await stack.enter_async_context(Backend())
        # One each: a Python backend has one core's strength.
        backend_behind = await stack.enter_async_context(Backend())
        if options.multiplexed:
            # The same backend, behind one that speaks HTTP/2.
            backend_behind = await stack.enter_async_context(Configured("haproxy", backend_behind.address))
        behind = backend_behind.address
        inner = None
        to_clients, to_backend = {}, {}
        if options.tls:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="autobahn-", dir=WORK))
            authority = await Authority(Path(folder) / "ours").make()
            to_clients = {
                "TIDEGATE_LISTEN__TLS_CERTIFICATE": str(authority.certificate),
                "TIDEGATE_LISTEN__TLS_KEY": str(authority.key),
            }
            to_backend = authority.settings() if options.streams else {}
        if options.streams:
            # Another tidegate, whose client is the first.
            inner = await stack.enter_async_context(Proxy(behind, settings=to_clients))
            behind = inner.address
        settings = {**MULTIPLEXED, **to_backend} if options.multiplexed or options.streams else to_clients
        proxy = await stack.enter_async_context(Proxy(behind, options.direct, settings))
        reached = proxy
        if options.tls and not options.streams:
            # The fuzzer speaks no TLS itself.
            reached = await stack.enter_async_context(Configured("haproxy", proxy.address, authority.ca))
        sides = [("direct", backend.address, direct)]
        if not options.direct:
            sides.append(("tidegate", reached.address, through))
        try:

            async def one_side(side: str, address: str, outcomes: Outcomes, wanted: list[str], parallel: int) -> None:
                found, seconds = await run_cases(address, wanted, parallel, options.seconds)
                took[side].append(seconds)
                print(f"{side:8} {len(found)} cases in {seconds:.1f} s", flush=True)
                late = [case for case, (_, explanation) in found.items() if "did not finish" in explanation]
                if late and wanted == LONG_CHAPTERS:
                    # The fuzzer gives each of these 60 s, which a busy machine may exceed: once more, said aloud.
                    print(f"{side:8} again, for want of time: {' '.join(late)}", flush=True)
                    found |= (await run_cases(address, late, 1, options.seconds))[0]
                merge(outcomes, found)

            for _ in range(options.runs):
                # In turns, so that both meet the same load of the machine.
                for side in sides:
                    await one_side(*side, cases, options.parallel)
            if options.all:
                # One case at a time, since they are measured against the clock; both sides at once, since each of them
                # keeps one core busy.
                await asyncio.gather(*(one_side(*side, LONG_CHAPTERS, 1) for side in sides))

            def differing() -> list[str]:
                if options.direct:
                    return []
                return sorted(
                    (
                        case
                        for case in {*direct, *through}
                        if not through[case] or not set(through[case]) <= set(direct[case])
                    ),
                    key=order,
                )

            # A rare race may not have shown itself direct: what differs gets more chances there, and only there.
            for _ in range(options.again):
                if not (again := [case for case in differing() if case.split(".")[0] + ".*" not in LONG_CHAPTERS]):
                    break
                print(f"direct again: {' '.join(again[:20])}{' ...' if len(again) > 20 else ''}", flush=True)
                merge(direct, (await run_cases(backend.address, again, 1, options.seconds))[0])

            if any(SAID in line for line in proxy.lines):
                raise Failed("not multiplexed")
            opened = [line for line in (inner or proxy).lines if '"message":"open"' in line]
            if inner and not all('"http":"h2"' in line for line in opened):
                raise Failed("not on streams")
            if options.tls and not all('"tls":"1.3"' in line for line in opened):
                raise Failed("not over TLS")
            status = 0 if options.direct else await proxy.stop()
            if status != 0:
                raise Failed(f"tidegate ended with {status} after the cases")
        except Failed:
            for line in proxy.lines[-60:]:
                print(f"     tidegate: {line[:400]}")
            raise

    differ = differing()
    better = [case for case in differ if is_better(set(through[case]) - set(direct[case]), set(direct[case]))]
    failed = [case for case in differ if case not in better]
    if better:
        print(f"better than direct (OK, not NON-STRICT), passed: {' '.join(better)}")
    if racing := sorted((case for case in direct if len(direct[case]) > 1), key=order):
        print(f"race by themselves: {' '.join(racing)}")
    if options.direct and racing:
        print_table(direct, None, racing)
    if failed:
        print_table(direct, through, failed)
        for line in proxy.lines[-20:]:
            print(f"     tidegate: {line[:400]}")
    for side, seconds in took.items():
        if seconds:
            print(f"{side:8} {sum(seconds):.1f} s in all")
    print(f"{len({*direct, *through}) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def main() -> int:
    arguments = argparse.ArgumentParser(prog="interop/autobahn", description=__doc__.splitlines()[0])
    arguments.add_argument("cases", nargs="*", metavar="CASE", help=f"id or glob ({' '.join(CHAPTERS)})")
    arguments.add_argument("--all", action="store_true", help="all 517 cases; chapters 12 and 13 once a side")
    arguments.add_argument("--runs", type=int, default=3, help="on each side (3)")
    arguments.add_argument("--again", type=int, default=10, help="further direct runs of what differs (10)")
    arguments.add_argument("--parallel", type=int, default=8, help="cases at once (8)")
    arguments.add_argument("--seconds", type=float, help="bound of one run (120; with --all 1800)")
    arguments.add_argument("--multiplexed", action="store_true", help="over HTTP/2 to HAProxy in front of the backend")
    arguments.add_argument("--streams", action="store_true", help="over HTTP/2 to another tidegate in front of the backend")
    arguments.add_argument("--tls", action="store_true", help="clients speak TLS with tidegate: HAProxy's, or with --streams another tidegate's")
    arguments.add_argument("--direct", action="store_true", help="without tidegate: which cases race by themselves?")
    options = arguments.parse_args()
    if options.seconds is None:
        options.seconds = 1800 if options.all else 120
    try:
        return run(compare(options))
    except Failed as error:
        print(f"FAIL {error}")
        print("0 passed, 1 failed")
        return 1


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE_RUN]:
        one_run(*sys.argv[2:])
    sys.exit(main())
