"""tools/demo.py: its commands exist, nothing is done twice, an interruption ends the commands and the demo goes on."""

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from handmade_runs import options_of
from recordings import ROOT

from ct_audio.commands import demo
from ct_audio.commands.command_line import run_tool
from ct_audio.runs.config import load_config

PLACES = demo.Places(Path("data/espeak"), Path("runs"), Path("reports/demo"))


def planned(places=PLACES, *overrides, seconds=0.5, num_sentences=0):
    """All commands in words."""
    steps = demo.plan(places, list(overrides), seconds=seconds, num_sentences=num_sentences)
    return [words for step in steps for words in step.commands.values()]


def test_commands_at_their_defaults_are_short_and_name_what_exists():
    commands = [shlex.join(words) for words in planned()]
    assert commands[0] == "python tools/prepare.py recipes/espeak --out data/espeak"
    assert commands[3] == "python tools/train.py recipes/espeak/demo_compressive_transformer.yaml"
    for words in planned():
        options = options_of(Path(words[1]).stem)
        assert all(word in options for word in words if word.startswith("--")), words
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml")), words
    for name in (*demo.MODELS, *demo.BASELINES):
        assert sum(f"tools/evaluate.py runs/espeak_demo_{name} --split" in command for command in commands) == 2
        assert sum(f"runs/espeak_demo_{name} " in command for command in commands if "compare" in command) == 1
    for model in demo.MODELS:
        text = (ROOT / f"recipes/espeak/demo_{model}.yaml").read_text(encoding="utf-8")
        assert f"name: {PLACES.run(model).name}\nruns_dir: runs\n" in text
        assert "  corpus: data/espeak\n" in text


def test_baselines_have_the_models_codes_and_steps():
    trained = [load_config(ROOT / words[2], words[3:]) for words in planned() if words[1] == "tools/train.py"]
    configs = {config.name.removeprefix("espeak_demo_"): config for config in trained}
    assert configs.keys() == {*demo.MODELS, *demo.BASELINES}
    for config in configs.values():
        assert config.data == configs["wavenet"].data
        assert config.train.num_steps == configs["wavenet"].train.num_steps
        assert config.train.valid_codes == configs["wavenet"].train.valid_codes
        assert not config.train.validate_whole_split  # the demo scores both splits itself, once


def test_other_places_reach_every_command():
    places = demo.Places(Path("d"), Path("r"), Path("o"))
    overrides = ("train.num_steps=3", "optim.warmup_steps=1")
    commands = [shlex.join(words) for words in planned(places, *overrides, seconds=0.1, num_sentences=9)]
    assert "--out d -- --num-sentences 9" in commands[0]
    assert all(command.endswith("runs_dir=r data.corpus=d train.num_steps=3") for command in commands[1:3])
    assert all(command.endswith("data.corpus=d train.num_steps=3 optim.warmup_steps=1") for command in commands[3:5])
    assert all("r/espeak_demo_" in command for command in commands[5:])
    assert not any("reports" in command or "runs/" in command for command in commands)


@pytest.fixture
def places(tmp_path):
    """Places with a checkpoint of both models, which is only a state.json."""
    places = demo.Places(tmp_path / "data", tmp_path / "runs", tmp_path / "out")
    for model in demo.MODELS:
        (places.run(model) / "checkpoints/best").mkdir(parents=True)
        (places.run(model) / "checkpoints/best/state.json").write_text("{}")
    return places


def counting_step(tmp_path, status=0, accepted=(0,)):
    """A step whose commands append their name to a file and end with `status`."""
    program = (
        f"import sys; print('at work'); open({str(tmp_path / 'log')!r}, 'a').write(sys.argv[1]); sys.exit({status})"
    )
    commands = {model: ["python", "-c", program, model[0]] for model in demo.MODELS}
    return demo.Step("count", commands, accepted, once=True)


