"""Who runs a graph: onnxruntime, else OpenVINO, else onnx's own reference evaluator, which takes everything slowly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

import onnx
from octavo.errors import UserError

_log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Runner:
    """One graph, ready to run.

    Args:
        name: Who runs it, with the version.
        run: Inputs by name to outputs in the order of the graph.
        refusals: Who was asked before, and why not.
        is_onnxruntime: Whether that is onnxruntime, which can be asked what it fused.
    """

    name: str
    run: Callable[[Arrays], list[np.ndarray[Any, Any]]]
    refusals: tuple[str, ...] = ()
    is_onnxruntime: bool = False


def open_runner(path: Path, outputs: Sequence[str] = (), *, optimized: bool = True) -> Runner:
    """The first reader that takes the graph ``path``.

    Args:
        path: An ``.onnx`` file.
        outputs: Values inside to give out behind the graph's own outputs.
        optimized: Let onnxruntime fuse as it does where it is deployed; without, it runs node by node.

    Raises:
        UserError: nobody can run it.
    """
    model = with_outputs(path, outputs) if outputs else None
    refusals: list[str] = []
    for open_one in (_onnxruntime, _openvino, _reference):
        try:
            runner = open_one(path, model, optimized)
        except ModuleNotFoundError as error:
            refusals.append(f"{error.name} is not installed")
            continue
        except Exception as error:  # each reader raises types of its own
            refusals.append(f"{open_one.__name__.strip('_')}: {_first_line(error)}")
            continue
        run = _in_types_of(path, runner.run)
        return Runner(runner.name, run, tuple(refusals), is_onnxruntime=open_one is _onnxruntime)
    raise UserError(f"{path}: nobody can run it: {'; '.join(refusals)}")


def _in_types_of(
    path: Path, run: Callable[[Arrays], list[np.ndarray[Any, Any]]]
) -> Callable[[Arrays], list[np.ndarray[Any, Any]]]:
    """``run``, fed numbers in the floating types that the graph's inputs have."""
    types = {value.name: value.dtype.numpy() for value in ir.load(path).graph.inputs if value.dtype is not None}

    def fitted(inputs: Arrays) -> list[np.ndarray[Any, Any]]:
        return run({name: x.astype(types[name]) if x.dtype.kind == "f" else x for name, x in inputs.items()})

    return fitted


def with_outputs(path: Path, names: Sequence[str]) -> onnx.ModelProto:
    """The graph ``path`` with values inside as outputs, too; weights that lie beside it stay there."""
    model = ir.load(path)
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in names:
        if values[name] not in model.graph.outputs:
            model.graph.outputs.append(values[name])
    return ir.to_proto(model)


def _onnxruntime(path: Path, model: onnx.ModelProto | None, optimized: bool) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    source = str(path) if model is None else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    how = "CPU" if optimized else "CPU, node by node"
    return Runner(f"onnxruntime {onnxruntime.__version__} ({how})", lambda inputs: session.run(None, dict(inputs)))


def _openvino(path: Path, model: onnx.ModelProto | None, optimized: bool) -> Runner:
    import openvino

    core = openvino.Core()
    read = core.read_model(str(path) if model is None else _whole(model, path).SerializeToString())
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Arrays) -> list[np.ndarray[Any, Any]]:
        results = compiled(dict(inputs))
        given = [np.asarray(results[output]) for output in compiled.outputs]
        names = [output.get_element_type().get_type_name() for output in compiled.outputs]
        bf16 = ml_dtypes.bfloat16  # OpenVINO's arrays call its bits float16
        return [x.view(bf16) if name == "bf16" else x for x, name in zip(given, names, strict=True)]

    return Runner(f"OpenVINO {version('openvino')} (CPU)", run)


def _reference(path: Path, model: onnx.ModelProto | None, optimized: bool) -> Runner:
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class GatherElements(OpRun):
        """onnx 1.23's own fails where more than 32 are gathered from."""

        op_domain = ""

        def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[Any]:
            return (np.take_along_axis(data, indices, axis),)

    evaluator = ReferenceEvaluator(onnx.load(path) if model is None else _whole(model, path), new_ops=[GatherElements])

    def run(inputs: Arrays) -> list[np.ndarray[Any, Any]]:
        results = evaluator.run(None, dict(inputs))
        return list(results.values()) if isinstance(results, dict) else results

    return Runner(f"onnx {onnx.__version__} reference evaluator", run)


def _whole(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """``model``, which is that of ``path``, with the weights that lie beside it."""
    onnx.load_external_data_for_model(model, str(path.parent))
    return model


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()[:200]
