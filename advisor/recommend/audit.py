"""Published claims against physics, measurements and the tools' own rules: one verdict a claim, with our number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from advisor.predict.deepspeed_paths import DEEPSPEED_BACKENDS
from advisor.recommend.audit_figures import JUDGES, MEANINGS, claimed_interval, finding, readings_of
from advisor.recommend.audit_search import Auditor, Scenario, Serve, vllm_serve
from advisor.recommend.claims import Names, judge_statement
from advisor.schema import Backend, Interval
from advisor.schema.claims import AuditReport, ClaimsFile, FigureClaim, Finding, Setup, StatementClaim, Verdict
from advisor.units import format_bytes, format_change, format_rate, format_s, format_w


def _judge_ratio(claims: Sequence[FigureClaim], file_setup: Setup) -> Iterator[Finding]:
    """Compare a published power gain with the two published powers that it comes from."""
    powers: dict[Backend | None, float] = {}
    for c in claims:
        if c.quantity == "board_power_w":
            powers[(c.setup or file_setup).backend] = c.value
    for claim in claims:
        if claim.quantity != "power_gain_frac":
            continue
        vllm = powers.pop("vllm", None)
        others = list(powers.values())
        if vllm is None or not others:
            yield finding(claim, "undecided", "the file names no two powers to compare", "arithmetic", None)
            continue
        found = others[0] / vllm - 1
        ours = Interval(value=found, low=found - 0.005, high=found + 0.005)
        verdict: Verdict = "consistent" if abs(found - claim.value) < 0.005 else "wrong"
        ratio = f"{format_w(others[0])} over {format_w(vllm)} is {format_change(found, 1)}"
        why = f"{ratio}: the arithmetic, not the measurement"
        yield finding(claim, verdict, why, "arithmetic on the claimed figures", ours)


def _contradictions(auditor: Auditor, claims: ClaimsFile) -> Iterator[Finding]:
    """Check figures of one setup against each other: Little's law, a full static batch, memory against utilisation."""
    groups: dict[Setup, dict[str, FigureClaim]] = {}
    for claim in claims.figures:
        groups.setdefault(claim.setup or claims.setup, {})[claim.quantity] = claim
    for setup, by in groups.items():
        rate = by.get("requests_per_s")
        latency = by.get("latency_p99_s") or by.get("e2e_p99_s")
        if rate and latency:
            longest = claimed_interval(latency).high
            in_flight = rate.value * longest
            why = f"{rate.value:g} requests/s x {format_s(longest)} = {in_flight:.1f} requests at once (Little's law)"
            verdict: Verdict = "consistent"
            if setup.static_batch and in_flight < setup.static_batch:
                least = setup.static_batch / rate.value
                why += (
                    f", yet a static batch of {setup.static_batch} at that rate lasts {format_s(least)}: at most one of"
                    " rate, batch and latency (end to end) is right"
                )
                verdict = "impossible"
            scenario = ""
            source = "Little 1961, doi:10.1287/opre.9.3.383, on the claimed figures"
            searched = auditor.scenarios(setup) if verdict == "consistent" else []
            if searched:
                readings = readings_of(latency)
                both = [
                    (reading, s)
                    for reading in readings
                    for s in searched
                    if _gives(s, rate, rate.quantity) and _gives(s, latency, reading)
                ]
                usual = [(reading, s) for reading, s in both if s.is_usual]
                for reading, s in (usual or both)[:1]:
                    meaning = MEANINGS[reading.split("_")[0]]
                    scenario = str(s) if usual and reading == readings[0] else f"latency as {meaning}: {s}"
                    if usual and reading != readings[0]:
                        verdict = "implausible"
                        why += f"; both can hold with the latency as {meaning} only"
                if not usual:
                    verdict = "implausible"
                    why += (
                        f"; of {len(searched)} searched scenarios {len({id(s) for _, s in both})} give both figures"
                        " (latency read as end to end, first token or per token), none with ordinary lengths"
                    )
                source += "; serving model of this project"
            yield Finding(
                id=f"{rate.id}+{latency.id}",
                text=f"{rate.text} and {latency.text}",
                verdict=verdict,
                why=why,
                ours=Interval(value=in_flight, low=in_flight, high=in_flight),
                quantity="requests_in_flight",
                scenario=scenario,
                source=source,
            )


def _gives(scenario: Scenario, claim: FigureClaim, reading: str) -> bool:
    """Return whether a scenario's interval of a quantity meets the claimed figure."""
    claimed, q = claimed_interval(claim), scenario.prediction.quantities.get(reading)
    return q is not None and q.low <= claimed.high and q.high >= claimed.low


