#!/usr/bin/env python3
"""What .ci/package asks of the installed program.

    package.py service ROOT UNIT      plays the service manager: starts what UNIT starts, of what is installed in ROOT, as nobody and without
                                      a capability; it must say that it serves, that it is alive, and that it stops, be reloaded and replaced,
                                      and make no system call, nor open a socket of a family, that UNIT forbids
    package.py schema FILE TIDEGATE   the JSON schema accepts the configurations that TIDEGATE accepts, and refuses the others, but for those
                                      whose mistake no schema sees. Needs jsonschema

Prints what is wrong, and exits 1.
"""

import base64
import hashlib
import json
import os
import pathlib
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import tomllib

# For each wait; an end of the world, not a measure.
LIMIT = 60
NOBODY = 65534


def directives(unit):
    """All of a unit's, in order: those that may be there more than once add up."""
    found = {}
    for line in pathlib.Path(unit).read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def calls_of(name):
    """The system calls of a set of systemd's."""
    output = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True).stdout
    calls = set()
    for word in (line.strip() for line in output.splitlines()[1:]):
        if word and not word.startswith("#"):
            calls |= calls_of(word) if word.startswith("@") else {word}
    return calls


def allowed_calls(filters):
    calls = set()
    for text in filters:
        named = set()
        for word in text.removeprefix("~").split():
            named |= calls_of(word) if word.startswith("@") else {word}
        calls = calls - named if text.startswith("~") else calls | named
    return calls


def backend(listener):
    """Shakes hands with every WebSocket client, and answers nothing but Closes."""

    def serve(stream):
        request = b""
        while b"\r\n\r\n" not in request:
            more = stream.recv(4096)
            if not more:
                return
            request += more
        key = re.search(rb"(?i)sec-websocket-key: *(\S+)", request)[1]
        accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        stream.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        while stream.recv(4096):
            # Whatever comes is a Close.
            stream.sendall(b"\x88\x02\x03\xe9")
            stream.shutdown(socket.SHUT_WR)
        stream.close()

    while True:
        stream, _ = listener.accept()
        threading.Thread(target=serve, args=(stream,), daemon=True).start()


