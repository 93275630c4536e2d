"""Tasks as the command line writes them: ``KIND:DATA`` or ``NAME=KIND:DATA``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from octavo.errors import UserError
from octavo.evaluate.classify import Classification, ZeroShot
from octavo.evaluate.fidelity import Fidelity
from octavo.evaluate.passes import Options
from octavo.evaluate.perplexity import Perplexity
from octavo.evaluate.retrieval import Retrieval
from octavo.evaluate.task import Task
from octavo.sources import Dataset, open_data

TASKS: dict[str, Callable[[str, Dataset, Options], Task]] = {
    "zeroshot": ZeroShot,
    "classification": Classification,
    "retrieval": Retrieval,
    "perplexity": Perplexity,
    "fidelity": Fidelity,
}
_SPEC = re.compile(r"(?:(?P<name>[\w.-]+)=)?(?P<kind>[\w-]+):(?P<data>.+)")


def parse_task(spec: str, options: Options = Options()) -> Task:  # noqa: B008 (frozen)
    """The task that ``spec`` names, with its data opened.

    Args:
        spec: ``retrieval:pairs.jsonl``, ``shapes=zeroshot:demo:shapes-100``; the name is the kind unless given.
        options: batch size, length of texts and windows.

    Raises:
        UserError: not of this form, an unknown kind, or data that is not there or does not fit the kind.
    """
    parts = _SPEC.fullmatch(spec)
    kinds = ", ".join(TASKS)
    if parts is None:
        raise UserError(f"task '{spec}': a task is KIND:DATA or NAME=KIND:DATA; the kinds are {kinds}")
    if parts["kind"] not in TASKS:
        raise UserError(f"task '{spec}': there is no kind '{parts['kind']}'; the kinds are {kinds}")
    return TASKS[parts["kind"]](parts["name"] or parts["kind"], open_data(parts["data"]), options)


def parse_tasks(specs: Iterable[str], options: Options = Options()) -> dict[str, Task]:  # noqa: B008 (frozen)
    """Tasks by name, in the order given.

    Raises:
        UserError: as ``parse_task``, or two tasks have the same name.
    """
    tasks: dict[str, Task] = {}
    for spec in specs:
        task = parse_task(spec, options)
        if task.name in tasks:
            raise UserError(
                f"task '{spec}': another task is called '{task.name}' already; give this one a name of its own:  "
                f"NAME={spec.partition('=')[2] or spec}"
            )
        tasks[task.name] = task
    return tasks
