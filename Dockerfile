# The worker as a container, without root, on a read-only file system, without the build's tools. See docs/how-to/deploy.md.
FROM python:3.13-slim-bookworm AS build
WORKDIR /source
RUN python -m venv /opt/outbox-worker
COPY requirements/run.txt requirements/
RUN /opt/outbox-worker/bin/pip install --no-cache-dir --require-hashes -r requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY alembic alembic
COPY deploy deploy
COPY outbox_worker outbox_worker
RUN /opt/outbox-worker/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.13-slim-bookworm
COPY --from=build /opt/outbox-worker /opt/outbox-worker
ENV PATH=/opt/outbox-worker/bin:$PATH OUTBOX_HTTP_LISTEN=0.0.0.0:9464
USER 65532:65532
EXPOSE 9464
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["outbox-worker", "healthcheck"]
ENTRYPOINT ["outbox-worker"]
CMD ["run"]
