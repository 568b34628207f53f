"""The listening page: what is put on it, from samples, corpora and runs; and its use in a headless browser."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, open_browser
from handmade_runs import (
    RATE,
    Output,
    Patch,
    Tool,
    make_run,
    page_data,
    refusal,
    speech_like,
    tool,
    write_corpus,
    write_sample,
)

from ct_audio.apps.listening_page import (
    CONTINUATION,
    UNCONDITIONAL,
    Clip,
    Table,
    read_clips,
    recordings_beside,
    told_apart,
    write_page,
)
from ct_audio.common.errors import UserError
from ct_audio.common.figures import decibel_range, spectrogram_decibels
from ct_audio.data.audio_files import write_wav
from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import open_corpus
from ct_audio.evaluation.curves import Curves

AXES = ("steps", "audio seen", "wall time", "core time of training")
WORDS = ("--seconds", 0.07, "--num", 2, "--threads", 1)


def codes_of(clip: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(clip["codes"]), np.uint8)


def line(*points: tuple[float, float]) -> Curves:
    """The same validation curve over every axis."""
    both = {"train": [(x, y - 0.1) for x, y in points], "valid": list(points)}
    return Curves(dict.fromkeys(AXES, both), [1.0])


@pytest.fixture
def page(monkeypatch: Patch) -> Tool:
    return tool("page", monkeypatch)


def test_samples_are_found_with_their_settings_and_exact_codes(tmp_path: Path) -> None:
    codes = np.arange(256, dtype=np.uint8).repeat(2)
    write_sample(tmp_path / "b", MuLaw().decode(codes), lane=10, prime_length=100, warnings=["stuck"])
    write_sample(tmp_path / "b", speech_like(300, 1), lane=9, top_p=0.9, temperature=0.5)
    write_sample(tmp_path / "a", speech_like(300, 2))
    write_wav(tmp_path / "a/sample_mine.wav", speech_like(9, 1), RATE)
    first, second, third = read_clips(tmp_path)
    assert (first.source, first.kind, first.settings) == ("model", UNCONDITIONAL, "temperature 1")
    assert (second.number, second.settings) == (9, "temperature 0.5, top-p 0.9")
    assert (third.number, third.kind, third.prime_length, third.warnings) == (10, CONTINUATION, 100, ("stuck",))
    np.testing.assert_array_equal(third.codes, codes)
    assert [clip.source for clip in read_clips(tmp_path, source="mine")] == ["mine"] * 3


def test_models_of_one_name_are_told_apart_by_their_steps(tmp_path: Path) -> None:
    for step in (3, 4):
        write_sample(tmp_path / str(step), speech_like(300, 1), step=step)
    assert [clip.source for clip in told_apart(read_clips(tmp_path))] == ["model, step 3", "model, step 4"]
    assert [clip.source for clip in told_apart(read_clips(tmp_path / "3"))] == ["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_rate_hz": 8000}, "expected 8000 Hz of mu-law codes, got 24000 Hz"),
        ({"prime_seconds": 9.0, "prime_included": True}, "does not fit"),
        ({"codec": {"name": "byte"}}, "does not fit"),
        ({"temperature": "warm"}, "is not the sidecar of a sample"),
        ({"warnings": None}, "is not the sidecar of a sample"),
    ],
)
def test_a_sample_that_does_not_fit_its_sidecar_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_sample(tmp_path, speech_like(300, 1), **change)
    with pytest.raises(UserError, match=message):
        read_clips(tmp_path)


def test_recordings_stand_beside_what_continues_them(tmp_path: Path) -> None:
    documents = [("valid", speech_like(400, seed)) for seed in range(3)]
    split = open_corpus(write_corpus(tmp_path / "corpus", MuLaw(), documents)).split("valid")
    own, other = np.asarray(split.codes[400:500]), np.asarray(split.codes[:100])
    about = {"prime": "document_1"}
    clips = [
        Clip("m", "", CONTINUATION, 4, np.concatenate([own, own, own]), 100, about=about),
        Clip("m", "", CONTINUATION, 5, np.concatenate([other, own]), 100, about=about),  # begins otherwise
        Clip("m", "", CONTINUATION, 6, own, 100, about={"prime": "elsewhere.wav"}),
    ]
    (found,) = recordings_beside(clips, split)
    assert (found.number, found.prime_length, found.is_recording) == (4, 100, True)
    np.testing.assert_array_equal(found.codes, split.codes[400:700])
    free = [Clip("m", "", UNCONDITIONAL, number, own) for number in (0, 1)]
    stretches = recordings_beside(free, split)
    assert [clip.number for clip in stretches] == [0, 1]
    np.testing.assert_array_equal(stretches[1].codes, split.codes[850:950])


def test_the_page_is_one_file_with_exact_sound_and_nothing_of_others_runs(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><!--"
    clip = Clip(hostile, "", UNCONDITIONAL, 0, np.arange(256, dtype=np.uint8), about={"nll": float("nan")})
    write_page(tmp_path / "page.html", title=hostile, clips=[clip], tables=[Table(hostile, [[hostile]])])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert hostile not in text
    assert text.count("</script>") == 2
    assert not [
        word
        for word in ("http:", "https:", "//cdn", "@import")
        if word in text.replace("http://www.w3.org/2000/svg", "")
    ]
    data = page_data(tmp_path / "page.html")
    assert data["title"] == data["clips"][0]["source"] == hostile
    assert data["clips"][0]["about"] == {"nll": None}
    np.testing.assert_array_equal(codes_of(data["clips"][0]), clip.codes)
    write_wav(tmp_path / "codes.wav", MuLaw().decode(clip.codes), RATE)  # the same 16 bits as in a wav file
    np.testing.assert_array_equal(np.frombuffer((tmp_path / "codes.wav").read_bytes()[-512:], "<i2"), data["levels"])


def test_colours_span_the_decibels_of_recordings(tmp_path: Path) -> None:
    quiet, loud = MuLaw().encode(speech_like(900, 1)), MuLaw().encode(9 * speech_like(900, 1))
    clips = [Clip("r", "", UNCONDITIONAL, 0, quiet, 0, True), Clip("m", "", UNCONDITIONAL, 0, loud)]
    write_page(tmp_path / "page.html", title="", clips=clips)
    expected = decibel_range(spectrogram_decibels(MuLaw().decode(quiet)))
    assert page_data(tmp_path / "page.html")["limits"] == list(expected)


def test_curves_keep_their_values_and_one_without_training_is_level(tmp_path: Path) -> None:
    level = Curves({axis: {"train": [], "valid": [(0.0, 2.5)]} for axis in AXES}, [])
    curves = {"a": line((0.0, 3.0), (3600.0, 2.8), (7200.0, 2.7)), "b": level}
    write_page(tmp_path / "page.html", title="", curves=curves)
    axes = page_data(tmp_path / "page.html")["curves"]["axes"]
    assert list(axes) == list(AXES)
    assert axes["wall time"]["title"] == "wall time (hours)"
    assert axes["wall time"]["runs"][0]["valid"] == [[0, 3], [1, 2.8], [2, 2.7]]
    assert [run["is_level"] for run in axes["steps"]["runs"]] == [False, True]


def test_the_command_joins_folders_corpus_and_curves(tmp_path: Path, page: Tool, capsys: Output) -> None:
    corpus = write_corpus(tmp_path / "corpus", MuLaw(), [("valid", speech_like(2000, 5))])
    write_sample(tmp_path / "a", speech_like(300, 1))
    write_sample(tmp_path / "b", speech_like(300, 2), name="other")
    out = tmp_path / "page.html"
    assert page(tmp_path / "a", tmp_path / "b", "--out", out, "--corpus", corpus, "--title", "T") == 0
    assert f"wrote {out}: 3 clips" in capsys.readouterr().out
    assert [clip["source"] for clip in page_data(out)["clips"]] == ["recording", "model", "other"]
    write_sample(tmp_path / "c", speech_like(300, 2), sample_rate_hz=24_000, codec={"name": "byte"})
    assert "does not fit" in refusal(capsys, page, tmp_path / "c", "--out", out)
    assert "--split: only with --corpus" in refusal(capsys, page, tmp_path / "a", "--out", out, "--split", "test")
    (tmp_path / "none").mkdir()
    assert "expected samples" in refusal(capsys, page, tmp_path / "none", "--out", out)


def test_sample_and_compare_write_pages(tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    documents = [("train", speech_like(3000, 1)), ("valid", speech_like(30_000, 2)), ("valid", speech_like(9000, 3))]
    corpus = write_corpus(tmp_path / "corpus", MuLaw(), documents)
    run, out = make_run(corpus, tmp_path), tmp_path / "out"
    write_wav(tmp_path / "prime.wav", speech_like(5000, 4), RATE)
    prime = ("--prime", tmp_path / "prime.wav", "--prime-seconds", 0.02, "--include-prime")
    assert tool("sample", monkeypatch)(run, *WORDS, *prime, "--page", "--out", out) in (0, 4)
    clips = page_data(out / "index.html")["clips"]
    assert [clip["is_recording"] for clip in clips] == [True, False, False]
    assert {clip["prime_length"] for clip in clips} == {480}
    assert [len(codes_of(clip)) for clip in clips] == [480 + 1680] * 3
    assert len({codes_of(clip)[:480].tobytes() for clip in clips}) == 1
    (run / "metrics.jsonl").write_text(
        '{"step": 7, "wall_seconds": 1.0, "audio_seconds": 1.0, "nll/valid_nats": 4.0}\n'
    )
    capsys.readouterr()
    compare = tool("compare", monkeypatch)
    assert (
        compare(
            run, "--page", "--seconds", 0.1, "--num", 2, "--threads", 1, "--max-seconds", 0.02, "--out", tmp_path / "c"
        )
        == 0
    )
    data = page_data(tmp_path / "c/index.html")
    kinds = [(clip["kind"], clip["is_recording"]) for clip in data["clips"]]
    assert sorted(kinds) == sorted(
        [(kind, is_recorded) for kind in (UNCONDITIONAL, CONTINUATION) for is_recorded in (0, 1)] * 2
    )
    assert [table["title"] for table in data["tables"]] == ["NLL", "Samples beside recordings"]
    assert data["curves"]["axes"]["steps"]["runs"][0]["label"] == "wavenet_run"
    assert "--num: only with --page" in refusal(capsys, compare, run, "--num", 2, "--out", tmp_path / "d")


# ---- in a browser


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and recordings, both kinds, two lanes each; a sine so that there is something to see."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    clips = []
    for index, source in enumerate(("recording", "alpha", "beta")):
        for number in range(2):
            for prime_length in (0, 4800):
                time = np.arange(12_000) / RATE
                wave = 0.1 * np.sin(2 * np.pi * (200 + 300 * index) * time) + 0.2 * speech_like(12_000, number + index)
                about = {"nll_nats": 2.0 + index - number / 2, "temperature": 1.0, "rms_dbfs": -20.0 - index}
                clip = Clip(
                    source,
                    "" if index == 0 else "temperature 1",
                    CONTINUATION if prime_length else UNCONDITIONAL,
                    number,
                    MuLaw().encode(wave.astype(np.float32)),
                    prime_length,
                    index == 0,
                    about if index else {},
                    ("runaway: loud",) if source == "beta" and number else (),
                )
                clips.append(clip)
    curves = {
        "alpha": line((0.0, 3.0), (100.0, 2.6), (200.0, 2.5)),
        "beta": line((0.0, 3.1), (100.0, 2.7), (200.0, 2.4)),
    }
    cells = [["run", "nats"], ["alpha", "2.5"], ["beta", "2.4"]]
    write_page(path, title="A page", text="For a test.", clips=clips, curves=curves, tables=[Table("NLL", cells)])
    return path


def heads(browser: Browser) -> list[str]:
    return browser.script("return [...document.querySelectorAll('.clip h3')].map((each) => each.textContent)")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_in_a_browser_players_load_pictures_are_drawn_clips_are_sorted_and_filtered(whole_page: Path) -> None:
    with open_browser() as browser:
        browser.open(whole_page.as_uri())
        players = "[...document.querySelectorAll('audio')]"
        assert browser.script(f"return {players}.length") == 12
        browser.wait(f"{players}.every((each) => each.readyState >= 1)")
        assert browser.script(f"return {players}.map((each) => each.duration)") == [0.5] * 12
        browser.script("document.querySelector('.clip').scrollIntoView()")
        colours = (
            "new Set(document.querySelector('.clip canvas').getContext('2d').getImageData(60, 70, 200, 100).data).size"
        )
        assert browser.wait(f"document.querySelector('.clip canvas').width > 300 && {colours}") > 20
        assert heads(browser)[:3] == ["recording", "alpha, temperature 1", "beta, temperature 1"]
        browser.click(".picture")  # plays from there
        browser.wait("document.querySelector('audio').currentTime > 0")
        choose = "const box = document.getElementById(arguments[0]); box.value = arguments[1];"
        choose += "box.dispatchEvent(new Event('change'))"
        browser.script(choose, "sort", "NLL, lowest first")
        assert heads(browser)[:2] == ["alpha, temperature 1"] * 2
        browser.script(choose, "source", "beta")
        assert heads(browser) == ["beta, temperature 1"] * 4
        browser.click("#sound")
        assert len(heads(browser)) == 2
        browser.script(choose, "source", "")
        browser.type("#search", "nothing like it")
        assert heads(browser) == []
        browser.script(choose, "axis", "wall time")
        assert browser.script("return document.querySelectorAll('#chart polyline').length") == 4
        browser.click("#legend input")
        assert browser.script("return document.querySelectorAll('#chart polyline').length") == 2
        assert browser.complaints() == []


JUDGED = "document.getElementById('judged').textContent"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("by", ["keyboard", "mouse"])
def test_in_a_browser_the_blind_test_needs_one_hand(by: str, whole_page: Path) -> None:
    keys = {"#start": "t", "#playA": "a", "#playB": "b", "#betterA": "left", "#betterB": "right", "#same": "down"}
    keys |= {"#score": "s", "#leave": "escape"}
    with open_browser() as browser:
        browser.open(whole_page.as_uri())

        def do(selector: str) -> None:
            browser.press(keys[selector]) if by == "keyboard" else browser.click(selector)

        do("#start")
        visible = browser.script("return document.body.innerText")
        assert "A is better" in visible
        assert not [name for name in ("alpha", "beta", "temperature", "warning") if name in visible]
        for number, choice in enumerate(("#betterA", "#same", "#betterB")):
            do("#playA")
            if by == "keyboard":
                browser.press("left")  # before B was heard nothing is judged
                assert browser.script(f"return {JUDGED}") == f"{number} judged"
            browser.wait("document.querySelector('#playA').classList.contains('playing')")
            do("#playB")
            do(choice)
            assert browser.script(f"return {JUDGED}") == f"{number + 1} judged"
        do("#score")
        rows = browser.script(
            "return [...document.querySelectorAll('#result tr')].slice(1).map((row) => row.innerText.split('\\t'))"
        )
        assert sum(int(row[1]) for row in rows) == 2  # better
        assert sum(int(row[2]) for row in rows) == 2  # worse
        assert sum(int(row[3]) for row in rows) == 2  # one without a difference, of two
        do("#leave")
        assert browser.script(
            "return document.getElementById('blind').hidden && !document.getElementById('page').hidden"
        )
        assert browser.complaints() == []
