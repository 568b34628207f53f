"""Speak sentences with libespeak-ng, each into a wav of its own: `python synthesize.py DIR < utterances.jsonl`.

A line of input is {"name", "text", "voice", "speed", "pitch"}; the name is printed when DIR/NAME.wav is complete.

espeak keeps state between utterances (flutter, wave phase) that not even its own re-initialisation resets, and seeds
the noise of breathy voices from the clock. So each utterance is spoken by a fork of a process that has never spoken,
with a seed from its name: its samples depend on nothing else. For that this is a program of its own, with one thread
and few imports.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import wave
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

SAMPLE_RATE_HZ = 22_050
LONGEST_DATA_PATH = 120  # the library cuts paths off at 160 bytes, file names included, without an error

# Values of espeak-ng's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS, INITIALIZE_DONT_EXIT = 2, 0x8000
PARAMETER_RATE, PARAMETER_PITCH = 1, 3
POSITION_CHARACTER, CHARS_UTF8 = 1, 1

SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def main() -> int:
    """Speak what stands on standard input, one utterance after another."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for whoever started this; end without a traceback
    directory = Path(sys.argv[1])
    utterances = [json.loads(line) for line in sys.stdin]
    with open_espeak() as espeak:
        for utterance in utterances:
            status = in_a_fork(lambda u=utterance: write(directory / f"{u['name']}.wav", speak(espeak, u)))
            if status:
                print(f"espeak failed with status {status} at {utterance}", file=sys.stderr)
                return 1
            print(utterance["name"], flush=True)
    return 0


@contextlib.contextmanager
def open_espeak() -> Iterator[ctypes.CDLL]:
    """The library, initialised to give samples to a callback."""
    import espeakng_loader

    data = espeakng_loader.get_data_path()
    with tempfile.TemporaryDirectory() as short:
        if len(os.fsencode(data)) > LONGEST_DATA_PATH:
            link = Path(short, "espeak-ng-data")
            link.symlink_to(data)
            data = str(link)
        espeak = ctypes.CDLL(espeakng_loader.get_library_path())
        rate = espeak.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(data), INITIALIZE_DONT_EXIT)
        if rate != SAMPLE_RATE_HZ:
            raise RuntimeError(f"espeak_Initialize: expected {SAMPLE_RATE_HZ} Hz, got {rate}; its data is at {data}")
        yield espeak


def speak(espeak: ctypes.CDLL, utterance: dict) -> bytes:
    """16-bit mono samples; to be called once in the life of a process."""
    blocks: list[bytes] = []

    def collect(samples: "ctypes._Pointer[ctypes.c_short]", num_samples: int, _events: int) -> int:
        if samples and num_samples > 0:
            blocks.append(ctypes.string_at(samples, 2 * num_samples))
        return 0  # go on

    callback = SynthCallback(collect)  # held here: the library keeps only its address
    espeak.espeak_SetSynthCallback(callback)
    text = utterance["text"].encode()
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(zlib.crc32(utterance["name"].encode())))
    calls = {
        "voice": espeak.espeak_SetVoiceByName(utterance["voice"].encode()),
        "speed": espeak.espeak_SetParameter(PARAMETER_RATE, utterance["speed"], 0),
        "pitch": espeak.espeak_SetParameter(PARAMETER_PITCH, utterance["pitch"], 0),
        "text": espeak.espeak_Synth(text, len(text) + 1, 0, POSITION_CHARACTER, 0, CHARS_UTF8, None, None),
        "end": espeak.espeak_Synchronize(),
    }
    failed = {call: status for call, status in calls.items() if status}
    if failed or not blocks:
        raise RuntimeError(f"espeak gave {len(blocks)} blocks of samples; calls that failed: {failed}")
    return b"".join(blocks)


def write(path: Path, samples: bytes) -> None:
    """Beside, to the disk, renamed: a wav under its own name is whole."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as handle:
        with wave.open(handle, "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
            file.writeframes(samples)
        handle.flush()
        os.fsync(handle.fileno())
    beside.replace(path)


def in_a_fork(action: Callable[[], None]) -> int:
    """Run `action` in a fork of this process; returns 0, or how the fork ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        action()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
