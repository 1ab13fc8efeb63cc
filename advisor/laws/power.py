"""Board power of a GPU from what it does, and what a power limit does to its clock and its speed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Real = Any  # float or NDArray[np.float64]; a law returns what it was given

LOWEST_CLOCK_FRAC = 0.15
"""Lowest clock tried, about 300 of 1980 MHz; an idle H100 of our runs stood at 345 MHz."""


def board_power_w(demand_w: Real, idle_w: Real, limit_w: Real, sharpness: float) -> Real:
    """Return the mean board power [W]: idle power plus the dynamic demand, smoothly held at the board limit.

    ``P = idle + D (1 + (D / (limit - idle))^k)^(-1/k)``, so that P = idle + D far below the limit and P -> limit above.

    demand_w  : D >= 0, what the units would draw at the clock of an unlimited board [W], see `compute_power_w`,
                `memory_power_w` and `link_power_w`; scalars or arrays that broadcast
    idle_w    : draw of a board with a driver loaded and no work [W]
    limit_w   : power limit of the board, above `idle_w` [W]
    sharpness : k >= 1; a mean over seconds mixes prefill at the limit with decode below it, which rounds the corner

    Raises nothing. Not in it: temperature (leakage adds a few per cent on a hot board) and the values in the matrices
    (zeros draw up to 40 % less in a GEMM than random numbers: Gregersen et al. 2024, arXiv:2409.18324).

    Reference: fitted form, data/fitted/power.json; p-norm joining as in `advisor.laws.roofline.smooth_max`.

    >>> float(board_power_w(0.0, 73.0, 700.0, 10.0))
    73.0
    >>> round(float(board_power_w(300.0, 73.0, 700.0, 10.0)), 1)  # half the range: the limit is not felt
    373.0
    """
    ratio = demand_w / (limit_w - idle_w)
    # the larger of 1 and the ratio is factored out, so that a huge demand cannot overflow
    larger = np.maximum(ratio, 1.0)
    joined = larger * ((1.0 / larger) ** sharpness + (ratio / larger) ** sharpness) ** (1.0 / sharpness)
    return idle_w + demand_w / joined


def compute_power_w(flops_per_s: Real, joules_per_flop: Real) -> Real:
    """Return the draw of arithmetic at the nominal clock [W]: ``F e``.

    flops_per_s     : achieved rate F, averaged over wall time [FLOP/s]
    joules_per_flop : energy of one operation e, about 1 pJ for bf16 on Hopper [J]

    Reference: Hong, Kim 2010, doi:10.1145/1815961.1815998 (power as the sum of unit rates times unit energies).

    >>> round(compute_power_w(500e12, 1.0e-12), 6)
    500.0
    """
    return flops_per_s * joules_per_flop


def memory_power_w(bandwidth_frac: Real, full_w: Real, exponent: float) -> Real:
    """Return the draw of moving data from and to device memory [W]: ``full * u^g``.

    bandwidth_frac : u >= 0, bytes per second over the datasheet bandwidth, averaged over wall time
    full_w         : draw at full bandwidth, caches and the units that issue the loads included [W]
    exponent       : 0 < g <= 1; below 1 because the clocks of memory and fabric do not follow a light load

    Reference: fitted form, see docs/power.md; with g = 1 Hong, Kim 2010, doi:10.1145/1815961.1815998.

    >>> float(memory_power_w(0.25, 400.0, 0.5))
    200.0
    """
    return full_w * np.power(bandwidth_frac, exponent)


def link_power_w(bytes_per_s: Real, joules_per_byte: float) -> Real:
    """Return the draw of the GPU-to-GPU link [W]: ``B e``.

    Reference: 5.5 pJ/bit for a 112 Gb/s SerDes (NVIDIA's comparison with NVLink-C2C, 2023), sent and received.

    >>> round(link_power_w(450e9, 2 * 8 * 5.5e-12), 1)
    39.6
    """
    return bytes_per_s * joules_per_byte


def power_limited_clock_frac(demand_w: Real, available_w: Real, exponent: float) -> Real:
    """Return the clock that a power limit leaves, as a share of the nominal clock: ``min(1, (available / D)^(1/n))``.

    demand_w    : D > 0, dynamic draw of the compute units at the nominal clock [W]
    available_w : what limit, idle and memory leave for them, >= 0 [W]
    exponent    : n of ``P ~ f^n``; 3 if voltage followed the clock, 1 if it were fixed

    Assumes that the voltage curve has one slope; at the floor of the voltage (about 0.4 of the nominal clock) the true
    exponent is 1 and this law is too optimistic.

    Reference: ``P = C V^2 f``, Chandrakasan, Sheng, Brodersen 1992, doi:10.1109/4.126534.

    >>> round(float(power_limited_clock_frac(1000.0, 500.0, 2.0)), 4)
    0.7071
    """
    ratio = np.maximum(available_w, 0.0) / np.maximum(demand_w, 1e-12)
    return np.minimum(1.0, ratio ** (1.0 / exponent))


def clock_speed_frac(clock_frac: Real, compute_frac: Real) -> Real:
    """Return the speed of a step at a reduced clock over its speed at the nominal one: ``1 / (c / phi + 1 - c)``.

    clock_frac   : phi in (0, 1], clock over nominal clock
    compute_frac : c in [0, 1], share of the step's time that scales with the clock (memory and host time does not)

    Reference: Amdahl 1967, doi:10.1145/1465482.1465560.

    >>> clock_speed_frac(0.5, 0.5)
    0.6666666666666666
    """
    return 1.0 / (compute_frac / clock_frac + 1.0 - compute_frac)


def power_limited_run(
    limit_w: Real,
    *,
    idle_w: float,
    compute_w: float,
    memory_w: float,
    memory_exponent: float,
    memory_core_frac: float,
    compute_frac: float,
    clock_exponent: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return clock, speed (shares of those at the nominal clock) and board power [W] under each power limit.

    The clock phi solves ``idle + compute phi^(n-1) s + memory s^g (1 - m + m phi^(n-1)) = limit`` with the speed
    ``s(phi)`` of `clock_speed_frac`: operations and bytes per second fall with the speed, the energy of everything on
    the cores' supply (arithmetic, and the share m of moving data) with the voltage.
    `limit_w` is clipped to what the lowest clock that is tried (0.15) still draws.

    limit_w          : board limits [W], an array
    compute_w        : draw of the arithmetic at the nominal clock [W]
    memory_w         : draw of memory and link at the nominal clock [W]
    memory_core_frac : m in [0, 1], share of `memory_w` that is caches and fabric on the cores' supply, not DRAM
    compute_frac     : share of the time that scales with the clock

    Reference: as for `power_limited_clock_frac` and `memory_power_w`.

    >>> clock, speed, power = power_limited_run(np.array([700.0]), idle_w=100.0, compute_w=300.0, memory_w=100.0,
    ...     memory_exponent=1.0, memory_core_frac=0.5, compute_frac=1.0, clock_exponent=2.0)
    >>> float(clock[0]), float(speed[0]), float(power[0])  # the limit is not reached
    (1.0, 1.0, 500.0)
    """
    limits = np.atleast_1d(np.asarray(limit_w, dtype=np.float64))

    def drawn(phi: NDArray[np.float64]) -> NDArray[np.float64]:
        speed = clock_speed_frac(phi, compute_frac)
        energy = phi ** (clock_exponent - 1.0)
        moving = memory_w * speed**memory_exponent * (1.0 - memory_core_frac + memory_core_frac * energy)
        return np.asarray(idle_w + compute_w * energy * speed + moving, dtype=np.float64)

    low, high = np.full(limits.shape, LOWEST_CLOCK_FRAC), np.ones(limits.shape)
    for _ in range(50):  # bisection: power rises with the clock
        middle = 0.5 * (low + high)
        is_above = drawn(middle) > limits
        low, high = np.where(is_above, low, middle), np.where(is_above, middle, high)
    clock = np.where(drawn(np.ones(limits.shape)) <= limits, 1.0, low)
    return clock, np.asarray(clock_speed_frac(clock, compute_frac), dtype=np.float64), drawn(clock)


def node_power_w(boards_w: Real, n_gpus: Real, other_w_per_gpu: float) -> Real:
    """Return the power at the node's plugs [W]: GPU boards plus CPUs, memory, switches, network cards, fans, losses.

    boards_w        : power of all boards of the node [W]
    other_w_per_gpu : the rest, shared among its GPUs [W]; 360 W for an 8 x H100 SXM node under full load

    Reference: Latif et al. 2025, IEEE Access 13:61740, arXiv:2412.08602: at most 8.48 kW measured on an 8 x H100 HGX
    node (rated 10.2 kW); 8.48 kW - 8 x 700 W = 8 x 360 W. The rating leaves 8 x 575 W.

    >>> node_power_w(8 * 700.0, 8, 360.0)
    8480.0
    """
    return boards_w + n_gpus * other_w_per_gpu


def nodes_in(rack_w: Real, node_w: Real) -> Real:
    """Return how many whole nodes a power budget feeds: ``floor(budget / node)``.

    >>> int(nodes_in(40e3, 10.2e3))
    3
    """
    return np.floor(rack_w / node_w + 1e-9)
