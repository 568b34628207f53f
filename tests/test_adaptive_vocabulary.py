"""Adaptive input and softmax against slow code and torch's own, and what tying shares."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from model_cases import float64_model, random_codes
from tiny import TINY_MODELS, tiny_model
from tiny_runs import assert_same_checkpoint, tiny_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ct_audio.common.errors import UserError
from ct_audio.models.adaptive_vocabulary import AdaptiveInput, AdaptiveSoftmax
from ct_audio.models.front_ends import CodeEmbedding
from ct_audio.models.heads import Categorical
from ct_audio.runs.open_run import load_run_model
from ct_audio.training.loop import train

VOCAB_SIZE, WIDTH, CUTOFFS, DIV = 23, 12, [5, 9], 3


def noisy(module: torch.nn.Module) -> Any:
    """In float64, away from zeros, so that biases matter too."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.fixture
def adaptive() -> Any:
    return noisy(AdaptiveSoftmax(VOCAB_SIZE, WIDTH, CUTOFFS, DIV))


def slow_log_probability(softmax: AdaptiveSoftmax, features: Float[Tensor, " D"], code: int) -> float:
    """Oracle: one code, Python numbers, the two steps as they are written in the paper."""
    edges = [0, *CUTOFFS, VOCAB_SIZE]
    band = next(i for i in range(len(edges) - 1) if edges[i] <= code < edges[i + 1])
    bias, head = softmax.bias.tolist(), features.tolist()

    def dot(row: list[float], with_: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(row, with_, strict=True))

    def log_softmax(scores: list[float], index: int) -> float:
        return scores[index] - math.log(math.fsum(map(math.exp, scores)))

    scores = [dot(row, head) + bias[i] for i, row in enumerate(softmax.tables[0].tolist())]
    scores += [dot(row, head) + bias[VOCAB_SIZE + i] for i, row in enumerate(softmax.bands.tolist())]
    if band == 0:
        return log_softmax(scores, code)
    projection = softmax.projections[band - 1].tolist()  # [width][narrow]
    narrow = [math.fsum(head[i] * projection[i][j] for i in range(WIDTH)) for j in range(len(projection[0]))]
    within = [dot(row, narrow) + bias[edges[band] + i] for i, row in enumerate(softmax.tables[band].tolist())]
    return log_softmax(scores, edges[1] + band - 1) + log_softmax(within, code - edges[band])


def test_log_probabilities_equal_slow_code(adaptive: Any) -> None:
    features = torch.randn(3, WIDTH, dtype=torch.float64)
    expected = [[slow_log_probability(adaptive, row, code) for code in range(VOCAB_SIZE)] for row in features]
    found = adaptive.log_probabilities(features)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_equals_torchs_adaptive_softmax(adaptive: Any) -> None:
    """torch has no bias within bands: a feature that is always 1 carries ours."""
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(WIDTH + 1, VOCAB_SIZE, CUTOFFS, div_value=DIV).double()
    features, targets = torch.randn(40, WIDTH, dtype=torch.float64), torch.arange(40) % VOCAB_SIZE
    with torch.no_grad():
        head_bias = torch.cat([adaptive.bias[: CUTOFFS[0]], adaptive.bias[VOCAB_SIZE:]])
        theirs.head.weight.copy_(
            torch.cat([torch.cat([adaptive.tables[0], adaptive.bands]), head_bias[:, None]], dim=1)
        )
        for band, (begin, end) in enumerate([(5, 9), (9, 23)]):
            narrow = adaptive.tables[band + 1].shape[1]
            project = torch.nn.Linear(WIDTH + 1, narrow + 1, bias=False).double()
            project.weight.zero_()
            project.weight[:narrow, :WIDTH] = adaptive.projections[band].T
            project.weight[narrow, WIDTH] = 1.0
            words = torch.nn.Linear(narrow + 1, end - begin, bias=False).double()
            words.weight.copy_(torch.cat([adaptive.tables[band + 1], adaptive.bias[begin:end, None]], dim=1))
            theirs.tail[band] = torch.nn.Sequential(project, words)
        augmented = torch.cat([features, torch.ones(40, 1, dtype=torch.float64)], dim=1)
        torch.testing.assert_close(adaptive.nll(features, targets), -theirs(augmented, targets).output)
        torch.testing.assert_close(adaptive.log_probabilities(features), theirs.log_prob(augmented))


