"""README.md of an exported model: a model card, with the metadata in YAML that model hubs read."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ct_audio.common.text import markdown_code, markdown_table, markdown_text
from ct_audio.data.codecs import Codec
from ct_audio.runs.config import to_yaml
from ct_audio.runs.open_run import LoadedRun


@dataclass(frozen=True)
class CardText:
    """What a card says that no run knows; what is None comes from the recipe of the data, where it is one of ours.

    Attributes:
        licence: of the weights, as an SPDX identifier or a name that hubs know.
        data: the recordings or texts, in a sentence or two.
        language: as "en".
        use: what the model is for.
    """

    licence: str | None = None
    data: str | None = None
    language: str | None = None
    use: str | None = None


class _Data(NamedTuple):
    licence: str
    language: str
    sentence: str


RECIPES = {
    "kathleen": _Data(
        "cc0-1.0",
        "en",
        "One native U.S. English speaker reads isolated CMU ARCTIC sentences (`rhasspy/dataset-voice-kathleen` on "
        "GitHub, public domain dedication CC0 1.0), as 24 kHz mu-law codes.",
    ),
    "ljspeech": _Data("other", "en", "LJ Speech 1.1: one reader of LibriVox (public domain), as 24 kHz mu-law codes."),
    "libritts": _Data(
        "cc-by-4.0", "en", "LibriTTS: many readers of LibriVox (CC BY 4.0; Zen et al. 2019), as 24 kHz mu-law codes."
    ),
    "vctk": _Data(
        "cc-by-4.0",
        "en",
        "VCTK 0.92: 110 readers of English (CC BY 4.0; Yamagishi, Veaux and MacDonald 2019), as 24 kHz mu-law codes.",
    ),
    "espeak": _Data(
        "apache-2.0", "en", "Sentences of the project, spoken by the synthesizer eSpeak NG, as 24 kHz mu-law codes."
    ),
    "enwik8": _Data("cc-by-sa-3.0", "en", "enwik8: the first 10^8 bytes of a dump of Wikipedia (CC BY-SA and GFDL)."),
    "wikitext103": _Data(
        "cc-by-sa-3.0", "en", "WikiText-103: articles of Wikipedia (CC BY-SA 3.0; Merity et al. 2016)."
    ),
    "pg19": _Data(
        "pddl", "en", "PG-19: books of Project Gutenberg, in the public domain in the U.S. (Rae et al. 2019)."
    ),
}
"""By the name of the recipe that prepared the corpus."""
_USE_AUDIO = (
    "For research on models of raw audio: a baseline to compare with, a start for fine-tuning, sounds to listen to. It "
    "knows no text: what it samples has the sound of its recordings and no words."
)
_USE_TEXT = "For research on language models with a long memory: a baseline to compare with, a start for fine-tuning."
_TITLES = {"compressive_transformer": "Compressive Transformer", "wavenet": "WaveNet"}


def card(
    run: LoadedRun, codec: Codec, plain: dict[str, Any], *, text: CardText, folder: str, samples: list[str]
) -> str:
    """The card in Markdown, below its metadata.

    Args:
        plain: what config.json says (see `runs/exported.py`).
        folder: what the examples call the model.
        samples: files in it, as "samples/sample_0.wav".
    """
    known = RECIPES.get(plain["training"].get("recipe") or "")
    licence = text.licence or (known.licence if known else "unknown")
    language = text.language or (known.language if known else None)
    sections = [
        f"---\n{to_yaml(_metadata(plain, codec, licence=licence, language=language))}---",
        f"# {markdown_code(plain['name'])}\n\n{_introduction(run, plain, codec)}",
        f"## Use\n\n{_examples(codec, folder)}",
        f"## Data and licence\n\n{_data(plain, codec, text.data or (known.sentence if known else None), licence)}",
        f"## Training\n\n{markdown_table(_training_rows(plain))}",
        f"## NLL\n\n{_nll(plain, codec)}\n\n{_clip(plain, codec)}",
        f"## Samples\n\n{_samples(samples, folder)}",
        f"## Intended use\n\n{text.use or (_USE_AUDIO if codec.sample_rate_hz else _USE_TEXT)}",
        f"## Files\n\n{_files(plain)}",
        "## Source\n\nRae et al. 2019, Compressive Transformers for Long-Range Sequence Modelling, "
        "[arXiv 1911.05507](https://arxiv.org/abs/1911.05507); the package is `ct_audio`.",
    ]
    return "\n\n".join(sections) + "\n"


def facts(run: LoadedRun, codec: Codec, plain: dict[str, Any]) -> str:
    """The part of the card that a run knows by itself: what the model is, its training, its NLL; Markdown."""
    table = markdown_table(_training_rows(plain))
    return f"# {markdown_code(plain['name'])}\n\n{_introduction(run, plain, codec)}\n\n{table}\n\n{_nll(plain, codec)}"


def kind_of(plain: dict[str, Any]) -> str:
    """What kind of model config.json describes, in words."""
    model = plain["model"]
    if model["name"] == "compressive_transformer" and not model.get("compressed_memory_length"):
        return "Transformer-XL"
    return _TITLES.get(model["name"]) or model["name"].replace("_", " ")


def _metadata(plain: dict[str, Any], codec: Codec, *, licence: str, language: str | None) -> dict[str, Any]:
    is_audio = codec.sample_rate_hz is not None
    metadata: dict[str, Any] = {"library_name": "ct_audio", "license": licence}
    if language:
        metadata["language"] = [language]
    metadata["tags"] = [kind_of(plain).lower().replace(" ", "-"), "audio" if is_audio else "text", codec.name]
    results = [
        {
            "task": {
                "type": "audio-generation" if is_audio else "text-generation",
                "name": "prediction of the next code",
            },
            "dataset": {
                "type": plain["training"]["corpus"],
                "name": plain["training"]["corpus"],
                "split": each["split"],
            },
            "metrics": [
                {
                    "type": "nll",
                    "name": f"nats per {codec.unit}, {each['num_units']} {codec.unit}s",
                    "value": round(each["nll_nats"], 5),
                }
            ],
        }
        for each in plain["evaluations"]
    ]
    return metadata | ({"model-index": [{"name": plain["name"], "results": results}]} if results else {})


def _introduction(run: LoadedRun, plain: dict[str, Any], codec: Codec) -> str:
    number, model = sum(parameter.numel() for parameter in run.model.parameters()), plain["model"]
    what = f"{codec.sample_rate_hz:,} codes a second" if codec.sample_rate_hz else f"{codec.unit}s"
    lines = [f"{kind_of(plain)} of {number:,} parameters over {codec.vocab_size:,} {codec.name} codes ({what})."]
    keys = _PARTS + (_COMPRESSION if model.get("compressed_memory_length") else ())
    parts = [markdown_code(f"{key}: {model[key]}") for key in keys if key in model]
    return " ".join([*lines, f"Its configuration has {', '.join(parts)}."] if parts else lines)


_PARTS = ("front_end", "head", "num_layers", "width", "window_length", "memory_length", "compressed_memory_length")
_COMPRESSION = ("compression_rate", "compression_function")


def _examples(codec: Codec, folder: str) -> str:
    if codec.sample_rate_hz:
        program = f'soundfile.write("speech.wav", ct_audio.sample(model, seconds=5), {codec.sample_rate_hz})'
        imports, command = "import ct_audio, soundfile", f"ct-audio sample {folder} --seconds 5 --out samples"
    else:
        program = "print(ct_audio.sample(model, length=1000).decode(errors='replace'))"
        imports, command = "import ct_audio", f"ct-audio sample {folder} --length 1000 --out samples"
    return f"""```python
{imports}

model = ct_audio.load("{folder}")
{program}
```

