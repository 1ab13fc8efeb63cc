"""The JSON form of an answer: a versioned contract for scripts."""

from __future__ import annotations

from typing import Any

from advisor.schema import Plan, Prediction, Recommendation


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as `prediction` (name to value, low, high) with its breakdowns and method beside it."""
    return {
        "prediction": {name: q.model_dump(mode="json") for name, q in prediction.quantities.items()},
        "breakdowns": [b.model_dump(mode="json") for b in prediction.breakdowns],
        "method": prediction.method,
        "is_saturated": prediction.is_saturated,
    }


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
