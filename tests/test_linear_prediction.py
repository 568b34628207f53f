"""Linear prediction: its loop against a double loop and against least squares in closed form, its distribution against
exact arithmetic and the codec, its covariance after long silence, and its run in the trainer.
"""

import json
import math
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from jaxtyping import Float64, Int
from safetensors.torch import load_file
from tiny_runs import checkpoint_tensors, tiny_run, write_corpus

from ct_audio.common.errors import UserError
from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import open_corpus
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.models.linear_prediction import Config, LinearPrediction, mu_law_cells
from ct_audio.models.state import map_memory
from ct_audio.runs.config import load_config
from ct_audio.runs.metrics import read_metrics
from ct_audio.runs.open_run import load_run_model
from ct_audio.training import loop as train_module
from ct_audio.training.loop import train
from ct_audio.training.session import Session

WAVEFORM = torchaudio.functional.mu_law_decoding(torch.arange(256, dtype=torch.float64), 256).numpy()


def make(**changes: Any) -> LinearPrediction:
    return LinearPrediction(Config(**({"order": 5, "forgetting": 0.97, "regularisation": 1e-4} | changes)))


def speech_like_codes(length: int, *, seed: int = 0) -> Int[np.ndarray, " T"]:
    """A resonance that swells and fades, with noise: loud, quiet, and at full scale."""
    noise = np.random.default_rng(seed).normal(size=length + 2)
    waveform = np.zeros(length + 2)
    for t in range(2, length + 2):
        waveform[t] = 1.6 * waveform[t - 1] - 0.8 * waveform[t - 2] + 0.4 * noise[t]
    waveform *= 1.2 * np.abs(np.sin(np.arange(length + 2) / 40.0)) ** 3
    return MuLaw().encode(waveform[2:].astype(np.float32)).astype(np.int64)


def features_of(model: LinearPrediction, codes: Int[np.ndarray, " T"]) -> Float64[np.ndarray, "T 2"]:
    return model(torch.from_numpy(codes[None]), model.zero_memory(1)).features[0].numpy()


def double_loop(codes: list[int], config: Config) -> list[tuple[float, float]]:
    """Oracle: recursive least squares on Python's lists, a weight at a time, with torchaudio's samples."""
    order, forgetting = config.order, config.forgetting
    past, weights, residual = [0.0] * order, [0.0] * order, 0.01
    covariance = [[0.0] * order for _ in range(order)]
    for i in range(order):
        covariance[i][i] = (1 - forgetting) / config.regularisation
    said = []
    for t, code in enumerate(codes):
        sample, prediction = float(WAVEFORM[code]), sum(w * x for w, x in zip(weights, past, strict=True))
        clipped = max(-1.0, min(1.0, prediction))
        residual = config.scale_decay * residual + (1 - config.scale_decay) * abs(sample - clipped)
        unit = [0.0] * order
        unit[t % order] = math.sqrt(order * config.regularisation)
        for row, target, factor in ((past, sample, forgetting), (unit, 0.0, 1.0)):  # a measurement; a regularisation
            along = [sum(covariance[i][j] * row[j] for j in range(order)) for i in range(order)]
            variance = factor + sum(row[i] * along[i] for i in range(order))
            error = target - sum(weights[i] * row[i] for i in range(order))
            for i in range(order):
                weights[i] += along[i] * error / variance
                for j in range(order):
                    covariance[i][j] = (covariance[i][j] - along[i] * along[j] / variance) / factor
        past = [sample, *past[:-1]]
        mean = max(-1.0, min(1.0, sum(w * x for w, x in zip(weights, past, strict=True))))
        said.append((mean, max(residual / (2 * math.log(2)), 1e-5)))
    return said


@pytest.mark.parametrize("changes", [{}, {"order": 1}, {"scale_decay": 0.5, "forgetting": 0.9}], ids=str)
def test_equals_double_loop(changes: dict[str, Any]) -> None:
    model, codes = make(**changes), speech_like_codes(300)
    assert (codes.min(), codes.max()) == (0, 255)
    np.testing.assert_allclose(features_of(model, codes), double_loop(codes.tolist(), model.config), rtol=0, atol=1e-12)


def test_weights_are_those_of_least_squares_with_regularisation() -> None:
    """The closed form that the class states: normal equations over all samples so far, solved anew at each of some."""
    model, codes = make(), speech_like_codes(200)
    order, forgetting, regularisation = 5, model.config.forgetting, model.config.regularisation
    padded = np.r_[np.zeros(order), WAVEFORM[codes]]
    for length in (1, 3, 50, 199):
        matrix = np.eye(order) * regularisation / (1 - forgetting) * forgetting**length
        vector = np.zeros(order)
        for t in range(length):
            past, weight = padded[t : t + order][::-1], forgetting ** (length - 1 - t)
            matrix += weight * (np.outer(past, past) + order * regularisation * np.diag(np.arange(order) == t % order))
            vector += weight * padded[t + order] * past
        memory = model(torch.from_numpy(codes[None, :length]), model.zero_memory(1)).memory
        np.testing.assert_allclose(memory.weights[0].numpy(), np.linalg.solve(matrix, vector), rtol=0, atol=1e-10)
        np.testing.assert_allclose(memory.covariance[0].numpy() @ matrix, np.eye(order), rtol=0, atol=1e-9)


