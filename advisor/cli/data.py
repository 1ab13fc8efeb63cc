"""Commands about the catalogue: models, gpus, show."""

from __future__ import annotations

import argparse
from typing import Any

from advisor.catalog import Catalog, load_catalog
from advisor.cli.text import bullet, out, print_json, table, wrapped
from advisor.errors import UnknownName
from advisor.predict.shapes import shapes_of, weight_dtype_of
from advisor.schema import SCHEMA_VERSION, Gpu, Model
from advisor.units import format_bytes, format_count, format_usd, format_w


def _attention(model: Model) -> str:
    if model.mla is not None:
        return "MLA"
    if model.n_kv_heads == 1:
        return "MQA"
    return "MHA" if model.n_kv_heads == model.n_heads else f"GQA {model.n_heads}/{model.n_kv_heads}"


def _model_form(model: Model) -> dict[str, Any]:
    shapes = shapes_of(model)
    return model.model_dump(mode="json") | {
        "n_params": shapes.n_params,
        "n_active_params": shapes.n_active_params,
        "weight_dtype": weight_dtype_of(model),
    }


def models(args: argparse.Namespace) -> int:
    """Print the catalogue's models, or those whose name, hub id or alias holds the query."""
    catalog = load_catalog()
    query = args.query.strip().lower()
    entries = [e for e in catalog.models().values() if query in " ".join((e.name, e.hf_id, *e.aliases)).lower()]
    if not entries:
        raise UnknownName("model", args.query, catalog.models(), "Run 'advisor models' for the whole list.")
    found = [catalog.model(e.name)[0] for e in entries]
    if args.json:
        print_json({"schema_version": SCHEMA_VERSION, "models": [_model_form(m) for m in found]})
        return 0
    rows = []
    for m in found:
        s = shapes_of(m)
        active = format_count(s.n_active_params) if m.moe else ""
        row = (m.name, format_count(s.n_params), active, f"{m.n_layers}", _attention(m))
        rows.append((*row, weight_dtype_of(m), f"{m.max_context_tokens:,}", m.hf_id))
    head = ("model", "params", "active", "layers", "attention", "weights", "context", "hub id")
    out("\n".join(table(head, sorted(rows))))
    return 0


def gpus(args: argparse.Namespace) -> int:
    """Print the catalogue's GPUs with the on-demand price that is used."""
    catalog = load_catalog()
    query = args.query.strip().lower()
    found = [g for g in catalog.gpus() if query in " ".join((g.name, g.label, *g.aliases)).lower()]
    if not found:
        raise UnknownName("GPU", args.query, [g.name for g in catalog.gpus()], "Run 'advisor gpus' for the whole list.")
    prices = {g.name: catalog.price(g.name) for g in found}
    if args.json:
        forms = []
        for g in found:
            price = prices[g.name]
            forms.append(g.model_dump(mode="json") | {"price": price.model_dump(mode="json") if price else None})
        print_json({"schema_version": SCHEMA_VERSION, "gpus": forms})
        return 0
    rows = []
    for g in found:
        price = prices[g.name]
        peak = g.peak_flops_per_s.get("bf16") or g.peak_flops_per_s["fp16"]
        fp8 = g.peak_flops_per_s.get("fp8")
        rows.append(
            (
                g.name,
                format_bytes(g.memory_bytes),
                f"{g.memory_bandwidth_bytes_per_s / 1e12:.2f} TB/s",
                f"{peak / 1e12:,.0f}",
                f"{fp8 / 1e12:,.0f}" if fp8 else "-",
                format_w(g.board_power_w),
                f"{g.link} {g.link_bytes_per_s / 1e9:,.0f} GB/s",
                format_usd(price.usd_per_gpu_h) if price else "-",
            )
        )
    head = ("GPU", "memory", "bandwidth", "bf16 TF/s", "fp8 TF/s", "power", "link, one way", "$/h")
    out("\n".join(table(head, rows)))
    return 0


def show(args: argparse.Namespace) -> int:
    """Print everything about one name, with its sources."""
    catalog = load_catalog()
    name = args.name.strip()
    if name == "coefficients":
        return _coefficients(catalog, as_json=args.json)
    if name in catalog.workloads():
        workload = catalog.workload(name)
        form: dict[str, Any] = workload.model_dump(mode="json") | {"source": catalog.workload_source(name)}
        return _print(name, form, [catalog.workload_source(name)], as_json=args.json)
    found: Gpu | Model
    try:
        found = catalog.gpu(name)
        form = found.model_dump(mode="json", exclude={"sources"})
    except UnknownName:
        found = catalog.model(name)[0]
        form = {k: v for k, v in _model_form(found).items() if k != "sources"}
    cited = [f"{s.field}: {s.title} {s.url} {s.date} {s.quote}" for s in found.sources]
    if args.json:
        form["sources"] = [s.model_dump(mode="json") for s in found.sources]
    return _print(found.name, form, cited, as_json=args.json)


def _print(name: str, form: dict[str, Any], sources: list[str], *, as_json: bool) -> int:
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION} | form)
        return 0
    out(name)
    width = max(len(key) for key in form)
    for key, value in form.items():
        if value not in (None, "", [], {}):
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            text = ", ".join(map(str, text)) if isinstance(text, list) else str(text)
            out("\n".join(wrapped(text, indent=" " * (width + 4), first=f"  {key.ljust(width)}  ")))
    out("\n".join(["sources", *(line for s in sources if s.strip() for line in bullet(s))]))
    return 0


def _coefficients(catalog: Catalog, *, as_json: bool) -> int:
    sets = [catalog.coefficients(name) for name in catalog.coefficient_sets()]
    if as_json:
        forms = {s.name: s.model_dump(mode="json") for s in sets}
        print_json({"schema_version": SCHEMA_VERSION, "coefficients": forms})
        return 0
    for fitted in sets:
        report = fitted.report
        out(f"{fitted.name} {fitted.version}: {fitted.engine} {', '.join(fitted.engine_versions)} on {fitted.gpu}")
        if report is not None:
            worst = sorted(report.median_abs_error.items(), key=lambda pair: -pair[1])[:3]
            errors = ", ".join(f"{k} {v:.1%}" for k, v in worst)
            condition = f"condition {report.condition_number:.3g}"
            out(f"  {report.n_cells} cells, {len(report.run_ids)} runs, {condition}; largest median errors: {errors}")
        rows = [
            (f"  {k}", f"{c.value:.4g}", f"{c.low:.4g}", f"{c.high:.4g}", c.unit, "bound" if c.is_at_bound else "")
            for k, c in fitted.coefficients.items()
        ]
        out("\n".join(table(("  coefficient", "value", "low", "high", "unit", ""), rows)))
        out()
    return 0
