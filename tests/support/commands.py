"""Commands that end by themselves, and what is asked of one that fails."""

from __future__ import annotations

import json
import re

from tests.support.processes import Finished

PASSWORD = "s3cr3t-Pa55word"  # noqa: S105 - the point is that it is never printed

ONE_SHOT = [["run", "--drain"], ["status"], ["audit"], ["backfill"], ["dead-letters", "list"], ["migrate"]]


def fails(code: int, *said: str, done: Finished) -> str:
    """It ended with this code and a sentence for people that says all this; no traceback, no password. The sentence."""
    sentence = done.sentences()
    assert done.code == code, done
    for each in said:
        assert re.search(each, sentence), f"{each!r} not in {sentence!r}"
    assert "Traceback" not in done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    told = f"outbox-worker: {json.loads(done.stdout)['error']}" if done.stdout else sentence
    assert sentence == told, "whoever asked for an object is told the same"
    return sentence