def test_gradients_of_the_nll(adaptive: Any) -> None:
    features = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, 5, 8, 9, 22, 22])
    parameters = list(adaptive.parameters())

    def loss(features: Tensor, *_: Tensor) -> Tensor:
        return adaptive.nll(features, targets)

    assert torch.autograd.gradcheck(loss, (features, *parameters), fast_mode=True)


@pytest.mark.parametrize("targets", [[1, 2], [7, 7], [20, 1]])
def test_every_parameter_has_a_gradient_whatever_bands_are_there(adaptive: Any, targets: list[int]) -> None:
    features = torch.randn(2, WIDTH, dtype=torch.float64)
    adaptive.nll(features, torch.tensor(targets)).sum().backward()
    assert all(parameter.grad is not None for parameter in adaptive.parameters())
    embedding = noisy(AdaptiveInput(VOCAB_SIZE, WIDTH, CUTOFFS, DIV))
    embedding(torch.tensor([targets]), ())[0].sum().backward()
    assert all(parameter.grad is not None for parameter in embedding.parameters())


def test_input_rows_are_projected_rows_of_their_bands() -> None:
    embedding = noisy(AdaptiveInput(VOCAB_SIZE, WIDTH, CUTOFFS, DIV))
    codes = torch.tensor([[22, 0, 4], [8, 9, 5]])
    expected = []
    for code in codes.flatten().tolist():
        band = sum(code >= cutoff for cutoff in CUTOFFS)
        row = embedding.tables[band][code - [0, *CUTOFFS][band]]
        expected.append(math.sqrt(WIDTH) * embedding.projections[band] @ row)
    torch.testing.assert_close(embedding(codes, ())[0], torch.stack(expected).view(2, 3, WIDTH), rtol=0, atol=1e-12)
    parameters = list(embedding.parameters())
    assert torch.autograd.gradcheck(lambda *_: embedding(codes, ())[0], parameters, fast_mode=True)


def test_fresh_input_rows_have_unit_variance_in_every_band() -> None:
    embedding = AdaptiveInput(400, 64, [100, 200], 4)
    for band in range(2):
        rows, _, _ = embedding(torch.arange(100 * band, 100 * band + 100)[None], ())
        assert rows.var().item() == pytest.approx(1.0, rel=0.25)


class _LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_a_vocabulary_of_words_fits() -> None:
    """The NLL of 128 codes out of 267,735, forward and backward, makes no tensor of rows times vocabulary."""
    words, cutoffs = 267_735, [20_000, 40_000, 200_000]
    embedding = AdaptiveInput(words, 8, cutoffs, 2)
    softmax = AdaptiveSoftmax(words, 8, cutoffs, 2, tied=embedding)
    for parameter in softmax.parameters():
        torch.nn.init.zeros_(parameter)
    targets = (torch.arange(128) ** 2) % 10_000  # nearly all words of a text are frequent ones
    targets[:8] = torch.arange(8) * 30_000
    with _LargestTensor() as largest:
        nll = softmax.nll(embedding(targets[None], ())[0][0], targets)
        nll.mean().backward()
    assert nll[-1].item() == pytest.approx(math.log(20_003), rel=1e-5)
    assert nll[1].item() == pytest.approx(math.log(20_003) + math.log(20_000), rel=1e-5)
    assert nll[7].item() == pytest.approx(math.log(20_003) + math.log(67_735), rel=1e-5)
    assert largest.numel <= 128 * 20_003


@pytest.mark.parametrize("name", ["compressive_transformer", "compressive_transformer_adaptive"])
@pytest.mark.parametrize("rows_a_block", [0, 1, 7, 32])
def test_blocks_of_rows_change_nothing(name: str, rows_a_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose logits do not fit into one block: the same NLL and gradients, and no tensor of all rows' logits."""
    model = float64_model(name)
    num_logits = 8 if "adaptive" in name else 32  # of the first band and two further ones; of all codes
    codes, targets = random_codes(16), random_codes(16, seed=1)

    def run() -> tuple[Tensor, dict[str, Tensor], int]:
        model.zero_grad()
        features = model(codes, model.zero_memory(2)).features
        weights = torch.linspace(0.5, 1.5, targets.numel(), dtype=torch.float64).view_as(targets)
        with _LargestTensor() as largest:
            nll = model.nll(features, targets)
            features.retain_grad()
            (nll * weights).sum().backward(inputs=[features, *model.head.parameters()])
        found = {key: parameter.grad for key, parameter in model.head.named_parameters()} | {"features": features.grad}
        return nll.detach(), found, largest.numel

    nll, gradients, unblocked = run()
    monkeypatch.setattr("ct_audio.models.heads.MAX_LOGITS", rows_a_block * num_logits)
    in_blocks, gradients_in_blocks, blocked = run()
    torch.testing.assert_close(in_blocks, nll, rtol=0, atol=1e-12)
    assert gradients_in_blocks.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradients_in_blocks[key], gradient, rtol=0, atol=1e-12)
    if name == "compressive_transformer":
        assert unblocked == 32 * num_logits
        assert blocked == max(rows_a_block * num_logits, nll.numel() * 16, 32 * 16)  # or features, or the head's weight
    with torch.inference_mode():
        features = model(codes, model.zero_memory(2)).features
        torch.testing.assert_close(model.nll(features, targets), nll, rtol=0, atol=1e-12)


