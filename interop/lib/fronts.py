"""tidegate, nginx and HAProxy, each in front of the same two backends: one for everything, and one for what is below /canary/.

The peers have the few lines for WebSockets that their manuals give, connections to the backend that are kept and shared, and X-Forwarded-For:
what tidegate does by itself.
"""

import asyncio
import os
import re
import socket
import tempfile
from pathlib import Path

from harness import WORK, Failed, Process, Proxy

FRONTS = ("tidegate", "nginx", "haproxy")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Tidegate(Proxy):
    """With a route for the guard."""

    def __init__(self, main: str, guard: str, settings: dict[str, str] | None = None) -> None:
        self._guard = guard
        super().__init__(main, settings=settings)

    async def __aenter__(self):
        WORK.mkdir(exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="tidegate-", dir=WORK)
        file = Path(self._folder.name) / "proxy.toml"
        file.write_text(f'[[route]]\npath = "/canary/*"\nupstream = "{self._guard}"\n')
        # One worker: all clients share what is kept open to the backend.
        self._settings = {"TIDEGATE_CONFIG": str(file), "TIDEGATE_LISTEN__WORKERS": "1", **self._settings}
        return await super().__aenter__()

    async def __aexit__(self, *_) -> None:
        await super().__aexit__()
        self._folder.cleanup()


class Peer(Process):
    """nginx or HAProxy, from packages of that name."""

    def __init__(self, name: str, main: str, guard: str) -> None:
        super().__init__(name)
        # Neither of them tells which port it was given, so one is looked for.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = "127.0.0.1:%d" % free.getsockname()[1]
        self._main, self._guard = main, guard

    async def __aenter__(self):
        WORK.mkdir(exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix=f"{self.name}-", dir=WORK)
        folder = Path(self._folder.name)
        file = folder / "conf"
        file.write_text(self._haproxy() if self.name == "haproxy" else self._nginx(folder))
        command = ["haproxy", "-db", "-f", file] if self.name == "haproxy" else ["nginx", "-p", folder, "-c", file]
        await self.start(*command, env={**os.environ, "PATH": PATH})
        host, port = self.address.split(":")
        for _ in range(100):
            try:
                socket.create_connection((host, int(port)), 1).close()
                return self
            except OSError:
                await asyncio.sleep(0.05)
        await self.stop()
        raise Failed(f"{self.name} does not listen: {self.lines[-5:]}")

    async def __aexit__(self, *_) -> None:
        await self.stop()
        self._folder.cleanup()

    def _haproxy(self) -> str:
        return f"""
global
  maxconn 4000
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  timeout http-request 10s
  timeout tunnel 1h
  option forwardfor
  http-reuse always
frontend in
  bind {self.address}
  use_backend guard if {{ path_beg /canary/ }}
  default_backend main
backend main
  server main {self._main}
backend guard
  server guard {self._guard}
"""

    def _nginx(self, folder: Path) -> str:
        temporary = "".join(
            f"  {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        fields = """
      proxy_http_version 1.1;
      proxy_set_header Host $host;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
"""
        return f"""
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 4000; }}
http {{
  access_log off;
{temporary}
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  upstream main {{ server {self._main}; keepalive 16; }}
  upstream guard {{ server {self._guard}; keepalive 16; }}
  server {{
    listen {self.address};
    location / {{
      proxy_pass http://main;{fields}    }}
    location /canary/ {{
      proxy_pass http://guard;{fields}    }}
  }}
}}
"""


def front(name: str, main: str, guard: str, settings: dict[str, str] | None = None) -> Tidegate | Peer:
    return Tidegate(main, guard, settings) if name == "tidegate" else Peer(name, main, guard)


async def version(name: str) -> str:
    """As the program says it."""
    command = [Proxy.binary(), "--version"] if name == "tidegate" else [name, "-v"]
    child = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PATH": PATH},
    )
    printed, _ = await child.communicate()
    found = re.search(r"\d+\.\d+[\w.+-]*", printed.decode(errors="replace"))
    return found.group() if found else "?"
