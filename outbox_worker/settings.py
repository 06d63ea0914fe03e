"""Reads the settings, in this order of priority: command line, environment, credentials, TOML file, defaults.

The settings object cannot be changed. A single error reports all values that cannot be used. A
credential is a file in ``$CREDENTIALS_DIRECTORY`` that has the name of a setting. systemd's
``LoadCredential=`` creates these files.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from outbox_worker.address import EMBEDDED, Listen, expect_server_url, expect_usable, libpq_url, parse_listen
from outbox_worker.decision import Limits, RetryPolicy
from outbox_worker.errors import SettingError, WrongUsage
from outbox_worker.mapping import ColumnMap, OutboxMapping, PaymentsMapping, TableMap

PREFIX = "OUTBOX_"
OPTIONS = ("config", "backfill_every_seconds", "batch_size", "concurrency", "log_level", "log_format")
"""Settings that are also options on the command line."""
RELOADABLE = (
    "log_level",
    "batch_size",
    "batch_target_ms",
    "max_attempts",
    "retry_base_seconds",
    "retry_max_seconds",
    "poll_min_seconds",
    "poll_max_seconds",
)
"""Settings that a running worker reads again on SIGHUP. All other settings need a restart."""
_OTHERS = ("OUTBOX_TEST_DATABASE_URL", "OUTBOX_TEST_PG", "OUTBOX_TEST_PG_BIN")


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _usable_url(value: SecretStr) -> SecretStr:
    expect_usable(value.get_secret_value())
    return value


def _usable_server_url(value: SecretStr) -> SecretStr:
    expect_server_url(value.get_secret_value())
    return value


def _split_names(value: object) -> object:
    """Parse ``a,b``, the form of a list in an environment variable. Return a TOML array unchanged."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _usable_hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    if any("*" in host.removeprefix("*.") and host != "*" for host in value):
        raise ValueError("use * only alone, or at the start of a domain, as in *.example.com")
    return value


def _usable_listen(value: str) -> str:
    parse_listen(value)
    return value


