"""advisor: how to serve or train a large language model on the GPUs you have.

The whole API: `Request` and `recommend` answer a question; `predict` and `replay` look at one deployment, `power`
at its watts and bills; `validate` compares predictions with run records; `load_catalog` gives models, GPUs, prices and
coefficients. Everything is imported when it is first used, so that `import advisor` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advisor.catalog import load_catalog
    from advisor.fit.validate import validate
    from advisor.predict.capacity import max_rate
    from advisor.predict.serving import predict_vllm as predict
    from advisor.predict.serving import replay
    from advisor.predict.simulate import simulate
    from advisor.recommend import recommend
    from advisor.recommend.power import power
    from advisor.schema import Request

__version__ = "0.1.0"

_HOME = {
    "Request": ("advisor.schema", "Request"),
    "load_catalog": ("advisor.catalog", "load_catalog"),
    "max_rate": ("advisor.predict.capacity", "max_rate"),
    "power": ("advisor.recommend.power", "power"),
    "predict": ("advisor.predict.serving", "predict_vllm"),
    "recommend": ("advisor.recommend", "recommend"),
    "replay": ("advisor.predict.serving", "replay"),
    "simulate": ("advisor.predict.simulate", "simulate"),
    "validate": ("advisor.fit.validate", "validate"),
}

__all__ = [
    "Request",
    "__version__",
    "load_catalog",
    "max_rate",
    "power",
    "predict",
    "recommend",
    "replay",
    "simulate",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module, attribute = _HOME[name]
        # a subpackage may have the same name as the function it holds: the function wins
        value = getattr(import_module(module), attribute)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'advisor' has no attribute '{name}'; it has {', '.join(__all__)}")
