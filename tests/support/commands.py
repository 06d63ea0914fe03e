"""Commands that end without a signal, and the assertions on a command that fails."""

from __future__ import annotations

import json
import re

from tests.support.processes import Finished

PASSWORD = "s3cr3t-Pa55word"  # noqa: S105 - the point is that it is never printed

ONE_SHOT = [["run", "--drain"], ["status"], ["audit"], ["backfill"], ["dead-letters", "list"], ["migrate"]]


def fails(code: int, *said: str, done: Finished) -> str:
    """Assert that the command failed with this code, and that its message matches all of ``said``.
    The output must contain no traceback and no password. Return the message."""
    sentence = done.sentences()
    assert done.code == code, done
    for each in said:
        assert re.search(each, sentence), f"{each!r} not in {sentence!r}"
    assert "Traceback" not in done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    told = f"outbox-worker: {json.loads(done.stdout)['error']}" if done.stdout else sentence
    assert sentence == told, "whoever asked for an object is told the same"
    return sentence
