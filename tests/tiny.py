"""Tiny models of every kind, for tests that enumerate them."""

from typing import Any

from ct_audio.models import SequenceModel, build_model, model_config_class

_TRANSFORMER = {
    "name": "compressive_transformer",
    "vocab_size": 32,
    "num_layers": 3,
    "width": 16,
    "num_heads": 2,
    "feedforward_width": 24,
    "position_width": 4,
    "window_length": 8,
    "memory_length": 8,
    "compressed_memory_length": 4,
    "compression_rate": 2,
    "dropout": 0.0,
}

_ADAPTIVE = {"adaptive_cutoffs": [6, 14], "adaptive_div": 2, "tie_embeddings": True}

_LINEAR_PREDICTION = {"name": "linear_prediction", "vocab_size": 32, "order": 4, "regularisation": 1e-4}

_PREDICTION = {
    "front_end": "linear_prediction",
    "prediction_order": 3,
    "prediction_window_length": 12,
    "prediction_hop_length": 5,
    "head": "logistic_mixture",
    "num_components": 2,
}

_WAVENET = {
    "name": "wavenet",
    "vocab_size": 32,
    "num_layers": 6,
    "layers_per_cycle": 3,
    "width": 12,
    "skip_width": 10,
}

TINY_MODELS: dict[str, dict[str, Any]] = {
    "compressive_transformer": _TRANSFORMER,
    "compressive_transformer_pre_norm": _TRANSFORMER | {"norm_position": "pre"},
    "compressive_transformer_reference": _TRANSFORMER | {"attention_backend": "reference"},
    "compressive_transformer_long_window": _TRANSFORMER | {"window_length": 16, "memory_length": 4},
    "compressive_transformer_mean": _TRANSFORMER | {"compression_function": "mean"},
    "compressive_transformer_max": _TRANSFORMER | {"compression_function": "max"},
    "compressive_transformer_dilated_conv": _TRANSFORMER
    | {"compression_function": "dilated_conv", "compression_rate": 4, "compressed_positions": "temporal"},
    "compressive_transformer_gru": _TRANSFORMER | {"compression_function": "gru", "compression_loss": "autoencoding"},
    "compressive_transformer_zero": _TRANSFORMER | {"compression_rate": 4, "straddling_groups": "zero"},
    "compressive_transformer_convolution": _TRANSFORMER | {"convolution_length": 11, "norm_position": "pre"},
    "compressive_transformer_shared_keys": _TRANSFORMER | {"num_heads": 4, "num_kv_heads": 2},
    "compressive_transformer_rotary": _TRANSFORMER
    | {"positions": "rotary", "compressed_positions": "temporal", "num_kv_heads": 1, "norm_position": "pre"},
    "compressive_transformer_most_used": _TRANSFORMER | {"compression_function": "most_used"},
    "compressive_transformer_adaptive_span": _TRANSFORMER
    | {"adaptive_span": True, "adaptive_span_ramp": 6, "adaptive_span_loss": 0.1, "attention_backend": "reference"},
    "compressive_transformer_bptt": _TRANSFORMER
    | {"compression_loss": "bptt", "memory_layers": [0, 1], "memory_length": 16},
    "compressive_transformer_adaptive": _TRANSFORMER | _ADAPTIVE,
    "compressive_transformer_tied": _TRANSFORMER | {"tie_embeddings": True, "norm_position": "pre"},
    "transformer_xl": _TRANSFORMER | {"memory_length": 16, "compressed_memory_length": 0},
    "compressive_transformer_prediction": _TRANSFORMER | _PREDICTION,
    "wavenet": _WAVENET,
    "wavenet_pre_norm": _WAVENET | {"norm_position": "pre"},
    "wavenet_prediction": _WAVENET | _PREDICTION | {"head": "categorical"},
    "wavenet_waveform": _WAVENET | {"front_end": "waveform", "head": "logistic_mixture"},
    "linear_prediction": _LINEAR_PREDICTION | {"forgetting": 0.97},
    "linear_prediction_autocorrelation": _LINEAR_PREDICTION
    | {"adaptation": "autocorrelation", "prediction_window_length": 12, "prediction_hop_length": 5},
    "linear_prediction_fixed": _LINEAR_PREDICTION | {"adaptation": "none"},
    "linear_prediction_fixed_scale": _LINEAR_PREDICTION | {"adaptation": "none", "scale_decay": 1.0},
}


def tiny_model(name: str, **changes: Any) -> SequenceModel:
    """Build a tiny model; `changes` replace configuration fields."""
    plain = TINY_MODELS[name] | changes
    return build_model(model_config_class(plain["name"])(**plain))
