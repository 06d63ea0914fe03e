"""Every page: links have a target, code blocks a language, and the first lines name the reader."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT

PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PATHS = re.compile(r"`((?:cli|daemon|diagnose|reconcile|settle|store|schema|telemetry|database)/\w+)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def anchors_of(page: str) -> set[str]:
    """Return the anchors of a page's titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", text_of(page), re.MULTILINE)
    shown = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "") for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in shown}


def test_the_pages_are_there() -> None:
    assert len(PAGES) > 45
    assert {"README.md", "docs/runbook.md", "docs/contract.md", "docs/how-to/roles.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text_of(page)):
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors_of(str(path.relative_to(ROOT))), f"{target}#{anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") and "/decisions/0" not in page])
def test_the_first_lines_say_whom_a_page_is_for(page: str) -> None:
    lines = [line for line in text_of(page).splitlines() if line and not line.startswith("<!--")]
    assert lines[0].startswith("# ")
    assert lines[1].startswith("For "), lines[1]


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 200
    linked = {target.partition("#")[0] for target in re.findall(r"\]\((?!https?:)([^)]+)\)", readme)}
    missing = {page for page in PAGES if "/decisions/0" not in page} - linked - {"README.md"}
    assert missing == set()


@pytest.mark.parametrize("page", [page for page in PAGES if "/decisions/0" not in page])
def test_a_succeeded_payment_is_called_so(page: str) -> None:
    """Pages for users do not say "standing", although the code does.

    Decisions are for developers. Generated pages repeat the words of the code.
    """
    if "Written by `make reference`" not in text_of(page):
        assert "standing payment" not in text_of(page).lower()


def test_the_files_that_the_architecture_names_are_there() -> None:
    named = set(PATHS.findall(text_of("docs/explanation/architecture.md")))
    assert len(named) > 15
    missing = {name for name in named if not list((ROOT / "outbox_worker").glob(f"{name}*"))}
    assert missing == set()


def test_the_pages_that_the_code_names_are_there() -> None:
    """The code names pages in its output and docstrings. It names a decision by its number alone.

    It names a section by its title.
    """
    sources = [*ROOT.glob("outbox_worker/**/*.py"), *ROOT.glob("deploy/**/*.*ml"), ROOT / "Dockerfile"]
    assert len(sources) > 60
    for source in sources:
        for page, title in re.findall(r"(docs/[\w/.-]*\w)(?:, \"([^\"]+)\")?", source.read_text()):
            found = list(ROOT.glob(f"{page}*"))
            assert found, f"{source.name}: {page}"
            assert not title or f"# {title}\n" in found[0].read_text(), f"{source.name}: {title}"
