"""Machine code: linear prediction, and models stepped code by code with the draws inside the loop, compiled by numba.

All kernels are in this file, because numba's cache on disk does not see that another file has changed. Functions made
inside functions never hit that cache, so there are none, and constants of other modules come as arguments. Importing
this module imports numba (half a second): import it where it is used.

Products vectorise over outputs, never over what is summed: each sum has one order, whatever the vector width and the
number of lanes, and lanes never meet. A lane's codes and log-probabilities are therefore the same bits in any company
and on any number of threads. `contract` allows fused multiply-add; `reassoc` stands in sums within a row only.
Shape letters: B lanes, N codes of a block, V codes of the vocabulary, D width of a row, D' of a feature, S what the
front end has for the head, L layers, H heads, G heads of keys and values, E head width, P position width, F
feed-forward width, T window, M memory, K compressed memory, C compression rate, Q compressed rows of a ring
(K + T / C), R rows of a ring (M + T). Predictor: A order, W samples of its window.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

STATE_VERSION = 2
"""Of what a state means in the middle of a window: a saved sampling goes on with the version that began it."""

PADDING = 32
"""Columns beyond the last of what is read by whole vectors."""


def _compiled(fastmath: Any) -> Callable[[Any], Any]:
    """Decorator: machine code, kept on disk where numba finds a folder that can be written to."""

    def decorate(function: Any) -> Any:
        options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no such folder: compiled anew in every process
            return njit(**options)(function)

    return decorate


_exact = _compiled(False)
_strict = _compiled({"contract"})
_sums = _compiled({"contract", "reassoc", "nsz"})
_maximum = _compiled({"nnan", "nsz"})


# ---------------------------------------------------------------------------------------------------------------------
# Linear prediction (float64, see `autocorrelation.py`)
# ---------------------------------------------------------------------------------------------------------------------


class Predictor(NamedTuple):
    """What a predictor follows a signal with.

    Attributes:
        waveform: [V] float64, the sample of each code.
        window: [W] float64, weights of the past samples; empty where nothing is predicted.
        numbers: [7] float64: hop length, decay of the scale, its floor in cells, the first residual, white noise
            correction, bandwidth expansion, scale of the next sample where nothing is predicted.
    """

    waveform: np.ndarray
    window: np.ndarray
    numbers: np.ndarray


class PredictorState(NamedTuple):
    """What a lane remembers: `AutocorrelationMemory`, and the last prediction and scale.

    Attributes:
        history [B, W], weights [B, A], residual [B], said [B, 2]: float64.
        count: [B] int64.
    """

    history: np.ndarray
    weights: np.ndarray
    residual: np.ndarray
    count: np.ndarray
    said: np.ndarray


@_exact
@no_type_check
def levinson(autocorrelation, weights, before):
    """Weights of the prediction by Levinson's recursion."""
    error = autocorrelation[0]
    for i in range(len(weights)):
        reflection = autocorrelation[i + 1]
        for j in range(i):
            reflection -= weights[j] * autocorrelation[i - j]
        reflection /= error
        for j in range(i):
            before[j] = weights[j]
        for j in range(i):
            weights[j] = before[j] - reflection * before[i - 1 - j]
        weights[i] = reflection
        error *= 1.0 - reflection * reflection


@_exact
@no_type_check
def renew(past, window, weights, white_noise, expansion):
    """Make the weights [A] again from the last samples [W]."""
    length, num_lags = len(window), len(weights) + 1
    newest_first, autocorrelation = np.zeros(length + num_lags), np.zeros(num_lags)
    for i in range(length):
        newest_first[length - 1 - i] = past[i] * window[i]
    for begin in range(length - 1, -1, -1):  # all lags side by side, each sum from the oldest product to the newest
        value, other = newest_first[begin], newest_first[begin : begin + num_lags]
        for lag in range(num_lags):
            autocorrelation[lag] += value * other[lag]
    autocorrelation[0] = autocorrelation[0] * (1.0 + white_noise) + 1e-9
    levinson(autocorrelation, weights, np.empty(len(weights)))
    factor = 1.0
    for i in range(len(weights)):
        factor *= expansion
        weights[i] *= factor


@_exact
@no_type_check
def predict(weights, samples, end):
    """The sample at `end` from those before it, in [-1, 1]."""
    total = 0.0
    for i in range(len(weights)):
        total += weights[i] * samples[end - 1 - i]
    return 1.0 if total > 1.0 else (-1.0 if total < -1.0 else total)  # NaN stays NaN


@_exact
@no_type_check
def begin_stream(samples, weights):
    """Forget all samples and weights."""
    samples[:] = 0.0
    weights[:] = 0.0


@_exact
@no_type_check
def follow_sample(predictor, samples, now, weights, residual, count):
    """One sample, at `now`, more: mean residual, count, and prediction and scale of the sample after it."""
    numbers, mu = predictor.numbers, len(predictor.waveform) - 1.0
    error = abs(samples[now] - predict(weights, samples, now))
    residual = numbers[1] * residual + (1.0 - numbers[1]) * error
    count += 1
    if count % np.int64(numbers[0]) == 0:
        past = samples[now + 1 - len(predictor.window) : now + 1]
        renew(past, predictor.window, weights, numbers[4], numbers[5])
    prediction = predict(weights, samples, now + 1)
    floor = numbers[2] * (2.0 * math.log1p(mu) / mu) * (abs(prediction) + 1.0 / mu)
    return residual, count, prediction, max(residual / (2.0 * math.log(2.0)), floor)


@_exact
@no_type_check
def follow(lane, predictor, codes, starts, history, weights, residuals, counts, features):
    """Prediction and scale [B, T, 2] of the sample after each code [B, T] of a lane; its state is written over.

    Args:
        starts: [B, T] bool, where a document begins.
    """
    length, num_codes = history.shape[1], codes.shape[1]
    own, count, residual = weights[lane], counts[lane], residuals[lane]
    samples = np.empty(length + num_codes)
    samples[:length] = history[lane]
    for t in range(num_codes):
        now = length + t
        if starts[lane, t] or count == 0:
            begin_stream(samples[t:now], own)
            residual, count = predictor.numbers[3], 0
        samples[now] = predictor.waveform[codes[lane, t]]
        residual, count, prediction, scale = follow_sample(predictor, samples, now, own, residual, count)
        features[lane, t, 0], features[lane, t, 1] = prediction, scale
    history[lane] = samples[num_codes:]
    counts[lane], residuals[lane] = count, residual


class AdaptivePredictor(NamedTuple):
    """What recursive least squares, or fixed weights, follow a signal with; see `linear_prediction.py`.

    Attributes:
        waveform: [V] float64, the sample of each code.
        weights: [P] float64, those that a stream begins with.
        numbers: [5] float64: first residual, forgetting, regularisation, decay of the scale, smallest scale.
    """

    waveform: np.ndarray
    weights: np.ndarray
    numbers: np.ndarray


