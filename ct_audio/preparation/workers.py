"""What preparations of audio and of text share: worker processes, and a corpus that is made once and whole."""

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from ct_audio.common.errors import UserError
from ct_audio.common.files import hold_alone
from ct_audio.data.corpus import Corpus, open_corpus

Key = TypeVar("Key")
Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result], tasks: Mapping[Key, Task], num_processes: int, *, preload: list[str]
) -> Iterator[tuple[Key, Result]]:
    """Results of a function of the top level of a module, as they are ready; processes of one thread each.

    Args:
        num_processes: at most; with one task or one process it runs here.
        preload: modules that are imported once, for all workers.
    Raises:
        UserError: a worker died.
    """
    num_processes = max(1, min(num_processes, len(tasks)))
    if num_processes == 1:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more would wait for each other, actively
        try:
            yield from ((key, function(task)) for key, task in tasks.items())
        finally:
            torch.set_num_threads(num_threads)
        return
    context = multiprocessing.get_context("forkserver")  # fork would copy torch's and BLAS's threads half
    context.set_forkserver_preload(preload)
    executor = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin_worker)
    try:
        futures = {executor.submit(function, task): key for key, task in tasks.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps for lack of memory; the same command goes on; use fewer --num-processes"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """One thread; Ctrl-C is the parent's to handle; a worker ends when its parent is killed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel] if parent else [])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def prepare_once(
    out: Path, find_current: Callable[[], Corpus | None], make: Callable[[Path], None]
) -> tuple[Corpus, bool]:
    """The corpus at `out`, made unless it is there; of several processes only one makes it.

    Args:
        find_current: the corpus that is there, if it is the one asked for.
        make: makes it, and goes on from what lies in a folder OUT.partial, which is deleted afterwards.
    Returns:
        the corpus, opened, and whether it was there already.
    Raises:
        UserError: another process is making it, or what `find_current` and `make` raise.
    """
    partial = out.with_name(out.name + ".partial")
    there = find_current()
    if there is not None and not partial.exists():
        return there, True
    partial.mkdir(parents=True, exist_ok=True)
    busy = f"another process is preparing into {partial}; wait for it, or choose another --out"
    with hold_alone(partial / "lock", busy):
        there = find_current()  # again: another process may have finished in between
        if there is None:
            make(partial)
        shutil.rmtree(partial, ignore_errors=True)
    return open_corpus(out), there is not None


def existing_corpus(
    out: Path, source: dict[str, Any], settings: dict[str, Any], *, overwrite: bool, ignore: Sequence[str] = ()
) -> Corpus | None:
    """The corpus at `out` if it is the one asked for; None if `out` is free or may be replaced.

    Args:
        source, settings: what corpus.json says as source and preparation; `path` may differ.
        ignore: what else may differ; the caller compares it.
    Raises:
        UserError: something else is there, and `overwrite` is False or it is no corpus.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "corpus.json").is_file():
        raise UserError(f"{out} exists and is no corpus; choose another --out")
    try:
        corpus = open_corpus(out)
    except UserError as error:
        if overwrite:
            return None
        raise UserError(f"{error}; pass --overwrite to replace it") from error
    there = {**corpus.description.get("source", {}), **corpus.description.get("preparation", {})}
    asked_for = json.loads(json.dumps({**source, **settings}))
    may_differ = {"path", *ignore}
    was, now = ({k: v for k, v in each.items() if k not in may_differ} for each in (there, asked_for))
    if was == now:
        return corpus
    if overwrite:
        return None
    differing = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    changes = ", ".join(f"{key}: {was.get(key)!r} there, {now.get(key)!r} asked for" for key in differing)
    raise UserError(f"{out} is a corpus made otherwise ({changes}); choose another --out, or pass --overwrite")
