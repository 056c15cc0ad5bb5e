#!/usr/bin/env python3
"""Tries the images of .ci/image out, in containers of runc: as 65532, with a read-only root, without capabilities.

    image.py BUNDLES VERSION REVISION

For root, in a network namespace with loopback. Asserts sizes, labels and users; that both run; a WebSocket through both, and its Close at
a drain; exit codes; `tidegate doctor`; and prints the time from exec to the first 200 of /readyz, of which the median counts.
"""

import base64
import contextlib
import ctypes
import json
import os
import pathlib
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request

MAX_BYTES = 8_000_000
MAX_READY_MS = 50
STARTS = 9
USER = 65532
# The kubelet's, in every container of a Pod; the images have none.
HOSTS = "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"

bundles, version, revision = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
failed = 0


def expect(true, text, but=""):
    global failed
    failed += not true
    print(f"{'ok     ' if true else 'FAILED '} {text}{'' if true else f': {but}'}")


def runc(*args, **more):
    root = bundles.parent / "runc"
    return subprocess.run(["runc", "--root", root, *map(str, args)], check=False, text=True, **more)


def bundle(target, args, env=()):
    """Writes config.json, as an image's own configuration and a manifest of k8s/ together say it."""
    folder = bundles / target
    with contextlib.suppress(FileNotFoundError):
        (folder / "config.json").unlink()
    runc("spec", "--bundle", folder).check_returncode()
    config = json.loads((folder / "config.json").read_text())
    image = json.loads((folder / "image.json").read_text())["OCIv1"]["config"]
    uid, gid = map(int, image["User"].split(":"))
    config["process"] |= {
        "terminal": False,
        "args": image["Entrypoint"] + args,
        "env": [*image.get("Env", []), *env],
        "user": {"uid": uid, "gid": gid},
        "capabilities": {kind: [] for kind in config["process"]["capabilities"]},
        "noNewPrivileges": True,
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 20000, "soft": 1024}],
    }
    config["root"]["readonly"] = True
    hosts = bundles / "hosts"
    hosts.write_text(HOSTS)
    mount = {"destination": "/etc/hosts", "type": "bind", "source": str(hosts), "options": ["bind", "ro"]}
    config["mounts"].append(mount)
    # That of this process, which the containers of a Pod share.
    config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "network"]
    (folder / "config.json").write_text(json.dumps(config))
    return image


class Container:
    """Created, and started when asked; ended and deleted in any case."""

    def __init__(self, target, number=0):
        self.id, self.log = f"tidegate-ci-{os.getpid()}-{target}-{number}", bundles / f"{target}.log"
        pidfile = bundles / f"{target}.pid"
        with open(self.log, "w") as log:
            runc("create", "--bundle", bundles / target, "--pid-file", pidfile, self.id, stdout=log, stderr=log).check_returncode()
        self.pid = int(pidfile.read_text())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Also one that was created and never started; one that has ended by now is nobody's child any more.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        runc("delete", "--force", self.id, capture_output=True)

    def start(self):
        """Gives the moment of its exec: runc's own work is not the program's."""
        before = os.readlink(f"/proc/{self.pid}/exe")
        starting = subprocess.Popen(["runc", "--root", bundles.parent / "runc", "start", self.id])
        # One that ends at once has none; what it said is shown when it is missed.
        with contextlib.suppress(FileNotFoundError):
            while os.readlink(f"/proc/{self.pid}/exe") == before:
                pass
        moment = time.monotonic()
        self.starting = starting
        return moment

    def exec(self, *args):
        return runc("exec", self.id, *args, capture_output=True)

    def end(self):
        """SIGTERM; gives the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def until(true, seconds=20):
    """Waits for it; False: it did not come."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.000_5)
    return True


class WebSocket:
    """As much of a client as an echo and a Close take."""

    def __init__(self, port, path):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        header = b""
        while not header.endswith(b"\r\n\r\n"):
            header += self.socket.recv(1)
        self.status = int(header.split()[1])

    def send(self, opcode, payload):
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self.socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)

    def receive(self):
        """Opcode and payload of a short frame; None: the end."""
        header = self.take(2)
        return (header[0] & 0x0F, self.take(header[1])) if header else None

    def take(self, count):
        taken = b""
        while len(taken) < count and (more := self.socket.recv(count - len(taken))):
            taken += more
        return taken


