"""Codecs: mu-law against torchaudio, round trips, start codes, refusal of what does not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ct_audio.common.errors import UserError
from ct_audio.data import codecs
from ct_audio.data.audio_files import read_wav, write_wav
from ct_audio.data.codecs import CODECS, Byte, Codec, MuLaw, codec_from_json, write_codec_files
from ct_audio.data.vocabulary_codecs import Subword, Word

ALL_CODES = np.arange(256, dtype=np.uint8)
SAMPLES = hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(-1, 1, width=32))


def test_every_code_survives_decoding_and_encoding():
    assert np.array_equal(MuLaw().encode(MuLaw().decode(ALL_CODES)), ALL_CODES)


def test_every_code_survives_a_pcm16_wav(tmp_path):
    write_wav(tmp_path / "all.wav", MuLaw().decode(ALL_CODES), 24_000)
    waveform, rate = read_wav(tmp_path / "all.wav")
    assert rate == 24_000
    assert np.array_equal(MuLaw().encode(waveform), ALL_CODES)


def test_silence_and_full_scale():
    assert MuLaw().encode(np.zeros(5, np.float32)).tolist() == [128] * 5
    assert MuLaw().start_code == 128
    assert MuLaw().encode(np.array([-1.0, 1.0], np.float32)).tolist() == [0, 255]


@given(SAMPLES)
def test_mu_law_is_torchaudios_in_float32(waveform):
    tensor = torch.from_numpy(waveform)
    expected = torchaudio.functional.mu_law_encoding(tensor, 256).numpy()
    codes = MuLaw().encode(waveform)
    assert codes.dtype == np.uint8
    assert np.array_equal(codes, expected)
    decoded = MuLaw().decode(codes)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, torchaudio.functional.mu_law_decoding(torch.from_numpy(expected), 256).numpy())


def test_the_table_of_mu_law_is_torchaudios_around_every_boundary():
    """The 64 float32 below and above the lowest one of each code; computed at once, and one by one as torch does it at
    the end of a vector. Ordered as whole numbers, float32 of one sign are in the order of their values."""
    table = np.loadtxt(Path(codecs.__file__).with_name("mu_law.csv"), np.float32, delimiter=",", skiprows=1)
    assert table[:, 0].tolist() == list(range(256))
    lowest = table[1:, 1]
    for distance in range(-64, 65):
        shifted = (np.abs(lowest).view(np.int32) + distance * np.where(lowest < 0, -1, 1)).astype(np.int32)
        waveform = np.copysign(shifted.view(np.float32), lowest)
        expected = torchaudio.functional.mu_law_encoding(torch.from_numpy(waveform), 256)
        assert np.array_equal(expected, np.arange(255) + (distance >= 0))
        assert np.array_equal(MuLaw().encode(waveform), expected)
        if distance in (-1, 0):
            one_by_one = [
                torchaudio.functional.mu_law_encoding(torch.tensor([value]), 256).item() for value in waveform
            ]
            assert one_by_one == expected.tolist()
    every = torchaudio.functional.mu_law_decoding(torch.arange(256), 256).numpy()
    assert np.array_equal(MuLaw().decode(ALL_CODES), every)
    grid = np.random.default_rng(0).uniform(-1, 1, 1_000_000).astype(np.float32)
    assert np.array_equal(MuLaw().encode(grid), torchaudio.functional.mu_law_encoding(torch.from_numpy(grid), 256))


def test_mu_law_follows_its_formula():
    """An oracle in float64; codes may differ only where float32 lands on the other side of a boundary."""
    waveform = np.linspace(-1, 1, 20_001)
    place = (np.sign(waveform) * np.log1p(255 * np.abs(waveform)) / np.log(256) + 1) / 2 * 255 + 0.5
    inside = np.abs(place - np.round(place)) > 1e-3
    assert inside.mean() > 0.99
    assert np.array_equal(MuLaw().encode(waveform.astype(np.float32))[inside], np.floor(place)[inside].astype(np.uint8))


@given(SAMPLES)
def test_mu_law_error_is_at_most_half_a_step(waveform):
    levels = MuLaw().decode(ALL_CODES).astype(np.float64)
    codes = MuLaw().encode(waveform)
    bounds = np.concatenate([[0.0], np.diff(levels)]), np.concatenate([np.diff(levels), [0.0]])
    step = np.maximum(*bounds)[codes]
    assert (np.abs(levels[codes] - waveform) <= step * 0.52 + 1e-6).all()


def test_beyond_full_scale_is_clipped():
    assert MuLaw().encode(np.array([-7.0, 1.0001, 3e38], np.float32)).tolist() == [0, 255, 255]


def test_float64_is_encoded_in_float32():
    waveform = np.random.default_rng(0).uniform(-1, 1, 1000)
    assert np.array_equal(MuLaw().encode(waveform), MuLaw().encode(waveform.astype(np.float32)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_samples_are_refused(bad):
    with pytest.raises(UserError, match="finite"):
        MuLaw().encode(np.array([0.0, bad], np.float32))


@pytest.mark.parametrize("codec", [MuLaw(), Byte()])
def test_codes_out_of_range_are_refused(codec):
    for bad in (np.array([256]), np.array([-1])):
        with pytest.raises(UserError, match=r"0\.\.255"):
            codec.decode(bad)


@given(st.binary(max_size=50))
def test_bytes_round_trip(raw):
    assert Byte().decode(Byte().encode(raw)) == raw


def test_text_is_encoded_as_utf8():
    assert Byte().encode("é\n").tolist() == [0xC3, 0xA9, 10]
    assert Byte().start_code == 10
    assert Byte().sample_rate_hz is None


EXAMPLES: dict[str, Codec] = {
    "mu_law": MuLaw(),
    "byte": Byte(),
    "word": Word(("the", "<eos>", "cat", "<unk>")),
    "subword": Subword.train([b"the cat\nthe hat\n"], 260),
}


@pytest.mark.parametrize("name", sorted(CODECS))
def test_every_codec_keeps_the_contract(name, tmp_path):
    codec = EXAMPLES[name]
    assert isinstance(codec, Codec)
    assert codec.name == name
    assert 0 <= codec.start_code < codec.vocab_size
    write_codec_files(codec, tmp_path)
    assert sorted(codec.files()) == [file.name for file in tmp_path.iterdir()]
    assert codec_from_json(codec.to_json(), tmp_path) == codec


@pytest.mark.parametrize(
    "description",
    [None, [], {}, {"name": "a_law"}, {"name": "mu_law", "rate": 1}, {"name": "mu_law", "sample_rate_hz": -1}]
    + [{"name": "mu_law", "sample_rate_hz": value} for value in (True, "24000", None)]
    + [{"name": "word"}, {"name": "byte", "vocabulary": "vocabulary.json"}],
)
def test_wrong_descriptions_are_refused(description):
    with pytest.raises(UserError, match="codec"):
        codec_from_json(description)
