"""What older versions called things. A recorded config is read as this version would have written it.

Whoever moves a config class, renames a key or adds one adds a line here, and changes nothing else: runs of older
versions are then found by the same command and go on. `tests/upgrade` resumes folders that version 0.1 wrote.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

Tree = dict[str, Any]

# `_target_` of an older version -> of a later one.
MOVED: Mapping[str, str] = {
    # 0.1 -> 0.2
    "src.cluster.local.Local": "src.cluster.local.config.Local",
    "src.cluster.search.Optuna": "src.sweeps.search.Optuna",
    "src.cluster.slurm.Slurm": "src.cluster.slurm.config.Slurm",
    "src.cluster.sweep.Grid": "src.sweeps.grid.Grid",
    "src.distributed.compiling.Compile": "src.distributed.compile.Compile",
    "src.distributed.degrees.Degrees": "src.distributed.parallel_dims.ParallelDims",
    "src.distributed.float8.Float8": "src.distributed.precision.float8.Float8",
    "src.distributed.precision.Precision": "src.distributed.precision.config.Precision",
    "src.metrics.event_files.EventFiles": "src.metrics.trackers.tensorboard.EventFiles",
    "src.metrics.tracker.Tracker": "src.metrics.trackers.config.Tracker",
    "src.metrics.weights_and_biases.WeightsAndBiases": "src.metrics.trackers.weights_and_biases.WeightsAndBiases",
    "src.models.auto.Auto": "src.models.families.Auto",
    "src.tasks.bench.Bench": "src.tasks.bench.config.Bench",
    "src.tasks.evaluate.Evaluate": "src.tasks.evaluate.config.Evaluate",
    "src.tasks.export.Export": "src.tasks.export.config.Export",
    "src.tasks.generate.Generate": "src.tasks.generate.config.Generate",
    "src.tasks.pretrain.Pretrain": "src.tasks.pretrain.config.Pretrain",
    "src.tasks.verify.Verify": "src.tasks.verify.config.Verify",
}

# Dotted key of an older version -> of a later one, such as "model.moe.n_experts": "model.moe.num_experts". Commands
# may use either.
RENAMED: Mapping[str, str] = {
    # 0.1 -> 0.2: the words of the papers and of the hub
    "model.tied_embeddings": "model.tie_word_embeddings",
    "model.moe.n_experts": "model.moe.num_experts",
    "model.moe.groups": "model.moe.num_expert_groups",
    "model.moe.groups_kept": "model.moe.num_limited_groups",
    "model.moe.n_shared": "model.moe.num_shared_experts",
    "model.moe.score": "model.moe.score_func",
    "model.moe.normalise": "model.moe.route_norm",
    "model.moe.scale": "model.moe.route_scale",
    "model.moe.balance_rate": "model.moe.load_balance_coeff",
    "model.moe.forced_balance": "model.moe.force_load_balance",
}

# Facts that predicted times depend on.
_SITE: Mapping[str, Any] = {
    "gpu_model": None,
    "link_gib_per_second": 46.6,
    "link_microseconds": 12.0,
    "time_factors": {},
    "gpu_watts": None,
    "price_per_gpu_hour": None,
    "mtbf_hours_per_gpu": None,
}

# How samples are made of documents.
_ROWS: Mapping[str, Any] = {"packing": "concatenate", "bos_at_row_start": False}

# Class -> its keys that an earlier version of the class had not, with the value that does what that version did, such
# as "src.tasks.pretrain.config.Pretrain": {"z_loss": 0.0}. With that value a key is no part of a run's identity.
ADDED: Mapping[str, Mapping[str, Any]] = {
    # 0.1 -> 0.2
    "src.checkpoint.config.Checkpoint": {"keep_best": None, "mirror": None, "progress": "all"},
    "src.cluster.local.config.Local": {"at_once": None, **_SITE},
    "src.cluster.slurm.config.Slurm": {"after": None, "preflight_gpus": False, **_SITE},
    "src.data.config.Hub": {"bad_rows": "refuse", "data_dir": None, "hold_out": "documents", **_ROWS},
    "src.data.config.Mixture": {"hold_out": "documents", **_ROWS},
    "src.data.config.Stdlib": {"hold_out": "documents", **_ROWS},
    "src.data.config.Synthetic": {"hold_out": "documents", **_ROWS},
    "src.data.config.Text": {"bad_rows": "refuse", "hold_out": "documents", **_ROWS},
    "src.data.hub.HubSource": {"bad_rows": "refuse", "data_dir": None},
    "src.data.sources.TextSource": {"bad_rows": "refuse"},
    "src.distributed.compile.Compile": {"graph": False},
    "src.metrics.alerts.config.Alerts": {"straggler_share": None, "straggler_steps": 50},
    "src.metrics.trackers.config.Tracker": {"trackio": None, "mlflow": None},
    "src.models.deepseek_v3.config.DeepseekV3Config": {
        "latent_norm_eps": None,
        "mtp": {"depths": 0, "weight": 0.3, "later_weight": 0.1, "later_from": 0.676},
        "rope_scaling.attention_factor": 1.0,
    },
    "src.tasks.evaluate.config.Evaluate": {"ema": False},
    "src.tasks.export.config.Export": {"ema": False, "fp8_scales": "float32"},
    "src.tasks.generate.config.Generate": {"ema": False},
    "src.tasks.pretrain.config.Pretrain": {
        "ema_decay": None,
        "ema_dtype": "float32",
        "ema_offload": False,
        "layer_norms": False,
        "qk_clip": None,
        "spike_score": None,
        "spike_window": 128,
        "stages": None,
        "on_spike": "note",
        "z_loss": 0.0,
        "router_z_loss": 0.0,
    },
    "src.tasks.verify.config.Verify": {"z_loss": 0.0, "router_z_loss": 0.0},
}

# Section that an earlier version had not -> the option of its group that does what that version did.
ADDED_SECTIONS: Mapping[str, str] = {
    # 0.1 -> 0.2
    "alert": "none",
    "parametrization": "standard",
    "evaluate": "none",
}

# Of these, what a section is that does so: with it the section is no part of a run's identity.
NEUTRAL_SECTIONS: Mapping[str, Tree] = {
    "parametrization": {"_target_": "src.models.parametrization.config.Standard"},
}

_ABSENT = object()


def upgraded(tree: Mapping[str, Any]) -> Tree:
    """A copy of a recorded config with today's classes and keys; of a config of today, an equal copy."""
    found: Tree = _retargeted(tree)
    for old, new in RENAMED.items():
        value = _take(found, old)
        if value is not _ABSENT:
            _put(found, new, value)
    for section, keys in _additions(found):
        for key, neutral in keys.items():
            _put(section, key, deepcopy(neutral))
    return found


