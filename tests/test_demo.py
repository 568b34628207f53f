"""tools/demo.py: its commands exist, nothing is done twice, an interruption ends the commands and the demo goes on."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from handmade_runs import RATE, Output, Patch, options_of, page_data, speech_like, write_sample
from recordings import ROOT

from ct_audio.commands import demo
from ct_audio.commands.command_line import run_tool
from ct_audio.data.audio_files import write_wav
from ct_audio.runs.config import load_config

PLACES = demo.Places(Path("data/espeak"), Path("runs"), Path("reports/demo"), Path("recipes/kathleen/pretrained"))


def planned(places: demo.Places = PLACES, *overrides: str, seconds: float = 5.0, num_sentences: int = 0) -> list[str]:
    """All commands as they can be typed."""
    stages = demo.plan(places, list(overrides), seconds=seconds, num_sentences=num_sentences)
    return [command.shown for stage in stages for command in stage.commands]


@pytest.fixture
def places(tmp_path: Path) -> demo.Places:
    """Places with a shipped model (only a config.json and a clip) and checkpoints (only a state.json)."""
    places = demo.Places(tmp_path / "data", tmp_path / "runs", tmp_path / "out", tmp_path / "pretrained")
    for model in demo.MODELS:
        (places.run(model) / "checkpoints/best").mkdir(parents=True)
        (places.run(model) / "checkpoints/best/state.json").write_text("{}")
    (places.pretrained / "one").mkdir(parents=True)
    (places.pretrained / "one/config.json").write_text("{}")
    (places.pretrained / "one/clip.wav").write_bytes(b"x")
    (places.pretrained / "no_model").mkdir()
    return places


def test_commands_at_their_defaults_are_short_and_name_what_exists(tmp_path: Path) -> None:
    commands = planned(dataclasses.replace(PLACES, pretrained=tmp_path))
    assert commands[0] == "ct-audio prepare recipes/espeak --out data/espeak"
    assert commands[3] == "ct-audio train recipes/espeak/demo_compressive_transformer.yaml"
    for words in map(shlex.split, commands):
        options = options_of(words[1])
        assert all(word in options for word in words if word.startswith("--")), words
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml")), words
    (compare,) = (command for command in commands if "compare" in command)
    assert all(f"runs/espeak_demo_{name} " in compare for name in (*demo.MODELS, *demo.BASELINES))
    for model in demo.MODELS:
        text = (ROOT / f"recipes/espeak/demo_{model}.yaml").read_text(encoding="utf-8")
        assert f"name: {PLACES.run(model).name}\nruns_dir: runs\n" in text
        assert "  corpus: data/espeak\n" in text


def test_models_and_line_are_scored_on_the_same_codes() -> None:
    trained = [words[2:] for words in map(shlex.split, planned()) if words[1] == "train"]
    configs = [load_config(ROOT / file, overrides) for file, *overrides in trained]
    assert {config.name.removeprefix("espeak_demo_") for config in configs} == {*demo.MODELS, *demo.BASELINES}
    assert {config.train.valid_codes for config in configs} == {demo.SCORED_SECONDS * 24_000}
    assert not any(config.train.validate_whole_split for config in configs)  # the demo scores a stretch, at the end


def test_other_places_reach_every_command() -> None:
    places = demo.Places(Path("d"), Path("r"), Path("o"), Path("p"))
    overrides = ("train.num_steps=3", "optim.warmup_steps=1")
    commands = planned(places, *overrides, seconds=0.1, num_sentences=9)
    assert "--out d -- --num-sentences 9" in commands[0]
    for command in commands[1:3]:
        assert command.endswith("runs_dir=r data.corpus=d train.validate_whole_split=false train.num_steps=3")
    assert all(command.endswith("data.corpus=d train.num_steps=3 optim.warmup_steps=1") for command in commands[3:5])
    assert all("r/espeak_demo_" in command and "--out o" in command for command in commands[5:])
    assert not any("reports" in command or "runs/" in command for command in commands)


def test_shipped_models_speak_first_unconditionally_and_from_their_clips(places: demo.Places) -> None:
    free, primed = map(shlex.split, planned(places)[:2])
    folder = os.path.relpath(places.pretrained / "one", ROOT)
    assert free[:5] == ["ct-audio", "sample", folder, "--seconds", "5"]
    assert free[-1] == str(places.samples("one_unconditional"))
    assert primed[2] == folder
    assert primed[primed.index("--prime") + 1] == f"{folder}/clip.wav"
    assert "--include-prime" in primed
    assert primed[-1] == str(places.samples("one_continuation"))
    options = options_of("sample")
    assert all(word in options for word in (*free, *primed) if word.startswith("--"))


def counting(tmp_path: Path, places: demo.Places, status: int = 0, accepted: tuple[int, ...] = (0,)) -> demo.Stage:
    """A stage whose commands append their name to a file and end with `status`."""
    program = (
        f"import sys; print('at work'); open({str(tmp_path / 'log')!r}, 'a').write(sys.argv[1]); sys.exit({status})"
    )
    commands = []
    for model in demo.MODELS:
        checkpoint = places.run(model) / "checkpoints/best/state.json"
        commands.append(demo.Command(model, ["python", "-c", program, model[0]], checkpoint, accepted))
    return demo.Stage("count", commands)


def test_nothing_is_done_twice_unless_the_checkpoint_is_another(
    tmp_path: Path, places: demo.Places, capsys: Output
) -> None:
    stages = [counting(tmp_path, places, status=4, accepted=(0, 4))]
    demo.run_stage(stages, 0, places)
    log = places.out / "logs/wavenet.log"
    assert log.read_text().endswith(" w\nat work\n")
    assert re.fullmatch(r"\[1/1\] count: \d s \(with warnings: .*\)\n", capsys.readouterr().out)
    demo.run_stage(stages, 0, places)
    assert capsys.readouterr().out == "[1/1] count: 0 s (was done before)\n"
    assert sorted((tmp_path / "log").read_text()) == ["c", "w"]
    (places.run("wavenet") / "checkpoints/best/state.json").write_text('{"step": 2}')
    assert demo.run_commands(stages[0].commands, places, lambda _: None) == {"wavenet": 4}
    other = counting(tmp_path, places, status=0)
    assert demo.run_commands(other.commands, places, lambda _: None).keys() == set(demo.MODELS)


def test_what_failed_is_not_done(tmp_path: Path, places: demo.Places) -> None:
    stage = counting(tmp_path, places, status=1)
    for _ in range(2):
        assert demo.run_commands(stage.commands, places, lambda _: None) == dict.fromkeys(demo.MODELS, 1)
    assert sorted((tmp_path / "log").read_text()) == ["c", "c", "w", "w"]


def test_no_more_than_two_run_at_once_and_none_after_a_failure(tmp_path: Path, places: demo.Places) -> None:
    program = (
        "import pathlib, sys, time; place = pathlib.Path(sys.argv[1]); mine = place / f'now_{sys.argv[2]}'\n"
        "mine.touch(); time.sleep(0.3); number = len(list(place.glob('now_*'))); mine.unlink()\n"
        "(place / f'saw_{sys.argv[2]}').write_text(str(number)); sys.exit(sys.argv[2] == sys.argv[3])"
    )

    def run(failing: str) -> dict[str, int]:
        words = [["python", "-c", program, str(tmp_path), str(number), failing] for number in range(5)]
        shares: list[float] = []
        statuses = demo.run_commands([demo.Command(each[4], each) for each in words], places, shares.append)
        assert shares == sorted(shares)
        assert shares[-1] == len(statuses) / 5
        return statuses

    assert run("none") == dict.fromkeys("01234", 0)
    assert max(int(file.read_text()) for file in tmp_path.glob("saw_*")) <= demo.AT_ONCE
    assert set(run("0")) <= set("012")


def test_a_command_that_fails_stops_the_demo_with_one_line(
    tmp_path: Path, places: demo.Places, monkeypatch: Patch, capfd: Any
) -> None:
    command = demo.Command("failing", ["python", "-c", "import sys; print('x'); sys.exit('error: its own')"])
    stages = [demo.Stage("fail", [command]), counting(tmp_path, places)]
    monkeypatch.setattr(demo, "plan", lambda *_, **__: stages)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(places.out)])
    assert run_tool(demo.main) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: the demo stopped: exit status 1 of `python -c 'import sys")
    assert ": error: its own (all of it in " in line
    assert not (tmp_path / "log").exists()


def test_an_interruption_ends_the_commands(tmp_path: Path, places: demo.Places, capsys: Output) -> None:
    program = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch()\ntry: time.sleep(60)\n"
    program += "except KeyboardInterrupt: pathlib.Path(sys.argv[1]).write_text('saved')"
    files = {name: tmp_path / name for name in ("a", "b")}

    main_thread = threading.get_ident()

    def interrupt_when_all_run() -> None:
        while not all(file.exists() for file in files.values()):
            time.sleep(0.02)
        time.sleep(0.2)
        signal.pthread_kill(main_thread, signal.SIGINT)

    threading.Thread(target=interrupt_when_all_run, daemon=True).start()
    began = time.monotonic()
    commands = [demo.Command(name, ["python", "-c", program, str(file)]) for name, file in files.items()]
    with pytest.raises(KeyboardInterrupt):
        demo.run_commands(commands, places, lambda _: None)
    assert time.monotonic() - began < 30
    assert [file.read_text() for file in files.values()] == ["saved", "saved"]
    assert "interrupted" in capsys.readouterr().err


def test_the_share_of_the_training_is_read_from_the_runs(places: demo.Places) -> None:
    assert demo.share_trained(places) == 0
    run = places.run("wavenet")
    (run / "metrics.jsonl").write_text('{"step": 10}\n{"step": 30}\n')
    (run / "config.yaml").write_text("train:\n  num_steps: 40\n")
    assert demo.share_trained(places) == pytest.approx(30 / 40 / 2)


TABLE = (
    "run,parameters,steps,valid (nats),test (nats),test difference (nats)\n<a>,5,1,3.0,2.987654,0.4\nb,0,,3.1,2.5,\n"
)


def test_results_stand_best_first(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(TABLE)
    assert [line.split()[-3:] for line in demo.results(table)] == [
        ["better", "valid", "test"],
        ["b", "3.1000", "2.5000"],
        ["<a>", "3.0000", "2.9877"],
    ]


def test_the_page_plays_what_there_is(places: demo.Places) -> None:
    write_wav(places.pretrained / "one/clip.wav", speech_like(300, 3), RATE)
    for seed, name in enumerate(("one_unconditional", "one_continuation", "wavenet")):
        write_sample(places.samples(name), speech_like(400, seed), prime_length=300 if "cont" in name else 0)
    (places.out / "table.csv").write_text(TABLE)
    data = page_data(demo.write_page(places))
    assert [(clip["source"], clip["kind"], clip["prime_length"]) for clip in data["clips"]] == [
        ("recording", "continuation", 300),
        ("one, shipped", "unconditional", 0),
        ("one, shipped", "continuation", 300),
        ("wavenet, trained here", "unconditional", 0),
    ]
    assert data["tables"][0]["cells"][1:] == [
        ["b", "0", "-", "3.1000", "2.5000", "-"],
        ["<a>", "5", "1", "3.0000", "2.9877", "0.4000"],
    ]


def test_ignored_interruptions_end_the_demo_and_nohup_holds():
    program = (
        "import signal, sys; sys.path[:0] = sys.argv[1:]; from ct_audio.commands.demo import catch_signals\n"
        "for number in (signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)\n"
        "catch_signals()\n"
        "signal.raise_signal(signal.SIGHUP); print('held', flush=True)\n"
        "try: signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt: print('ended')\n"
    )
    command = [sys.executable, "-c", program, str(ROOT)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "held\nended\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_demo_small_interrupted_and_twice(tmp_path: Path) -> None:
    few = ["train.num_steps=6", "train.valid_every_steps=3", "train.checkpoint_every_steps=2", "train.valid_codes=3840"]
    places = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    small = ["--seconds", "0.02", "--num-sentences", "10"]
    command = [sys.executable, str(ROOT / "tools/demo.py"), *few, *places, *small]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        log = tmp_path / "out/logs/train_compressive_transformer.log"
        while first.poll() is None and not (log.is_file() and "new run" in log.read_text()):
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        assert first.stdout
        first.stdout.read()
    assert first.returncode == 130
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"Open {os.path.relpath(tmp_path / 'out/index.html')}" in done.stdout
    data = page_data(tmp_path / "out/index.html")
    assert {clip["source"] for clip in data["clips"]} >= {f"{model}, trained here" for model in demo.MODELS}
    assert {run["label"] for run in data["curves"]["axes"]["steps"]["runs"]} >= {"espeak_demo_wavenet"}
    table = (tmp_path / "out/table.md").read_text()
    assert all(f"| espeak_demo_{name} |" in table for name in (*demo.MODELS, *demo.BASELINES))
    sidecar = json.loads((tmp_path / "out/samples/wavenet/sample_0.json").read_text())
    assert sidecar["step"] in (3, 6)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/samples").rglob("*.wav")}
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(again.stdout.splitlines()) < 20
    assert {file: file.stat().st_mtime_ns for file in times} == times
