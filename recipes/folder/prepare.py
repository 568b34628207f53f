"""Your own recordings: any nested folder of audio files that libsndfile reads.

Splits by explicit lists, or by a hash of a group key, so that what belongs together (takes of one text, chapters of one
book) never straddles splits.
"""

import argparse
import os
import re
from collections import Counter
from pathlib import Path

from ct_audio.common.errors import UserError
from ct_audio.common.text import printable
from ct_audio.data.audio_files import AUDIO_SUFFIXES
from ct_audio.preparation.recordings import Recording, split_by_hash

USELESS_WITH = {
    "--group": ("--group-regex",),
    "--valid-percent": ("--valid-list", "--test-list"),
    "--test-percent": ("--valid-list", "--test-list"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""
    parser.add_argument(
        "--group",
        choices=("folder", "file"),
        default="folder",
        help="what stays together in one split: all files of a folder (not of its subfolders), or each file for itself",
    )
    parser.add_argument(
        "--group-regex",
        default=None,
        help="instead: the key is what this regular expression finds in the path below the source (its groups joined, "
        "if it has any), as '^(.*)_take[0-9]+' to keep takes together",
    )
    parser.add_argument("--valid-percent", type=float, default=5.0, help="share of the groups for validation")
    parser.add_argument("--test-percent", type=float, default=5.0, help="share of the groups for the test")
    parser.add_argument(
        "--valid-list", type=Path, default=None, help="file of group keys or paths, one a line; then nothing is hashed"
    )
    parser.add_argument("--test-list", type=Path, default=None, help="likewise for the test split")


def list_recordings(source: Path, options: argparse.Namespace) -> list[Recording]:
    """Every audio file below `source`, named by its path; hidden files and folders are left out.

    What cannot be used (locked folders, links to folders, FIFOs, ...) is listed too: it is dropped by name.

    Raises:
        UserError: there is no audio file, an option does not fit the files, or a split stays empty.
    """
    paths, unusable = _find_audio(source)
    if not paths:
        raise UserError(f"{source}: found no audio file; expected one of {', '.join(sorted(AUDIO_SUFFIXES))}")
    groups = {path: _group_of(path, options) for path in paths}
    if options.valid_list or options.test_list:
        splits = _splits_from_lists(groups, {"valid": options.valid_list, "test": options.test_list})
    else:
        splits = _splits_from_hash(groups, options.valid_percent, options.test_percent)
    recordings = [Recording(file, splits[path], printable(path)) for path, file in paths.items()]
    return recordings + [Recording(file, "train", printable(path)) for path, file in unusable.items()]


def _find_audio(source: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Paths below `source`, with "/" between folders: what is named like audio; and what nobody can look into.

    The latter are locked folders and links to folders (they may lead in circles): listed, so that the report names
    them. A folder that is named like audio stands for what is in it, and for itself if that is nothing.
    """
    found, unusable, named_folders, todo = {}, {}, {}, [("", source)]
    while todo:
        prefix, folder = todo.pop()
        try:
            entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        except OSError as error:
            if not prefix:
                raise UserError(f"cannot read the folder {source}: {error.strerror}") from error
            unusable[prefix[:-1]] = folder
            continue
        for entry in entries:
            path, file = prefix + entry.name, folder / entry.name
            is_audio = file.suffix.lower() in AUDIO_SUFFIXES
            if entry.is_dir(follow_symlinks=False):
                todo.append((f"{path}/", file))
                named_folders |= {path: file} if is_audio else {}
            elif is_audio:
                found[path] = file
            elif os.path.isdir(file):
                unusable[path] = file
    unusable |= {
        path: file
        for path, file in named_folders.items()
        if not any(other.startswith(f"{path}/") for other in (*found, *unusable))
    }
    return dict(sorted(found.items())), dict(sorted(unusable.items()))


def _group_of(path: str, options: argparse.Namespace) -> str:
    if options.group_regex is None:
        return path if options.group == "file" else path.rpartition("/")[0]
    try:
        match = re.search(options.group_regex, path)
    except re.error as error:
        raise UserError(f"--group-regex {options.group_regex!r}: not a regular expression: {error}") from error
    if match is None:
        raise UserError(f"--group-regex {options.group_regex!r} finds nothing in {path!r}; it must fit every file")
    return "/".join(group or "" for group in match.groups()) if match.groups() else match.group()


def _splits_from_lists(groups: dict[str, str], lists: dict[str, Path | None]) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for split, file in lists.items():
        for line in _read_list(file):
            if wanted.setdefault(line, split) != split:
                raise UserError(f"{line!r} stands in the lists of two splits; a group belongs to one")
    unknown = sorted(wanted.keys() - groups.keys() - set(groups.values()))
    if unknown:
        raise UserError(f"the lists name {len(unknown)} groups or files that do not exist, as {unknown[0]!r}")
    splits = {path: wanted.get(path, wanted.get(group, "train")) for path, group in groups.items()}
    of_group: dict[str, str] = {}
    for path, group in groups.items():
        if of_group.setdefault(group, splits[path]) != splits[path]:
            raise UserError(
                f"the lists tear group {group!r} apart ({path!r}); list the whole group, or use --group file"
            )
    return splits


def _read_list(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {file}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _splits_from_hash(groups: dict[str, str], valid_percent: float, test_percent: float) -> dict[str, str]:
    of_group = {
        group: split_by_hash(group, valid_percent=valid_percent, test_percent=test_percent)
        for group in sorted(set(groups.values()))
    }
    counts = Counter(of_group.values())
    for split, percent in (("train", 1), ("valid", valid_percent), ("test", test_percent)):
        if percent > 0 and not counts[split]:
            raise UserError(
                f"no group falls into split {split}: the {len(groups)} files make {len(of_group)} groups; "
                "use smaller groups (--group file or --group-regex), other percentages, or explicit lists"
            )
    return {path: of_group[group] for path, group in groups.items()}
