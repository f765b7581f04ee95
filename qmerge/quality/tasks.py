"""How does one arm answer benchmark items? A thin layer over lm-eval: the benchmarks, prompts and scoring are lm-eval's own."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qmerge.errors import Refused, UsageProblem
from qmerge.quality import local_tasks, task_batches
from qmerge.quality.suites import Suite
from qmerge.ranks import ALONE, Ranks
from qmerge.store.templates import ChatWriter

CORRECTNESS = ("acc_norm", "acc", "exact_match", "em")
"""what is taken where the suite names no metric, the first that the task reports: length-normalised accuracy for ARC, HellaSwag, PIQA and
OpenBookQA, as leaderboards print them; lm-eval gives WinoGrande, BoolQ, LAMBADA and MMLU plain accuracy only, GSM8K exact match"""
FAILURES = (OSError, ValueError, KeyError, ImportError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class Item:
    """One answered item. ``loglikelihoods`` (nats) and ``lengths`` (characters, what lm-eval normalises by) have one element per choice;
    a target without alternatives (LAMBADA) has one, generated text none. A log-likelihood that is not finite is None."""

    task: str
    """lm-eval's task; a part of the suite's where that is a group (MMLU)"""
    item: int
    hash: str
    """lm-eval's hash of the item's row"""
    prompt_hash: str
    metric: str
    correct: float
    gold: tuple[int, ...] = ()
    """indices of the right choices, as a rule one"""
    loglikelihoods: tuple[float | None, ...] = ()
    lengths: tuple[int, ...] = ()
    answer: str | None = None
    """generated text, after lm-eval's filter"""
    cluster: str | None = None
    """items with the same label share a passage or sentence; None: it stands alone"""
    truncated: bool = False
    """the prompt is longer than the model's context, and lm-eval cut its beginning"""

    @property
    def key(self) -> tuple[str, int, str, str]:
        return (self.task, self.item, self.hash, self.prompt_hash)


Answers = dict[str, list[Item]]
"""the suite's task -> its items, in lm-eval's order"""


@dataclass(frozen=True)
class OpenSuite:
    """A suite whose tasks lm-eval has opened, data and all: what the suite calls them -> lm-eval's objects (several for a group)."""

    suite: Suite
    manager: Any
    tasks: dict[str, list[Any]]


def open_tasks(suite: Suite) -> OpenSuite:
    """Find every task and read its data, so that a wrong name or a lost connection ends a run before it starts.

    A tag (``ai2_arc``) stands for its tasks; a group (``mmlu``) is one task whose items are those of its parts. Takes seconds (lm-eval's
    index), minutes where data is fetched; one serves all arms.
    """
    manager = _index(suite)
    unknown = [name for name, wanted in suite.tasks.items() if "file" not in wanted and name not in manager.task_index]
    if unknown:
        near = {name: difflib.get_close_matches(name, manager.all_tasks, 2) for name in unknown}
        raise UsageProblem("lm-eval knows no such task", found=", ".join(unknown), fix="; ".join(f"{name}: did you mean {' or '.join(found)}?" for name, found in near.items() if found) or "lm-eval ls tasks")
    opened: dict[str, list[Any]] = {}
    for name, wanted in suite.tasks.items():
        spec = local_tasks.task_config(wanted, suite.folder) if "file" in wanted else name
        try:
            loaded = manager.load([spec])
        except FAILURES as error:
            raise Refused("lm-eval cannot open the task", where=name, found=f"{type(error).__name__}: {error}", fix="check that its data can be loaded: the network, HF_HUB_OFFLINE, the hub's name") from error
        found = list(loaded["tasks"].values())
        _set_fewshot(found, wanted.get("num_fewshot"), suite.options.get("num_fewshot"))
        whole = {name: found} if loaded["groups"] or len(found) == 1 else {task.task_name: [task] for task in found}
        if twice := {task.task_name for task in found} & {task.task_name for tasks in opened.values() for task in tasks}:
            raise UsageProblem("the suite asks for a task twice", where=name, found=", ".join(sorted(twice)))
        opened |= whole
    return OpenSuite(suite, manager, opened)


