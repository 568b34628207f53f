"""Figures and tables: what drawing loads, and that files are written whole or not at all."""

import csv
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from handmade_runs import Patch
from matplotlib.figure import Figure
from PIL import Image
from recordings import ROOT

from ct_audio.common.figures import Sound, decibel_range, spectrogram_decibels, spectrograms_figure, write_figure
from ct_audio.common.files import write_csv
from ct_audio.evaluation.figures import score_figure

DRAWING = """
from pathlib import Path
import numpy as np
from ct_audio.common.figures import spectrogram_figure, write_figure
from ct_audio.evaluation.figures import score_figure
rows = [{"start": 0, "num_units": 240, "nll_bits": 3.0}]
noise = np.random.default_rng(0).normal(0, 0.1, 240).astype(np.float32)
write_figure(score_figure(rows, title="x", unit="sample", waveform=noise, sample_rate_hz=24_000), Path("score.png"))
write_figure(spectrogram_figure(noise, 24_000), Path("noise.png"))
assert not {"librosa", "tensorboard"} & sys.modules.keys()
"""


def test_drawing_loads_neither_librosa_nor_tensorboard(tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{DRAWING}"
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_spectrogram_equals_a_loop_over_windows() -> None:
    waveform = np.random.default_rng(0).normal(0, 0.1, 900).astype(np.float32)
    window, padded = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256), np.pad(waveform, 128, mode="reflect")
    found = spectrogram_decibels(waveform)
    assert found.shape == (129, 1 + 900 // 64)
    for column in range(found.shape[1]):
        spectrum = np.fft.rfft(window * padded[64 * column : 64 * column + 256])
        np.testing.assert_allclose(found[:, column], 20 * np.log10(np.abs(spectrum) / 64), atol=1e-2)
    sine = np.sin(2 * np.pi * 16 / 256 * np.arange(1000)).astype(np.float32)
    assert spectrogram_decibels(sine)[:, 5].max() == spectrogram_decibels(sine)[16, 5]
    assert spectrogram_decibels(sine)[16, 5] == pytest.approx(0, abs=1e-4)
    assert spectrogram_decibels(np.zeros(10, np.float32)).max() == pytest.approx(-140)


def test_the_range_of_decibels_holds_the_data() -> None:
    assert decibel_range(np.linspace(-101.0, -33.0, 1000)) == (-110, -30)
    assert decibel_range(np.full(5, -140.0)) == (-150, -140)
    assert decibel_range(np.r_[np.full(500, -140.0), np.linspace(-95.0, -12.0, 500)]) == (-100, -10)


def test_spectrograms_of_several_models_share_a_range_and_show_where_primes_end() -> None:
    numbers = np.random.default_rng(0)
    quiet, loud = (numbers.normal(0, rms, 4800).astype(np.float32) for rms in (0.001, 0.5))
    rows = {"recordings": [Sound(quiet), Sound(quiet, 2400)], "a_$x_{y$": [Sound(loud), None]}
    figure = spectrograms_figure(rows, 24_000, columns=["free", "primed"], title="$y$")
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels] == ["free", "primed", "", ""]
    assert [panel.get_ylabel() for panel in panels] == ["recordings\nkHz", "", "a_\\$x_{y\\$\nkHz", ""]
    limits = {image.get_clim() for panel in panels for image in panel.images}
    assert limits == {decibel_range(spectrogram_decibels(quiet))}
    assert [len(panel.images) for panel in panels] == [1, 1, 1, 0]
    assert [[float(np.asarray(line.get_xdata())[0]) for line in panel.lines] for panel in panels] == [[], [0.1], [], []]
    assert panels[0].images[0].get_extent() == [0, 0.2, 0, 12]
    assert "dB" in bar.get_ylabel()


def test_long_names_of_rows_stay_beside_their_row() -> None:
    names = ["recordings", "kathleen_transformer_xl_prediction_small_33000", "runs/kathleen-wavenet of the year 2026"]
    figure = spectrograms_figure(
        {name: [Sound(np.zeros(2400, np.float32))] for name in names}, 24_000, columns=["free"], title=""
    )
    figure.canvas.draw()
    labels = [panel.yaxis.label for panel in figure.axes[: len(names)]]
    assert ["".join(label.get_text().split("\n")[:-1]) for label in labels] == names
    extents = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in combinations(extents, 2))
    assert all(figure.bbox.y0 <= extent.y0 and extent.y1 <= figure.bbox.y1 for extent in extents)


def test_a_figure_has_as_many_dots_as_asked_for(tmp_path: Path, monkeypatch: Patch) -> None:
    figure, path = Figure(figsize=(3, 2)), tmp_path / "figure.png"
    for settings, size in (({}, (330, 220)), ({"dpi": 50}, (150, 100))):
        write_figure(figure, path, **settings)
        with Image.open(path) as image:
            assert image.size == size
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_figure(figure, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def test_a_table_has_names_and_empty_fields(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", [{"a": 1, "b, c": None}, {"a": 0.1 + 0.2, "b, c": "x\ny"}])
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b, c": ""}, {"a": "0.30000000000000004", "b, c": "x\ny"}]


@pytest.mark.parametrize(("num_samples", "shape"), [(100, (129, 5)), (24_000, (129, 376)), (1_440_000, (1025, 2813))])
def test_a_spectrogram_of_any_length_has_a_few_thousand_columns(num_samples: int, shape: tuple[int, int]) -> None:
    rows = [{"start": 0, "num_units": num_samples, "nll_bits": 3.0}]
    waveform = np.zeros(num_samples, np.float32)
    figure = score_figure(rows, title="x", unit="sample", waveform=waveform, sample_rate_hz=24_000)
    [image] = figure.axes[2].images
    assert np.asarray(image.get_array()).shape == shape
