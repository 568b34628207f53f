"""recipes/espeak: what it plans, and that what it speaks depends on nothing but the plan."""

import importlib.metadata
import re
import sys
import wave

import espeakng_loader
import numpy as np
from recordings import ROOT, load_script

from ct_audio.commands import prepare as prepare_command
from ct_audio.commands.command_line import run_tool
from ct_audio.data.corpus import open_corpus

espeak = load_script("recipes/espeak/prepare.py", "recipe_espeak")
FEWEST_SENTENCES = 10  # with these no split is empty


def prepare(monkeypatch, out, *options, num_sentences=FEWEST_SENTENCES):
    """Run the tool in this process; returns its exit status."""
    arguments = ["prepare.py", str(ROOT / "recipes/espeak"), "--out", str(out), "--num-processes", "1", *options]
    monkeypatch.setattr(sys, "argv", [*arguments, "--", "--num-sentences", str(num_sentences)])
    return run_tool(prepare_command.main)


def samples(path):
    """[N] int16 of a wav."""
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 22_050)
        return np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)


def test_sentences_and_plan():
    sentences = espeak.read_sentences()
    assert len(sentences) >= 300
    assert len(set(sentences)) == len(sentences)
    utterances = espeak.plan(sentences)
    assert len({utterance.name for utterance in utterances}) == 2 * len(sentences) == len(utterances)
    assert {utterance.voice for utterance in utterances} == set(espeak.VOICES)
    assert {utterance.speed for utterance in utterances} == set(espeak.SPEEDS)
    assert {utterance.pitch for utterance in utterances} == set(espeak.PITCHES)
    for first, second in zip(utterances[::2], utterances[1::2], strict=True):
        assert first.text == second.text
        assert first.voice != second.voice
    assert espeak.plan(sentences[5:9]) == utterances[10:18]  # a sentence's takes are its own matter


def test_every_voice_is_there_and_speaks_the_same_again(tmp_path):
    """An unknown variant would be left out without an error, and state that leaks would depend on what came before."""
    text = "Who left the kettle on?"
    utterances = [espeak.Utterance(f"0_{voice}_170_50", text, voice, 170, 50) for voice in espeak.VOICES]
    espeak.make_recordings(utterances, tmp_path / "one")
    espeak.make_recordings(utterances[::-1], tmp_path / "two")
    spoken = {u.voice: samples(tmp_path / "one" / f"{u.name}.wav") for u in utterances}
    assert len({waveform.tobytes() for waveform in spoken.values()}) == len(espeak.VOICES)
    for utterance in utterances:
        waveform = spoken[utterance.voice]
        assert 0.7 < len(waveform) / 22_050 < 3.0, utterance
        assert 3000 < np.abs(waveform.astype(int)).max() <= 32768, utterance
        assert np.array_equal(waveform, samples(tmp_path / "two" / f"{utterance.name}.wav")), utterance


def test_speed_and_pitch_are_heard(tmp_path):
    text = "Rain drummed on the tin roof."
    utterances = [espeak.Utterance(f"{s}_{p}", text, "en", s, p) for s, p in ((140, 35), (200, 35), (140, 65))]
    espeak.make_recordings(utterances, tmp_path)
    slow, fast, high = (samples(tmp_path / f"{utterance.name}.wav") for utterance in utterances)
    assert len(fast) < 0.85 * len(slow)
    assert abs(len(high) - len(slow)) < 0.1 * len(slow)
    assert not np.array_equal(high[:20_000], slow[:20_000])


def test_the_corpus_is_the_same_again_and_goes_on(tmp_path, monkeypatch, capsys):
    assert prepare(monkeypatch, tmp_path / "first") == 0
    first = open_corpus(tmp_path / "first", verify=True)
    assert set(first.splits) == {"train", "valid", "test"}
    names = {name: split for split in first.splits for name in first.split(split).document_names}
    assert len(names) == 2 * FEWEST_SENTENCES
    splits_of_sentence = {name.partition("_")[0]: set() for name in names}
    for name, split in names.items():
        splits_of_sentence[name.partition("_")[0]].add(split)
    assert len(splits_of_sentence) == FEWEST_SENTENCES
    assert all(len(splits) == 1 for splits in splits_of_sentence.values())
    assert first.description["source"]["options"]["synthesizer"] == "espeakng-loader 0.2.4"

    recordings = sorted((tmp_path / "first_recordings").iterdir())
    assert len(recordings) == 2 * FEWEST_SENTENCES
    times = {file: file.stat().st_mtime_ns for file in recordings}
    capsys.readouterr()
    assert prepare(monkeypatch, tmp_path / "first") == 0
    assert "complete already" in capsys.readouterr().out
    for file in recordings[::2]:  # as if synthesis had been interrupted; the others are not made again
        file.unlink()
    elsewhere = ("--source", str(tmp_path / "first_recordings"))
    assert prepare(monkeypatch, tmp_path / "second", *elsewhere) == 0
    assert {file.stat().st_mtime_ns for file in recordings[1::2]} == {times[file] for file in recordings[1::2]}
    assert open_corpus(tmp_path / "second", verify=True).fingerprint == first.fingerprint


def test_without_the_synthesizer_there_is_one_clear_error(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(espeak.sys.modules["recipe_espeak"], "version", missing)
    monkeypatch.setattr(prepare_command, "load_recipe", lambda folder: espeak)
    assert prepare(monkeypatch, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "python -m pip install espeakng-loader==0.2.4" in message
    monkeypatch.setattr(espeak, "version", lambda name: "0.9")
    assert prepare(monkeypatch, tmp_path / "out") == 2
    assert "found 0.9" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_synthesizer_that_fails_is_one_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(espeak, "VOICES", ("no-such-voice",))
    monkeypatch.setattr(prepare_command, "load_recipe", lambda folder: espeak)
    assert prepare(monkeypatch, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "stopped after 0 of 20" in message
    assert "no-such-voice" in message
    assert not list((tmp_path / "out_recordings").iterdir())


def test_wrong_numbers_of_sentences(tmp_path, monkeypatch, capsys):
    assert prepare(monkeypatch, tmp_path / "out", num_sentences=-1) == 2
    assert prepare(monkeypatch, tmp_path / "out", num_sentences=1) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "expected 0 (all) to" in lines[0]
    assert "no sentence falls into split" in lines[1]


def test_a_recipe_that_reads_recordings_needs_a_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(ROOT / "recipes/folder"), "--out", str(tmp_path / "out")])
    assert run_tool(prepare_command.main) == 2
    assert "error: --source: expected the folder of the data" in capsys.readouterr().err


def test_a_long_path_to_the_data(tmp_path, monkeypatch):
    """The library cuts off paths of over 160 bytes, so that an environment in a deep folder needs a way round."""
    utterance = espeak.Utterance("one", "One.", "en+f3", 170, 50)
    espeak.make_recordings([utterance], tmp_path / "short")
    deep = tmp_path / ("deep" * 40)
    deep.mkdir()
    (deep / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
    (tmp_path / "espeakng_loader.py").write_text(
        f"def get_data_path(): return {str(deep / 'espeak-ng-data')!r}\n"
        f"def get_library_path(): return {espeakng_loader.get_library_path()!r}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    espeak.make_recordings([utterance], tmp_path / "long")
    assert np.array_equal(samples(tmp_path / "long/one.wav"), samples(tmp_path / "short/one.wav"))


def test_the_pin_of_setup_is_the_version_that_the_recipe_expects():
    pins = re.findall(r'"espeakng-loader==([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert pins == [espeak.PACKAGE_VERSION]
