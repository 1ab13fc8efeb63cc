"""The rules of the code base that a machine can check: imports, sizes, start-up, docstrings, the README's commands."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

import advisor
import advisor.laws
from advisor import Request, schema
from advisor.catalog import load_catalog

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "advisor").rglob("*.py"))
LAWS = [importlib.import_module(m.name) for m in pkgutil.walk_packages(advisor.laws.__path__, "advisor.laws.")]
ENGINES = {"torch", "vllm", "deepspeed"}
# Half a second each, on the way to an answer that needs none of them.
HEAVY = ENGINES | {"scipy", "streamlit", "plotly", "pandas", "pyarrow", "locust", "joblib", "matplotlib"}
# Some ten milliseconds each, and a hundredth of a second is a thirteenth of what numpy and pydantic take together.
LEFT_OUT = HEAVY | {"yaml", "numpy.ma", "numpy.testing", "asyncio", "multiprocessing", "http.client", "ssl", "sqlite3"}
# Of this package: what other commands need.
OTHERS = {
    *("advisor.fit", "advisor.verify", "advisor.study", "advisor.ui", "advisor.emit.artefacts", "advisor.emit.launch"),
    *("advisor.schema.run_record", "advisor.schema.study", "advisor.schema.claims", "advisor.predict.train"),
}


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def imported_roots(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


LIST_HEAVY = """
import json, sys
try:
    exec(sys.argv.pop())
except SystemExit as stop:
    assert not stop.code, f"exit code {stop.code}"
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules_after(code: str) -> set[str]:
    """Which modules a fresh interpreter has loaded once `code` has run."""
    command = [sys.executable, "-c", LIST_HEAVY, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.strip().splitlines()[-1]))


def test_imports_point_down() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    n_lines = len(path.read_text().splitlines())
    assert n_lines <= 400, f"{path.name} has {n_lines} lines: split it by topic"


def test_the_package_never_imports_an_engine() -> None:
    guilty = {str(p.relative_to(ROOT)): e for p in PACKAGE if (e := imported_roots(p) & ENGINES)}
    assert not guilty


def test_laws_open_no_file_and_know_no_nouns() -> None:
    allowed = {"__future__", "advisor", "collections", "dataclasses", "enum", "functools", "math", "numpy", "typing"}
    guilty = {p.name: extra for p in PACKAGE if p.parent.name == "laws" and (extra := imported_roots(p) - allowed)}
    assert not guilty


def test_start_up_loads_nothing_heavy() -> None:
    assert (HEAVY | {"numpy"}) & modules_after("import advisor.cli") == set()


def test_an_answer_loads_nothing_that_it_does_not_use() -> None:
    argv = ["advisor", "recommend", "--model", "70b", "--gpus", "8xA100", "--json"]
    loaded = modules_after(f"sys.argv = {argv!r}; from advisor.cli import main; main()")
    assert (LEFT_OUT | OTHERS) & loaded == set()
    assert {"numpy", "pydantic", "advisor.predict.engine"} <= loaded, "the list is that of the process that answered"


def test_no_bound_of_a_field_is_silently_replaced_by_another() -> None:
    # a type's `le` and a field's own `le` do not both hold: pydantic keeps one, and it was the wider one
    doubled = []
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(schema.__path__, "advisor.schema.")]
    nouns = {
        n for module in modules for n in vars(module).values() if inspect.isclass(n) and issubclass(n, schema.Noun)
    }
    assert len(nouns) > 40
    for noun in nouns:
        for name, field in noun.model_fields.items():
            kinds = [type(m) for m in field.metadata]
            doubled += [f"{noun.__name__}.{name}" for kind in set(kinds) if kinds.count(kind) > 1]
    assert doubled == []
    with pytest.raises(ValidationError, match="less than or equal to 1000"):
        Request(model="8b", gpus="1xH100", max_plans=1001)


def test_the_nouns_annotations_are_no_text_to_compile() -> None:
    """Each text costs pydantic a compilation: a fifth of the import of the nouns."""
    postponed = "from __future__ import " + "annotations"
    assert not [p.name for p in (ROOT / "advisor" / "schema").glob("*.py") if postponed + "\n" in p.read_text()]


DATA = ROOT / "data"


def stems(folder: str, suffix: str) -> set[str]:
    return {p.stem for p in (DATA / folder).iterdir() if p.suffix == suffix and p.stem != "index"}


def test_every_model_file_is_in_the_catalogue_and_loads() -> None:
    catalog = load_catalog()
    assert set(catalog.models()) == stems("models", ".json")
    assert {catalog.model(name)[0].name for name in catalog.models()} == set(catalog.models())


