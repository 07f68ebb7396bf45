"""Runs tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2021) on a model in memory, with local data or data of the hub.

    python evaluate.py runs/demo --harness wikitext,hellaswag,arc_easy,arc_challenge,gsm8k --harness-data data/eval

Any task, group or tag of lm-eval can be named. All settings are lm-eval's own, so figures can be compared with published tables
where the data are the same; each result has notes on what differs. lm-eval is optional: `pip install -r
requirements-harness.txt`. Limits: no chat template; no task that runs generated code (lm-eval has no sandbox); one device,
float32.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling import hub
from kindling.errors import did_you_mean, one_line
from kindling.evaluation.harness_data import TASKS, HarnessError, Local, load, wanted

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager

    from kindling.evaluation.harness_model import KindlingLM
    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel

# the metric in published tables is the first of these that a task has
HEADLINES = ("word_perplexity", "acc_norm", "exact_match,strict-match", "acc", "exact_match")
SEED = 1234  # for drawing few-shot examples; lm-eval's default


def run(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    device: torch.device,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Return the headline metric of each task, and every metric under "all", ready for JSON.

    `data` is a folder of local files (see harness_data.py); the data of other tasks come from the hub. `limit` is the number of
    questions for each task. A result has metric, value, stderr (or None), n (questions), shots, task_version, lm_eval (its
    version), data (a path, or "hub"), requests, cropped (the number of requests whose context was cropped), all, and notes:
    sentences on why the figures may differ from published ones.
    Raises HarnessError, before anything runs, if lm-eval, a task or its data are missing.
    """
    require(tasks, data, limit)
    with _quiet():
        manager = _manager(tuple(tasks))
        for task in tasks:
            if task not in manager.task_index:
                raise HarnessError(f"lm-eval has no task called {task!r}; {did_you_mean(task, manager.all_tasks)}")
        single = set(manager.all_subtasks)  # a group or a tag has no data of its own
        local = {task: load(data, task) if data and task in single else None for task in tasks}
        with _hub(needed=None in local.values()) as answers:
            loaded = {task: _load(manager, task, local[task], answers) for task in tasks}
        from kindling.evaluation.harness_model import KindlingLM

        was_training = model.training
        model.eval()  # without dropout
        try:
            results: dict[str, dict[str, Any]] = {}
            for task in tasks:
                lm = KindlingLM(model, tokenizer, device, batch_size, progress)
                results |= _evaluate(lm, task, loaded[task], local[task], limit)
        finally:
            model.train(was_training)
    return results


def require(tasks: Sequence[str], data: Path | None, limit: int | None) -> None:
    """Raise HarnessError unless lm-eval is installed and the arguments can be used."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise HarnessError(
            "--harness must find lm-eval, but it is not installed; run `pip install -r requirements-harness.txt`"
        )
    if not tasks:
        raise HarnessError(f"--harness must name a task, but is empty; try {','.join(TASKS)}")
    if data is not None and not data.is_dir():
        raise HarnessError(
            f"--harness-data must be a folder with the tasks' data, but {data} is none; correct the path"
        )
    if limit is not None and limit < 1:
        raise HarnessError(f"--harness-limit must be at least 1, but is {limit}; leave it out for all questions")


@functools.lru_cache
def _manager(tasks: tuple[str, ...]) -> TaskManager:
    """Return lm-eval's index of tasks. All 14,000 take ten seconds, so they are indexed only if a task is not in TASKS."""
    import lm_eval.tasks

    if not all(task in TASKS for task in tasks):
        return _full_manager()
    folders = {Path(lm_eval.tasks.__file__).parent / TASKS[task].folder for task in tasks}
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=sorted(folders))


@functools.lru_cache
def _full_manager() -> TaskManager:
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager()


