"""Check this machine and installation: what is there, what is broken and how to repair it, and how fast it is.

Every check is a function that returns what it found. It raises `Fault` with the cure where nothing can work, and
`Doubt` where some of it cannot; any other exception is a fault too. A check knows no other one, so that a broken part
hides nothing.
"""

import contextlib
import importlib
import json
import locale
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Literal

from ct_audio import __version__
from ct_audio.commands.command_line import build_parser
from ct_audio.common.machine import usable_cpus
from ct_audio.common.recipes import RECIPES, recipe_names

PYTHONS = ((3, 11), (3, 14))
"""The first version that goes, and the first that does not."""
LEAST_DISK, GOOD_DISK = 2**28, 2**32
LEAST_SHARED_MEMORY = 2**26
LEAST_MEMORY = 2**31
SPEED_RECIPE = "espeak/demo_compressive_transformer"
GOOD_RATE = 300.0
"""Codes per second of training of that recipe, below which something is wrong, or others use the machine."""
_INSTALL = "run: python -m pip install"
_PAIR = '"torch>=2.11,<2.12" "torchaudio>=2.11,<2.12"'


class Fault(Exception):  # noqa: N818 (a finding, caught where checks run)
    """Something that does not work, and its cure."""

    def __init__(self, found: str, cure: str) -> None:
        super().__init__(found)
        self.cure = cure


class Doubt(Fault):
    """Something that some uses will miss, and its cure."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        status: "ok", "warning" or "failed".
        cure: what to do about it; "" where all is well.
    """

    name: str
    status: str
    found: str
    cure: str = ""


def main() -> int:
    """Parse, check, print; exit status 1 where something fails."""
    parser = build_parser(
        "Check this machine and installation, and say how to repair what is broken. Exit status: 0 nothing fails "
        "(there may be warnings), 1 something does."
    )
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs will be written")
    parser.add_argument("--quick", action="store_true", help="leave out the speed of training and sampling")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    findings = []
    for name, check in checks(arguments.runs_dir, quick=arguments.quick).items():
        findings.append(run_check(name, check))
        if not arguments.json:
            print("\n".join(lines_of(findings[-1])), flush=True)
    failed = [finding.name for finding in findings if finding.status == "failed"]
    if arguments.json:
        report = {"version": __version__, "is_well": not failed, "checks": [asdict(finding) for finding in findings]}
        print(json.dumps(report))
    else:
        doubts = sum(finding.status == "warning" for finding in findings)
        print(f"\n{len(failed)} failed, {doubts} warnings" + (f"; first repair {failed[0]}" if failed else ""))
    return 1 if failed else 0


def checks(runs_dir: Path, *, quick: bool) -> dict[str, Callable[[], str]]:
    """All checks by name, in the order in which a repair makes sense."""
    found: dict[str, Callable[[], str]] = {
        "python": check_python,
        "packages": check_packages,
        "torch": check_torch,
        "tensorboard": check_tensorboard,
        "audio formats": check_audio_formats,
        "numba": check_numba,
        "recipes": check_recipes,
        "gpu": check_gpu,
        "bfloat16": check_bfloat16,
        "processors": check_processors,
        "memory": check_memory,
        "disk": lambda: check_disk(runs_dir),
        "writing": lambda: check_writing(runs_dir),
        "temporary files": check_temporary_files,
        "locale": check_locale,
    }
    return found if quick else found | {"training": check_training, "sampling": check_sampling}


def run_check(name: str, check: Callable[[], str]) -> Finding:
    """Run a check; whatever it raises is a finding."""
    try:
        return Finding(name, "ok", check())
    except Fault as fault:
        return Finding(name, "warning" if isinstance(fault, Doubt) else "failed", str(fault), fault.cure)
    except Exception as error:  # an installation can break in any way
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Finding(name, "failed", found, "see docs/troubleshooting.md, and report it with this output")


def lines_of(finding: Finding) -> list[str]:
    """As "ok       python           3.11.7", and the cure on a line of its own."""
    lines = [f"{finding.status:8} {finding.name:16} {finding.found}"]
    return lines + ([f"{'':8} {'':16} -> {finding.cure}"] if finding.cure else [])


def check_python() -> str:
    """The version of the interpreter."""
    first, beyond = PYTHONS
    if not first <= sys.version_info[:2] < beyond:
        wanted = f"3.{first[1]} to 3.{beyond[1] - 1}"
        cure = f"make a new environment with Python {wanted}, as with: python3.12 -m venv .venv"
        raise Fault(f"{platform.python_version()}, expected {wanted}", cure)
    inside = "" if sys.prefix != sys.base_prefix else ", in no virtual environment"
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}{inside}"


