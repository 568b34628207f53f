"""WaveNet (van den Oord et al. 2016, arXiv 1609.03499): the convolutional baseline, written as matrix products.

Layer l sees its own input now and `dilation_l` codes ago, so a kernel of two is two products, one with the chunk and
one with the chunk shifted. What the shift needs from before the chunk is the memory: each layer's last `dilation`
inputs.
Shape letters: L layers, B lanes, T rows of a chunk, R rows before stepping, C residual channels, S skip channels,
Q rows of all queues (the sum of the dilations).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ct_audio.common.errors import UserError
from ct_audio.models.composition import ComposedModel
from ct_audio.models.interface import CompiledStack, Stack, StackOutput, refuse_lengths
from ct_audio.models.layers import document_age
from ct_audio.models.parts import PartsConfig, make_front_end, make_head
from ct_audio.models.state import tensor_options


@dataclass(frozen=True)
class Config(PartsConfig):
    """A WaveNet.

    Attributes:
        num_layers: gated layers.
        layers_per_cycle: dilations are 1, 2, 4, ... for this many layers, then begin again at 1.
        width: residual channels C.
        skip_width: skip and head channels S.
        dropout: share of each layer's gated output that is dropped in training.
        norm_position: "none" as in the paper, or "pre": each gate hears its input brought to mean 0 and variance 1 over
            the channels, as a pre-norm transformer's sublayer does; tanh and sigmoid are saturated less.
        The others: see `PartsConfig`.
    """

    name: Literal["wavenet"] = "wavenet"
    num_layers: int = 30
    layers_per_cycle: int = 10
    width: int = 472
    skip_width: int = 472
    dropout: float = 0.0
    norm_position: Literal["none", "pre"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"num_layers": 2, "layers_per_cycle": 1, "width": 1, "skip_width": 1}
        for field, minimum in least.items():
            if getattr(self, field) < minimum:
                raise UserError(f"model.{field}: expected at least {minimum}, got {getattr(self, field)}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout: expected a number in [0, 1), got {self.dropout}")
        if self.layers_per_cycle > 20:
            raise UserError(
                f"model.layers_per_cycle: expected at most 20 (a dilation of 524,288), got {self.layers_per_cycle}; "
                f"use more cycles"
            )

    @property
    def dilations(self) -> tuple[int, ...]:
        """Of each layer."""
        return tuple(2 ** (layer % self.layers_per_cycle) for layer in range(self.num_layers))

    @property
    def temporal_range(self) -> int:
        """Distance in codes to the farthest code that can change a prediction: the sum of the dilations."""
        return sum(self.dilations)

    @property
    def attention_cost(self) -> int:
        """0: there is no attention."""
        return 0


class WaveNetMemory(NamedTuple):
    """What a lane remembers.

    Attributes:
        queues: L tensors [B, dilation, C], what each layer heard last (its inputs, normalised with `norm_position:
            pre`), oldest first; zeros before the stream begins.
    """

    queues: tuple[Float[Tensor, "B _ C"], ...]


class LayerViews(NamedTuple):
    """A layer's parts of the buffers of a `StepState` and of the weights, made once: a step makes only small products.

    Attributes:
        total: sums before tanh and sigmoid; `filter` and `gate` are its halves.
        inputs, heard, gated: the layer's input, that input as the gate hears it, and the gated output.
        now_weight, residual_weight: as matrices that rows are multiplied by.
        next_inputs: the input of the next layer; None, as `residual_weight`, for the last layer.
    """

    total: Float[Tensor, "B C2"]
    filter: Float[Tensor, "B C"]
    gate: Float[Tensor, "B C"]
    inputs: Float[Tensor, "B C"]
    heard: Float[Tensor, "B C"]
    gated: Float[Tensor, "B C"]
    now_weight: Float[Tensor, "C C2"]
    residual_weight: Float[Tensor, "C C"] | None
    next_inputs: Float[Tensor, "B C"] | None


@dataclass(slots=True)
class StepState:
    """Buffers of the incremental path; `step` overwrites them.

    Attributes:
        rings: the queues of all layers one below the other; layer l owns `dilations[l]` rows from `offsets[l]`.
        count: rows stepped so far; the oldest row of layer l lies in its row `count % dilations[l]`.
        inputs, totals, gated: room for each layer's input, for its sums before tanh and sigmoid, and for its output.
        heard: the inputs as the gates hear them; without normalisation `inputs` itself.
        offsets, dilations: int64.
        layers: views of these buffers.
    """

    rings: Float[Tensor, "Q B C"]
    count: Int[Tensor, ""]
    inputs: Float[Tensor, "L B C"]
    heard: Float[Tensor, "L B C"]
    totals: Float[Tensor, "L B C2"]
    gated: Float[Tensor, "L B C"]
    offsets: Int[Tensor, " L"]
    dilations: Int[Tensor, " L"]
    layers: list[LayerViews]

    @property
    def memory(self) -> WaveNetMemory:
        """The memory as of now: what `forward` over the same rows would have returned."""
        count = int(self.count)
        rings = self.rings.split(self.dilations.tolist())
        return WaveNetMemory(tuple(rearrange(ring.roll(-(count % len(ring)), 0), "q b c -> b q c") for ring in rings))


class WaveNetStack(Stack):
    """Gated dilated layers with residual and skip connections.

        z_l = tanh(P_l x_l[t - d_l] + N_l x_l[t] + b_l) * sigmoid(P'_l x_l[t - d_l] + N'_l x_l[t] + b'_l)
        x_{l+1} = x_l + R_l z_l          features = relu(H relu(sum_l S_l z_l + s) + h)

    Parameters of one kind are stacked over layers: the optimizer meets a dozen tensors however deep the model is.
    Source: equation 2 and figure 4 of the paper. Differs: no bias in the residual and in each skip projection (the
    embedding and `skip_bias` have it); the last layer has no residual projection, which would never get a gradient;
    before a stream begins, each layer sees zeros. Not in the paper: with `norm_position: pre` the gate hears N(x_l) in
    place of x_l; N is layer normalisation without gain and bias, which the weights after it would take up.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        layers, width, skip_width = config.num_layers, config.width, config.skip_width
        self.dilations = config.dilations
        self.width, self.output_width = width, skip_width
        # Index 0 of the second dimension is the filter (tanh), index 1 the gate (sigmoid).
        self.past_weight = nn.Parameter(torch.randn(layers, 2, width, width) / math.sqrt(2 * width))
        self.now_weight = nn.Parameter(torch.randn(layers, 2, width, width) / math.sqrt(2 * width))
        self.gate_bias = nn.Parameter(torch.zeros(layers, 2, width))
        self.residual_weight = nn.Parameter(torch.randn(layers - 1, width, width) / math.sqrt(width))
        # tanh * sigmoid of unit inputs has a root mean square of 1/3: the factor 3 makes the skip sum of unit size.
        self.skip_weight = nn.Parameter(3 * torch.randn(layers, skip_width, width) / math.sqrt(layers * width))
        self.skip_bias = nn.Parameter(torch.zeros(skip_width))
        self.hidden = nn.Linear(skip_width, skip_width)

    def zero_memory(
        self, num_lanes: int, *, memory_length: int | None = None, compressed_memory_length: int | None = None
    ) -> WaveNetMemory:
        """Memory of a stream that has not begun.

        Raises:
            UserError: a length was passed; the dilations alone decide how much this model remembers.
        """
        refuse_lengths("wavenet", memory_length=memory_length, compressed_memory_length=compressed_memory_length)
        like = tensor_options(self.skip_bias)
        return WaveNetMemory(
            tuple(torch.zeros(num_lanes, dilation, self.config.width, **like) for dilation in self.dilations)
        )

    def forward(
        self,
        rows: Float[Tensor, "B T C"],
        memory: WaveNetMemory,
        *,
        document_starts: Bool[Tensor, "B T"] | None = None,
    ) -> StackOutput:
        """Features [B, T, S] and next memory of a chunk of any length; gradients end where the chunk begins."""
        self._check_memory(memory, rows.shape[0])
        age = None if document_starts is None else document_age(document_starts)
        x = rows
        past_weights, now_weights, biases = (
            stacked.flatten(0, 1).unbind() for stacked in (self.past_weight, self.now_weight, self.gate_bias)
        )
        residual_weights, skip_weights = self.residual_weight.unbind(), self.skip_weight.unbind()
        skip = self.skip_bias
        queues = []
        for layer in range(len(self.dilations)):
            heard = self._heard(x)
            past, queue = _shift(memory.queues[layer].detach(), heard, age)
            queues.append(queue)
            halves = []
            for half in (2 * layer, 2 * layer + 1):  # filter and gate apart: contiguous, hence fast tanh and sigmoid
                total = torch.addmm(biases[half], past.flatten(0, 1), past_weights[half].t())
                halves.append(torch.addmm(total, heard.flatten(0, 1), now_weights[half].t()))
            gated = (halves[0].tanh_() * halves[1].sigmoid_()).view(x.shape)
            gated = F.dropout(gated, self.config.dropout, self.training)
            skip = skip + F.linear(gated, skip_weights[layer])
            if layer < len(residual_weights):
                x = x + F.linear(gated, residual_weights[layer])
        return StackOutput(self._features(skip), WaveNetMemory(tuple(queues)), {})

    @torch.inference_mode()
    def begin_steps(
        self, memory: WaveNetMemory, rows: Float[Tensor, "B R C"], *, document_starts: Bool[Tensor, "B R"] | None = None
    ) -> StepState:
        """State for `step` after R more rows (any number, 0 too), which run in parallel."""
        self._check_memory(memory, rows.shape[0])
        if rows.shape[1]:
            memory = self(rows, memory, document_starts=document_starts).memory
        rings = torch.cat([rearrange(queue, "b q c -> q b c") for queue in memory.queues])
        return self._step_state(rings, torch.zeros((), dtype=torch.int64, device=rings.device))

    @torch.inference_mode()
    def step(
        self, rows: Float[Tensor, "B C"], state: StepState, *, document_starts: Bool[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B S"], StepState]:
        """Features after one more row a lane; consumes `state`. No dropout and no gradients.

        What every layer saw `dilation` codes ago is known beforehand, so that its share is one batched product.
        """
        if document_starts is not None:  # before a stream begins, each layer sees zeros
            state.rings.masked_fill_(document_starts[:, None], 0)
        oldest = torch.remainder(state.count, state.dilations).add_(state.offsets)
        past = state.rings.index_select(0, oldest)
        biases = rearrange(self.gate_bias, "l half c -> l 1 (half c)")
        past_weights = rearrange(self.past_weight, "l half c_out c -> l c (half c_out)")
        torch.baddbmm(biases, past, past_weights, out=state.totals)
        state.layers[0].inputs.copy_(rows)
        is_normalised = self.config.norm_position == "pre"
        for layer in state.layers:
            if is_normalised:
                layer.heard.copy_(self._heard(layer.inputs))
            layer.total.addmm_(layer.heard, layer.now_weight)
            torch.mul(layer.filter.tanh_(), layer.gate.sigmoid_(), out=layer.gated)
            if layer.residual_weight is not None:
                torch.addmm(layer.inputs, layer.gated, layer.residual_weight, out=layer.next_inputs)
        state.rings.index_copy_(0, oldest, state.heard)
        state.count.add_(1)
        skip = torch.bmm(state.gated, self.skip_weight.mT).sum(0)
        return self._features(skip + self.skip_bias), state

    @torch.inference_mode()
    def clone_state(self, state: StepState) -> StepState:
        """An independent copy of a step state."""
        return self._step_state(state.rings.clone(), state.count.clone())

    def compiled(self) -> CompiledStack:
        return CompiledWaveNetStack(self)

    def _step_state(self, rings: Float[Tensor, "Q B C"], count: Int[Tensor, ""]) -> StepState:
        dilations = torch.tensor(self.dilations, device=rings.device)
        shape = (len(self.dilations), *rings.shape[1:])
        inputs, gated = rings.new_zeros(shape), rings.new_zeros(shape)
        heard = torch.zeros_like(inputs) if self.config.norm_position == "pre" else inputs
        totals = rings.new_zeros(*shape[:2], 2 * shape[2])
        now_weights = rearrange(self.now_weight, "l half c_out c -> l c (half c_out)")
        filters, gates = totals.split(shape[2], dim=-1)
        parts = (totals, filters, gates, inputs, heard, gated, now_weights)
        ahead = [*zip(self.residual_weight.mT, inputs[1:], strict=True), (None, None)]
        layers = [LayerViews(*views, *more) for *views, more in zip(*parts, ahead, strict=True)]
        offsets = dilations.cumsum(0) - dilations
        return StepState(rings, count, inputs, heard, totals, gated, offsets, dilations, layers)

    def _heard(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        return F.layer_norm(x, x.shape[-1:]) if self.config.norm_position == "pre" else x

    def _features(self, skip: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch S"]:
        return F.relu(self.hidden(F.relu(skip)))

    def _check_memory(self, memory: WaveNetMemory, num_lanes: int) -> None:
        expected = [(num_lanes, dilation, self.config.width) for dilation in self.dilations]
        got = [tuple(queue.shape) for queue in memory.queues]
        if got != expected:
            raise UserError(
                f"wavenet: expected queues of shapes {expected[0]}, ..., {expected[-1]}, got {got}; "
                f"pass zero_memory({num_lanes}) or the memory of the chunk before"
            )


class CompiledWaveNetStack(CompiledStack):
    """A `WaveNetStack` as it is now, for the kernels."""

    lanes_together = 8

    @torch.no_grad()
    def __init__(self, stack: WaveNetStack) -> None:
        from ct_audio.models import kernels  # imports numba
        from ct_audio.models.compiled import packed

        self._module, self.sample = stack, kernels.sample_wavenet
        past, now = (rearrange(w, "l half out c -> l c (half out)") for w in (stack.past_weight, stack.now_weight))
        residual = torch.cat([stack.residual_weight, torch.zeros_like(stack.now_weight[:1, 0])])
        dilations = np.array(stack.dilations, np.int64)
        norm_width = stack.width if stack.config.norm_position == "pre" else 0
        self.weights = kernels.WaveNetWeights(
            gate=packed(torch.cat([past, now], dim=1)),
            gate_bias=packed(stack.gate_bias.flatten(1)),
            out=packed(torch.cat([residual.mT, stack.skip_weight.mT], dim=2)),
            skip_bias=packed(stack.skip_bias),
            hidden=packed(stack.hidden.weight.T),
            hidden_bias=packed(stack.hidden.bias),
            norm=packed(stack.skip_bias.new_tensor([[1.0], [0.0]]).repeat(1, norm_width)),
            offsets=dilations.cumsum() - dilations,
            dilations=dilations,
        )
        self._state = kernels.WaveNetState

    def num_lanes(self, state: StepState) -> int:
        return state.rings.shape[1]

    def from_state(self, state: StepState) -> Any:
        rings = torch.cat(state.memory.queues, dim=1)
        return self._state(rings.clone().numpy(), np.zeros(len(rings), np.int64))

    def to_state(self, state: Any) -> StepState:
        rings = torch.from_numpy(state.rings).split(list(self._module.dilations), dim=1)
        queues = tuple(ring.roll(-(int(state.count[0]) % ring.shape[1]), 1) for ring in rings)
        return self._module.begin_steps(WaveNetMemory(queues), rings[0][:, :0])


class WaveNet(ComposedModel):
    """Embedding, `WaveNetStack`, softmax; fresh parameters are drawn from torch's global generator."""

    config: Config
    stack: WaveNetStack

    def __init__(self, config: Config) -> None:
        front_end = make_front_end(config, nn.Embedding(config.vocab_size, config.width))
        stack = WaveNetStack(config)
        super().__init__(config, front_end, stack, make_head(config, nn.Linear(config.skip_width, config.vocab_size)))


def _shift(
    queue: Float[Tensor, "B Q C"], x: Float[Tensor, "B T C"], age: Int[Tensor, "B T"] | None
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B Q C"]]:
    """The inputs Q codes ago and the next queue; zeros stand for what the present document cannot see.

    The next queue shares no storage with the chunk, which would otherwise live until the chunk after.
    """
    dilation, length = queue.shape[1], x.shape[1]
    kept = min(dilation, length)
    past = torch.cat([queue[:, :length], x[:, : length - kept]], dim=1)
    queue = torch.cat([queue[:, kept:], x[:, length - kept :]], dim=1)
    if age is not None:
        past = past.masked_fill((age < dilation)[..., None], 0)
        # The next queue's row j was the input (dilation - 1 - j) codes before the chunk's last.
        distance = torch.arange(dilation - 1, -1, -1, device=age.device)
        queue = queue.masked_fill((distance > age[:, -1:])[..., None], 0)
    return past, queue
