"""The recipes of text: which documents they find, what they do with other layouts, and their downloads from mirrors."""

import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import re
import shutil
import sys
import zipfile

import numpy as np
import pytest
from http_mirror import Mirror, serve
from recordings import ROOT, load_script

from ct_audio.commands import describe, prepare
from ct_audio.commands.command_line import run_tool
from ct_audio.data.corpus import open_corpus
from ct_audio.preparation import download

ENWIK8 = b"<page>\n caf\xc3\xa9 " + bytes(range(256)) + b"x" * 741 + b"\xff"
CUTS = [len(ENWIK8) * 90 // 100, len(ENWIK8) * 95 // 100]
ARTICLE = " \n = {} = \n \n A b <unk> @-@ c . \n \n = = A section = = \n \n = d = \n The b \n"
WIKITEXT = {
    split: ARTICLE.format(f"One of {split}") + ARTICLE.format("= x") * 2 for split in ("train", "valid", "test")
}
BOOKS = {
    "train/10.txt": "The first book.\r\n\r\nIts end.\n" * 9,
    "train/9.txt": "Ärger with the second book",
    "validation/3.txt": "the third",
    "test/4.txt": "the fourth\n",
    "metadata.csv": '10,"The First, indeed",1900,http://x\n9,Second,1850,http://x\n3,Third,1800,http://x\n',
}


def run(monkeypatch, recipe, out, *options, script=prepare):
    """Run the preparation tool in this process; returns its exit status."""
    arguments = ["prepare.py", str(ROOT / "recipes" / recipe), "--out", str(out), "--num-processes", "1", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    return run_tool(script.main)


def write_books(folder):
    for name, text in BOOKS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())


def write_wikitext(folder):
    folder.mkdir(exist_ok=True)
    for split, text in WIKITEXT.items():
        (folder / f"wiki.{split}.tokens").write_bytes(text.encode())


def decoded(out):
    """{split: text} of a corpus."""
    corpus = open_corpus(out, verify=True)
    return {name: corpus.codec.decode(split.codes[:]) for name, split in corpus.splits.items()}


def test_enwik8_is_split_90_5_5(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "enwik8").write_bytes(ENWIK8)
    assert run(monkeypatch, "enwik8", tmp_path / "out", "--source", str(tmp_path / "in"), "--verify") == 0
    printed = capsys.readouterr().out
    assert f"decodes back to its {len(ENWIK8)} bytes" in printed
    assert decoded(tmp_path / "out") == {
        "train": ENWIK8[: CUTS[0]],
        "valid": ENWIK8[CUTS[0] : CUTS[1]],
        "test": ENWIK8[CUTS[1] :],
    }
    assert run(monkeypatch, "enwik8", tmp_path / "out", "--source", str(tmp_path / "in"), "--verify") == 0
    assert "complete already" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["describe.py", str(tmp_path / "out"), "--verify"])
    assert run_tool(describe.main) == 0
    assert "| out | test | 1 |" in capsys.readouterr().out


def test_the_whole_of_enwik8_has_the_usual_split(tmp_path):
    with (tmp_path / "enwik8").open("wb") as handle:
        handle.truncate(10**8)
    texts = load_script("recipes/enwik8/prepare.py", "recipe_enwik8").list_texts(tmp_path, None)
    assert [(text.split, text.num_bytes) for text in texts] == [
        ("train", 90 * 10**6),
        ("valid", 5 * 10**6),
        ("test", 5 * 10**6),
    ]


def test_wikitext_keeps_its_files_and_finds_articles(tmp_path, monkeypatch):
    write_wikitext(tmp_path / "in")
    assert run(monkeypatch, "wikitext103", tmp_path / "out", "--source", str(tmp_path / "in"), "--verify") == 0
    corpus = open_corpus(tmp_path / "out")
    expected = {split: text.encode() for split, text in WIKITEXT.items()}
    train, valid = corpus.split("train"), corpus.split("valid")
    assert decoded(tmp_path / "out") | {"valid": b"", "test": b""} == expected | {"valid": b"", "test": b""}
    assert b" = One of <unk> = " in corpus.codec.decode(valid.codes[:])  # "valid" is in no training text
    assert train.document_names == ("One of train",)
    words = sum(len(line.split()) + 1 for line in WIKITEXT["train"].splitlines())
    assert (train.num_words, train.num_codes) == (words, words)
    assert corpus.codec.vocab_size == len(set(WIKITEXT["train"].split()) | {"<unk>"}) + 1


