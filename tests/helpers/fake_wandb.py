"""A W&B server on this machine that misbehaves in a chosen way."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_RUN = {
    "id": "run",
    "name": "name",
    "displayName": "name",
    "config": "{}",
    "summaryMetrics": "{}",
    "project": {"id": "project", "name": "project", "entity": {"id": "entity", "name": "entity"}},
}
# What the client asks for before it takes a run for started; the parts that a query did not ask for do no harm
_ANSWER = {
    "viewer": {"id": "viewer", "entity": "entity", "username": "user", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None},
    "upsertBucket": {"bucket": _RUN, "inserted": True},
    "model": {"bucket": None},
}


@contextmanager
def misbehaving_server(how: str) -> Iterator[str]:
    """Its address.

    Args:
        how: "500" to every request; "hangs": takes requests and never answers; "hangs later": accepts the run, then
            hangs; "500 later": the same with errors.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if how.endswith("later") and "graphql" in self.path:
                body = json.dumps({"data": _ANSWER}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            if how.startswith("hangs"):
                time.sleep(3600)
            self.send_response(500)
            self.end_headers()

        do_GET = do_PUT = do_POST

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
