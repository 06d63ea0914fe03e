"""Settings: their sources, the report of all wrong ones together, and secrets that stay secret."""

from __future__ import annotations

import itertools
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict
from pydantic import ValidationError

from outbox_worker.errors import SettingError, WrongUsage
from outbox_worker.settings import OPTIONS, Settings, load_settings, unknown_variables

SECRET = "hunter2secret"  # noqa: S105 - what must not be found again


def config(directory: Path, text: str) -> Path:
    path = directory / "worker.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(**given: Any) -> str:
    with pytest.raises(SettingError) as caught:
        load_settings(**given)
    return str(caught.value)


# --- sources


def test_command_line_then_environment_then_file_then_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = config(tmp_path, "batch_size = 11\nconcurrency = 12\nmax_attempts = 13\n")
    monkeypatch.setenv("OUTBOX_BATCH_SIZE", "21")
    monkeypatch.setenv("OUTBOX_CONCURRENCY", "22")
    settings = load_settings(config=path, batch_size=31)
    assert (settings.batch_size, settings.concurrency, settings.max_attempts) == (31, 22, 13)
    assert settings.retry_base_seconds == 30


def test_an_option_not_given_does_not_hide_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_BATCH_SIZE", "21")
    assert load_settings(batch_size=None).batch_size == 21


def test_the_environment_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUTBOX_CONFIG", str(config(tmp_path, "batch_size = 11")))
    assert load_settings().batch_size == 11


def test_the_file_of_the_command_line_comes_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUTBOX_CONFIG", str(tmp_path / "absent.toml"))
    assert load_settings(config=config(tmp_path, "batch_size = 11")).batch_size == 11


@pytest.mark.parametrize("source", ["given", "environment", "file"])
def test_schema_is_called_schema_everywhere(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    if source == "given":
        given = {"schema": "shop"}
    elif source == "file":
        given = {"config": config(tmp_path, 'schema = "shop"')}
    else:
        monkeypatch.setenv("OUTBOX_SCHEMA", "shop")
    assert load_settings(**given).schema_name == "shop"


def test_names_come_as_text_or_as_toml_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = config(
        tmp_path, '[tables]\npayments = "billing.payment"\n[columns.payments]\nstudent_id = "user_id"\namount = "sum"\n'
    )
    filed = load_settings(config=path)
    monkeypatch.setenv("OUTBOX_TABLES", " payments = billing.payment ,")
    monkeypatch.setenv("OUTBOX_COLUMNS", "payments.student_id=user_id,payments.amount=sum")
    written = load_settings()
    assert filed.tables == written.tables == {"payments": "billing.payment"}
    assert filed.columns == written.columns == {"payments.student_id": "user_id", "payments.amount": "sum"}


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().batch_size = 5  # type: ignore[misc] # what is tried


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_three_spellings_mean_psycopg(scheme: str) -> None:
    settings = load_settings(database_url=f"{scheme}://u:p%40ss@h:5433/d?sslmode=require")
    assert conninfo_to_dict(settings.conninfo) == {
        **{"user": "u", "password": "p@ss", "host": "h", "port": "5433", "dbname": "d"},
        "sslmode": "require",
    }


@pytest.mark.parametrize(
    ("written", "host", "port"),
    [
        ("h:5433/d", "h", "5433"),
        ("h/d", "h", None),
        ("a:1,b:2/d", "a,b", "1,2"),
        ("a,b:2/d", "a,b", ",2"),
        ("a,b/d", "a,b", ","),
        ("[::1]:1,[::2]/d", "::1,::2", "1,"),
        ("/d?host=a,b&port=1,2", "a,b", "1,2"),
        ("/d?host=a:1&host=b:2", "a,b", "1,2"),
        ("/d?host=/run/a&sslmode=disable&host=b:2", "/run/a,b", ",2"),
        ("%2Frun%2Fa:1,b/d", "/run/a,b", "1,"),
        ("%2Frun%2Fa/d", "/run/a", None),
        ("/d?host=/run/a", "/run/a", None),
    ],
)
def test_hosts_in_every_form(written: str, host: str, port: str | None) -> None:
    """Hosts are written as libpq writes them. Several hosts can be written as SQLAlchemy does."""
    given = conninfo_to_dict(load_settings(database_url=f"postgresql://u:p%40,ss@{written}").conninfo)
    assert (given["host"], given.get("port")) == (host, port)
    assert (given["user"], given["password"], given["dbname"]) == ("u", "p@,ss", "d")


@pytest.mark.parametrize(
    ("scheme", "written", "read"),
    [
        ("postgresql", "-c%20search_path%3Da%2Bb", "-c search_path=a+b"),
        ("postgresql", "a+b", "a+b"),
        ("postgresql+psycopg", "-c+search_path%3Da%2Bb", "-c search_path=a+b"),
    ],
)
def test_blanks_and_signs_in_names_and_parameters(scheme: str, written: str, read: str) -> None:
    """SQLAlchemy writes a blank in the parameters as +."""
    settings = load_settings(database_url=f"{scheme}://the user@h/my%20shop?options={written}")
    given = conninfo_to_dict(settings.conninfo)
    assert (given["user"], given["dbname"], given["options"]) == ("the user", "my shop", read)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("a:1,b:0/d", "the port must be from 1 to 65535"),
        ("a:1,b:x/d", "the port must be from 1 to 65535"),
        ("/d?port=x", "the port must be from 1 to 65535"),
        ("/d?host=a,b&port=1", "give one port for each host, or no port"),
        ("/d?host=a&host=b&port=1,2,3", "give one port for each host, or no port"),
        ("a,[::1/d", "not a URL"),
    ],
)
def test_hosts_that_cannot_be(written: str, told: str) -> None:
    assert told in problems(database_url=f"postgresql://u:p@{written}")


