"""The two servers: the Hub's API, and the storage of large files."""

from __future__ import annotations

import http.server
import json
import re
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_stand_in import api, storage
from tests.hub_stand_in.answer import Answer, Query
from tests.hub_stand_in.faults import Cut, Fault, Faults
from tests.hub_stand_in.store import Commit, Refused, Repo, Role, Store, Token

Endpoint = Callable[["HubStandIn", Query], Answer]
REPO = r"/api/(?P<kinds>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
FILES = r"/(?:(?P<kinds>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)"
REV = r"(?P<revision>[^/]+)"
ROUTES: tuple[tuple[str, str, str, Endpoint], ...] = (
    ("whoami", "GET", "/api/whoami-v2", api.whoami),
    ("create", "POST", "/api/repos/create", api.create),
    ("delete", "DELETE", "/api/repos/delete", api.unsupported),
    ("move", "POST", "/api/repos/move", api.unsupported),
    ("validate-yaml", "POST", "/api/validate-yaml", api.validate_yaml),
    ("search", "GET", "/api/(?P<kinds>models|datasets|spaces)", api.search),
    ("auth-check", "GET", REPO + "/auth-check(?P<write>/write)?", api.auth_check),
    ("preupload", "POST", f"{REPO}/preupload/{REV}", api.preupload),
    ("commit", "POST", f"{REPO}/commit/{REV}", api.commit),
    ("commits", "GET", f"{REPO}/commits/{REV}", api.commits),
    ("tree", "GET", f"{REPO}/tree/{REV}(?:/(?P<path>.+))?", api.tree),
    ("paths-info", "POST", f"{REPO}/paths-info/{REV}", api.paths_info),
    ("refs", "GET", REPO + "/refs", api.refs),
    ("tag", "POST", f"{REPO}/tag/{REV}", api.tag),
    ("branch", "POST", f"{REPO}/branch/(?P<branch>[^/]+)", api.branch),
    ("settings", "PUT", REPO + "/settings", api.settings),
    ("xet-token", "GET", f"{REPO}/xet-write-token/{REV}", api.xet_token),
    ("open-pull", "POST", REPO + "/discussions", api.open_pull),
    ("pulls", "GET", REPO + "/discussions", api.pulls),
    ("pull", "GET", REPO + r"/discussions/(?P<number>\d+)", api.pull),
    ("info", "GET", f"{REPO}(?:/revision/{REV})?", api.info),
    ("lfs-batch", "POST", FILES + r"\.git/info/lfs/objects/batch", storage.batch),
    ("lfs-verify", "POST", FILES + r"\.git/info/lfs/verify", storage.verify),
    ("lfs-complete", "POST", "/lfs/complete/(?P<key>[^/]+)", storage.complete),
    ("resolve", "GET", f"{FILES}/resolve/{REV}/(?P<path>.+)", api.resolve),
)
STORAGE_ROUTES: tuple[tuple[str, str, str, Endpoint], ...] = (
    ("lfs-put", "PUT", "/put/(?P<key>[^/]+)", storage.put),
    ("lfs-part", "PUT", r"/part/(?P<key>[^/]+)/(?P<part>\d+)", storage.put_part),
    ("download", "GET", "/get/(?P<key>[^/]+)", storage.get),
)
ENDPOINTS = tuple(name for name, *_ in (*ROUTES, *STORAGE_ROUTES))


@dataclass(frozen=True)
class Request:
    """What came in. status: None where the connection was cut. received: bytes of the body."""

    endpoint: str
    method: str
    path: str
    status: int | None
    received: int
    user: str | None