def parameter_names(name: str, **changes: Any) -> set[str]:
    return {key for key, _ in tiny_model(name, **changes).named_parameters()}


def test_tying_shares_tables_and_all_projections_but_the_first() -> None:
    tied, untied = (parameter_names("compressive_transformer_adaptive", tie_embeddings=tie) for tie in (True, False))
    assert untied - tied == {f"head.tables.{i}" for i in range(3)} | {f"head.projections.{i}" for i in range(2)}
    assert tied < untied
    model: Any = tiny_model("compressive_transformer_adaptive")
    assert all(a is b for a, b in zip(model.head.projections, list(model.front_end.projections)[1:], strict=True))
    assert parameter_names("compressive_transformer_pre_norm") - parameter_names("compressive_transformer_tied") == {
        "head.projection.weight"
    }
    plain: Any = tiny_model("compressive_transformer_tied")
    assert plain.head.projection.weight is plain.front_end.table.weight


def test_fresh_models_say_nearly_nothing() -> None:
    for name in ("compressive_transformer_adaptive", "compressive_transformer_tied"):
        model: Any = tiny_model(name, vocab_size=2000)
        codes = torch.randint(2000, (2, 64))
        nll = model.nll(model(codes, model.zero_memory(2)).features, codes.roll(1, 1)).mean()
        assert 7.0 < nll.item() < 11.0  # ln 2000 = 7.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compressive_transformer_adaptive", "compressive_transformer_tied"])
def test_tied_parameters_stay_tied_through_a_checkpoint(name: str, tmp_path: Path) -> None:
    short, whole = tiny_run(tmp_path / "a", name, train__num_steps=3), tiny_run(tmp_path / "b", name)
    assert train(short) == 0
    model: Any = load_run_model(short.run_dir, which="last").model
    tables = [model.head.tables[2]] if "adaptive" in name else [model.head.projection.weight]
    others = [model.front_end.tables[2]] if "adaptive" in name else [model.front_end.table.weight]
    assert tables[0] is others[0]
    assert train(tiny_run(tmp_path / "a", name)) == 0
    assert train(whole) == 0
    assert_same_checkpoint(tiny_run(tmp_path / "a", name), whole)


def test_step_equals_forward_with_dropout_off_and_adaptive_bands() -> None:
    model = float64_model("compressive_transformer_adaptive").eval()
    codes = random_codes(20)
    with torch.no_grad():
        expected = model.log_probabilities(model(codes, model.zero_memory(2)).features)
        state = model.begin_steps(model.zero_memory(2), codes[:, :3])
        for t in range(3, 20):
            features, state = model.step(codes[:, t], state)
            torch.testing.assert_close(model.log_probabilities(features), expected[:, t], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptive_cutoffs": [6, 6]}, "increasing codes"),
        ({"adaptive_cutoffs": [6, 32]}, "between 0 and model.vocab_size = 32"),
        ({"adaptive_cutoffs": []}, "null or a list"),
        ({"adaptive_cutoffs": [True, 3]}, "null or a list"),
        ({"adaptive_cutoffs": "6"}, "null or a list"),
        ({"adaptive_cutoffs": [6], "adaptive_div": 0}, "adaptive_div: expected at least 1"),
        ({"adaptive_cutoffs": [6, 8, 9], "adaptive_div": 4}, "width would be below 1"),
    ],
)
def test_bands_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_model("compressive_transformer", **changes)


def test_the_defaults_are_the_plain_table() -> None:
    model: Any = tiny_model("compressive_transformer")
    assert TINY_MODELS["compressive_transformer"].keys().isdisjoint({"adaptive_cutoffs", "tie_embeddings"})
    assert isinstance(model.front_end, CodeEmbedding)
    assert isinstance(model.head, Categorical)
    assert model.head.projection.weight is not model.front_end.table.weight
