"""The HTTP below the double of the Hub: loopback origins with a log of requests and faults; knows no repository."""

import json
import re
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, parse_qsl


@dataclass(frozen=True)
class Request:
    method: str
    target: str  # the path as it was sent, quoted, and the query
    headers: HTTPMessage
    body: bytes
    origin: str

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2]))

    @property
    def token(self) -> str | None:
        value = self.headers.get("authorization")
        return None if value is None else value.removeprefix("Bearer ")

    def asks(self, name: str) -> bool:
        """Is the query's flag set?"""
        return self.query.get(name, "").lower() in ("1", "true")

    def json(self) -> dict:
        try:
            value = json.loads(self.body)
        except ValueError:
            raise HubError(400, "the body must be JSON") from None
        if not isinstance(value, dict):
            raise HubError(400, "the body must be a JSON object")
        return value

    def form(self) -> dict[str, list]:
        """→ the fields of a form, or of a JSON object, as lists."""
        if "json" not in self.headers.get("content-type", ""):
            return parse_qs(self.body.decode())
        return {name: value if isinstance(value, list) else [value] for name, value in self.json().items()}


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: object, status: int = 200, headers: dict[str, str] | None = None) -> "Answer":
        return cls(
            json.dumps(value, default=str).encode(), status, {"Content-Type": "application/json", **(headers or {})}
        )


class HubError(Exception):
    """An answer with the Hub's error headers. `code` is what clients choose their exception by."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **content):
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer = Answer.of({"error": message, **content}, status, headers)


@dataclass
class Fault:
    pattern: str
    times: float
    status: int | None = None  # None: the connection is cut
    message: str = ""
    after_bytes: int = 0
    of_answer: bool = False


class Server:
    """Origins on free loopback ports, served by threads of this process.

    `requests` lists (method, target, status) of each request in the order of their answers; status 0 is a connection
    that was cut. `unknown` lists what had no route, and `errors` the tracebacks of the double's own mistakes.
    """

    def __init__(self):
        self.requests: list[tuple[str, str, int]] = []
        self.unknown: list[str] = []
        self.errors: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.origins: list[Origin] = []

    def listen(self, respond: Callable[[Request], Answer]) -> str:
        """→ the URL of a new origin, answered by `respond`, one request at a time."""
        origin = Origin(self, respond)
        self.origins.append(origin)
        threading.Thread(target=origin.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return origin.url

    def stop(self) -> None:
        """Closes the ports and all connections."""
        for origin in self.origins:
            origin.stop()
        self.origins.clear()

    def fail(self, pattern: str, times: float = 1, status: int = 500, message: str = "Internal Error") -> None:
        """The next `times` requests whose "METHOD target" holds the regular expression get this error, undone."""
        self.faults.append(Fault(pattern, times, status, message))

    def cut(self, pattern: str, after_bytes: int = 0, times: float = 1, of_answer: bool = False) -> None:
        """Closes the connection of the next `times` such requests.

        One with a body is cut after so many bytes of it, undone; one without, and any if `of_answer`, after so many
        bytes of the answer's body, when all that it asked for is done.
        """
        self.faults.append(Fault(pattern, times, after_bytes=after_bytes, of_answer=of_answer))

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault


class Origin(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, server: Server, respond: Callable[[Request], Answer]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.respond = server, respond
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.open: set[socket.socket] = set()

    def process_request(self, request, client_address):
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """A client that went away is no error of the double."""
        if not isinstance(sys.exception(), ConnectionError):
            self.hub.errors.append(traceback.format_exc())

    def stop(self):
        self.shutdown()
        self.server_close()
        for connection in list(self.open):  # kept alive by their clients
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave together

    def serve(self) -> None:
        origin, hub = self.server, self.server.hub
        fault = hub.take_fault(f"{self.command} {self.path}")
        cut = fault is not None and fault.status is None
        if cut and self.has_body() and not fault.of_answer:
            self.read_body(fault.after_bytes)
            return self.hang_up()
        request = Request(self.command, self.path, self.headers, self.read_body(), origin.url)
        if fault is not None and not cut:
            answer = HubError(fault.status, fault.message).answer
        else:
            answer = self.respond(request)
        if cut:
            self.send(answer, answer.body[: fault.after_bytes])
            self.wfile.flush()
            return self.hang_up()
        hub.requests.append((self.command, self.path, answer.status))
        self.send(answer, answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def respond(self, request: Request) -> Answer:
        try:
            with self.server.hub.lock:
                return self.server.respond(request)
        except HubError as error:
            return error.answer
        except Exception:
            self.server.hub.errors.append(traceback.format_exc())
            return HubError(500, "the double failed, see its `errors`").answer

    def has_body(self) -> bool:
        return "transfer-encoding" in self.headers or int(self.headers.get("content-length", 0)) > 0

    def read_body(self, limit: int | None = None) -> bytes:
        """→ the request's body, or its first bytes. Raises ConnectionError if the client goes away."""
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            length = int(self.headers.get("content-length", 0))
            wanted = length if limit is None else min(length, limit)
            body = self.rfile.read(wanted)
            if len(body) < wanted:
                raise ConnectionError
            return body
        body = b""
        while limit is None or len(body) < limit:
            line = self.rfile.readline()
            if not line:
                raise ConnectionError
            size = int(line.partition(b";")[0], 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return body

    def send(self, answer: Answer, body: bytes) -> None:
        self.send_response_only(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.server.hub.requests.append((self.command, self.path, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format, *arguments):
        """Nothing on stderr: `requests` is the log."""
