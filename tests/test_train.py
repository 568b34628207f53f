"""The loop: against a loop written by hand, its curves, its refusals, its signals."""

import dataclasses
import errno
import math
import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]
from tiny_runs import checkpoint_state, checkpoint_tensors, tiny_run, write_corpus

from ct_audio.commands.command_line import run_tool
from ct_audio.common.errors import UserError
from ct_audio.common.files import hold_alone
from ct_audio.data.corpus import open_corpus
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.models import build_model
from ct_audio.models.state import detach_memory, named_tensors
from ct_audio.runs.checkpoint_files import find_checkpoint
from ct_audio.runs.config import RunConfig, config_to_yaml
from ct_audio.runs.metrics import read_metrics
from ct_audio.runs.open_run import load_run_model
from ct_audio.training import loop as train_module
from ct_audio.training.loop import NonFiniteLossError, train
from ct_audio.training.schedules import learning_rate
from ct_audio.training.session import COMPARED_KEYS, ChunkLoss

QUIET: dict[str, Any] = {"train__valid_every_steps": 0}


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.run_dir / "checkpoints/last/model.safetensors")


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first if first[name].is_floating_point())


def train_by_hand(config: RunConfig, rates: list[float], updates: list[list[int]]) -> dict[str, torch.Tensor]:
    """Two lanes one after the other, Python slices of the corpus, torch's plain Adam, norms computed here."""
    codes = [128, *np.asarray(open_corpus(config.data.corpus).split("train").codes).tolist()]
    torch.manual_seed(config.train.seed)
    model = build_model(config).double()
    optimizer = torch.optim.Adam(model.parameters(), foreach=False, fused=False)
    memories, segment = [model.zero_memory(1), model.zero_memory(1)], (len(codes) - 1) // 2  # type: ignore[operator]
    for rate, steps in zip(rates, updates, strict=True):
        for step in steps:
            for lane in range(2):
                first = lane * segment + 16 * step
                window = torch.tensor(codes[first : first + 17])
                output = model(window[None, :-1], memories[lane])
                nll = model.nll(output.features, window[None, 1:])  # type: ignore[operator]
                loss = nll.sum() / 16 + sum(output.auxiliary_losses.values())
                (loss / 2 / len(steps)).backward()
                memories[lane] = detach_memory(output.memory)
        for group in model.gradient_groups().values():  # type: ignore[operator]
            gradients = [parameter.grad for parameter in group if parameter.grad is not None]
            norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
            for gradient in gradients:
                gradient *= min(1.0, config.optim.max_gradient_norm / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("model", ["compressive_transformer", "wavenet"])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_the_loop_is_the_loop_by_hand(tmp_path: Path, model: str, num_micro_batches: int):
    """Also that micro-batches and the update period change nothing but the order of the sums."""
    config = tiny_run(
        tmp_path,
        model,
        **QUIET,
        optim__update_period={0: 1, 2: 2},
        optim__max_gradient_norm=0.5,
        train__num_micro_batches=num_micro_batches,
    )
    assert train(config) == 0
    updates = [[0], [1], [2, 3], [4, 5]]
    rates = [learning_rate(steps[-1], config.optim) for steps in updates]
    assert largest_difference(weights(config), train_by_hand(config, rates, updates)) < 1e-12


def assert_table_of_runs_is_short(content: bytes) -> None:
    """TensorBoard's columns: what one compares, and the numbers of parameters."""
    columns = HParamsPluginData.FromString(content).session_start_info.hparams.keys()
    assert {"model.name", "model.width", "optim.peak_learning_rate", "parameters.model"} <= columns
    assert columns <= COMPARED_KEYS | {"parameters.model", "parameters.compression"}


def test_curves_have_the_tags_that_all_models_share(tmp_path: Path):
    tags = {}
    for model in ("compressive_transformer", "wavenet"):
        config = tiny_run(tmp_path, model, name=model, train__sample_every_steps=6, train__sample_seconds=0.001)
        assert train(config) == 0
        found = EventAccumulator(str(config.run_dir), size_guidance={"scalars": 0}).Reload()
        tags[model] = set(found.Tags()["scalars"])
        assert [event.step for event in found.Scalars("nll/train_nats")] == [1, 2, 3, 4, 5, 6]
        assert [event.step for event in found.Scalars("nll/valid_nats")] == [3, 6]
        assert [event.step for event in found.Scalars("nll/valid_full_nats")] == [6]
        assert found.Tags()["audio"] == ["sample/reference", "sample/0"]
        assert found.Tags()["images"] == ["sample_spectrogram/reference", "sample_spectrogram/0"]
        assert "custom_scalars__config__" in found.Tags()["tensors"]
        assert_table_of_runs_is_short(found.summary_metadata["_hparams_/session_start_info"].plugin_data.content)
        assert [path.name for path in (config.run_dir / "samples").iterdir()] == ["step_00000006_0.wav"]
        assert (config.run_dir / "config.yaml").exists()
    extra = {"attention_reconstruction/layer_00", "gradient_norm/compression"}
    extra |= {tag for tag in tags["compressive_transformer"] if tag.startswith("attention_reconstruction/")}
    assert tags["compressive_transformer"] - tags["wavenet"] == extra
    assert tags["wavenet"] - tags["compressive_transformer"] == set()
    assert {
        "nll/train_nats",
        "nll/train_bits",
        "nll/valid_nats",
        "nll/valid_bits",
        "gradient_norm/model",
        "optim/learning_rate",
        "throughput/codes_per_second",
        "throughput/times_real_time",
        "memory_use/process_mib",
    } <= tags["wavenet"]


def test_other_ranks_wait_while_rank_0_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On the group of the CPU, which has the time: the gradients' group would give up."""
    waiting, seen = [False], []
    on_first_rank, sampler = train_module.on_first_rank, train_module.Sampler

    def wait(function: Callable[[], Any]) -> Any:
        waiting[0] = True
        result = on_first_rank(function)
        waiting[0] = False
        return result

    monkeypatch.setattr(train_module, "on_first_rank", wait)
    monkeypatch.setattr(train_module, "Sampler", lambda *a, **k: seen.append(waiting[0]) or sampler(*a, **k))
    assert train(tiny_run(tmp_path, **QUIET, train__sample_every_steps=3, train__sample_seconds=0.001)) == 0
    assert seen == [True, True]


def test_it_learns_and_reports_what_the_evaluator_says(tmp_path: Path):
    config = tiny_run(tmp_path, train__num_steps=20, train__valid_every_steps=10, train__log_every_steps=10)
    assert train(config) == 0
    lines = read_metrics(config.run_dir)
    curve = [line["nll/train_nats"] for line in lines if "nll/train_nats" in line]
    assert curve[-1] < curve[0] - 0.2
    codes = open_corpus(config.data.corpus).split("valid").codes
    for which, tag, num_codes in (("best", "nll/valid_nats", 48), ("last", "nll/valid_full_nats", None)):
        loaded = load_run_model(config.run_dir, which=which)
        score = evaluate_nll(loaded.model, Stretch(codes[:num_codes], 128, 16))
        assert score.nll_nats == pytest.approx(min(line[tag] for line in lines if tag in line), rel=1e-12)
    seconds = [line["wall_seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert lines[0]["audio_seconds"] == pytest.approx(10 * 32 / 24_000)


def test_bfloat16_runs_under_autocast_and_keeps_weights_in_float32(tmp_path: Path):
    first = tiny_run(tmp_path, name="first", train__precision="float32")
    second = tiny_run(tmp_path, name="second", train__precision="bfloat16")
    assert train(first) == train(second) == 0
    tensors = checkpoint_tensors(second)
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    assert 0 < largest_difference(weights(first), weights(second)) < 0.1


def test_from_another_folder_the_path_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_run(tmp_path, data__corpus="data/x", runs_dir="runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{tmp_path}/elsewhere/data/x is no prepared corpus"):
        train(config)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_documents_reset_memory(tmp_path: Path):
    plain = tiny_run(tmp_path, name="plain", train__num_steps=8, **QUIET)
    reset = tiny_run(tmp_path, name="reset", train__num_steps=8, data__reset_memory_at_document=True)
    assert train(plain) == train(reset) == 0
    assert largest_difference(weights(plain), weights(reset)) > 0


@pytest.mark.parametrize(("decay_steps", "expected"), [(2, "from step 5 on"), (3, None), (0, None)])
def test_a_schedule_that_ends_before_the_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], decay_steps: int, expected: str | None
) -> None:
    train(tiny_run(tmp_path, train__num_steps=6, optim__decay_steps=decay_steps, train__valid_every_steps=0))
    output = capsys.readouterr().out
    if expected is None:
        assert "the learning rate stays" not in output
    else:
        assert expected in output
        assert "optim.decay_steps=3" in output


def test_adaptive_spans_stay_in_their_range(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "compressive_transformer_adaptive_span", optim__peak_learning_rate=0.7)
    assert train(config) == 0
    spans = torch.cat([tensor for key, tensor in checkpoint_tensors(config).items() if key.endswith(".span")])
    assert spans.min() >= 0
    assert spans.max() <= 1
    assert (spans < 1).any()


def test_a_finished_run_says_so_and_may_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tiny_run(tmp_path)
    assert train(config) == 0
    before = checkpoint_tensors(config)
    assert train(config) == 0
    assert "is finished: 6 steps; nothing to do" in capsys.readouterr().out
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint_tensors(config).items())
    with pytest.raises(UserError, match="has completed 6 already; num_steps may only grow"):
        train(tiny_run(tmp_path, train__num_steps=5))
    longer = tiny_run(tmp_path, train__num_steps=10)
    assert train(longer) == 0
    straight = tiny_run(tmp_path, name="straight", train__num_steps=10)
    assert train(straight) == 0
    assert largest_difference(weights(longer), weights(straight)) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__num_lanes": 4}, r"data\.num_lanes \(was 2, now 4\)"),
        ({"data__chunk_length": 32}, r"data\.chunk_length"),
        ({"data__reset_memory_at_document": True}, r"data\.reset_memory_at_document"),
        ({"model__width": 24}, r"model\.width \(was 16, now 24\)"),
        ({"optim__peak_learning_rate": 0.5}, r"optim\.peak_learning_rate"),
        ({"optim__update_period": {0: 2}}, r"optim\.update_period"),
        ({"train__seed": 5}, r"train\.seed"),
        ({"train__precision": "float32"}, r"train\.precision"),
        ({"train__valid_codes": 32}, r"train\.valid_codes"),
    ],
)
def test_a_changed_key_is_named(run_of_six_steps: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        train(tiny_run(run_of_six_steps, **changes))


def test_other_codes_in_the_same_place(run_of_six_steps: Path):
    write_corpus(run_of_six_steps / "other", seed=9)
    (run_of_six_steps / "corpus").rename(run_of_six_steps / "before")
    (run_of_six_steps / "other").rename(run_of_six_steps / "corpus")
    try:
        with pytest.raises(UserError, match=r"data\.corpus = .* holds other codes"):
            train(tiny_run(run_of_six_steps, train__num_steps=8))
    finally:
        (run_of_six_steps / "corpus").rename(run_of_six_steps / "other")
        (run_of_six_steps / "before").rename(run_of_six_steps / "corpus")


def test_the_same_corpus_in_another_place_or_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What decides is the fingerprint, not the path."""
    first = tiny_run(tmp_path, train__num_steps=2, **QUIET)
    assert train(first) == 0
    (tmp_path / "corpus").rename(tmp_path / "moved")
    config = tiny_run(tmp_path, train__num_steps=3, data__corpus=str(tmp_path / "corpus" / "gone"), **QUIET)
    with pytest.raises(UserError, match=r"is not there .* add data\.corpus=DIR to the command"):
        train(config)
    for num_steps, place in enumerate([str(tmp_path / "moved"), "moved", "./moved", "x/../moved/"], start=3):
        (tmp_path / "x").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path)
        assert train(tiny_run(tmp_path, train__num_steps=num_steps, data__corpus=place, **QUIET)) == 0
    straight = tiny_run(tmp_path, name="straight", train__num_steps=6, data__corpus="moved", **QUIET)
    assert train(straight) == 0
    assert largest_difference(weights(first), weights(straight)) == 0.0


def test_with_dropout_micro_batches_may_not_change(tmp_path: Path):
    """Each part draws its own numbers; without dropout the result is the same, so they may."""
    for dropout in (0.0, 0.1):
        changes = {"name": f"run{dropout}", "model__dropout": dropout, **QUIET}
        assert train(tiny_run(tmp_path, train__num_steps=2, **changes)) == 0
        config = tiny_run(tmp_path, train__num_steps=4, train__num_micro_batches=2, **changes)
        if not dropout:
            assert train(config) == 0
            continue
        with pytest.raises(UserError, match=r"train\.num_micro_batches \(was 1, now 2\)"):
            train(config)


def test_what_does_not_fit_is_refused_before_anything_is_trained(tmp_path: Path):
    for changes, message in [
        ({"model__vocab_size": 32}, "model.vocab_size = 32, but the corpus .* codec of 256 codes"),
        ({"data__num_lanes": 100}, "the split has 1000 codes; 100 lanes of a chunk of 16 need at least 1600"),
        ({"train__num_steps": 7, "optim__update_period": {0: 4}}, "write train.num_steps=8"),
        ({"data__corpus": str(tmp_path / "nowhere")}, "is no prepared corpus"),
        ({"train__device": "cuda"}, "no usable CUDA device"),
    ]:
        if "train__device" in changes and torch.cuda.is_available():
            continue
        with pytest.raises(UserError, match=message):
            train(tiny_run(tmp_path, **changes))
    assert not (tmp_path / "runs" / "run" / "checkpoints").exists()


def test_a_second_trainer_of_one_run_is_refused(tmp_path: Path):
    config = tiny_run(tmp_path)
    config.run_dir.mkdir(parents=True)
    with hold_alone(config.run_dir / "train.lock", "x"), pytest.raises(UserError, match="another process is training"):
        train(config)
    assert train(config) == 0


def call_at_forward(monkeypatch: pytest.MonkeyPatch, number: int, function: Callable[[Any], Any]) -> None:
    """Pass what the `number`-th training forward returns (nll, memory, auxiliary losses) through `function`."""
    original, calls = ChunkLoss.forward, [0]

    def forward(self: ChunkLoss, *arguments: Any) -> Any:
        calls[0] += 1
        output = original(self, *arguments)
        return function(output) if calls[0] == number else output

    monkeypatch.setattr(ChunkLoss, "forward", forward)


def test_nan_names_step_lane_and_position_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def poison(output: Any) -> Any:
        nll = output[0].clone()
        nll[0, 3:] = math.nan
        return nll, *output[1:]

    config = tiny_run(tmp_path, train__num_micro_batches=2)
    call_at_forward(monkeypatch, 2 * 5 + 2, poison)  # step 6, lane 1, whose segment begins at code 500
    with pytest.raises(
        NonFiniteLossError, match=r"step 6: the loss is nan in lane 1, corpus position 583 .*; the last .*step_00000004"
    ):
        train(config)
    assert checkpoint_state(config)["step"] == 4
    assert folders(config) == ["step_00000003", "step_00000004"]  # best and last: step 5 was finite
    assert all(tensor.isfinite().all() for tensor in weights(config).values())


def test_an_infinite_auxiliary_loss_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def poison(output: Any) -> Any:
        return *output[:2], {name: loss + math.inf for name, loss in output[2].items()}

    call_at_forward(monkeypatch, 3, poison)
    with pytest.raises(NonFiniteLossError, match="step 3: the loss attention_reconstruction/layer_00 is inf"):
        train(tiny_run(tmp_path))


def test_a_nan_gradient_of_a_finite_loss_never_reaches_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def poison(output: Any) -> Any:
        output[0].register_hook(lambda gradient: gradient * math.nan)
        return output

    config = tiny_run(tmp_path, train__checkpoint_every_steps=1)
    call_at_forward(monkeypatch, 3, poison)
    with pytest.raises(NonFiniteLossError, match="step 3: the gradient norm of model is nan") as caught:
        train(config)
    assert "no step from step_00000002 was finite, so it is deleted; the last good checkpoint, step_00000001" in str(
        caught.value
    )
    assert checkpoint_state(config)["step"] == 1
    assert folders(config) == ["step_00000001"]


def folders(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (config.run_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (1e39, r"step 3: not finite after the update: .*; the last good checkpoint, step_00000002, is kept"),
        (1e30, r"step 4: the loss is .*; no step from step_00000003 was finite, .* step_00000002, is kept"),
    ],
)
def test_destroyed_weights_never_replace_good_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, message: str
):
    """The third update destroys them, at a checkpoint each step; what is kept then goes on to the end."""
    changes = {**QUIET, "train__precision": "float32", "train__checkpoint_every_steps": 1}
    config, straight = tiny_run(tmp_path, **changes), tiny_run(tmp_path, name="straight", **changes)
    good = train_module.learning_rate
    monkeypatch.setattr(train_module, "learning_rate", lambda step, optim: rate if step == 2 else good(step, optim))
    with pytest.raises(NonFiniteLossError, match=message):
        train(config)
    assert folders(config) == ["step_00000002"]
    monkeypatch.undo()
    assert train(config) == train(straight) == 0
    assert largest_difference(weights(config), weights(straight)) == 0.0
    assert folders(config) == ["step_00000005", "step_00000006"]  # nothing has said yet that the last one is good


@pytest.mark.parametrize("place", ["memory", "optimizer"])
def test_what_else_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    save = train_module._save

    def spoil(session: Any, *, is_best: bool) -> None:
        if session.progress.step == 4:
            parts = {
                "memory": next(t for _, t in named_tensors(session.memories[0])),
                "optimizer": next(iter(session.optimizer.state.values()))["exp_avg"] if session.progress.step else None,
            }
            tensor = parts[place]
            assert tensor is not None
            tensor[0] = math.inf
        save(session, is_best=is_best)

    monkeypatch.setattr(train_module, "_save", spoil)
    config = tiny_run(tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"step 4: not finite after the update: .*step_00000003, is kept"):
        train(config)
    assert folders(config) == ["step_00000003"]


def test_a_checkpoint_of_an_earlier_session_that_has_not_held_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed right after the checkpoint of step 4, resumed, and NaN in step 5."""

    def kill(_output: Any) -> Any:
        raise KeyboardInterrupt

    config = tiny_run(tmp_path, **QUIET)
    with monkeypatch.context() as patch:
        call_at_forward(patch, 5, kill)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert folders(config) == ["step_00000002", "step_00000004"]
    with monkeypatch.context() as patch:
        call_at_forward(patch, 1, lambda output: (output[0] * math.nan, *output[1:]))
        with pytest.raises(NonFiniteLossError, match=r"step 5: .*step_00000002, is kept"):
            train(config)
    assert folders(config) == ["step_00000002"]


def test_a_run_that_never_held_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    call_at_forward(monkeypatch, 1, lambda output: (output[0] * math.nan, *output[1:]))
    with pytest.raises(NonFiniteLossError, match="step_00000000 is kept, but no step from it has been finite"):
        train(tiny_run(tmp_path))


def test_metrics_stay_json_when_an_update_of_several_steps_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    call_at_forward(monkeypatch, 3, lambda output: (output[0] * math.nan, *output[1:]))
    config = tiny_run(tmp_path, optim__update_period={0: 2, 2: 4})
    with pytest.raises(NonFiniteLossError, match="step 3: the loss is nan"):
        train(config)
    assert [line["step"] for line in read_metrics(config.run_dir)] == [1, 2]
    assert "NaN" not in (config.run_dir / "metrics.jsonl").read_text()


def test_a_run_without_symbolic_links_locks_and_synced_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As on a mounted cloud drive: it trains, resumes and equals a run on a usual disk."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    sync = os.fsync
    monkeypatch.setattr("os.symlink", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("os.fsync", lambda handle: refuse() if os.path.isdir(f"/dev/fd/{handle}") else sync(handle))
    config = tiny_run(tmp_path, train__num_steps=4)
    assert train(config) == 0
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert warning.startswith("warning: cannot lock ")
    config = tiny_run(tmp_path)
    assert train(config) == 0
    assert not any(path.is_symlink() for path in config.run_dir.rglob("*"))
    monkeypatch.undo()
    straight = tiny_run(tmp_path, name="straight")
    assert train(straight) == 0
    found = [
        load_file(find_checkpoint(run.run_dir, "last") / "model.safetensors")  # type: ignore[operator]
        for run in (config, straight)
    ]
    assert largest_difference(*found) == 0.0


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_after_the_update_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    def interrupt(output: Any) -> Any:
        os.kill(os.getpid(), number)
        return output

    changes = {"optim__update_period": {0: 3}, "train__checkpoint_every_steps": 100}
    config, straight = tiny_run(tmp_path, **changes), tiny_run(tmp_path, name="straight", **changes)
    with monkeypatch.context() as patch:
        call_at_forward(patch, 2, interrupt)
        before = signal.getsignal(number)
        assert train(config) == 128 + number
        assert signal.getsignal(number) == before
    assert checkpoint_state(config)["step"] == 3  # the update of steps 0 to 2
    assert train(config) == train(straight) == 0
    assert largest_difference(weights(config), weights(straight)) == 0.0
    curves = [
        [line["nll/valid_nats"] for line in read_metrics(c.run_dir) if "nll/valid_nats" in line]
        for c in (config, straight)
    ]
    assert curves[0] == curves[1]  # the validation at step 3, put off by the signal, was made up for
    assert len(curves[0]) == 2


def test_a_signal_breaks_off_the_validation_of_the_whole_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_run(tmp_path, train__valid_every_steps=100, train__valid_codes=16)
    whole = train_module._validate_whole_split

    def interrupted(session: Any) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(session)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_validate_whole_split", interrupted)
        assert train(config) == 143
    assert not any("nll/valid_full_nats" in line for line in read_metrics(config.run_dir))
    assert train(config) == 0
    assert sum("nll/valid_full_nats" in line for line in read_metrics(config.run_dir)) == 1


def test_the_validation_of_the_whole_split_can_be_off_and_made_up_for(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train__validate_whole_split=False)
    assert train(config) == 0
    assert [line["step"] for line in read_metrics(config.run_dir) if "nll/valid_nats" in line] == [3, 6]
    assert not any("nll/valid_full_nats" in line for line in read_metrics(config.run_dir))
    assert train(dataclasses.replace(config, train=dataclasses.replace(config.train, validate_whole_split=True))) == 0
    assert sum("nll/valid_full_nats" in line for line in read_metrics(config.run_dir)) == 1


def test_the_tool_ends_with_one_line_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tool = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "train.py"))
    path = tmp_path / "run.yaml"
    path.write_text(config_to_yaml(tiny_run(tmp_path, **QUIET)))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        status = run_tool(tool["main"])
        output, errors = capsys.readouterr()
        return status, output, errors

    status, _, errors = run(str(path), "train.num_stesp=2")
    assert (status, errors.count("\n")) == (2, 1)
    assert "did you mean num_steps" in errors
    status, output, errors = run(str(path), "train.num_steps=2", "train.log_every_steps=2")
    assert (status, errors) == (0, "")
    assert output.count("\n") == 2  # what it is, and one log line: no progress bar in a pipe
    assert "step 2/2  nll " in output


@pytest.fixture(scope="module")
def run_of_six_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run; tests must leave it as it is."""
    directory = tmp_path_factory.mktemp("six_steps")
    assert train(tiny_run(directory, **QUIET)) == 0
    return directory
