"""Audio files: formats, channels, damage, resampling, atomic writing."""

import itertools

import numpy as np
import pytest
import soundfile
import soxr
from hostile_audio import encoded, mp3, patched
from hypothesis import given
from hypothesis import strategies as st

from ct_audio.common.errors import UserError
from ct_audio.data.audio_files import CheckedRecording, read_wav, require_finite, resample, write_wav
from ct_audio.data.audio_parts import Part, PartFile

LOSSLESS = [
    ("wav", "PCM_U8", 2**-7),
    ("wav", "PCM_16", 2**-15),
    ("wav", "PCM_24", 2**-23),
    ("wav", "PCM_32", 2**-23),
    ("wav", "FLOAT", 0.0),
    ("wav", "DOUBLE", 0.0),
    ("flac", "PCM_16", 2**-15),
    ("flac", "PCM_24", 2**-23),
    ("aiff", "PCM_16", 2**-15),
    ("w64", "PCM_16", 2**-15),
    ("caf", "PCM_16", 2**-15),
]
CUTTABLE = [("wav", "PCM_16"), ("flac", "PCM_16"), ("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", "MPEG_LAYER_III")]
CUTTABLE += [("aiff", "PCM_16"), ("caf", "PCM_16"), ("au", "PCM_16"), ("w64", "PCM_16"), ("rf64", "PCM_16")]


def sines(num_channels: int = 1, seconds: float = 1.0, rate: int = 24_000) -> np.ndarray:
    """[N, C], each channel its own tone."""
    time = np.arange(int(seconds * rate)) / rate
    return np.stack([0.3 * np.sin(2 * np.pi * 220 * (c + 1) * time) for c in range(num_channels)], 1).astype(np.float32)


def resampled(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """A waveform of one block."""
    return np.concatenate(list(resample([waveform], from_hz, to_hz)))


@pytest.mark.parametrize(("suffix", "subtype", "step"), LOSSLESS)
@pytest.mark.parametrize("num_channels", [1, 2, 5])
def test_lossless_formats_give_the_channel_mean(tmp_path, suffix, subtype, step, num_channels):
    channels = sines(num_channels)
    soundfile.write(tmp_path / f"a.{suffix}", channels, 22_050, subtype=subtype)
    waveform, rate = read_wav(tmp_path / f"a.{suffix}")
    assert rate == 22_050
    assert waveform.dtype == np.float32
    assert np.abs(waveform - channels.mean(1)).max() <= step + 1e-6


@pytest.mark.parametrize(("suffix", "subtype"), [("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", "MPEG_LAYER_III")])
def test_lossy_formats_keep_length_and_level(tmp_path, suffix, subtype):
    channels = sines(2)
    soundfile.write(tmp_path / f"a.{suffix}", channels, 24_000, subtype=subtype)
    waveform, rate = read_wav(tmp_path / f"a.{suffix}")
    assert rate == 24_000
    assert abs(len(waveform) - len(channels)) <= 1200
    assert np.sqrt(np.mean(waveform**2)) == pytest.approx(np.sqrt(np.mean(channels.mean(1) ** 2)), rel=0.1)


def test_long_files_are_read_in_blocks_without_seams(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2**18 * 2 + 77, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 48_000, subtype="FLOAT")
    waveform, _ = read_wav(tmp_path / "a.wav")
    assert np.array_equal(waveform, (noise[:, 0] + noise[:, 1]) / np.float32(2))


@pytest.mark.parametrize(("suffix", "subtype"), CUTTABLE)
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_cut_files_are_noticed(tmp_path, suffix, subtype, share):
    file = tmp_path / f"a.{suffix}"
    soundfile.write(file, sines(seconds=2.0), 24_000, format=suffix.upper(), subtype=subtype)
    assert len(read_wav(file)[0]) >= 47_000
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(UserError, match="cannot read") as caught:
        read_wav(file)
    assert str(file) in str(caught.value)


def test_wav_from_a_pipe_has_no_known_length(tmp_path):
    file = tmp_path / "a.wav"
    soundfile.write(file, sines(), 24_000, subtype="PCM_16")
    raw = bytearray(file.read_bytes())
    raw[4:8] = raw[40:44] = b"\xff\xff\xff\xff"
    file.write_bytes(raw)
    assert len(read_wav(file)[0]) == 24_000


@pytest.mark.parametrize(("suffix", "subtype"), CUTTABLE)
@pytest.mark.parametrize("num_parts", [2, 5])
def test_joined_files_hold_what_their_parts_hold(tmp_path, suffix, subtype, num_parts):
    raw, waveforms = b"", []
    for part in range(num_parts):
        file = tmp_path / f"{part}.{suffix}"
        channels = sines(1 + part % 2, seconds=0.5 + 0.1 * part)
        soundfile.write(file, channels, 24_000, format=suffix.upper(), subtype=subtype)
        raw += file.read_bytes()
        waveforms.append(read_wav(file)[0])
    (tmp_path / "joined").write_bytes(raw)
    joined, rate = read_wav(tmp_path / "joined")
    assert rate == 24_000
    assert np.array_equal(joined, np.concatenate(waveforms))


def test_joined_files_of_any_two_formats(tmp_path):
    """Except what follows flac and begins with no mark that is unmistakable: its end is known to its decoder only."""
    for (first, first_type), (second, second_type) in itertools.product(CUTTABLE, CUTTABLE):
        if (first, second) in [("flac", "mp3"), ("flac", "au")]:
            continue
        raw = encoded(sines(seconds=0.3), *(first.upper(), first_type))
        raw += encoded(sines(seconds=0.2), *(second.upper(), second_type))
        (tmp_path / "joined").write_bytes(raw)
        assert len(read_wav(tmp_path / "joined")[0]) == pytest.approx(12_000, abs=24), (first, second)


@pytest.mark.parametrize("loud_first", [True, False])
@pytest.mark.parametrize("rate", [24_000, 44_100])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_mp3_without_a_count_of_frames_is_read_to_its_end(tmp_path, loud_first, rate, mode):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 8 * rate).astype(np.float32)
    noise *= np.repeat(np.array([1.0, 1e-3] if loud_first else [1e-3, 1.0], np.float32), 4 * rate)
    for counted in (True, False):
        (tmp_path / f"{counted}.mp3").write_bytes(mp3(noise, rate, mode=mode, counted=counted))
    expected, found = (read_wav(tmp_path / f"{counted}.mp3")[0] for counted in (True, False))
    assert len(expected) == len(noise)
    delay = 576  # of the encoder; the count's frame states it, so it is cut off there
    assert np.abs(found[delay : delay + len(expected)] - expected).max() < 1e-6


