"""The documentation says what is so: generated pages are current, links lead somewhere, commands and examples run."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import advisor
from advisor.cli.commands import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_generated_pages_are_what_the_last_fit_says() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/gen_accuracy.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_to_a_file_leads_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"


def test_the_readme_s_python_runs() -> None:
    (code,) = fenced(README, "python")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "README.md", "exec"), {})
    lines = said.getvalue().splitlines()
    assert lines[0].startswith("vllm serve ")
    assert "90 % interval" in lines[1]


def test_commands_in_the_readme_are_understood() -> None:
    lines = [line for block in fenced(README, "") for line in block.splitlines() if line.startswith("advisor ")]
    assert len(lines) >= 5
    for line in lines:
        build_parser().parse_args(line.split()[1:])


def test_every_command_named_in_the_docs_exists() -> None:
    for page in PAGES:
        named = set(re.findall(r"`advisor ([a-z]+)[ `]", page.read_text(encoding="utf-8")))
        assert named <= set(COMMANDS), f"{page.name} names commands that do not exist"


def test_counts_in_the_readme_are_true() -> None:
    catalog = advisor.load_catalog()
    n_runs = sum(len(p.read_text().splitlines()) for p in (ROOT / "data" / "runs").glob("*.jsonl"))
    n_providers = len({price.provider for price in catalog.prices()})
    assert f"{len(catalog.models())} models" in README
    assert f"{len(catalog.gpus())} cards" in README
    assert f"{n_providers} providers" in README
    assert f"{n_runs} records" in README


@pytest.mark.parametrize("gpus", ["1xH100", "1xL40S"])
def test_every_predicted_quantity_is_in_the_glossary(gpus: str) -> None:
    request = advisor.Request(model="qwen3-0.6b", gpus=gpus, rate=1, grid_kgco2e_per_kwh=0.4, n_finalists=1)
    names = {name for plan in advisor.recommend(request).plans for name in plan.prediction.quantities}
    assert names
    for name in names:
        general = re.sub(r"_(mean|p50|p90|p95|p99)_s$", "_*_s", name)
        assert f"`{name}`" in GLOSSARY or f"`{general}`" in GLOSSARY, f"{name} is not in docs/glossary.md"


def test_the_changelog_knows_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == advisor.__version__
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_s_example_shows_today_s_winner() -> None:
    best = advisor.recommend(advisor.Request(model="70b", gpus="8xA100")).best
    assert best is not None
    assert f"  {best.command}\n" in README, "run scripts/gen_example.py"