def test_an_embedded_server_is_named_by_its_directory() -> None:
    assert load_settings(database_url="embedded:.outbox").embedded_directory == Path(".outbox")
    assert load_settings(database_url="postgresql://h/d").embedded_directory is None


@pytest.mark.parametrize("wanted", ["conninfo", "embedded_directory"])
def test_no_database_is_chosen_silently(wanted: str) -> None:
    settings = load_settings()
    with pytest.raises(SettingError, match="OUTBOX_DATABASE_URL is not set"):
        getattr(settings, wanted)


# --- problems


def test_all_problems_are_told_together_each_by_the_name_that_stands_where_it_was_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUTBOX_CONCURRENCY", "many")
    told = problems(
        config=config(tmp_path, 'batchsize = 5\ntables = {paiments = "x"}\ncolumns = {"payments.id_" = "x"}'),
        database_url="mysql://h/d",
        batch_size=0,
        log_level="LOUD",
        schema="",
    )
    lines = told.splitlines()[1:]
    named = [line.strip().split(":")[0] for line in lines]
    assert sorted(named) == [
        *("--batch-size", "--log-level", "OUTBOX_CONCURRENCY", "OUTBOX_DATABASE_URL", "OUTBOX_SCHEMA"),
        *(f"{key} in the configuration file" for key in ("batchsize", "columns", "tables")),
    ]
    assert "no such table: paiments" in told
    assert "no such column: payments.id_" in told


def test_an_unknown_key_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    told = problems(config=config(tmp_path, "batchsize = 5\nOUTBOX_LOG_LEVEL = 'INFO'"))
    assert "batchsize in the configuration file: no such setting; did you mean batch_size?" in told
    assert "OUTBOX_LOG_LEVEL in the configuration file: no such setting; did you mean log_level?" in told


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BATCH_SIZE", "soon", "a whole number is expected"),
        ("BATCH_SIZE", "1.5", "a whole number is expected"),
        ("BATCH_SIZE", "10001", "must be 10000 or less"),
        ("POLL_MAX_SECONDS", "soon", "a number is expected"),
        ("RETRY_BASE_SECONDS", "0", "must be more than 0.0"),
        ("LOG_FORMAT", "xml", "must be 'json' or 'console'"),
        ("SCHEMA", "x" * 64, "must have at most 63 characters"),
    ],
)
def test_what_is_expected_is_said_in_our_own_words(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"OUTBOX_{name}", value)
    assert problems().splitlines()[1:] == [f"  OUTBOX_{name}: {said}"]