def square_wave(half_period: int, length: int) -> Int[np.ndarray, " T"]:
    return np.where(np.arange(length) // half_period % 2, 0, 255)


HARD_SIGNALS = {
    "a million zeros": lambda: np.full(10**6, 128),
    "square wave at full scale": lambda: square_wave(37, 10**6),
    "fastest square wave": lambda: square_wave(1, 10**5),
    "held at full scale": lambda: np.full(10**5, 255),
    "bursts": lambda: np.where(np.arange(10**5) // 10_000 % 2, square_wave(7, 10**5), 128),
    "noise": lambda: np.random.default_rng(0).integers(0, 256, 10**5),
}


@pytest.mark.parametrize("name", HARD_SIGNALS)
def test_covariance_stays_bounded_and_positive(name: str) -> None:
    """Seconds of each, with the defaults; then the model still predicts speech-like sound as well as a fresh one."""
    model, config = LinearPrediction(Config()), Config()
    forgetting, order, regularisation = config.forgetting, config.order, config.regularisation
    most = (1 - forgetting**order) / (order * regularisation * forgetting ** (order - 1))
    least = 1 / (order / (1 - forgetting) + order * regularisation / (1 - forgetting**order))
    memory = model.zero_memory(1)
    for piece in np.array_split(HARD_SIGNALS[name](), 20):
        features, memory, _ = model(torch.from_numpy(piece[None]), memory)
        assert features.isfinite().all()
        assert features[..., 0].abs().max() <= 1
        covariance = memory.covariance[0].numpy()
        assert np.array_equal(covariance, covariance.T)
        eigenvalues = np.linalg.eigvalsh(covariance)
        assert 0.999 * least <= eigenvalues[0]
        assert eigenvalues[-1] <= 1.001 * most
    codes = torch.from_numpy(speech_like_codes(24_000)[None])
    later, fresh = (
        model.nll(model(codes, start).features[:, 2000:-1], codes[:, 2001:]).mean().item()
        for start in (memory, model.zero_memory(1))
    )
    assert later == pytest.approx(fresh, abs=0.01)


def test_digital_silence_costs_next_to_nothing_and_a_click_in_it_is_possible() -> None:
    model = LinearPrediction(Config())
    codes = torch.full((1, 5000), 128)
    features = model(codes, model.zero_memory(1)).features
    assert model.nll(features[:, -1], codes[:, -1]).item() < 0.01
    assert model.nll(features[:, -1], torch.tensor([0])).item() == pytest.approx(-math.log(1e-4 / 256), abs=1e-6)


def test_cells_are_the_codecs() -> None:
    """Just above an edge the codec says the upper code, just below the lower one; samples are its own."""
    lower, upper, waveform = mu_law_cells(256)
    np.testing.assert_allclose(waveform, WAVEFORM, rtol=0, atol=1e-15)
    np.testing.assert_allclose(waveform, MuLaw().decode(np.arange(256)), rtol=0, atol=3e-7)  # float32
    edges = upper[:-1]
    assert np.array_equal(edges, lower[1:])
    assert (lower[0], upper[-1]) == (-np.inf, np.inf)
    width = np.diff(waveform)
    codes = np.arange(255)
    assert np.array_equal(MuLaw().encode((edges - 0.01 * width).astype(np.float32)), codes)
    assert np.array_equal(MuLaw().encode((edges + 0.01 * width).astype(np.float32)), codes + 1)


def exact_log_probability(mean: float, scale: float, code: int, share: float) -> float:
    """Oracle: the definition in decimal numbers of 400 digits, end cells taking the tails."""
    lower, upper, _ = mu_law_cells(256)
    with localcontext() as context:
        context.prec = 400

        def logistic(edge: float) -> Decimal:
            if math.isinf(edge):
                return Decimal(edge > 0)
            return 1 / (1 + (-(Decimal(edge) - Decimal(mean)) / Decimal(scale)).exp())

        cell = logistic(float(upper[code])) - logistic(float(lower[code]))
        return float(((1 - Decimal(share)) * cell + Decimal(share) / 256).ln())


@pytest.mark.parametrize("share", [1e-4, 1e-300], ids=["as configured", "logistic alone"])
@pytest.mark.parametrize("scale", [1e-3, 0.02, 1.4])
@pytest.mark.parametrize("mean", [-1.0, 1e-4, 0.3])
def test_log_probabilities_are_exact_in_the_tails(mean: float, scale: float, share: float) -> None:
    model = make(uniform_share=share)
    features = torch.tensor([[mean, scale]], dtype=torch.float64)
    found = model.log_probabilities(features)[0]
    codes = torch.tensor([0, 1, 60, 127, 128, 200, 254, 255])
    expected = [exact_log_probability(mean, scale, int(code), share) for code in codes]
    np.testing.assert_allclose(found[codes].numpy(), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(model.nll(features.expand(8, 2), codes), -found[codes])
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("mean", [-1.0, -0.01, 0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 2.0])
def test_every_code_is_always_possible(mean: float, scale: float) -> None:
    probabilities = LinearPrediction(Config()).log_probabilities(torch.tensor([mean, scale], dtype=torch.float64)).exp()
    assert probabilities.min() >= 0.99e-4 / 256
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)


def test_fit_is_the_autocorrelation_method_and_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = speech_like_codes(5000)
    model, again = make(adaptation="none"), make(adaptation="none")
    model.fit(codes.astype(np.uint8))
    monkeypatch.setattr("ct_audio.models.linear_prediction._FIT_PIECE", 777)
    again.fit(codes.astype(np.uint8))
    assert torch.equal(again.coefficients, model.coefficients)
    assert again.mean_residual.item() == pytest.approx(model.mean_residual.item(), rel=1e-12)
    waveform = WAVEFORM[codes]
    sums = [float((waveform[lag:] * waveform[: len(waveform) - lag]).sum()) for lag in range(6)]
    matrix = np.array([[sums[abs(i - j)] + (i == j) * len(codes) * 1e-4 for j in range(5)] for i in range(5)])
    np.testing.assert_allclose(model.coefficients.numpy(), np.linalg.solve(matrix, sums[1:]), rtol=0, atol=1e-12)
    means = np.r_[0.0, features_of(model, codes)[:-1, 0]]
    assert model.mean_residual.item() == pytest.approx(float(np.abs(waveform - means).mean()), rel=1e-12)


def test_fixed_weights_say_what_they_say_and_the_scale_may_be_fixed() -> None:
    codes = speech_like_codes(2000)
    model = make(adaptation="none", scale_decay=1.0)
    model.fit(codes)
    features = features_of(model, codes)
    padded = np.r_[np.zeros(4), WAVEFORM[codes]]
    weights = model.coefficients.numpy()
    expected = [float(np.clip(weights @ padded[t : t + 5][::-1], -1, 1)) for t in range(len(codes))]
    np.testing.assert_allclose(features[:, 0], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(features[:, 1], model.mean_residual.item() / (2 * math.log(2)), rtol=1e-15)


def test_what_adapts_needs_no_fit() -> None:
    model = make()
    before = features_of(model, speech_like_codes(100))
    model.fit(speech_like_codes(100, seed=1))
    assert np.array_equal(features_of(model, speech_like_codes(100)), before)
    with pytest.raises(UserError, match="more than 10 codes to fit, got 10"):
        make(adaptation="none").fit(np.full(10, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_float64_whatever_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    codes = speech_like_codes(300)
    for changes in ({}, {"adaptation": "none"}):
        model, exact = make(**changes), make(**changes)
        for one in (model, exact):
            one.fit(codes)
        model.to(dtype)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), exact.buffers(), strict=True))
        inputs = torch.from_numpy(codes[None])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(inputs, model.zero_memory(1))
            nll = model.nll(output.features, inputs)
        assert {tensor.dtype for tensor in output.memory} == {torch.float64, torch.int64}
        assert torch.equal(nll, exact.nll(exact(inputs, exact.zero_memory(1)).features, inputs))


def test_a_document_start_ends_even_nan() -> None:
    model, codes = make(), torch.from_numpy(speech_like_codes(12)[None])
    starts = torch.zeros_like(codes, dtype=torch.bool)
    starts[:, 3] = True
    _, memory, _ = model(codes, model.zero_memory(1))
    poisoned = map_memory(lambda tensor: tensor * math.nan, memory)._replace(count=memory.count)
    output = model(codes, poisoned, document_starts=starts)
    assert output.features[:, :3].isnan().all()
    assert output.features[:, 3:].isfinite().all()
    assert all(tensor.isfinite().all() for tensor in output.memory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 3}, "model.vocab_size: expected at least 4, got 3"),
        ({"order": 0}, "model.order: expected at least 1, got 0"),
        ({"forgetting": 1.0}, r"model.forgetting: expected a number in \(0, 1\), got 1.0"),
        ({"uniform_share": 0.0}, r"model.uniform_share: expected a number in \(0, 1\), got 0.0"),
        ({"regularisation": 0.0}, "model.regularisation: expected a number above 0, got 0.0"),
        ({"regularisation": math.inf}, "model.regularisation"),
        ({"scale_decay": 1.1}, r"model.scale_decay: expected a number in \[0, 1\], got 1.1"),
        ({"scale_decay": math.nan}, "model.scale_decay"),
    ],
    ids=str,
)
def test_configuration_errors_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**changes)


