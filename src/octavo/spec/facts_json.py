"""Facts as plain JSON values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from octavo.spec.facts import ModelFacts, Role, SiteFacts, Slot


def site_to_dict(site: SiteFacts) -> dict[str, Any]:
    """A site without the fields that are empty."""
    fields: dict[str, Any] = asdict(site) | {"slots": [slot.value for slot in site.slots]}
    fields["role"] = site.role.value if site.role is not None else None
    return {name: value for name, value in fields.items() if value not in ("", (), {}, [], None)}


def site_from_dict(data: Mapping[str, Any]) -> SiteFacts:
    """The site that ``site_to_dict`` wrote (``name`` may be the empty string: the model itself)."""
    fields = dict(data)
    fields["name"] = fields.get("name", "")
    fields["slots"] = tuple(Slot(value) for value in fields.get("slots", ()))
    for name in ("base_types", "weight_shape", "shares_input_with", "adds"):
        fields[name] = tuple(fields.get(name, ()))
    fields["role"] = Role(fields["role"]) if fields.get("role") else None
    return SiteFacts(**fields)


def model_to_dict(facts: ModelFacts) -> dict[str, Any]:
    """What is known of the model, without its sites."""
    return {
        "model": facts.model,
        "type_name": facts.type_name,
        "num_parameters": facts.num_parameters,
        "total_bytes": facts.total_bytes,
        "was_traced": facts.was_traced,
        "notes": list(facts.notes),
        "experts": list(facts.experts),
    }


def model_from_dict(data: Mapping[str, Any], sites: tuple[SiteFacts, ...]) -> ModelFacts:
    """The facts that ``model_to_dict`` wrote, with their sites."""
    fields = dict(data)
    fields["notes"] = tuple(fields["notes"])
    fields["experts"] = tuple(fields.get("experts", ()))
    return ModelFacts(sites=sites, **fields)
