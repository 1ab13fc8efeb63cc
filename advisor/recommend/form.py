"""The JSON form of an answer: a versioned contract for scripts."""

from __future__ import annotations

from typing import Any

from advisor.schema import Interval, Plan, Prediction, Recommendation

WAITING = ("ttft", "e2e", "energy_j_per_request", "slo_attainment", "goodput")
"""First words of the quantities that grow with the time of watching where more arrives than is served."""


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as `prediction` (name to value, low, high) with its breakdowns and method beside it."""
    return {
        "prediction": {name: q.model_dump(mode="json") for name, q in prediction.quantities.items()},
        "breakdowns": [b.model_dump(mode="json") for b in prediction.breakdowns],
        "method": prediction.method,
        "is_saturated": prediction.is_saturated,
    }


def settled(prediction: Prediction) -> dict[str, Interval]:
    """Return the quantities that are numbers: not those that only say how long a saturated plan was watched."""
    q = prediction.quantities
    shown = {k: v for k, v in q.items() if not (prediction.is_saturated and k.startswith(WAITING))}
    capacity = shown.get("saturation_requests_per_s")
    if capacity is not None and "requests_per_s" in q and capacity.value < q["requests_per_s"].value:
        del shown["saturation_requests_per_s"]  # of a closed loop: its clients never send more than is served
    return shown


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan; `prediction[NAME]` is `{value, low, high}`, the remarks of plan and prediction are `notes`."""
    form = plan.model_dump(mode="json", exclude={"prediction", "notes"})
    if "usd_per_h" not in plan.prediction.quantities:
        form["usd_per_h"] = None  # no price is known: zero would read as free
    remarks = [n.model_dump(mode="json") for n in (*plan.notes, *plan.prediction.notes)]
    return form | prediction_json(plan.prediction) | {"notes": remarks}


def plan_from_json(form: Any) -> Plan:
    """Return the plan that `plan_json` wrote; the remarks of its prediction stay among its own.

    Raises ValidationError for anything else.
    """
    if not isinstance(form, dict):
        return Plan.model_validate(form)
    keys = ("breakdowns", "method", "is_saturated")
    prediction = {"quantities": form.get("prediction")} | {key: form[key] for key in keys if key in form}
    own = {key: form[key] for key in Plan.model_fields if key in form}
    return Plan.model_validate(own | {"prediction": prediction, "usd_per_h": form.get("usd_per_h") or 0.0})


def recommendation_json(answer: Recommendation) -> dict[str, Any]:
    """Return the whole answer as plain JSON types, `schema_version` first."""
    shown = {plan.rank: plan_json(plan) for plan in answer.plans}
    form = answer.model_dump(mode="json", exclude={"best", "plans", "best_by_backend"})
    form["best"] = plan_json(answer.best) if answer.best is not None else None
    form["best_by_backend"] = {name: plan.rank for name, plan in answer.best_by_backend.items()}
    form["plans"] = list(shown.values())
    first = ("schema_version", "request", "model", "model_note", "gpus", "best", "best_by_backend", "plans")
    return {key: form[key] for key in first} | {k: v for k, v in form.items() if k not in first}