def test_a_long_mp3_has_no_seams(tmp_path):
    """To seek after each block, as soundfile does, changes samples by up to 0.14."""
    noise = np.random.default_rng(0).standard_normal(30 * 24_000).astype(np.float32) * np.float32(0.1)
    soundfile.write(tmp_path / "a.mp3", noise, 24_000)
    expected, _ = soundfile.read(tmp_path / "a.mp3", dtype="float32")
    assert np.abs(read_wav(tmp_path / "a.mp3")[0] - expected).max() < 1e-6


@pytest.mark.parametrize("length", [0, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize(
    ("suffix", "mark", "distance"), [("wav", b"data", 4), ("aiff", b"SSND", 4), ("au", b".snd", 8)]
)
def test_a_header_that_does_not_know_its_length_loses_nothing(tmp_path, suffix, mark, distance, length):
    soundfile.write(tmp_path / f"a.{suffix}", sines(2), 24_000, subtype="PCM_16")
    expected, raw = read_wav(tmp_path / f"a.{suffix}")[0], (tmp_path / f"a.{suffix}").read_bytes()
    unknown = length.to_bytes(4, "little" if suffix == "wav" else "big")
    (tmp_path / "b").write_bytes(patched(raw, (mark, distance, unknown)))
    assert np.array_equal(read_wav(tmp_path / "b")[0], expected)


def test_wav_over_4_gib_whose_length_has_wrapped_is_refused(tmp_path):
    raw = bytes(patched(encoded(sines(), "WAV"), (40, 0, (480).to_bytes(4, "little"))))
    with (tmp_path / "a.wav").open("wb") as file:
        file.write(raw)
        file.truncate(2**32 + 524)  # zeros, which take no room on the disk
    with pytest.raises(UserError, match=r"a\.wav: damaged: its header counts 524 bytes, 4294967296 more follow"):
        read_wav(tmp_path / "a.wav")


def test_bytes_that_look_like_frames_are_searched_once(tmp_path):
    (tmp_path / "a.mp3").write_bytes(encoded(sines(), "MP3") + b"\xff" * 2**21)
    with pytest.raises(UserError, match=r"a\.mp3: damaged: its header counts \d+ bytes, 2097152 more follow"):
        read_wav(tmp_path / "a.mp3")


def test_an_empty_wav_with_further_chunks_is_empty(tmp_path):
    raw = encoded(np.zeros(0), "WAV") + b"LIST\x04\0\0\0INFO"
    (tmp_path / "a.wav").write_bytes(raw)
    assert read_wav(tmp_path / "a.wav")[0].shape == (0,)


def test_errors_of_the_disk_reach_the_reader(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    with (tmp_path / "a").open("rb") as handle:
        file = PartFile(handle, Part(1, 4, b"head"))
        assert file.read() == b"head234"
        assert (file.seek(2), file.read(3), file.seek(-1, 2), file.read(9)) == (
            2,
            b"ad",
            6,
            b"4",
        )  # a raw file may give less
    with (tmp_path / "b").open("wb") as handle:
        file = PartFile(handle, Part(0, 9))
        assert file.read(1) == b""
    assert isinstance(file.error, OSError)


def test_a_recording_is_checked_and_can_be_read_twice(tmp_path):
    soundfile.write(tmp_path / "a.wav", sines(2, rate=48_000), 48_000)
    recording = CheckedRecording(tmp_path / "a.wav", 24_000, gain_db=-6.0)
    first, second = (np.concatenate(list(recording.blocks())) for _ in range(2))
    assert np.array_equal(first, second)
    assert (recording.source_rate_hz, recording.num_source_samples, len(first)) == (48_000, 48_000, 24_000)


def test_flipped_bits_in_flac_are_noticed(tmp_path):
    file = tmp_path / "a.flac"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 24_000)
    soundfile.write(file, noise, 24_000)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    file.write_bytes(raw)
    with pytest.raises(UserError, match="cannot read"):
        read_wav(file)


@pytest.mark.parametrize("content", [None, b"", b"no audio at all", b"RIFF\x24\x00\x00\x00WAVE", b"OggS"])
def test_unreadable_files_are_one_error_that_names_them(tmp_path, content):
    file = tmp_path / "a.wav"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*a\.wav"):
        read_wav(file)


def test_a_folder_is_no_audio_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_wav(tmp_path)


def test_an_empty_wav_is_read_as_no_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 24_000)
    assert read_wav(tmp_path / "a.wav")[0].shape == (0,)


@given(st.lists(st.integers(-32768, 32767), max_size=200))
def test_pcm16_round_trip(tmp_path, levels):
    waveform = np.array(levels, np.float32) / np.float32(32768)
    write_wav(tmp_path / "a.wav", waveform, 16_000)
    again, rate = read_wav(tmp_path / "a.wav")
    assert rate == 16_000
    assert np.array_equal(again, waveform)
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"


def test_writing_clips_and_leaves_nothing_beside(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([2.0, -2.0], np.float32), 24_000)
    assert read_wav(tmp_path / "a.wav")[0].tolist() == [32767 / 32768, -1.0]
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]