class AdaptiveState(NamedTuple):
    """What a lane remembers: `LinearPredictionMemory`.

    Attributes:
        history [B, P], newest first, weights [B, P], covariance [B, Q, Q], residual [B]: float64.
        count: [B] int64.
    """

    history: np.ndarray
    weights: np.ndarray
    covariance: np.ndarray
    residual: np.ndarray
    count: np.ndarray


@_exact
@no_type_check
def weigh(weights, past):
    """The sum of the past samples by their weights."""
    found = 0.0
    for i in range(len(past)):
        found += weights[i] * past[i]
    return found


@_exact
@no_type_check
def clip(value):
    """Into [-1, 1]; NaN stays NaN."""
    return 1.0 if value > 1.0 else (-1.0 if value < -1.0 else value)


@_exact
@no_type_check
def measure(weights, covariance, gain, share, error, factor):
    """Take an error into weights and covariance."""
    for i in range(len(gain)):
        weights[i] += gain[i] * (share * error)
        for j in range(len(gain)):  # gain_i gain_j first: the matrix stays symmetric to the bit
            covariance[i, j] = (covariance[i, j] - gain[i] * gain[j] * share) * factor


@_exact
@no_type_check
def adapt(weights, covariance, past, error, index, forgetting, ridge, gain):
    """One step of recursive least squares, and, as a second measurement, that weights[index] is 0."""
    for i in range(len(past)):
        gain[i] = 0.0
    for j in range(len(past)):
        for i in range(len(past)):
            gain[i] += past[j] * covariance[j, i]
    measure(weights, covariance, gain, 1.0 / (forgetting + weigh(gain, past)), error, 1.0 / forgetting)
    for i in range(len(past)):
        gain[i] = covariance[index, i]
    measure(weights, covariance, gain, ridge / (1.0 + ridge * gain[index]), -weights[index], 1.0)


@_exact
@no_type_check
def begin_adaptive(predictor, state, lane):
    """Forget all samples and begin a stream."""
    past, weights, covariance = state.history[lane], state.weights[lane], state.covariance[lane]
    variance = (1.0 - predictor.numbers[1]) / predictor.numbers[2]
    for i in range(len(past)):
        past[i], weights[i] = 0.0, predictor.weights[i]
    for i in range(len(covariance)):
        for j in range(len(covariance)):
            covariance[i, j] = variance if i == j else 0.0
    state.residual[lane], state.count[lane] = predictor.numbers[0], 0


@_exact
@no_type_check
def follow_adaptive_sample(predictor, state, lane, sample, gain):
    """One more sample of a lane: prediction and scale of the one after it."""
    past, weights, covariance = state.history[lane], state.weights[lane], state.covariance[lane]
    numbers, order, said = predictor.numbers, len(past), weigh(weights, past)
    forgetting, regularisation, decay = numbers[1], numbers[2], numbers[3]
    state.residual[lane] = decay * state.residual[lane] + (1.0 - decay) * abs(sample - clip(said))
    if len(covariance):
        index = state.count[lane] % order
        adapt(weights, covariance, past, sample - said, index, forgetting, order * regularisation, gain)
    for i in range(order - 1, 0, -1):
        past[i] = past[i - 1]
    past[0] = sample
    state.count[lane] += 1
    return clip(weigh(weights, past)), max(state.residual[lane] / (2.0 * math.log(2.0)), numbers[4])


@_exact
@no_type_check
def follow_adaptive(predictor, codes, starts, state, features):
    """Prediction and scale [B, T, 2] of the sample after each code [B, T]; the state is written over."""
    gain = np.empty(state.history.shape[1])
    for lane in range(len(codes)):
        for t in range(codes.shape[1]):
            if starts[lane, t] or state.count[lane] == 0:
                begin_adaptive(predictor, state, lane)
            sample = predictor.waveform[codes[lane, t]]
            mean, scale = follow_adaptive_sample(predictor, state, lane, sample, gain)
            features[lane, t, 0], features[lane, t, 1] = mean, scale


# ---------------------------------------------------------------------------------------------------------------------
# Products, norms, exponentials (float32)
# ---------------------------------------------------------------------------------------------------------------------


@intrinsic
def _float32_of_bits(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@intrinsic
def _bits_of_float32(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), codegen


@intrinsic
def _float64_of_bits(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float64))

    return types.float64(types.int64), codegen


@intrinsic
def _bits_of_float64(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.int64))

    return types.int64(types.float64), codegen


@_strict
@no_type_check
def accumulate(x, weight, y):
    """y[b] += x[b] @ weight for each lane; eight rows of `weight` at a time stay in the first-level cache for all."""
    num_in, num_out = weight.shape
    whole = num_in - num_in % 8
    for k in range(0, whole, 8):
        r0, r1, r2, r3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
        r4, r5, r6, r7 = weight[k + 4], weight[k + 5], weight[k + 6], weight[k + 7]
        for b in range(len(x)):
            x0, x1, x2, x3 = x[b, k], x[b, k + 1], x[b, k + 2], x[b, k + 3]
            x4, x5, x6, x7 = x[b, k + 4], x[b, k + 5], x[b, k + 6], x[b, k + 7]
            out = y[b]
            for o in range(num_out):
                low = out[o] + x0 * r0[o] + x1 * r1[o] + x2 * r2[o] + x3 * r3[o]
                out[o] = low + x4 * r4[o] + x5 * r5[o] + x6 * r6[o] + x7 * r7[o]
    for k in range(whole, num_in):
        r0 = weight[k]
        for b in range(len(x)):
            x0, out = x[b, k], y[b]
            for o in range(num_out):
                out[o] += x0 * r0[o]


@_strict
@no_type_check
def add_scores(query, keys, begin, scores):
    """scores[s] += query . keys[:, begin + s], keys as columns."""
    width, length = len(query), len(scores)
    end = begin + length
    whole = width - width % 8
    for k in range(0, whole, 8):
        r0, r1, r2, r3 = keys[k][begin:end], keys[k + 1][begin:end], keys[k + 2][begin:end], keys[k + 3][begin:end]
        r4, r5, r6, r7 = keys[k + 4][begin:end], keys[k + 5][begin:end], keys[k + 6][begin:end], keys[k + 7][begin:end]
        x0, x1, x2, x3 = query[k], query[k + 1], query[k + 2], query[k + 3]
        x4, x5, x6, x7 = query[k + 4], query[k + 5], query[k + 6], query[k + 7]
        for s in range(length):
            low = scores[s] + x0 * r0[s] + x1 * r1[s] + x2 * r2[s] + x3 * r3[s]
            scores[s] = low + x4 * r4[s] + x5 * r5[s] + x6 * r6[s] + x7 * r7[s]
    for k in range(whole, width):
        x0, r0 = query[k], keys[k][begin:end]
        for s in range(length):
            scores[s] += x0 * r0[s]


