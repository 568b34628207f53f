"""ljspeech, libritts and vctk on small copies of their layouts: --download through torchaudio, splits, errors."""

import hashlib
import shutil
import tarfile
import urllib.error
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torchaudio.datasets
from handmade_runs import Output, Patch, refusal, tool
from recordings import voice, write

from ct_audio.data.corpus import open_corpus


def make_ljspeech(root: Path) -> None:
    """Five sentences of each of 12 chapters."""
    names = [f"LJ{chapter:03d}-{number:04d}" for chapter in range(1, 13) for number in range(1, 6)]
    for seed, name in enumerate(names):
        write(root / "LJSpeech-1.1" / "wavs" / f"{name}.wav", voice(seed, 0.2, 22_050), 22_050)
    lines = [f"{name}|Text of {name}.|text of {name}\n" for name in names]
    (root / "LJSpeech-1.1" / "metadata.csv").write_text("".join(lines))


def make_libritts(root: Path) -> None:
    """Two readers, of two chapters each, in each of three subsets; with the texts beside the recordings."""
    for seed, subset in enumerate(("train-clean-100", "dev-clean", "test-clean")):
        for reader in (100 * seed + 1, 100 * seed + 2):
            for chapter in (7, 8):
                for number in (0, 1):
                    name = f"{reader}_{chapter}_000000_00000{number}"
                    file = root / "LibriTTS" / subset / str(reader) / str(chapter) / f"{name}.wav"
                    write(file, voice(10 * reader + 2 * chapter + number, 0.2))
                    file.with_suffix(".normalized.txt").write_text("A text.")


def make_vctk(root: Path) -> None:
    """Four readers, three sentences each, two microphones; s5 has only one."""
    folder = root / "VCTK-Corpus-0.92"
    for seed, reader in enumerate(("p225", "p226", "p227", "s5")):
        for number in (1, 2, 3):
            for microphone in ("mic1", "mic2") if reader != "s5" else ("mic1",):
                file = folder / "wav48_silence_trimmed" / reader / f"{reader}_{number:03d}_{microphone}.flac"
                write(file, voice(10 * seed + number, 0.2, 48_000), 48_000)
            (folder / "txt" / reader).mkdir(parents=True, exist_ok=True)
            (folder / "txt" / reader / f"{reader}_{number:03d}.txt").write_text("A text.")


SETS: dict[str, tuple[Callable[[Path], None], str]] = {
    "ljspeech": (make_ljspeech, "LJSpeech-1.1"),
    "libritts": (make_libritts, "LibriTTS"),
    "vctk": (make_vctk, "VCTK-Corpus-0.92"),
}
every_set = pytest.mark.parametrize("recipe", SETS)


def prepare(patch: Patch, recipe: str, out: Path, *words: Any, source: Path | None = None) -> int:
    places = ["--out", out, *(["--source", source] if source else [])]
    return tool("prepare", patch)(recipe, *places, "--num-processes", 1, *words)


def splits_of(out: Path) -> dict[str, str]:
    """{name: split} of a corpus."""
    corpus = open_corpus(out, verify=True)
    return {name: split.name for split in corpus.splits.values() for name in split.document_names}


def serve(patch: Patch, recipe: str, archives: Path) -> list[str]:
    """Let torchaudio's own download give archives of a small copy; returns the addresses that it asks for."""
    asked: list[str] = []
    copy = archives / "copy"
    make, folder = SETS[recipe]
    make(copy)
    module = __import__(f"torchaudio.datasets.{recipe}", fromlist=["x"])

    def give(url: str, target: str | Path, hash_prefix: str | None = None) -> None:
        asked.append(url)
        assert len(str(hash_prefix)) == 64  # torchaudio knows the checksum
        if url.endswith(".zip"):
            with zipfile.ZipFile(target, "w") as archive:
                for file in (copy / folder).rglob("*"):
                    archive.write(file, file.relative_to(copy / folder))
            return
        subset = Path(url).name.partition(".")[0]
        part = f"{folder}/{subset}" if (copy / folder / subset).is_dir() else folder
        mode: Any = "w:" + url.rpartition(".")[2]
        with tarfile.open(target, mode) as archive:
            archive.add(copy / part, part)

    patch.setattr(module, "download_url_to_file", give)
    return asked


