"""Downloads of data sets: several mirrors, checksums, resumed with HTTP ranges, parallel over files.

What is being fetched lies in NAME.part; it is renamed to NAME when it is whole and its checksum right. The same command
again goes on where the last one stopped.
"""

import argparse
import hashlib
import http.client
import json
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ct_audio.common.errors import UserError

_BLOCK_BYTES = 1 << 16
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; ct_audio)", "Accept-Encoding": "identity"}
"""Some mirrors turn away urllib's own name."""
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)


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


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        num_attempts: of each mirror, where it answers, but not as it should.
        pause_seconds: before the second attempt; doubled before each further one.
        timeout_seconds: without any byte.
    """

    num_attempts: int = 4
    pause_seconds: float = 1.0
    timeout_seconds: float = 60.0


class _MirrorError(Exception):
    """A mirror does not have the file as it should be; `again` if another attempt may help; `code` of HTTP."""

    def __init__(self, what: str, *, again: bool = False, code: int = 0) -> None:
        super().__init__(what)
        self.again, self.code = again, code


def download_files(
    files: Sequence[RemoteFile], directory: Path, *, num_threads: int = 8, patience: Patience | None = None
) -> int:
    """Fetch every file that is not in `directory` yet, several at a time.

    Args:
        num_threads: files fetched at once.
    Returns:
        how many were fetched.
    Raises:
        UserError: no mirror has a file as it should be; it names every mirror and what it answered.
        OSError: it cannot be written.
    """
    stop, fetch = threading.Event(), _Fetch(directory, patience or Patience())
    many = len(files) > 1
    with (
        tqdm(total=len(files) if many else None, unit="file" if many else "B", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(num_threads) as executor,
    ):
        advance = (lambda amount: None) if many else bar.update
        tasks = [executor.submit(fetch.one, file, stop, advance) for file in files]
        for task in tasks:
            task.add_done_callback(lambda _: bar.update(many))
        try:
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            return sum(task.result() for task in done)
        finally:  # after an error or Ctrl-C the others stop at their next block
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)


def read_url(urls: Sequence[str], *, patience: Patience | None = None) -> bytes:
    """A short answer, as a listing, from the first mirror that gives one.

    Raises:
        UserError: none does; it names every mirror and what it answered.
    """
    patience, problems = patience or Patience(), []
    for url in urls:
        for attempt in range(patience.num_attempts):
            try:
                with _open(url, {}, patience) as response:
                    return response.read()
            except _MirrorError as error:
                again, problem = error.again, f"{url}: {error}"
            except _NETWORK_ERRORS as error:
                again, problem = True, f"{url}: {_reason(error)}"
            if not again or attempt == patience.num_attempts - 1:
                break
            time.sleep(patience.pause_seconds * 2**attempt)
        problems.append(problem)
    raise UserError(f"cannot download: {'; '.join(problems)}; {_ADVICE}")


def unpack(archive: Path, members: dict[str, Path]) -> None:
    """Take single files out of a zip archive, each written whole or not at all; those that are there are left.

    Raises:
        UserError: it is no zip archive, is damaged, or lacks a file.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for member, target in members.items():
                if target.is_file():
                    continue
                beside = target.with_name(target.name + ".part")
                try:
                    with opened.open(member) as source, beside.open("wb") as handle:
                        shutil.copyfileobj(source, handle, 1 << 20)  # checks the CRC at the end
                    beside.replace(target)
                finally:
                    beside.unlink(missing_ok=True)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(f"{archive}: cannot unpack it: {error}; delete it and run the command again") from error


def require_checksum(path: Path, checksum: str) -> None:
    """Raise `UserError` where a file's checksum ("sha256:..." or "md5:...") is another."""
    found = _checksum(path, checksum)
    if found != checksum:
        raise UserError(f"{path}: expected {checksum}, got {found}; delete it and run the command again")


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a recipe whose data can be downloaded; their names begin with "download"."""
    parser.add_argument(
        "--download", action="store_true", help="fetch what is missing into --source (default OUT_source)"
    )
    parser.add_argument(
        "--download-mirror",
        action="append",
        default=[],
        metavar="URL",
        help="try this folder of files before all others",
    )


def mirror_urls(name: str, mirrors: Sequence[str]) -> tuple[str, ...]:
    """The address of a file below each mirror's."""
    return tuple(f"{mirror.rstrip('/')}/{name}" for mirror in mirrors)


_ADVICE = "pass --download-mirror URL, or fetch it by hand, put it into --source, and leave out --download"