@_strict
@no_type_check
def add_weighted(weights, values, begin, out):
    """out += sum_s weights[s] values[begin + s]."""
    length, width = len(weights), len(out)
    whole = length - length % 8
    for s in range(0, whole, 8):
        j = begin + s
        r0, r1, r2, r3 = values[j], values[j + 1], values[j + 2], values[j + 3]
        r4, r5, r6, r7 = values[j + 4], values[j + 5], values[j + 6], values[j + 7]
        x0, x1, x2, x3 = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
        x4, x5, x6, x7 = weights[s + 4], weights[s + 5], weights[s + 6], weights[s + 7]
        for o in range(width):
            low = out[o] + x0 * r0[o] + x1 * r1[o] + x2 * r2[o] + x3 * r3[o]
            out[o] = low + x4 * r4[o] + x5 * r5[o] + x6 * r6[o] + x7 * r7[o]
    for s in range(whole, length):
        x0, r0 = weights[s], values[begin + s]
        for o in range(width):
            out[o] += x0 * r0[o]


@_maximum
@no_type_check
def largest(x):
    """The largest of a row; of NaN nothing is said."""
    found = x[0]
    for i in range(len(x)):
        found = x[i] if x[i] > found else found
    return found


@_sums
@no_type_check
def total(x):
    """The sum of a row."""
    found = np.float32(0)
    for i in range(len(x)):
        found += x[i]
    return found


@_strict
@no_type_check
def exp32(x):
    """exp(x) in float32 for x in [-87, 88], about 1 unit in the last place off; NaN stays NaN.

    Source: the polynomial of S. Moshier's Cephes library.
    """
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    f = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    p = p * (f * f) + f + np.float32(1)
    return p * _float32_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@_strict
@no_type_check
def log32(x):
    """log(x) in float32 for normal x above 0. Source: as `exp32`."""
    bits = _bits_of_float32(x) - np.int32(0x3F3504F3)  # exponent and mantissa around sqrt(1/2)
    n = np.float32(bits >> np.int32(23))
    m = _float32_of_bits((bits & np.int32(0x007FFFFF)) + np.int32(0x3F3504F3)) - np.float32(1)
    p = np.float32(7.0376836292e-2)
    p = p * m - np.float32(1.1514610310e-1)
    p = p * m + np.float32(1.1676998740e-1)
    p = p * m - np.float32(1.2420140846e-1)
    p = p * m + np.float32(1.4249322787e-1)
    p = p * m - np.float32(1.6668057665e-1)
    p = p * m + np.float32(2.0000714765e-1)
    p = p * m - np.float32(2.4999993993e-1)
    p = p * m + np.float32(3.3333331174e-1)
    square = m * m
    return (
        m + (p * m * square + n * np.float32(-2.12194440e-4) - np.float32(0.5) * square) + n * np.float32(0.693359375)
    )


@_strict
@no_type_check
def exp64(x):
    """exp(x) in float64 for x in [-700, 700], some units in the last place off; NaN stays NaN."""
    shifted = x * 1.4426950408889634 + 6755399441055744.0  # 1.5 * 2**52: the integer lies in the last bits
    n = shifted - 6755399441055744.0
    f = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    p = 1.0 / 479001600.0
    p = p * f + 1.0 / 39916800.0
    p = p * f + 1.0 / 3628800.0
    p = p * f + 1.0 / 362880.0
    p = p * f + 1.0 / 40320.0
    p = p * f + 1.0 / 5040.0
    p = p * f + 1.0 / 720.0
    p = p * f + 1.0 / 120.0
    p = p * f + 1.0 / 24.0
    p = p * f + 1.0 / 6.0
    p = p * f + 0.5
    p = p * (f * f) + f + 1.0
    return p * _float64_of_bits((_bits_of_float64(shifted) + np.int64(1023)) << np.int64(52))


@_strict
@no_type_check
def exponentials(x, offset):
    """x <- exp(x - offset), in place, for x <= offset."""
    for i in range(len(x)):
        v = x[i] - offset
        e = exp32(np.float32(-87) if v < np.float32(-87) else v)
        x[i] = np.float32(0) if v < np.float32(-87) else e


@_strict
@no_type_check
def rectify(x):
    """x <- max(x, 0), in place; NaN stays NaN."""
    for i in range(len(x)):
        x[i] = np.float32(0) if x[i] < np.float32(0) else x[i]


@_strict
@no_type_check
def copy(x, y):
    """y <- x, as far as x goes."""
    for i in range(len(x)):
        y[i] = x[i]


@_sums
@no_type_check
def layer_norm(x, norm, y):
    """y <- x brought to mean 0 and variance 1, then scaled by norm[0] and moved by norm[1], as far as these go."""
    num = norm.shape[1]
    mean = np.float32(0)
    for i in range(num):
        mean += x[i]
    mean = mean / np.float32(num)
    variance = np.float32(0)
    for i in range(num):
        difference = x[i] - mean
        variance += difference * difference
    factor = np.float32(1) / np.float32(math.sqrt(variance / np.float32(num) + np.float32(1e-5)))
    scale, shift = norm[0], norm[1]
    for i in range(num):
        y[i] = (x[i] - mean) * factor * scale[i] + shift[i]


@_strict
@no_type_check
def gate(totals, gated):
    """tanh of the first half times the sigmoid of the second: tanh(a) = 1 - 2 / (1 + exp(2 a))."""
    num = len(gated)
    filters, gates = totals[:num], totals[num : 2 * num]
    for i in range(num):
        a, g = np.float32(2) * filters[i], -gates[i]
        a = np.float32(40) if a > np.float32(40) else (np.float32(-40) if a < np.float32(-40) else a)
        g = np.float32(80) if g > np.float32(80) else (np.float32(-80) if g < np.float32(-80) else g)
        ea = exp32(a)
        gated[i] = (ea - np.float32(1)) / ((ea + np.float32(1)) * (np.float32(1) + exp32(g)))


# ---------------------------------------------------------------------------------------------------------------------
# Front end, head, draws
# ---------------------------------------------------------------------------------------------------------------------


class FrontEnd(NamedTuple):
    """Weights of a front end.

    Attributes:
        table: [V, D] float32, scaled, with the bias of the features.
        features: [5, D] float32; empty where the samples are not looked at.
    """

    table: np.ndarray
    features: np.ndarray


class Head(NamedTuple):
    """Weights of a head.

    Attributes:
        weight [D', O], bias [O]: float32; O is V or, of a mixture, at least three times the number of components.
        edges: [V + 1] float64, of the codes' cells; empty where the outputs are logits.
        numbers: [3] float64, of a mixture: number of components, share that is spread evenly, least width of a
            component in widths of the cell that the prediction lies in.
    """

    weight: np.ndarray
    bias: np.ndarray
    edges: np.ndarray
    numbers: np.ndarray


class Drawing(NamedTuple):
    """How codes are drawn; see `Sampler`.

    Attributes:
        temperature: at least 0.
        top_k: at most V.
        top_p: in (0, 1].
    """

    temperature: float
    top_k: int
    top_p: float


@_strict
@no_type_check
def compand(sample, mu):
    """The mu-law curve."""
    return math.copysign(math.log1p(mu * abs(sample)) / math.log1p(mu), sample)


