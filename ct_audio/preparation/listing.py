"""Which files below a folder are inputs, and under which names: rules that all recipes share.

Hidden files (`._x.wav` of macOS), folders that systems add, and what a preparation itself has written are no inputs.
Links to folders are followed, each folder once. Names are in NFC: what macOS writes as e and an accent is one letter.
"""

import os
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ct_audio.common.errors import UserError
from ct_audio.data.audio_files import AUDIO_SUFFIXES
from ct_audio.data.av_files import AV_SUFFIXES, INSTALL, has_av
from ct_audio.data.corpus import FORMAT

OTHER_AUDIO_SUFFIXES = frozenset(
    [
        ".8svx", ".dff", ".dsf", ".dss", ".dts", ".gsm", ".m4p", ".mp1", ".mpc", ".nist", ".qcp", ".ra", ".ram",
        ".shn", ".snd", ".sph", ".spx", ".tak", ".voc", ".vox",
    ]
)  # fmt: skip
"""Audio that no recipe takes; it is named, so that nobody takes it for prepared."""
_AUDIO_BEGINNINGS = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"FORM", b"caff", b".snd", b"ID3")
_OF_SYSTEMS = frozenset(["@eaDir", "__MACOSX", "lost+found"])


class Files(NamedTuple):
    """What is below a folder.

    Attributes:
        files: by name, "/" between folders, sorted; with links that lead nowhere and with what is no plain file.
        unusable: folders that nobody can look into, and links that lead in circles.
        folders: all others.
    """

    files: dict[str, Path]
    unusable: dict[str, Path]
    folders: dict[str, Path]


class Audio(NamedTuple):
    """Recordings below a folder, sorted by name.

    Attributes:
        files: what is named like audio that can be read.
        unusable: why what looks like audio is not taken, None where reading it tells.
    """

    files: dict[str, Path]
    unusable: dict[str, tuple[Path, str | None]]


def same_name(text: str) -> str:
    """A name in NFC: equal for all ways to write its letters in Unicode."""
    return unicodedata.normalize("NFC", text)


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def find_files(source: Path) -> Files:
    """Every file below a folder that may be an input.

    Raises:
        UserError: the folder cannot be read, or is itself what a preparation has written.
    """
    found: dict[str, Path] = {}
    unusable: dict[str, Path] = {}
    folders: dict[str, Path] = {}
    links: dict[str, Path] = {}
    seen: set[tuple[int, int]] = set()
    todo = [("", source)]
    while todo or links:
        if not todo:  # what links lead to comes last: a folder keeps the name of its own place
            path = min(links)
            todo.append((f"{path}/", links.pop(path)))
        prefix, folder = todo.pop()
        try:
            status = folder.stat()
            entries = [entry for entry in os.scandir(folder) if not _is_hidden(entry.name)]
        except OSError as error:
            if not prefix:
                raise UserError(f"cannot read the folder {source.absolute()}: {error.strerror}") from error
            unusable[prefix[:-1]] = folder
            continue
        if (status.st_dev, status.st_ino) in seen:
            if folder.parent.resolve().is_relative_to(folder.resolve()):
                unusable[prefix[:-1]] = folder  # a circle
            continue
        seen.add((status.st_dev, status.st_ino))
        if _is_own_output(folder, {entry.name for entry in entries}):
            if not prefix:
                raise UserError(f"{source.absolute()} is a prepared corpus; expected the folder it was made from")
            continue
        folders |= {prefix[:-1]: folder} if prefix else {}
        for entry in entries:
            path, file = prefix + entry.name, folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                todo.append((f"{path}/", file))
            elif entry.is_symlink() and os.path.isdir(file):
                if source.resolve().is_relative_to(file.resolve()):
                    unusable[path] = file
                else:
                    links[path] = file
            else:
                found[path] = file
    return Files(*map(_with_same_names, (found, unusable, folders)))


def find_audio(source: Path) -> Audio:
    """Every file below a folder that is audio by its name.

    A folder that is named like audio stands for what is in it, and for itself if that is nothing.
    """
    everything = find_files(source)
    suffixes = AUDIO_SUFFIXES | (AV_SUFFIXES if has_av() else frozenset())
    files = {name: path for name, path in everything.files.items() if _suffix(name) in suffixes}
    unusable: dict[str, tuple[Path, str | None]] = {name: (path, None) for name, path in everything.unusable.items()}
    for name, path in everything.files.items():
        suffix = _suffix(name)
        if suffix in AV_SUFFIXES - suffixes:
            unusable[name] = (path, f"not read ({suffix[1:]}): PyAV would; run: {INSTALL}")
        elif suffix in OTHER_AUDIO_SUFFIXES:
            unusable[name] = (path, f"not read ({suffix[1:]}): convert it, as with: ffmpeg -i IN{suffix} OUT.flac")
        elif not suffix.strip(".0123456789") and _begins_like_audio(path):
            unusable[name] = (path, "without suffix: it begins like audio; give it its suffix, as in NAME.wav")
    for name, path in everything.folders.items():
        inside = f"{name}/"
        if _suffix(name) in AUDIO_SUFFIXES and not any(other.startswith(inside) for other in (*files, *unusable)):
            unusable[name] = (path, None)
    return Audio(files, dict(sorted(unusable.items())))


def count_suffixes(names: Iterable[str]) -> str:
    """As "9 .m4a, 2 .txt"."""
    suffixes = [_suffix(name) or "without suffix" for name in names]
    return ", ".join(f"{suffixes.count(suffix)} {suffix}" for suffix in sorted(set(suffixes)))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _begins_like_audio(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as handle:
            return handle.read(4).startswith(_AUDIO_BEGINNINGS)
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _is_own_output(folder: Path, names: set[str]) -> bool:
    """Whether a preparation has written a folder: a corpus, or OUT.partial."""
    if folder.name.endswith(".partial") and "lock" in names:
        return True
    try:
        with (folder / "corpus.json").open("rb") as handle:
            return FORMAT.encode() in handle.read(100)
    except OSError:  # there is none, as a rule
        return False


def _with_same_names(paths: dict[str, Path]) -> dict[str, Path]:
    """By names in NFC, sorted; where two files differ in that alone, the other one keeps its own name."""
    named: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (same_name(path) != path, path)):
        named[path if same_name(path) in named else same_name(path)] = paths[path]
    return dict(sorted(named.items()))
