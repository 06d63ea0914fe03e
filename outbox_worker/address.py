"""Addresses as people write them: a database's, in the forms of libpq and of SQLAlchemy; and that of our own HTTP."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from psycopg.pq import Conninfo
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

EMBEDDED = "embedded:"
_UNIX = "unix:"
_URL_REMEDY = "expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE or embedded:DIRECTORY"
_AS_LIBPQ = re.compile(
    r"(?P<before>[^/?]*://(?:[^/?]*@)?)(?P<places>[^/?@]*[,%][^/?@]*)(?P<after>(?:[/?].*)?)", re.DOTALL
)
"""Several hosts, or a directory of sockets, where SQLAlchemy expects one name."""
_PLACE = re.compile(r"(?:\[(?P<ip6>[^]]+)\]|(?P<host>[^:\[\]]*))(?::(?P<port>[^:]*))?")


def expect_usable(text: str) -> None:
    """Refuse what cannot be a PostgreSQL's URL. Raises ValueError and never repeats it: it may hold a password."""
    if text.startswith(EMBEDDED):
        if not text.removeprefix(EMBEDDED):
            raise ValueError("embedded: needs a directory, as in embedded:.outbox")
        return
    if text.partition("://")[2].partition("/")[0].count("@") > 1:
        raise ValueError("more than one @ before the database; in a password write %40 for @, %2F for /, %23 for #")
    try:
        url = _parse_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(f"not a URL; {_URL_REMEDY}") from None
    if url.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise ValueError(f"not a PostgreSQL URL; {_URL_REMEDY}")
    _expect_ports(_listed(url, "host"), _listed(url, "port"))
    if not url.database:
        raise ValueError(f"names no database; {_URL_REMEDY}")
    _expect_known(url.query)


def _expect_ports(hosts: list[str], ports: list[str]) -> None:
    if not all(port.isdecimal() and 0 < int(port) < 65536 for port in ports if port):
        raise ValueError("the port must be from 1 to 65535")
    if any(ports) and len(ports) != len(hosts):
        raise ValueError("name as many ports as hosts, or none")


def _expect_known(parameters: Iterable[str]) -> None:
    known = [option.keyword.decode() for option in Conninfo.get_defaults()]
    for name in set(parameters) - set(known):
        near = "".join(f"; did you mean {each}?" for each in difflib.get_close_matches(name, known, 1))
        raise ValueError(f"has a parameter that PostgreSQL's library does not know{near}")


def driver_url(text: str) -> URL:
    """For SQLAlchemy and psycopg 3. A password among the parameters moves to where SQLAlchemy hides it."""
    url = _parse_url(text).set(drivername="postgresql+psycopg")
    password = url.query.get("password", url.password)
    return url.difference_update_query(["password"]).set(password=str(password) if password else None)


def libpq_url(url: URL) -> str:
    """The same for libpq, password and all; it does not read + as a blank."""
    written = url.set(drivername="postgresql").render_as_string(hide_password=False)
    before, mark, parameters = written.partition("?")
    return before + mark + parameters.replace("+", "%20")


def _parse_url(text: str) -> URL:
    """Hosts in the forms that only libpq or only SQLAlchemy takes become parameters, which both understand."""
    found = _AS_LIBPQ.fullmatch(text)
    url = make_url(found["before"] + found["after"] if found else text)
    hosts = found["places"].split(",") if found else url.query.get("host", "")
    if isinstance(hosts, str) or (not found and "port" in url.query):
        return url
    names, ports = zip(*map(_host_and_port, hosts), strict=True)
    return url.update_query_dict({"host": ",".join(names)} | ({"port": ",".join(ports)} if any(ports) else {}))


def _host_and_port(place: str) -> tuple[str, str]:
    found = _PLACE.fullmatch(place)
    if found is None:
        raise ValueError("neither HOST nor HOST:PORT")
    return unquote(found["ip6"] or found["host"]), found["port"] or ""


def _listed(url: URL, name: Literal["host", "port"]) -> list[str]:
    """The hosts or ports of a URL, wherever they stand; one that is empty means the default."""
    given = url.query.get(name, getattr(url, name))
    return ("" if given is None else str(given)).split(",")


@dataclass(frozen=True, slots=True)
class Listen:
    """Where HTTP is served: a port of a host (0: any that is free), or a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def written_host(self) -> str:
        """As in a URL."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def __str__(self) -> str:
        return f"{_UNIX}{self.path}" if self.path else f"{self.written_host}:{self.port}"


def parse_listen(text: str) -> Listen | None:
    """``HOST:PORT``, ``[IP6]:PORT``, ``unix:/path``; None for ``off``. Raises ValueError."""
    if text == "off":
        return None
    if text.startswith(_UNIX):
        path = text.removeprefix(_UNIX)
        if not path.startswith("/"):
            raise ValueError("unix: needs a path from the root, as in unix:/run/outbox-worker/http.sock")
        return Listen(path=path)
    found = _PLACE.fullmatch(text)
    host, port = (found["ip6"] or found["host"], found["port"] or "") if found else ("", "")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("expected HOST:PORT, unix:/path or off")
    return Listen(host, int(port))
