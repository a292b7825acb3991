"""Every combination of options that cannot work is refused on the command line, before anything starts, in one line.

What works, and trains like one device, is in docs/support_matrix.md.
"""

import sys
from unittest.mock import patch

import pytest
from hydra.core.global_hydra import GlobalHydra

from src.config.build import build
from src.config.composition.requests import asked
from src.config.groups import SECTIONS, options
from src.errors import UserError
from src.launch.start import checked, unfit
from src.planning.plan import plan
from src.run import Run
from tests.test_conf import composed, made

DEEPSEEK = "model=deepseek_v3_debug"
REFUSED = {
    "a sequence that tensor and context parallelism cannot share": (
        "parallel=cp2_tp2_fsdp2 task.seq_len=252 task.micro_batch=1",
        "task.seq_len=252 is no multiple of parallel.tensor=2 * 2 * parallel.context=2 (248 or 256 would do)",
    ),
    "a ring with a mask": (
        "parallel=cp2 parallel.rotate=alltoall model.attention=flex",
        "parallel.rotate=alltoall joins parts of causal attention, and model.attention=flex has a mask; "
        "pass parallel.rotate=allgather or model.attention=sdpa",
    ),
    "a ring with a mask, latent attention": (
        f"{DEEPSEEK} parallel=cp2 parallel.rotate=alltoall model.attention=flex",
        "parallel.rotate=alltoall joins parts of causal attention, and model.attention=flex has a mask; "
        "pass parallel.rotate=allgather or model.attention=sdpa",
    ),
    "experts that ranks cannot share": (
        f"{DEEPSEEK} parallel.expert=3 parallel.shard=3 task.global_batch=12",
        "parallel.expert=3 does not divide model.moe.num_experts=8 (1, 2, 4 or 8 do)",
    ),
    "experts cut otherwise than the rest": (
        f"{DEEPSEEK} parallel.expert=2 parallel.tensor=4 parallel.shard=2 parallel.expert_tensor=2",
        "parallel.expert_tensor=2 is neither 1 nor parallel.tensor=4; pass one of the two",
    ),
    "asynchronous products without a compiler": (
        "parallel=async_tp2_fsdp4 cluster.gpus=8 task.global_batch=16 compile=off",
        "parallel.async_tensor=true is the compiler's work; pass compile=blocks",
    ),
    "a memory budget without a compiler": (
        "recompute=budget",
        "recompute.mode=budget is kept by the compiler; pass compile=blocks, or recompute=selective",
    ),
    "a mask that the kernel does not know": (
        "model.mask=block_causal",
        "model.mask: block_causal is beyond attention=sdpa, which is causal only; attention=flex does it",
    ),
    "blocks that the kernel does not know": (
        "model.fixed_block=8",
        "model.fixed_block: 8 is beyond attention=sdpa, which has no blocks; attention=flex does it",
    ),
    "heads too narrow for the kernel": (
        "model.attention=flex model.head_dim=8 cluster.gpus=2",
        "model.attention=flex has no GPU kernel for heads of 8 elements, only from 16; pass wider or fewer heads, "
        "model.attention=sdpa, or cluster.gpus=0",
    ),
    "two stages for a schedule of one": (
        "parallel=pp2 parallel.layers_per_stage=2",
        "parallel.pipeline_schedule=1F1B takes one stage a rank, and parallel.layers_per_stage=2 makes 2; "
        "2 stages in all, or parallel.pipeline_schedule=Interleaved1F1B",
    ),
    "one stage for a schedule of several": (
        "parallel=pp2 parallel.pipeline_schedule=LoopedBFS parallel.layers_per_stage=4",
        "parallel.pipeline_schedule=LoopedBFS takes several stages a rank, and parallel.layers_per_stage=4 makes one; "
        "4 stages in all, or parallel.pipeline_schedule=1F1B",
    ),
    "a V that is none": (
        "parallel=pp2 parallel.pipeline_schedule=ZBVZeroBubble parallel.layers_per_stage=1",
        "parallel.pipeline_schedule=ZBVZeroBubble takes exactly two stages a rank, and parallel.layers_per_stage=1 "
        "makes 4; 4 stages in all",
    ),
    "too few micro-batches": (
        "parallel=pp2 task.global_batch=4 task.micro_batch=4",
        "parallel.pipeline_schedule=1F1B needs at least as many micro-batches as its 2 stages, and task.global_batch "
        "over data ranks and task.micro_batch makes 1; 2 would do, or parallel.pipeline_schedule=GPipe",
    ),
    "stages that leave layers out": (
        "parallel=pp2 'parallel.stages=[[tok_embeddings,layers.0],[norm,output]]'",
        "parallel.stages must name tok_embeddings, layers.0 to layers.5, norm and output once each, in this order; "
        "here: missing ['layers.1', 'layers.2', 'layers.3', 'layers.4', 'layers.5']",
    ),
    "a batch that ranks cannot share": (
        "task.global_batch=9",
        "task.global_batch=9 is no multiple of task.micro_batch=2 * 1 data ranks "
        "(8 or 10 would do; or task.micro_batch: 1, 3 or 9 do)",
    ),
    "a head that is the embedding, on two stages": (
        "parallel=pp2 model.tie_word_embeddings=true",
        "parallel.pipeline=2 would part model.tie_word_embeddings=true over two stages; pass parallel.pipeline=1",
    ),
    "key heads that ranks cannot share": (
        "parallel=tp2 model.n_kv_heads=1",
        "parallel.tensor=2 does not divide model.n_kv_heads=1 (1 does)",
    ),
    "a compiled block in halves": (
        "parallel=pp2 parallel.pipeline_schedule=DualPipeV compile=blocks task.micro_batch=1",
        "parallel.pipeline_schedule=DualPipeV asks for the gradients of inputs and of weights apart, and a compiled "
        "block gives them at once; pass compile.blocks=false or parallel.pipeline_schedule=Interleaved1F1B",
    ),
    "float8 on a CPU": (
        "precision=fp8",
        "precision.float8: the CPU has no float8 products; pass precision.float8.emulate=true, or precision=bf16",
    ),
    "float8 that gathers nothing": (
        "precision=fp8_gather precision.float8.emulate=true",
        "precision.float8.all_gather=true gathers nothing: parallel.shard=1; "
        "pass precision.float8.all_gather=false, or a layout with shards",
    ),
    "float8 of rows that is gathered": (
        "precision=fp8_gather precision.float8.recipe=rowwise",
        "precision.float8: all_gather=true with recipe=rowwise; only recipe=tensorwise gathers float8",
    ),
    "validation of nothing": (
        "task.validate_samples=0",
        "task.validate_samples: 0 is not at least 1 and at most 2147483647",
    ),
    "validation before the start": (
        "task.validate_every=-1",
        "task.validate_every: -1 is not at least 0 and at most 2147483647",
    ),
    "no log": ("task.log_every=0", "task.log_every: 0 is not at least 1 and at most 2147483647"),
    "a last checkpoint that the next save removes": ("checkpoint.keep=1", "checkpoint.keep: 1 is not at least 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, said = REFUSED[case]
    argv = ["cluster.gpus=0", "task.global_batch=8", "task.micro_batch=2", *given.replace("'", "").split()]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    GlobalHydra.instance().clear()
    with patch.object(sys, "argv", ["launch.py", *argv]), pytest.raises(UserError) as caught:
        checked(asked(argv).trees)
    assert caught.value.problems == (said,)


# What an option of another group says to every task while all else is as by default.
EXPERTS = {f"parallel={each}": "has no routed experts" for each in options("parallel") if "_ep" in each}
TO_ALL = EXPERTS | {
    "parallel=async_tp2_fsdp4": "parallel.async_tensor=true is the compiler's work; pass compile=blocks",
    "parallel=tp8_pp8_fsdp8": "cannot cut model.n_layers=6",
    "precision=fp8_experts": "this model has no routed experts; pass precision.float8.experts=false",
    "precision=fp8_gather": "gathers nothing: parallel.shard=1; pass precision.float8.all_gather=false",
    "recompute=budget": "is kept by the compiler; pass compile=blocks",
}
# And to some.
SMALL, NOWHERE = "use model.vocab_size=8192 or more", "tokenizer.path=x: no such file or folder"
ALONE = {
    f"fault_tolerance={each}": "this task trains no run that groups could share; pass fault_tolerance=none"
    for each in options("fault_tolerance")
    if each != "none"
}
STEPLESS = ALONE | {"compile=graph": "replays training steps, and this task takes none; pass compile=blocks"}
NO_FILES = "data.files=x: matches no file"
ONE_PROCESS = dict.fromkeys(
    (f"parallel={each}" for each in options("parallel") if each not in ("single", "auto")),
    "task=prepare is one process",
)
TO_TASK = {
    "bench": ALONE,
    "evaluate": STEPLESS | {"tokenizer=bpe": SMALL, "tokenizer=file": NOWHERE},
    "export": STEPLESS | {"tokenizer=bpe": SMALL, "tokenizer=file": NOWHERE},
    "generate": STEPLESS | {"tokenizer=bpe": SMALL, "tokenizer=file": NOWHERE},
    "merge": STEPLESS | {"tokenizer=bpe": SMALL, "tokenizer=file": NOWHERE},
    "prepare": STEPLESS | ONE_PROCESS | {"tokenizer=file": NOWHERE, "data=text": NO_FILES, "data=tokens": NO_FILES},
    "pretrain": {"tokenizer=bpe": SMALL, "tokenizer=file": NOWHERE},
    "verify": ALONE,
}
# model=auto stands for another, which the checkpoint names.
OFFERED = [f"{group}={each}" for group in SECTIONS if group != "task" for each in options(group) if each != "auto"]


@pytest.mark.parametrize("task", options("task"))
def test_each_task_takes_each_option_of_the_others_or_says_in_a_line_why_not(task: str) -> None:
    chosen = made(f"task={task}")
    if task == "generate":
        chosen = chosen.model_copy(update={"prompt": "a"})
    if task == "merge":
        chosen = chosen.model_copy(update={"sources": ("x", "x")})
    default, refused = build(composed()) | {"task": chosen}, {}
    for choice in OFFERED:
        run = Run.from_sections(default | {choice.partition("=")[0]: made(choice)})
        try:
            plan(run, None, None, unfit(run))
        except UserError as error:
            refused[choice] = error.problems
    expected = TO_ALL | TO_TASK[task]
    assert refused.keys() == expected.keys()
    for choice, lines in refused.items():
        assert any(expected[choice] in line for line in lines), lines
        assert not any("\n" in line for line in lines), lines
