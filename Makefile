# Two commands set everything up on a fresh machine (Python 3.11+ and make): `make demo` and `make test`.

.DEFAULT_GOAL := help
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=
DATABASE = OUTBOX_DATABASE_URL="$${OUTBOX_DATABASE_URL:-embedded:.outbox}"
# xdist's workers; three keep two cores busy, because many tests wait
JOBS ?= 3
# how long `make storm` lasts, and which one it is
SECONDS ?= 60
SEED ?= 1

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\n%s\n%s\n' 'Arguments go in ARGS: make run ARGS="--concurrency 2". The database is OUTBOX_DATABASE_URL,' \
		'or, where that is not set, a private PostgreSQL in ./.outbox that needs no installation.'

# ---- use

.PHONY: demo
demo: $(VENV)/run ## See it work: payments, troubles, a killed worker, the proof
	@exec $(BIN)/outbox-worker demo $(ARGS)

.PHONY: migrate
migrate: $(VENV)/run ## Create the tables (ARGS="--with unique_index" for the index, too)
	@$(DATABASE) exec $(BIN)/outbox-worker migrate $(ARGS)

.PHONY: run
run: $(VENV)/run ## Run the worker until Ctrl-C
	@$(DATABASE) exec $(BIN)/outbox-worker run $(ARGS)

.PHONY: status
status: $(VENV)/run ## Show backlog, guard, dead letters, workers
	@$(DATABASE) exec $(BIN)/outbox-worker status $(ARGS)

.PHONY: audit
audit: $(VENV)/run ## Prove that nothing is owed
	@$(DATABASE) exec $(BIN)/outbox-worker audit $(ARGS)

.PHONY: doctor
doctor: $(VENV)/run ## Look for what is wrong with database and set-up
	@$(DATABASE) exec $(BIN)/outbox-worker doctor $(ARGS)

.PHONY: backfill
backfill: $(VENV)/run ## Make what payments prove is owed (ARGS="--dry-run" to look)
	@$(DATABASE) exec $(BIN)/outbox-worker backfill $(ARGS)

.PHONY: dead-letters
dead-letters: $(VENV)/run ## List the events that wait for a person
	@$(DATABASE) exec $(BIN)/outbox-worker dead-letters list $(ARGS)

.PHONY: bench
bench: $(VENV)/run ## Measure this machine and database beside the bare SQL
	@$(DATABASE) exec $(BIN)/outbox-worker bench $(ARGS)

.PHONY: bench-long
bench-long: $(VENV)/run ## Measure loops, full tables, a held horizon, idle workers (an hour)
	@$(DATABASE) exec $(BIN)/python benchmarks/long.py $(ARGS)

.PHONY: psql
psql: $(VENV)/run ## Open psql on the private PostgreSQL (ARGS="-c 'select 1'")
	@$(DATABASE) exec $(BIN)/outbox-worker psql -- $(ARGS)

# ---- as a service of systemd; DESTDIR takes all of it to another root

