"""Prometheus alert rules: the plan's targets, saturation and preemption, on vLLM's own metric names."""

from __future__ import annotations

import json
from typing import Any

from advisor.emit.launch import Launch, dump_yaml
from advisor.emit.names import model_argument
from advisor.schema import Target

WINDOW = "5m"
HOLD = "5m"
# At this share of the KV cache the next burst preempts running requests (the pool has no watermark by default).
KV_FULL_FRAC = 0.95
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def selector(launch: Launch) -> str:
    """Return the label matcher of the plan's model; a printable JSON string is a PromQL string."""
    return f"{{model_name={json.dumps(model_argument(launch.model), ensure_ascii=False)}}}"


def slo_expression(launch: Launch, target: Target) -> str:
    """Return the PromQL expression that is true while a target is missed."""
    metric, only = launch.facts.metrics[target.metric], selector(launch)
    if target.statistic == "mean":
        value = f"sum(rate({metric}_sum{only}[{WINDOW}])) / sum(rate({metric}_count{only}[{WINDOW}]))"
    else:
        quantile = _QUANTILES[target.statistic]
        value = f"histogram_quantile({quantile:g}, sum by (le) (rate({metric}_bucket{only}[{WINDOW}])))"
    return f"{value} > {target.max_s:g}"


def _rule(alert: str, expression: str, severity: str, summary: str) -> dict[str, Any]:
    labels = {"severity": severity}
    return {"alert": alert, "expr": expression, "for": HOLD, "labels": labels, "annotations": {"summary": summary}}


def emit_prometheus(launch: Launch) -> str:
    """Return a rule file for Prometheus: one alert a target, and three that warn before targets are missed."""
    names, only = launch.facts.metrics, selector(launch)
    rules = [
        _rule(
            f"Slo{target.metric.title()}{target.statistic.title()}",
            slo_expression(launch, target),
            "page",
            f"{target.metric.upper()} {target.statistic} is above the target of {target.max_s:g} s",
        )
        for target in launch.slo.targets
    ]
    busy = f"avg({names['kv_usage']}{only}) > {KV_FULL_FRAC:g}"
    rules += [
        _rule("KvCacheFull", busy, "warn", "The KV cache is nearly full; requests will wait or be preempted"),
        _rule(
            "RequestsWaiting",
            f"sum({names['waiting']}{only}) > sum({names['running']}{only})",
            "warn",
            "More requests wait than run: the load exceeds what the plan was sized for",
        ),
        _rule(
            "Preemptions",
            f"sum(rate({names['preemptions']}{only}[{WINDOW}])) > 0",
            "warn",
            "Running requests are preempted and recomputed: max-num-seqs is too high for the KV cache",
        ),
    ]
    usage = ["usage: add to rule_files; check with: promtool check rules alerts.yaml"]
    document = {"groups": [{"name": launch.name, "interval": "30s", "rules": rules}]}
    return launch.header("Prometheus alert rules", *usage) + dump_yaml(document)
