"""The base of every noun: frozen, closed, finite."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from advisor.errors import printable

# Whole numbers that a float holds exactly. `lt`, so that it never meets a field's own `le`: of two, pydantic takes one.
PositiveInt = Annotated[int, Field(gt=0, lt=2**53)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**53)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class Noun(BaseModel):
    """A frozen record with named, validated fields; unknown fields and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def first_error(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as one sentence: field, rule, value."""
    problem: Any = error.errors()[0]
    if not problem["loc"]:
        # a rule about several fields says itself which, and its input is the whole object
        return str(printable(problem["msg"].removeprefix("Value error, "), 300))
    if problem["type"] == "missing":
        return f"'{printable('.'.join(str(part) for part in problem['loc']))}' field required"
    where = ".".join(str(part) for part in problem["loc"]) or "value"
    if problem["type"] == "value_error":
        return f"'{printable(where)}': {printable(problem['msg'].removeprefix('Value error, '), 300)}"
    given = problem.get("input")
    shown = printable(given) if isinstance(given, int | float) else repr(printable(given))
    return f"'{printable(where)}' {problem['msg'].lower().replace('input should be', 'must be')} (got {shown})"
