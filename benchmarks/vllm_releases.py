"""The release factors of vLLM that published rows give: ``python -m benchmarks.vllm_releases``."""

from __future__ import annotations

import json
from pathlib import Path

from advisor.catalog import load_catalog
from advisor.fit.releases import v0_factor, v1_factor

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden" / "vllm_releases_public.json"


def main() -> None:
    """Print both factors with their intervals and errors."""
    public, catalog = json.loads(GOLDEN.read_text()), load_catalog()
    for era, fit in (("V0", v0_factor), ("V1 without asynchronous scheduling", v1_factor)):
        host, widths, report = fit(catalog, public)
        print(era)
        for name, value in host.items():
            low, high = max(0.0, value - widths[name]), value + widths[name]
            print(f"  {name:<14} {value * 1e3:.3g} ms, {low * 1e3:.3g} to {high * 1e3:.3g}")
        print("  errors: " + ", ".join(f"{kind} {error:.3f}" for kind, error in report.items()))


if __name__ == "__main__":
    main()