@_strict
@no_type_check
def embed(front_end, predictor, followed, samples, index, codes, rows, sides):
    """Rows [B, D] of one more code a lane, and what the head gets [B, 2]; see `front_ends.py`.

    Args:
        samples: [B, W + N] float64, of the last samples before a block and of those of the block so far.
        index: of the code in its block.
    """
    width, length = front_end.table.shape[1], len(predictor.window)
    for lane in range(len(codes)):
        row = rows[lane]
        copy(front_end.table[codes[lane]], row)
        if len(front_end.features):
            mu, sample = len(predictor.waveform) - 1.0, predictor.waveform[codes[lane]]
            said, size, next_sample, next_size = 0.0, predictor.numbers[6], 0.0, predictor.numbers[6]
            if length:
                now, weights = length + index, followed.weights[lane]
                said, size = followed.said[lane, 0], followed.said[lane, 1]
                if followed.count[lane] == 0:
                    begin_stream(samples[lane, index:now], weights)
                    followed.residual[lane] = predictor.numbers[3]
                    said, size = 0.0, predictor.numbers[3] / (2.0 * math.log(2.0))
                samples[lane, now] = sample
                residual, count, next_sample, next_size = follow_sample(
                    predictor, samples[lane], now, weights, followed.residual[lane], followed.count[lane]
                )
                followed.residual[lane], followed.count[lane] = residual, count
                followed.said[lane, 0], followed.said[lane, 1] = next_sample, next_size
            f0 = np.float32(2.0 * compand(sample, mu))
            f1 = np.float32(math.asinh((sample - said) / size) / 1.5)
            f2 = np.float32((math.log(next_size) + 6.0) / 2.0)
            f3 = np.float32(2.0 * compand(next_sample, mu))
            f4 = np.float32(math.asinh((next_sample - sample) / next_size) / 1.5)
            w0, w1, w2, w3, w4 = front_end.features
            for i in range(width):
                row[i] = row[i] + (f0 * w0[i] + f1 * w1[i] + f2 * w2[i] + f3 * w3[i] + f4 * w4[i])
            sides[lane, 0], sides[lane, 1] = np.float32(next_sample), np.float32(next_size)


@_strict
@no_type_check
def mixture(outputs, side, head, cumulative, probabilities):
    """Probabilities [V] of a mixture of logistic distributions, see `heads.LogisticMixture`; float64, summing to 1."""
    num, vocab_size = np.int64(head.numbers[0]), len(probabilities)
    prediction, scale = side[0], side[1]
    mu = np.float32(vocab_size - 1)
    cell = np.float32(2.0 * math.log1p(vocab_size - 1.0) / (vocab_size - 1.0)) * (abs(prediction) + np.float32(1) / mu)
    floor = np.float32(head.numbers[2]) * cell
    weights = outputs[:num]
    most, sum_of_weights = largest(weights), 0.0
    for k in range(num):
        sum_of_weights += math.exp(np.float64(weights[k] - most))
    edges = head.edges
    for v in range(vocab_size + 1):
        cumulative[v] = 0.0
    for k in range(num):
        mean = np.float64(prediction + outputs[num + k] * scale)
        ratio = outputs[2 * num + k]
        ratio = np.float32(6) if ratio > np.float32(6) else (np.float32(-6) if ratio < np.float32(-6) else ratio)
        width = scale * np.float32(math.exp(ratio))
        inverse = 1.0 / np.float64(floor if width < floor else width)
        weight = math.exp(np.float64(weights[k] - most)) / sum_of_weights
        for v in range(vocab_size + 1):
            z = (mean - edges[v]) * inverse
            z = 700.0 if z > 700.0 else (-700.0 if z < -700.0 else z)
            cumulative[v] += weight / (1.0 + exp64(z))
    share = head.numbers[1]
    evenly = share / vocab_size
    for v in range(vocab_size):
        probabilities[v] = (1.0 - share) * (cumulative[v + 1] - cumulative[v]) + evenly


@_strict
@no_type_check
def rank(values, order, spare):
    """Indices by falling value into `order`; equal values keep their order. A merge sort: numba's compiles in 3 s."""
    num, width = len(values), 1
    for i in range(num):
        order[i] = i
    while width < num:
        for begin in range(0, num, 2 * width):
            middle, end = min(begin + width, num), min(begin + 2 * width, num)
            i, j = begin, middle
            for o in range(begin, end):
                if j >= end or (i < middle and values[order[i]] >= values[order[j]]):
                    spare[o] = order[i]
                    i += 1
                else:
                    spare[o] = order[j]
                    j += 1
        for o in range(num):
            order[o] = spare[o]
        width *= 2


@_strict
@no_type_check
def cut_off(probabilities, top_k, top_p):
    """Set to 0 all but the `top_k` most probable codes and, of these, all beyond a share of `top_p`."""
    num = len(probabilities)
    order, spare = np.empty(num, np.int64), np.empty(num, np.int64)
    rank(probabilities, order, spare)
    kept = 0.0
    for r in range(min(top_k, num)):
        kept += probabilities[order[r]]
    before = 0.0
    for r in range(num):
        probability = probabilities[order[r]]
        if r >= top_k or (top_p < 1.0 and before >= top_p * kept):
            probabilities[order[r]] = 0.0
        before += probability


@_strict
@no_type_check
def draw(probabilities, uniform, drawing):
    """One code by inversion of the cumulative distribution, as `sampler.draw_codes`.

    Args:
        probabilities: [V] float64, not normalised, at the drawing's temperature; written over.
        uniform: in [0, 1).
    """
    num = len(probabilities)
    if drawing.top_k < num or drawing.top_p < 1.0:
        cut_off(probabilities, drawing.top_k, drawing.top_p)
    whole = 0.0
    for i in range(num):
        whole += probabilities[i]
    point, reached = min(uniform * whole, whole * (1.0 - 2.0**-53)), 0.0
    for i in range(num):
        reached += probabilities[i]
        if reached > point:
            return i
    return num - 1


@_strict
@no_type_check
def multiply_head(head, features, outputs):
    """Outputs [B, O] of features [B, D']."""
    for lane in range(len(outputs)):
        copy(head.bias, outputs[lane])
    accumulate(features, head.weight, outputs)


@_strict
@no_type_check
def draw_by_probabilities(chances, uniform, drawing, logs, kept):
    """A code by its probabilities [V] in float64, which are written over, and its log-probability.

    Args:
        logs: [V] float32 and kept: at least [V] float64, room.
    """
    num, code = len(chances), 0
    copy(chances, kept)  # to be read after the draw
    if drawing.temperature > 0.0:
        if drawing.temperature != 1.0:
            for v in range(num):
                logs[v] = log32(np.float32(chances[v]))
            temper(logs, drawing.temperature, chances)
        code = draw(chances, uniform, drawing)
    else:
        for v in range(num):
            code = v if chances[v] > chances[code] else code
    return code, math.log(kept[code])


