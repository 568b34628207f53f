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
    Patience,
    RemoteFile,
    download_files,
    mirror_urls,
    read_url,
    require_checksum,
    unpack,
)

CONTENT = np.random.default_rng(0).bytes(300_000)
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
QUICK = Patience(num_attempts=3, pause_seconds=0.01, timeout_seconds=5.0)


@pytest.fixture
def mirror():
    with serve(Mirror(files={"/a": CONTENT})) as running:
        yield running


@pytest.fixture
def second():
    with serve(Mirror(files={"/a": CONTENT})) as running:
        yield running


def fetch(folder, *mirrors, checksum: str | None = CHECKSUM, name="a"):
    """Download one file."""
    urls = mirror_urls(name, [mirror.url for mirror in mirrors])
    return download_files([RemoteFile(name, urls, checksum)], folder, patience=QUICK)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "checksum", [CHECKSUM, f"md5:{hashlib.md5(CONTENT).hexdigest()}", None], ids=["sha256", "md5", "none"]
)
def test_a_file_is_fetched_once(tmp_path, mirror, checksum):
    assert fetch(tmp_path, mirror, checksum=checksum) == 1
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert names(tmp_path) == ["a"]
    assert fetch(tmp_path, mirror, checksum=checksum) == 0
    assert mirror.requests == [("/a", None)]


@pytest.mark.parametrize("checksum", [CHECKSUM, None], ids=["sha256", "none"])
def test_a_broken_connection_goes_on_where_it_was(tmp_path, mirror, checksum):
    mirror.failures["/a"] = [0, 0]
    fetch(tmp_path, mirror, checksum=checksum)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert mirror.asked("/a") == [None, "bytes=150000-", "bytes=225000-"]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("checksum", [CHECKSUM, None], ids=["sha256", "none"])
@pytest.mark.parametrize("chunk_bytes", [50_000, 100_000], ids=["between chunks", "within a chunk"])
def test_an_answer_in_chunks_that_breaks_off_is_not_the_file(tmp_path, mirror, chunk_bytes, checksum):
    """Such an answer does not say how long it is; half of it comes, then there is no end of it."""
    mirror.chunk_bytes, mirror.failures["/a"] = chunk_bytes, [0, 404]
    with pytest.raises(UserError, match="HTTP 404"):
        fetch(tmp_path, mirror, checksum=checksum)
    assert CONTENT.startswith((tmp_path / "a.part").read_bytes())
    found = (tmp_path / "a.part").stat().st_size
    assert 0 < found <= 150_000
    mirror.failures["/a"] = [0, 0, 0]
    with pytest.raises(UserError, match=r"the connection broke off after \d{6} bytes; pass --download-mirror"):
        fetch(tmp_path, mirror, checksum=checksum)
    assert not (tmp_path / "a").exists()
    assert fetch(tmp_path, mirror, checksum=checksum) == 1
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert mirror.asked("/a")[:3] == [None, f"bytes={found}-", f"bytes={found}-"]
    assert names(tmp_path) == ["a"]


def test_an_answer_without_length_is_taken_as_whole_at_its_end_only(tmp_path):
    """A range says in its header how long the file is, though the answer does not say how long itself is."""

    class Answer:
        def __init__(self, status, **headers):
            self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}

    for answer, offset, end in (
        (Answer(200, Content_Length="7"), 0, 7),
        (Answer(206, Content_Length="7", Content_Range="bytes 3-9/10"), 3, 10),
        (Answer(206, Content_Range="bytes 3-9/10"), 3, 10),
        (Answer(206, Content_Range="bytes 3-9/*"), 3, None),
        (Answer(200), 0, None),
    ):
        assert module._end(answer, offset) == end


def test_the_next_mirror_goes_on_if_there_is_a_checksum(tmp_path, mirror, second):
    mirror.failures["/a"] = [0, 404]
    fetch(tmp_path, mirror, second)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert second.asked("/a") == ["bytes=150000-"]


def test_the_next_mirror_begins_anew_if_there_is_none(tmp_path, mirror, second):
    mirror.failures["/a"] = [0, 404]
    second.files["/a"] = CONTENT[::-1]
    fetch(tmp_path, mirror, second, checksum=None)
    assert (tmp_path / "a").read_bytes() == CONTENT[::-1]
    assert second.asked("/a") == [None]


