"""Tasks on as many processes as asked for, each once what it needs is done.

Workers end with the process that started them, however that ends, so that a campaign killed and continued is not worked
on twice.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for

import torch
from transformers.utils.logging import disable_progress_bar

from jointnas.campaign.plan import Shared, Unit
from jointnas.campaign.worker import Base, work
from jointnas.compare_config import CompareConfig
from jointnas_kernels.errors import JointNASError

Task = Unit | Shared


def ordered(units: Sequence[Unit]) -> list[Task]:
    """The units, and what they need, each behind what it needs."""
    found: dict[Task, None] = {}

    def add(task: Task) -> None:
        for need in task.needs:
            add(need)
        found[task] = None

    for unit in units:
        add(unit)
    return list(found)


def run(base: Base, tasks: Sequence[Task]) -> Iterator[Task]:
    """Works on tasks, which stand behind what they need, as far as that is among them; yields each when it is done.

    Raises:
        JointNASError: a worker was killed.
    """
    options = base.config.compare
    threads = options.threads or max(1, torch.get_num_threads() // options.processes)
    if options.processes == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for task in tasks:
                work(base, task)
                yield task
        finally:
            torch.set_num_threads(before)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawn, _begin, (threads,)) as pool:
        try:
            yield from _spread(pool, base.config.model_copy(update={"progress": False}), tasks)
        except BrokenProcessPool:
            why = "compare: a worker process was killed (too little memory?); continue with --resume"
            raise JointNASError(why) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _spread(pool: ProcessPoolExecutor, config: CompareConfig, tasks: Sequence[Task]) -> Iterator[Task]:
    waiting, running, undone = list(tasks), dict[Future[None], Task](), set(tasks)
    while waiting or running:
        free = config.compare.processes - len(running)
        ready = [task for task in waiting if undone.isdisjoint(task.needs)][:free]
        for task in ready:
            waiting.remove(task)
            running[pool.submit(_work, config, task)] = task
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            future.result()
            undone.remove(task)
            yield task


def _begin(threads: int) -> None:
    """Of a worker: its threads, no bars beside the parent's, and that it ends with its parent."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait_for([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(config: CompareConfig, task: Task) -> None:
    work(_base(config.model_dump_json()), task)


@functools.cache
def _base(config: str) -> Base:
    return Base.load(CompareConfig.model_validate_json(config))
