"""A web server for the files of a directory, which counts what it is asked for."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Web:
    address: str
    asked: list[str] = field(default_factory=list)
    """Each request as `GET /rows.jsonl`, without the query."""

    def num_downloads(self, name: str) -> int:
        return self.asked.count(f"GET /{name}")


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, web: Web, **kwargs: Any) -> None:
        self._web = web
        super().__init__(*args, **kwargs)

    def log_message(self, format: str, *args: Any) -> None:
        self._web.asked.append(f"{self.command} {self.path.partition('?')[0]}")

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Last-Modified":
            keyword, value = "ETag", hashlib.sha256(Path(self.translate_path(self.path)).read_bytes()).hexdigest()
        super().send_header(keyword, value)


@contextmanager
def serving(directory: Path) -> Iterator[Web]:
    web = Web("")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, web=web, directory=str(directory))) as server:
        web.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield web
        server.shutdown()