class Settings(BaseSettings):
    """All settings. Each description says what the setting does and, if needed, why its default was chosen."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        hide_input_in_errors=True,
        validate_default=True,
        env_ignore_empty=True,
    )

    config: Path | None = Field(
        None, description="TOML file with settings; its keys are the variable names in lower case, without OUTBOX_"
    )
    database_url: Annotated[SecretStr, AfterValidator(_usable_url)] | None = Field(
        None,
        description="postgresql://… or embedded:DIR (a private PostgreSQL in DIR); there is no default, so that "
        "you never "
        "use the wrong database by accident",
    )
    listen_database_url: Annotated[SecretStr, AfterValidator(_usable_server_url)] | None = Field(
        None,
        description="URL of a direct connection for LISTEN, needed if DATABASE_URL is a pooler; default: DATABASE_URL",
    )
    pooler: Literal["none", "transaction"] = Field(
        "none",
        description="transaction: DATABASE_URL is a PgBouncer in transaction mode, so the worker prepares no "
        "statements",
    )
    embedded_bin_dir: Path | None = Field(
        None,
        description="directory of the programs postgres and initdb for embedded:DIR; default: those of the pip wheel",
    )
    schema_name: str = Field(  # `schema` itself is a method of pydantic's models
        "public",
        min_length=1,
        max_length=63,
        validation_alias="OUTBOX_SCHEMA",
        description="schema of every table, unless TABLES names another schema for the table",
    )
    tables: TableMap = Field(
        {}, description="tables that have other names in your database: payments=billing.payment,outbox=events"
    )
    columns: ColumnMap = Field(
        {}, description="columns that have other names in your database: payments.student_id=user_id"
    )
    payments: PaymentsMapping = Field(
        PaymentsMapping(),
        description="statuses that have other names in your payments table, in the file: [payments] "
        'status_values.succeeded = ["PAID"]; in the environment as JSON',
    )
    outbox: OutboxMapping = Field(
        OutboxMapping(),
        description="event types that have other names in your outbox, and other places of values in the payload, in "
        'the file: [outbox] types."payment.paid" = "PURCHASE_CONFIRMED" and payload.payment_id = "$.data.id"; in the '
        "environment as JSON",
    )
    batch_size: int = Field(
        1000,
        ge=1,
        le=10_000,
        description="largest number of events in a transaction; above 1,000 the worker is no faster",
    )
    batch_target_ms: int = Field(
        500,
        ge=10,
        le=60_000,
        description="target duration of a batch in ms; after a batch that took longer, the worker claims fewer events",
    )
    concurrency: int = Field(
        1,
        ge=1,
        le=64,
        description="number of claim loops in the process, each with its own connection; few loops with large "
        "batches are fastest",
    )
    max_attempts: int = Field(
        10, ge=1, le=1000, description="number of failed tries after which an event becomes a dead letter"
    )
    retry_base_seconds: float = Field(
        30,
        gt=0,
        le=86_400,
        description="wait after the first failed try of an event; after each further try, the wait is twice as long",
    )
    retry_max_seconds: float = Field(3600, gt=0, le=2_592_000, description="longest wait between two tries of an event")
    poll_min_seconds: float = Field(
        0.05, gt=0, le=60, description="pause after the first check of the outbox that finds no due event"
    )
    poll_max_seconds: float = Field(
        1, gt=0, le=3600, description="longest pause between two checks of the outbox while it has no due event"
    )
    database_deadline_seconds: float = Field(
        10,
        gt=0,
        le=600,
        description="longest wait for an answer from the database; after this time, the worker drops the connection "
        "and tries again",
    )
    backfill_every_seconds: float = Field(
        900,
        ge=0,
        le=86_400,
        description="time between two searches for payments without a purchase; only one of all workers "
        "searches; 0: never",
    )
    unknown_types: Annotated[Literal["bury", "ignore"] | None, BeforeValidator(_lower)] = Field(
        None,
        description="what to do with events of an unknown type: bury makes them dead letters (default if "
        "`migrate` created the "
        "outbox), ignore leaves them in the outbox (default if it is an existing table)",
    )
    http_listen: Annotated[str, AfterValidator(_usable_listen)] = Field(
        "127.0.0.1:9464",
        description="address at which `run` answers /livez, /readyz and /metrics: HOST:PORT (0: any free port), "
        "unix:/path or off",
    )
    http_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names), AfterValidator(_usable_hosts)] = (
        Field(
            (),
            description="host names that HTTP requests may use, in addition to localhost and the host of "
            "HTTP_LISTEN; *: any",
        )
    )
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = Field(
        "INFO", description="lowest severity of log records to write"
    )
    log_format: Annotated[Literal["json", "console"] | None, BeforeValidator(_lower)] = Field(
        None,
        description="json: one object per line; console: text for people; default: console on a terminal, "
        "otherwise json",
    )

    @model_validator(mode="before")
    @classmethod
    def _schema_by_its_key(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {"schema_name" if key == "schema" else key: value for key, value in data.items()}

    @field_validator("poll_max_seconds", "retry_max_seconds")
    @classmethod
    def _not_below_its_least(cls, value: float, info: ValidationInfo) -> float:
        low = {"poll_max_seconds": "poll_min_seconds", "retry_max_seconds": "retry_base_seconds"}[str(info.field_name)]
        if value < info.data.get(low, value):
            raise ValueError(f"must not be less than {_variable(low)}")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the library's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the library's signature
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources in order of precedence.

        The configuration file comes last. Only the command line or the environment can give the path of this file.
        """
        assert isinstance(init_settings, InitSettingsSource)  # noqa: S101 - narrows the library's type
        directory, path = _credentials(), _configuration_file(init_settings.init_kwargs)
        sources = [init_settings, env_settings]
        if directory is not None:
            sources.append(SecretsSettingsSource(settings_cls, directory))
        if path:
            if not Path(path).is_file():
                raise FileNotFoundError("there is no such file")
            sources.append(TomlConfigSettingsSource(settings_cls, Path(path)))
        return tuple(sources)

    @property
    def retry_policy(self) -> RetryPolicy:
        return RetryPolicy(
            max_attempts=self.max_attempts,
            base=timedelta(seconds=self.retry_base_seconds),
            maximum=timedelta(seconds=self.retry_max_seconds),
        )

    @property
    def limits(self) -> Limits:
        return Limits(self.retry_policy, self.batch_size, self.batch_target_ms / 1000)

    @property
    def embedded_directory(self) -> Path | None:
        """The directory of the private PostgreSQL, or None if the database is another server."""
        text = self._required_url()
        return Path(text.removeprefix(EMBEDDED)) if text.startswith(EMBEDDED) else None

    @property
    def conninfo(self) -> str:
        """The database URL with its password, in the form that libpq reads.

        Do not use this URL for ``embedded:DIR``.
        """
        return libpq_url(self._required_url())

    @property
    def listen_conninfo(self) -> str | None:
        """The URL of the LISTEN connection in the form that libpq reads.

        The URL is None if the setting is not given.
        """
        return libpq_url(self.listen_database_url.get_secret_value()) if self.listen_database_url else None

    @property
    def listen(self) -> Listen | None:
        """The address at which the worker answers HTTP, or None if HTTP is off."""
        return parse_listen(self.http_listen)

    def _required_url(self) -> str:
        if self.database_url is None:
            raise SettingError(
                "OUTBOX_DATABASE_URL is not set. Set it to your database (postgresql://USER:PASSWORD@HOST/DATABASE), "
                "or to embedded:.outbox for a private PostgreSQL in ./.outbox."
            )
        return self.database_url.get_secret_value()