def _load(manager: TaskManager, task: str, local: Local | None, hub_answers: bool) -> dict[str, Any]:
    """Return lm-eval's task with its data, in the form that lm-eval's `evaluate` takes."""
    spec: str | dict[str, Any] = task
    if local is not None:
        # inside a group, these settings override the task's own
        settings = {"task": task, "custom_dataset": lambda **_: local.splits, **local.overrides}
        spec = {"group": "local", "task": [settings]}
    try:
        loaded = manager.load([spec])
    except (
        Exception
    ) as e:  # errors of connection, authorisation, format and of a task's own code have no common base class
        if local is not None:
            raise HarnessError(
                f"{local.path} must have the data of {task}, but gave {one_line(e)}; fetch it again"
            ) from None
        put = f"put {wanted(task)} into a folder and name it with --harness-data"
        if task not in manager.all_subtasks:
            put = "name the tasks in it, whose data may be local, one by one"
        offline = (
            isinstance(e, OSError) and not hub_answers
        )  # otherwise a package may be missing that the task's own code needs
        why = "the hub cannot be reached and its cache lacks them" if offline else f"loading them gave {one_line(e)}"
        raise HarnessError(f"the task {task} must have its data, but {why}; check the network, or {put}") from None
    for one in loaded["tasks"].values():
        one.set_fewshot_seed(SEED)
    return {"tasks": loaded["tasks"], "groups": loaded.get("groups", {}) if local is None else {}}


def _evaluate(
    lm: KindlingLM, task: str, loaded: dict[str, Any], local: Local | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Return the result of a task; for a group, the results of its tasks and of the whole group if it has one."""
    from importlib.metadata import version

    from lm_eval.evaluator import evaluate

    try:
        answer = evaluate(lm, loaded, limit=limit, log_samples=False)
    except ValueError as e:  # a task that lm-eval refuses, such as one that runs code
        raise HarnessError(f"the task {task} must be one that lm-eval can run on its data, but {one_line(e)}") from None
    results = {}
    for name, metrics in answer["results"].items():
        if not (numbers := _numbers(metrics)):
            continue  # a group without its own figure
        headline = next((metric for metric in HEADLINES if metric in numbers), next(iter(numbers)))
        at, comma, kind = headline.partition(",")
        shots = answer["n-shot"].get(name, 0)
        results[name] = {
            "metric": headline,
            "value": numbers[headline],
            "stderr": numbers.get(f"{at}_stderr{comma}{kind}"),
            "n": answer["n-samples"].get(name, {}).get("effective"),
            "shots": shots,
            "task_version": answer["versions"].get(name),
            "lm_eval": version("lm-eval"),
            "data": "hub" if local is None else str(local.path),
            "requests": lm.n_requests,
            "cropped": lm.n_cropped,
            "all": numbers,
            "notes": _notes(lm, local, shots, limit),
        }
    return results


def _numbers(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Return the metrics by name ("acc", "exact_match,strict-match"). A value that is not a finite number becomes None."""
    found = {}
    for name, value in metrics.items():
        if "," in name:
            number = isinstance(value, (int, float)) and math.isfinite(value)
            found[name.removesuffix(",none")] = float(value) if number else None
    return found


def _notes(lm: KindlingLM, local: Local | None, shots: int, limit: int | None) -> list[str]:
    """Return sentences on why the figures may differ from published ones."""
    notes = [local.note] if local and local.note else []
    if local and shots and local.overrides.get("fewshot_split") == local.overrides.get("test_split", ""):
        notes.append(f"the {shots} shots are other rows of the split that is scored, for no training split is local")
    if lm.n_cropped:
        notes.append(
            f"{lm.n_cropped:,} of {lm.n_requests:,} requests lost the beginning of their context, which must fit "
            f"{lm.block_size} tokens"
        )
    if lm.n_apart:
        notes.append(
            f"{lm.n_apart:,} continuations were encoded on their own, for they lie in the context's last token"
        )
    if limit is not None:
        notes.append(f"only the first {limit:,} questions")
    return notes


@contextmanager
def _hub(needed: bool) -> Iterator[bool]:
    """Yield whether the hub is needed and answers. If not, its libraries use only their cache inside the `with` statement."""
    if not needed:
        yield False
        return
    with hub.cache_if_unreachable() as why:
        yield why is None and not hub.is_offline()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's log and progress bars, which have no switch of their own."""
    import datasets
    import lm_eval.api.task
    from tqdm import tqdm

    log, bars = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    level, bar = log.level, lm_eval.api.task.tqdm
    log.setLevel(
        logging.ERROR
    )  # it warns about each local data set, and about shots and cropping, which are in `notes`
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if bars:
            datasets.enable_progress_bars()