@every_set
def test_download_prepares_and_the_same_command_fetches_nothing_again(
    recipe: str, tmp_path: Path, monkeypatch: Patch, capsys: Output
) -> None:
    asked = serve(monkeypatch, recipe, tmp_path / "archives")
    out = tmp_path / recipe
    assert prepare(monkeypatch, recipe, out, "--", "--download") == 0
    assert set(splits_of(out).values()) == {"train", "valid", "test"}
    assert len(asked) == (3 if recipe == "libritts" else 1)
    source = tmp_path / f"{recipe}_source"
    assert sorted(path.name for path in source.iterdir()) == [SETS[recipe][1]]  # no archive, nothing half done
    assert prepare(monkeypatch, recipe, out, "--", "--download") == 0
    assert "complete already" in capsys.readouterr().out
    assert prepare(monkeypatch, recipe, tmp_path / "again", source=source) == 0  # without --download, and its folder
    assert prepare(monkeypatch, recipe, tmp_path / "more", source=source / SETS[recipe][1]) == 0
    assert splits_of(tmp_path / "again") == splits_of(tmp_path / "more") == splits_of(out)
    assert len(asked) == (3 if recipe == "libritts" else 1)


@every_set
def test_an_interrupted_download_is_begun_again(
    recipe: str, tmp_path: Path, monkeypatch: Patch, capsys: Output
) -> None:
    serve(monkeypatch, recipe, tmp_path / "archives")
    source = tmp_path / "source"
    name = {"ljspeech": "_extract_tar", "libritts": "_extract_tar", "vctk": "_extract_zip"}[recipe]
    module = __import__(f"torchaudio.datasets.{recipe}", fromlist=["x"])
    extract = getattr(module, name)

    def breaks_off(archive: Any, *others: Any) -> None:
        extract(archive, *others)
        for file in list(source.rglob("*.wav"))[1:] + list(source.rglob("*.flac"))[1:]:
            file.unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, breaks_off)
        assert prepare(patch, recipe, tmp_path / "out", "--", "--download", source=source) == 130
    assert not (source / SETS[recipe][1]).exists()
    assert prepare(monkeypatch, recipe, tmp_path / "out", "--", "--download", source=source) == 0
    assert not list(source.glob("*partial*"))


@every_set
@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")])
def test_a_failed_download_says_what_to_do(
    recipe: str, error: Exception, tmp_path: Path, monkeypatch: Patch, capsys: Output
) -> None:
    module = __import__(f"torchaudio.datasets.{recipe}", fromlist=["x"])

    def fails(url: str, target: str | Path, **_: Any) -> None:
        Path(target).write_bytes(b"not an archive")
        raise error

    monkeypatch.setattr(module, "download_url_to_file", fails)
    command = tool("prepare", monkeypatch)
    said = refusal(capsys, command, recipe, "--out", tmp_path / "out", "--source", tmp_path / "s", "--", "--download")
    assert "cannot download " in said
    assert "fetch and unpack it by hand, pass its folder as --source" in said
    assert [path for path in (tmp_path / "s").rglob("*") if path.is_file()] == []