def main():
    # runc's children become this process's when runc is done, so that their exit codes can be asked for.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)

    images = {
        "tidegate": bundle("tidegate", ["run"], ["TIDEGATE_DRAIN__DELAY=100ms", "TIDEGATE_DRAIN__WINDOW=1s"]),
        "demo-backend": bundle("demo-backend", ["--listen", "127.0.0.1:9000"]),
    }
    for target, image in images.items():
        files = sorted(p for p in (bundles / target / "rootfs").rglob("*") if p.is_file())
        size = sum(file.stat().st_size for file in files)
        expect(size <= MAX_BYTES, f"{target}: {size / 1e6:.2f} MB, at most {MAX_BYTES / 1e6:.0f}", [f"{f.stat().st_size} {f}" for f in files])
        expect(image["User"] == f"{USER}:{USER}", f"{target}: its user is {USER}", image["User"])
        labels = {key.rsplit(".", 1)[1]: value for key, value in image["Labels"].items() if "opencontainers" in key}
        wanted = {"version": version, "revision": revision, "licenses": "Apache-2.0 OR MIT"}
        expect(wanted.items() <= labels.items() and labels["title"] and labels["description"], f"{target}: labels", labels)

    with Container("demo-backend") as backend:
        backend.start()
        expect(until(lambda: get("http://127.0.0.1:9000/healthz") == 200), "demo-backend: serves", backend.log.read_text())

        ready = []
        for number in range(STARTS):
            with Container("tidegate", number) as one:
                began = one.start()
                if not until(lambda: get("http://127.0.0.1:9090/readyz") == 200):
                    expect(False, "tidegate: gets ready", one.log.read_text())
                    return
                ready.append((time.monotonic() - began) * 1000)
                one.starting.wait()
        median = statistics.median(ready)
        text = f"tidegate: ready {median:.1f} ms after its exec, {min(ready):.1f} to {max(ready):.1f} in {STARTS} starts; at most {MAX_READY_MS}"
        expect(median <= MAX_READY_MS, text, [f"{each:.1f}" for each in ready])

        with Container("tidegate", "last") as tidegate:
            tidegate.start()
            expect(until(lambda: get("http://127.0.0.1:9090/readyz") == 200), "tidegate: serves", tidegate.log.read_text())
            for container, target in ((tidegate, "tidegate"), (backend, "demo-backend")):
                status = pathlib.Path(f"/proc/{container.pid}/status").read_text()
                ids = re.findall(r"^[UG]id:\s+(.*)$", status, re.MULTILINE)
                expect({word for each in ids for word in each.split()} == {str(USER)}, f"{target}: runs as {USER}", ids)
                capabilities = re.findall(r"^(Cap\w+):\s+(\w+)$", status, re.MULTILINE)
                expect(all(int(bits, 16) == 0 for _, bits in capabilities), f"{target}: has no capabilities", capabilities)
                expect("NoNewPrivs:\t1" in status, f"{target}: can't get any", status)
                mounts = pathlib.Path(f"/proc/{container.pid}/mountinfo").read_text()
                root = next(line.split()[5] for line in mounts.splitlines() if line.split()[4] == "/")
                expect("ro" in root.split(","), f"{target}: its root is read-only", root)

            doctor = tidegate.exec("/tidegate", "doctor")
            said = doctor.returncode in (0, 1) and "What tidegate meets in this pod" in doctor.stdout
            expect(said, "tidegate: doctor has something to say", (doctor.returncode, doctor.stdout, doctor.stderr))
            doctor = tidegate.exec("/tidegate", "doctor", "--format", "json")
            expect(bool(json.loads(doctor.stdout)), "tidegate: and says it as JSON", doctor.stdout)

            client = WebSocket(8080, "/echo")
            expect(client.status == 101, "a WebSocket is opened through both", client.status)
            client.send(1, b"hello")
            answer = client.receive()
            expect(answer == (1, b"hello"), "what it says comes back", answer)

            drain = tidegate.exec("/tidegate", "drain", "--no-wait")
            expect(drain.returncode == 0, "tidegate: the hook begins the drain", (drain.returncode, drain.stderr))
            opcode, payload = client.receive() or (None, b"\0\0")
            expect((opcode, struct.unpack(">H", payload[:2])) == (8, (1001,)), "the WebSocket gets Close 1001", (opcode, payload))
            client.send(8, payload[:2])
            expect(client.receive() is None, "and a FIN")
            expect(until(lambda: b'"drained"' in status_of()), "tidegate: stays when it is drained", status_of())
            code = tidegate.end()
            expect(code == 0, "tidegate: ends with 0 upon SIGTERM", code)
        code = backend.end()
        expect(code == 0, "demo-backend: ends with 0 upon SIGTERM", code)


def status_of():
    with urllib.request.urlopen("http://127.0.0.1:9090/status", timeout=5) as answer:
        return answer.read()


main()
print(f"{failed} failed")
sys.exit(bool(failed))