def test_memory_of_other_lanes_is_refused() -> None:
    model, codes = make(), torch.full((2, 4), 128)
    with pytest.raises(UserError, match="expected a memory of shapes"):
        model(codes, model.zero_memory(3))
    with pytest.raises(UserError, match="expected a memory of shapes"):
        model.begin_steps(make(adaptation="none").zero_memory(2), codes[:, :0])


@pytest.mark.parametrize("name", ["linear_prediction", "linear_prediction_fixed"])
def test_the_trainer_writes_its_checkpoint_and_stops(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"train__sample_every_steps": 6, "train__sample_seconds": 0.001}
    config = tiny_run(tmp_path, name, train__precision="float32", **changes)
    assert train(config) == 0
    lines = read_metrics(config.run_dir)
    valid = [(line["step"], line["nll/valid_nats"]) for line in lines if "nll/valid_nats" in line]
    assert [step for step, _ in valid] == [1, 6]
    corpus = open_corpus(config.data.corpus)
    for which, tag, num_codes in (("best", "nll/valid_nats", 48), ("last", "nll/valid_full_nats", None)):
        loaded = load_run_model(config.run_dir, which=which)
        assert loaded.step == 6
        codes = corpus.split("valid").codes
        score = evaluate_nll(loaded.model, Stretch(codes[:num_codes], 128, 16))
        assert {line[tag] for line in lines if tag in line} == {score.nll_nats}
    assert lines[-1]["nll/valid_full_bits"] == pytest.approx(lines[-1]["nll/valid_full_nats"] / math.log(2))
    expected = LinearPrediction(config.model)
    expected.fit(corpus.split("train").codes)
    found = load_file(config.run_dir / "checkpoints/last/model.safetensors")
    assert found.keys() == dict(expected.state_dict()).keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.state_dict().items())
    assert len(list((config.run_dir / "samples").iterdir())) == 1
    capsys.readouterr()
    assert train(config) == 0
    assert "is finished: 6 steps; nothing to do" in capsys.readouterr().out
    assert read_metrics(config.run_dir) == lines