def write_chat(chats: ChatWriter, history: list[dict[str, str]], prompt: bool) -> str:
    """One chat as lm-eval writes it: ``prompt`` opens the model's turn, else the last turn stays open; where the template knows no system turn, without it."""
    options = {"add_generation_prompt": prompt, "continue_final_message": not prompt}
    try:
        return chats.write(history, "a suite's chat_template", **options)
    except Refused:
        rest = [message for message in history if message.get("role") != "system"]
        if len(rest) == len(history):
            raise
        return chats.write(rest, "a suite's chat_template", **options)


def _evaluate(opened: OpenSuite, lm: Any) -> dict[str, Any]:
    """lm-eval's own results. Raises Refused where it cannot run the suite."""
    import lm_eval

    options = opened.suite.options
    try:
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=lm, tasks=[task for parts in opened.tasks.values() for task in parts], task_manager=opened.manager, limit=options.get("limit"), apply_chat_template=options.get("chat_template", False),
            log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
        return found
    except AssertionError as error:  # HFLM's own check, which says nothing
        raise Refused("lm-eval cannot run the suite", expected="answers that fit the model's context", found=str(error) or "an answer longer than the model's context", fix="leave such items out, or lower max_tokens") from error
    except FAILURES as error:
        raise Refused("lm-eval cannot run the suite", found=f"{type(error).__name__}: {error}", fix="check the tasks' settings and data") from error


def run_suite(opened: OpenSuite, model: torch.nn.Module, tokenizer: Any, ranks: Ranks = ALONE) -> Answers:
    """Every item's answer, through ``lm_eval.simple_evaluate`` on ``HFLM`` with log-softmax in fp32. Of several ``ranks``, which share the batches, the first has them; the others get nothing."""
    from lm_eval.models.huggingface import HFLM

    options, turns = opened.suite.options, task_batches.Turns(ranks)

    class Bounded(HFLM):
        """Chats are written in a child: lm-eval would run the template, which is a stranger's program, in this process. And batches are shared among ranks."""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return write_chat(chats, chat_history, add_generation_prompt)

        def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **how: Any) -> list[tuple[float, bool]]:
            ask: Callable[..., list[tuple[float, bool]]] = super()._loglikelihood_tokens
            return ask(requests, *args, **how) if ranks.alone else turns.answers(requests, task_batches.scored(requests, self.batch_size), lambda some: ask(some, *args, **how))

        def generate_until(self, requests: list[Any], *args: Any, **how: Any) -> list[str]:
            ask: Callable[..., list[str]] = super().generate_until
            if ranks.alone:
                return ask(requests, *args, **how)
            return turns.answers(requests, task_batches.written([request.args for request in requests], self.batch_size, self.tok_encode), lambda some: ask(some, *args, **how))

    with ChatWriter(tokenizer) as chats:
        lm = Bounded(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=options.get("batch_size", 8))
        found = _evaluate(opened, lm)
    if not ranks.first:
        return {}  # lm-eval itself gives results on the first process of each host alone
    asked = opened.suite.tasks
    return {
        name: [item for task in parts for item in _items(task, found["samples"][task.task_name], _wanted(asked, name, task.task_name), _truncated(lm, task))]
        for name, parts in opened.tasks.items()
    }


def items_digest(answers: Answers) -> dict[str, str]:
    """task -> sha256 over its items' hashes: equal digests mean the same items, prompts and examples, whatever a hub's data set holds today."""
    return {name: hashlib.sha256("\n".join(f"{i.task} {i.item} {i.hash} {i.prompt_hash} {i.metric}" for i in items).encode()).hexdigest() for name, items in answers.items()}


def _index(suite: Suite) -> Any:
    """The smallest index that knows all names: none for local files, the suite's own folder, or lm-eval's 14,000 definitions, which take seconds."""
    from lm_eval.tasks import TaskManager

    names = [name for name, wanted in suite.tasks.items() if "file" not in wanted]
    small = TaskManager(include_path=suite.include_path, include_defaults=False)
    if all(name in small.all_subtasks for name in names):
        return small
    return TaskManager(include_path=suite.include_path)


def _set_fewshot(tasks: Iterable[Any], own: int | None, common: int | None) -> None:
    """The task's own number wins; the suite's common one leaves a task alone that lm-eval defines without examples, as lm-eval does."""
    for task in tasks:
        if own is not None:
            task.set_config(key="num_fewshot", value=own)
        elif common is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=common)


