"""Connections that are opened once and used many times.

A connection is in exactly one place: idle in the pool, or owned by the thread that took it. Only
one whose answer was read to the last byte goes back; every other is closed. After a fork the child
starts with an empty pool: two processes must never speak on one socket.
"""

import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse

from weightstream.cachefs.origin.addresses import Address, AddressBook
from weightstream.cachefs.origin.forks import forget_in_child
from weightstream.cachefs.origin.proxies import Proxy, environment_proxy
from weightstream.cachefs.origin.receive import set_kernel_timeouts
from weightstream.cachefs.origin.tls import make_context
from weightstream.cachefs.origin.urls import Url

IDLE_S = 20.0  # object stores close idle connections after 20-60 s; nginx after 75
MAX_IDLE = 64


@dataclass(frozen=True, slots=True)
class Route:
    """What two requests must share to use one connection."""

    scheme: str
    host: str
    port: int
    proxy: Proxy | None = None


class TunnelError(OSError):
    """The proxy refused a tunnel; `status` is what it answered."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Connection:
    """One socket and the HTTP state on it."""

    def __init__(self, sock: socket.socket, route: Route, timeout_s: float) -> None:
        self.sock = sock
        self.route = route
        self.reused = False
        self.idle_since_s = 0.0
        self._timeout_s = timeout_s
        self._http = HTTPConnection(route.host, route.port)
        self._http.auto_open = 0
        self._http.sock = sock

    def ask(self, method: str, url: Url, headers: Mapping[str, str]) -> HTTPResponse:
        """Send a request and return the answer with its headers read."""
        self.sock.settimeout(self._timeout_s)
        proxy = self.route.proxy
        through_proxy = proxy is not None and url.scheme == "http"
        target = str(url) if through_proxy else url.target
        http = self._http
        http.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        http.putheader("Host", url.netloc)
        for name, value in headers.items():
            http.putheader(name, value)
        if through_proxy and proxy is not None and proxy.authorization:
            http.putheader("Proxy-Authorization", proxy.authorization)
        http.endheaders()
        return http.getresponse()

    def is_stale(self, now_s: float) -> bool:
        """Tell whether the other side closed it meanwhile, or soon will."""
        if now_s - self.idle_since_s > IDLE_S:
            return True
        poller = select.poll()
        poller.register(self.sock, select.POLLIN | select.POLLHUP | select.POLLERR)
        return bool(poller.poll(0))

    def close(self) -> None:
        """Close the socket."""
        self._http.close()
        self.sock.close()


class Pool:
    """Idle connections by route, and the way to open new ones. Thread-safe."""

    def __init__(
        self,
        connect_timeout_s: float,
        stall_timeout_s: float,
        tls: Callable[[], ssl.SSLContext] = make_context,
        proxy_for: Callable[[Url], Proxy | None] = environment_proxy,
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._make_tls = tls
        self._proxy_for = proxy_for
        self._idle: dict[Route, list[Connection]] = {}
        weakref.finalize(self, _close_all, self._idle)
        self.forget()
        forget_in_child(self)

    def forget(self) -> None:
        """Start empty: in a forked child, the sockets belong to the parent.

        Closing them here closes the child's descriptors only and says nothing to the server.
        """
        self._lock = threading.Lock()
        _close_all(self._idle)
        self._routes: dict[tuple[str, str, int], Route] = {}
        self._tls: ssl.SSLContext | None = None
        self._addresses = AddressBook()

    def take(self, url: Url, fresh: bool = False) -> Connection:
        """Return an idle connection for the URL, or open one; `fresh` insists on a new one."""
        route = self._route(url)
        while not fresh:
            with self._lock:
                idle = self._idle.get(route)
                connection = idle.pop() if idle else None
            if connection is None:
                break
            if not connection.is_stale(time.monotonic()):
                connection.reused = True
                return connection
            connection.close()
        return Connection(self._open(route), route, self._stall_timeout_s)

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose answer was read completely."""
        connection.idle_since_s = time.monotonic()
        with self._lock:
            idle = self._idle.setdefault(connection.route, [])
            if len(idle) < MAX_IDLE:
                idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            _close_all(self._idle)

    def _route(self, url: Url) -> Route:
        route = self._routes.get(url.origin)
        if route is None:
            route = Route(url.scheme, url.host, url.port, self._proxy_for(url))
            self._routes[url.origin] = route
        return route

    def _open(self, route: Route) -> socket.socket:
        proxy = route.proxy
        sock = self._dial(proxy.host, proxy.port) if proxy else self._dial(route.host, route.port)
        try:
            if route.scheme == "https":
                if proxy is not None:
                    _open_tunnel(sock, route, proxy)
                sock = self._context().wrap_socket(sock, server_hostname=route.host)
            set_kernel_timeouts(sock, self._stall_timeout_s)
        except BaseException:
            sock.close()
            raise
        return sock

    def _context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = self._make_tls()
            return self._tls

    def _dial(self, host: str, port: int) -> socket.socket:
        failure: OSError | None = None
        for address in self._addresses.candidates(host, port):
            try:
                sock = _connect(address, self._connect_timeout_s)
            except OSError as error:
                self._addresses.report(address, alive=False)
                failure = error
            else:
                self._addresses.report(address, alive=True)
                return sock
        raise failure or OSError(f"{host} has no address")


def _close_all(idle: dict[Route, list[Connection]]) -> None:
    for connections in idle.values():
        for connection in connections:
            connection.close()
    idle.clear()


def _connect(address: Address, timeout_s: float) -> socket.socket:
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address.sockaddr)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except TimeoutError:
        sock.close()
        raise TimeoutError(f"no connection within {timeout_s:g} s") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _open_tunnel(sock: socket.socket, route: Route, proxy: Proxy) -> None:
    """Ask the proxy for a tunnel; what follows on the socket is the endpoint's."""
    host = f"[{route.host}]" if ":" in route.host else route.host
    lines = [f"CONNECT {host}:{route.port} HTTP/1.1", f"Host: {host}:{route.port}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    # "HEAD" makes the parser expect no body; the endpoint says nothing before TLS starts.
    response = HTTPResponse(sock, method="HEAD")
    try:
        response.begin()
        if response.status != 200:
            said = f"{response.status} {response.reason}".strip()
            raise TunnelError(response.status, f"proxy {proxy.host}:{proxy.port} said {said}")
    finally:
        response.close()