@every_set
def test_another_layout_is_an_error(recipe: str, tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    write(tmp_path / "in" / "x" / "a.wav", voice(0))
    said = refusal(capsys, tool("prepare", monkeypatch), recipe, "--out", tmp_path / "out", "--source", tmp_path / "in")
    assert "expected " in said
    assert "pass -- --download to fetch" in said
    said = refusal(capsys, tool("prepare", monkeypatch), recipe, "--out", tmp_path / "out")
    assert "pass it, or -- --download" in said


def test_chapters_of_ljspeech_stay_together(tmp_path: Path, monkeypatch: Patch) -> None:
    make_ljspeech(tmp_path)
    assert prepare(monkeypatch, "ljspeech", tmp_path / "out", source=tmp_path) == 0
    splits = splits_of(tmp_path / "out")
    assert len(splits) == 60
    of_chapter = {name.partition("-")[0]: split for name, split in splits.items()}
    assert all(of_chapter[name.partition("-")[0]] == split for name, split in splits.items())
    assert [chapter for chapter, split in of_chapter.items() if split == "valid"] == ["LJ006", "LJ009"]
    assert [chapter for chapter, split in of_chapter.items() if split == "test"] == ["LJ010", "LJ012"]


def test_libritts_keeps_its_splits_and_reads_chapter_after_chapter(
    tmp_path: Path, monkeypatch: Patch, capsys: Output
) -> None:
    make_libritts(tmp_path)
    assert prepare(monkeypatch, "libritts", tmp_path / "out", source=tmp_path) == 0
    splits = splits_of(tmp_path / "out")
    assert Counter(splits.values()) == {"train": 8, "valid": 8, "test": 8}
    assert {name.partition("/")[0]: split for name, split in splits.items()} == {
        "train-clean-100": "train",
        "dev-clean": "valid",
        "test-clean": "test",
    }
    names = open_corpus(tmp_path / "out").split("valid").document_names
    assert list(names) == sorted(names)
    assert names[0] == "dev-clean/101/7/101_7_000000_000000.wav"
    capsys.readouterr()


def test_one_subset_of_libritts_is_split_by_reader(tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    make_libritts(tmp_path)
    shutil.copytree(tmp_path / "LibriTTS" / "dev-clean" / "101", tmp_path / "LibriTTS" / "train-clean-100" / "101")
    words = ("--", "--subsets", "train-clean-100")
    assert prepare(monkeypatch, "libritts", tmp_path / "out", *words, source=tmp_path) == 0
    assert "no subset of test, valid is taken: the split is by reader" in capsys.readouterr().err
    of_reader = {name.split("/")[1]: split for name, split in splits_of(tmp_path / "out").items()}
    assert sorted(of_reader.values()) == ["test", "train", "valid"]
    said = refusal(
        *(capsys, tool("prepare", monkeypatch), "libritts", "--out", tmp_path / "o", "--source", tmp_path),
        *("--", "--subsets", "train-clean-360", "dev-clean"),
    )
    assert "missing: train-clean-360; pass -- --download to fetch them, or --subsets" in said


def test_readers_of_vctk_stay_together_and_one_microphone_is_taken(tmp_path: Path, monkeypatch: Patch) -> None:
    make_vctk(tmp_path)
    assert prepare(monkeypatch, "vctk", tmp_path / "out", source=tmp_path) == 0
    splits = splits_of(tmp_path / "out")
    assert {name.rpartition("_")[2] for name in splits} == {"mic2.flac"}
    assert len({(name.partition("/")[0], split) for name, split in splits.items()}) == 3  # s5 has no mic2
    assert prepare(monkeypatch, "vctk", tmp_path / "one", "--", "--microphone", "mic1", source=tmp_path) == 0
    assert len({name.partition("/")[0] for name in splits_of(tmp_path / "one")}) == 4


def test_torchaudio_knows_the_sets_as_we_do() -> None:
    """Where they are and their checksums are torchaudio's; a version that had others would be another set."""
    checksums = {
        **torchaudio.datasets.libritts._CHECKSUMS,  # type: ignore[attr-defined]
        **torchaudio.datasets.vctk._CHECKSUMS,  # type: ignore[attr-defined]
        "lj": torchaudio.datasets.ljspeech._RELEASE_CONFIGS["release1"]["checksum"],  # type: ignore[attr-defined]
    }
    joined = "\n".join(f"{name} {checksum}" for name, checksum in sorted(checksums.items()))
    assert hashlib.sha256(joined.encode()).hexdigest()[:16] == "c5e2f142c87d49bf"