def test_articles_begin_with_the_empty_line_before_their_title(tmp_path):
    find_articles = load_script("recipes/wikitext103/prepare.py", "recipe_wikitext103").find_articles
    file, article = tmp_path / "x", ARTICLE.format("T")
    for text, names, begins in (
        (article, ["T"], [0]),
        (article * 3, ["T"] * 3, [0, len(article), 2 * len(article)]),
        ("A \n" + article, ["T"], [0]),
        (article + " \n = y = \n a \n", ["T"], [0]),  # no empty line after it
        (" a \n", ["x"], [0]),
        (article.removeprefix(" \n"), ["T"], [0]),
    ):
        file.write_text(text)
        articles = find_articles(file, "train")
        assert [a.name for a in articles] == names
        assert [a.begin for a in articles] == begins
        assert [a.end for a in articles] == [*begins[1:], len(text)]


def test_books_are_documents_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    write_books(tmp_path / "in")
    options = ("--source", str(tmp_path / "in"), "--verify", "--", "--vocab-size", "270")
    assert run(monkeypatch, "pg19", tmp_path / "out", *options) == 0
    corpus = open_corpus(tmp_path / "out")
    assert corpus.split("train").document_names == ("9 Second", "10 The First, indeed")
    assert corpus.split("test").document_names == ("4",)
    assert corpus.codec.vocab_size == 270
    text = decoded(tmp_path / "out")
    assert text["train"] == (BOOKS["train/9.txt"] + BOOKS["train/10.txt"]).encode()
    assert corpus.split("train").num_words == len(BOOKS["train/9.txt"].split()) + len(BOOKS["train/10.txt"].split())
    (tmp_path / "in" / "metadata.csv").write_text("10\n")
    assert run(monkeypatch, "pg19", tmp_path / "out", *options) == 2


@pytest.mark.parametrize("recipe", ["enwik8", "wikitext103", "pg19"])
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, recipe):
    assert run(monkeypatch, recipe, tmp_path / "out") == 2
    assert run(monkeypatch, recipe, tmp_path / "out", "--source", str(tmp_path / "none")) == 2
    assert run(monkeypatch, recipe, tmp_path / "out", "--source", str(tmp_path)) == 2
    assert run(monkeypatch, recipe, tmp_path / "out", "--source", str(tmp_path), "--gain-db", "3") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: ") and "expected" in line for line in lines[:3])


def zipped(members):
    """A zip archive."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return raw.getvalue()


def with_recipe(monkeypatch, name, **constants):
    """Let the tool see a recipe with other constants."""
    recipe = prepare.load_recipe(ROOT / "recipes" / name)
    for key, value in constants.items():
        assert type(getattr(recipe, key)) is type(value)
        setattr(recipe, key, value)
    monkeypatch.setattr(prepare, "load_recipe", lambda folder: recipe)


def test_enwik8_is_downloaded(tmp_path, monkeypatch, capsys):
    archive = zipped({"enwik8": ENWIK8})
    sums = {
        "ARCHIVE_CHECKSUM": f"sha256:{hashlib.sha256(archive).hexdigest()}",
        "CHECKSUM": f"md5:{hashlib.md5(ENWIK8).hexdigest()}",
    }
    with serve(Mirror()) as gone, serve(Mirror(files={"/dc/enwik8.zip": archive})) as mirror:
        with_recipe(monkeypatch, "enwik8", MIRRORS=(gone.url, f"{mirror.url}/dc"), **sums)
        assert run(monkeypatch, "enwik8", tmp_path / "out", "--", "--download") == 0
        assert decoded(tmp_path / "out")["train"] == ENWIK8[: CUTS[0]]
        assert (tmp_path / "out_source" / "enwik8").read_bytes() == ENWIK8
        assert run(monkeypatch, "enwik8", tmp_path / "out", "--", "--download") == 0
        assert "complete already" in capsys.readouterr().out
        assert len(mirror.requests) == 1
        (tmp_path / "out_source" / "enwik8").write_bytes(ENWIK8[:-1])
        assert run(monkeypatch, "enwik8", tmp_path / "out", "--", "--download") == 2
        assert "delete it and run the command again" in capsys.readouterr().err
        with_recipe(monkeypatch, "enwik8", MIRRORS=(gone.url,), **sums)
        options = ("--source", str(tmp_path / "other"), "--", "--download")
        assert run(monkeypatch, "enwik8", tmp_path / "out", *options) == 2
        assert f"{gone.url}/enwik8.zip: HTTP 404" in capsys.readouterr().err
        assert run(monkeypatch, "enwik8", tmp_path / "out", *options, "--download-mirror", f"{mirror.url}/dc/") == 0


def test_wikitext_is_downloaded(tmp_path, monkeypatch):
    archive = zipped({f"wikitext-2/wiki.{split}.tokens": text for split, text in WIKITEXT.items()})
    sums = {"wikitext-2": f"sha256:{hashlib.sha256(archive).hexdigest()}", "wikitext-103": "sha256:0"}
    with serve(Mirror(files={"/wikitext-2-v1.zip": archive, "/wikitext-103-v1.zip": archive})) as mirror:
        with_recipe(monkeypatch, "wikitext103", MIRRORS=(mirror.url,), ARCHIVE_CHECKSUMS=sums)
        options = ("--source", str(tmp_path / "in"), "--", "--download")
        assert run(monkeypatch, "wikitext103", tmp_path / "out", *options) == 2
        assert run(monkeypatch, "wikitext103", tmp_path / "out", *options, "--download-set", "wikitext-2") == 0
        assert decoded(tmp_path / "out")["train"] == WIKITEXT["train"].encode()


def bucket(pages):
    """Paths and answers of a bucket's listing of train/, a page a list of names."""
    answers = {}
    for number, names in enumerate(pages):
        items = [
            {"name": name, "md5Hash": base64.b64encode(hashlib.md5(BOOKS[name].encode()).digest()).decode()}
            for name in names
        ]
        page = {"items": items} | ({"nextPageToken": f"p{number + 1}"} if number + 1 < len(pages) else {})
        token = f"&pageToken=p{number}" if number else ""
        fields = "items%28name%2Cmd5Hash%29%2CnextPageToken"
        folder = names[0].partition("/")[0]
        path = f"/o?prefix={folder}%2F&maxResults=1000&fields={fields}{token}"
        answers[path] = json.dumps(page).encode()
    return answers


