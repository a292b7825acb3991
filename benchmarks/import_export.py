"""Seconds to import and export a checkpoint in Hugging Face layout, beyond those that its bytes alone take.

python -m benchmarks.import_export --folder /fast/disk --ranks 4                        Llama 3 8B, 16 GB, 4 GPUs
python -m benchmarks.import_export --folder /tmp/small --ranks 2 --model llama3_debug   a try without a GPU

Makes <folder>/made once, of random bfloat16 numbers. Each measurement begins with the files out of this host's page
cache, as far as the file system follows that advice; "bytes" is the time of the same ranks for plain reads or writes of
the same number of bytes, with as many threads. Two copies of the checkpoint must fit the disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from src.checkpoint.host_group import HostGroup
from src.distributed.mesh import Mesh
from src.distributed.process.rank_context import RankContext, device_type
from src.hugging_face.archive import INDEX
from src.hugging_face.read import THREADS
from src.hugging_face.save import Form, publish, save
from src.hugging_face.write import Files, held
from src.models.hugging_face import config_json, stored
from src.train.resume import adopt
from src.train.setup import build_uninitialized
from tests.train.runs import changed, make_run, section

PIECE = 16 * 2**20
SHARD_BYTES = 5 * 10**9
HOME = Path(__file__).resolve().parents[1]


def make(folder: Path, option: str) -> None:
    """A whole checkpoint of finite numbers; the same piece again and again."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = section("model", option)
    files = Files.plan(folder, stored(config), "bfloat16", fp8=False, shard_bytes=SHARD_BYTES)
    files.make()
    piece = memoryview((torch.randn(PIECE // 2) * 0.02).bfloat16().view(torch.uint8).numpy().data)
    for name, size in files.sizes.items():
        with (folder / name).open("r+b") as file:
            file.seek(len(files.headers[name]))
            for start in range(len(files.headers[name]), size, PIECE):
                file.write(piece[: size - start])
    if (index := files.index()) is not None:
        (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_json(config)))


def shares(folder: Path, rank: int, ranks: int) -> list[tuple[Path, int, int]]:
    """(file, start, bytes) of the pieces that a rank reads or writes plainly."""
    pieces = [
        (path, start, min(PIECE, path.stat().st_size - start))
        for path in sorted(folder.glob("*.safetensors"))
        for start in range(0, path.stat().st_size, PIECE)
    ]
    return pieces[rank::ranks]


def read_plainly(piece: tuple[Path, int, int]) -> None:
    path, start, size = piece
    with path.open("rb", buffering=0) as file:
        os.preadv(file.fileno(), [bytearray(size)], start)


def write_plainly(piece: tuple[Path, int, int]) -> None:
    path, start, size = piece
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), bytes(size), start)
        os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Ask the kernel to drop what it has of the files."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(act: Callable[[], object]) -> float:
    """Collective. Seconds until the last rank is done."""
    dist.barrier()
    began = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - began


def measure(folder: Path, option: str) -> dict[str, float]:
    """Collective. What each rank does."""
    world = int(os.environ["WORLD_SIZE"])
    joined = RankContext.join(device_type(), world, timeout_seconds=1800.0)
    degrees = changed(section("parallel", "single"), shard=world)
    precision = section("precision", "bf16_full")  # weights rest in bfloat16, so a GPU holds an 8B alone
    run = make_run(model=section("model", option), parallel=degrees, precision=precision)
    network, team = build_uninitialized(run, joined, Mesh(degrees, joined.device.type)), HostGroup()
    made, out = folder / "made", folder / "out"
    mine = shares(made, joined.rank, world)

    def plainly(act: Callable[[tuple[Path, int, int]], None], pieces: list[tuple[Path, int, int]]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(act, pieces))

    def export() -> None:
        form = Form("bfloat16", fp8=False, biases=True, shard_bytes=SHARD_BYTES)
        draft = save(team, out, held(network.tensors()), run.model, form, {}, whole, joined.device)
        team.on_rank_zero(lambda: publish(draft, out))

    team.on_rank_zero(lambda: forget(made))
    read_seconds = timed(lambda: plainly(read_plainly, mine))
    team.on_rank_zero(lambda: forget(made))
    import_seconds = timed(lambda: adopt(network, made))
    export_seconds = timed(export)
    team.on_rank_zero(lambda: shutil.copytree(made, folder / "plain", dirs_exist_ok=True, copy_function=sparse))
    write_seconds = timed(lambda: plainly(write_plainly, shares(folder / "plain", joined.rank, world)))
    team.on_rank_zero(lambda: [shutil.rmtree(folder / name) for name in ("plain", "out")])
    size = sum(path.stat().st_size for path in made.glob("*.safetensors"))
    joined.leave()
    return {
        "gigabytes": size / 1e9,
        "ranks": world,
        "import_seconds": import_seconds,
        "read_bytes_seconds": read_seconds,
        "import_beyond_bytes_seconds": import_seconds - read_seconds,
        "export_seconds": export_seconds,
        "write_bytes_seconds": write_seconds,
        "export_beyond_bytes_seconds": export_seconds - write_seconds,
    }


def sparse(source: str, target: str) -> str:
    """A file of the same size with nothing in it."""
    with Path(target).open("wb") as file:
        file.truncate(Path(source).stat().st_size)
    return target


def whole(tensor: Tensor) -> Tensor:
    """No float8 here: nothing is asked."""
    return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--model", default="llama3_8b")
    given = parser.parse_args()
    if "RANK" in os.environ:
        figures = measure(given.folder, given.model)
        if os.environ["RANK"] == "0":
            print(json.dumps(figures, indent=2))
        return
    make(given.folder / "made", given.model)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.ranks}"]
    subprocess.run([*launcher, "-m", "benchmarks.import_export", *sys.argv[1:]], cwd=HOME, check=True)


if __name__ == "__main__":
    main()
