"""Prometheus alert rules: the plan's targets, saturation and preemption, on vLLM's own metric names."""

from __future__ import annotations

from typing import Any

from advisor.emit.launch import Launch, dump_yaml
from advisor.schema import Target

WINDOW = "5m"
HOLD = "5m"
# At this share of the KV cache the next burst preempts running requests (the pool has no watermark by default).
KV_FULL_FRAC = 0.95
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_SUFFIX = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2e"}


def slo_expression(launch: Launch, target: Target) -> str:
    """Return the PromQL expression that is true while a target is missed."""
    metric = launch.facts.metrics[_SUFFIX[target.metric]]
    if target.statistic == "mean":
        value = f"sum(rate({metric}_sum[{WINDOW}])) / sum(rate({metric}_count[{WINDOW}]))"
    else:
        quantile = _QUANTILES[target.statistic]
        value = f"histogram_quantile({quantile:g}, sum by (le) (rate({metric}_bucket[{WINDOW}])))"
    return f"{value} > {target.max_s:g}"


def _rule(alert: str, expression: str, severity: str, summary: str) -> dict[str, Any]:
    labels = {"severity": severity}
    return {"alert": alert, "expr": expression, "for": HOLD, "labels": labels, "annotations": {"summary": summary}}


def emit_prometheus(launch: Launch) -> str:
    """Return a rule file for Prometheus: one alert a target, and three that warn before targets are missed."""
    names = launch.facts.metrics
    rules = [
        _rule(
            f"Slo{target.metric.title()}{target.statistic.title()}",
            slo_expression(launch, target),
            "page",
            f"{target.metric.upper()} {target.statistic} is above the target of {target.max_s:g} s",
        )
        for target in launch.slo.targets
    ]
    busy = f"avg({names['kv_usage']}) > {KV_FULL_FRAC:g}"
    rules += [
        _rule("KvCacheFull", busy, "warn", "The KV cache is nearly full; requests will wait or be preempted"),
        _rule(
            "RequestsWaiting",
            f"sum({names['waiting']}) > sum({names['running']})",
            "warn",
            "More requests wait than run: the load exceeds what the plan was sized for",
        ),
        _rule(
            "Preemptions",
            f"sum(rate({names['preemptions']}[{WINDOW}])) > 0",
            "warn",
            "Running requests are preempted and recomputed: max-num-seqs is too high for the KV cache",
        ),
    ]
    usage = ["usage: add to rule_files; check with: promtool check rules alerts.yaml"]
    document = {"groups": [{"name": launch.name, "interval": "30s", "rules": rules}]}
    return launch.header("Prometheus alert rules", *usage) + dump_yaml(document)
