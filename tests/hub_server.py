"""A Hugging Face Hub on loopback for tests: the HTTP that huggingface_hub 2.4 speaks, with faults on demand.

with HubServer(token="hf_test", user="user") as hub:
    subprocess.run(command, env=hub.environment(tmp_path / "home"), check=True)
    assert hub.repos["user/student"].files()["README.md"]
"""

from __future__ import annotations

import base64
import os
import re
import socket
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.fake_hub.exchange import Answer, Exchange, Fault
from tests.fake_hub.hub import Hub
from tests.fake_hub.repository import Repository
from tests.fake_hub.sockets import Server


class HubServer(Hub):
    """A [`Hub`], its arguments and attributes, that listens from `__enter__` to `__exit__`, with all state in memory.

    Attributes:
        url (`str`): what `HF_ENDPOINT` has to be.
        exchanges (`list[Exchange]`): all requests in the order they came, bodies included.
        errors (`list[str]`): tracebacks of the server's own errors; leaving it raises them.
    """

    def __init__(
        self, token: str = "hf_test", user: str = "user", read_only: bool = False, part_bytes: int = 2**26
    ) -> None:
        super().__init__(token, user, read_only, part_bytes)
        self.exchanges: list[Exchange] = []
        self.stopping = threading.Event()
        self._server: Server | None = None
        self._changed = threading.Condition()
        self._faults: list[Fault] = []
        self.errors: list[str] = []
        # Bound but deaf, this socket keeps the port while the server is down.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._port.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._port.getsockname()[1]}"

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        self._port.close()
        if kind is None and self.errors:
            raise AssertionError("The Hub could not handle a request:\n" + "\n".join(self.errors))

    def start(self) -> None:
        """Comes up, on the same port as ever."""
        if self._server is not None:
            return
        self.stopping.clear()
        self._server = Server(self._port.getsockname(), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        """Goes down: open connections are cut, new ones refused; what was committed stays."""
        if self._server is None:
            return
        self.stopping.set()
        self._server.shutdown()
        self._server.cut_connections()
        self._server.server_close()
        self._thread.join()
        self._server = None

    def environment(self, home: str | Path) -> dict[str, str]:
        """Of a process that takes this for the Hub; nothing of the caller's own access to the Hub is left in it.

        The client alone decides on Xet, by whether `hf_xet` is installed: no answer could keep it from that.

        Args:
            home (`str` or `Path`): folder for its caches, empty or from another such process.
        """
        theirs = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {k: v for k, v in os.environ.items() if not (k.startswith(theirs) or k.lower().endswith("_proxy"))}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def publish(self, repo_id: str, files: Mapping[str, bytes], private: bool = False) -> Repository:
        """A repository that somebody has made before, of whichever user; all its files are small ones."""
        repo = Repository(repo_id, private)
        contents = {path: base64.b64encode(data).decode() for path, data in files.items()}
        operations = [{"key": "file", "value": {"path": k, "content": v}} for k, v in contents.items()]
        repo.commit("main", {"summary": "Publish", "description": ""}, operations)
        self.repos[repo_id] = repo
        return repo

    def fail(
        self,
        pattern: str,
        *,
        status: int | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        drop: bool = False,
        after_bytes: int = 0,
        lose_answer: bool = False,
        delay: float = 0.0,
        times: int = 1,
    ) -> Fault:
        """Lets the next requests fail, before their token or anything else is looked at.

        Args:
            pattern (`str`): regular expression, searched for in `"METHOD /path?query"`.
            status (`int`, *optional*): is answered, and nothing is done.
            body (`bytes`, *optional*): of that answer; by default JSON with an error.
            headers (`Mapping[str, str]`, *optional*): of that answer.
            drop (`bool`): the connection is cut inside the request's body or, where it has none, the answer's.
            after_bytes (`int`): how much of that body passes; never all of a request's.
            lose_answer (`bool`): what was asked for is done, but the connection is cut instead of an answer.
            delay (`float`): seconds until the request's body is read.
            times (`int`): how many requests.

        Returns:
            `Fault`: its `times` are those left.
        """
        content = {"error": f"Fault {status} on demand"} if body is None else body
        answer = None if status is None else Answer(content, status, dict(headers or {}))
        fault = Fault(re.compile(pattern), times, answer, drop, after_bytes, lose_answer, delay)
        with self._changed:
            self._faults.append(fault)
        return fault

    @property
    def requests(self) -> list[tuple[str, str, int]]:
        """Method, path with query, and status of all requests; the status is 0 where no answer was sent whole."""
        return [(exchange.method, exchange.path, exchange.status) for exchange in self.exchanges]

    @property
    def received(self) -> bytes:
        """All that clients sent, refused or not, but for `Authorization`; what came in base64 is decoded, too."""
        return b"\n".join(part for exchange in self.exchanges for part in _parts(exchange))

    def wait_for(self, pattern: str, timeout: float = 120.0) -> None:
        """Returns as soon as a request has begun in whose `"METHOD /path?query"` the regular expression is found.

        Raises:
            TimeoutError: none came within `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: any(re.search(pattern, e.line) for e in self.exchanges), timeout):
                raise TimeoutError(f"A request like {pattern!r} was wanted within {timeout} s, got {self.requests}.")

    def begin(self, exchange: Exchange) -> Fault | None:
        """Records a request; returns the fault that it is to meet."""
        with self._changed:
            self.exchanges.append(exchange)
            self._changed.notify_all()
            fault = next((f for f in self._faults if f.times > 0 and f.pattern.search(exchange.line)), None)
            if fault is not None:
                fault.times -= 1
            return fault

    def answer(self, exchange: Exchange) -> Answer:
        """One request at a time; an error of the server's own also fails the test, at the end."""
        with self._changed:
            try:
                return super().answer(exchange)
            except Exception:
                self.errors.append(f"{exchange.line}\n{traceback.format_exc()}")
                return Answer({"error": "Internal Error"}, 500)


def _parts(exchange: Exchange) -> Iterator[bytes]:
    yield exchange.line.encode()
    for name, value in exchange.headers.items():
        if name != "authorization":
            yield f"{name}: {value}".encode()
    yield bytes(exchange.body)
    for text in re.findall(rb'"(?:content|sample)": ?"([\w+/]+)', exchange.body):
        whole = text if len(text) % 4 != 1 else text[:-1]  # of a body that was cut
        yield base64.b64decode(whole + b"==")