class _Fetch:
    def __init__(self, directory: Path, patience: Patience) -> None:
        self.directory, self.patience = directory, patience

    def one(self, file: RemoteFile, stop: threading.Event, advance: Any) -> bool:
        """Fetch a file unless it is there; returns whether it was fetched."""
        target = self.directory / file.name
        if target.is_file() and (file.checksum is None or _checksum(target, file.checksum) == file.checksum):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        part, problems = target.with_name(target.name + ".part"), []
        for url in file.urls:
            for attempt in range(self.patience.num_attempts):
                if stop.is_set():
                    return False
                try:
                    if not self._fetch(url, part, file, stop, advance):
                        return False
                    part.replace(target)
                    _validator(part).unlink(missing_ok=True)
                    return True
                except _MirrorError as error:
                    again, problem = error.again, f"{url}: {error}"
                except _NETWORK_ERRORS as error:
                    again, problem = True, f"{url}: {_reason(error)}"
                if not again or attempt == self.patience.num_attempts - 1:
                    break
                stop.wait(self.patience.pause_seconds * 2**attempt)
            problems.append(problem)
        raise UserError(f"cannot download {file.name}: {'; '.join(problems)}; {_ADVICE}")

    def _fetch(self, url: str, part: Path, file: RemoteFile, stop: threading.Event, advance: Any) -> bool:
        """Fetch all or the rest into `part`, and check it; False if it was told to stop."""
        offset = part.stat().st_size if part.is_file() else 0
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if offset and file.checksum is None:  # the rest must be of the same file
            headers = self._resume_headers(part, url, headers)
        try:
            response = _open(url, headers, self.patience)
        except _MirrorError as error:
            if not headers or error.code != 416:
                raise
            offset, response = 0, _open(url, {}, self.patience)  # what is there is as long as the file, or longer
        with response:
            if response.status != 206:
                offset = 0
            elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {offset}-"):
                raise _MirrorError(f"asked for bytes from {offset} on, got {response.headers.get('Content-Range')}")
            _write_validator(part, url, response)
            end = _end(response, offset)
            if not self._copy(response, part, offset, stop, advance):
                return False
        found = part.stat().st_size
        if end is not None and found < end:
            raise _MirrorError(f"the connection broke off after {found} of {end} bytes", again=True)
        if file.checksum and (checksum := _checksum(part, file.checksum)) != file.checksum:
            part.unlink()
            raise _MirrorError(f"expected {file.checksum}, got {checksum} ({found} bytes)")
        return True

    def _resume_headers(self, part: Path, url: str, headers: dict[str, str]) -> dict[str, str]:
        try:
            was = json.loads(_validator(part).read_text())
        except (OSError, ValueError):
            return {}
        same = isinstance(was, dict) and was.get("url") == url and isinstance(was.get("validator"), str)
        return headers | {"If-Range": was["validator"]} if same else {}

    def _copy(self, response: Any, part: Path, offset: int, stop: threading.Event, advance: Any) -> bool:
        with part.open("r+b" if offset else "wb") as handle:
            handle.truncate(offset)
            handle.seek(offset)
            while not stop.is_set():
                broke_off = False
                try:
                    block = response.read(_BLOCK_BYTES)
                except http.client.IncompleteRead as error:  # of an answer in chunks, whose length nobody has said
                    block, broke_off = error.partial, True
                handle.write(block)
                advance(len(block))
                if broke_off:
                    raise _MirrorError(f"the connection broke off after {handle.tell()} bytes", again=True)
                if not block:
                    return True
        return False


def _end(response: Any, offset: int) -> int | None:
    """How many bytes there are once all of an answer that begins at `offset` has come; None if it does not say."""
    length = response.headers.get("Content-Length") or ""
    if length.isdigit():
        return offset + int(length)
    total = (response.headers.get("Content-Range") or "").rpartition("/")[2]
    return int(total) if response.status == 206 and total.isdigit() else None


def _open(url: str, headers: dict[str, str], patience: Patience) -> Any:
    try:
        request = urllib.request.Request(url, headers=_HEADERS | headers)
        return urllib.request.urlopen(request, timeout=patience.timeout_seconds)
    except urllib.error.HTTPError as error:
        error.close()
        gone = " (this mirror is gone, or has moved)" if error.code in (301, 403, 404, 410) else ""
        what = f"HTTP {error.code} {error.reason}{gone}"
        raise _MirrorError(what, again=error.code in _TRANSIENT, code=error.code) from error
    except ValueError as error:
        raise _MirrorError(f"no address: {error}") from error


def _validator(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _write_validator(part: Path, url: str, response: Any) -> None:
    etag = response.headers.get("ETag")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    _validator(part).write_text(json.dumps({"url": url, "validator": validator}))


def _checksum(path: Path, like: str) -> str:
    algorithm = like.partition(":")[0]
    with path.open("rb") as handle:
        return f"{algorithm}:{hashlib.file_digest(handle, algorithm).hexdigest()}"


def _reason(error: Exception) -> str:
    return str(error.reason if isinstance(error, urllib.error.URLError) else error) or type(error).__name__