def _against_each_other(auditor: Auditor, claims: ClaimsFile) -> Iterator[Finding]:
    groups: dict[Setup, dict[str, FigureClaim]] = {}
    for claim in claims.figures:
        groups.setdefault(claim.setup or claims.setup, {})[claim.quantity] = claim
    for setup, by in groups.items():
        memory, share = by.get("memory_bytes_per_gpu"), by.get("memory_utilization_frac")
        if memory and share:
            device = auditor.hardware(setup)[1].device_memory_bytes
            found = memory.value / device
            is_same = abs(found - share.value) < 0.03
            yield Finding(
                id=f"{memory.id}+{share.id}",
                text=f"{memory.text} and {share.text}",
                verdict="consistent" if is_same else "wrong",
                why=f"{format_bytes(memory.value)} of {format_bytes(device)} is {found:.0%}, claimed {share.value:.0%}",
                ours=Interval(value=found, low=found, high=found),
                quantity="memory_utilization_frac",
                source="arithmetic on the claimed figures and the datasheet",
            )


def _judge_statement(auditor: Auditor, claim: StatementClaim, setup: Setup, names: Names) -> Finding:
    if claim.rule == "offline_choice":
        return _judge_offline(auditor, claim, claim.setup or setup)
    ruling = judge_statement(claim.rule, claim.subject, claim.setup or setup, names)
    return Finding(
        id=claim.id,
        text=claim.text,
        verdict=ruling.verdict,
        why=ruling.why,
        ours=ruling.ours,
        quantity=ruling.quantity,
        source=ruling.source,
    )


def _judge_offline(auditor: Auditor, claim: StatementClaim, setup: Setup) -> Finding:
    """Judge 'DeepSpeed for offline work': the best tokens per second of each side under a deep queue."""
    lengths = {k: int(claim.subject.get(k, 0)) for k in ("prompt_tokens", "output_tokens")}
    best: dict[str, tuple[float, Interval, str]] = {}
    for backend in ("vllm", *DEEPSPEED_BACKENDS):
        asked = setup.model_copy(update={"backend": backend, "weight_dtype": "bf16", **lengths})
        for s in auditor.scenarios(asked):
            ours = s.prediction.quantities["output_tokens_per_s"]
            side = "vllm" if backend == "vllm" else "deepspeed"
            if side not in best or ours.value > best[side][0]:
                best[side] = (ours.value, ours, str(s))
    source = "serving models of this project; DeepSpeed's best path, deep queue"
    if "deepspeed" not in best:
        return Finding(id=claim.id, text=claim.text, verdict="wrong", why="no DeepSpeed path fits", source=source)
    value, interval, where = best["deepspeed"]
    why = f"DeepSpeed gives at most {format_rate(value, 'output tokens')} ({where})"
    if "vllm" not in best:
        why += "; no serving model of vLLM was given to compare with"
        return Finding(id=claim.id, text=claim.text, verdict="undecided", why=why, ours=interval, source=source)
    other = best["vllm"]
    why += (
        f", vLLM {format_rate(other[0], 'output tokens')} ({other[2]}). DeepSpeed's place is training, and models that"
        " GPU memory cannot hold (ZeRO-Inference)"
    )
    verdict: Verdict = "wrong" if other[1].low > interval.high else "consistent" if value > other[0] else "implausible"
    return Finding(
        id=claim.id,
        text=claim.text,
        verdict=verdict,
        why=why,
        ours=interval,
        quantity="output_tokens_per_s",
        source=source,
    )


def audit(claims: ClaimsFile, names: Names, serve: Serve | None = None) -> AuditReport:
    """Return a verdict on every claim of a file, and on the claims against each other.

    `names` is the catalogue; `serve` predicts vLLM, by default this project's replay with the catalogue's coefficients
    (a catalogue without them leaves vLLM's rates and latencies to physical bounds).
    A figure is *consistent* when some ordinary scenario gives it within our 90 % interval, *implausible* when only an
    extraordinary one does, *impossible* when none does or a physical bound forbids it. A statement is judged by a rule.
    Raises UnknownName for models, GPUs and rules that do not exist.
    """
    auditor = Auditor(names, serve or vllm_serve(names))
    findings = []
    for claim in claims.figures:
        if claim.quantity == "power_gain_frac":
            continue
        judge = JUDGES.get(claim.quantity)
        if judge is None:
            findings.append(finding(claim, "undecided", f"no law judges a {claim.quantity} alone", "none", None))
            continue
        findings.append(judge(auditor, claim, claim.setup or claims.setup))
    findings += _judge_ratio(claims.figures, claims.setup)
    findings += _contradictions(auditor, claims)
    findings += _against_each_other(auditor, claims)
    findings += [_judge_statement(auditor, c, claims.setup, names) for c in claims.statements]
    return AuditReport(title=claims.title, url=claims.url, findings=tuple(findings))
