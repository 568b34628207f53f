"""What may change when a run is resumed, and what may not."""

from typing import Any

from ct_audio.common.errors import UserError
from ct_audio.runs.config import config_to_dict

_MAY_CHANGE = {  # keys that do not decide what is learnt; all others must stay as they were
    "name",
    "runs_dir",
    "data.corpus",  # a corpus may move; its fingerprint is compared when it is opened
    "train.num_steps",
    "train.device",
    "train.compile",
    "train.num_threads",
    "train.validate_whole_split",
    "train.log_every_steps",
    "train.valid_every_steps",
    "train.checkpoint_every_steps",
    "train.sample_every_steps",
    "train.sample_seconds",
    "train.logger",
    "train.timeout_seconds",
    "train.checkpoint_layers",
    "train.parallel",  # but for the order of sums
    "actors.in_processes",  # of an agent: where actors run changes no number
}


def require_same_run(old: Any, new: Any) -> None:
    """Check that a resumed run keeps what decides what is learnt.

    num_steps, the `*_every_steps`, sample_seconds, validate_whole_split, device, compile, num_threads, parallel,
    checkpoint_layers, timeout_seconds and logger may change, and the place of the corpus; without dropout
    num_micro_batches too (each part draws its own numbers for dropout).

    Args:
        old, new: of one kind, as `RunConfig`.
    Raises:
        UserError: another key has changed; the message names all of them.
    """
    before, after = flat_config(old), flat_config(new)
    may_change = _MAY_CHANGE if after.get("model.dropout") else _MAY_CHANGE | {"train.num_micro_batches"}
    changed = [
        f"{key} (was {before.get(key)}, now {after.get(key)})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in may_change
    ]
    if changed:
        raise UserError(
            f"run {new.run_dir} was started with another configuration: {', '.join(changed)}; "
            "put it back, or choose another name"
        )


def flat_config(config: Any) -> dict[str, Any]:
    """Plain values by key, as {"data.num_lanes": 8}; `optim.update_period` is one value."""
    flat: dict[str, Any] = {}
    for key, value in config_to_dict(config).items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat
