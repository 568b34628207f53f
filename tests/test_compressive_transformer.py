"""The Compressive Transformer against `paper.py`, plain loops that share no code with it, and who gets gradient from
what."""

import math
from typing import Any

import pytest
import torch
from tiny import TINY_MODELS, tiny_model
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.models import build_model, model_config_class
from ct_audio.models.compressive.memory import push
from ct_audio.models.compressive.paper import PaperStack, part
from ct_audio.models.layers import shared_linear
from ct_audio.models.state import detach_memory

TRANSFORMERS = [  # the other front ends and heads have tests of their own
    name
    for name, config in TINY_MODELS.items()
    if config["name"] == "compressive_transformer" and "front_end" not in config
]
COMPRESSIVE = [name for name in TRANSFORMERS if name != "transformer_xl"]


class Oracle:
    """One lane of a Compressive Transformer: the embedding, then the paper's algorithms as plain loops."""

    def __init__(self, model: Any) -> None:
        self.config, self.state = model.config, model.state_dict()
        self.stack = PaperStack(self.config, {})

    def window(self, codes: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Features [T, D] of one window and each layer's loss of f_c."""
        self.stack.parameters = part(self.state, "stack.")
        features, losses = self.stack.window([self._embedding(code) for code in codes])
        return torch.stack(features), losses

    def _embedding(self, code: int) -> Tensor:
        config = self.config
        if config.adaptive_cutoffs is None:
            scale = math.sqrt(config.width) if config.tie_embeddings else 1
            return self.state["front_end.table.weight"][code] * scale
        band = sum(code >= cutoff for cutoff in config.adaptive_cutoffs)
        row = self.state[f"front_end.tables.{band}"][code - [0, *config.adaptive_cutoffs][band]]
        return self.state[f"front_end.projections.{band}"] @ row * math.sqrt(config.width)


def float64_model(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = tiny_model(name, **changes).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()  # u, v and the rest are zero at first: a test must see them
            if key.endswith(".span"):
                parameter.uniform_(0.1, 0.9)
    return model


def codes_of(num_lanes: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 32, (num_lanes, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_memory_and_losses_equal_the_oracle(name: str) -> None:
    model = float64_model(name)
    length, num_windows = model.window_length, 4
    codes = codes_of(2, num_windows * length)
    output = model(codes, model.zero_memory(2))
    lane_losses: dict[int, list[float]] = {}
    for lane in range(2):
        oracle = Oracle(model)
        windows = [oracle.window(codes[lane, w * length : (w + 1) * length].tolist()) for w in range(num_windows)]
        assert (torch.cat([w[0] for w in windows]) - output.features[lane]).abs().max() <= 1e-12
        for layer in range(model.config.num_layers):
            for rows, valid, kept in (
                (output.memory.stack.memory, output.memory.stack.memory_valid, oracle.stack.memory),
                (
                    output.memory.stack.compressed_memory,
                    output.memory.stack.compressed_memory_valid,
                    oracle.stack.compressed_memory,
                ),
            ):
                assert int(valid[layer][lane]) == len(kept[layer])
                if kept[layer]:
                    newest = rows[layer][lane, rows[layer].shape[1] - len(kept[layer]) :]
                    assert (newest - torch.stack(kept[layer])).abs().max() <= 1e-12
        for layer in range(len(windows[0][1])):
            lane_losses.setdefault(layer, []).extend(float(w[1][layer]) for w in windows)
    loss_name = model.config.compression_loss
    expected = {f"{loss_name}/layer_{i:02d}": sum(v) / len(v) for i, v in lane_losses.items()}
    if model.config.adaptive_span:
        for i, layer in enumerate(model.stack.layers):
            expected[f"adaptive_span/layer_{i:02d}"] = (0.1 * 12 * layer.span.mean()).item()
    assert output.auxiliary_losses.keys() == expected.keys()
    for key, loss in output.auxiliary_losses.items():
        assert expected[key] > 0
        assert abs(float(loss.detach()) - expected[key]) <= 1e-12


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_share_of_the_queries_is_enough_for_the_reconstruction_loss(share: float) -> None:
    model = float64_model("compressive_transformer", reconstruction_query_share=share, num_layers=1, window_length=10)
    codes, oracle = codes_of(1, 40), Oracle(model)
    windows = [oracle.window(codes[0, 10 * w : 10 * (w + 1)].tolist()) for w in range(4)]
    (loss,) = model(codes, model.zero_memory(1)).auxiliary_losses.values()
    assert float(loss.detach()) == pytest.approx(sum(float(w[1][0]) for w in windows) / 4, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in COMPRESSIVE if "bptt" not in name])
def test_the_loss_of_the_compression_trains_it_and_nothing_else(name: str) -> None:
    model = float64_model(name)
    output = model(codes_of(2, 4 * model.window_length), model.zero_memory(2))
    loss_name = model.config.compression_loss
    losses = torch.stack([loss for key, loss in output.auxiliary_losses.items() if key.startswith(loss_name)]).sum()
    if not any(".compression." in key for key, _ in model.named_parameters()):
        assert not losses.requires_grad  # mean, max and most_used have nothing to train
        return
    losses.backward()
    reached = {
        key for key, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert reached == {key for key, _ in model.named_parameters() if ".compression" in key}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_task_loss_trains_everything_but_the_compression(name: str) -> None:
    """With bptt it trains the compression too: that is what bptt is."""
    model = float64_model(name)
    codes = codes_of(2, 5 * model.window_length)
    output = model(codes, model.zero_memory(2))
    model.nll(output.features, codes).mean().backward()
    for key, parameter in model.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.any())
        assert trained == (".compression" not in key or name.endswith("bptt")), key


def test_bptt_gradients_equal_the_oracle() -> None:
    """The unroll in plain Python: compressed rows keep their graph, all that enters f_c is cut."""
    model = float64_model("compressive_transformer_bptt")
    codes, targets = codes_of(1, 40), codes_of(1, 40, seed=1)
    output = model(codes, model.zero_memory(1))
    model.nll(output.features, targets).sum().backward()
    oracle = Oracle(model)
    oracle.state = {key: value.detach().clone().requires_grad_() for key, value in model.state_dict().items()}
    features = torch.cat([oracle.window(codes[0, 8 * w : 8 * (w + 1)].tolist())[0] for w in range(5)])
    logits = features @ oracle.state["head.projection.weight"].T + oracle.state["head.projection.bias"]
    torch.nn.functional.cross_entropy(logits, targets[0], reduction="sum").backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad - oracle.state[key].grad).abs().max() <= 1e-12, key
        assert oracle.state[key].grad.any(), key


def test_without_a_compression_loss_the_compression_stays_and_has_no_group() -> None:
    model = float64_model("compressive_transformer", compression_loss="none")
    output = model(codes_of(1, 32), model.zero_memory(1))
    assert output.auxiliary_losses == {}
    assert model.gradient_groups().keys() == {"model"}
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".compression." in key)


@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_keys_and_values_go_on_training_after_the_first_compression(norm_position: str) -> None:
    """Detaching a weight in place while compressing would freeze it for good; here each window trains it."""
    model = float64_model("compressive_transformer", norm_position=norm_position)
    memory = model.zero_memory(1)
    for window in range(8):
        model.zero_grad(set_to_none=True)
        codes = codes_of(1, model.window_length, seed=window)
        output = model(codes, memory)
        memory = detach_memory(output.memory)
        (model.nll(output.features, codes).mean() + sum(output.auxiliary_losses.values())).backward()
        for layer in model.stack.layers:
            assert layer.key_value.weight.requires_grad
            assert layer.key_value.weight.grad.any()


@pytest.mark.parametrize(("penalty", "bound"), [(-1.0, 1.0), (1.0, 0.0)])
def test_a_span_comes_back_from_its_bound(penalty: float, bound: float) -> None:
    """What drives the spans out for a while must not hold them there: from outside no gradient would reach them."""
    model = float64_model("compressive_transformer_adaptive_span")
    spans = [layer.span for layer in model.stack.layers]
    optimizer = torch.optim.Adam(spans, lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        loss = penalty * torch.stack([layer.spans().mean() for layer in model.stack.layers]).sum()
        (loss if step < 40 else -loss).backward()
        optimizer.step()
        model.after_update()
        if step == 39:
            assert all((span == bound).all() for span in spans)
    assert all(((span > 0) & (span < 1)).all() for span in spans)


def test_memories_get_no_gradient_from_later_windows() -> None:
    model = float64_model("compressive_transformer")
    memory = model(codes_of(1, 32), model.zero_memory(1)).memory
    stack = memory.stack
    rows = [row.detach().requires_grad_() for row in (*stack.memory, *stack.compressed_memory)]
    layers = model.config.num_layers
    stack = stack._replace(memory=tuple(rows[:layers]), compressed_memory=tuple(rows[layers:]))
    model(codes_of(1, 8), memory._replace(stack=stack)).features.sum().backward()
    assert all(row.grad is None for row in rows)


def test_shared_linear_sends_each_gradient_where_it_belongs() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 5, 3), (4, 3)))
    own_share, later_share = (torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    leaves = [inputs.clone().requires_grad_(), inputs.clone().requires_grad_(), weight.clone().requires_grad_()]
    own, later = shared_linear(*leaves)
    (own * own_share + later * later_share).sum().backward()
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    (copies[0] @ copies[2].T * own_share + copies[1] @ copies[2].T * later_share).sum().backward()
    assert torch.equal(own, later)
    for leaf, copy in zip(leaves, copies, strict=True):
        assert leaf.grad is not None
        assert copy.grad is not None
        assert (leaf.grad - copy.grad).abs().max() <= 1e-12


@pytest.mark.parametrize(("num_rows", "num_new"), [(4, 3), (4, 4), (4, 9), (0, 3), (6, 1)])
def test_push_keeps_the_newest_rows_and_hands_out_the_rest(num_rows: int, num_new: int) -> None:
    rows = [float(i) for i in range(num_rows + num_new)]
    as_rows = torch.tensor(rows)[None, :, None]
    old_memory, memory = push(as_rows[:, :num_rows], as_rows[:, num_rows:])
    assert old_memory.flatten().tolist() == rows[:num_new]
    assert memory.flatten().tolist() == rows[num_new:]


def test_reconstruction_is_perfect_where_nothing_is_lost() -> None:
    """Rate 1 with the mean: each compressed row is the row itself, so the loss is zero to rounding."""
    model = float64_model("compressive_transformer", compression_function="mean", compression_rate=1)
    output = model(codes_of(2, 32), model.zero_memory(2))
    assert max(float(loss) for loss in output.auxiliary_losses.values()) <= 1e-28


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window_length": 9}, "window_length"),
        ({"memory_length": 7}, "memory_length"),
        ({"num_heads": 3}, "num_heads"),
        ({"position_width": 5}, "position_width"),
        ({"dropout": 1.0}, "dropout"),
        ({"compression_rate": [2, 2]}, "compression_rate"),
        ({"compression_rate": 0}, "compression_rate"),
        ({"compression_rate": True}, "compression_rate"),
        ({"num_layers": 0}, "num_layers"),
        ({"compressed_memory_length": -1}, "compressed_memory_length"),
        ({"reconstruction_query_share": 0.0}, "reconstruction_query_share"),
        ({"memory_layers": [0, 3]}, "memory_layers"),
        ({"memory_layers": [0, 0]}, "memory_layers"),
        ({"memory_layers": 1}, "memory_layers"),
        ({"compression_function": "most_used", "compression_loss": "autoencoding"}, "nothing to train"),
        ({"compression_function": "most_used", "compressed_positions": "temporal"}, "compressed_positions"),
        ({"adaptive_span": True}, "attention_backend: reference"),
        ({"adaptive_span_ramp": 0}, "adaptive_span_ramp"),
    ],
)
def test_inconsistent_configuration_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny_model("compressive_transformer", **change)


def test_wrong_memory_lengths_are_named() -> None:
    with pytest.raises(UserError, match="memory_length"):
        float64_model("compressive_transformer").zero_memory(1, memory_length=3)
    with pytest.raises(UserError, match="without a compression function"):
        float64_model("transformer_xl").zero_memory(1, compressed_memory_length=8)


def test_layers_may_differ_in_rate() -> None:
    model = float64_model("compressive_transformer", compression_rate=[1, 2, 4])
    assert model.temporal_range == 3 * 8 + (1 + 2 + 4) * 4
    codes = codes_of(1, 32)
    whole, state = model(codes, model.zero_memory(1)), model.begin_steps(model.zero_memory(1), codes[:, :0])
    with torch.no_grad():
        for t in range(32):
            features, state = model.step(codes[:, t], state)
            assert (features - whole.features[:, t]).abs().max() <= 1e-12


def test_paper_sized_configuration_has_forty_million_parameters() -> None:
    with torch.device("meta"):
        model = build_model(model_config_class("compressive_transformer")())
    assert sum(p.numel() for p in model.parameters()) == 40_091_904