def load_settings(**given: Any) -> Settings:
    """Read the settings.

    ``given`` contains the options of the command line. None means that an option is not given.
    Raises SettingError with a message that lists every problem. The message contains the name and
    source of each setting, but not the value. Raises WrongUsage instead if all problems are on the
    command line.
    """
    given = {name: value for name, value in given.items() if value is not None}
    kind: type[SettingError] = SettingError
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = [_problem(detail, given) for detail in error.errors()]
        typed = given.keys() & set(OPTIONS)
        kind = WrongUsage if all(typed & set(detail["loc"]) for detail in error.errors()) else SettingError
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems = [f"{_configuration_file(given)} is not TOML: {error}"]
    except OSError as error:
        problems = [f"{_configuration_file(given)} cannot be read: {error.strerror or error}"]
    raise kind("Settings that cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems)) from None


def _configuration_file(given: Mapping[str, Any]) -> str:
    """Return the path of the configuration file, or an empty text if no file is given."""
    return str(given.get("config") or os.environ.get(f"{PREFIX}CONFIG") or "")


def _credentials() -> Path | None:
    """Return the directory in which systemd puts credentials, or None if there is no directory."""
    directory = Path(os.environ.get("CREDENTIALS_DIRECTORY") or os.devnull)
    return directory if directory.is_dir() else None


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Return the ``OUTBOX_*`` variables that no setting reads.

    The value of each variable is the most similar known name, or None.
    """
    known = [_variable(name) for name in Settings.model_fields]
    ours = [name for name in environment if name.upper().startswith(PREFIX)]
    strangers = [name for name in ours if name.upper() not in (*known, *_OTHERS)]
    return {name: next(iter(difflib.get_close_matches(name.upper(), known, 1)), None) for name in strangers}


def _variable(field: str) -> str:
    return str(Settings.model_fields[field].validation_alias or PREFIX + field.upper())


def _key(field: str) -> str:
    """Return the name of a setting in a TOML file."""
    return _variable(field).removeprefix(PREFIX).lower()


_SENTENCES = {
    "int": "a whole number is expected",
    "float": "a number is expected",
    "bool": "true or false is expected",
    "path": "a path is expected",
    "string_type": "text is expected",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "greater_than_equal": "must be {ge} or more",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be {le} or less",
    "literal_error": "must be {expected}",
    "dict_type": "expected NAME=NAME, separated by commas",
    "tuple_type": "expected names, separated by commas",
}
"""Error texts by pydantic's error type. A key of one word applies to all error types that begin with this word."""


def _problem(detail: ErrorDetails, given: Mapping[str, Any]) -> str:
    """Return a sentence that says where a wrong value was given and what is expected.

    Omit the value, because it can be secret.
    """
    if not detail["loc"]:
        return _reason(detail)
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        keys = [_key(field) for field in Settings.model_fields]
        near = difflib.get_close_matches(name.lower().removeprefix(PREFIX.lower()), keys, 1)
        return f"{name} in the configuration file: no such setting" + (f"; did you mean {near[0]}?" if near else "")
    return f"{_source(name, given)}: {_reason(detail)}"


def _reason(detail: ErrorDetails) -> str:
    kind = detail["type"]
    known = _SENTENCES.get(kind) or _SENTENCES.get(kind.partition("_")[0])
    return known.format(**detail.get("ctx", {})) if known else detail["msg"].removeprefix("Value error, ")


def _source(name: str, given: Mapping[str, Any]) -> str:
    """Return the name of a setting as the user wrote it.

    The source is the command line, the environment, the credentials or the configuration file.
    """
    field = name if name in Settings.model_fields else "schema_name"
    if name in given and name in OPTIONS:
        return f"--{name.replace('_', '-')}"
    is_set = any(value and variable.upper() == _variable(field) for variable, value in os.environ.items())
    if is_set or given.keys() & {name, _key(field)}:
        return _variable(field)
    directory = _credentials()
    if directory is not None and (directory / _variable(field).lower()).exists():
        return f"{_variable(field)} in the credentials"
    return f"{_key(field)} in the configuration file"
