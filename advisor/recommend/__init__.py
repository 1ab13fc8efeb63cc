"""What to run: the search over deployments, its ranking, and the reasons.

The package is callable: `advisor.recommend(request)` is `advisor.recommend.recommend(request)`, because a module and
the function of the same name share one attribute of `advisor`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advisor.recommend.answer import recommend
    from advisor.recommend.ask import parse_power_w, parse_slo

__all__ = ["parse_power_w", "parse_slo", "recommend"]
_HOMES = {"recommend": "answer", "parse_slo": "ask", "parse_power_w": "ask"}


def __getattr__(name: str) -> Any:
    # lazily, so that importing one module of the package does not load all of it
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.recommend(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
