"""Which addresses a daemon may be given, and which of them no other host can reach."""

from __future__ import annotations

import ipaddress
import os
import re

# What `sun_path` of a Unix socket holds without its final NUL, and what the names of sibling sockets add at most.
SOCKET_PATH_BYTES_MAX = 107
SOCKET_SUFFIX_BYTES_MAX = 8


def endpoint_problem(endpoint: str) -> str | None:
    """Return what is allowed where ``endpoint`` is not."""
    scheme, separator, rest = endpoint.partition("://")
    if not rest.isprintable():
        return "an address of printable characters"
    if separator and scheme == "ipc":
        length, longest = len(os.fsencode(rest)), SOCKET_PATH_BYTES_MAX - SOCKET_SUFFIX_BYTES_MAX
        if length > longest:
            return (
                f"a socket path of at most {longest} bytes, this has {length} (a Unix socket's path ends at "
                f"{SOCKET_PATH_BYTES_MAX}, and its sibling sockets add up to {SOCKET_SUFFIX_BYTES_MAX})"
            )
        # Abstract sockets (@NAME) have no permissions, and a relative path is another file for every client.
        return None if rest.startswith("/") and not rest.endswith("/") else "ipc:// and an absolute path of a socket"
    if separator and scheme == "tcp":
        host, _, port = rest.rpartition(":")
        if not re.fullmatch(r"\*|[0-9]{1,5}", port, re.ASCII) or (port != "*" and int(port) > 65_535):  # noqa: PLR2004 - tcp's own
            return "tcp://HOST:PORT with a port up to 65535 (0 or * for any that is free)"
        good = host and host.isascii() and (":" not in host or _is_address(host))
        return None if good else "a host's name or address, an IPv6 address in [brackets], or * for every interface"
    return '"" (a socket in the runtime directory), ipc://PATH or tcp://HOST:PORT'


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        return None
    return address if bracketed == (address.version == 6) else None  # noqa: PLR2004 - IPv6


def _is_address(host: str) -> bool:
    return _address(host) is not None


def is_loopback(host: str) -> bool:
    """Say whether nothing but this host can reach ``host``."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback and "%" not in host)
