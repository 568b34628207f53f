"""Downloads of data sets: pooch fetches and checks a file; here are several mirrors, retries and many files at a time.

A file is fetched under a temporary name in its folder and gets its own name when it is whole and its checksum right.
The same command again fetches what is missing. A file that broke off starts again from its beginning, since pooch does
not ask for ranges; the largest file of a recipe has 190 MB.
"""

import argparse
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import pooch
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from ct_audio.common.errors import UserError
from ct_audio.common.progress import Progress

Result = TypeVar("Result")

RETRIES = Retry(4, backoff_factor=1.0, status_forcelist=(408, 425, 429, 500, 502, 503, 504), retry_after_max=60)
"""Of each request, where there is no answer or a mirror is busy; pauses of 0, 2, 4 and 8 seconds."""
NUM_ATTEMPTS = 3  # at a file of a mirror whose answers break off
TIMEOUT_SECONDS = 60.0  # without any byte
_BLOCK_BYTES = 1 << 16
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; ct_audio)", "Accept-Encoding": "identity"}
"""Some mirrors turn away the names of programs; checksums are of files as they are."""
_ADVICE = "pass --download-mirror URL, or fetch it by hand, put it into --source, and leave out --download"


@dataclass(frozen=True)
class RemoteFile:
    """A file and where it can be had.

    Attributes:
        name: where it goes, relative to the folder of the data set.
        urls: mirrors, in the order in which they are tried.
        checksum: as "sha256:..." or "md5:...", in hexadecimal digits; None: unknown.
    """

    name: str
    urls: tuple[str, ...]
    checksum: str | None = None


def download_files(files: Sequence[RemoteFile], directory: Path, *, num_threads: int = 8) -> None:
    """Fetch every file that is not in `directory` yet, or has another checksum there.

    Args:
        num_threads: files fetched at once.
    Raises:
        UserError: no mirror has a file as it should be; it names every mirror and what it answered.
        OSError: it cannot be written.
    """
    pooch.get_logger().setLevel("WARNING")  # it announces each file
    stop, many = threading.Event(), len(files) > 1
    with (
        _connect(num_threads) as session,
        Progress(total=len(files) if many else None, unit="file" if many else "B", unit_scale=True) as bar,
        ThreadPoolExecutor(num_threads) as executor,
    ):

        def write_blocks(url: str, output_file: str, _pooch: object) -> None:
            Path(output_file).unlink()  # pooch made it readable for nobody else
            with open(output_file, "xb") as handle:
                for block in _read_blocks(session, url):
                    if stop.is_set():
                        raise InterruptedError("another file has failed, or Ctrl-C was pressed")
                    handle.write(block)
                    bar.update(0 if many else len(block))

        def fetch(file: RemoteFile) -> None:
            target = directory.resolve() / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            where = {"fname": target.name, "path": target.parent, "downloader": write_blocks}
            _try_mirrors(file.name, file.urls, lambda url: pooch.retrieve(url, file.checksum, **where))

        tasks = [executor.submit(fetch, file) for file in files]
        try:
            for task in as_completed(tasks):
                task.result()
                bar.update(many)
        finally:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)


def read_url(urls: Sequence[str]) -> bytes:
    """A short answer, as a listing, from the first mirror that gives one.

    Raises:
        UserError: none does; it names every mirror and what it answered.
    """
    with _connect(1) as session:
        return _try_mirrors("a listing", urls, lambda url: b"".join(_read_blocks(session, url)))


def unpack(archive: Path, members: dict[str, Path]) -> None:
    """Take single files out of a zip archive, each written whole or not at all; those that are there are left.

    Raises:
        UserError: it is no zip archive, is damaged, or lacks a file.
    """
    try:
        with zipfile.ZipFile(archive) as opened, TemporaryDirectory(dir=archive.parent) as beside:
            for member, target in members.items():
                if not target.is_file():
                    Path(opened.extract(member, beside)).replace(target)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(f"{archive}: cannot unpack it: {error}; delete it and run the command again") from error


def require_checksum(path: Path, checksum: str) -> None:
    """Raise `UserError` where a file's checksum ("sha256:..." or "md5:...") is another."""
    algorithm = checksum.partition(":")[0]
    found = f"{algorithm}:{pooch.file_hash(path, alg=algorithm)}"
    if found != checksum:
        raise UserError(f"{path}: expected {checksum}, got {found}; delete it and run the command again")


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a recipe whose data can be downloaded; their names begin with "download"."""
    fetch, first = "fetch what is missing into --source (default OUT_source)", "try this folder of files first"
    parser.add_argument("--download", action="store_true", help=fetch)
    parser.add_argument("--download-mirror", action="append", default=[], metavar="URL", help=first)


def mirror_urls(name: str, mirrors: Sequence[str]) -> tuple[str, ...]:
    """The address of a file below each mirror's."""
    return tuple(f"{mirror.rstrip('/')}/{name}" for mirror in mirrors)


def _connect(num_connections: int) -> requests.Session:
    session = requests.Session()
    session.headers.update(_HEADERS)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=num_connections, max_retries=RETRIES))
    return session


def _read_blocks(session: requests.Session, url: str) -> Iterator[bytes]:
    """An answer in blocks; one that is no success, or is shorter than it says, raises `RequestException`."""
    with session.get(url, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code != 200:
            gone = " (this mirror is gone, or has moved)" if response.status_code in (301, 403, 404, 410) else ""
            raise requests.HTTPError(f"HTTP {response.status_code} {response.reason}{gone}")
        yield from response.iter_content(_BLOCK_BYTES)


def _try_mirrors(name: str, urls: Sequence[str], fetch: Callable[[str], Result]) -> Result:
    """What the first mirror gives that has it; one whose answer breaks off is asked again."""
    problems = {}
    for url in urls:
        for _ in range(NUM_ATTEMPTS):
            try:
                return fetch(url)
            except requests.exceptions.ChunkedEncodingError as error:
                problems[url] = f"the connection broke off: {_reason(error)}"
            except (requests.RequestException, ValueError) as error:  # ValueError: pooch's, of a checksum
                problems[url] = _reason(error)
                break
    found = "; ".join(f"{url}: {problem}" for url, problem in problems.items())
    raise UserError(f"cannot download {name}: {found}; {_ADVICE}")


def _reason(error: Exception) -> str:
    """What urllib3 found, without the address and the retries around it."""
    inner = error.args[0] if error.args else error
    return str(getattr(inner, "reason", inner))
