"""A user's own quantized counterpart for a module class of their own."""

from __future__ import annotations

from torch import nn

from octavo.errors import UserError
from octavo.nn.layers import LayerKind, register_kind, through
from octavo.spec.facts import Slot

__all__ = ["register", "through"]


def register(
    module_class: type[nn.Module],
    replacement: type[nn.Module],
    *,
    operation: str = "linear",
    slots: tuple[Slot | str, ...] = (Slot.WEIGHT, Slot.INPUT, Slot.OUTPUT),
    is_transposed: bool = False,
) -> None:
    """Quantize ``module_class`` by giving its instances the class ``replacement``.

    Args:
        module_class: The class in the user's models; its weight, if it has one, is the parameter ``weight``.
        replacement: A class whose ``forward`` sends values through ``octavo.nn.layers.through(self, slot, value)``;
            its ``__init__`` is not called.
        operation: What ``operation:`` patterns of recipes call it.
        slots: Where its ``forward`` takes quantizers.
        is_transposed: The weight is stored with the input axis first.

    Raises:
        UserError: not two module classes, or a slot that does not exist.

    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return nn.functional.linear(2 * x, self.weight, self.bias)
    >>> class QuantScaled(Scaled):
    ...     def forward(self, x):
    ...         x = through(self, Slot.INPUT, 2 * x)
    ...         return nn.functional.linear(x, through(self, Slot.WEIGHT, self.weight), self.bias)
    >>> register(Scaled, QuantScaled, slots=("weight", "input"))
    """
    for cls in (module_class, replacement):
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise UserError(f"register takes two classes of modules, not {cls!r}")
    try:
        known = tuple(Slot(slot) for slot in slots)
    except ValueError as error:
        raise UserError(f"{error}: slots are {', '.join(slot.value for slot in Slot)}") from error
    register_kind(module_class, LayerKind(operation, replacement, known, is_transposed))