def without_neutral(tree: Mapping[str, Any]) -> Tree:
    """A copy without the keys of ADDED that have their neutral value, and without neutral sections."""
    found = deepcopy({key: value for key, value in tree.items() if NEUTRAL_SECTIONS.get(key, _ABSENT) != value})
    for section, keys in _additions(found):
        for key, neutral in keys.items():
            if _get(section, key) == neutral:
                _take(section, key)
    return found


def renamed(key: str) -> str:
    """Today's name of a dotted key, which is mostly the same."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            key = new + key.removeprefix(old)
    return key


def _retargeted(value: Any) -> Any:
    if isinstance(value, list):
        return [_retargeted(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    return {key: _target(each) if key == "_target_" else _retargeted(each) for key, each in value.items()}


def _target(name: Any) -> Any:
    while name in MOVED:
        name = MOVED[name]
    return name


def _additions(value: Any) -> Iterator[tuple[Tree, Mapping[str, Any]]]:
    """Every object whose class has gained keys, with those keys."""
    if isinstance(value, list):
        for each in value:
            yield from _additions(each)
    elif isinstance(value, dict):
        if value.get("_target_") in ADDED:
            yield value, ADDED[value["_target_"]]
        for each in list(value.values()):
            yield from _additions(each)


def _home(tree: Any, path: str) -> tuple[Any, str]:
    """The mapping that holds the last part of a dotted path, or None; and that part."""
    *parents, last = path.split(".")
    for part in parents:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None, last


def _get(tree: Tree, path: str) -> Any:
    home, last = _home(tree, path)
    return _ABSENT if home is None else home.get(last, _ABSENT)


def _take(tree: Tree, path: str) -> Any:
    home, last = _home(tree, path)
    return _ABSENT if home is None else home.pop(last, _ABSENT)


def _put(tree: Tree, path: str, value: Any) -> None:
    """Unless a value is there, or nothing that could hold it."""
    home, last = _home(tree, path)
    if home is not None:
        home.setdefault(last, value)
