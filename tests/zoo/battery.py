"""What holds for every model of the zoo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from octavo.nn.door import TorchDoor
from octavo.numerics.arrays import tensors_in
from octavo.pipeline import Run
from octavo.spec.facts import Slot
from octavo.spec.recipe import Recipe
from octavo.spec.rule import Rule, slot_rule

ACTIVATIONS = (Slot.INPUT, Slot.QUERY, Slot.KEY, Slot.VALUE, Slot.ATTENTION_OUTPUT)
SCHEME = {Slot.WEIGHT: slot_rule(Slot.WEIGHT, "int2-channel")}
SCHEME |= {slot: slot_rule(slot, "int2-tensor") for slot in ACTIVATIONS}
COARSE = Recipe("coarse", (Rule(("*",), SCHEME, is_optional=True, origin="coarse"),))
"""Two bits wherever a quantizer can be, norms and outputs left."""


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Everything floating that the model returns, as one vector; torch's fused layers are not taken."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        result = model(**batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
    return torch.cat([t.flatten().float() for t in tensors_in(_values(result))])


DEAD = {
    # several masks are asked for: the first is dropped; the sample's points are all of one kind
    "sam": ("mask_decoder.output_hypernetworks_mlps.0.", "prompt_encoder.point_embed."),
    "sd3": ("transformer_blocks.1.attn.add_q_proj.",),  # the last block drops its text
}
"""Parts that compute what the model then throws away."""


def excused(name: str, run: Run, quantizer: str) -> bool:
    """Whether a quantizer may change nothing: a dead part, one that the sample misses, or one that only sees zeros."""
    site = quantizer.rpartition(".")[0]
    told = "\n".join(run.record.warnings)
    is_zero = f"'{site}.input_quantizer' stays off: every value in the calibration data was 0" in told
    is_missed = bool(run.plan.decision(site).site.unreached)
    return is_zero or is_missed or quantizer.startswith(DEAD.get(name, ("(none)",)))


def _values(result: Any) -> Any:
    return vars(result) if type(result).__module__.startswith("diffusers") else result


def inert(door: TorchDoor, batch: dict[str, Any]) -> list[str]:
    """Quantizers that, alone at two bits, change no output."""
    with door.disabled(lambda name: True):
        reference = outputs(door.model, batch)
    found = []
    for quantizer in door.quantizer_names():
        with door.disabled(lambda name, kept=quantizer: name != kept):
            if torch.equal(outputs(door.model, batch), reference):
                found.append(quantizer)
    return found


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that ``strip`` must give back, but its tensors."""
    return {
        path: (
            type(module),
            {name: _plain(value) for name, value in vars(module).items() if not name.startswith("_")},
            list(module._modules),
            [list(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")],
            module.training,
        )
        for path, module in model.named_modules()
    }


def _plain(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def bits(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Identity and values of every tensor."""
    return {key: (id(t), t.detach().clone()) for key, t in model.state_dict(keep_vars=True).items()}


def same_bits(before: dict[str, tuple[int, Tensor]], after: dict[str, tuple[int, Tensor]]) -> bool:
    """Whether both have the same tensors, object by object and bit by bit."""
    return before.keys() == after.keys() and all(
        before[key][0] == after[key][0] and torch.equal(before[key][1], after[key][1]) for key in before
    )