def book_mirror(**changes):
    """A bucket with all books, listed; `changes` are content by path."""
    files = {f"/b/{name}": text.encode() for name, text in BOOKS.items()}
    for pages in ([["train/10.txt"], ["train/9.txt"]], [["validation/3.txt"]], [["test/4.txt"]]):
        files |= bucket(pages)
    for folder in ("train", "validation", "test"):
        names = [name for name in BOOKS if name.startswith(folder)]
        files[f"/{folder}_files.txt"] = "\n".join(names).encode()
    return Mirror(files=files | changes)


@pytest.fixture
def quick(monkeypatch):
    """No pause before another attempt."""
    monkeypatch.setattr(download, "RETRIES", download.RETRIES.new(total=2, backoff_factor=0))


def prepare_books(monkeypatch, mirror, folder, *options):
    addresses = {
        "MIRRORS": (f"{mirror.url}/b",),
        "BUCKET_LISTINGS": (f"{mirror.url}/o",),
        "PLAIN_LISTINGS": (mirror.url,),
    }
    with_recipe(monkeypatch, "pg19", **addresses)
    return run(monkeypatch, "pg19", folder / "out", "--source", str(folder / "in"), "--", "--download", *options)


def test_books_are_downloaded_and_fetched_once(tmp_path, monkeypatch, capsys, quick):
    with serve(book_mirror()) as mirror:
        assert prepare_books(monkeypatch, mirror, tmp_path, "--vocab-size", "270") == 0
        for name, text in BOOKS.items():
            assert (tmp_path / "in" / name).read_bytes() == text.encode()
            assert mirror.requests.count(f"/b/{name}") == 1
        (tmp_path / "in" / "train" / "9.txt").write_bytes(b"damaged")
        assert prepare_books(monkeypatch, mirror, tmp_path, "--vocab-size", "270") == 0
        assert mirror.requests.count("/b/train/9.txt") == 2
        assert mirror.requests.count("/b/train/10.txt") == 1
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (b"{}", None, "expected names as train/123.txt, got none"),
        (b"<html>", None, "Expecting value: line 1"),
        (b"[1]", None, "no attribute"),
        (b'{"items": [{"name": "train/9.txt", "md5Hash": "no base64"}]}', None, "base64"),
        (b"", 403, r"/o\?prefix=train.*: HTTP 403 Forbidden"),
        (b"", 404, r"/o\?prefix=train.*: HTTP 404 Not Found"),
        (b"", 503, "too many 503 error responses"),
    ],
)
def test_without_the_bucket_names_come_from_a_plain_listing_and_a_warning_says_what_is_lost(
    tmp_path, monkeypatch, capsys, quick, answer, status, reason
):
    with serve(book_mirror()) as mirror:
        for path in [path for path in mirror.files if path.startswith("/o?prefix=train")]:
            mirror.files[path], mirror.failures[path] = answer, [status] * 9 if status else []
        assert prepare_books(monkeypatch, mirror, tmp_path, "--vocab-size", "270") == 0
        assert decoded(tmp_path / "out")["train"] == (BOOKS["train/9.txt"] + BOOKS["train/10.txt"]).encode()
        first, second = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert re.search(rf"listing of train/, which has the checksums, cannot be used: .*{reason}", first)
        assert re.search(r"warning: 2 of 4 books have no checksum: .*damaged.*unnoticed; .* run the command ag", second)


