"""Which sites a forward pass reached, and where it did not go."""

from __future__ import annotations

from dataclasses import replace

from octavo.nn.trace import Trace
from octavo.spec.facts import SiteFacts


def with_reach(facts: SiteFacts, module: str, seen: Trace) -> SiteFacts:
    """``facts`` that say where the sample did not get to, when it did not get to this site.

    Args:
        facts: Of one site.
        module: Path of the module that holds it, or of one that would, were it a module of its own.
        seen: What the forward pass showed.
    """
    ran = set(seen.order)
    owner, _, _ = module.rpartition(".")
    if module in ran or (facts.macs or 0) > 0 or any(name in seen.read_outside for name in facts.parameters):
        return facts
    if owner in ran and facts.type_name in ("ParameterList", "ParameterDict"):
        return facts
    return replace(facts, unreached=_outermost(module, ran))


def _outermost(module: str, ran: set[str]) -> str:
    """Path of the largest part around ``module`` that did not run."""
    parts = module.split(".")
    paths = [".".join(parts[: k + 1]) for k in range(len(parts))]
    return next((path for path in paths if path not in ran and not _leads_to(path, ran)), module)


def _leads_to(path: str, ran: set[str]) -> bool:
    """A container whose members run (``nn.ModuleList``) never runs itself."""
    return any(other.startswith(f"{path}.") for other in ran)