def check_packages() -> str:
    """Every package that this one requires is there, in a version that goes."""
    from packaging.requirements import Requirement

    try:
        listed = [Requirement(line) for line in distribution("ct_audio").requires or []]
    except PackageNotFoundError:
        raise Doubt("ct_audio is not installed, only run from its folder", f"{_INSTALL} --editable .") from None
    required = [each for each in listed if each.marker is None or each.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in required:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append((requirement, found))
    if wrong:
        found = ", ".join(
            f"{requirement.name} {found}, expected {requirement.specifier}" for requirement, found in wrong
        )
        raise Fault(
            found, f"{_INSTALL} " + " ".join(f'"{requirement.name}{requirement.specifier}"' for requirement, _ in wrong)
        )
    return f"{len(required)} requirements of ct_audio {__version__}"


def check_torch() -> str:
    """torch and torchaudio can be imported and are a pair."""
    try:
        import torch
        import torchaudio
    except (ImportError, OSError) as error:  # OSError: libraries built for another torch
        raise Fault(f"{' '.join(str(error).split())[:300]}", f"{_INSTALL} --force-reinstall {_PAIR}") from error
    pair = [module.__version__.split("+")[0].split(".")[:2] for module in (torch, torchaudio)]
    found = f"torch {torch.__version__}, torchaudio {torchaudio.__version__}"
    if pair[0] != pair[1]:
        raise Fault(f"{found}: not a pair", f"{_INSTALL} {_PAIR}")
    return found


def check_tensorboard() -> str:
    """Writing events and showing them."""
    try:
        for module in ("tensorboard.default", "tensorboard.program", "ct_audio.runs.metrics"):
            importlib.import_module(module)
    except ImportError as error:
        missing = "pkg_resources" in str(error)  # TensorBoard before 2.21 needs it; setuptools 82 has it no more
        cure = '"setuptools<81" "tensorboard>=2.21"' if missing else '"tensorboard>=2.21"'
        raise Fault(f"{error}", f"{_INSTALL} {cure}") from error
    return f"tensorboard {version('tensorboard')}"


def check_audio_formats() -> str:
    """What libsndfile can read, tried on what it writes itself."""
    from ct_audio.data.audio_files import library_version, unreadable_formats

    missing, found = unreadable_formats(), f"libsndfile {library_version()}"
    if missing:
        cure = (
            f"{_INSTALL} --force-reinstall soundfile (its wheel brings libsndfile 1.2), or convert such files to flac"
        )
        raise Doubt(f"{found} cannot read {', '.join(missing)}", cure)
    try:
        return f"{found}: wav, flac, ogg, opus, mp3, aiff; PyAV {version('av')}: m4a, webm and others"
    except PackageNotFoundError:
        return f"{found}: wav, flac, ogg, opus, mp3, aiff (m4a, webm and others with: python -m pip install av)"


def check_numba() -> str:
    """Compiling, and keeping what was compiled on disk."""
    import numba

    try:
        add = numba.njit(cache=True)(lambda first, second: first + second)
        assert add(1, 2) == 3
    except RuntimeError as error:
        if "locator" not in str(error):
            raise
        raise Fault("numba cannot write its cache", "set NUMBA_CACHE_DIR=FOLDER, one that you can write to") from error
    return f"numba {numba.__version__} compiles"


def check_recipes() -> str:
    """The recipes came with the package."""
    if not RECIPES or not recipe_names():
        raise Fault("no recipes beside the package or in it", "install the wheel again, or run from a whole copy")
    return f"{len(recipe_names())} in {RECIPES}"


def check_gpu() -> str:
    """CUDA as torch sees it, against what the machine has."""
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        torch.ones(8, device="cuda").sum().item()
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return f"{names}; driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    if driver and torch.version.cuda is None:
        index = "take torch from PyPI: python -m pip install --force-reinstall"
        raise Doubt(f"driver {driver}, but this torch is built for CPUs only", f"{index} {_PAIR}")
    if driver:
        cure = f"update the driver to one for CUDA {torch.version.cuda}, or look at CUDA_VISIBLE_DEVICES"
        raise Doubt(f"driver {driver}, but torch finds no device", cure)
    return "none: everything runs on the CPU"


def _driver() -> str:
    """Version of NVIDIA's driver, "" where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (subprocess.SubprocessError, OSError, IndexError):
        return ""


def check_bfloat16() -> str:
    """train.precision: bfloat16, which the recipes of the paper's size use."""
    import torch

    if torch.cuda.is_available():
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise Doubt("this GPU has no bfloat16", "train with train.precision=float32")
        return "on the GPU"
    x = torch.ones(8, 8, dtype=torch.bfloat16)
    assert torch.equal((x @ x).float(), torch.full((8, 8), 8.0))
    return "on the CPU it works, and is as a rule not faster than float32"


def check_processors() -> str:
    """Cores that this process may use."""
    import torch

    cores, threads = usable_cpus(), torch.get_num_threads()
    if threads > cores:
        raise Doubt(f"{threads} threads on {cores} usable cores", f"set OMP_NUM_THREADS={cores}")
    return f"{cores} usable cores, {threads} threads of torch"


def check_memory() -> str:
    """Memory that is free."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return "unknown on this system"
    if free < LEAST_MEMORY:
        raise Doubt(f"{_size(free)} free", f"end other programs; small recipes need {_size(LEAST_MEMORY)}")
    return f"{_size(free)} free"


def check_disk(runs_dir: Path) -> str:
    """Room where runs and temporary files go."""
    found = []
    for place in (runs_dir, Path(tempfile.gettempdir())):
        free = shutil.disk_usage(_existing(place)).free
        found.append(f"{_size(free)} free in {place}")
        if free < GOOD_DISK:
            cure = f"make room: a checkpoint of the paper's size has 0.5 GB, {place} should have {_size(GOOD_DISK)}"
            raise (Fault if free < LEAST_DISK else Doubt)(found[-1], cure)
    return ", ".join(found)


def check_writing(runs_dir: Path) -> str:
    """Files, links and locks where runs are written."""
    place = _existing(runs_dir)
    try:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            file = Path(folder) / "file"
            file.write_bytes(b"1")
            problems = []
            with contextlib.suppress(ImportError), file.open("rb") as handle:
                import fcntl  # missing on Windows

                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    problems.append("no locks: let only one process at a time work in a folder")
            try:
                (Path(folder) / "link").symlink_to(file)
            except OSError:
                problems.append("no symbolic links: files with names stand in for them")
    except OSError as error:
        raise Fault(
            f"{place.absolute()}: {error.strerror}", "choose another folder, as with runs_dir=FOLDER"
        ) from error
    if problems:
        raise Doubt(f"{place.absolute()} can be written", "; ".join(problems))
    return f"{place.absolute()} can be written, with links and locks"


def check_temporary_files() -> str:
    """What processes share: /dev/shm on Linux, and sockets in TMPDIR."""
    folder = Path(tempfile.gettempdir())
    if len(str(folder)) > 60:
        raise Doubt(f"{folder}: too long for the sockets of worker processes", "set TMPDIR=/tmp")
    if sys.platform == "linux":
        try:
            free = shutil.disk_usage("/dev/shm").free
        except OSError:
            free = 0
        if free < LEAST_SHARED_MEMORY:
            raise Doubt(f"{_size(free)} free in /dev/shm", "enlarge it; in Docker with --shm-size=1g")
        return f"{folder}; {_size(free)} free in /dev/shm"
    return str(folder)


def check_locale() -> str:
    """Whether names and texts of any language can be printed."""
    encodings = [sys.getfilesystemencoding(), locale.getpreferredencoding(False), sys.stdout.encoding or "ascii"]
    found = f"names {encodings[0]}, files {encodings[1]}, terminal {encodings[2]}"
    if any(encoding.lower().replace("-", "") != "utf8" for encoding in encodings):
        raise Doubt(
            f"{found}: what it cannot show is printed as \\x escapes", "set LC_ALL=C.UTF-8 (Windows: PYTHONUTF8=1)"
        )
    return found


def check_training() -> str:
    """Speed of a small training step, on one thread of the CPU."""
    rate = _rate("train")
    found = f"{rate:,.0f} codes per second of {SPEED_RECIPE} on one CPU thread"
    if rate < GOOD_RATE:
        raise Doubt(found, "end other programs; look at OMP_NUM_THREADS and at the power settings")
    return found


def check_sampling() -> str:
    """Speed of sampling a small model, on one thread of the CPU."""
    rate = _rate("sample")
    return f"{rate:,.0f} codes per second of {SPEED_RECIPE} on one CPU thread; real time would be 24,000"


def _rate(what: Literal["train", "sample"]) -> float:
    from ct_audio.experiments.speed import quick_rate

    return quick_rate(SPEED_RECIPE, what)


def _existing(place: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