def test_words_are_taken_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_LOG_FORMAT", "JSON")
    monkeypatch.setenv("OUTBOX_UNKNOWN_TYPES", "Bury")
    settings = load_settings(log_level="debug")
    assert (settings.log_level, settings.log_format, settings.unknown_types) == ("DEBUG", "json", "bury")


def test_a_slip_on_the_command_line_alone_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongUsage, match="--batch-size: must be 1 or more"):
        load_settings(batch_size=0)
    monkeypatch.setenv("OUTBOX_CONCURRENCY", "0")
    with pytest.raises(SettingError) as caught:
        load_settings(batch_size=0)
    assert not isinstance(caught.value, WrongUsage)


def test_an_unknown_key_that_is_near_to_nothing(tmp_path: Path) -> None:
    assert problems(config=config(tmp_path, "zzz = 5")).endswith("zzz in the configuration file: no such setting")


def test_keys_of_the_file_carry_no_prefix(tmp_path: Path) -> None:
    assert "did you mean batch_size?" in problems(config=config(tmp_path, "outbox_batch_size = 5"))


@pytest.mark.parametrize(
    ("text", "told"),
    [("batch_size =", "not TOML"), ("batch_size = 1\nbatch_size = 2", "not TOML"), (None, "no such file")],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "absent.toml" if text is None else config(tmp_path, text)
    assert told in problems(config=path)


def test_an_unknown_variable_is_told_with_the_nearest_name() -> None:
    environment = dict.fromkeys(
        [
            *("OUTBOX_BATCHSIZE", "OUTBOX_DATABSE_URL", "OUTBOX_QQQQQ", "PATH"),
            *("OUTBOX_BATCH_SIZE", "OUTBOX_SCHEMA", "OUTBOX_CONFIG", "OUTBOX_TABLES"),
            *("OUTBOX_TEST_PG", "OUTBOX_TEST_PG_BIN", "OUTBOX_TEST_DATABASE_URL"),
        ],
        "value",
    )
    assert unknown_variables(environment) == {
        "OUTBOX_BATCHSIZE": "OUTBOX_BATCH_SIZE",
        "OUTBOX_DATABSE_URL": "OUTBOX_DATABASE_URL",
        "OUTBOX_QQQQQ": None,
    }


BOUNDS = [
    ("batch_size", 1, 10_000, 0, 10_001),
    ("concurrency", 1, 64, 0, 65),
    ("max_attempts", 1, 1000, 0, 1001),
    ("database_deadline_seconds", 0.001, 600, 0, 600.5),
]


@pytest.mark.parametrize(("name", "low", "high", "below", "above"), BOUNDS)
def test_bounds(name: str, low: float, high: float, below: float, above: float) -> None:
    assert getattr(load_settings(**{name: low}), name) == low
    assert getattr(load_settings(**{name: high}), name) == high
    for wrong in (below, above, -1, "nan", "inf", "", "x"):
        source = f"--{name.replace('_', '-')}" if name in OPTIONS else f"OUTBOX_{name.upper()}"
        assert f"{source}: " in problems(**{name: wrong})


@pytest.mark.parametrize(
    ("low", "high"), [("poll_min_seconds", "poll_max_seconds"), ("retry_base_seconds", "retry_max_seconds")]
)
def test_a_least_above_its_most_is_refused(low: str, high: str) -> None:
    assert f"OUTBOX_{high.upper()}: must not be less than OUTBOX_{low.upper()}" in problems(**{low: 2.5, high: 2})
    same = load_settings(**{low: 2, high: 2})
    assert getattr(same, low) == getattr(same, high)


def test_both_orders_are_told_together() -> None:
    told = problems(poll_min_seconds=2, poll_max_seconds=1, retry_base_seconds=2, retry_max_seconds=1)
    assert "must not be less than OUTBOX_POLL_MIN_SECONDS" in told
    assert "must not be less than OUTBOX_RETRY_BASE_SECONDS" in told


def test_the_retry_policy_is_that_of_the_settings() -> None:
    policy = load_settings(max_attempts=3, retry_base_seconds=1.5, retry_max_seconds=6).retry_policy
    assert (policy.max_attempts, policy.base.total_seconds(), policy.maximum.total_seconds()) == (3, 1.5, 6)


@pytest.mark.parametrize(
    "columns",
    [
        "payments.updated_at=created_at",
        "payments.student_id=who,payments.course_id=who",
        "purchases.student_id=course_id",
    ],
)
def test_two_names_of_one_column(columns: str) -> None:
    assert "have the same column name, but each needs its own" in problems(columns=columns)


@pytest.mark.parametrize("tables", ["outbox=payments", "outbox=events,purchases=events"])
def test_two_roles_of_one_table(tables: str) -> None:
    assert "have the same table name, but each needs its own" in problems(tables=tables)


def test_a_parameter_that_the_library_does_not_know() -> None:
    told = problems(database_url=f"postgresql://u@h/d?pasword={SECRET}")
    assert "a parameter that PostgreSQL's library does not know; did you mean password?" in told
    assert SECRET not in told


def test_an_empty_variable_is_not_blamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUTBOX_BATCH_SIZE", "")
    assert "batch_size in the configuration file: must be" in problems(config=config(tmp_path, "batch_size = 0"))


def test_columns_may_change_places() -> None:
    columns = {"payments.student_id": "course_id", "payments.course_id": "student_id"}
    assert load_settings(columns=columns).columns == columns


@pytest.mark.parametrize("url", [f"postgresql://u:{SECRET}@x@h/d", f"postgresql://u:@{SECRET}@h/d?sslmode=require"])
def test_a_password_that_must_be_encoded(url: str) -> None:
    told = problems(database_url=url)
    assert "%40 for @" in told
    assert SECRET not in told


@pytest.mark.parametrize("text", ["payments", "=x", "payments=x,y", "payments=x;outbox=y=z,"])
def test_a_mapping_that_is_none(text: str) -> None:
    """All values except the last are refused. The last is an odd but valid name."""
    if text.count("=") == 3:
        assert load_settings(tables=text).tables == {"payments": "x;outbox=y=z"}
    else:
        assert "OUTBOX_TABLES: " in problems(tables=text)


# --- secrets

MALFORMED = [
    f"postgresql://u:{SECRET}@host:port/db",
    f"postgresql://u:{SECRET}@host:99999/db",
    f"postgresql://u:{SECRET}@host:0/db",
    f"postgresql://u:{SECRET}@host:-1/db",
    f"postgresql://u:{SECRET}@[::1/db",
    f"postgresql://u:{SECRET}@a:1,b:x/db",
    f"postgresql://u:{SECRET}@a,[b/db",
    f"postgresql://u:{SECRET}@host",
    f"postgresql://u:{SECRET}@host/",
    f"postgresql://host/?password={SECRET}",
    f"postgresql:/u:{SECRET}@host/db",
    f"postgresql//u:{SECRET}@host/db",
    f" postgresql://u:{SECRET}@host/db",
    f"post gresql://u:{SECRET}@host/db",
    f"mysql://u:{SECRET}@host/db",
    f"postgresql+asyncpg://u:{SECRET}@host/db",
    f"{SECRET}://host/db",
    f"://{SECRET}",
    f"host=h user=u password={SECRET}",
    SECRET,
    f"\n{SECRET}\x00",
    f"jdbc:postgresql://host/db?password={SECRET}",
]
"""URLs as people write them. The text of a URL must not appear anywhere."""


def assert_kept(error: BaseException) -> None:
    """Check that neither the message nor a printed traceback, with its causes, shows the secret."""
    assert SECRET not in str(error)
    assert SECRET not in repr(error)
    shown: traceback.TracebackException | None = traceback.TracebackException.from_exception(error)
    while shown is not None:
        assert SECRET not in str(shown)
        shown = shown.__cause__ or shown.__context__


@pytest.mark.parametrize(
    ("source", "url"),
    [
        (source, url)
        for source, url in itertools.product(["given", "environment", "file"], MALFORMED)
        if source != "environment" or "\x00" not in url  # an environment cannot hold it
    ],
)
def test_a_malformed_url_is_never_repeated(
    source: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}
    if source == "given":
        given = {"database_url": url}
    elif source == "file":
        given = {"config": config(tmp_path, f"database_url = '''{url}'''")}
    else:
        monkeypatch.setenv("OUTBOX_DATABASE_URL", url)
    with pytest.raises(SettingError) as caught:
        load_settings(**given)
    assert_kept(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        f'database_url = "postgresql://u:{SECRET}@h/d',
        f"database_url = postgresql://u:{SECRET}@h/d",
        f'database_url = ["{SECRET}"]',
        f'database_url = {{ "{SECRET}" = 1 }}',
        f'[database_url]\npassword = "{SECRET}"',
        f'databaseurl = "postgresql://u:{SECRET}@h/d"',
        f'database_url = "postgresql://u:{SECRET}@h/d"\ndatabase_url = "{SECRET}"',
        f'database_url = "postgresql://u:{SECRET}@h/d"\nbatch_size = "{SECRET}"',
        f'batch_size = "{SECRET}"\nlog_level = "{SECRET}"\nembedded_bin_dir = ["{SECRET}"]',
    ],
)
def test_a_malformed_file_is_never_repeated(tmp_path: Path, line: str) -> None:
    with pytest.raises(SettingError) as caught:
        load_settings(config=config(tmp_path, line))
    assert_kept(caught.value)


