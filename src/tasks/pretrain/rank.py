"""What each rank of task=pretrain does, in order."""

import gc
import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from src.checkpoint.folder import complete, step_of
from src.checkpoint.mirror import Mirror
from src.checkpoint.store import Store
from src.config.tree import read
from src.data.batches import Batches
from src.data.corpus import Corpus, read_recipe, reopen
from src.distributed.compile import forget_compilations
from src.distributed.mesh import Mesh
from src.distributed.process.rank_context import RankContext
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
from src.run import Run
from src.storage.patience import Patience
from src.tasks.evaluate.live import LiveEvaluation, TrainingEvaluator
from src.tasks.evaluate.side_job import SideEvaluator, SideJobs
from src.tasks.export.check_folder import check_apart
from src.tasks.generate.decoding import generate
from src.tasks.generate.sampling import SamplingParams
from src.tasks.pretrain.config import Pretrain
from src.tasks.pretrain.mirrored import Mirroring
from src.tasks.pretrain.stages import RunStage, begun, stages_of
from src.train.exports import SHARD_BYTES, Exports
from src.train.loop import Loop
from src.train.replicated.loop import ReplicatedLoop
from src.train.report import Report
from src.train.resume import resume
from src.train.setup import START_TIMEOUT_SECONDS, Training, build_training, join_ranks, make_deterministic
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
        ranks = join_ranks(run, folder)
        if task.deterministic:
            make_deterministic()
        groups, home = run.fault_tolerance.join(ranks), run.fault_tolerance.home(folder)
        life = _RankLife(task, run, home, ranks, groups, stop)
        status: Literal["done", "stopped", "failed"] = "failed"
        try:
            finished = life.run(startup)
            status = "done" if finished else "stopped"
        finally:
            life.close(status)
        ranks.leave()
        return finished


