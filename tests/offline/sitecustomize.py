"""Python reads this file at start-up where this folder is on its path: whoever reaches for another machine
is told so."""

import os
import socket

_connect, _lookup = socket.socket.connect, socket.getaddrinfo
_HERE = {"localhost", "", None, "0.0.0.0", "::", "::1", socket.gethostname()}


def _own(host) -> bool:
    return host in _HERE or str(host).startswith("127.") or str(host) in _addresses()


def _addresses() -> set:
    try:
        return {entry[4][0] for entry in _lookup(socket.gethostname(), None)}
    except OSError:
        return set()


def _refuse(host):
    raise OSError(f"the network is blocked in this test, and something reached for {host}")


def _guarded(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not _own(address[0]):
        _refuse(address)
    return _connect(self, address)


def _guarded_lookup(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else host
    return _lookup(host, *args, **kwargs) if _own(name) else _refuse(host)


if not os.environ.get("CXR_COURSE_ONLINE"):
    socket.socket.connect, socket.getaddrinfo = _guarded, _guarded_lookup
