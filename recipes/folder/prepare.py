"""Your own recordings: any nested folder of audio files that libsndfile reads, or a manifest of lhotse.

Splits by explicit lists or manifests, or by a hash of a group key, so that what belongs together (takes of one text,
chapters of one book) never straddles splits. Where there are fewer folders than splits, each file is a group; where
there are fewer files than splits, each file is cut.
"""

import argparse
import os
import re
import shlex
from pathlib import Path

from ct_audio.common.errors import UserError
from ct_audio.common.text import printable, read_text
from ct_audio.data.audio_files import AUDIO_SUFFIXES
from ct_audio.data.av_files import AV_SUFFIXES, INSTALL, has_av
from ct_audio.preparation.listing import count_suffixes, find_audio, same_name, warn
from ct_audio.preparation.manifests import read_manifest
from ct_audio.preparation.recordings import Recording, split_by_hash, split_groups

_MANIFESTS = ("--valid-manifest", "--test-manifest")
USELESS_WITH = {
    "--group": ("--group-regex", *_MANIFESTS),
    "--group-regex": _MANIFESTS,
    "--valid-percent": ("--valid-list", "--test-list", *_MANIFESTS),
    "--test-percent": ("--valid-list", "--test-list", *_MANIFESTS),
    "--valid-list": _MANIFESTS,
    "--test-list": _MANIFESTS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""
    parser.add_argument(
        "--group",
        choices=("folder", "file"),
        default="folder",
        help="what stays together in one split: all files of a folder (not of its subfolders; where there are fewer "
        "folders than splits, as if it were file), or each file for itself",
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
    parser.add_argument(
        "--manifest",
        type=Path,
        default=None,
        help="recordings or cuts of lhotse (.jsonl or .jsonl.gz): they are taken, and nothing is searched; paths in it "
        "begin at the source",
    )
    parser.add_argument(
        "--valid-manifest", type=Path, default=None, help="the validation split; --manifest is the training split then"
    )
    parser.add_argument("--test-manifest", type=Path, default=None, help="the test split, likewise")


def list_recordings(source: Path, options: argparse.Namespace) -> list[Recording]:
    """Every audio file below `source`, named by its path; hidden files and folders are left out.

    What looks like audio and cannot be used (other formats, locked folders, FIFOs, ...) is listed too, in train: it is
    dropped by name.

    Raises:
        UserError: there is no audio file, or an option does not fit the files.
    """
    if options.manifest is not None:
        return _recordings_of_manifests(source, options)
    if options.valid_manifest is not None or options.test_manifest is not None:
        raise UserError("--valid-manifest and --test-manifest go with --manifest, that of the training split")
    files, unusable = find_audio(source)
    if not files:
        found = f" (there are {count_suffixes(unusable)}: {_advice(unusable)})" if unusable else ""
        suffixes = ", ".join(sorted(AUDIO_SUFFIXES))
        raise UserError(f"{source.absolute()}: found no audio file; expected one of {suffixes}{found}")
    left_out = [Recording(path, "train", printable(name), reason=why) for name, (path, why) in unusable.items()]
    splits = _splits(list(files), options)
    if splits is None:
        return left_out + _cut_in_time(files, _shares(options))
    return left_out + [Recording(path, splits[name], printable(name)) for name, path in files.items()]


def _splits(names: list[str], options: argparse.Namespace) -> dict[str, str] | None:
    """The split of each file; None where there are fewer files than splits."""
    has_lists = options.valid_list is not None or options.test_list is not None
    shares = _shares_of_lists(options) if has_lists else _shares(options)
    groups = _groups(names, len(shares), options)
    if has_lists:
        return _splits_from_lists(groups, options)
    if len(set(groups.values())) < len(shares):
        return None
    return split_groups(groups, valid_percent=shares.get("valid", 0.0), test_percent=shares.get("test", 0.0))


def _recordings_of_manifests(source: Path, options: argparse.Namespace) -> list[Recording]:
    """What the manifests name; without one for each split, their files are split as those of a folder are."""
    of_split = {"train": options.manifest, "valid": options.valid_manifest, "test": options.test_manifest}
    cuts = {split: read_manifest(file, source) for split, file in of_split.items() if file is not None}
    if len(cuts) == 1:
        names = {cut.path: same_name(os.path.relpath(cut.path, source)) for cut in cuts["train"] if cut.reason is None}
        splits = _splits(sorted(set(names.values())), options) if names else {}
        if splits is None:
            raise UserError(
                f"{options.manifest}: its cuts are of {len(names)} files, fewer than the splits; name the others' "
                "manifests: -- --manifest TRAIN --valid-manifest VALID --test-manifest TEST"
            )
        cuts = {
            split: [cut for cut in cuts["train"] if splits.get(names.get(cut.path, ""), "train") == split]
            for split in ("train", "valid", "test")
        }
    return [
        Recording(cut.path, split, printable(cut.name), seconds=cut.seconds, reason=cut.reason)
        for split, found in cuts.items()
        for cut in found
    ]


def _advice(unusable: dict[str, tuple[Path, str | None]]) -> str:
    """What makes files readable that are audio and are not read."""
    needs_av = any(Path(name).suffix.lower() in AV_SUFFIXES for name in unusable) and not has_av()
    return f"run: {INSTALL}" if needs_av else "convert them first"


def _shares(options: argparse.Namespace) -> dict[str, float]:
    """Percent of each split that is wanted, in the order of time."""
    valid, test = options.valid_percent, options.test_percent
    split_by_hash("", valid_percent=valid, test_percent=test)  # it checks them
    return {split: share for split, share in (("train", 100 - valid - test), ("valid", valid), ("test", test)) if share}


def _shares_of_lists(options: argparse.Namespace) -> dict[str, float]:
    return {"train": 100.0} | {
        split: 0.0 for split in ("valid", "test") if getattr(options, f"{split}_list") is not None
    }


def _groups(names: list[str], num_splits: int, options: argparse.Namespace) -> dict[str, str]:
    """The group of each file; each file is one where there would be fewer groups than splits."""
    groups = {name: _group_of(name, options) for name in names}
    num_groups = len(set(groups.values()))
    if num_groups >= num_splits or (options.group == "file" and options.group_regex is None):
        return groups
    if options.group_regex is not None:
        raise UserError(
            f"--group-regex {options.group_regex!r} makes {num_groups} groups of {len(names)} files, fewer than the "
            f"{num_splits} splits; use one that finds more different texts, or leave it out"
        )
    if len(names) >= num_splits:
        warn(f"fewer folders ({num_groups}) than splits ({num_splits}): each file is a group, as with -- --group file")
    return {name: same_name(name) for name in names}


def _cut_in_time(files: dict[str, Path], shares: dict[str, float]) -> list[Recording]:
    """Parts of each file, one a split, where there are fewer files than splits."""
    warn(
        f"fewer files ({len(files)}) than splits ({len(shares)}): each file is cut in time, into "
        f"{', '.join(f'{share:g}% {split}' for split, share in shares.items())}"
    )
    recordings, begin = [], 0.0
    for split, share in shares.items():
        end = begin + share
        part = (begin / 100, min(1.0, end / 100))
        recordings += [
            Recording(path, split, f"{printable(name)} [{begin:g}% to {end:g}%]", part) for name, path in files.items()
        ]
        begin = end
    return recordings


def _group_of(path: str, options: argparse.Namespace) -> str:
    if options.group_regex is None:
        return same_name(path if options.group == "file" else path.rpartition("/")[0])
    try:
        match = re.search(options.group_regex, path)
    except re.error as error:
        raise UserError(f"--group-regex {options.group_regex!r}: not a regular expression: {error}") from error
    if match is None:
        raise UserError(f"--group-regex {options.group_regex!r} finds nothing in {path!r}; it must fit every file")
    return "/".join(group or "" for group in match.groups()) if match.groups() else match.group()


def _splits_from_lists(groups: dict[str, str], options: argparse.Namespace) -> dict[str, str]:
    lists = {"valid": options.valid_list, "test": options.test_list}
    wanted: dict[str, str] = {}
    for split, file in lists.items():
        for line in _read_list(file):
            if wanted.setdefault(line, split) != split:
                raise UserError(f"{line!r} stands in the lists of two splits; a group belongs to one")
    folders = {path: same_name(path.rpartition("/")[0]) for path in groups}
    unknown = sorted(wanted.keys() - groups.keys() - set(groups.values()) - set(folders.values()))
    if unknown:
        raise UserError(
            f"the lists name {len(unknown)} groups or files that do not exist, as {unknown[0]!r}; expected names as "
            f"{next(iter(groups))!r}"
        )
    splits = {
        path: wanted.get(path, wanted.get(group, wanted.get(folders[path], "train"))) for path, group in groups.items()
    }
    of_group: dict[str, str] = {}
    for path, group in groups.items():
        if of_group.setdefault(group, splits[path]) != splits[path]:
            given = " ".join(f"--{split}-list {shlex.quote(str(file))}" for split, file in lists.items() if file)
            raise UserError(
                f"the lists tear group {group!r} apart ({path!r}); list the whole group, or let each file be a group "
                f"for itself: -- --group file {given}"
            )
    for split in _shares_of_lists(options):
        if split not in splits.values():
            raise UserError(f"the lists leave no file for split {split}; expected at least one for each split")
    return splits


def _read_list(file: Path | None) -> list[str]:
    lines = read_text(file).split("\n") if file is not None else []
    return [same_name(line.strip()) for line in lines if line.strip()]