@_strict
@no_type_check
def temper(logs, temperature, chances):
    """Probabilities, not normalised, of log-probabilities, which are written over, at a temperature above 0."""
    most, inverse = largest(logs), np.float32(1.0 / max(temperature, 1e-30))
    for v in range(len(logs)):
        logs[v] = (logs[v] - most) * inverse
    exponentials(logs, np.float32(0))
    copy(logs, chances)


@_strict
@no_type_check
def draw_next(head, outputs, side, uniform, drawing, logs, cumulative, chances):
    """The next code of a lane, and its log-probability at temperature 1, before top-k and top-p.

    Args:
        outputs: [O], of the head.
        logs: [V] float32, cumulative: [V + 1] and chances: [V] float64, room.
    """
    if len(head.edges):
        mixture(outputs, side, head, cumulative, chances)
        return draw_by_probabilities(chances, uniform, drawing, logs, cumulative)
    num, code = len(chances), 0
    copy(outputs[:num], logs)
    most = largest(logs)
    exponentials(logs, most)
    log_sum = np.float64(most) + math.log(np.float64(total(logs)))
    if drawing.temperature > 0.0:
        if drawing.temperature == 1.0:
            copy(logs, chances)
        else:
            copy(outputs[:num], logs)
            temper(logs, drawing.temperature, chances)
        code = draw(chances, uniform, drawing)
    else:
        for v in range(num):
            code = v if outputs[v] > outputs[code] else code
    return code, np.float64(outputs[code]) - log_sum


@_strict
@no_type_check
def begin_block(predictor, followed, num_codes):
    """Samples [B, W + N] of a block: those before it, and room for its own; [B, 0] where nothing is predicted."""
    num_lanes, length = followed.history.shape
    samples = np.empty((num_lanes, length + num_codes if length else 0))
    for lane in range(num_lanes):
        for i in range(length):
            samples[lane, i] = followed.history[lane, i]
    return samples


@_strict
@no_type_check
def end_block(samples, followed, num_codes):
    """Keep the last samples of a block."""
    num_lanes, length = followed.history.shape
    for lane in range(num_lanes):
        for i in range(length):
            followed.history[lane, i] = samples[lane, num_codes + i]


# ---------------------------------------------------------------------------------------------------------------------
# Linear prediction as a model
# ---------------------------------------------------------------------------------------------------------------------


class LogisticCells(NamedTuple):
    """What a logistic distribution becomes over codes.

    Attributes:
        edges: [V + 1] float64, of the codes' cells.
        numbers: [1] float64, the share that is spread evenly.
    """

    edges: np.ndarray
    numbers: np.ndarray


@_strict
@no_type_check
def logistic_cells(mean, scale, cells, cumulative, chances):
    """Probabilities [V] of the cells under a logistic distribution, see `LinearPrediction`."""
    num, inverse, share = len(chances), 1.0 / scale, cells.numbers[0]
    for v in range(num + 1):
        z = (mean - cells.edges[v]) * inverse
        z = 700.0 if z > 700.0 else (-700.0 if z < -700.0 else z)
        cumulative[v] = 1.0 / (1.0 + exp64(z))
    for v in range(num):
        chances[v] = (1.0 - share) * (cumulative[v + 1] - cumulative[v]) + share / num


@_strict
@no_type_check
def sample_adaptive(predictor, cells, state, drawing, codes, uniforms, out_codes, out_logs):
    """Sample a block by recursive least squares or fixed weights; as `sample_wavenet`."""
    vocab_size, gain = len(predictor.waveform), np.empty(state.history.shape[1])
    logs, cumulative, chances = np.empty(vocab_size, np.float32), np.empty(vocab_size + 1), np.empty(vocab_size)
    for lane in range(len(codes)):
        for index in range(uniforms.shape[1]):
            if state.count[lane] == 0:
                begin_adaptive(predictor, state, lane)
            sample = predictor.waveform[codes[lane]]
            mean, scale = follow_adaptive_sample(predictor, state, lane, sample, gain)
            logistic_cells(mean, scale, cells, cumulative, chances)
            code, log_probability = draw_by_probabilities(chances, uniforms[lane, index], drawing, logs, cumulative)
            codes[lane], out_codes[lane, index], out_logs[lane, index] = code, code, log_probability


