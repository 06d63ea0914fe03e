"""Parses the addresses that users write in settings: database URLs (with libpq) and the HTTP address of the worker."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

EMBEDDED = "embedded:"
_UNIX = "unix:"
_SQLALCHEMYS = "postgresql+psycopg"
_SCHEMES = ("postgresql", "postgres", _SQLALCHEMYS)
_URL_REMEDY = "expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE or embedded:DIRECTORY"
_ENCODE = (
    "percent-encode special characters in the password: write %40 for @, %2F for /, %3F for ?, %23 for #, %25 for %"
)
_HTTP_PLACE = re.compile(r"(?:\[(?P<ip6>[^]]+)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]+)")


def expect_usable(text: str) -> None:
    """Refuse a text that is neither ``embedded:DIRECTORY`` nor the URL of a server.

    Raises ValueError with a message that repeats no part of the text, because the text may contain a password.
    """
    if not text.startswith(EMBEDDED):
        expect_server_url(text)
    elif text == EMBEDDED:
        raise ValueError("embedded: needs a directory, as in embedded:.outbox")


def expect_server_url(text: str) -> None:
    """Refuse a text that cannot be the URL of a PostgreSQL server.

    Raises ValueError with a message that repeats no part of the text, because the text may contain a password.
    """
    scheme, mark, place = text.partition("://")
    if not mark:
        raise ValueError(f"not a URL; {_URL_REMEDY}")
    if scheme not in _SCHEMES:
        raise ValueError(f"not a PostgreSQL URL; {_URL_REMEDY}")
    _expect_encoded(place)
    try:
        given = conninfo_to_dict(libpq_url(text))
    except (psycopg.ProgrammingError, UnicodeError):
        _expect_known_parameters(place)
        encode = f"; {_ENCODE}" if "@" in place else ""
        raise ValueError(f"not a URL; {_URL_REMEDY}{encode}") from None
    _expect_ports({key: str(value) for key, value in given.items()})
    if not given.get("dbname"):
        raise ValueError(f"names no database; {_URL_REMEDY}")


def _expect_encoded(place: str) -> None:
    """Refuse a URL that has a second @ before its parameters, or a / before the @.

    A misplaced @ is probably part of a password that is not percent-encoded. If libpq reads this
    password, it takes the rest of the password for the name of a host or database. Error messages
    then show this name.
    """
    authority, _, path = place.partition("/")
    if authority.count("@") > 1 or "@" in path.partition("?")[0]:
        raise ValueError(_ENCODE)


def _expect_ports(given: Mapping[str, str]) -> None:
    hosts, ports = given.get("host", "").split(","), given.get("port", "").split(",")
    if not all(port.isdecimal() and 0 < int(port) < 65536 for port in ports if port):
        raise ValueError("the port must be from 1 to 65535")
    if any(ports) and len(ports) != len(hosts):
        raise ValueError("give one port for each host, or no port")


def _expect_known_parameters(place: str) -> None:
    """Refuse unknown parameters of a URL. Suggest the most similar known parameter.

    The message does not contain libpq's error, because that error repeats the parameter. The
    parameter can be part of a password.
    """
    known = [option.keyword.decode() for option in Conninfo.get_defaults()]
    names = [pair.partition("=")[0] for pair in place.rpartition("?")[2].split("&") if "=" in pair]
    for name in (name for name in names if "@" not in name and name not in known):
        near = "".join(f"; did you mean {each}?" for each in difflib.get_close_matches(name, known, 1))
        raise ValueError(f"has a parameter that PostgreSQL's library does not know{near}")


def libpq_url(text: str) -> str:
    """Convert a URL to the form that libpq reads. The result contains the password.

    SQLAlchemy allows spaces in URLs, writes spaces in parameters as +, and writes several hosts as repeated parameters
    (``/shop?host=a:1&host=b:2``). libpq needs %20 for each space, and one list of hosts before the database name.
    """
    scheme, _, rest = text.replace(" ", "%20").partition("://")
    user, at, place = rest.partition("@") if "@" in rest.partition("/")[0] else ("", "", rest)
    place, _, parameters = place.partition("?")
    if scheme == _SQLALCHEMYS:
        parameters = parameters.replace("+", "%20")
    pairs = parameters.split("&")
    hosts = [pair.removeprefix("host=").replace("/", "%2F") for pair in pairs if pair.startswith("host=")]
    if len(hosts) > 1:
        parameters = "&".join(pair for pair in pairs if not pair.startswith("host="))
        place = f"{','.join(hosts)}/{place.partition('/')[2]}"
    return f"postgresql://{user}{at}{place}" + (f"?{parameters}" if parameters else "")


@dataclass(frozen=True, slots=True)
class Listen:
    """The address at which the worker answers HTTP: a host and port (0: any free port), or a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def written_host(self) -> str:
        """The host in the form that URLs use: an IPv6 address is in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def __str__(self) -> str:
        return f"{_UNIX}{self.path}" if self.path else f"{self.written_host}:{self.port}"


def parse_listen(text: str) -> Listen | None:
    """Parse ``HOST:PORT``, ``[IP6]:PORT`` or ``unix:/path``. Return None for ``off``. Raises ValueError."""
    if text == "off":
        return None
    if text.startswith(_UNIX):
        path = text.removeprefix(_UNIX)
        if not path.startswith("/"):
            raise ValueError("unix: needs an absolute path, as in unix:/run/outbox-worker/http.sock")
        return Listen(path=path)
    found = _HTTP_PLACE.fullmatch(text)
    host = found["ip6"] or found["host"] if found else ""
    if found is None or not host or int(found["port"]) > 65535:
        raise ValueError("expected HOST:PORT, unix:/path or off")
    return Listen(host, int(found["port"]))
