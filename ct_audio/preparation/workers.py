"""What preparations of audio and of text share: worker processes, and a corpus that is made once and whole."""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypeVar

from ct_audio.common.errors import UserError
from ct_audio.common.files import hold_alone
from ct_audio.data.corpus import Corpus, open_corpus
from ct_audio.preparation.listing import warn

Key = TypeVar("Key")
Task = TypeVar("Task")
Result = TypeVar("Result")

CONTENT_KEY = "content_sha256"
"""In `source` of corpus.json: hash over the bytes of all inputs."""


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
    started = _start_workers(function, tasks, num_processes, preload) if num_processes > 1 else None
    if started is None:
        yield from ((key, function(task)) for key, task in tasks.items())
        return
    executor, futures = started
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps for lack of memory; the same command goes on; use fewer --num-processes"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_workers(
    function: Callable[[Task], Result], tasks: Mapping[Key, Task], num_processes: int, preload: list[str]
) -> tuple[ProcessPoolExecutor, dict[Future[Result], Key]] | None:
    """Processes that work on the tasks; None, with a warning, where the system has no place for what joins them."""
    context = multiprocessing.get_context("forkserver")  # fork would copy BLAS's threads half
    context.set_forkserver_preload(preload)
    executor = None
    try:
        executor = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin_worker)
        return executor, {executor.submit(function, task): key for key, task in tasks.items()}
    except OSError as error:
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
        warn(
            f"no worker processes ({error}): going on with one process; they need TMPDIR, now {gettempdir()}, to be a "
            "folder with a path of at most 80 characters, and room in /dev/shm"
        )
        return None


def _begin_worker() -> None:
    """Ctrl-C is the parent's to handle; a worker ends when its parent is killed."""
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
        make: makes it, and goes on from what lies in a folder OUT.partial, which is deleted afterwards, and where it
            fails before there is a result (a JSON file) or a list for the user (a text file).
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
            try:
                make(partial)
            except UserError:
                if not any(file.suffix in (".json", ".txt") for file in partial.rglob("*")):  # nothing to go on from
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        shutil.rmtree(partial, ignore_errors=True)
    return open_corpus(out), there is not None


def existing_corpus(
    out: Path,
    source: dict[str, Any],
    settings: dict[str, Any],
    *,
    content_hash: Callable[[], str],
    overwrite: bool,
) -> Corpus | None:
    """The corpus at `out` if it is the one asked for; None if `out` is free or is to be replaced.

    Args:
        source, settings: what corpus.json says as source and preparation; `path` may differ.
        content_hash: hash over the bytes of all inputs, which `source` of corpus.json has as `CONTENT_KEY`; called only
            where all else is the same.
        overwrite: replace whatever corpus is there.
    Raises:
        UserError: something else is there, and `overwrite` is False or it is no corpus.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "corpus.json").is_file():
        raise UserError(f"{out} exists and is no corpus; choose another --out")
    if overwrite:
        return None
    try:
        corpus = open_corpus(out)
    except UserError as error:
        raise UserError(f"{error}; pass --overwrite to replace it") from error
    there = {**corpus.description.get("source", {}), **corpus.description.get("preparation", {})}
    asked_for = json.loads(json.dumps({**source, **settings}))
    was, now = (_what_decides(each) for each in (there, asked_for))
    if was != now:
        differing = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
        changes = ", ".join(f"{key}: {was.get(key)!r} there, {now.get(key)!r} asked for" for key in differing)
        raise UserError(f"{out} is a corpus made otherwise ({changes}); choose another --out, or pass --overwrite")
    if there.get(CONTENT_KEY) != content_hash():
        raise UserError(
            f"{out} was made of other data: names and sizes are the same, but their bytes have changed "
            f"({CONTENT_KEY}: {str(there.get(CONTENT_KEY))[:12]} there, {content_hash()[:12]} now); "
            "pass --overwrite to prepare it again, or choose another --out"
        )
    return corpus


def _what_decides(made: dict[str, Any]) -> dict[str, Any]:
    """Without what may differ; options that were not given do not count, as a later version may have more of them."""
    options = {name: value for name, value in made.get("options", {}).items() if value is not None}
    return {key: value for key, value in made.items() if key not in ("path", CONTENT_KEY)} | {"options": options}


def join_hashes(hashes: Sequence[str]) -> str:
    """The hash over all inputs, of which each one's SHA-256 is known."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