def handshake(address):
    stream = socket.create_connection(address, timeout=LIMIT)
    stream.sendall(
        b"GET / HTTP/1.1\r\nHost: example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += stream.recv(4096) or sys.exit(f"no answer to a handshake: {answer}")
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return stream


def service(root, unit):
    unit = directives(unit)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tidegate-package-"))
    folder.chmod(0o777)
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(folder / "notify"))
    (folder / "notify").chmod(0o777)
    manager.settimeout(LIMIT)
    told = []

    def until(pattern):
        while True:
            word = manager.recv(4096).decode()
            told.append(word)
            found = re.search(pattern, word)
            if found:
                return found

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=backend, args=(listener,), daemon=True).start()
    (start,) = unit["ExecStart"]
    start = [root + word if word.startswith("/") else word for word in start.split()]
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    command += ["strace", "--follow-forks", "--quiet=all", "--output", str(folder / "calls"), *start]
    environment = {
        "PATH": os.environ["PATH"],
        "NOTIFY_SOCKET": str(folder / "notify"),
        # Shorter than the unit's: a word comes at a quarter of it.
        "WATCHDOG_USEC": "4000000",
        "TIDEGATE_LISTEN__ADDRESS": "127.0.0.1:0",
        "TIDEGATE_ADMIN__ADDRESS": "127.0.0.1:0",
        "TIDEGATE_UPSTREAM__ADDRESS": f"127.0.0.1:{listener.getsockname()[1]}",
        "TIDEGATE_DRAIN__WINDOW": "500ms",
        "TIDEGATE_DRAIN__DELAY": "100ms",
    }
    process = subprocess.Popen(command, env=environment, cwd="/", stdout=subprocess.PIPE, text=True)
    log, lines = [], queue.Queue()

    def read():
        for line in process.stdout:
            log.append(line)
            lines.put(json.loads(line))

    threading.Thread(target=read, daemon=True).start()

    def logged(message):
        while True:
            line = lines.get(timeout=LIMIT)
            if line["message"] == message:
                return line

    def address_in(message):
        host, port = logged(message)["address"].rsplit(":", 1)
        return host, int(port)

    try:
        clients, admin = address_in("listening"), address_in("admin listening")
        first = int(until(r"^READY=1\nMAINPID=(\d+)\n")[1])
        until("STATUS=serving on ")
        until("WATCHDOG=1")
        stream = handshake(clients)
        until("sessions: 1")
        reload = [start[0], "reload", "--admin", "%s:%d" % admin]
        subprocess.run(reload, env={}, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT)
        os.kill(first, signal.SIGUSR2)
        # Said by the old one, then by the new one.
        second = int(until(r"^READY=1\nMAINPID=(\d+)\n")[1])
        assert first != second, "it was not replaced"
        until(rf"^READY=1\nMAINPID={second}\n")
        until("WATCHDOG=1")
        again = handshake(clients)
        os.kill(second, signal.SIGTERM)
        until("^STOPPING=1\nEXTEND_TIMEOUT_USEC=")
        frame = again.recv(4096)
        assert frame[0] == 0x88 and frame[2:4] == (1001).to_bytes(2), f"no Close 1001: {frame}"
        for client in (stream, again):
            client.close()
        assert process.wait(LIMIT) == 0, f"it ended with {process.returncode}"
    except Exception as error:
        print("".join(log), told)
        raise error from None
    finally:
        process.kill()

    calls = (folder / "calls").read_text()
    used = set(re.findall(r"^\d+ +(\w+)\(", calls, re.M))
    assert {"execve", "epoll_wait", "accept4"} <= used, f"not all was seen: {used}"
    forbidden = used - allowed_calls(unit["SystemCallFilter"])
    families = set(re.findall(r"socket(?:pair)?\((AF_\w+)", calls))
    foreign = families - set(unit["RestrictAddressFamilies"][0].split())
    executable = re.findall(r"^.*(?:PROT_WRITE\|PROT_EXEC|mprotect\(.*PROT_EXEC).*$", calls, re.M)
    print(f"{len(used)} system calls, {sorted(families)}")
    wrong = [f"forbidden: {name}" for name in sorted(forbidden)]
    wrong += [f"a socket of {family}" for family in sorted(foreign)]
    wrong += [f"memory to write and execute: {line}" for line in executable]
    return wrong


# Mistakes that no schema sees: a value that depends on another, or on where it stands, on a file or on the host; a bound of a duration or a size; numbers in
# texts; what a language of its own is written in.
UNSEEN = """
    admin_on_listen_port admin_token duration_not_whole_seconds duration_out_of_range frame_over_default_message frame_over_message
    linger_maximum_below_linger linger_over_its_maximum log_filter log_filter_span loop_to_admin loop_to_itself memory
    network_with_host_bits proxy_protocol_of_nobody reason_too_long shared_for_all shared_headers tls_client_auth tls_client_ca tls_clients_files tls_clients_unequal
    tls_clients_without_key tls_files tls_keys_without_line_breaks tls_nameless tls_not_pem tls_other_key tls_without_key
"""


def schema(file, tidegate):
    import jsonschema

    schema = json.loads(pathlib.Path(file).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    wrong = []

    def mistakes(path):
        return [f"{error.json_path}: {error.message[:120]}" for error in validator.iter_errors(tomllib.loads(path.read_text()))]

    valid = [pathlib.Path("proxy.toml"), *sorted(pathlib.Path("tests/config/valid").glob("*.toml")), *sorted(pathlib.Path("examples").glob("*/proxy.toml"))]
    for path in valid:
        wrong += [f"{path} is refused: {mistake}" for mistake in mistakes(path)]
    unseen, refused = set(UNSEEN.split()), 0
    for path in sorted(pathlib.Path("tests/config/invalid").glob("*.toml")):
        try:
            found = mistakes(path)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue
        refused += bool(found)
        if bool(found) == (path.stem in unseen):
            wrong.append(f"{path}: {found or 'is accepted'}")
    print(f"{len(valid)} accepted, {refused} refused")
    return wrong


def main():
    if not sys.argv[2:]:
        sys.exit(__doc__)
    wrong = {"service": service, "schema": schema}[sys.argv[1]](*sys.argv[2:])
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