def test_a_longer_run_lengthens_the_line(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "linear_prediction_fixed")
    assert train(config) == 0
    before = checkpoint_tensors(config)
    longer = tiny_run(tmp_path, "linear_prediction_fixed", train__num_steps=9)
    assert train(longer) == 0
    after = checkpoint_tensors(longer)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if key.startswith("model."))
    lines = [line for line in read_metrics(config.run_dir) if "nll/valid_nats" in line]
    assert [line["step"] for line in lines] == [1, 6, 9]
    assert len({line["nll/valid_nats"] for line in lines}) == 1
    state = json.loads((config.run_dir / "checkpoints/best/state.json").read_text())
    assert state["step"] == 9


def test_killed_before_its_checkpoint_it_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def kill(_session: Session, *, is_best: bool) -> None:
        raise Killed

    config = tiny_run(tmp_path, "linear_prediction_fixed")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_save", kill)
        with pytest.raises(Killed):
            train(config)
    assert train(config) == 0
    assert [line["step"] for line in read_metrics(config.run_dir)] == [1, 6, 6]
    straight = tiny_run(tmp_path, "linear_prediction_fixed", name="straight")
    assert train(straight) == 0
    assert all(
        torch.equal(tensor, checkpoint_tensors(straight)[key]) for key, tensor in checkpoint_tensors(config).items()
    )


def test_it_is_a_better_guess_than_the_codes_frequencies(tmp_path: Path) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "corpus"))
    model = LinearPrediction(Config())
    train_codes, codes = (np.asarray(corpus.split(name).codes) for name in ("train", "valid"))
    shares = (np.bincount(train_codes, minlength=256) + 1) / (len(train_codes) + 256)
    assert evaluate_nll(model, Stretch(codes, 128, 16)).nll_nats < -np.log(shares[codes]).mean()


@pytest.mark.parametrize("recipe", ["folder", "kathleen"])
def test_the_line_of_a_recipe_is_of_the_same_codes_and_steps_as_its_small_set(recipe: str) -> None:
    folder = Path(__file__).parents[1] / "recipes" / recipe
    small = load_config(folder / "wavenet_small.yaml")
    for name in ("linear_prediction", "linear_prediction_fixed"):
        line = load_config(folder / f"{name}.yaml")
        assert line.data == small.data
        assert (line.train.valid_codes, line.train.num_steps) == (small.train.valid_codes, small.train.num_steps)