def test_writing_refuses_nan_and_missing_folders(tmp_path):
    with pytest.raises(UserError, match="1 of 2 samples"):
        write_wav(tmp_path / "a.wav", np.array([0.0, np.nan], np.float32), 24_000)
    with pytest.raises(UserError, match="cannot write"):
        write_wav(tmp_path / "missing" / "a.wav", np.zeros(2, np.float32), 24_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("from_hz", [8000, 16_000, 22_050, 44_100, 48_000, 96_000, 44_099])
def test_resampling_keeps_a_tone_and_the_length(from_hz):
    tone = sines(rate=from_hz)[:, 0]
    result = resampled(tone, from_hz, 24_000)
    assert result.dtype == np.float32
    assert abs(len(result) - 24_000) <= 1
    middle = slice(2400, -2400)
    assert np.abs(result[:24_000][middle] - sines()[: len(result), 0][middle]).max() < 1e-4


def test_resampling_removes_what_lies_above_the_new_band():
    time = np.arange(48_000) / 48_000
    hiss = (0.5 * np.sin(2 * np.pi * 15_000 * time)).astype(np.float32)
    assert np.abs(resampled(hiss, 48_000, 24_000)[1000:-1000]).max() < 1e-4


def test_resampling_to_the_same_rate_is_the_identity():
    tone = sines()[:, 0]
    assert np.array_equal(resampled(tone, 24_000, 24_000), tone)
    assert list(resample([np.zeros(0, np.float32)], 48_000, 24_000)) == []
    with pytest.raises(UserError, match="at least 1 Hz"):
        resampled(tone, 0, 24_000)


@pytest.mark.parametrize("from_hz", [16_000, 44_100, 44_099, 48_000])
def test_resampling_does_not_depend_on_the_blocks(from_hz):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, from_hz * 3 + 77).astype(np.float32)
    in_blocks = resample(np.split(noise, [1, 999, 1000, 70_001]), from_hz, 24_000)
    assert np.array_equal(np.concatenate(list(in_blocks)), soxr.resample(noise, from_hz, 24_000, quality="HQ"))


def test_require_finite_counts():
    require_finite(np.zeros(3, np.float32), "a")
    with pytest.raises(UserError, match="a: 2 of 3 samples"):
        require_finite(np.array([np.inf, np.nan, 0], np.float32), "a")