class _RankLife:
    """What goes on from one stage to the next; a run without stages has one."""

    def __init__(
        self, task: Pretrain, run: Run, home: Path, ranks: RankContext, groups: ReplicaGroups | None, stop: Stop
    ) -> None:
        self.task, self.whole, self.home, self.ranks, self.groups, self.stop = task, run, home, ranks, groups, stop
        self._stages = stages_of(run, home)
        self._meshes: list[Mesh] = []
        self._report: Report | None = None
        self._side: SideEvaluator | None = None
        self._mirroring: Mirroring | None = None

    def run(self, startup: Startup) -> bool:
        """Collective. True when every stage is at its end."""
        first = 0
        if self.whole.checkpoint.mirror is not None:
            self._mirroring = Mirroring(self.whole, self.home, self.stop, _writer(self.groups))
        if len(self._stages) > 1:
            newest = Store(self.home / "checkpoints", self.whole.checkpoint).newest()
            first = begun(self._stages, 0 if newest is None else step_of(newest) or 0)
        for stage in self._stages[first:]:
            finished = self._through(stage, startup)
            if not finished or stage.last:
                return finished
            self._make_room()
            startup = Startup(time.time())
        raise AssertionError("the last stage is the last")

    def close(self, status: Literal["done", "stopped", "failed"]) -> None:
        if self._report is not None:
            self._report.close(status)

    def _through(self, stage: RunStage, startup: Startup) -> bool:
        """Collective. Build what the stage needs and train to its end; all of that is gone when it returns."""
        task, run = stage.run.task, stage.run
        assert isinstance(task, Pretrain), "stages are those of this task"
        mesh = self._known_mesh(run)
        training = build_training(run, self.ranks, skips=task.skips, mesh=mesh, groups=self.groups)
        training.state.border = stage.border
        self._meshes += [training.mesh] if mesh is None else []
        startup.done("init")
        report = self._speak(stage)
        corpus = Patience()(lambda: reopen(read_recipe(self.home, stage.number), run.cache))
        side, mirror = self._beside(report), None if self._mirroring is None else self._mirroring.mirror
        loop = _loop(task, stage, self.home, corpus, training, startup, report, self.stop, self.groups, side, mirror)
        finished = loop.run()
        if finished and not stage.last:
            return True
        if self.groups is not None:
            self.groups.leave()
        _farewell(self.task, run, self.home, corpus, training, report, finished)
        if finished and isinstance(loop.evaluator, TrainingEvaluator | SideEvaluator):
            loop.evaluator.conclude()
        if self._mirroring is not None:
            self._mirroring.conclude(report)
        return finished

    def _speak(self, stage: RunStage) -> Report:
        """The report, opened with the first stage of this life."""
        if self._report is None:
            self._report = _report(self.task, self.whole, self.home, self.ranks, self.groups)
            if self._mirroring is not None:
                self._report.hear(partial(self._mirroring.tell, self._report))
                self._mirroring.tell(self._report)
        asked = self.whole.stages[stage.number - 1] if self.whole.stages else self.whole
        if stage.count > 1:
            self._report.enter_stage(stage.number, stage.samples_since)
            self._report.say(stage.opening())
        if stage.run.recompute != asked.recompute:
            self._report.say(f"recompute: {stage.run.recompute}, the cheapest that fits")
        return self._report

    def _beside(self, report: Report) -> SideEvaluator | None:
        """Commands that score checkpoints, if asked for; those of a stage may outlive it."""
        options, mine = self.whole.evaluate, self.ranks.rank == 0
        if self._side is None and options.wanted and options.cluster is not None:
            folder, steps = self.home.absolute(), self._stages[-1].plan.steps
            jobs = SideJobs(options, folder, self.whole.root.absolute(), steps) if mine else None
            self._side = SideEvaluator(jobs, report, options.wait_seconds)
        return self._side

    def _known_mesh(self, run: Run) -> Mesh | None:
        """That of an earlier stage of this layout. Collective. Its groups may wait again for what is compiled anew."""
        mesh = next((each for each in self._meshes if each.degrees == run.parallel), None)
        if self._meshes:
            self.ranks.set_timeout(START_TIMEOUT_SECONDS, [] if mesh is None else mesh.groups())
        return mesh

    def _make_room(self) -> None:
        """Give back what the stage before has held: its modules, their compiled code and cached memory."""
        gc.collect()
        forget_compilations()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


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
    stage: RunStage,
    folder: Path,
    corpus: Corpus,
    training: Training,
    startup: Startup,
    report: Report,
    stop: Stop,
    groups: ReplicaGroups | None,
    side: SideEvaluator | None,
    mirror: Mirror | None,
) -> Loop:
    """Collective. Everything that the steps need, with the state of the newest checkpoint."""
    run, planned, patience = stage.run, stage.plan, Patience()
    batches = Batches(
        corpus,
        run.data,
        seq_len=task.seq_len,
        seed=run.seed,
        rank=training.mesh.data_rank,
        ranks=training.mesh.data_ranks,
        micro_batch=planned.micro_batch,
        micro_batches=planned.micro_batches,
        read_before=stage.read_before,
        patience=patience,
    )
    store = Store(folder / "checkpoints", run.checkpoint, writer=_writer(groups), patience=patience, mirror=mirror)
    report.say(resume(training.state, store, batches, planned.steps, noted(folder)))
    startup.done("load")
    make = Loop if groups is None else partial(ReplicatedLoop, groups=groups)
    return make(
        training=training,
        plan=planned,
        cadence=task,
        optim=run.optim,
        schedule=stage.schedule,
        batches=batches,
        checkpoint=run.checkpoint,
        store=store,
        exports=_exports(run, folder, corpus),
        evaluator=side or _evaluator(stage, Plan.read(folder).steps, folder, corpus, training, batches, report),
        norms=_norms(training, run) if task.layer_norms else None,
        stragglers=_stragglers(run, folder, training, report),
        throughput=_throughput(run, planned, training.ranks.device),
        startup=startup,
        report=report,
        stop=stop,
        facts={"run": folder.name, "layout": planned.axes} | ({"stage": stage.number} if stage.count > 1 else {}),
        grace_seconds=run.cluster.grace_seconds,
    )


def _writer(groups: ReplicaGroups | None) -> str:
    """This one's name where several may save into one folder."""
    return "" if groups is None else f"group_{groups.group}"


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
    stage: RunStage,
    steps: int,
    folder: Path,
    corpus: Corpus,
    training: Training,
    batches: Batches,
    report: Report,
) -> TrainingEvaluator | None:
    """`steps`: of the whole run."""
    run, options = stage.run, stage.run.evaluate
    if not options.wanted:
        return None
    rows, length = stage.plan.micro_batch, run.task.seq_len
    live = LiveEvaluation(options, training.network, batches, corpus, rows, length, origin_of(folder))
    return TrainingEvaluator(live, training.state.average, report, steps)


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
