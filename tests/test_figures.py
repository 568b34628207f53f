"""Figures and tables: what drawing loads, and that files are written whole or not at all."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from handmade_runs import Patch
from matplotlib.figure import Figure
from PIL import Image
from recordings import ROOT

from ct_audio.common.figures import write_figure
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


@pytest.mark.parametrize(("num_samples", "num_columns"), [(100, 5), (24_000, 94), (24_000 * 60, 2813)])
def test_a_spectrogram_of_any_length_has_a_few_thousand_columns(num_samples: int, num_columns: int) -> None:
    rows = [{"start": 0, "num_units": num_samples, "nll_bits": 3.0}]
    waveform = np.zeros(num_samples, np.float32)
    figure = score_figure(rows, title="x", unit="sample", waveform=waveform, sample_rate_hz=24_000)
    [image] = figure.axes[2].images
    assert np.asarray(image.get_array()).shape == (513, num_columns)
