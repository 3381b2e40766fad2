"""The sockets of the Hub of the tests: requests read, answers sent, and connections cut where a fault wants it."""

from __future__ import annotations

import socket
import sys
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from tests.fake_hub.exchange import Answer, Exchange


if TYPE_CHECKING:
    from tests.hub_server import HubServer


class Server(ThreadingHTTPServer):
    """Knows its open connections, so that it can go down at once."""

    allow_reuse_port = True
    daemon_threads = False  # so that server_close waits for them
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], hub: HubServer) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        for connection in list(self._open):
            cut(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client may go when it likes
            self.hub.errors.append(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for headers and body
    disable_nagle_algorithm = True
    server: Server

    def handle_one_request(self) -> None:
        self.close_connection = True
        self.raw_requestline = self.rfile.readline(65537)
        if self.raw_requestline and self.parse_request():
            headers = {name.lower(): value for name, value in self.headers.items()}
            self._serve(self.server.hub, Exchange(self.command, self.path, headers))

    def _serve(self, hub: HubServer, exchange: Exchange) -> None:
        fault = hub.begin(exchange)
        if "Transfer-Encoding" in self.headers:
            raise NotImplementedError(f"{exchange.line} must say its Content-Length, but came in chunks.")
        length = int(self.headers.get("Content-Length", 0))
        cut = fault.after_bytes if fault is not None and fault.drop else None
        if fault is not None and hub.stopping.wait(fault.delay):
            return self._hang_up()
        self._read(exchange, length if cut is None else min(cut, length - 1))
        if len(exchange.body) < length:  # cut, or the client has gone
            return self._hang_up()
        answer = fault.answer if fault is not None and fault.answer is not None else hub.answer(exchange)
        if fault is not None and fault.lose_answer:
            return self._hang_up()
        return self._send(exchange, answer, cut)

    def _read(self, exchange: Exchange, length: int) -> None:
        while len(exchange.body) < length:
            chunk = self.rfile.read1(min(2**16, length - len(exchange.body)))
            if not chunk:
                return
            exchange.body += chunk

    def _send(self, exchange: Exchange, answer: Answer, cut: int | None) -> None:
        body = answer.body
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | answer.headers
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        exchange.status = answer.status if cut is None else 0  # first, for the client may look at once
        try:
            self.wfile.write(b"" if exchange.method == "HEAD" else body[:cut])
            self.wfile.flush()
        except OSError:
            exchange.status = 0
            raise
        if cut is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        cut(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `HubServer.requests` has it all."""


def cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other end was first