def test_books_without_checksums_are_counted(tmp_path, monkeypatch, capsys, quick):
    with serve(book_mirror()) as mirror:
        path = next(path for path in mirror.files if path.startswith("/o?prefix=test"))
        mirror.files[path] = b'{"items": [{"name": "test/4.txt"}]}'  # as of an object that was put together from parts
        assert prepare_books(monkeypatch, mirror, tmp_path, "--vocab-size", "270") == 0
        assert "warning: 1 of 4 books have no checksum" in capsys.readouterr().err
        options = ("--vocab-size", "270", "--download-mirror", mirror.url)
        assert prepare_books(monkeypatch, mirror, tmp_path, *options) == 0
        assert "warning: 4 of 4 books have no checksum" in capsys.readouterr().err
        assert prepare_books(monkeypatch, mirror, tmp_path, "--download-connections", "0") == 2
        assert "--download-connections: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../evil.txt", "train/../../x.txt", "/etc/x", "train/a.txt", "validation/3.txt"])
def test_a_listing_writes_nowhere_else(tmp_path, monkeypatch, capsys, quick, name):
    with serve(book_mirror(**{"/train_files.txt": f"train/9.txt\n{name}\n".encode()})) as mirror:
        for path in [path for path in mirror.files if path.startswith("/o?prefix=train")]:
            mirror.files[path] = json.dumps({"items": [{"name": name}]}).encode()
        assert prepare_books(monkeypatch, mirror, tmp_path) == 2
    assert "listing of train: expected names as train/123.txt" in capsys.readouterr().err
    assert not list((tmp_path / "in").rglob("*"))


def as_other_systems_write(text, form):
    """A text of WikiText in the bytes of another system or tool."""
    if form == "no spaces":
        return "\n".join(line.strip() for line in text.split("\n")).encode()
    raw = text.encode()
    return {
        "line feeds": raw,
        "CRLF": raw.replace(b"\n", b"\r\n"),
        "empty lines": raw.replace(b"\n \n", b"\n\n").replace(b"\n \n", b"\n\n"),
        "byte order mark": b"\xef\xbb\xbf" + raw,
        "both": b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"),
    }[form]


@pytest.mark.parametrize("form", ["line feeds", "CRLF", "empty lines", "no spaces", "byte order mark", "both"])
def test_wikitext_of_any_system_has_the_same_articles_and_codes(tmp_path, monkeypatch, form):
    article = " \n = Title {} = \n \n A b <unk> c . \n \n = = A section = = \n \n The b \n"
    text = "".join(article.format(number) for number in range(4))
    (tmp_path / "in").mkdir()
    for split in WIKITEXT:
        (tmp_path / "in" / f"wiki.{split}.tokens").write_bytes(as_other_systems_write(text, form))
    assert run(monkeypatch, "wikitext103", tmp_path / "out", "--source", str(tmp_path / "in"), "--verify") == 0
    corpus = open_corpus(tmp_path / "out")
    for split in corpus.splits.values():
        assert split.document_names == tuple(f"Title {number}" for number in range(4))
        assert corpus.codec.decode(split.codes[:]) == text.encode()
        assert len(set(np.diff(split.document_offsets))) == 1


def test_a_file_without_articles_says_so(tmp_path, monkeypatch, capsys):
    write_wikitext(tmp_path / "in")
    (tmp_path / "in" / "wiki.test.tokens").write_text("a b \n c \n")
    assert run(monkeypatch, "wikitext103", tmp_path / "out", "--source", str(tmp_path / "in")) == 0
    assert f"warning: {tmp_path}/in/wiki.test.tokens: found no title of an article" in capsys.readouterr().err
    assert open_corpus(tmp_path / "out").split("test").document_names == ("wiki.test.tokens",)


