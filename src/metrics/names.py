"""Every number of metrics.jsonl: its unit and what it is. Who records a new one adds it here; docs/metrics.md is made
of it, and tests hold it against what runs record.
"""

import re
from typing import NamedTuple


class MetricName(NamedTuple):
    """`pattern`: the name, where "<layer>" and the like stand for one part of a path. `unit`: "" for a pure number."""

    pattern: str
    unit: str
    meaning: str


NAMES = (
    MetricName("loss", "nats per token", "mean cross entropy of the step's labels, over all ranks"),
    MetricName("validation_loss", "nats per token", "the same of held-out samples; perplexity is its exponential"),
    MetricName("validation_loss_ema", "nats per token", "the same under the moving average of the weights"),
    MetricName("evaluate/<task>/seconds", "s", "that the task took; training waited"),
    MetricName("evaluate/<task>/<score>_stderr", "", "standard error of such a score, over documents"),
    MetricName("evaluate/<task>/<score>_spread", "", "its standard deviation over drawings of worked examples"),
    MetricName("evaluate/<task>/<score>", "", "of a task of evaluate.tasks, such as acc; bits_per_byte by source"),
    MetricName("mtp_loss", "nats per token", "mean cross entropy of multi-token prediction over its depths"),
    MetricName("grad_norm", "", "2-norm of all gradients, before clipping"),
    MetricName("lr", "", "learning rate of the step"),
    MetricName("tokens", "tokens", "trained on since the run began, over all ranks"),
    MetricName("stage", "", "number of the stage that the step is of, from 1; only of a run in stages"),
    MetricName("tokens_per_second", "tokens/s", "of one device, since the last line"),
    MetricName("step_seconds", "s", "of one optimizer step, mean since the last line"),
    MetricName("data_seconds", "s", "of a step that were spent waiting for a batch"),
    MetricName("tflops_full", "TFLOP/s", "of one device, counting attention as a full square"),
    MetricName("tflops_causal", "TFLOP/s", "of one device, counting the causal half of attention"),
    MetricName("mfu_full_percent", "%", "tflops_full over the device's peak in bfloat16"),
    MetricName("mfu_causal_percent", "%", "tflops_causal over the same peak"),
    MetricName("throughput/predicted_ratio", "", "tokens_per_second over that of the plan; only of a device it knows"),
    MetricName("peak_allocated_gib", "GiB", "most memory that tensors took on a GPU since the last line"),
    MetricName("peak_reserved_gib", "GiB", "most memory that the allocator held on a GPU since the last line"),
    MetricName("peak_rss_gib", "GiB", "most memory that a rank on a CPU has held"),
    MetricName("startup/<stage>_seconds", "s", "of a start: import, init, load, compile, first_step; once an attempt"),
    MetricName("startup/total_seconds", "s", "from the start of the process to the end of the first step"),
    MetricName("goodput/<part>_seconds", "s", "of all attempts so far: useful, and what else time went to"),
    MetricName("goodput/share", "", "useful seconds over all seconds"),
    MetricName("goodput/interruption_seconds", "s", "from the last line of the attempt before to this attempt's first"),
    MetricName("checkpoint/stall_seconds", "s", "that training waited for a save"),
    MetricName("checkpoint/write_seconds", "s", "until the save was on the disk"),
    MetricName("checkpoint/bytes", "bytes", "of the checkpoint, all ranks"),
    MetricName("checkpoint/failures", "", "saves of this attempt that faults of a file system have ended so far"),
    MetricName("checkpoint/faults", "", "of file systems (EIO, ESTALE ...) that ranks of this attempt have waited out"),
    MetricName("checkpoint/waited_seconds", "s", "that the rank which waited longest has waited for them"),
    MetricName("mirror/write_seconds", "s", "that the copy to checkpoint.mirror took, beside training"),
    MetricName("mirror/bytes", "bytes", "that went there for it"),
    MetricName("mirror/failures", "", "copies of this attempt that failed so far, and are tried again"),
    MetricName("export/stall_seconds", "s", "that training waited for an export"),
    MetricName("export/write_seconds", "s", "until the export was on the disk"),
    MetricName("data/<source>/tokens", "tokens", "that this source of a mixture has given"),
    MetricName("data/<source>/share", "", "its share of all tokens so far"),
    MetricName("norms/<layer>/gradient", "", "Frobenius norm of a layer's gradients, before clipping"),
    MetricName("norms/<layer>/update", "", "Frobenius norm of a layer's update"),
    MetricName("norms/<layer>/hidden", "", "root mean square of what the layer hands on"),
    MetricName("norms/<layer>/attention_logit", "", "largest logit of its attention, where no compiler has its block"),
    MetricName("stragglers/slowdown_percent", "%", "longer than the median's takes the own work of the slowest rank"),
    MetricName("stragglers/rank", "", "number of that rank"),
    MetricName("stragglers/named", "ranks", "that have been slow for alert.straggler_steps"),
    MetricName("spike_score", "", "deviations of the step's loss or gradient norm above the median before it"),
    MetricName("experts/load_max_over_mean", "", "rows of the busiest expert over the mean, worst layer; 1 is even"),
    MetricName("experts/dead", "experts", "without a row in the step, over all layers"),
    MetricName("experts/entropy", "", "of the shares of rows over that of equal shares, of the worst layer; 1 is even"),
    MetricName("experts/bias_norm", "", "2-norm of the biases that balance loads, of the worst layer"),
    MetricName("experts/dropped", "rows", "asked for and not given to an expert; anything but 0 is a fault"),
    MetricName("experts/dispatch_ms", "ms", "of rows on their way to experts in one forward pass, over all layers"),
    MetricName("experts/combine_ms", "ms", "of rows on their way back"),
    MetricName("experts/force_load_balance", "", "1 where experts took turns, for a benchmark"),
    MetricName("experts/<layer>/<number>", "", "the same numbers of one layer"),
    MetricName("groups/participants", "groups", "replica groups that took the step"),
    MetricName("groups/quorum", "", "number of the agreement of groups that the step belongs to"),
    MetricName("groups/lost_steps", "steps", "that were computed and not counted"),
    MetricName("groups/commit_failures", "steps", "that groups agreed not to count"),
    MetricName("<group>/lost_steps", "steps", "the same of one replica group (group_0, group_1 ...)"),
    MetricName("<group>/commit_failures", "steps", "the same of one replica group"),
    MetricName("<group>/heal_seconds", "s", "that the group spent fetching its state from another"),
    MetricName("outer/syncs", "", "exchanges of LocalSGD or DiLoCo so far"),
    MetricName("outer/failed_syncs", "", "of them, those that some group missed"),
    MetricName("outer/update_norm", "", "2-norm of the newest outer update"),
    MetricName("outer/sent_bytes", "bytes", "that all ranks have sent to other groups"),
)  # fmt: skip


def metric_name(name: str) -> MetricName | None:
    """What is known of a recorded name: that of its own first, then of a pattern."""
    exact = (each for each in NAMES if each.pattern == name)
    return next(exact, None) or next((each for each in NAMES if _expression(each.pattern).fullmatch(name)), None)


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"<\w+>", "[^/]+", pattern))
