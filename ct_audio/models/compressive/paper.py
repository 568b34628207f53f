"""The Compressive Transformer as the paper writes it: Algorithms 1 and 2 of Rae et al. 2019 as plain loops.

Read this first. One lane, one window at a time; a memory is a Python list of rows [D], the oldest first. Nothing here
is fast, and nothing is shared with the code that is: `stack.py` computes the same for many lanes and windows at once,
and the tests compare outputs, memories, losses and gradients with these loops.

    at every window, in every layer (Algorithm 1)
        mem     <- concat(compressed memory, memory)
        a       <- layer_norm(attention(h, mem and h) + h)
        old_mem <- the oldest rows of the memory, which leave
        new_cm  <- f_c(old_mem)                               c times fewer rows
        memory            <- the newest n_m rows of concat(memory, h)
        compressed memory <- the newest n_cm rows of concat(compressed memory, new_cm)
        h       <- layer_norm(mlp(a) + a)
    and the loss that trains f_c, and nothing else (Algorithm 2)
        |attn(h, old_mem) - attn(h, new_cm)|^2                by content alone, all but f_c held fixed

What differs from the paper is written where it happens.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ct_audio.models.compressive.config import StackConfig

Rows = list[Tensor]
Parameters = Mapping[str, Tensor]


class PaperStack:
    """One lane of a `CompressiveStack`, from its configuration and its parameters.

    Args:
        parameters: by name, as `CompressiveStack.state_dict()` has them.
    Attributes:
        memory, compressed_memory: of each layer, rows [D], the oldest first; empty before the stream begins. Differs:
            the paper begins with memories of zeros and attends to them.
        queue: of each layer, what its convolution may still see. The paper has no convolutions.
    """

    def __init__(self, config: StackConfig, parameters: Parameters) -> None:
        self.config = config
        self.parameters = parameters
        self.memory: list[Rows] = [[] for _ in range(config.num_layers)]
        self.compressed_memory: list[Rows] = [[] for _ in range(config.num_layers)]
        self.queue: list[Rows] = [[] for _ in range(config.num_layers)]

    def window(self, rows: Rows) -> tuple[Rows, list[Tensor]]:
        """Algorithm 1 for one window.

        Args:
            rows: [D] each, the embedded codes of the window; the first window of a stream may be shorter (it is one
                where a document starts in the middle of a window).
        Returns:
            an output row for each, and the loss of f_c of each layer that has one; the memories are updated.
        """
        losses: list[Tensor] = []
        for layer in range(self.config.num_layers):
            parameters = part(self.parameters, f"layers.{layer}.")
            if self.config.convolution_length:
                rows = self._convolve(part(self.parameters, f"convolutions.{layer}."), layer, rows)
            weights: list[Tensor] = []  # of every head and row, over what it sees; most_used wants them
            outputs = [self._output(parameters, layer, rows, here, weights) for here in range(len(rows))]
            losses += self._update_memories(parameters, layer, rows, weights)
            rows = outputs
        if self.config.norm_position == "pre":
            rows = [layer_norm(part(self.parameters, "final_norm."), row) for row in rows]
        return rows, losses

    def _output(self, parameters: Parameters, layer: int, rows: Rows, here: int, weights: list[Tensor]) -> Tensor:
        """Row `here` of the window after attention and feed-forward block."""
        attention_norm, feedforward_norm = part(parameters, "attention_norm."), part(parameters, "feedforward_norm.")
        seen = self.compressed_memory[layer] + self.memory[layer] + rows[: here + 1]
        positions = self._positions(layer, here)
        attended = relative_attention(self.config, parameters, rows[here], seen, positions, here, weights)
        if self.config.norm_position == "pre":
            middle = rows[here] + attended
            return middle + feedforward(part(parameters, "feedforward."), layer_norm(feedforward_norm, middle))
        middle = layer_norm(attention_norm, rows[here] + attended)
        return layer_norm(feedforward_norm, middle + feedforward(part(parameters, "feedforward."), middle))

    def _convolve(self, parameters: Parameters, layer: int, rows: Rows) -> Rows:
        """Each row with its convolution, by sums over taps; earlier windows come without a graph."""
        read = [layer_norm(part(parameters, "norm."), row) for row in rows]
        taps = parameters["taps"]
        outputs = []
        for here, row in enumerate(rows):
            seen = (self.queue[layer] + read[: here + 1])[-len(taps) :]
            total = parameters["bias"]
            for tap, one in zip(reversed(taps), reversed(seen), strict=False):
                total = total + one * tap
            outputs.append(row + total)
        self.queue[layer] = [row.detach() for row in (self.queue[layer] + read)][-len(taps) :]
        return outputs

    def _positions(self, layer: int, here: int) -> list[float]:
        """Of all that row `here` sees, relative to the window's first row."""
        memory, compressed, rate = self.memory[layer], self.compressed_memory[layer], self._rate(layer)
        positions = [float(position) for position in range(-len(memory), here + 1)]
        for back in range(1, len(compressed) + 1):
            stands_for = [-len(memory) - back * rate + i for i in range(rate)]
            temporal = self.config.compressed_positions == "temporal"
            positions.insert(0, sum(stands_for) / rate if temporal else float(-len(memory) - back))
        return positions

    def _update_memories(self, parameters: Parameters, layer: int, rows: Rows, weights: list[Tensor]) -> list[Tensor]:
        """The second half of Algorithm 1; returns the layer's loss of f_c, or nothing where there is none."""
        config = self.config
        if not config.keeps_memory(layer):
            return []
        rows = [row.detach() for row in rows]
        together = self.memory[layer] + rows
        num_old = max(len(together) - config.memory_length, 0)
        old_memory, self.memory[layer] = together[:num_old], together[num_old:]
        if not config.compressed_memory_length:
            return []
        rate = self._rate(layer)
        if config.compression_loss == "none":
            parameters = held_fixed(parameters)
        whole_groups = in_whole_groups(old_memory, rate, pad=config.straddling_groups == "zero")
        if config.compression_function == "most_used":
            new = most_used(old_memory, weights, len(self.compressed_memory[layer]), config.window_length // rate)
        else:
            groups = [whole_groups[i : i + rate] for i in range(0, len(whole_groups), rate)]
            new = [compress(config.compression_function, part(parameters, "compression."), group) for group in groups]
        kept = new if config.compression_loss == "bptt" else [row.detach() for row in new]
        together = self.compressed_memory[layer] + kept
        self.compressed_memory[layer] = together[max(len(together) - config.compressed_memory_length, 0) :]
        if config.compression_loss == "attention_reconstruction":
            return [reconstruction_loss(config, held_fixed(parameters), rows, old_memory, new)]
        if config.compression_loss == "autoencoding":
            return [autoencoding_loss(part(parameters, "compression_decoder."), rows, whole_groups, new, rate)]
        return []

    def _rate(self, layer: int) -> int:
        return self.config.compression_rates[layer]


def reconstruction_loss(
    config: StackConfig, parameters: Parameters, rows: Rows, old_memory: Rows, new_compressed: Rows
) -> Tensor:
    """Algorithm 2 for one layer and window: how far attention over the compressed rows is from that over the old ones.

    Parameters, rows and old memory come without a graph (the algorithm's stop_gradient): only f_c, which made
    `new_compressed`, gets a gradient.
    Differs: the mean of squares in place of the L2 norm, which has no gradient at 0; a share of the queries, evenly
    spaced, where the configuration says so; 0 where nothing has left the memory yet.
    """
    loss = torch.zeros((), dtype=rows[0].dtype)
    num_queries = round(config.reconstruction_query_share * len(rows))
    for index in range(num_queries if new_compressed else 0):
        query_row = rows[index * len(rows) // num_queries]
        for head in range(config.num_heads):
            attended = []
            for seen in (old_memory, new_compressed):
                query, keys, values = project(config, parameters, head, query_row, seen)
                weights = softmax([query @ key / math.sqrt(len(query)) for key in keys])
                attended.append(weighted_sum(weights, values))
            loss = loss + (attended[0] - attended[1]).square().sum()
    return loss / (num_queries * config.width)


def relative_attention(
    config: StackConfig,
    parameters: Parameters,
    row: Tensor,
    seen: Rows,
    positions: list[float],
    here: int,
    all_weights: list[Tensor],
) -> Tensor:
    """Attention of one row over all that it sees, by content and by distance (Transformer-XL, section 3.3).

    score = [(q + u) . k + (q + v) . W_R s(here - position)] / sqrt(head width), s the table of sines and cosines
    With rotary positions: see `rotary_score`.
    """
    heads = []
    for head in range(config.num_heads):
        query, keys, values = project(config, parameters, head, row, seen)
        scores = []
        for key, position in zip(keys, positions, strict=True):
            if config.positions == "rotary":
                scores.append(rotary_score(query, key, here - position))
                continue
            for_content = query + parameters["content_bias"][head]
            for_position = query + parameters["position_bias"][head]
            table = sinusoid(here - position, config.position_width)
            by_position = for_position @ (parameters["position"][head] @ table.to(row.dtype))
            scores.append((for_content @ key + by_position) / math.sqrt(len(query)))
        weights = softmax(scores)
        if "span" in parameters:
            weights = weights * span_share(config, parameters["span"][head], len(seen), here)
            weights = weights / weights.sum()
        all_weights.append(weights)
        heads.append(weighted_sum(weights, values))
    return parameters["output.weight"] @ torch.cat(heads)


def rotary_score(query: Tensor, key: Tensor, distance: float) -> Tensor:
    """Each pair of features as a complex number, turned by an angle that grows with the distance (Su et al. 2021).

    score = sum over pairs of Re(query conj(key) exp(i distance frequency)) / sqrt(head width)
    """
    num_pairs = len(query) // 2
    score = torch.zeros((), dtype=query.dtype)
    for pair in range(num_pairs):
        angle = distance * 10_000.0 ** (-pair / num_pairs)
        (q_real, q_imaginary), (k_real, k_imaginary) = query[pair::num_pairs], key[pair::num_pairs]
        score = score + math.cos(angle) * (q_real * k_real + q_imaginary * k_imaginary)
        score = score - math.sin(angle) * (q_imaginary * k_real - q_real * k_imaginary)
    return score / math.sqrt(len(query))


def project(
    config: StackConfig, parameters: Parameters, head: int, row: Tensor, seen: Rows
) -> tuple[Tensor, Rows, Rows]:
    """Query of a row; keys and values of the rows that it sees; pre-norm is applied when a row is read."""
    if config.norm_position == "pre":
        norm = part(parameters, "attention_norm.")
        row, seen = layer_norm(norm, row), [layer_norm(norm, other) for other in seen]
    size = config.width // config.num_heads
    own = slice(head * size, (head + 1) * size)
    keys, values = parameters["key_value.weight"].chunk(2)
    shared = head * len(keys) // config.width * size  # of heads in a row, where there are fewer keys and values
    both = slice(shared, shared + size)
    return parameters["query.weight"][own] @ row, [keys[both] @ r for r in seen], [values[both] @ r for r in seen]


def span_share(config: StackConfig, span: Tensor, num_seen: int, here: int) -> Tensor:
    """What an adaptive span leaves of each weight (Sukhbaatar et al. 2019); distances count from the window's start."""
    reach = span.clamp(0, 1) * (config.memory_length + config.compressed_memory_length)
    shares = []
    for distance in reversed(range(num_seen)):
        before_window = distance - here
        share = ((config.adaptive_span_ramp + reach - before_window) / config.adaptive_span_ramp).clamp(0, 1)
        shares.append(share if before_window > 0 else torch.ones_like(share))
    return torch.stack(shares)


def compress(function: str, parameters: Parameters, group: Rows) -> Tensor:
    """f_c: one compressed row out of a group of c rows."""
    if function == "conv":
        return parameters["project.weight"] @ torch.cat(group) + parameters["project.bias"]
    if function == "mean":
        return torch.stack(group).mean(0)
    if function == "max":
        return torch.stack(group).amax(0)
    return dilated_convolutions(parameters, group) if function == "dilated_conv" else gated_unit(parameters, group)


def dilated_convolutions(parameters: Parameters, group: Rows) -> Tensor:
    """Kernels of two with dilations 1, 2, 4, ..., ReLU between, read at the last row of the group."""
    level = 0
    while f"levels.{level}.weight" in parameters:
        weight, bias = parameters[f"levels.{level}.weight"], parameters[f"levels.{level}.bias"]
        padded = [torch.zeros_like(group[0])] * 2**level + group
        group = [weight @ torch.cat([padded[i], padded[i + 2**level]]) + bias for i in range(len(group))]
        level += 1
        if f"levels.{level}.weight" in parameters:
            group = [row.clamp(min=0) for row in group]
    return group[-1]


def gated_unit(parameters: Parameters, group: Rows) -> Tensor:
    """A gated recurrent unit over the group; its last state."""
    state = torch.zeros_like(group[0])
    for row in group:
        from_row = (parameters["cell.weight_ih"] @ row + parameters["cell.bias_ih"]).chunk(3)
        from_state = (parameters["cell.weight_hh"] @ state + parameters["cell.bias_hh"]).chunk(3)
        reset, update = (torch.sigmoid(from_row[i] + from_state[i]) for i in (0, 1))
        state = (1 - update) * torch.tanh(from_row[2] + reset * from_state[2]) + update * state
    return state


def in_whole_groups(old_memory: Rows, rate: int, *, pad: bool) -> Rows:
    """Rows that leave, without the incomplete group at their beginning, or with zeros before it.

    There is one where the stream began in the middle of a window. The paper has no documents.
    """
    incomplete = len(old_memory) % rate
    if not incomplete:
        return old_memory
    missing = [torch.zeros_like(old_memory[0])] * (rate - incomplete)
    return missing + old_memory if pad else old_memory[incomplete:]


def most_used(old_memory: Rows, weights: list[Tensor], num_compressed: int, num_kept: int) -> Rows:
    """The rows with the largest mean attention, in the order of time; all where no more leave than are kept.

    Args:
        weights: of every head and row of the window, over compressed memory, memory and the window so far.
    """
    usage = []
    for index in range(len(old_memory)):
        place = num_compressed + index
        got = [each[place].item() for each in weights if place < len(each)]
        usage.append(sum(got) / len(got))
    best = sorted(range(len(old_memory)), key=lambda index: -usage[index])[:num_kept]
    return [old_memory[index] for index in sorted(best)]


def autoencoding_loss(parameters: Parameters, rows: Rows, old_memory: Rows, new_compressed: Rows, rate: int) -> Tensor:
    """Mean squared error of the old rows as a linear map of their compressed row gives them back (section 3.1)."""
    loss = torch.zeros((), dtype=rows[0].dtype)
    for index, row in enumerate(new_compressed):
        group = torch.cat(old_memory[index * rate : (index + 1) * rate])
        loss = loss + (parameters["project.weight"] @ row + parameters["project.bias"] - group).square().sum()
    return loss / (len(rows) * len(rows[0]))


def feedforward(parameters: Parameters, row: Tensor) -> Tensor:
    """Linear, ReLU, linear."""
    hidden = (parameters["expand.weight"] @ row + parameters["expand.bias"]).clamp(min=0)
    return parameters["contract.weight"] @ hidden + parameters["contract.bias"]


def layer_norm(parameters: Parameters, row: Tensor) -> Tensor:
    """To mean 0 and variance 1, then scaled and shifted."""
    centred = row - row.mean()
    return parameters["weight"] * centred / (centred.square().mean() + 1e-5).sqrt() + parameters["bias"]


def sinusoid(distance: float, width: int) -> Tensor:
    """s(distance): sines, then cosines, at geometrically spaced frequencies (Vaswani et al. 2017, section 3.5)."""
    angles = [distance / 10_000.0 ** (2 * pair / width) for pair in range(width // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def softmax(scores: list[Tensor]) -> Tensor:
    """Positive weights that sum to 1."""
    return torch.softmax(torch.stack(scores), 0)


def weighted_sum(weights: Tensor, values: Rows) -> Tensor:
    """Of rows."""
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(0)


def held_fixed(parameters: Parameters) -> Parameters:
    """The same values, of which nothing learns (stop_gradient)."""
    return {name: value.detach() for name, value in parameters.items()}


def part(parameters: Parameters, prefix: str) -> Parameters:
    """The parameters whose names begin so, without it."""
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
