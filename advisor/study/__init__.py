"""Studies: the same question for a whole grid, resumable, on one core or on many machines.

`read_study` checks a file, `run_study` computes the cells that its result file lacks.
"""

from advisor.study.read import read_study
from advisor.study.run import run_study

__all__ = ["read_study", "run_study"]
