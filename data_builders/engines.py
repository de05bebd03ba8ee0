"""The same tasks on this machine's processes or on a Ray cluster: results in the order of the tasks.

`run_tasks` takes a function and its tasks and yields what it returns for each. A task writes its own output and
returns a small record, so an engine decides where work is done and never what comes of it. Each local worker is an
executor of one spawned process: when one dies, exactly its task is known, and the others finish what they have begun.
Workers hold a pipe to the caller and end as soon as it closes, so neither Ctrl-C nor a kill -9 of the caller leaves
any behind.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from biomedclip.errors import BiomedclipError, ConfigError, DataError, MissingExtra

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Engine = Literal["local", "ray"]
ENGINES: tuple[Engine, ...] = ("local", "ray")

Task = TypeVar("Task")
Result = TypeVar("Result")


def check_engine(engine: str, workers: int = 1) -> None:
    """Raise ConfigError or MissingExtra where `run_tasks` would, before anything is begun."""
    if engine not in ENGINES:
        raise ConfigError("engine", "is unknown", found=repr(engine), todo=f"use one of {', '.join(ENGINES)}")
    if workers < 1:
        raise ConfigError("workers", "must be at least 1", found=workers)
    if engine == "ray":
        try:
            import ray  # noqa: F401
        except ImportError:
            raise MissingExtra("ray", "ray") from None


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    engine: str = "local",
    workers: int = 1,
    name: Callable[[Task], str] = str,
) -> Iterator[Result]:
    """`function` of each task, in the order of the tasks, at most `workers` of them at a time.

    Function, tasks and results must pickle, except with one local worker, which is this very process. `ray` uses the
    cluster that is connected already, else the one that RAY_ADDRESS or this machine offers, else a new one of
    `workers` cores. What the function raises is raised here after the tasks under way have ended; a worker that dies
    is a DataError with the `name` of its task. Raises ConfigError and MissingExtra as `check_engine`.
    """
    check_engine(engine, workers)
    if engine == "ray":
        return _run_on_ray(function, tasks, workers, name)
    if workers == 1:
        return map(function, tasks)
    return _run_on_processes(function, tasks, workers, name)


def _in_order(
    tasks: Iterable[Task],
    limit: int,
    start: Callable[[Task], Hashable],
    wait_for_any: Callable[[list[Any]], Any],
    collect: Callable[[Any, Task], Result],
) -> Iterator[Result]:
    """The results of tasks of which `limit` run at a time; one that ends before its turn waits, a new one begins."""
    numbered = enumerate(tasks)
    running: dict[Any, tuple[int, Task]] = {}
    done: dict[int, Result] = {}
    due = 0
    while True:
        for number, task in itertools.islice(numbered, limit - len(running)):
            running[start(task)] = number, task
        if not running:
            return
        handle = wait_for_any(list(running))
        number, task = running.pop(handle)
        done[number] = collect(handle, task)
        while due in done:
            yield done.pop(due)
            due += 1


class _Worker:
    """One spawned process that lives until its lifeline is cut."""

    def __init__(self) -> None:
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        far_end, self._lifeline = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(1, context, _end_with_caller, (far_end,))
        self._far_end = far_end

    def start(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        return self._executor.submit(function, task)

    def stop(self, *, at_once: bool) -> None:
        """End the process: now, or when its task is done."""
        if at_once:
            self._lifeline.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._lifeline.close()
        self._far_end.close()


def _end_with_caller(lifeline: Connection) -> None:
    """Run in a worker: ignore Ctrl-C, which the caller answers for all, and die as soon as the caller is gone."""
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        lifeline.poll(None)  # nothing is ever sent: this returns at the end of the stream
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_on_processes(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, name: Callable[[Task], str]
) -> Iterator[Result]:
    idle: list[_Worker] = []
    owners: dict[Future[Result], _Worker] = {}
    all_workers: list[_Worker] = []

    def start(task: Task) -> Future[Result]:
        if not idle:
            idle.append(_Worker())
            all_workers.append(idle[-1])
        worker = idle.pop()
        future = worker.start(function, task)
        owners[future] = worker
        return future

    def wait_for_any(futures: list[Future[Result]]) -> Future[Result]:
        done = wait(futures, return_when=FIRST_COMPLETED).done
        return next(future for future in futures if future in done)

    def collect(future: Future[Result], task: Task) -> Result:
        idle.append(owners.pop(future))
        try:
            return future.result()
        except BrokenProcessPool:
            raise _dead(name(task)) from None

    at_once = False
    try:
        yield from _in_order(tasks, workers, start, wait_for_any, collect)
    except (KeyboardInterrupt, GeneratorExit):
        at_once = True
        raise
    finally:
        for worker in all_workers:
            worker.stop(at_once=at_once)


def _run_on_ray(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, name: Callable[[Task], str]
) -> Iterator[Result]:
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(workers)

    def call(task: Task) -> Result:
        return function(task)

    remote = ray.remote(call)  # which takes plain functions only

    def wait_for_any(references: list[Any]) -> Any:
        return ray.wait(references, num_returns=1)[0][0]

    def collect(reference: Any, task: Task) -> Result:
        under_way.remove(reference)
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            # Without Ray's own frames: what the function raised means the same on every engine.
            if isinstance(error.cause, BiomedclipError):
                raise error.cause from None
            raise
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
            raise _dead(name(task)) from None

    under_way: set[Any] = set()

    def start(task: Task) -> Any:
        reference = remote.remote(task)
        under_way.add(reference)
        return reference

    try:
        yield from _in_order(tasks, workers, start, wait_for_any, collect)
    except (KeyboardInterrupt, GeneratorExit):
        for reference in under_way:
            ray.cancel(reference, force=True)
        raise
    finally:
        if under_way:
            ray.wait(list(under_way), num_returns=len(under_way))
        if is_ours:
            ray.shutdown()


def _connect(workers: int) -> None:
    """Join the cluster there is, or start one of `workers` cores on this machine."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
    except ConnectionError:
        ray.init(num_cpus=workers, include_dashboard=False, **quiet)


def _dead(task: str) -> DataError:
    return DataError(task, "its worker process died", todo="if memory ran out use fewer workers, then run the same "
                     "command again: what is finished stays")  # fmt: skip