def test_nothing_is_done_twice_unless_the_checkpoint_is_another(tmp_path, places, capsys):
    step = counting_step(tmp_path, status=4, accepted=(0, 4))
    assert demo.run_once(step, places) == {"compressive_transformer": 4, "wavenet": 4}
    assert "  wavenet | at work\n" in capsys.readouterr().out
    assert demo.run_once(step, places) == {}
    assert "was done before: with warnings" in capsys.readouterr().out
    assert sorted((tmp_path / "log").read_text()) == ["c", "w"]
    (places.run("wavenet") / "checkpoints/best/state.json").write_text('{"step": 2}')
    assert demo.run_once(step, places) == {"wavenet": 4}
    other = counting_step(tmp_path, status=0)
    assert demo.run_once(other, places).keys() == set(demo.MODELS)


def test_what_failed_is_not_done(tmp_path, places):
    step = counting_step(tmp_path, status=1)
    for _ in range(2):
        assert demo.run_once(step, places) == {"compressive_transformer": 1, "wavenet": 1}
    assert sorted((tmp_path / "log").read_text()) == ["c", "c", "w", "w"]


def test_a_command_that_fails_stops_the_demo_with_one_line(tmp_path, monkeypatch, capfd):
    failing = demo.Step("fail", {"": ["python", "-c", "import sys; sys.exit('error: its own')"]})
    monkeypatch.setattr(demo, "plan", lambda *_, **__: [failing, counting_step(tmp_path)])
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert run_tool(demo.main) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert first == "error: its own"
    assert second.startswith("error: the demo stopped: exit status 1 of `python -c 'import sys")
    assert not (tmp_path / "log").exists()


def test_an_interruption_ends_the_commands(tmp_path, capsys):
    program = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch()\ntry: time.sleep(60)\n"
    program += "except KeyboardInterrupt: pathlib.Path(sys.argv[1]).write_text('saved')"
    files = {name: tmp_path / name for name in ("a", "b")}

    main_thread = threading.get_ident()

    def interrupt_when_all_run():
        while not all(file.exists() for file in files.values()):
            time.sleep(0.02)
        time.sleep(0.2)
        signal.pthread_kill(main_thread, signal.SIGINT)

    threading.Thread(target=interrupt_when_all_run, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        demo.run_commands({name: ["python", "-c", program, str(file)] for name, file in files.items()})
    assert time.monotonic() - start < 30
    assert [file.read_text() for file in files.values()] == ["saved", "saved"]
    assert "interrupted" in capsys.readouterr().err


def test_results_stand_best_first(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("run,steps,valid (nats),test (nats)\na,1,3.0,2.987654\nb,,3.1,2.5\n")
    assert [line.split()[-3:] for line in demo.results(table)] == [
        ["better", "valid", "test"],
        ["b", "3.1000", "2.5000"],
        ["a", "3.0000", "2.9877"],
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
def test_the_whole_demo_small_interrupted_and_twice(tmp_path):
    few = ["train.num_steps=6", "train.valid_every_steps=3", "train.checkpoint_every_steps=2", "train.valid_codes=3840"]
    places = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    small = ["--seconds", "0.02", "--num-sentences", "10"]
    command = [sys.executable, str(ROOT / "tools/demo.py"), *few, *places, *small]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        for line in first.stdout:
            if "_transformer: new run" in line:
                first.send_signal(signal.SIGTERM)
                break
        first.stdout.read()
    assert first.returncode == 130
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "What to open:" in done.stdout
    for line in done.stdout.split("What to open:\n")[1].splitlines()[:-1]:
        assert (ROOT / line[20:].strip()).is_file(), line
    assert done.stdout.count(".wav") >= 5
    table = (tmp_path / "out/table.md").read_text()
    assert all(f"| espeak_demo_{name} |" in table for name in (*demo.MODELS, *demo.BASELINES))
    sidecar = json.loads((tmp_path / "out/samples/wavenet/sample_1.json").read_text())
    assert sidecar["step"] in (3, 6)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/samples").rglob("*.wav")}
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.count("was done before") == 10
    assert {file: file.stat().st_mtime_ns for file in times} == times