```sh
{command}
ct-audio evaluate {folder} --corpus CORPUS --split test
ct-audio export {folder} --check
```"""


def _data(plain: dict[str, Any], codec: Codec, sentence: str | None, licence: str) -> str:
    training = plain["training"]
    paragraphs = [sentence or f"The corpus `{training['corpus']}`; who exported the model has said no more about it."]
    if splits := training.get("splits"):
        documents = "recordings" if codec.sample_rate_hz else "documents"
        rows: list[list[Any]] = [["split", documents, "codes", "minutes"]]
        for name, split in splits.items():
            minutes = "" if split["seconds"] is None else f"{split['seconds'] / 60:.3g}"
            rows.append([name, f"{split['num_documents']:,}", f"{split['num_codes']:,}", minutes])
        paragraphs.append(markdown_table(rows))
    paragraphs.append(f"Licence of the weights: `{licence}`. The package ct_audio is under Apache-2.0.")
    return "\n\n".join(paragraphs)


def _training_rows(plain: dict[str, Any]) -> list[list[Any]]:
    training, optim, train = plain["training"], plain["optim"], plain["train"]
    data, seed = plain["data"], f"seed {train['seed']}"
    lanes = f"{data['num_lanes']} x {data['chunk_length']:,}"
    rows: list[list[Any]] = [["what", "value"], ["steps", f"{training['step']:,} of {lanes} codes, {seed}"]]
    if training["audio_seconds"] is not None:
        rows.append(["audio", f"{training['audio_seconds']:,.0f} s"])
    else:
        rows.append(["codes", f"{training['num_codes']:,}"])
    if training["core_seconds"] is not None:
        rows.append(["work", f"{training['core_seconds']:,.0f} core-seconds (CPU, wall time x threads)"])
    elif training["training_seconds"] is not None:
        rows.append(["time", f"{training['training_seconds']:,.0f} s on {training['num_processes']} processes"])
    if training["num_codes"]:
        rates = (
            f"peak {optim['peak_learning_rate']:g}, warmup {optim['warmup_steps']:,}, decay {optim['decay_steps']:,}"
        )
        rows.append(["optimizer", f"Adam, learning rate: {rates} steps; {train['precision']}"])
    if branches := training.get("branches"):
        where = ", which is a branch of ".join(
            f"`{branch['source']}` at step {branch['step']:,}" for branch in branches
        )
        rows.append(["branch of", f"{where}; the optimizer's settings are those since the last of these steps"])
    return rows


def _nll(plain: dict[str, Any], codec: Codec) -> str:
    best = plain["training"].get("best_valid_nll_nats")
    paragraphs = []
    if plain["evaluations"]:
        rows: list[list[Any]] = [["split", f"{codec.unit}s", "nats", "bits", "protocol"]]
        for each in plain["evaluations"]:
            protocol = {key: value for key, value in each["protocol"].items() if value is not None}
            drop = ("split", "num_units", "seconds", "unit", "split_sha256", "corpus_fingerprint")
            words = ", ".join(f"{key} {value}" for key, value in protocol.items() if key not in drop)
            numbers = [f"{each['num_units']:,}", f"{each['nll_nats']:.4f}", f"{each['nll_bits']:.4f}"]
            rows.append([each["split"], *numbers, markdown_text(words)])
        paragraphs.append(f"{markdown_table(rows)}\n\nMean of a code; every code is scored once, memory is carried.")
    if best is not None:
        where = plain["train"]["valid_codes"]
        num_codes = (plain["training"].get("splits") or {}).get("valid", {}).get("num_codes", where)
        stretch = f"the first {where:,} codes" if where and where < num_codes else "all"
        paragraphs.append(f"In training, on {stretch} of the validation split: {best:.4f} nats.")
    return "\n\n".join(paragraphs or ["It has not been scored."])


def _clip(plain: dict[str, Any], codec: Codec) -> str:
    clip = plain["clip"]
    return (
        f"`{clip['file']}` ({clip['num_units']:,} {codec.unit}s, scored alone): {clip['nll_nats']:.6f} nats. A copy of "
        "this folder that says something else is not this model."
    )


def _samples(samples: list[str], folder: str) -> str:
    if not samples:
        return f"`ct-audio sample {folder} --out samples` makes some, each with a JSON file that says how."
    lines = [
        f'<audio controls src="{name}"></audio>' if name.endswith(".wav") else f"- [{name}]({name})" for name in samples
    ]
    return "\n".join(lines)


def _files(plain: dict[str, Any]) -> str:
    about = {
        "config.json": "configuration, codec, training, evaluations, digests of the files",
        "model.safetensors": "the weights",
        "vocabulary.json": "the vocabulary of the codec",
        plain["clip"]["file"]: "a clip, whose NLL is in config.json",
    }
    names = ["config.json", *plain["files"]]
    return "\n".join(f"- `{name}`: {about.get(name, 'of the codec')}" for name in names)