COMPRESS = [gzip.compress, bz2.compress, lzma.compress, lambda raw: zipped({"x": raw}), lambda raw: b"(\xb5/\xfd" + raw]


@pytest.mark.parametrize("compress", COMPRESS, ids=["gz", "bz2", "xz", "zip", "zst"])
@pytest.mark.parametrize("recipe", ["enwik8", "wikitext103", "pg19"])
def test_archives_under_the_name_of_a_text_are_refused(tmp_path, monkeypatch, capsys, compress, recipe):
    names = {"enwik8": "enwik8", "wikitext103": "wiki.train.tokens", "pg19": "train/10.txt"}
    write_wikitext(tmp_path)
    write_books(tmp_path)
    (tmp_path / names[recipe]).write_bytes(compress(ENWIK8 * 9))
    assert run(monkeypatch, recipe, tmp_path / "out", "--source", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert re.search(rf"error: {tmp_path}/{names[recipe]}: expected text, got an? \w+ archive; unpack it", error)


@pytest.mark.parametrize("folder", ["train", "validation", "test"])
def test_a_book_that_is_no_utf8_is_named_with_line_and_byte_in_every_split(tmp_path, monkeypatch, capsys, folder):
    write_books(tmp_path / "in")
    file = next((tmp_path / "in" / folder).iterdir())
    file.write_bytes("one\ntwo\nGrüße\n".encode("latin-1"))
    options = ("--source", str(tmp_path / "in"), "--", "--vocab-size", "270")
    assert run(monkeypatch, "pg19", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert f"error: {file}, line 3, byte 10: expected UTF-8" in error
    assert "iconv -f latin1 -t utf-8 FILE > NEW_FILE" in error
    left = {"in"} if folder == "train" else {"in", "out.partial"}  # the vocabulary, to go on from
    assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_words_that_are_no_utf8_are_no_unknown_words(tmp_path, monkeypatch, capsys, split):
    write_wikitext(tmp_path / "in")
    file = tmp_path / "in" / f"wiki.{split}.tokens"
    raw = file.read_bytes() + "Grüße \n".encode("latin-1")
    file.write_bytes(raw)
    assert run(monkeypatch, "wikitext103", tmp_path / "out", "--source", str(tmp_path / "in")) == 2
    place = f"line {raw.count(bytes([10]))}, byte {raw.index(bytes([0xFC]))}"
    assert f"error: {file}, {place}: expected UTF-8" in capsys.readouterr().err


def test_what_is_no_book_is_left_out_with_a_word(tmp_path, monkeypatch, capsys):
    write_books(tmp_path / "in")
    for name in ("train/._9.txt", "validation/.DS_Store"):
        (tmp_path / "in" / name).write_bytes(b"\0\5\x16\7\xff a Macintosh's own")
    (tmp_path / "in" / "train" / "11.txt.gz").write_bytes(gzip.compress(b"a book"))
    (tmp_path / "in" / "train" / "more").mkdir()
    (tmp_path / "in" / "train" / "more" / "12.txt").write_text("a book")
    raw = (tmp_path / "in" / "metadata.csv").read_text()
    (tmp_path / "in" / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + raw.replace("\n", "\r\n").encode())
    options = ("--source", str(tmp_path / "in"), "--verify", "--", "--vocab-size", "270")
    assert run(monkeypatch, "pg19", tmp_path / "out", *options) == 0
    assert open_corpus(tmp_path / "out").split("train").document_names == ("9 Second", "10 The First, indeed")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning: {tmp_path}/in/train: left out what is no book (NAME.txt): 1 .gz, 1 .txt",
    ]
    (tmp_path / "in" / "metadata.csv").write_bytes("9,Zweites Büchlein\n".encode("latin-1"))
    assert run(monkeypatch, "pg19", tmp_path / "out", *options) == 2
    assert f"{tmp_path}/in/metadata.csv, line 1, byte 11: expected UTF-8" in capsys.readouterr().err


def test_a_book_in_two_splits_is_reported(tmp_path, monkeypatch, capsys):
    write_books(tmp_path / "in")
    shutil.copy(tmp_path / "in" / "train" / "9.txt", tmp_path / "in" / "test" / "5.txt")
    options = ("--source", str(tmp_path / "in"), "--", "--vocab-size", "270")
    assert run(monkeypatch, "pg19", tmp_path / "out", *options) == 0
    error = capsys.readouterr().err
    assert (
        "warning: 1 held-out texts are in train too, byte by byte, as '5' of test, which is '9 Second' there" in error
    )