# of the system, where there is one: a service sees no home
SERVICE_PYTHON ?= $(firstword $(wildcard /usr/bin/python3.1[1-9] /usr/local/bin/python3.1[1-9]) $(PYTHON))
SERVICE = $(DESTDIR)/opt/outbox-worker
SERVICE_PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check --python '$(SERVICE)/bin/python' install
UNITS = $(DESTDIR)/etc/systemd/system
CONFIGURATION = $(DESTDIR)/etc/outbox-worker
RELOAD_UNITS = [ -n '$(DESTDIR)' ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload

.PHONY: install-service
install-service: $(VENV)/run ## Install program and units for systemd (as root; DESTDIR=DIR)
	@$(SERVICE_PYTHON) -m venv --without-pip '$(SERVICE)'
	@$(SERVICE_PIP) --require-hashes -r requirements/run.txt
	@$(SERVICE_PIP) --no-deps --no-build-isolation --force-reinstall .
	@sed -i '1s|$(DESTDIR)/|/|' '$(SERVICE)/bin/outbox-worker'
	@install -d '$(UNITS)' '$(CONFIGURATION)'
	@install -m 644 deploy/outbox-worker.service deploy/outbox-worker@.service '$(UNITS)'
	@[ -e '$(CONFIGURATION)/outbox-worker.toml' ] || install -m 644 deploy/outbox-worker.toml '$(CONFIGURATION)'
	@[ -e '$(CONFIGURATION)/database-url' ] || install -m 600 /dev/null '$(CONFIGURATION)/database-url'
	@$(RELOAD_UNITS)
	@echo 'Write the URL into $(CONFIGURATION)/database-url, then: systemctl enable --now outbox-worker'

.PHONY: uninstall-service
uninstall-service: ## Stop and remove them; settings and URL stay in /etc/outbox-worker
	@[ -n '$(DESTDIR)' ] || [ ! -d /run/systemd/system ] || { \
		systemctl stop outbox-worker.service 'outbox-worker@*.service'; \
		systemctl --quiet disable outbox-worker.service outbox-worker@.service; }
	@rm -rf '$(SERVICE)' '$(UNITS)/outbox-worker.service' '$(UNITS)/outbox-worker@.service'
	@$(RELOAD_UNITS)

# ---- develop

.PHONY: test
test: $(VENV)/dev ## Run the tests, as CI does
	@$(BIN)/python -m pytest -q -n $(JOBS) -m 'not slow' $(ARGS)

.PHONY: test-slow
test-slow: $(VENV)/dev ## Run the long proofs: kill loops, large queues
	@$(BIN)/python -m pytest -q -m slow $(ARGS)

.PHONY: storm
storm: $(VENV)/dev ## Run one storm of kills, refunds and changes of the index (SECONDS=60 SEED=1)
	@OUTBOX_TEST_STORM_SECONDS='$(SECONDS)' OUTBOX_TEST_STORM_SEED='$(SEED)' \
		$(BIN)/python -m pytest -q -m slow tests/acceptance/daemon/test_storms.py $(ARGS)

.PHONY: test-majors
test-majors: $(VENV)/dev ## Run the tests on PostgreSQL 15 to 18; what is not installed is fetched
	@$(BIN)/python -m tests.support.majors -q -n $(JOBS) -m 'not slow' $(ARGS)

.PHONY: check
check: $(VENV)/dev ## Check format, lint, types, import layers and migrations
	@$(BIN)/ruff format --check --quiet . || { echo 'Not formatted: run `make format`.'; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@MYPYPATH=alembic $(BIN)/mypy alembic/*.py alembic/versions/*.py
	@$(BIN)/lint-imports --no-logo >/dev/null 2>&1 || $(BIN)/lint-imports --no-logo
	@$(BIN)/python tests/support/check_migrations.py

.PHONY: format
format: $(VENV)/dev ## Format the code and mend what lint can
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

.PHONY: reference
reference: $(VENV)/dev ## Write docs/reference from the code
	@$(BIN)/python docs/reference/generate.py

.PHONY: statements
statements: $(VENV)/dev ## Write docs/statements.sql from the code
	@$(BIN)/python docs/statements.py

.PHONY: dashboard
dashboard: $(VENV)/run ## Write deploy/grafana/outbox-worker.json from its source
	@$(BIN)/python deploy/grafana/dashboard.py > deploy/grafana/outbox-worker.json

.PHONY: lock
lock: ## Resolve requirements/*.txt anew (needs uv)
	@set -e; compile='uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links'; \
	$$compile pyproject.toml --extra embedded --group build -o requirements/run.txt $(ARGS); \
	$$compile pyproject.toml --extra embedded --group dev -c requirements/run.txt -o requirements/dev.txt $(ARGS)

.PHONY: clean
clean: ## Remove the environment and caches (not ./.outbox, which holds data)
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist

# ---- the environment; its two stamps say what is in it

$(VENV)/bin/python:
	@[ -n '$(PYTHON)' ] || { echo 'Python 3.11 or newer is needed; none was found. Set PYTHON=/path/to/python3.'; exit 1; }
	@echo 'Making the environment in $(VENV), once; this takes half a minute or so ...'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'On Debian and Ubuntu: apt install python3-venv.'; exit 1; }

$(VENV)/run: requirements/run.txt pyproject.toml | $(VENV)/bin/python
	@$(PIP) --require-hashes -r requirements/run.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev: requirements/dev.txt $(VENV)/run
	@$(PIP) --require-hashes -r requirements/dev.txt
	@touch $@