@_strict
@no_type_check
def sample_autocorrelation(predictor, cells, followed, drawing, codes, uniforms, out_codes, out_logs):
    """Sample a block by the autocorrelation method; as `sample_wavenet`."""
    vocab_size, length = len(predictor.waveform), len(predictor.window)
    logs, cumulative, chances = np.empty(vocab_size, np.float32), np.empty(vocab_size + 1), np.empty(vocab_size)
    samples = begin_block(predictor, followed, uniforms.shape[1])
    for lane in range(len(codes)):
        own = samples[lane]
        for index in range(uniforms.shape[1]):
            now, weights, residual = length + index, followed.weights[lane], followed.residual[lane]
            if followed.count[lane] == 0:
                begin_stream(own[index:now], weights)
                residual = predictor.numbers[3]
            own[now] = predictor.waveform[codes[lane]]
            residual, count, mean, scale = follow_sample(predictor, own, now, weights, residual, followed.count[lane])
            followed.residual[lane], followed.count[lane] = residual, count
            logistic_cells(mean, scale, cells, cumulative, chances)
            code, log_probability = draw_by_probabilities(chances, uniforms[lane, index], drawing, logs, cumulative)
            codes[lane], out_codes[lane, index], out_logs[lane, index] = code, code, log_probability
    end_block(samples, followed, uniforms.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# WaveNet
# ---------------------------------------------------------------------------------------------------------------------


class WaveNetWeights(NamedTuple):
    """Weights of a `WaveNetStack`, C residual and S skip channels; what is read and what is written side by side.

    Attributes:
        gate: [L, 2 C, 2 C], past and present input to filter and gate. gate_bias: [L, 2 C].
        out: [L, C, C + S], gated output to the next input and to the skip sum (0 to the input after the last layer).
        skip_bias: [S]. hidden: [S, S]. hidden_bias: [S].
        norm: [2, C], ones and zeros for `layer_norm`; [2, 0] without normalisation.
        offsets, dilations: [L] int64, the rows of a ring that each layer owns.
    """

    gate: np.ndarray
    gate_bias: np.ndarray
    out: np.ndarray
    skip_bias: np.ndarray
    hidden: np.ndarray
    hidden_bias: np.ndarray
    norm: np.ndarray
    offsets: np.ndarray
    dilations: np.ndarray


class WaveNetState(NamedTuple):
    """What lanes remember.

    Attributes:
        rings: [B, sum of dilations, C], the queues of all layers one below the other.
        count: [B] int64; a layer's oldest input lies in its row count % dilation.
    """

    rings: np.ndarray
    count: np.ndarray


@_strict
@no_type_check
def step_wavenet(rows, w, state, pairs, totals, gated, carried, skips, features):
    """Features [B, S] after one more row a lane [B, C]; all other arguments are room."""
    num_lanes, width = gated.shape
    num_skip, count = len(w.skip_bias), state.count[0]
    for lane in range(num_lanes):
        copy(rows[lane], carried[lane])
        copy(w.skip_bias, carried[lane, width:])
    for layer in range(len(w.gate)):
        oldest = w.offsets[layer] + count % w.dilations[layer]
        for lane in range(num_lanes):
            pair, own, ring = pairs[lane], carried[lane], state.rings[lane, oldest]
            copy(ring[:width], pair)
            copy(own[:width], ring)
            layer_norm(own, w.norm, ring)
            copy(ring[:width], pair[width:])
            copy(w.gate_bias[layer], totals[lane])
        accumulate(pairs, w.gate[layer], totals)
        for lane in range(num_lanes):
            gate(totals[lane], gated[lane])
        accumulate(gated, w.out[layer], carried)
    for lane in range(num_lanes):
        copy(carried[lane, width : width + num_skip], skips[lane])
        rectify(skips[lane])
        copy(w.hidden_bias, features[lane])
    accumulate(skips, w.hidden, features)
    for lane in range(num_lanes):
        rectify(features[lane])
        state.count[lane] = count + 1


@_strict
@no_type_check
def sample_wavenet(front_end, predictor, head, followed, w, state, drawing, codes, uniforms, out_codes, out_logs):
    """Sample a block: codes and log-probabilities [B, N] from the last codes [B] and uniform numbers [B, N]."""
    num_lanes, num_codes = uniforms.shape
    width, num_skip = state.rings.shape[2], len(w.skip_bias)
    vocab_size = len(front_end.table)
    rows, sides = np.empty((num_lanes, width), np.float32), np.zeros((num_lanes, 2), np.float32)
    pairs, totals = np.empty((num_lanes, 2 * width), np.float32), np.empty((num_lanes, 2 * width), np.float32)
    gated, carried = np.empty((num_lanes, width), np.float32), np.empty((num_lanes, width + num_skip), np.float32)
    skips, features = np.empty((num_lanes, num_skip), np.float32), np.empty((num_lanes, num_skip), np.float32)
    outputs = np.empty((num_lanes, len(head.bias)), np.float32)
    logs, cumulative, chances = np.empty(vocab_size, np.float32), np.empty(vocab_size + 1), np.empty(vocab_size)
    samples = begin_block(predictor, followed, num_codes)
    for index in range(num_codes):
        embed(front_end, predictor, followed, samples, index, codes, rows, sides)
        step_wavenet(rows, w, state, pairs, totals, gated, carried, skips, features)
        multiply_head(head, features, outputs)
        for lane in range(num_lanes):
            code, log_probability = draw_next(
                head, outputs[lane], sides[lane], uniforms[lane, index], drawing, logs, cumulative, chances
            )
            codes[lane], out_codes[lane, index], out_logs[lane, index] = code, code, log_probability
    end_block(samples, followed, num_codes)


# ---------------------------------------------------------------------------------------------------------------------
# Compressive stack
# ---------------------------------------------------------------------------------------------------------------------

CONV, DILATED_CONV, MEAN, MAX = range(4)
"""Compression functions by number."""


class CompressiveWeights(NamedTuple):
    """Weights of a `CompressiveStack`; per layer, whatever is shorter in one layer than in another is padded.

    Attributes:
        project: [L, D, D + H P + 2 G E], a row to content queries, position queries, keys and values.
        project_bias: [L, D + H P + 2 G E].
        output: [L, D, D]. attention_norm, feedforward_norm: [L, 2, D]. final_norm: [2, D], empty without one.
        expand: [L, D, F]. expand_bias: [L, F]. contract: [L, F, D]. contract_bias: [L, D].
        compress: [L, levels, inputs, D] of f_c, compress_bias: [L, levels, D].
        key_value: [L, D, 2 G E], of compressed rows.
        taps: [L, X, D] of the convolutions, oldest row first; X is 0 where there are none.
        tap_bias: [L, D]. tap_norm: [L, 2, D].
        positions: [tables, P, columns], sinusoids of the keys of a window.
        cosine, sine: [T, P / 2], by which a position query is turned at each place of a window.
        layout: [L, 6] int64: memory rows M, compressed rows K, rate C, table of positions, groups of C rows that f_c
            takes at a time, and at which of so many steps.
        numbers: [5] int64: window T, H, G, kind of f_c, whether the norms come first.
    """

    project: np.ndarray
    project_bias: np.ndarray
    output: np.ndarray
    attention_norm: np.ndarray
    feedforward_norm: np.ndarray
    final_norm: np.ndarray
    expand: np.ndarray
    expand_bias: np.ndarray
    contract: np.ndarray
    contract_bias: np.ndarray
    compress: np.ndarray
    compress_bias: np.ndarray
    key_value: np.ndarray
    taps: np.ndarray
    tap_bias: np.ndarray
    tap_norm: np.ndarray
    positions: np.ndarray
    cosine: np.ndarray
    sine: np.ndarray
    layout: np.ndarray
    numbers: np.ndarray


class CompressiveState(NamedTuple):
    """What lanes remember, in rings: at the end of a window nothing moves but where they begin.

    A layer's keys and values lie in columns [0, Q) for compressed rows and from Q on for memory and window.

    Attributes:
        keys: [B, L, G, E, columns]. values: [B, L, G, columns, E].
        rows: [B, L, R, D], raw inputs of memory and window. compressed: [B, L, Q, D].
        starts: [B, L, 2] int64, the oldest row of `rows` and of `compressed`.
        valid: [B, L, 2] int64, valid rows of memory and compressed memory.
        queues: [B, L, X, D], the last normalised rows of the convolutions; row n lies in n % X.
        queues_before: [B, L, X - 1, D], as they were when the window began, oldest row first.
        position: [B] int64, rows of the unfinished window.
        count: [B] int64, rows that have gone through the convolutions, modulo X.
    """

    keys: np.ndarray
    values: np.ndarray
    rows: np.ndarray
    compressed: np.ndarray
    starts: np.ndarray
    valid: np.ndarray
    queues: np.ndarray
    queues_before: np.ndarray
    position: np.ndarray
    count: np.ndarray


@_strict
@no_type_check
def cut_ring(segments, index, begin, count, ring_length, first_column, first_position):
    """Two contiguous pieces (first column, place in the table of positions, length) of `count` rows of a ring."""
    begin = begin % ring_length
    head = min(count, ring_length - begin)
    segments[index, 0], segments[index, 1], segments[index, 2] = first_column + begin, first_position, head
    segments[index + 1, 0], segments[index + 1, 1] = first_column, first_position + head
    segments[index + 1, 2] = count - head


@_strict
@no_type_check
def attend(query, turned, keys, values, positions, segments, scores, out):
    """Attention of one query of one head over the pieces of the rings; `out` [E] is written over."""
    count = 0
    for i in range(len(segments)):
        column, place, length = segments[i, 0], segments[i, 1], segments[i, 2]
        if length > 0:
            padded = (length + PADDING - 1) // PADDING * PADDING  # whole vectors: the rest is written over, or masked
            part = scores[count : count + padded]
            for s in range(padded):
                part[s] = np.float32(0)
            add_scores(query, keys, column, part)
            add_scores(turned, positions, place, part)
            count += length
    padded = (count + PADDING - 1) // PADDING * PADDING
    for s in range(count, padded):
        scores[s] = -np.inf
    seen = scores[:padded]
    exponentials(seen, largest(seen))
    factor = np.float32(1) / total(seen)
    for i in range(len(out)):
        out[i] = np.float32(0)
    count = 0
    for i in range(len(segments)):
        column, length = segments[i, 0], segments[i, 2]
        if length > 0:
            add_weighted(scores[count : count + length], values, column, out)
            count += length
    for i in range(len(out)):
        out[i] *= factor


@_strict
@no_type_check
def put(key_value, keys, values, column):
    """Write a row's key and value, of all heads, into a column of the rings."""
    num_heads, head_width = keys.shape[0], keys.shape[1]
    for g in range(num_heads):
        row = values[g, column]
        for i in range(head_width):
            keys[g, i, column] = key_value[g * head_width + i]
            row[i] = key_value[(num_heads + g) * head_width + i]


@_strict
@no_type_check
def find_pieces(w, state, lane, layer, segments):
    """What the next row of a lane's window sees in a layer, as four pieces."""
    window, t = w.numbers[0], state.position[lane]
    memory, compressed, rate = w.layout[layer, 0], w.layout[layer, 1], w.layout[layer, 2]
    memory_valid, compressed_valid = state.valid[lane, layer, 0], state.valid[lane, layer, 1]
    ring = compressed + window // rate if compressed else 0
    if compressed:
        first = compressed - compressed_valid
        begin = state.starts[lane, layer, 1] + first
        cut_ring(segments, 0, begin, compressed_valid, ring, 0, first)
    else:
        segments[0, 2], segments[1, 2] = 0, 0
    first = memory - memory_valid
    begin, count = state.starts[lane, layer, 0] + first, memory_valid + t + 1
    cut_ring(segments, 2, begin, count, memory + window, ring, compressed + first)
    return ring


@_strict
@no_type_check
def convolve(lane, layer, row, w, state):
    """row <- row + taps * norm(row and the rows before it), in place; see `convolution.py`."""
    num_taps = w.taps.shape[1]
    if num_taps == 0:
        return
    queue, newest, bias = state.queues[lane, layer], state.count[lane] % num_taps, w.tap_bias[layer]
    layer_norm(row, w.tap_norm[layer], queue[newest])
    for i in range(len(row)):
        row[i] += bias[i]
    for tap in range(num_taps):
        seen, weight = queue[(newest + 1 + tap) % num_taps], w.taps[layer, tap]
        for i in range(len(row)):
            row[i] += weight[i] * seen[i]


@_strict
@no_type_check
def step_compressive(x, w, state, r, features):
    """Features [B, D] after one more row a lane, `x` [B, D], which is written over; `r` is room."""
    num_lanes, width = x.shape
    window, heads, groups, pre_norm = w.numbers[0], w.numbers[1], w.numbers[2], w.numbers[4] > 0
    t, half, head_width = state.position[0], w.cosine.shape[1], width // heads
    cosine, sine = w.cosine[t], w.sine[t]
    for layer in range(len(w.layout)):
        memory, table = w.layout[layer, 0], w.layout[layer, 3]
        for lane in range(num_lanes):
            convolve(lane, layer, x[lane], w, state)
            slot = (state.starts[lane, layer, 0] + memory + t) % (memory + window)
            copy(x[lane], state.rows[lane, layer, slot])
            copy(w.project_bias[layer], r.projected[lane])
            if pre_norm:
                layer_norm(x[lane], w.attention_norm[layer], r.read[lane])
            else:
                copy(x[lane], r.read[lane])
        accumulate(r.read, w.project[layer], r.projected)
        for lane in range(num_lanes):
            projected, keys, values = r.projected[lane], state.keys[lane, layer], state.values[lane, layer]
            first = find_pieces(w, state, lane, layer, r.segments)
            slot = (state.starts[lane, layer, 0] + memory + t) % (memory + window)
            put(projected[width + 2 * heads * half :], keys, values, first + slot)
            for h in range(heads):
                straight = projected[width + 2 * h * half : width + 2 * (h + 1) * half]
                for i in range(half):
                    r.turned[i] = straight[i] * cosine[i] - straight[i + half] * sine[i]
                    r.turned[i + half] = straight[i + half] * cosine[i] + straight[i] * sine[i]
                g, query = h * groups // heads, projected[h * head_width : (h + 1) * head_width]
                out = r.attended[lane, h * head_width : (h + 1) * head_width]
                attend(query, r.turned, keys[g], values[g], w.positions[table], r.segments, r.scores, out)
        accumulate(r.attended, w.output[layer], x)
        for lane in range(num_lanes):
            if pre_norm:
                layer_norm(x[lane], w.feedforward_norm[layer], r.read[lane])
            else:
                layer_norm(x[lane], w.attention_norm[layer], r.read[lane])
                copy(r.read[lane], x[lane])
            copy(w.expand_bias[layer], r.hidden[lane])
        accumulate(r.read, w.expand[layer], r.hidden)
        for lane in range(num_lanes):
            rectify(r.hidden[lane])
            own, bias = x[lane], w.contract_bias[layer]
            for i in range(width):
                own[i] += bias[i]
        accumulate(r.hidden, w.contract[layer], x)
        if not pre_norm:
            for lane in range(num_lanes):
                layer_norm(x[lane], w.feedforward_norm[layer], r.read[lane])
                copy(r.read[lane], x[lane])
        compress_some(layer, t, w, state, r)
    for lane in range(num_lanes):
        if pre_norm:
            layer_norm(x[lane], w.final_norm, features[lane])
        else:
            copy(x[lane], features[lane])
        end_step(lane, w, state)


@_strict
@no_type_check
def compress_some(layer, t, w, state, r):
    """f_c of some of the rows that will leave at the window's end: as many as the window has got, every so many steps.

    What leaves is known before it does, so the work of a push is spread over the window, each layer's at steps of its
    own.
    """
    rate, num_groups, pre_norm = w.layout[layer, 2], w.layout[layer, 4], w.numbers[4] > 0
    if w.layout[layer, 1] == 0 or t % (rate * num_groups) != w.layout[layer, 5]:
        return
    memory, ring = w.layout[layer, 0], w.layout[layer, 1] + w.numbers[0] // rate
    num_lanes, width = r.read.shape
    first = t // (rate * num_groups) * num_groups
    for lane in range(num_lanes):
        for group in range(num_groups):
            old = r.old[lane * num_groups + group]
            for part in range(rate):
                place = (state.starts[lane, layer, 0] + (first + group) * rate + part) % (memory + w.numbers[0])
                copy(state.rows[lane, layer, place], old[part * width : (part + 1) * width])
    num = num_lanes * num_groups
    apply_compression(layer, w, rate, r.old[:num], r.level[:num], r.new[:num])
    for i in range(num):
        if pre_norm:
            layer_norm(r.new[i], w.attention_norm[layer], r.new_read[i])
        else:
            copy(r.new[i], r.new_read[i])
        for o in range(r.key_value.shape[1]):
            r.key_value[i, o] = np.float32(0)
    accumulate(r.new_read[:num], w.key_value[layer], r.key_value[:num])
    for lane in range(num_lanes):
        for group in range(num_groups):
            i = lane * num_groups + group
            column = (state.starts[lane, layer, 1] + w.layout[layer, 1] + first + group) % ring
            put(r.key_value[i], state.keys[lane, layer], state.values[lane, layer], column)
            copy(r.new[i], state.compressed[lane, layer, column])


@_strict
@no_type_check
def apply_compression(layer, w, rate, old, level, new):
    """f_c: `new` [rows, D] from groups of C rows, `old` [rows, C D], which are written over; see `compression.py`."""
    kind, width = w.numbers[3], new.shape[1]
    for i in range(len(old)):
        copy(w.compress_bias[layer, 0], new[i])
    if kind == CONV:
        accumulate(old[:, : rate * width], w.compress[layer, 0, : rate * width], new)
        return
    if kind == DILATED_CONV:
        num_levels = 1
        while 2**num_levels < rate:
            num_levels += 1
        for number in range(num_levels):
            for part in range(rate - 1, -1, -1):  # from the last: what a row needs is still as it was
                earlier = part - 2**number
                for i in range(len(old)):
                    for o in range(width):
                        level[i, o] = old[i, earlier * width + o] if earlier >= 0 else np.float32(0)
                        level[i, width + o] = old[i, part * width + o]
                    copy(w.compress_bias[layer, number], new[i])
                accumulate(level, w.compress[layer, number, : 2 * width], new)
                for i in range(len(old)):
                    if number + 1 < num_levels:
                        rectify(new[i])
                    copy(new[i], old[i, part * width : (part + 1) * width])
        for i in range(len(old)):
            copy(old[i, (rate - 1) * width : rate * width], new[i])
        return
    for i in range(len(old)):
        for o in range(width):
            found = old[i, o]
            for part in range(1, rate):
                value = old[i, part * width + o]
                if kind == MEAN:
                    found += value
                else:
                    found = value if value > found or value != value else found
            new[i, o] = found / np.float32(rate) if kind == MEAN else found


@_strict
@no_type_check
def end_step(lane, w, state):
    """Count a row; at the end of a window the rings begin a window further."""
    window, num_taps = w.numbers[0], w.taps.shape[1]
    state.position[lane] += 1
    state.count[lane] = (state.count[lane] + 1) % max(num_taps, 1)
    if state.position[lane] < window:
        return
    state.position[lane] = 0
    for layer in range(len(w.layout)):
        for place in range(1, num_taps):
            row = state.queues[lane, layer, (state.count[lane] + place) % num_taps]
            copy(row, state.queues_before[lane, layer, place - 1])
        memory, compressed, rate = w.layout[layer, 0], w.layout[layer, 1], w.layout[layer, 2]
        state.starts[lane, layer, 0] = (state.starts[lane, layer, 0] + window) % (memory + window)
        leaving = min(max(0, state.valid[lane, layer, 0] + window - memory), window)
        state.valid[lane, layer, 0] = min(memory, state.valid[lane, layer, 0] + window)
        if compressed:
            ring = compressed + window // rate
            state.starts[lane, layer, 1] = (state.starts[lane, layer, 1] + window // rate) % ring
            state.valid[lane, layer, 1] = min(compressed, state.valid[lane, layer, 1] + leaving // rate)


class CompressiveRoom(NamedTuple):
    """Room for a step of B lanes."""

    read: np.ndarray
    projected: np.ndarray
    turned: np.ndarray
    attended: np.ndarray
    hidden: np.ndarray
    scores: np.ndarray
    segments: np.ndarray
    old: np.ndarray
    level: np.ndarray
    new: np.ndarray
    new_read: np.ndarray
    key_value: np.ndarray


@_strict
@no_type_check
def compressive_room(num_lanes, w, num_columns):
    """Room for steps; `num_columns` of the rings."""
    width, most_groups, most_rate = w.output.shape[1], 1, 1
    for layer in range(len(w.layout)):
        most_groups, most_rate = max(most_groups, w.layout[layer, 4]), max(most_rate, w.layout[layer, 2])
    num_new = num_lanes * most_groups
    return CompressiveRoom(
        np.empty((num_lanes, width), np.float32),
        np.empty((num_lanes, w.project.shape[2]), np.float32),
        np.empty(2 * w.cosine.shape[1], np.float32),
        np.empty((num_lanes, width), np.float32),
        np.empty((num_lanes, w.expand.shape[2]), np.float32),
        np.empty(num_columns + 4 * PADDING, np.float32),
        np.empty((4, 3), np.int64),
        np.empty((num_new, most_rate * width), np.float32),
        np.empty((num_new, 2 * width), np.float32),
        np.empty((num_new, width), np.float32),
        np.empty((num_new, width), np.float32),
        np.empty((num_new, w.key_value.shape[2]), np.float32),
    )


@_strict
@no_type_check
def compress_known(w, state):
    """f_c of the groups that the steps so far of an unfinished window would have done: after a conversion."""
    r = compressive_room(len(state.rows), w, state.keys.shape[4])
    for layer in range(len(w.layout)):
        for t in range(state.position[0]):
            compress_some(layer, t, w, state, r)


@_strict
@no_type_check
def sample_compressive(front_end, predictor, head, followed, w, state, drawing, codes, uniforms, out_codes, out_logs):
    """Sample a block: codes and log-probabilities [B, N] from the last codes [B] and uniform numbers [B, N]."""
    num_lanes, num_codes = uniforms.shape
    vocab_size, width = front_end.table.shape
    rows, sides = np.empty((num_lanes, width), np.float32), np.zeros((num_lanes, 2), np.float32)
    features, outputs = np.empty((num_lanes, width), np.float32), np.empty((num_lanes, len(head.bias)), np.float32)
    logs, cumulative, chances = np.empty(vocab_size, np.float32), np.empty(vocab_size + 1), np.empty(vocab_size)
    r = compressive_room(num_lanes, w, state.keys.shape[4])
    samples = begin_block(predictor, followed, num_codes)
    for index in range(num_codes):
        embed(front_end, predictor, followed, samples, index, codes, rows, sides)
        step_compressive(rows, w, state, r, features)
        multiply_head(head, features, outputs)
        for lane in range(num_lanes):
            code, log_probability = draw_next(
                head, outputs[lane], sides[lane], uniforms[lane, index], drawing, logs, cumulative, chances
            )
            codes[lane], out_codes[lane, index], out_logs[lane, index] = code, code, log_probability
    end_block(samples, followed, num_codes)