def test_every_gpu_file_is_in_the_catalogue_and_has_sources() -> None:
    gpus = load_catalog().gpus()
    assert {gpu.name for gpu in gpus} == stems("hardware", ".toml")
    assert all(gpu.sources for gpu in gpus)


def test_every_price_is_for_a_gpu_of_the_catalogue() -> None:
    catalog = load_catalog()
    names = {gpu.name for gpu in catalog.gpus()}
    assert catalog.prices()
    assert {price.gpu for price in catalog.prices()} <= names


def test_every_preset_engine_and_coefficient_set_loads() -> None:
    catalog = load_catalog()
    assert all(catalog.workload(name).name == name for name in catalog.workloads())
    assert all(catalog.engine(name) for name in stems("engines", ".toml"))
    assert set(catalog.coefficient_sets()) == stems("fitted", ".json") - {"accuracy", "accuracy_cells"}
    assert all(catalog.coefficients(name).coefficients for name in catalog.coefficient_sets())
    # the error table of the starts left out of the fit: not coefficients, but of the same law
    accuracy = json.loads((DATA / "fitted" / "accuracy.json").read_text())
    assert accuracy["law_version"] == catalog.coefficients("vllm").version


@pytest.mark.parametrize("path", sorted((DATA / "runs").glob("*.jsonl")), ids=lambda p: p.name)
def test_every_run_record_is_one_json_object_with_a_schema(path: Path) -> None:
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert record["schema"] == 1
        assert record["run_id"]


def public_laws() -> list[object]:
    return [
        pytest.param(function, id=f"{module.__name__.removeprefix('advisor.laws.')}.{name}")
        for module in LAWS
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and function.__module__ == module.__name__
    ]


@pytest.mark.parametrize("function", public_laws())
def test_every_law_says_what_it_is_and_shows_a_reference_or_a_worked_example(function: Callable[..., object]) -> None:
    doc = inspect.getdoc(function) or ""
    assert len(doc.split()) >= 5, "no sentence that says what the number is"
    assert ">>>" in doc or re.search(r"arxiv|doi|reference|section|measured|source", doc, re.IGNORECASE)


@pytest.mark.parametrize("module", LAWS, ids=lambda m: m.__name__)
def test_every_file_of_laws_cites_what_it_rests_on_and_its_examples_hold(module: ModuleType) -> None:
    assert re.search(r"arxiv|doi|reference|vllm |deepspeed ", inspect.getsource(module), re.IGNORECASE)
    assert doctest.testmod(module).failed == 0


def test_the_readme_gives_only_commands_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named: set[str] = set()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        named |= set(re.findall(r"(?:^|[`$ ])make ([a-z-]+)(?=[`\s]|$)", page.read_text(), re.MULTILINE))
    assert {"recommend", "test", "app"} <= named, "the README gives the commands a newcomer needs"
    assert named <= targets


def test_ci_runs_the_readmes_test_command() -> None:
    last = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert last == "make test"
    assert "make test" in (ROOT / "README.md").read_text()


def test_tests_of_the_real_engines_are_where_make_test_engines_looks() -> None:
    marked = {p for p in (ROOT / "tests").rglob("test_*.py") if "mark." + "engines" in p.read_text()}
    assert marked
    assert {p.parent.name for p in marked} == {"engines"}


def test_the_locks_name_no_index_and_pin_every_package() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        for line in lock.read_text().splitlines():
            if line.startswith((" ", "#")) or not line:
                continue
            assert re.match(r"[a-z0-9][a-z0-9._-]*(\[[a-z,]+\])?==[^ ]+( ; .*)? \\$", line), f"{lock.name}: {line}"
    # a lock is complete, and pip must not resolve it again: a package's wish for `other[extra]>=1` makes it look at the
    # newest release first, which has no hash here, and the installation fails on the day that one appears
    installs = re.findall(r"install .*-r requirements/", (ROOT / "Makefile").read_text())
    assert len(installs) == 5
    assert all("--no-deps" in line for line in installs)


def test_no_file_names_a_package_host_or_a_private_path() -> None:
    # Spelt in halves, so that this file does not accuse itself.
    banned = [
        "py" + "pi.org",
        "python" + "hosted.org",
        "npm" + "js.org",
        "deb.deb" + "ian.org",
        "/wo" + "rk/",
        "/ho" + "me/",
    ]
    pattern = re.compile("|".join(map(re.escape, banned)).encode())
    guilty = [str(p.relative_to(ROOT)) for p in tracked_files() if pattern.search(p.read_bytes())]
    assert not guilty


def test_the_command_line_reference_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/gen_cli_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr or done.stdout
