"""What torchtitan, Megatron-LM, nanoGPT and Hugging Face call the keys of this repository.

A key that nobody knows is looked up here before its spelling is judged, so that `parallel.tp=2`, `tp=2` and
`parallelism.tensor_parallel_degree=2` are all answered with parallel.tensor. Nothing is accepted under another name.
"""

from collections.abc import Mapping

_PARALLEL = {
    "tp": "parallel.tensor",
    "tp_size": "parallel.tensor",
    "tensor_parallel": "parallel.tensor",
    "tensor_parallel_degree": "parallel.tensor",
    "tensor_model_parallel_size": "parallel.tensor",
    "pp": "parallel.pipeline",
    "pp_size": "parallel.pipeline",
    "pipeline_parallel": "parallel.pipeline",
    "pipeline_parallel_degree": "parallel.pipeline",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "pipeline_parallel_schedule": "parallel.pipeline_schedule",
    "pipeline_parallel_layers_per_stage": "parallel.layers_per_stage",
    "cp": "parallel.context",
    "cp_size": "parallel.context",
    "context_parallel_degree": "parallel.context",
    "context_parallel_size": "parallel.context",
    "context_parallel_rotate_method": "parallel.rotate",
    "ep": "parallel.expert",
    "ep_size": "parallel.expert",
    "expert_parallel_degree": "parallel.expert",
    "expert_model_parallel_size": "parallel.expert",
    "expert_tensor_parallel_degree": "parallel.expert_tensor",
    "etp": "parallel.expert_tensor",
    "dp": "parallel.shard",
    "fsdp": "parallel.shard",
    "dp_shard": "parallel.shard",
    "data_parallel_size": "parallel.shard",
    "data_parallel_shard_degree": "parallel.shard",
    "ddp": "parallel.replicate",
    "dp_replicate": "parallel.replicate",
    "data_parallel_replicate_degree": "parallel.replicate",
    "fsdp_reshard_after_forward": "parallel.reshard",
    "reshard_after_forward": "parallel.reshard",
    "enable_async_tensor_parallel": "parallel.async_tensor",
    "tp_comm_overlap": "parallel.async_tensor",
    "offload": "parallel.cpu_offload",
    "enable_cpu_offload": "parallel.cpu_offload",
}
_TRAINING = {
    "max_steps": "task.steps",
    "max_iters": "task.steps",
    "train_iters": "task.steps",
    "num_steps": "task.steps",
    "seq_length": "task.seq_len",
    "sequence_length": "task.seq_len",
    "block_size": "task.seq_len",
    "context_length": "task.seq_len",
    "bs": "task.global_batch",
    "batch_size": "task.global_batch",
    "global_batch_size": "task.global_batch",
    "local_batch_size": "task.micro_batch",
    "micro_batch_size": "task.micro_batch",
    "per_device_train_batch_size": "task.micro_batch",
    # The number of micro-batches in a step follows from both.
    "gradient_accumulation_steps": "task.micro_batch",
    "eval_interval": "task.validate_every",
    "eval_iters": "task.validate_samples",
    "log_interval": "task.log_every",
    "log_freq": "task.log_every",
    "logging_steps": "task.log_every",
    "gc_freq": "task.gc_every",
}
_OPTIMIZER = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_eps": "optim.eps",
    "adam_epsilon": "optim.eps",
    "wd": "optim.weight_decay",
    "clip_grad": "optim.max_norm",
    "grad_clip": "optim.max_norm",
    "gradient_clipping": "optim.max_norm",
    "max_grad_norm": "optim.max_norm",
    "warmup": "schedule.warmup_steps",
    "warmup_iters": "schedule.warmup_steps",
    "lr_warmup_iters": "schedule.warmup_steps",
    "lr_decay_style": "schedule.shape",
    "lr_scheduler_type": "schedule.shape",
    "decay_type": "schedule.shape",
    "lr_decay_iters": "schedule.total_steps",
    "min_lr": "schedule.min_factor",
    "min_lr_factor": "schedule.min_factor",
}
_MODEL = {
    "hidden_size": "model.dim",
    "d_model": "model.dim",
    "n_embd": "model.dim",
    "num_layers": "model.n_layers",
    "n_layer": "model.n_layers",
    "num_hidden_layers": "model.n_layers",
    "n_head": "model.n_heads",
    "num_attention_heads": "model.n_heads",
    "num_heads": "model.n_heads",
    "num_key_value_heads": "model.n_kv_heads",
    "num_query_groups": "model.n_kv_heads",
    "intermediate_size": "model.ffn_dim",
    "ffn_hidden_size": "model.ffn_dim",
    "inter_dim": "model.ffn_dim",
    "padded_vocab_size": "model.vocab_size",
    "max_position_embeddings": "model.max_seq_len",
    "rms_norm_eps": "model.norm_eps",
    "rotary_base": "model.rope_theta",
    "attn_type": "model.attention",
    "attn_mask_type": "model.mask",
    "first_k_dense_replace": "model.n_dense_layers",
    "num_nextn_predict_layers": "model.mtp.depths",
    "mtp_num_layers": "model.mtp.depths",
    "num_mtp_layers": "model.mtp.depths",
    "mtp_loss_scaling_factor": "model.mtp.weight",
    "n_routed_experts": "model.moe.num_experts",
    "num_local_experts": "model.moe.num_experts",
    "n_shared_experts": "model.moe.num_shared_experts",
    "num_experts_per_tok": "model.moe.top_k",
    "moe_router_topk": "model.moe.top_k",
    "moe_intermediate_size": "model.moe.hidden_dim",
    "moe_ffn_hidden_size": "model.moe.hidden_dim",
    "scoring_func": "model.moe.score_func",
    "norm_topk_prob": "model.moe.route_norm",
    "routed_scaling_factor": "model.moe.route_scale",
    "n_group": "model.moe.num_expert_groups",
    "topk_group": "model.moe.num_limited_groups",
    "moe_router_force_load_balancing": "model.moe.force_load_balance",
}
_RUN = {
    "random_seed": "seed",
    "job_name": "name",
    "run_name": "name",
    "output_dir": "root",
    "dump_folder": "root",
    "resume_from_checkpoint": "folder",
    "save_interval": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "keep_latest_k": "checkpoint.keep",
    "async_mode": "checkpoint.asynchronous",
    "load": "checkpoint.initial",
    "initial_load_path": "checkpoint.initial",
    "init_from": "checkpoint.initial",
    "dataset_path": "data.files",
    "data_path": "data.files",
    "time_limit": "cluster.minutes",
    "walltime": "cluster.minutes",
    "time": "cluster.minutes",
    "gres": "cluster.gpus_per_node",
    # Groups: what one chooses is an option.
    "activation_checkpoint": "recompute=full",
    "activation_checkpointing": "recompute=full",
    "gradient_checkpointing": "recompute=full",
    "recompute_granularity": "recompute=full",
    "selective_ac_option": "recompute=selective",
    "mixed_precision": "precision=bf16",
    "mixed_precision_param": "precision=bf16",
    "bf16": "precision=bf16",
    "fp8": "precision=fp8",
    "torch_compile": "compile=blocks",
    "enable_wandb": "tracker=wandb",
    "use_wandb": "tracker=wandb",
    "wandb_project": "tracker=wandb",
    "enable_tensorboard": "tracker=tensorboard",
    "use_mlflow": "tracker=mlflow",
    "mlflow_tracking_uri": "tracker=mlflow",
    "use_trackio": "tracker=trackio",
    "slurm": "cluster=slurm",
}
# What a person may type elsewhere, and what decides it here.
_SHAPE = "follows from the layout: parallel=, parallel.shard and the other degrees, or the gpus of parallel=auto"
FOLLOWS: Mapping[str, str] = {
    "nodes": f"{_SHAPE}, over cluster.gpus_per_node",
    "num_nodes": f"{_SHAPE}, over cluster.gpus_per_node",
    "nnodes": f"{_SHAPE}, over cluster.gpus_per_node",
    "ntasks": _SHAPE,
    "ntasks_per_node": f"{_SHAPE}, over cluster.gpus_per_node",
    "tasks_per_node": f"{_SHAPE}, over cluster.gpus_per_node",
    "nproc_per_node": f"{_SHAPE}, over cluster.gpus_per_node",
    "world_size": _SHAPE,
    "num_gpus": _SHAPE,
    "gpus": _SHAPE,  # cluster=local has this key
    "cpus_per_task": "follows from cluster.cpus_per_gpu: a task is a rank, which has one GPU",
    "mem": "follows from cluster.memory_gib_per_gpu and the layout",
    "mem_per_node": "follows from cluster.memory_gib_per_gpu and the layout",
}
SYNONYMS: Mapping[str, str] = _PARALLEL | _TRAINING | _OPTIMIZER | _MODEL | _RUN


def ours(key: str) -> str | None:
    """The key or `group=option` of this repository that a dotted key of another one stands for.

    Upper case and dashes count as lower case and underscores; only the last part of the key is looked up.
    """
    return SYNONYMS.get(_plain(key))


def follows(key: str) -> str | None:
    """Of a key that there is not because others decide it: which ones."""
    return FOLLOWS.get(_plain(key))


def _plain(key: str) -> str:
    return key.rpartition(".")[2].lower().replace("-", "_")
