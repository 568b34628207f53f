"""Synthetic speech, made here and offline: our own sentences spoken by eSpeak NG in several voices, speeds and pitches.

The recordings are made beside the corpus and kept there; what exists is not made again. The split is by sentence, so
that two takes of one sentence never straddle splits.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ct_audio.common.errors import UserError
from ct_audio.common.progress import Progress
from ct_audio.preparation.recordings import Recording, split_by_hash

MAKES_RECORDINGS = True
"""Tells ct-audio prepare that --source is where the recordings are made, and may be left out."""

SENTENCES = Path(__file__).with_name("sentences.txt")
SYNTHESIZE = Path(__file__).with_name("synthesize.py")
PACKAGE, PACKAGE_VERSION = "espeakng-loader", "0.2.4"
NUM_TAKES = 2
VALID_PERCENT, TEST_PERCENT = 5.0, 5.0

# A language of espeak, or one with a variant of the voice (f: female, m: male).
VOICES = (
    "en-us", "en-gb-scotland+f1", "en", "en-us+f2", "en-gb-x-rp+m2", "en+f3", "en-029", "en-us+m3", "en-gb-x-rp+f5",
    "en-gb-scotland", "en-us+f4", "en+m1", "en-gb-x-gbclan+f2", "en-us-nyc+m5", "en-gb-x-rp", "en+m7", "en-029+m4",
)  # fmt: skip
SPEEDS = (140, 155, 170, 185, 200)  # words a minute
PITCHES = (35, 45, 50, 55, 65)  # of 0..99


@dataclass(frozen=True)
class Utterance:
    """One recording to be made; `name` tells all the rest."""

    name: str
    text: str
    voice: str
    speed: int
    pitch: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""
    parser.add_argument("--num-sentences", type=int, default=0, help="only the first so many sentences; 0: all")
    parser.set_defaults(synthesizer=f"{PACKAGE} {PACKAGE_VERSION}")  # for corpus.json


def list_recordings(source: Path, options: argparse.Namespace) -> list[Recording]:
    """Every utterance as a recording in `source`; those that are missing there are made.

    Raises:
        UserError: the synthesizer is missing or fails, or a split stays empty.
    """
    sentences = read_sentences()
    if not 0 <= options.num_sentences <= len(sentences):
        raise UserError(f"--num-sentences: expected 0 (all) to {len(sentences)}, got {options.num_sentences}")
    utterances = plan(sentences[: options.num_sentences or None])
    splits = [
        split_by_hash(utterance.text, valid_percent=VALID_PERCENT, test_percent=TEST_PERCENT)
        for utterance in utterances
    ]
    empty = sorted({"train", "valid", "test"} - set(splits))
    if empty:
        raise UserError(f"no sentence falls into split {empty[0]}; use more than {options.num_sentences} sentences")
    make_recordings(utterances, source)
    return [
        Recording(source / f"{utterance.name}.wav", split, utterance.name)
        for utterance, split in zip(utterances, splits, strict=True)
    ]


def read_sentences() -> list[str]:
    """The sentences of this recipe, in the order of their file."""
    lines = (line.strip() for line in SENTENCES.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def plan(sentences: list[str]) -> list[Utterance]:
    """Voices, speeds and pitches follow from a sentence's own text; its takes have different voices.

    Names begin with a hash of the sentence: the corpus, which is in the order of names, mixes subjects and voices.
    """
    utterances = []
    for sentence in sentences:
        digest = hashlib.sha256(sentence.encode()).digest()
        for take in range(NUM_TAKES):
            voice = VOICES[(int.from_bytes(digest[:4], "big") + take * len(VOICES) // NUM_TAKES) % len(VOICES)]
            speed = SPEEDS[digest[4 + 2 * take] % len(SPEEDS)]
            pitch = PITCHES[digest[5 + 2 * take] % len(PITCHES)]
            name = f"{digest.hex()[:10]}_{voice}_{speed}_{pitch}"
            utterances.append(Utterance(name, sentence, voice, speed, pitch))
    return utterances


def make_recordings(utterances: list[Utterance], directory: Path) -> None:
    """Synthesize what is not in `directory` yet; an interrupted synthesis goes on."""
    todo = [utterance for utterance in utterances if not (directory / f"{utterance.name}.wav").is_file()]
    if not todo:
        return
    require_synthesizer()
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(SYNTHESIZE), str(directory)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8") as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        try:
            with process.stdin as lines:
                lines.write("".join(json.dumps(asdict(utterance)) + "\n" for utterance in todo))
            initial, total = len(utterances) - len(todo), len(utterances)
            bar = Progress(process.stdout, initial=initial, total=total, unit="file", desc="speak")
            num_made = sum(1 for _ in bar)
            message = process.stderr.read()
        finally:
            process.kill()
    if num_made < len(todo):
        raise UserError(f"the synthesizer stopped after {num_made} of {len(todo)} recordings: {message.strip()[-500:]}")


def require_synthesizer() -> None:
    """Raise `UserError` unless the pinned version is installed: another one would speak otherwise."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        found = "none"
    if found != PACKAGE_VERSION:
        raise UserError(
            f"expected {PACKAGE} {PACKAGE_VERSION}, which carries the synthesizer, but found {found}; "
            f"run: python -m pip install {PACKAGE}=={PACKAGE_VERSION}"
        )
