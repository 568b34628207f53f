"""Sampling: draws against their definition, determinism, and equality 8: the sampler says what the evaluator says."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from handmade_runs import Patch
from jaxtyping import Float64
from model_cases import every_model
from tiny import tiny_model
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.sampling import estimate, sampler
from ct_audio.sampling.audio_checks import find_faults, measure_sample
from ct_audio.sampling.estimate import estimate_code_seconds
from ct_audio.sampling.sampler import Sampler, draw_codes, verify_steps

START_CODE = 16
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None}


def lively_model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Parameters away from zeros and ones, so that every path matters."""
    model = tiny_model(name).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def sampled(model: Any, *, num_codes: int = 20, **arguments: Any) -> Any:
    """The iterator over codes and log-probabilities."""
    settings: dict[str, Any] = {"num_lanes": 3, "seed": 0, "start_code": START_CODE} | arguments
    return Sampler(model, **settings).run(num_codes)


def collect(model: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Codes [B, T] and log-probabilities [B, T]."""
    return joined(sampled(model, **arguments))


def joined(steps: Any) -> tuple[Tensor, Tensor]:
    pairs = list(steps)
    return torch.stack([codes for codes, _ in pairs], 1), torch.stack([logs for _, logs in pairs], 1)


def evaluator_nll(model: Any, stream: np.ndarray) -> Float64[Tensor, " T"]:
    """NLL of each code of one lane as the evaluator finds it, with whole windows in a forward."""
    parts: list[Tensor] = []
    evaluate_nll(model, Stretch(stream, START_CODE, 16), on_nll=lambda _, nll: parts.append(nll[0].double()))
    return torch.cat(parts)


@pytest.mark.parametrize("prime_length", [0, 21])
@every_model
def test_sampler_equals_evaluator(name: str, prime_length: int) -> None:
    """Equality 8 in float64, over window boundaries, filters on: what is reported is from before them."""
    model = lively_model(name)
    prime = torch.randint(32, (2, prime_length)) if prime_length else None
    num_codes = 9 if prime_length else 25
    codes, log_probabilities = collect(
        model, num_lanes=2, num_codes=num_codes, prime=prime, temperature=1.3, top_k=20, top_p=0.9
    )
    difference = verify_steps(model, codes, log_probabilities, start_code=START_CODE, prime=prime)
    assert difference <= 1e-10
    streams = codes if prime is None else torch.cat([prime, codes], dim=1)
    for lane in range(2):
        expected = evaluator_nll(model, streams[lane].numpy())[prime_length:]
        torch.testing.assert_close(-log_probabilities[lane], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["compressive_transformer", "transformer_xl", "wavenet"])
def test_sampler_equals_evaluator_in_float32(name: str) -> None:
    model = lively_model(name, torch.float32)
    codes, log_probabilities = collect(model, num_lanes=1, num_codes=45)
    expected = evaluator_nll(model, codes[0].numpy())
    assert abs(expected.mean() + log_probabilities.double().mean()) <= 1e-4
    assert verify_steps(model, codes, log_probabilities, start_code=START_CODE) <= 1e-3


def test_verification_finds_a_wrong_code_and_nan() -> None:
    model = lively_model("compressive_transformer")
    codes, log_probabilities = collect(model)
    other = codes.clone()
    other[1, 7] = (other[1, 7] + 1) % 32
    assert verify_steps(model, other, log_probabilities, start_code=START_CODE) > 1e-3
    wrong = log_probabilities.clone()
    wrong[0, 0] += 0.01
    assert verify_steps(model, codes, wrong, start_code=START_CODE) == pytest.approx(0.01, abs=1e-9)
    wrong[0, 0] = math.nan
    assert math.isnan(verify_steps(model, codes, wrong, start_code=START_CODE))


@pytest.mark.parametrize("name", ["compressive_transformer", "wavenet"])
def test_same_seed_same_sample_whatever_is_drawn_ahead(name: str, monkeypatch: Patch) -> None:
    model = lively_model(name, torch.float32)
    codes, log_probabilities = collect(model, seed=7)
    torch.rand(5)  # the global generator has no say
    again, log_probabilities_again = collect(model, seed=7)
    assert torch.equal(codes, again)
    assert torch.equal(log_probabilities, log_probabilities_again)
    monkeypatch.setattr(sampler, "_DRAWS_AHEAD", 7)
    assert torch.equal(codes, collect(model, seed=7)[0])
    longer, _ = collect(model, seed=7, num_codes=23)
    assert torch.equal(longer[:, :20], codes)
    assert not torch.equal(collect(model, seed=8)[0], codes)
    assert len({tuple(row) for row in codes.tolist()}) == len(codes)  # no two lanes alike


@every_model
def test_a_restored_sampler_goes_on_bit_for_bit(name: str) -> None:
    model = tiny_model(name)
    settings: dict[str, Any] = {"num_lanes": 2, "seed": 5, "start_code": START_CODE, "top_p": 0.95}
    settings["prime"] = torch.randint(32, (2, 21))
    first, pieces, states = Sampler(model, **settings), [], []
    for num_codes in (1, 7, 11, 18):  # stops at a window's end and within windows
        pieces.append(joined(first.run(num_codes)))
        leaves = {name: leaf.clone() if isinstance(leaf, Tensor) else leaf for name, leaf in first.leaves().items()}
        states.append((first.num_codes, leaves))
    codes, logs = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    for stop, leaves in states:
        second = Sampler(model, **settings)
        second.restore(leaves)
        if stop < 37:
            rest = joined(second.run(37 - stop))
            assert torch.equal(rest[0], codes[:, stop:])
            assert torch.equal(rest[1], logs[:, stop:])
        assert second.num_codes == 37


def test_lanes_draw_from_their_own_generators() -> None:
    uniforms = sampler._LaneUniforms(3, 2, torch.device("cpu"))
    found = torch.stack([uniforms.next(1)[:, 0] for _ in range(5000)], 1)
    for lane in range(2):
        word = int(np.random.SeedSequence((3, lane)).generate_state(1, np.uint32)[0])
        expected = torch.rand(5000, generator=torch.Generator().manual_seed(word), dtype=torch.float64)
        assert torch.equal(found[lane], expected)


def test_a_prime_of_any_length_equals_stepping_through_it() -> None:
    model = lively_model("compressive_transformer")
    prime = torch.randint(32, (2, 8 * 2 + 3))
    for length in (1, 8, 19):
        codes, log_probabilities = collect(model, num_lanes=2, num_codes=6, prime=prime[:, :length])
        with torch.no_grad():
            state = model.begin_steps(model.zero_memory(2), torch.zeros(2, 0, dtype=torch.int64))
            inputs = torch.cat([torch.full((2, 1), START_CODE), prime[:, :length], codes], dim=1)
            for index in range(length + 6):
                features, state = model.step(inputs[:, index], state)
                if index >= length:
                    nll = model.nll(features, inputs[:, index + 1])
                    torch.testing.assert_close(-log_probabilities[:, index - length], nll, rtol=0, atol=1e-11)


def test_long_primes_go_through_in_pieces(monkeypatch: Patch) -> None:
    prime = torch.randint(32, (2, 37))
    for name in ("compressive_transformer", "wavenet"):
        model = lively_model(name)
        whole = collect(model, num_lanes=2, prime=prime)
        monkeypatch.setattr(sampler, "_PIECE_LENGTH", 16)
        pieces = collect(model, num_lanes=2, prime=prime)
        monkeypatch.undo()
        assert torch.equal(whole[0], pieces[0])
        torch.testing.assert_close(whole[1], pieces[1], rtol=0, atol=1e-12)


def reference_draw(
    log_probabilities: list[float], u: float, temperature: float, top_k: int | None, top_p: float
) -> int:
    """Oracle with Python lists: rank, keep, renormalise, walk along the cumulative distribution."""
    ranked = sorted(range(len(log_probabilities)), key=lambda code: -log_probabilities[code])
    weights = {code: math.exp(log_probabilities[code] / temperature) for code in ranked}
    kept = ranked if top_k is None else ranked[:top_k]
    total, nucleus, mass = sum(weights[code] for code in kept), [], 0.0
    for code in kept:
        if mass >= top_p * total:
            break
        nucleus.append(code)
        mass += weights[code]
    total, walked = sum(weights[code] for code in nucleus), 0.0
    for code in sorted(nucleus):
        walked += weights[code]
        if u * total < walked:
            return code
    return max(nucleus)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 12])
@pytest.mark.parametrize("top_p", [0.01, 0.6, 1.0])
def test_draws_equal_the_reference(temperature: float, top_k: int | None, top_p: float) -> None:
    logs = (2 * torch.randn(200, 12, dtype=torch.float64)).log_softmax(-1)
    uniforms = torch.rand(200, dtype=torch.float64)
    found = draw_codes(logs, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = [
        reference_draw(row, u, temperature, top_k, top_p)
        for row, u in zip(logs.tolist(), uniforms.tolist(), strict=True)
    ]
    assert found.tolist() == expected


def test_draws_have_the_probabilities_asked_for() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    count = 40_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # evenly spaced: no chance in the test
    codes = draw_codes(probabilities.log().expand(count, -1), uniforms, **PLAIN)
    assert torch.bincount(codes, minlength=5).tolist() == [20_000, 0, 12_000, 8_000, 0]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_impossible_codes_never_come(u: float) -> None:
    logs = torch.full((1, 256), -math.inf)
    logs[0, 100:103] = math.log(1 / 3)
    uniforms = torch.tensor([u], dtype=torch.float64)
    assert 100 <= draw_codes(logs, uniforms, **PLAIN).item() <= 102
    assert 100 <= draw_codes(logs, uniforms, temperature=0.01, top_k=200, top_p=0.99999).item() <= 102


def test_ties_keep_exactly_k_codes_and_cold_is_greedy() -> None:
    logs = torch.full((64, 8), math.log(1 / 8), dtype=torch.float64)
    uniforms = torch.linspace(0, 0.999, 64, dtype=torch.float64)
    assert set(draw_codes(logs, uniforms, temperature=1.0, top_k=3, top_p=None).tolist()) == {0, 1, 2}
    assert set(draw_codes(logs, uniforms, temperature=1.0, top_k=None, top_p=0.5).tolist()) == {0, 1, 2, 3}
    logs = torch.randn(64, 8, dtype=torch.float64).log_softmax(-1)
    greedy = logs.argmax(-1)
    for temperature in (0.0, 1e-300, 1e-6):
        assert torch.equal(draw_codes(logs, uniforms, temperature=temperature, top_k=None, top_p=None), greedy)


def test_model_and_caller_are_left_as_they_were() -> None:
    model = tiny_model("compressive_transformer", dropout=0.5).train()
    iterator = sampled(model, num_codes=5)
    next(iterator)
    assert not torch.is_inference_mode_enabled()
    iterator.close()
    assert model.training
    first, _ = collect(model)
    assert torch.equal(first, collect(model)[0])  # no dropout
    assert model.training
    assert list(sampled(model, num_codes=0)) == []


def test_nan_is_reported_with_its_lane() -> None:
    model = tiny_model("wavenet")
    with torch.no_grad():
        next(model.parameters())[:] = math.nan
    with pytest.raises(UserError, match="not finite at code 0 of lane 0"):
        collect(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top-k: expected 1 to 32"),
        ({"top_k": 33}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.5}, "top-p"),
        ({"seed": -1}, "seed"),
        ({"num_lanes": 0}, "at least one lane"),
        ({"num_codes": -1}, "negative"),
        ({"start_code": 32}, "start_code"),
        ({"prime": torch.full((3, 4), 32)}, "prime: expected codes"),
        ({"prime": torch.zeros(2, 4, dtype=torch.int64)}, "a row for each of 3 lanes"),
    ],
)
def test_arguments_are_checked_before_the_first_code(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampled(tiny_model("wavenet"), **changes)


def test_estimate_is_a_plausible_time() -> None:
    seconds, spread = estimate_code_seconds(tiny_model("wavenet"), num_lanes=2, budget_seconds=0.05, stepper="eager")
    assert 1e-6 < seconds < 1
    assert spread is None
    seconds, spread = estimate_code_seconds(tiny_model("compressive_transformer"), num_lanes=2, budget_seconds=0.05)
    assert 1e-6 < seconds < 1
    assert spread is not None
    assert (spread.num_threads, spread.kept_in) == (1, None)
    assert spread.lanes_together in (1, 2)


class Clock:
    """In place of the real one: a block costs so much for itself, and for its codes what the spread makes of it."""

    def __init__(self, monkeypatch: Patch, *, block_seconds: float, code_seconds: dict[tuple[int, int], float]) -> None:
        self.now, self.calls = 0.0, 0
        sample_block = Sampler._sample_block

        def slow(one: Sampler, uniforms: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            spread = (one.num_threads or 1, one.lanes_together or 1)
            self.now += block_seconds + uniforms.shape[1] * code_seconds[spread]
            return sample_block(one, uniforms)

        monkeypatch.setattr(Sampler, "_sample_block", slow)
        fake = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(sampler, "time", fake)
        monkeypatch.setattr(estimate, "time", fake)


@pytest.mark.parametrize("codes_per_second", [300.0, 24_000.0, 200_000.0])
def test_estimate_is_within_a_fifth_of_what_it_takes(codes_per_second: float, monkeypatch: Patch) -> None:
    clock = Clock(monkeypatch, block_seconds=1e-4, code_seconds={(1, 1): 1 / codes_per_second})
    model, num_codes = tiny_model("wavenet").float(), 24_000
    seconds, _ = estimate_code_seconds(model, num_lanes=1, max_codes=max(256, 16 + num_codes // 50))
    began = clock.now
    list(Sampler(model, num_lanes=1, seed=0, start_code=0).blocks(num_codes))
    assert seconds * num_codes == pytest.approx(clock.now - began, rel=0.2)


def test_the_best_spread_is_measured_once_and_kept(tmp_path: Path, monkeypatch: Patch) -> None:
    """More threads must be worth it; another number of lanes is measured anew; damage is not believed."""
    torch_threads, model = torch.get_num_threads(), tiny_model("wavenet").float()
    monkeypatch.setenv("CT_AUDIO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ways = {(threads, together): 1e-3 / together**0.5 for threads in (1, 2) for together in (1, 2, 4)}
    clock = Clock(monkeypatch, block_seconds=1e-5, code_seconds=ways | {(2, 2): 0.49e-3})
    for _ in range(2):
        before = clock.calls
        _, spread = estimate_code_seconds(model, num_lanes=4, max_codes=64)
        assert spread == (1, 4, tmp_path / "cache" / "sampling.json")  # 2 threads are 2% faster
        calls = clock.calls - before
    content = read_json(tmp_path / "cache" / "sampling.json")
    assert list(content.values()) == [[1, 4]]
    clock = Clock(monkeypatch, block_seconds=1e-5, code_seconds=ways | {(2, 2): 0.2e-3})
    assert estimate_code_seconds(model, num_lanes=4, max_codes=64)[1][:2] == (1, 4)  # type: ignore[index]
    assert estimate_code_seconds(model, num_lanes=5, max_codes=64)[1][:2] == (2, 2)  # type: ignore[index]
    assert clock.calls > 2 * calls
    for damaged in ('{"a": 1}', "[", '{"a": [0, 1]}'):
        (tmp_path / "cache" / "sampling.json").write_text(damaged, encoding="utf-8")
        assert estimate_code_seconds(model, num_lanes=4, max_codes=64)[1][:2] == (2, 2)  # type: ignore[index]
    monkeypatch.setenv("CT_AUDIO_CACHE_DIR", "/dev/null")
    assert estimate_code_seconds(model, num_lanes=4, max_codes=64)[1] == (2, 2, None)
    assert torch_threads == 1


def measured(codes: np.ndarray, waveform: np.ndarray, nll: float = 2.0) -> dict[str, Any]:
    logs = np.full(len(codes), -nll, dtype=np.float32)
    return measure_sample(codes, logs, waveform.astype(np.float32), vocab_size=256, sample_rate_hz=24_000)


def mu_law(waveform: np.ndarray) -> np.ndarray:
    """Codes by the formula, in float64."""
    curved = np.sign(waveform) * np.log1p(255 * np.abs(waveform)) / np.log(256)
    return np.floor((curved + 1) / 2 * 255 + 0.5).astype(np.uint8)


def noise(rms: float, num_samples: int = 12_000) -> np.ndarray:
    return np.random.default_rng(0).normal(0, rms, num_samples).clip(-1, 1)


def test_measures_of_a_known_waveform() -> None:
    waveform = 0.5 * np.sin(2 * np.pi * 100 * np.arange(36_000) / 24_000)
    codes = mu_law(waveform)
    logs = np.r_[np.full(24_000, -1.0), np.full(12_000, -4.0)].astype(np.float32)
    found = measure_sample(codes, logs, waveform.astype(np.float32), vocab_size=256, sample_rate_hz=24_000)
    assert found["seconds"] == 1.5
    assert found["nll_nats"] == pytest.approx(2.0)
    assert found["nll_bits"] == pytest.approx(2.0 / math.log(2))
    assert found["nll_nats_per_second"] == pytest.approx([1.0, 4.0])
    assert found["rms_dbfs_per_second"] == pytest.approx([20 * math.log10(0.5 / math.sqrt(2))] * 2, abs=1e-3)
    assert found["rare_codes"] == 0
    assert found["rms_dbfs"] == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=1e-3)
    assert found["peak"] == pytest.approx(0.5, abs=1e-6)
    assert found["dc"] == pytest.approx(0, abs=1e-6)
    assert found["distinct_codes"] == len(set(codes.tolist()))
    assert found["clipped_share"] == 0
    runs = max(len(list(run)) for run in np.split(codes, np.flatnonzero(np.diff(codes.astype(int))) + 1))
    assert found["longest_run_seconds"] == runs / 24_000


@pytest.mark.parametrize("rms_dbfs", [-62, -57, -30, -18])
def test_speech_levels_and_pauses_are_no_faults(rms_dbfs: float) -> None:
    waveform = noise(10 ** (rms_dbfs / 20))
    assert find_faults(measured(mu_law(waveform), waveform), vocab_size=256) == []
    short = waveform[:480]
    assert find_faults(measured(mu_law(short), short), vocab_size=256) == []


def test_faults_are_named() -> None:
    def kinds(waveform: np.ndarray, nll: float = 2.0) -> set[str]:
        faults = find_faults(measured(mu_law(waveform), waveform, nll), vocab_size=256)
        return {fault.split(":")[0] for fault in faults}

    speech = noise(0.03)
    assert kinds(np.zeros(12_000)) == {"silent", "stuck"}
    assert kinds(np.resize([0.0, -1e-5], 12_000)) >= {"silent"}
    assert kinds(np.r_[speech, np.full(2500, 0.05)]) == {"stuck"}
    assert kinds(np.resize([0.1, -0.1, 0.2], 12_000)) == {"stuck"}
    assert kinds(np.where(np.arange(12_000) % 50 == 0, 1.0, speech)) == {"clipped"}
    assert "runaway" in kinds(noise(0.4))
    assert kinds(speech + 0.15) == {"runaway"}
    assert kinds(speech, nll=5.4) == {"runaway"}


def test_drift_away_from_recordings_is_a_fault_of_long_samples_only() -> None:
    def faults(num_samples: int, nll: float) -> list[str]:
        waveform = noise(0.03, num_samples)
        return find_faults(measured(mu_law(waveform), waveform, nll), vocab_size=256, valid_nll_nats=2.7)

    assert faults(24_000, 3.6) == faults(12_000, 4.6) == []
    assert [fault.split(":")[0] for fault in faults(24_000, 3.8)] == ["runaway"]


def test_a_fault_of_one_second_is_seen_in_a_long_sample() -> None:
    def faults(waveform: np.ndarray, nll: list[float]) -> list[str]:
        logs = -np.repeat(nll, 24_000).astype(np.float32)
        measures = measure_sample(mu_law(waveform), logs, waveform, vocab_size=256, sample_rate_hz=24_000)
        return find_faults(measures, vocab_size=256, valid_nll_nats=2.5)

    speech, silence, roar = (noise(rms, 24_000).astype(np.float32) for rms in (0.03, 2e-5, 0.28))
    assert faults(np.tile(speech, 4), [2.0, 3.4, 2.0, 2.0]) == []
    (drift,) = faults(np.tile(speech, 4), [2.0, 2.0, 3.6, 2.0])
    assert drift.startswith("runaway: 3.60 nats per sample in second 3, recordings have 2.50")
    (quiet,) = faults(np.r_[speech, silence, speech, speech], [2.0] * 4)
    assert quiet.startswith("silent: RMS -94")
    assert "in second 2" in quiet
    (loud,) = faults(np.r_[speech, speech, speech, roar], [2.0] * 4)
    assert loud.startswith("runaway: RMS -11")
    assert "in second 4" in loud


def test_rare_codes_are_counted() -> None:
    logs = np.full(2400, -2.0, dtype=np.float32)
    logs[[3, 700]] = -10.5
    speech = noise(0.03, 2400).astype(np.float32)
    assert measure_sample(mu_law(speech), logs, speech, vocab_size=256, sample_rate_hz=24_000)["rare_codes"] == 2


def test_an_empty_sample_cannot_be_measured() -> None:
    with pytest.raises(UserError, match="at least one code"):
        measured(np.zeros(0, dtype=np.uint8), np.zeros(0))