def test_a_file_that_has_changed_is_not_mixed(tmp_path, mirror):
    """Half of one content is there; the server has another one now."""
    mirror.failures["/a"] = [0, 404]
    with pytest.raises(UserError):
        fetch(tmp_path, mirror, checksum=None)
    assert names(tmp_path) == ["a.part", "a.part.json"]
    mirror.files["/a"] = CONTENT[::-1]
    fetch(tmp_path, mirror, checksum=None)
    assert (tmp_path / "a").read_bytes() == CONTENT[::-1]
    assert mirror.asked("/a")[-1] == "bytes=150000-"


LEFT = {"empty": b"", "wrong": b"x", "whole": CONTENT, "longer": CONTENT + b"x", "wrong and longer": b"x" * 400_000}


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT.keys())
def test_whatever_was_left_the_file_is_right_in_the_end(tmp_path, mirror, second, left):
    (tmp_path / "a.part").write_bytes(left)
    fetch(tmp_path, mirror, second)  # where what was left is wrong, the first mirror's rest makes a wrong checksum
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_without_ranges(tmp_path, mirror):
    mirror.has_ranges = False
    mirror.failures["/a"] = [0]
    fetch(tmp_path, mirror)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_busy_mirror_is_asked_again(tmp_path, mirror):
    mirror.failures["/a"] = [503, 429]
    fetch(tmp_path, mirror)
    assert len(mirror.requests) == 3


def test_other_content_is_refused_and_the_next_mirror_asked(tmp_path, mirror, second):
    mirror.files["/a"] = b"<html>not found</html>"
    fetch(tmp_path, mirror, second)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert len(mirror.requests) == 1


def test_when_all_mirrors_are_gone_the_message_names_them(tmp_path, mirror, second):
    mirror.files.clear()
    second.files["/a"] = b"other"
    urls = (*mirror_urls("a", [mirror.url, second.url]), "http://127.0.0.1:9/a", "nonsense")
    with pytest.raises(UserError) as caught:
        download_files([RemoteFile("a", urls, CHECKSUM)], tmp_path, patience=QUICK)
    message = str(caught.value)
    assert f"{mirror.url}/a: HTTP 404 Not Found (this mirror is gone, or has moved)" in message
    assert f"{second.url}/a: expected {CHECKSUM}, got sha256:" in message
    assert "http://127.0.0.1:9/a: [Errno 111] Connection refused" in message
    assert "nonsense: no address: unknown url type" in message
    assert message.endswith(
        "pass --download-mirror URL, or fetch it by hand, put it into --source, and leave out --download"
    )
    assert not (tmp_path / "a").exists()


def test_a_damaged_file_that_is_there_is_fetched_again(tmp_path, mirror):
    (tmp_path / "a").write_bytes(b"cut")
    assert fetch(tmp_path, mirror) == 1
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_many_files_at_a_time(tmp_path, mirror, monkeypatch):
    mirror.files = {f"/train/{i}.txt": f"book {i}".encode() for i in range(40)}
    running, most, lock, original = [0], [0], threading.Lock(), module._open

    def slow(*arguments):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        try:
            return original(*arguments)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(module, "_open", slow)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "7.txt").write_bytes(b"book 7")
    files = [RemoteFile(path[1:], (mirror.url + path,)) for path in mirror.files]
    assert download_files(files, tmp_path, num_threads=5, patience=QUICK) == 39
    assert {f"/train/{path.name}": path.read_bytes() for path in (tmp_path / "train").iterdir()} == mirror.files
    assert most[0] == 5


def test_one_that_is_missing_stops_all(tmp_path, mirror):
    mirror.files = {f"/{i}": b"x" for i in range(200)}
    del mirror.files["/3"]
    files = [RemoteFile(str(i), (f"{mirror.url}/{i}",)) for i in range(200)]
    with pytest.raises(UserError, match=r"cannot download 3: .*404"):
        download_files(files, tmp_path, num_threads=2, patience=QUICK)
    assert len(mirror.requests) < 150


def test_a_full_disk_is_no_matter_of_mirrors(tmp_path, mirror, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._Fetch, "_copy", full)
    with pytest.raises(OSError, match="No space"):
        fetch(tmp_path, mirror)
    assert len(mirror.requests) == 1


def test_listings(mirror, second):
    second.files["/list"] = b"1\n2\n"
    second.failures["/list"] = [500]
    assert read_url(mirror_urls("list", [mirror.url, second.url]), patience=QUICK) == b"1\n2\n"
    with pytest.raises(UserError, match=r"404.*nothing: HTTP 404"):
        read_url(mirror_urls("nothing", [mirror.url, second.url]), patience=QUICK)


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
