"""The generated pages are what the code says. The other pages name everything that the code has."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from outbox_worker.diagnose.doctor.finding import Severity
from outbox_worker.diagnose.doctor.report import CHECKS
from outbox_worker.errors import OutboxWorkerError
from outbox_worker.model import COLUMNS, Outcome, Reason
from outbox_worker.settings import RELOADABLE, load_settings
from outbox_worker.telemetry.metrics import Metrics
from tests.support import ROOT

REFERENCE = ROOT / "docs" / "reference"
SAMPLE = ROOT / "deploy" / "outbox-worker.toml"


def load_generator(path: Path = REFERENCE / "generate.py") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


def rows(page: str) -> set[str]:
    """Return the words in backticks that begin the table rows of a page."""
    return set(re.findall(r"^\| `([^`]+)`", (ROOT / page).read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ["commands.md", "settings.md", "metrics.md", "tables.md"])
def test_a_generated_page_is_what_would_be_written(name: str) -> None:
    assert (REFERENCE / name).read_text() == GENERATOR.pages()[name], "run `make reference`"


def test_the_statements_are_those_that_are_sent() -> None:
    generator = load_generator(ROOT / "docs" / "statements.py")
    assert (ROOT / "docs" / "statements.sql").read_text() == generator.page(), "run `make statements`"


def test_every_generated_page_is_looked_at() -> None:
    assert set(GENERATOR.pages()) == {"commands.md", "settings.md", "metrics.md", "tables.md"}


def test_every_command_says_its_exit_codes() -> None:
    assert {name for name, _ in GENERATOR.leaves()} == set(GENERATOR.CODES)
    given = {code for codes in GENERATOR.CODES.values() for code in codes}
    assert given <= set(GENERATOR.COMMON_CODES)
    assert {kind.exit_code for kind in OutboxWorkerError.__subclasses__()} <= set(GENERATOR.COMMON_CODES)


def test_what_is_said_beside_the_code_is_of_something_that_is_there() -> None:
    """Nobody would read the meaning of a column or metric that no longer exists."""
    columns = {f"{table}.{column}" for table, listed in COLUMNS.items() for column in listed}
    assert set(GENERATOR.MEANINGS) <= columns
    assert set(GENERATOR.TABLES) == set(COLUMNS)
    families = {f"{each.name}_total" if each.type == "counter" else each.name for each in Metrics().registry.collect()}
    assert set(GENERATOR.NOTES) <= families


def test_every_outcome_and_reason_is_explained() -> None:
    assert set(Outcome) <= rows("docs/explanation/state-machine.md")
    assert rows("docs/how-to/dead-letters.md") == set(Reason)


def test_every_check_of_the_doctor_and_every_verdict_is_explained() -> None:
    assert rows("docs/reference/doctor.md") == set(CHECKS) | set(Severity)


def test_the_page_on_tuning_names_what_a_reload_takes() -> None:
    section = (ROOT / "docs/how-to/tune.md").read_text().partition("## Change limits without a restart")[2]
    named = set(re.findall(r"`([a-z_]+)`", section.partition("\n\n")[2].partition("\n\n")[0]))
    assert set(RELOADABLE) <= named


def test_the_sample_of_settings_can_be_used_as_it_stands_and_uncommented(tmp_path: Path) -> None:
    assert load_settings(config=SAMPLE) == load_settings(config=None).model_copy(update={"config": SAMPLE})
    everything = tmp_path / "outbox-worker.toml"
    everything.write_text(re.sub(r"^# (?=\[|\w+ = )", "", SAMPLE.read_text(), flags=re.MULTILINE))
    settings = load_settings(config=everything)
    assert settings.tables == {"payments": "billing.payment", "outbox": "shop.outbox"}
    assert settings.columns == {"payments.student_id": "user_id", "payments.course_id": "product_id"}
    assert settings.http_hosts == ("worker.example",)
    assert settings.log_level == "DEBUG"
