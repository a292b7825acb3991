"""What each rank of task=pretrain does, in order."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch

from src.checkpoint.folder import complete, step_of
from src.checkpoint.store import Store
from src.config.tree import read
from src.data.batches import Batches
from src.data.corpus import Corpus, read_recipe, reopen
from src.distributed.process.rank_context import RankContext, device_type
from src.errors import FolderError
from src.fault_tolerance.replica_groups import ReplicaGroups
from src.hugging_face.companions import Sources, companions
from src.hugging_face.load import noted
from src.hugging_face.origin import ends_of, origin_of
from src.hugging_face.save import Form
from src.metrics.alerts.send import tell_aside
from src.metrics.alerts.watcher import AlertSink
from src.metrics.console import Console
from src.metrics.curve import plot
from src.metrics.startup import Startup
from src.metrics.throughput import Throughput, peak_flops
from src.planning.plan import Plan
from src.planning.recompute_choice import resolve_auto_recompute
from src.run import Run
from src.tasks.evaluate.live import LiveEvaluation, TrainingEvaluator
from src.tasks.evaluate.side_job import SideEvaluator, SideJobs
from src.tasks.export.check_folder import check_apart
from src.tasks.generate.decoding import generate
from src.tasks.generate.sampling import SamplingParams
from src.tasks.pretrain.config import Pretrain
from src.train.exports import SHARD_BYTES, Exports
from src.train.loop import Loop
from src.train.replicated.loop import ReplicatedLoop
from src.train.report import Report
from src.train.resume import resume
from src.train.setup import START_TIMEOUT_SECONDS, Training, build_training, make_deterministic
from src.train.stability.attention_logits import AttentionLogits
from src.train.stability.layer_norms import LayerNorms
from src.train.stability.stragglers import StragglerWatch
from src.train.stop import Stop


def pretrain(task: Pretrain, run: Run, folder: Path) -> bool:
    """Train until the last step or a stop signal. Collective. True when the run is complete; false when a signal
    stopped it, after a save.
    """
    startup = Startup()
    startup.done("import")
    with Stop() as stop:
        ranks = RankContext.join(
            device_type(), run.parallel.world, timeout_seconds=START_TIMEOUT_SECONDS, traces=folder / "traces"
        )
        if task.deterministic:
            make_deterministic()
        groups, home = run.fault_tolerance.join(ranks), run.fault_tolerance.home(folder)
        asked, run = run.recompute, resolve_auto_recompute(run, home)
        training = build_training(run, ranks, skips=task.skips, groups=groups)
        startup.done("init")
        report = _report(task, run, home, ranks, groups)
        if run.recompute != asked:
            report.say(f"recompute: {run.recompute}, the cheapest that fits")
        status: Literal["done", "stopped", "failed"] = "failed"
        try:
            corpus = reopen(read_recipe(home), run.cache)
            loop = _loop(task, run, home, corpus, training, startup, report, stop, groups)
            finished = loop.run()
            if groups is not None:
                groups.leave()
            _farewell(task, run, home, corpus, training, report, finished)
            if finished and isinstance(loop.evaluator, TrainingEvaluator | SideEvaluator):
                loop.evaluator.conclude()
            status = "done" if finished else "stopped"
        finally:
            report.close(status)
        ranks.leave()
        return finished


def _report(task: Pretrain, run: Run, folder: Path, ranks: RankContext, groups: ReplicaGroups | None) -> Report:
    """Rank 0 speaks for all, and rank 0 of one group for all groups."""
    if ranks.rank != 0:
        return Report(None, None, folder)
    watchers = [AlertSink(folder, run.alert)] if run.alert.wanted else []
    open_log = partial(run.tracker.open, folder, read(folder / "config.yaml"), watchers)
    if groups is None:
        return Report(open_log(), Console(task.steps), folder)
    return Report(None, Console(task.steps, title=f"group {groups.group}: "), folder, open_log)


def _loop(
    task: Pretrain,
    run: Run,
    folder: Path,
    corpus: Corpus,
    training: Training,
    startup: Startup,
    report: Report,
    stop: Stop,
    groups: ReplicaGroups | None,
) -> Loop:
    """Collective. Everything that the steps need, with the state of the newest checkpoint."""
    planned = Plan.read(folder)
    batches = Batches(
        corpus,
        run.data,
        seq_len=task.seq_len,
        seed=run.seed,
        rank=training.mesh.data_rank,
        ranks=training.mesh.data_ranks,
        micro_batch=planned.micro_batch,
        micro_batches=planned.micro_batches,
    )
    writer = "" if groups is None else f"group_{groups.group}"
    store = Store(folder / "checkpoints", run.checkpoint, writer=writer)
    report.say(resume(training.state, store, batches, task.steps, noted(folder)))
    startup.done("load")
    make = Loop if groups is None else partial(ReplicatedLoop, groups=groups)
    return make(
        training=training,
        plan=planned,
        cadence=task,
        optim=run.optim,
        schedule=run.schedule,
        batches=batches,
        checkpoint=run.checkpoint,
        store=store,
        exports=_exports(run, folder, corpus),
        evaluator=_evaluator(run, folder, corpus, training, batches, report),
        norms=_norms(training, run) if task.layer_norms else None,
        stragglers=_stragglers(run, folder, training, report),
        throughput=_throughput(run, planned, training.ranks.device),
        startup=startup,
        report=report,
        stop=stop,
        facts={"run": folder.name, "layout": planned.axes},
        grace_seconds=run.cluster.grace_seconds,
    )


def _stragglers(run: Run, folder: Path, training: Training, report: Report) -> StragglerWatch | None:
    """Collective. Where alert.straggler_share asks for it."""
    if (share := run.alert.straggler_share) is None:
        return None

    def tell(words: str) -> None:
        report.say(f"warning: {words}")
        if training.ranks.rank == 0:
            tell_aside(folder, run.alert, "straggler", words)

    return StragglerWatch(share, run.alert.straggler_steps, training.ranks.device, tell)


def _norms(training: Training, run: Run) -> LayerNorms:
    """With attention logits where whole sequences meet in blocks that no compiler has made one piece of."""
    seen = run.parallel.context == 1 and not run.compile.blocks
    logits = AttentionLogits(training.network) if seen else None
    return LayerNorms(training.network, training.state.optimizer, training.stepper.gradients, logits)


def _exports(run: Run, folder: Path, corpus: Corpus) -> Exports | None:
    """Collective. Where checkpoint.export_every asks for them."""
    if run.checkpoint.export_every is None:
        return None
    form, tokenizer = Form(run.precision.storage, fp8=False, biases=False, shard_bytes=SHARD_BYTES), corpus.tokenizer
    origin = origin_of(folder)
    beside = companions(run.model, tokenizer, run.tokenizer, form, Sources(origin, ()))
    return Exports(folder / "exports", run.model, form, beside, origin, check_apart)


def _evaluator(
    run: Run, folder: Path, corpus: Corpus, training: Training, batches: Batches, report: Report
) -> TrainingEvaluator | SideEvaluator | None:
    options = run.evaluate
    if not options.wanted:
        return None
    if options.cluster is not None:
        mine = training.ranks.rank == 0
        jobs = SideJobs(options, folder.absolute(), run.root.absolute(), run.task.steps) if mine else None
        return SideEvaluator(jobs, report, options.wait_seconds)
    rows, length = Plan.read(folder).micro_batch, run.task.seq_len
    live = LiveEvaluation(options, training.network, batches, corpus, rows, length, origin_of(folder))
    return TrainingEvaluator(live, training.state.average, report, run.task.steps)


def _throughput(run: Run, planned: Plan, device: torch.device) -> Throughput:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Throughput(
        devices=planned.world * run.fault_tolerance.copies,
        flops_per_token=planned.flops_per_token,
        flops_per_token_causal=planned.flops_per_token_causal,
        peak=None if name is None else peak_flops(name, run.precision.arithmetic),
        predicted=planned.predicted_rate,
    )


def _farewell(
    task: Pretrain, run: Run, folder: Path, corpus: Corpus, training: Training, report: Report, finished: bool
) -> None:
    """Collective. What a person wants to see at the end: what the model writes, and the curve."""
    if not finished:
        report.say(f"stopped after step {training.state.step}; {_kept(run, folder, training.state.step)}")
        return
    if task.sample_prompt is not None:
        report.say(_sample(task, run, folder, corpus, training, task.sample_prompt))
    if training.ranks.rank == 0:
        try:
            report.say(f"curve: {plot(folder)}")
        except (OSError, FolderError) as error:  # every step is done: no picture is worth a failure
            report.say(f"warning: the curve cannot be drawn: {error}")


def _kept(run: Run, folder: Path, step: int) -> str:
    """What there is of a run that stopped after this step, as its folder has it: other groups may go on with theirs."""
    saved = complete(folder / "checkpoints")
    if saved and step_of(saved[-1]) == step:
        return "saved: the same command goes on from there"
    newest = f"; the newest checkpoint is of step {step_of(saved[-1])}" if saved else ""
    if run.fault_tolerance.on and run.checkpoint.every is not None:
        return f"this group has saved nothing; the others go on{newest}"
    return f"nothing was saved{': checkpoint.every=null' * (run.checkpoint.every is None)}{newest}"


def _sample(task: Pretrain, run: Run, folder: Path, corpus: Corpus, training: Training, prompt: str) -> str:
    """Collective. The prompt and what the model goes on with."""
    ids = corpus.tokenizer.prompt(prompt)
    if (room := run.model.max_seq_len - len(ids)) < 1:
        return f"sample: none, task.sample_prompt fills the {run.model.max_seq_len} tokens of model.max_seq_len"
    (written,) = generate(
        training.network,
        [ids],
        count=min(task.sample_tokens, room),
        rule=SamplingParams(task.sample_temperature),
        seed=training.state.seed,
        ends=ends_of(corpus.tokenizer, origin_of(folder)),
        batch=1,
    )
    return f"sample: {corpus.tokenizer.decode([*ids, *written])}"
