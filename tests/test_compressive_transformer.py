"""The Compressive Transformer against a slow model written from the paper, and who gets gradient from what.

The oracle knows one lane, one window at a time; memories are Python lists of rows. It shares no code with the model:
it reads the parameters by name and computes what Algorithms 1 and 2 and Transformer-XL's formula say.
"""

import math
from typing import Any

import pytest
import torch
from tiny import TINY_MODELS, tiny_model
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.models import build_model, model_config_class
from ct_audio.models.compressive.memory import push
from ct_audio.models.layers import shared_linear
from ct_audio.models.state import detach_memory

TRANSFORMERS = [name for name, config in TINY_MODELS.items() if config["name"] == "compressive_transformer"]
COMPRESSIVE = [name for name in TRANSFORMERS if name != "transformer_xl"]


class Oracle:
    """One lane of a Compressive Transformer, from a state dict."""

    def __init__(self, model: Any) -> None:
        self.config, self.state = model.config, model.state_dict()
        self.memory: list[list[Tensor]] = [[] for _ in range(self.config.num_layers)]
        self.compressed: list[list[Tensor]] = [[] for _ in range(self.config.num_layers)]

    def window(self, codes: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Features [T, D] of one window and each layer's reconstruction loss; then the memory update."""
        config, losses = self.config, []
        rows = [self._embedding(code) for code in codes]
        for layer in range(config.num_layers):
            parameters = {k.split(".", 2)[2]: v for k, v in self.state.items() if k.startswith(f"layers.{layer}.")}
            self.usage: dict[int, list[Tensor]] = {}
            outputs = [self._output(parameters, rows, t, layer) for t in range(len(rows))]
            losses += self._update(parameters, layer, rows)
            rows = outputs
        if config.norm_position == "pre":
            rows = [self._norm({k: self.state[f"final_norm.{k}"] for k in ("weight", "bias")}, row) for row in rows]
        return torch.stack(rows), losses

    def _embedding(self, code: int) -> Tensor:
        config = self.config
        if config.adaptive_cutoffs is None:
            return self.state["embedding.weight"][code] * (math.sqrt(config.width) if config.tie_embeddings else 1)
        band = sum(code >= cutoff for cutoff in config.adaptive_cutoffs)
        row = self.state[f"embedding.tables.{band}"][code - [0, *config.adaptive_cutoffs][band]]
        return self.state[f"embedding.projections.{band}"] @ row * math.sqrt(config.width)

    def _output(self, parameters: dict[str, Tensor], rows: list[Tensor], t: int, layer: int) -> Tensor:
        pre = self.config.norm_position == "pre"
        attention_norm = {k: parameters[f"attention_norm.{k}"] for k in ("weight", "bias")}
        feedforward_norm = {k: parameters[f"feedforward_norm.{k}"] for k in ("weight", "bias")}

        def feedforward(row: Tensor) -> Tensor:
            hidden = parameters["feedforward.expand.weight"] @ row + parameters["feedforward.expand.bias"]
            return (
                parameters["feedforward.contract.weight"] @ hidden.clamp(min=0)
                + parameters["feedforward.contract.bias"]
            )

        seen = self.compressed[layer] + self.memory[layer] + rows[: t + 1]
        attended = self._attention(parameters, rows[t], seen, self._positions(layer, t), t)
        if pre:
            middle = rows[t] + attended
            return middle + feedforward(self._norm(feedforward_norm, middle))
        middle = self._norm(attention_norm, rows[t] + attended)
        return self._norm(feedforward_norm, middle + feedforward(middle))

    def _attention(
        self, parameters: dict[str, Tensor], row: Tensor, seen: list[Tensor], positions: list[float], here: int
    ) -> Tensor:
        heads = []
        for h in range(self.config.num_heads):
            query, keys, values = self._head(parameters, h, row, seen)
            scores = []
            for key, position in zip(keys, positions, strict=True):
                table = self._sinusoid(here - position)
                content = (query + parameters["content_bias"][h]) @ key
                by_position = (query + parameters["position_bias"][h]) @ (parameters["position"][h] @ table)
                scores.append((content + by_position) / math.sqrt(len(query)))
            weights = torch.softmax(torch.stack(scores), 0)
            if "span" in parameters:
                weights = weights * self._share(parameters["span"][h], list(range(len(seen))), here)
                weights = weights / weights.sum()
            for row_number, weight in enumerate(weights):
                self.usage.setdefault(row_number, []).append(weight)
            heads.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        return parameters["output.weight"] @ torch.cat(heads)

    def _share(self, span: Tensor, distances: list[int], here: int) -> Tensor:
        """Of rows by their distance from code `here` of the window; the oldest row comes first."""
        config = self.config
        rows = span.clamp(0, 1) * (config.memory_length + config.compressed_memory_length)
        shares = []
        for distance in reversed(distances):
            before_window = distance - here
            share = (config.adaptive_span_ramp + rows - before_window) / config.adaptive_span_ramp
            shares.append(share.clamp(0, 1) if before_window > 0 else torch.ones((), dtype=torch.float64))
        return torch.stack(shares)

    def _positions(self, layer: int, t: int) -> list[float]:
        """Of what code t of a window sees, relative to the window's first code."""
        memory, compressed, rate = self.memory[layer], self.compressed[layer], self.config.compression_rate
        positions: list[float] = list(range(-len(memory), t + 1))
        for back in range(1, len(compressed) + 1):
            codes = [-len(memory) - back * rate + i for i in range(rate)]
            temporal = self.config.compressed_positions == "temporal"
            positions.insert(0, sum(codes) / rate if temporal else -len(memory) - back)
        return positions

    def _head(
        self, parameters: dict[str, Tensor], h: int, row: Tensor, seen: list[Tensor]
    ) -> tuple[Tensor, list, list]:
        width, part = self.config.width, self.config.width // self.config.num_heads
        if self.config.norm_position == "pre":
            norm = {k: parameters[f"attention_norm.{k}"] for k in ("weight", "bias")}
            row, seen = self._norm(norm, row), [self._norm(norm, r) for r in seen]
        query = parameters["query.weight"][h * part : (h + 1) * part] @ row
        keys = [parameters["key_value.weight"][h * part : (h + 1) * part] @ r for r in seen]
        first = width + h * part
        return query, keys, [parameters["key_value.weight"][first : first + part] @ r for r in seen]

    def _update(self, parameters: dict[str, Tensor], layer: int, rows: list[Tensor]) -> list[Tensor]:
        """Algorithm 1 of the layer, and the loss of f_c."""
        config, rate = self.config, self.config.compression_rate
        if not config.keeps_memory(layer):
            return []
        rows = [row.detach() for row in rows]
        together = self.memory[layer] + rows
        empty = config.memory_length - len(self.memory[layer])
        num_old = max(len(rows) - empty, 0)
        old_memory, self.memory[layer] = together[:num_old], together[num_old:]
        if not config.compressed_memory_length:
            return []
        if config.compression_function == "most_used":
            new = self._most_used(layer, old_memory)
        else:
            new = [self._compress(parameters, old_memory[i : i + rate]) for i in range(0, len(old_memory), rate)]
        losses = self._loss(parameters, rows, old_memory, new)
        together = self.compressed[layer] + new
        self.compressed[layer] = together[max(len(together) - config.compressed_memory_length, 0) :]
        return losses

    def _most_used(self, layer: int, old_memory: list[Tensor]) -> list[Tensor]:
        first = len(self.compressed[layer])
        mean_usage = [float(torch.stack(self.usage[first + i]).mean()) for i in range(len(old_memory))]
        best = sorted(range(len(old_memory)), key=lambda i: -mean_usage[i])[
            : len(old_memory) // self.config.compression_rate
        ]
        return [old_memory[i] for i in sorted(best)]

    def _loss(self, parameters: dict[str, Tensor], rows: list, old_memory: list, new: list) -> list[Tensor]:
        if self.config.compression_loss not in ("attention_reconstruction", "autoencoding"):
            return []
        loss, count = torch.zeros((), dtype=torch.float64), len(rows) * self.config.width
        if self.config.compression_loss == "autoencoding":
            weight, bias = (parameters[f"compression_decoder.project.{key}"] for key in ("weight", "bias"))
            for index, row in enumerate(new):
                group = torch.cat(old_memory[index * self.config.compression_rate :][: self.config.compression_rate])
                loss = loss + (weight @ row + bias - group).square().sum()
            return [loss / count]
        share = round(self.config.reconstruction_query_share * len(rows))
        for index in range(share if new else 0):
            query = rows[index * len(rows) // share]
            loss = loss + sum(
                self._difference(parameters, h, query, old_memory, new) for h in range(self.config.num_heads)
            )
        return [loss * len(rows) / share / count]

    def _difference(self, parameters: dict[str, Tensor], h: int, row: Tensor, old: list, new: list) -> Tensor:
        attended = []
        for seen in (old, new):
            query, keys, values = self._head(parameters, h, row, seen)
            weights = torch.softmax(torch.stack([query @ key / math.sqrt(len(query)) for key in keys]), 0)
            attended.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        return (attended[0] - attended[1]).square().sum()

    def _compress(self, parameters: dict[str, Tensor], group: list[Tensor]) -> Tensor:
        function = self.config.compression_function
        p = {key.removeprefix("compression."): value for key, value in parameters.items() if "compression." in key}
        if function == "conv":
            return p["project.weight"] @ torch.cat(group) + p["project.bias"]
        if function == "dilated_conv":
            level = 0
            while f"levels.{level}.weight" in p:
                padded = [torch.zeros_like(group[0])] * 2**level + group
                group = [
                    p[f"levels.{level}.weight"] @ torch.cat([padded[i], padded[i + 2**level]])
                    + p[f"levels.{level}.bias"]
                    for i in range(len(group))
                ]
                level += 1
                if f"levels.{level}.weight" in p:
                    group = [row.clamp(min=0) for row in group]
            return group[-1]
        if function == "gru":
            state = torch.zeros_like(group[0])
            for row in group:
                from_row = (p["cell.weight_ih"] @ row + p["cell.bias_ih"]).chunk(3)
                from_state = (p["cell.weight_hh"] @ state + p["cell.bias_hh"]).chunk(3)
                reset, update = (torch.sigmoid(from_row[i] + from_state[i]) for i in (0, 1))
                state = (1 - update) * torch.tanh(from_row[2] + reset * from_state[2]) + update * state
            return state
        stacked = torch.stack(group)
        return stacked.mean(0) if function == "mean" else stacked.amax(0)

    def _sinusoid(self, distance: float) -> Tensor:
        pairs = self.config.position_width // 2
        angles = [distance / 10_000.0 ** (2 * pair / self.config.position_width) for pair in range(pairs)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)

    def _norm(self, parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        centred = row - row.mean()
        return parameters["weight"] * centred / (centred.square().mean() + 1e-5).sqrt() + parameters["bias"]


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
                (output.memory.memory, output.memory.memory_valid, oracle.memory),
                (output.memory.compressed_memory, output.memory.compressed_memory_valid, oracle.compressed),
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
        for i, layer in enumerate(model.layers):
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
    logits = features @ oracle.state["head.weight"].T + oracle.state["head.bias"]
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
        for layer in model.layers:
            assert layer.key_value.weight.requires_grad
            assert layer.key_value.weight.grad.any()


@pytest.mark.parametrize(("penalty", "bound"), [(-1.0, 1.0), (1.0, 0.0)])
def test_a_span_comes_back_from_its_bound(penalty: float, bound: float) -> None:
    """What drives the spans out for a while must not hold them there: from outside no gradient would reach them."""
    model = float64_model("compressive_transformer_adaptive_span")
    spans = [layer.span for layer in model.layers]
    optimizer = torch.optim.Adam(spans, lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        loss = penalty * torch.stack([layer.spans().mean() for layer in model.layers]).sum()
        (loss if step < 40 else -loss).backward()
        optimizer.step()
        model.after_update()
        if step == 39:
            assert all((span == bound).all() for span in spans)
    assert all(((span > 0) & (span < 1)).all() for span in spans)


def test_memories_get_no_gradient_from_later_windows() -> None:
    model = float64_model("compressive_transformer")
    memory = model(codes_of(1, 32), model.zero_memory(1)).memory
    rows = [part.detach().requires_grad_() for part in (*memory.memory, *memory.compressed_memory)]
    layers = model.config.num_layers
    memory = memory._replace(memory=tuple(rows[:layers]), compressed_memory=tuple(rows[layers:]))
    model(codes_of(1, 8), memory).features.sum().backward()
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
