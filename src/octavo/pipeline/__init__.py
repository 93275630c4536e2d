"""The story of a run: plan, quantize, evaluate, look closer, write, read back."""

from octavo.pipeline.files import check_graph_target, export, export_graph, forget_checkpoint, load, save
from octavo.pipeline.judging import compared, evaluate, evaluation_record, plan_record, sensitivity, shortened
from octavo.pipeline.making import plan, quantize
from octavo.pipeline.runs import DOORS, LAYOUTS, MODEL_EXPORTERS, Metrics, Model, Run
from octavo.pipeline.verifying import Verification, verify

__all__ = [
    "DOORS",
    "LAYOUTS",
    "MODEL_EXPORTERS",
    "Metrics",
    "Model",
    "Run",
    "Verification",
    "check_graph_target",
    "compared",
    "evaluate",
    "evaluation_record",
    "export",
    "export_graph",
    "forget_checkpoint",
    "load",
    "plan",
    "plan_record",
    "quantize",
    "save",
    "sensitivity",
    "shortened",
    "verify",
]
