"""Downloads from mirrors that work, break off, lie, are gone; what is there is not fetched again."""

import hashlib
import io
import threading
import time
import zipfile

import numpy as np
import pytest
from http_mirror import Mirror, serve

from ct_audio.common.errors import UserError
from ct_audio.preparation import download as module
from ct_audio.preparation.download import (
    RemoteFile,
    download_files,
    mirror_urls,
    read_url,
    require_checksum,
    unpack,
)

CONTENT = np.random.default_rng(0).bytes(300_000)
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pause before another attempt."""
    monkeypatch.setattr(module, "RETRIES", module.RETRIES.new(backoff_factor=0))


@pytest.fixture
def mirror():
    with serve(Mirror(files={"/a": CONTENT})) as running:
        yield running


@pytest.fixture
def second():
    with serve(Mirror(files={"/a": CONTENT})) as running:
        yield running


def fetch(folder, *mirrors, checksum: str | None = CHECKSUM, name="a"):
    """Download one file; nothing but itself is in the folder afterwards."""
    try:
        download_files([RemoteFile(name, mirror_urls(name, [mirror.url for mirror in mirrors]), checksum)], folder)
    finally:
        assert names(folder) in ([], [name])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "checksum", [CHECKSUM, f"md5:{hashlib.md5(CONTENT).hexdigest()}", None], ids=["sha256", "md5", "none"]
)
def test_a_file_is_fetched_once(tmp_path, mirror, checksum):
    for _ in range(2):
        fetch(tmp_path, mirror, checksum=checksum)
        assert (tmp_path / "a").read_bytes() == CONTENT
    assert mirror.requests == ["/a"]
    (tmp_path / "other").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode  # for whom it is readable


@pytest.mark.parametrize("checksum", [CHECKSUM, None], ids=["sha256", "none"])
@pytest.mark.parametrize("chunk_bytes", [0, 50_000, 100_000], ids=["with length", "between chunks", "within a chunk"])
def test_an_answer_that_breaks_off_is_not_the_file(tmp_path, mirror, second, chunk_bytes, checksum):
    """One in chunks does not say how long it is; half of it comes, then there is no end of it."""
    mirror.chunk_bytes, mirror.failures["/a"] = chunk_bytes, [0] * 3
    with pytest.raises(UserError, match=r"/a: the connection broke off: .*; pass --download-mirror"):
        fetch(tmp_path, mirror, checksum=checksum)
    assert len(mirror.requests) == 3
    assert not names(tmp_path)
    mirror.failures["/a"] = [0, 0]
    fetch(tmp_path, mirror, checksum=checksum)
    assert (tmp_path / "a").read_bytes() == CONTENT
    (tmp_path / "a").unlink()
    mirror.failures["/a"] = [0] * 3
    fetch(tmp_path, mirror, second, checksum=checksum)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_busy_mirror_is_asked_again(tmp_path, mirror, second):
    mirror.failures["/a"] = [503, 429]
    fetch(tmp_path, mirror)
    assert len(mirror.requests) == 3
    (tmp_path / "a").unlink()
    mirror.failures["/a"] = [503] * 5
    fetch(tmp_path, mirror, second)
    assert len(mirror.requests) == 8
    assert len(second.requests) == 1


def test_other_content_is_refused_and_the_next_mirror_asked(tmp_path, mirror, second):
    mirror.files["/a"] = b"<html>not found</html>"
    fetch(tmp_path, mirror, second)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert len(mirror.requests) == 1


def test_when_all_mirrors_are_gone_the_message_names_them(tmp_path, mirror, second):
    mirror.failures["/a"] = [503] * 5
    second.files["/a"] = b"other"
    urls = (*mirror_urls("a", [mirror.url, second.url]), f"{second.url}/b", "http://127.0.0.1:9/a", "nonsense")
    with pytest.raises(UserError) as caught:
        download_files([RemoteFile("a", urls, CHECKSUM)], tmp_path)
    message = str(caught.value)
    assert f"{mirror.url}/a: too many 503 error responses" in message
    assert f"expected {CHECKSUM} but got {hashlib.sha256(b'other').hexdigest()}" in message
    assert f"{second.url}/b: HTTP 404 Not Found (this mirror is gone, or has moved)" in message
    assert "Connection refused; nonsense: Invalid URL 'nonsense'" in message
    assert message.endswith(
        "pass --download-mirror URL, or fetch it by hand, put it into --source, and leave out --download"
    )
    assert not names(tmp_path)


def test_a_damaged_file_that_is_there_is_fetched_again(tmp_path, mirror):
    (tmp_path / "a").write_bytes(b"cut")
    fetch(tmp_path, mirror)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_many_files_at_a_time(tmp_path, mirror, monkeypatch):
    mirror.files = {f"/train/{i}.txt": f"book {i}".encode() for i in range(40)}
    running, most, lock, original = [0], [0], threading.Lock(), module._read_blocks

    def slow(*arguments):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        yield from original(*arguments)
        with lock:
            running[0] -= 1

    monkeypatch.setattr(module, "_read_blocks", slow)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "7.txt").write_bytes(b"book 7")
    files = [RemoteFile(path[1:], (mirror.url + path,)) for path in mirror.files]
    download_files(files, tmp_path, num_threads=5)
    assert {f"/train/{path.name}": path.read_bytes() for path in (tmp_path / "train").iterdir()} == mirror.files
    assert sorted(mirror.requests) == sorted(mirror.files.keys() - {"/train/7.txt"})
    assert most[0] == 5


def test_one_that_is_missing_stops_all(tmp_path, mirror):
    mirror.files = {f"/{i}": b"x" for i in range(200)}
    del mirror.files["/3"]
    files = [RemoteFile(str(i), (f"{mirror.url}/{i}",)) for i in range(200)]
    with pytest.raises(UserError, match=r"cannot download 3: .*404"):
        download_files(files, tmp_path, num_threads=2)
    assert len(mirror.requests) < 150


def test_ctrl_c_ends_a_long_download_at_its_next_block(tmp_path, monkeypatch):
    fetched = []

    def endless(*_arguments):
        while True:
            fetched.append(1)
            yield b"x"

    def press(tasks):
        while len(fetched) < 10:
            time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_read_blocks", endless)
    monkeypatch.setattr(module, "as_completed", press)
    with pytest.raises(KeyboardInterrupt):
        download_files([RemoteFile("a", ("http://x",), None)], tmp_path)
    assert not names(tmp_path)


def test_a_full_disk_is_no_matter_of_mirrors(tmp_path, mirror, second, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "open", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        fetch(tmp_path, mirror, second)
    assert not second.requests


def test_listings(mirror, second):
    second.files["/list"] = b"1\n2\n"
    second.failures["/list"] = [500, 0]
    assert read_url(mirror_urls("list", [mirror.url, second.url])) == b"1\n2\n"
    with pytest.raises(UserError, match=r"404.*nothing: HTTP 404"):
        read_url(mirror_urls("nothing", [mirror.url, second.url]))


def archive(**members):
    """A zip archive."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return raw.getvalue()


def test_unpacking(tmp_path):
    raw, zipped = archive(a=CONTENT, b=b"B"), tmp_path / "x.zip"
    zipped.write_bytes(raw)
    (tmp_path / "b").write_bytes(b"mine")
    unpack(zipped, {"a": tmp_path / "a", "b": tmp_path / "b"})
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert (tmp_path / "b").read_bytes() == b"mine"
    require_checksum(tmp_path / "a", CHECKSUM)
    with pytest.raises(UserError, match=f"expected {CHECKSUM}, got sha256:"):
        require_checksum(tmp_path / "b", CHECKSUM)
    for bad in (raw[: len(raw) // 2], b"", raw[:2000] + bytes(99) + raw[2099:]):
        zipped.write_bytes(bad)
        (tmp_path / "a").unlink(missing_ok=True)
        with pytest.raises(UserError, match="cannot unpack it"):
            unpack(zipped, {"a": tmp_path / "a"})
        assert names(tmp_path) == ["b", "x.zip"]
    zipped.write_bytes(raw)
    with pytest.raises(UserError, match="cannot unpack it"):
        unpack(zipped, {"c": tmp_path / "c"})
