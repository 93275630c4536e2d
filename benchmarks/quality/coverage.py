"""How much of each model of ``tests/zoo`` is quantized, and by what it acts: octavo, and ModelOpt beside it.

``python -m benchmarks.quality.coverage --peer-python PEER/bin/python --out docs/coverage.md`` writes the page.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import describe_machine, one_line

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT / "tests"))

HEAD = """# Coverage

Tiny models of many architectures with random weights (`tests/zoo`, parts that start at zero made random), each
quantized with one batch. The tests hold for every one of them that the account of the plan adds up to 100 %, that every
quantizer has seen data or the plan says why not, that each quantizer alone at two bits changes an output, and that
`octavo.strip` gives back every bit, class, hook and attribute.

*fp8* is the preset, in octavo, and `FP8_DEFAULT_CFG` in ModelOpt; both leave output heads alone unless said otherwise.
*all* is a recipe that quantizes everything that can be. A weight counts as covered when its quantizer, alone at two
bits, changes an output: parts that the sample does not reach, or whose results the model drops, do not. ModelOpt's
*idle* quantizers are enabled and change nothing, or have seen no data. Multiply-adds are counted with the products of
attention, which no weight has a part in. *Discovery* is octavo's traced forward with everything that it finds out;
models as small as these show its fixed part.

"""


def timed(function: Any, *, times: int = 3) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def ours(name: str) -> dict[str, Any]:
    """One model under the preset and under everything."""
    import octavo
    from octavo.nn.door import TorchDoor
    from octavo.spec.plan import Plan
    from zoo.battery import COARSE, inert
    from zoo.table import made

    model, batch = made(name)
    discovery = timed(lambda: TorchDoor(model, name, batch).facts())
    plan = octavo.plan(model, "fp8", sample=batch)
    start = time.perf_counter()
    run = octavo.quantize(model, COARSE, [batch])
    seconds = time.perf_counter() - start
    facts = run.plan.facts
    idle = {quantizer.removesuffix(".weight_quantizer") for quantizer in inert(run.door, batch)}

    def acting(plan: Plan) -> float:
        weights = [d.site for d in plan.decisions if d.weight is not None and d.site.name not in idle]
        return sum(site.num_weights for site in weights) / facts.num_parameters

    return {
        "parameters": facts.num_parameters,
        "sites": len(facts.sites),
        "attention": sum(site.operation == "attention" for site in facts.sites),
        "fp8": acting(plan),
        "fp8_macs": plan.macs_covered,
        "all": acting(run.plan),
        "all_macs": run.plan.macs_covered,
        "quantizers": len(run.door.quantizer_names()),
        "discovery": discovery,
        "seconds": seconds,
    }


def peer(python: str, names: list[str]) -> dict[str, Any]:
    """The same by ModelOpt, in its own venv."""
    script = str(_ROOT / "benchmarks" / "peers" / "modelopt_zoo.py")
    done = subprocess.run([python, script, *names], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def page(own: dict[str, Any], other: dict[str, Any] | None, machine: dict[str, str]) -> str:
    """The page in Markdown."""
    version = f"ModelOpt {other['version']}" if other else "ModelOpt"
    heads = ["model", "parameters", "sites", "attention", "fp8: % of parameters", "% of MACs", f"{version}: %", "idle"]
    heads += ["all: % of parameters", "% of MACs", "quantizers", "discovery, s", "quantize, s"]
    lines = [" | ".join(heads), " | ".join(["---"] + ["---:"] * (len(heads) - 1))]
    for name, row in own.items():
        theirs = (other or {"models": {}})["models"].get(name, {})
        idle = "" if "error" in theirs or not theirs else str(theirs["inert"] + theirs["blind"])
        compared = "fails" if "error" in theirs else share(theirs.get("covered"))
        cells = [name, f"{row['parameters']:,}", str(row["sites"]), str(row["attention"]), share(row["fp8"])]
        cells += [share(row["fp8_macs"]), compared, idle, share(row["all"]), share(row["all_macs"])]
        cells += [str(row["quantizers"]), f"{row['discovery']:.3f}", f"{row['seconds']:.2f}"]
        lines.append(" | ".join(cells))
    failures = [
        f"- {name}: {theirs['error']}"
        for name, theirs in (other or {"models": {}})["models"].items()
        if "error" in theirs
    ]
    told = ["", f"Where {version} fails:", "", *failures] if failures else []
    how = "`python -m benchmarks.quality.coverage --peer-python PEER/bin/python --out docs/coverage.md`"
    table = [f"| {line} |" for line in lines]
    return HEAD + "\n".join([*table, *told, "", f"Made by {how}: {one_line(machine)}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="names of the zoo; all of them unless given")
    parser.add_argument("--peer-python", help="Python of a venv with nvidia-modelopt, diffusers and transformers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    from zoo.table import ZOO

    names = options.models or list(ZOO)
    own = {name: ours(name) for name in names}
    other = peer(options.peer_python, names) if options.peer_python else None
    machine = describe_machine()
    if options.json:
        print(json.dumps({"machine": machine, "octavo": own, "modelopt": other}))
        return
    text = page(own, other, machine)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
