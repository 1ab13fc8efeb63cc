"""Predictions: laws composed into memory, step time, a replay of the scheduler, training, power.

The package is callable, for the reason given in `advisor.recommend`: `advisor.predict(...)` is `predict_vllm(...)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from advisor.predict.serving import predict_vllm

        return predict_vllm(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