def _wanted(asked: dict[str, dict[str, Any]], name: str, leaf: str) -> dict[str, Any]:
    return asked.get(name) or asked.get(leaf) or {}


def _items(task: Any, rows: list[dict[str, Any]], wanted: dict[str, Any], truncated: set[int]) -> list[Item]:
    metric, chosen = _metric(task.task_name, rows, wanted.get("metric"))
    return [_item(task, row, metric, wanted.get("cluster"), int(row["doc_id"]) in truncated) for row in chosen]


def _truncated(lm: Any, task: Any) -> set[int]:
    """Items of which lm-eval cut a prompt. A token is at least a byte, so that most texts need not be tokenized to know that they fit."""
    found = set()
    for request in task.instances:
        generated = request.request_type == "generate_until"
        text = request.args[0] if generated else "".join(part for part in request.args[:2] if isinstance(part, str))
        room = lm.max_length - request.args[1].get("max_gen_toks", 0) if generated else lm.max_length + 1
        if len(text.encode("utf-8", "replace")) > room - 1 and len(lm.tok_encode(text)) > room:
            found.add(int(request.doc_id))
    return found


def _metric(task: str, rows: list[dict[str, Any]], asked: str | None) -> tuple[str, list[dict[str, Any]]]:
    """``(metric, rows of its filter)``; the metric is written as lm-eval does, ``exact_match,strict-match``, where there is more than one filter."""
    filters = list(dict.fromkeys(row.get("filter") for row in rows))
    name, _, told = (asked or "").partition(",")
    name = name or next((key for key in CORRECTNESS if rows and key in rows[0]["metrics"]), "")
    wished = told or (filters[0] if filters else None)
    chosen = [row for row in rows if row.get("filter") == wished]
    if not chosen or not isinstance(chosen[0].get(name), (int, float)):
        offered = sorted({f"{key},{row.get('filter')}" if len(filters) > 1 else key for row in rows[:1] + rows[-1:] for key in row["metrics"]})
        raise Refused("the task has no such score per item", where=task, expected=asked or " or ".join(CORRECTNESS), found=", ".join(offered) or "no items", fix="name one with `metric:` in the suite")
    return (f"{name},{wished}" if len(filters) > 1 else name), chosen


def _item(task: Any, row: dict[str, Any], metric: str, cluster: str | None, truncated: bool) -> Item:
    doc, kind = row["doc"], getattr(task, "OUTPUT_TYPE", None)
    lls: tuple[float | None, ...] = ()
    lengths: tuple[int, ...] = ()
    gold: tuple[int, ...] = ()
    if kind == "multiple_choice":
        choices = task.doc_to_choice(doc)
        lls, lengths = tuple(_finite(answer[0]) for answer in row["filtered_resps"][: len(choices)]), tuple(len(choice) for choice in choices)
        gold = _gold(task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc), choices)
    elif kind == "loglikelihood":
        lls, gold = (_finite(row["filtered_resps"][0][0]),), (0,)
    if cluster is not None and cluster not in doc:
        raise Refused("the items have no such field to group them by", where=task.task_name, expected=cluster, found=", ".join(map(str, doc)))
    label = None if cluster is None else hashlib.sha256(repr(doc[cluster]).encode()).hexdigest()[:16]
    answer = row["filtered_resps"][0] if kind == "generate_until" else None
    return Item(task.task_name, int(row["doc_id"]), str(row["doc_hash"]), str(row["prompt_hash"]), metric, float(row[metric.partition(",")[0]]),
                gold, lls, lengths, answer if isinstance(answer, str) else None, label, truncated)  # fmt: skip


def _gold(target: Any, choices: list[str]) -> tuple[int, ...]:
    """Indices of the right choices, as lm-eval reads a target: an index, a text, or several of either; () where it is none of the choices."""
    wanted = target if isinstance(target, list) else [target]
    found = [choices.index(one) if isinstance(one, str) and one in choices else one for one in wanted]
    return tuple(int(one) for one in found if isinstance(one, int) and 0 <= one < len(choices))


def _finite(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
