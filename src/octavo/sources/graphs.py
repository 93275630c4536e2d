"""An ``.onnx`` file as a module: tensors in by name, tensors out by name, run by onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.numerics.arrays import array_of, tensor_of
from octavo.sources.extras import require

GRAPH_FILE = "graph.onnx"
"""What a run directory keeps of a graph: everything but its weights."""

Arrays = Mapping[str, np.ndarray[Any, Any]]
_INTEGERS = {"tensor(int32)": torch.int32, "tensor(int64)": torch.int64, "tensor(bool)": torch.bool}
_FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


def open_session(graph: Path | bytes) -> Any:
    """An onnxruntime session on the CPU that rounds where QuantizeLinear says so and fuses nothing across it.

    Raises:
        UserError: onnxruntime cannot run the graph; the message carries its reason.
    """
    require("onnxruntime", needed_for="running ONNX files", extra="onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, and need not be printed as well
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Threads of one session that wait for work take the processor from another's, and from torch.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        source = graph if isinstance(graph, bytes) else str(graph)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        name = "the graph" if isinstance(graph, bytes) else graph
        raise UserError(f"onnxruntime cannot run {name}: {reason.strip()}") from error


def check_graph_file(path: Path) -> None:
    """Raise ``UserError`` unless ``path`` holds a graph."""
    require("onnx", needed_for="reading ONNX files", extra="onnx")
    from google.protobuf.message import DecodeError

    import onnx

    try:
        nodes = onnx.load(path, load_external_data=False).graph.node
    except DecodeError as error:
        raise UserError(f"model '{path}' is not an ONNX file: it is damaged, or something else by that name") from error
    if not nodes:
        raise UserError(f"model '{path}' holds no graph: the file is empty, or was cut short")


def _reason(message: str) -> str:
    """What onnxruntime says, without its error code and the place in its own sources.

    >>> _reason("[ONNXRuntimeError] : 1 : FAIL : at Add. Status Message: /a/b.h:58 void F(int) x was false. 7 by 8")
    'at Add. 7 by 8'
    """
    message = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message.strip())
    return re.sub(r"Status Message: /\S+:\d+ .*? was false\. ", "", message)


@dataclass(frozen=True, slots=True)
class GraphInput:
    """One input: its name, its type as onnxruntime writes it, and its sizes, words where they are open."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]


class GraphModule(nn.Module):
    """A graph in a file. It has no parameters that torch knows of; ``simulate`` puts another session under it.

    Args:
        path: The ``.onnx`` file; its weights may lie beside it.

    ``marked`` gives the graph with its quantizers, for who writes it; ``None`` while there are none.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.marked: Callable[[], Any] | None = None
        self._open: Callable[[], Any] = lambda: open_session(path)
        self._session: Any = None
        self._inputs: tuple[GraphInput, ...] = ()
        self._run: Callable[[Arrays], Arrays] | None = None

    @property
    def session(self) -> Any:
        """The file as it is, opened when first needed."""
        if self._session is None:
            self._session = self._open()
        return self._session

    @property
    def inputs(self) -> tuple[GraphInput, ...]:
        """What goes in; known without the session once it was asked."""
        if not self._inputs:
            self._inputs = tuple(GraphInput(v.name, v.type, tuple(v.shape)) for v in self.session.get_inputs())
        return self._inputs

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of what goes in."""
        return tuple(value.name for value in self.inputs)

    @property
    def base_model(self) -> GraphModule:
        """Itself: there is no head to leave aside."""
        return self

    def reopen(self, open_again: Callable[[], Any]) -> None:
        """Compute by what ``open_again`` opens instead of the file: the file has no weights."""
        self._open, self._session, self._inputs = open_again, None, ()

    def example(self) -> dict[str, Tensor]:
        """Made-up inputs: two samples, eight of whatever else is open, ones and zeros."""
        made = {}
        for value in self.inputs:
            sizes = [size if isinstance(size, int) else 2 if axis == 0 else 8 for axis, size in enumerate(value.shape)]
            dtype = _INTEGERS.get(value.type)
            made[value.name] = torch.zeros(sizes) if dtype is None else torch.ones(sizes, dtype=dtype)
        return made

    def simulate(self, run: Callable[[Arrays], Arrays] | None) -> None:
        """Compute by ``run`` from now on; ``None``: as the file says. Meanwhile the file's own weights are not kept."""
        if run is not None and self.inputs:
            self._session = None
        self._run = run

    def arrays(self, *args: Tensor, **kwargs: Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """A batch as the graph wants it: its inputs by name, of its types.

        Raises:
            UserError: an input is missing.
        """
        given = {**dict(zip(self.input_names, args, strict=False)), **kwargs}
        arrays = {}
        for value in self.inputs:
            if value.name not in given:
                raise UserError(
                    f"{self.path.name} has an input '{value.name}' {list(value.shape)}, and the batch has "
                    f"{', '.join(map(repr, given)) or 'nothing'}: name arrays like the graph's inputs"
                )
            dtype = _INTEGERS.get(value.type) or _FLOATS.get(value.type)
            tensor = given[value.name]
            arrays[value.name] = array_of(tensor if dtype is None else tensor.to(dtype))
        return arrays

    def arrays_of(self, batch: Any) -> dict[str, np.ndarray[Any, Any]]:
        """``arrays`` of a tensor, a tuple or a dict."""
        match batch:
            case Tensor():
                return self.arrays(batch)
            case Mapping():
                return self.arrays(**batch)
            case tuple() | list():
                return self.arrays(*batch)
        raise UserError(f"a batch is a tensor, a tuple of arguments or a dict of them, not a {type(batch).__name__}")

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """The graph's outputs by name."""
        arrays = self.arrays(*args, **kwargs)
        if self._run is not None:
            found: Arrays = self._run(arrays)
        else:
            names = [value.name for value in self.session.get_outputs()]
            try:
                found = dict(zip(names, self.session.run(None, arrays), strict=True))
            except Exception as error:  # onnxruntime raises types of its own
                raise RuntimeError(_reason(str(error))) from error
        outputs = {name: tensor_of(value) for name, value in found.items()}
        tokens = next((value for value in outputs.values() if value.ndim == 3), None)
        if tokens is not None and "text_embeds" not in outputs:
            outputs.setdefault("last_hidden_state", tokens)
        return outputs
