"""What a key of the config costs, in memory or time, with the page that measures or derives it: column "cost" of
docs/config.md. A key that is not here costs nothing that a step would show.
"""

from collections.abc import Mapping

LAYOUTS, PRECISION = "[measured](layouts.md)", "[measured](precision_and_recompute.md#precision)"
RECOMPUTE, COMPILE = "[measured](precision_and_recompute.md#recompute)", "(precision_and_recompute.md#compile)"
AVERAGES, CLIP = "[more](optimizers.md#averages-of-the-weights)", "[more](optimizers.md#qk-clip)"
SCORES, SENT = "[more](generate_and_evaluate.md#scores-while-a-run-trains)", "[more](diloco.md#what-is-sent)"
COMPRESSED = f"bytes and digits of what ranks send; {PRECISION}"

COSTS: Mapping[str, str] = {
    "task.steps": "time of the run in proportion",
    "task.seq_len": "memory of activations in proportion, time of attention with its square",
    "task.global_batch": "time of a step in proportion; memory is the micro-batch's",
    "task.micro_batch": "memory of activations in proportion; few tokens at once leave a GPU idle: "
    "[measured](recipes.md#small-models)",
    "task.validate_every": "a forward pass over task.validate_samples sequences each time",
    "task.validate_samples": "time of a validation in proportion",
    "task.ema_decay": f"4 bytes a parameter, divided as the weights are; {AVERAGES}",
    "task.ema_dtype": "bfloat16: half of that",
    "task.ema_offload": f"a copy of the weights over the bus in each step; {AVERAGES}",
    "task.qk_clip": f"half the flops of a forward pass of attention, and compile=off; {CLIP}",
    "task.on_spike": "rewind: the steps since a checkpoint, once more; [more](optimizers.md#spikes)",
    "task.layer_norms": "in logged steps a further read of gradients and half the flops of a forward pass of "
    "attention; [more](optimizers.md#norms-of-layers)",
    "task.z_loss": "one multiplication of the logits; [more](optimizers.md#z-loss)",
    "task.profile": "two steps under a profiler, behind those that are measured",
    "task.rehearse": "memory and minutes of this machine, before the run",
    "task.max_tokens": "time of a text in proportion; keys and values of each token in memory",
    "task.batch": "keys and values of each prompt in memory; [measured](generate_and_evaluate.md#text)",
    "task.check": "a forward pass of both models on the CPU; the export waits for it",
    "model.mtp.depths": "a block and a loss more for each; [more](multi_token_prediction.md#under-a-layout)",
    "parallel.replicate": f"each replica has all weights, gradients and moments; {LAYOUTS}",
    "parallel.shard": f"a gather and a reduction of all weights; {LAYOUTS}",
    "parallel.tensor": f"two exchanges a block, forward and backward; {LAYOUTS}",
    "parallel.context": f"an exchange of keys and values in each attention; {LAYOUTS}",
    "parallel.pipeline": f"(p - 1) / (m + p - 1) of the time is idle, of p stages and m micro-batches; {LAYOUTS}",
    "parallel.pipeline_schedule": "[measured](layouts.md#llama-3-8b)",
    "parallel.expert": "two exchanges of tokens a layer; [measured](experts.md#experts-on-several-ranks)",
    "parallel.reshard": "never: the gathered weights in memory, for less time; [measured](layouts.md#llama-3-8b)",
    "parallel.prefetch": "the gathered weights of so many blocks in memory",
    "parallel.cpu_offload": "each step's weights and gradients over the bus, and the update on the CPU",
    "precision.compute": PRECISION,
    "precision.storage": f"bytes of weights and moments; {PRECISION}",
    "precision.reduce": COMPRESSED,
    "precision.float8": PRECISION,
    "precision.float8.all_gather": COMPRESSED,
    "precision.float8.emulate": "slower than without float8: for tests",
    "recompute.mode": f"up to a third of the time, for most of the activations' memory; {RECOMPUTE}",
    "recompute.every": RECOMPUTE,
    "recompute.budget": RECOMPUTE,
    "compile.blocks": f"[1 to 3 minutes at the first start]{COMPILE}",
    "compile.graph": f"[minutes at the start]{COMPILE}; [wins where kernels are short](recipes.md#small-models)",
    "compile.mode": "max-autotune: a longer start",
    "data.packing": "best_fit: padding, and a computation once; [more](data.md#samples)",
    "data.processes": "69 to 120 MiB of memory each; [measured](data.md#prepared-by-a-job-of-its-own)",
    "optim.moments": f"bfloat16: half the bytes of moments; {PRECISION}",
    "optim.newton_schulz_steps": "[measured](optimizers.md#muon)",
    "checkpoint.every": "a short stall, and what lies behind a checkpoint is lost to a failure; "
    "[simulated](interruptions.md#goodput)",
    "checkpoint.asynchronous": "true: a copy of the state in host memory; false: training waits for the disk",
    "checkpoint.keep": "a checkpoint on the disk each: 12 bytes a parameter with AdamW in float32",
    "checkpoint.keep_best": "the same",
    "checkpoint.keep_every": "the same, for ever",
    "checkpoint.export_every": "training waits for a copy of the weights: `export/stall_seconds`",
    "checkpoint.mirror": "a copy beside training; [measured](../benchmarks/README.md#a-save-with-and-without-a-mirror)",
    "checkpoint.verify": "full: reads every byte before a start",
    "evaluate.every": f"training waits for the tasks: `evaluate/<task>/seconds`; {SCORES}",
    "evaluate.samples": f"time of a task in proportion; {SCORES}",
    "evaluate.seeds": f"time of a few-shot task in proportion; {SCORES}",
    "evaluate.cluster": f"a command of its own for each checkpoint, which training does not wait for; {SCORES}",
    "fault_tolerance.sync_steps": f"how often all weights travel; {SENT}",
    "fault_tolerance.exchange": f"4, 2 or 1 bytes a weight on the wire; {SENT}",
    "fault_tolerance.fragments": f"the largest piece that travels at once; {SENT}",
    "cluster.preflight_gpus": "a product, a copy and a sum at each start; "
    "[more](slurm.md#what-ends-a-job-and-what-then-happens)",
    "cluster.grace_seconds": "time of an attempt that is left for its last save",
    "cluster.requeues": "hours of the account",
}
