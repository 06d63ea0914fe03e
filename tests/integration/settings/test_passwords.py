"""Special characters in a password are read as meant, or refused without repeating any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from psycopg.conninfo import conninfo_to_dict

from outbox_worker.errors import SettingError
from outbox_worker.settings import load_settings

MISREAD = [
    "horse@battery",
    "horse/battery",
    "12345/battery",
    "/horsebattery",
    "horse@battery/staple",
    "horse/battery@staple",
    "horse?battery/staple",
    "horse#battery/staple",
    "horse/battery?sslmode=staple",
    "horse/?user=battery",
    "horse%battery",
    "horse%zzbattery",
    "%horsebattery%",
    "@horsebattery@",
    "horse@battery,staple@horse",
    "horse/batt,ery?staple",
    "[horse@battery",
    "horse@[battery",
]
"""Passwords that would be misread, or not read at all, if a URL has them as they are."""
READ = [
    *("horse#battery", "horse?battery", "horse:battery", "horse,battery", "horse&battery=staple", "[horse]", "hörse"),
    *("horse battery", "horse+battery", "horse?bat+tery"),
]
"""Passwords that PostgreSQL's library reads as they are meant."""
SOURCES = ["option", "environment", "file", "credential"]
SETTINGS = ["database_url", "listen_database_url"]


def pieces(password: str) -> set[str]:
    return {password[at : at + 4] for at in range(len(password) - 3)}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Hand over a setting in one of the ways. Return the arguments for ``load_settings``."""

    def give(name: str, value: str) -> dict[str, Any]:
        if request.param == "option":
            return {name: value}
        if request.param == "environment":
            monkeypatch.setenv(f"OUTBOX_{name.upper()}", value)
            return {}
        if request.param == "file":
            (tmp_path / "worker.toml").write_text(f"{name} = '{value}'")
            return {"config": tmp_path / "worker.toml"}
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        (tmp_path / f"outbox_{name}").write_text(value)
        return {}

    return give


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_password_that_would_be_misread_is_refused(source: Any, setting: str) -> None:
    for password in MISREAD:
        given = source(setting, f"postgresql://shop:{password}@db.example:5432/shop?sslmode=require")
        with pytest.raises(SettingError) as caught:
            load_settings(**given)
        told = str(caught.value)
        assert "percent-encode special characters in the password" in told, password
        assert setting in told.lower()
        assert not {piece for piece in pieces(password) if piece in told}, password


def test_the_same_encoded_is_read() -> None:
    for password in (*MISREAD, *READ):
        settings = load_settings(database_url=f"postgresql://shop:{quote(password, safe='')}@db.example/shop")
        given = conninfo_to_dict(settings.conninfo)
        assert (given["password"], given["host"], given["dbname"]) == (password, "db.example", "shop")


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_library_reads_is_left_to_it(source: Any, setting: str) -> None:
    for password in READ:
        settings = load_settings(
            **source(setting, f"postgresql+psycopg://shop:{password}@db.example/shop?sslmode=require")
        )
        given = conninfo_to_dict(settings.conninfo if setting == "database_url" else settings.listen_conninfo or "")
        assert (given["password"], given["host"], given["dbname"]) == (password, "db.example", "shop")


@pytest.mark.parametrize("other", ["user=a@b", "options=-c%20x.y%3D@z"])
def test_an_at_in_a_parameter_is_no_matter_of_the_password(other: str) -> None:
    settings = load_settings(database_url=f"postgresql://shop:horse@db.example/shop?{other}")
    assert "@" in conninfo_to_dict(settings.conninfo)[other.partition("=")[0]]  # type: ignore[operator]


def test_the_listener_needs_a_server() -> None:
    with pytest.raises(SettingError, match="OUTBOX_LISTEN_DATABASE_URL: not a URL"):
        load_settings(listen_database_url="embedded:.outbox")