class HubStandIn:
    """A Hub on loopback: a context manager.

    User alice, member of acme, has `token` (write), `read_token` and `member_token` (fine-grained,
    for acme alone). page: entries of a page of the tree. multipart_above, part_size: bytes.
    """

    def __init__(
        self,
        root: Path,
        *,
        port: int = 0,
        page: int = 1000,
        multipart_above: int = 8 * 2**20,
        part_size: int = 5 * 2**20,
    ) -> None:
        self.store = Store(root)
        self.faults = Faults()
        self.requests: list[Request] = []
        self.page, self.multipart_above, self.part_size = page, multipart_above, part_size
        self.uploads: dict[str, storage.Upload] = {}
        self.downloads: dict[str, str] = {}
        self.token = self.add_token("alice")
        self.read_token = self.add_token("alice", "read")
        self.member_token = self.add_token("alice", "fineGrained", ("acme",))
        self.store.members["alice"] = ("acme",)
        self._servers = [
            _Server(("127.0.0.1", port), self, ROUTES),
            _Server(("127.0.0.1", 0), self, STORAGE_ROUTES),
        ]
        self._threads: list[threading.Thread] = []

    # -- life --------------------------------------------------------------------------------------

    def __enter__(self) -> HubStandIn:
        for server in self._servers:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.clear()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Where large files go and come from."""
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a process that uses the Hub. home: a new HF_HOME. token: `self.token`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
        }

    # -- people and what they have -----------------------------------------------------------------

    def add_token(self, user: str, role: Role = "write", namespaces: tuple[str, ...] = ()) -> str:
        """A new token, which looks like a real one."""
        text = "hf_" + secrets.token_urlsafe(64).replace("-", "").replace("_", "")[:34]
        self.store.tokens[text] = Token(user, role, namespaces)
        self.store.members.setdefault(user, ())
        return text

    def put(self, name: str, files: Mapping[str, bytes | Path], kind: str = "model") -> Repo:
        """A repository with files, made without a request; a folder's with `folder_files`."""
        return self.store.put(name, files, kind)

    def put_folder(self, name: str, folder: Path) -> Repo:
        """A model repository with the files of a folder."""
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        return self.store.put(name, files)

    def repo(self, name: str, kind: str = "model") -> Repo:
        """What is kept of a repository."""
        return self.store.repos[kind, name]

    def commits(self, name: str, revision: str = "main", kind: str = "model") -> list[Commit]:
        """Its commits, the newest first; the last one is the Hub's own."""
        return self.repo(name, kind).line(revision)

    def content(self, name: str, path: str, revision: str = "main", kind: str = "model") -> bytes:
        """The bytes of a file."""
        blob = self.repo(name, kind).resolve(revision).files[path]
        return blob.data if blob.data is not None else self.store.object(blob.sha256).read_bytes()

    # -- what goes wrong ---------------------------------------------------------------------------

    def fail(self, endpoint: str, status: int, **more: Any) -> Fault:
        """Answer a request with a status. more: as Fault."""
        return self.add(Fault(endpoint, status, **more))

    def cut(self, endpoint: str, where: Cut, **more: Any) -> Fault:
        """Cut the connection of a request."""
        return self.add(Fault(endpoint, cut=where, **more))

    def hold(self, endpoint: str, **more: Any) -> Fault:
        """Let a request wait: `reached.wait()` until it is there, `release()` to let it go on."""
        return self.add(Fault(endpoint, hold=True, **more))

    def add(self, fault: Fault) -> Fault:
        """Let something go wrong."""
        assert fault.endpoint in (*ENDPOINTS, "any"), f"no endpoint {fault.endpoint}: {ENDPOINTS}"
        return self.faults.add(fault)

    def seen(self, endpoint: str) -> list[Request]:
        """The requests that an endpoint got."""
        return [request for request in self.requests if request.endpoint == endpoint]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        address: tuple[str, int],
        hub: HubStandIn,
        routes: tuple[tuple[str, str, str, Endpoint], ...],
    ) -> None:
        super().__init__(address, _Handler)
        self.hub, self.routes = hub, routes

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; anything else is a mistake in here."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _CutError(Exception):
    """The connection is to be cut now."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    _AUTH: ClassVar = re.compile(r"Bearer (.+)")

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def _serve(self) -> None:
        hub = self.server.hub
        method = "GET" if self.command == "HEAD" else self.command
        split = urlsplit(self.path)
        name, endpoint, groups = self._route(method, split.path)
        fault = hub.faults.next(name, split.path)
        token = None
        status: int | None = None
        self.received = 0
        try:
            if fault is not None and fault.hold:
                fault.reached.set()
                fault.released.wait()
            body = self._body(stop_half=fault is not None and fault.cut == "request")
            if fault is not None and fault.status is not None and not fault.acted:
                answer = _faulty(fault)
            else:
                try:
                    token = self._token()
                    query = Query(groups, parse_qs(split.query), dict(self.headers), body, token)
                    with hub.store.lock:
                        answer = endpoint(hub, query)
                except Refused as refused:
                    answer = _refusal(refused)
                if fault is not None and fault.status is not None:
                    answer = _faulty(fault)
            if fault is not None and fault.cut == "after":
                raise _CutError
            self._send(answer, half=fault is not None and fault.cut == "answer")
            status = answer.status
        except _CutError:
            self._hang_up()
        finally:
            if isinstance(getattr(self, "_file", None), Path):
                self._file.unlink(missing_ok=True)
            user = token.user if token else None
            request = Request(name, self.command, self.path, status, self.received, user)
            hub.requests.append(request)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _route(self, method: str, path: str) -> tuple[str, Endpoint, dict[str, str]]:
        for name, wanted, pattern, endpoint in self.server.routes:
            found = re.fullmatch(pattern, path)
            if found and wanted == method:
                groups = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                return name, endpoint, groups
        return "unknown", api.unknown, {"path": path}

    def _token(self) -> Token | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        found = self._AUTH.fullmatch(given)
        token = self.server.hub.store.tokens.get(found[1]) if found else None
        if token is None and self.server.routes is ROUTES:
            raise Refused(401, "Invalid credentials in Authorization header")
        return token

    # -- the body ----------------------------------------------------------------------------------

    def _body(self, stop_half: bool) -> Path:
        """The request's body in a file."""
        self._file = self.server.hub.store.incoming()
        length = int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in (self.headers.get("Transfer-Encoding") or "")
        limit = (length // 2 if length else 0) if stop_half else None
        with self._file.open("wb") as stream:
            for block in self._chunks() if chunked else self._blocks(length):
                stream.write(block)
                self.received += len(block)
                if limit is not None and self.received >= limit:
                    raise _CutError
        if stop_half:
            raise _CutError
        return self._file

    def _blocks(self, length: int) -> Any:
        left = length
        while left:
            block = self.rfile.read(min(left, 2**16))
            if not block:
                raise _CutError
            left -= len(block)
            yield block

    def _chunks(self) -> Any:
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            block = self.rfile.read(size)
            if len(block) < size:
                raise _CutError
            self.rfile.readline()
            yield block
        while self.rfile.readline().strip():
            pass

    # -- the answer --------------------------------------------------------------------------------

    def _send(self, answer: Answer, half: bool) -> None:
        size = answer.size
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(size))
        self.send_header("X-Request-Id", secrets.token_hex(8))
        self.end_headers()
        if half:
            self.wfile.write(answer.bytes()[: size // 2])
            self.wfile.flush()
            raise _CutError
        if self.command != "HEAD":
            for block in answer.blocks():
                self.wfile.write(block)

    def _hang_up(self) -> None:
        """Reset the connection, so that the other side cannot take it for an end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.rfile.close()
        self.wfile = open("/dev/null", "wb")  # noqa: PTH123, SIM115


def _faulty(fault: Fault) -> Answer:
    assert fault.status is not None
    if fault.body is not None:
        return Answer(fault.status, dict(fault.headers), fault.body)
    if fault.status in (500, 502, 503, 504):  # as a proxy in front of the Hub says it
        page = f"<html><body><h1>{fault.status} Server Error</h1></body></html>".encode()
        return Answer(fault.status, {"Content-Type": "text/html", **fault.headers}, page)
    text = {
        401: "Invalid username or password.",
        403: "Forbidden",
        404: "Repository not found",
        409: "Conflict",
        412: "A commit has happened since. Please refresh and try again.",
        429: "We had to rate limit you",
    }.get(fault.status, "Something is wrong")
    code = {"X-Error-Code": "RepoNotFound"} if fault.status == 404 else {}
    answer = _refusal(Refused(fault.status, text))
    return Answer(fault.status, {**answer.headers, **code, **fault.headers}, answer.body)


def _refusal(refused: Refused) -> Answer:
    headers = {"Content-Type": "application/json", "X-Error-Message": refused.message}
    if refused.code:
        headers["X-Error-Code"] = refused.code
    body = json.dumps({"error": refused.message, **refused.body}).encode()
    return Answer(refused.status, headers, body)
