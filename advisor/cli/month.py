"""Lines of a month: rent by provider, electricity, emissions."""

from __future__ import annotations

from advisor.cli.text import bullet, table
from advisor.schema import Interval
from advisor.schema.month import Month
from advisor.units import format_usd, plural

SHOWN_BILLS = 6


def month_lines(found: Month) -> list[str]:
    """Return a month's bills as lines of text."""

    def kwh(interval: Interval) -> str:
        return f"{interval.value:,.0f} kWh [{interval.low:,.0f} - {interval.high:,.0f}]"

    lines = ["", f"A month of such days: {plural(found.n_gpus, 'GPU')}"]
    lines += bullet(f"boards {kwh(found.board_kwh)}, facility {kwh(found.facility_kwh)}")
    if found.electricity_usd is not None:
        low, high = format_usd(found.electricity_usd.low), format_usd(found.electricity_usd.high)
        lines += bullet(f"electricity {format_usd(found.electricity_usd.value)} [{low} - {high}]")
    if found.kgco2e is not None:
        lines += bullet(f"{found.kgco2e.value:,.0f} kg CO2e [{found.kgco2e.low:,.0f} - {found.kgco2e.high:,.0f}]")
    rows = [
        (
            f"  {b.provider} {b.kind}",
            format_usd(b.usd_per_gpu_h),
            format_usd(b.usd_per_month),
            format_usd(b.usd_per_month_following),
        )
        for b in found.bills[:SHOWN_BILLS]
    ]
    if rows:
        lines += table(("  rent", "a GPU hour", "day and night", "following the load"), rows)
    return lines
