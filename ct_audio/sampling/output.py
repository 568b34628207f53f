"""The files of finished samples: wav or text, a JSON sidecar that says how it was made and what it is like, a picture.

    DIR/sample_0.wav or sample_0.txt, sample_0.json, sample_0.png, sample_1...

Shape letters: N codes.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from ct_audio.common.figures import spectrogram_figure, write_figure
from ct_audio.common.files import write_file, write_json
from ct_audio.data.audio_files import write_wav
from ct_audio.sampling.audio_checks import find_faults, measure_sample
from ct_audio.sampling.resume import mark_complete
from ct_audio.sampling.sample_set import SampleSet
from ct_audio.sampling.text_checks import find_text_faults, measure_text


def write_samples(
    samples: SampleSet, *, verify_difference: float | None = None, plots: bool = False
) -> list[list[str]]:
    """Write the files of each lane (if there is a directory), say what they are like, return the faults of each.

    Args:
        samples: at least one code a lane.
        verify_difference: what `SampleSet.verify` gave, for the sidecars.
        plots: pictures too (of audio only).
    """
    all_faults, directory, unit = [], samples.directory, samples.codec.unit
    if directory is not None:
        _remove_earlier(directory, num_lanes=samples.request.num_lanes)
    rows = zip(samples.codes.cpu().numpy(), samples.log_probabilities.cpu().numpy(), samples.decoded(), strict=True)
    for lane, (codes, logs, decoded) in enumerate(rows):
        measures, faults = measure_lane(samples, codes, logs, decoded)
        sidecar = samples.settings() | measures | {"lane": lane, "warnings": faults}
        if isinstance(names := samples.request.prime_name, tuple):
            sidecar["prime"] = names[lane]
        sidecar["codes_per_second"] = samples.codes_per_second
        if verify_difference is not None:
            sidecar["verify_max_abs_difference"] = verify_difference if math.isfinite(verify_difference) else None
        path = "stream" + (f", the last {samples.in_words(len(codes))}" if samples.num_forgotten else "")
        if directory is not None:
            path = directory / f"sample_{lane}.{'txt' if isinstance(decoded, bytes) else 'wav'}"
            _write_lane(path, samples, codes, sidecar, plots=plots)
        print(f"{path}: {measures['nll_nats']:.4f} nats per {unit}, {_in_short(measures)}")
        for fault in faults:
            print(f"warning: {path}: {fault}", file=sys.stderr)
        all_faults.append(faults)
    if directory is not None:
        mark_complete(directory)
    return all_faults


def _remove_earlier(directory: Path, *, num_lanes: int) -> None:
    """Remove the samples that an earlier call has made there, so that all that lies there is of this one."""
    earlier = [path for path in directory.glob("sample_*.json") if path.stem.removeprefix("sample_").isdecimal()]
    for sidecar in earlier:
        for suffix in (".wav", ".txt", ".png", ".json"):
            sidecar.with_suffix(suffix).unlink(missing_ok=True)
    beyond = sorted(path.stem for path in earlier if int(path.stem.removeprefix("sample_")) >= num_lanes)
    if beyond:
        print(f"removed from {directory}, of an earlier call: {', '.join(beyond)}", file=sys.stderr)


def measure_lane(
    samples: SampleSet, codes: Integer[np.ndarray, " N"], logs: Float[np.ndarray, " N"], decoded: Any
) -> tuple[dict[str, Any], list[str]]:
    """Numbers and faults of a lane's sampled part, `decoded` a waveform or a text."""
    vocab_size, rate = samples.codec.vocab_size, samples.codec.sample_rate_hz
    if rate is None:
        measures = measure_text(codes, logs, decoded, vocab_size=vocab_size)
        return measures | {"unit": samples.codec.unit}, find_text_faults(measures, vocab_size=vocab_size)
    valid_nll_nats = samples.run.state.get("progress", {}).get("best_valid_nll_nats")
    measures = measure_sample(codes, logs, decoded, vocab_size=vocab_size, sample_rate_hz=rate)
    return measures, find_faults(measures, vocab_size=vocab_size, valid_nll_nats=valid_nll_nats)


def _in_short(measures: dict[str, Any]) -> str:
    distinct = f"{measures['distinct_codes']} distinct codes"
    if "rms_dbfs" in measures:
        return f"RMS {measures['rms_dbfs']:.1f} dBFS, peak {measures['peak']:.3f}, {distinct}"
    return f"{measures['nll_bits']:.4f} bits, {measures['num_bytes']} bytes, {distinct}"


def _write_lane(
    path: Path, samples: SampleSet, codes: Integer[np.ndarray, " N"], sidecar: dict[str, Any], *, plots: bool
) -> None:
    prime = samples.request.prime_of(sidecar["lane"]) if samples.request.include_prime else codes[:0]
    whole = samples.codec.decode(np.concatenate([prime.astype(codes.dtype), codes]))
    if isinstance(whole, bytes):
        write_file(path, whole)
    else:
        write_wav(path, whole, sidecar["sample_rate_hz"])
    write_json(path.with_suffix(".json"), dict(sorted(sidecar.items())))
    if plots and not isinstance(whole, bytes):
        write_figure(spectrogram_figure(whole, sidecar["sample_rate_hz"]), path.with_suffix(".png"), dpi=120)