@pytest.mark.parametrize("value", [SECRET.encode(), [SECRET], {SECRET: SECRET}, object()])
def test_a_value_that_is_no_text_is_never_repeated(value: object) -> None:
    with pytest.raises(SettingError) as caught:
        load_settings(database_url=value)
    assert_kept(caught.value)


def test_a_good_url_is_kept_to_itself() -> None:
    settings = load_settings(database_url=f"postgresql://u:{SECRET}@h/d?password={SECRET}")
    assert conninfo_to_dict(settings.conninfo)["password"] == SECRET
    for shown in (repr(settings), str(settings), settings.model_dump_json(), repr(settings.model_dump())):
        assert SECRET not in shown


def test_another_setting_that_is_wrong_does_not_tell_of_the_url() -> None:
    with pytest.raises(SettingError) as caught:
        load_settings(database_url=f"postgresql://u:{SECRET}@h/d", poll_min_seconds=5)
    assert_kept(caught.value)


# --- documentation that cannot go stale


def test_every_setting_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_settings_are_plain_values() -> None:
    settings = load_settings(database_url="postgresql://h/d", tables="payments=p")
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 - our own bytes


# --- credentials


def test_a_credential_stands_between_environment_and_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "outbox_database_url").write_text(f"postgresql://u:{SECRET}@db/shop\n")
    (tmp_path / "outbox_batch_size").write_text("21\n")
    (tmp_path / "somebody.key").write_text("else's")
    path = config(tmp_path, 'database_url = "postgresql://u:other@db/shop"\nbatch_size = 11\nconcurrency = 2\n')
    read = load_settings(config=path)
    password = conninfo_to_dict(read.conninfo)["password"]
    assert (password, read.batch_size, read.concurrency) == (SECRET, 21, 2)
    monkeypatch.setenv("OUTBOX_BATCH_SIZE", "31")
    assert load_settings(config=path).batch_size == 31


def test_a_wrong_credential_is_named_and_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "outbox_database_url").write_text(f"mysql://u:{SECRET}@db/shop")
    said = problems()
    assert "OUTBOX_DATABASE_URL in the credentials: not a PostgreSQL URL" in said
    assert SECRET not in said
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "gone"))
    assert load_settings().database_url is None


def test_names_of_hosts(tmp_path: Path) -> None:
    assert load_settings(config=config(tmp_path, 'http_hosts = ["a.example", "*"]')).http_hosts == ("a.example", "*")
    assert "use * only alone" in problems(config=config(tmp_path, 'http_hosts = "a*b"'))
    assert "expected names" in problems(config=config(tmp_path, "http_hosts = 7"))
