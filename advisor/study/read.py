"""A study file, checked before anything is computed: keys, names, specs, targets and traces."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advisor.catalog import Catalog, load_catalog
from advisor.catalog.files import read_toml
from advisor.errors import AdvisorError, BadData, UnknownName, printable
from advisor.recommend.ask import parse_slo
from advisor.schema import EngineFacts, first_error
from advisor.schema.study import MAX_CELLS, Study, StudyDeployment, StudyWorkload
from advisor.study.trace import digest, read_trace
from advisor.units import MIB

MAX_STUDY_BYTES = 64 * MIB
NO_SLO = "none"


def _check_keys(table: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in table:
        if key not in known:
            known = tuple(known)
            raise UnknownName(f"key{where}", key, known, f"Keys: {', '.join(known)}.")


def _sentence(error: ValidationError) -> str:
    return first_error(error).replace("'value' value error, ", "").replace("value error, ", "")


def _with_trace(workload: StudyWorkload, folder: Path) -> StudyWorkload:
    """Return a trace workload with its path made absolute and the digest of its content."""
    if not workload.trace:
        return workload
    path = (folder / workload.trace).resolve()
    found = digest(path)
    if workload.trace_sha256 not in ("", found):
        raise BadData(printable(path, 200), f"its SHA-256 is {found}, the study says {workload.trace_sha256}")
    read_trace(path, workload.trace_name, workload.label)
    named = {"trace": str(path), "trace_sha256": found, "name": workload.label}
    return workload.model_copy(update=named)


def parse_study(table: dict[str, Any], folder: Path, catalog: Catalog) -> Study:
    """Return the study of a table; traces are looked for in `folder`. Raises AdvisorError with one sentence."""
    _check_keys(table, Study.model_fields, "")
    for workload in table["workloads"] if isinstance(table.get("workloads"), list) else ():
        if isinstance(workload, dict):
            _check_keys(workload, StudyWorkload.model_fields, " of a workload")
    if isinstance(table.get("deployment"), dict):
        _check_keys(table["deployment"], StudyDeployment.model_fields, " of the deployment")
    try:
        study = Study.model_validate(table)
    except ValidationError as error:
        raise BadData("study", _sentence(error)) from None
    if study.n_cells > MAX_CELLS:
        raise BadData(
            "study", f"asks for {study.n_cells:,} cells; at most {MAX_CELLS:,} are taken, split it in several"
        )
    for model in study.models:
        catalog.model(model)
    for gpus in study.gpus:
        catalog.clusters(gpus)
    for slo in study.slos:
        if slo.strip().lower() != NO_SLO:
            parse_slo(slo)
    for workload in study.workloads:
        catalog.workload(workload.preset)
    EngineFacts.from_table(catalog.engine("vllm"), study.engine_version)
    workloads = tuple(_with_trace(w, folder) for w in study.workloads)
    return study.model_copy(update={"workloads": workloads})


def read_study(path: Path, catalog: Catalog | None = None) -> Study:
    """Return the study of a TOML file. Raises BadData: the file, and one sentence about its first fault."""
    shown = printable(path, 200)
    table = read_toml(path, MAX_STUDY_BYTES)
    table.setdefault("name", path.stem)
    try:
        return parse_study(table, path.resolve().parent, catalog or load_catalog())
    except BadData as error:
        if error.path != "study":
            raise
        raise BadData(shown, error.why) from None
    except AdvisorError as error:
        raise BadData(shown, str(error)) from None
