"""Memory and time that converting a model takes, there and back, against a plain copy of the same files.

    python -m benchmarks.convert

The model is random and has the shape of Qwen2.5-1.5B in bfloat16: 3.09 GB in one file. `tools/hf_to_megatron.py` writes
it as --tp ranks would, `tools/megatron_to_hf.py` writes it back, and every tensor is compared with the first.

Memory is the most that is resident of the tool's process and all it starts, and may be 1.5 times the largest file of
the source. Seconds are those of the whole command, Python's start and the imports included, and once more without
those, which the same command takes for a model of two tiny layers. Where others use the machine, the seconds of CPU say
more than those by the clock. The copy writes the same files and, as the tools do, waits until they are on the disk; it
is made before and after, and the mean counts, because whoever first touches memory for the page cache pays for it.
Source files are read once before, so that all find them in the page cache as far as it reaches.

Exits with 1 where memory goes beyond the bound, or a tensor differs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from dapo_megatron.config import ParallelConfig
from dapo_megatron.convert.mapping import Model
from dapo_megatron.convert.side_config import read_config
from dapo_megatron.convert.tensors_file import Spec, TensorsFolder, TensorsWriter
from dapo_megatron.convert.verify import digest

BOUND = 1.5
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
TINY = {"hidden_size": 48, "intermediate_size": 32, "vocab_size": 50}
TOOLS = Path(__file__).parent.parent / "tools"


@dataclass(frozen=True)
class Cost:
    seconds: float
    cpu: float
    """Seconds, of user and system."""
    peak: int = 0
    """Bytes."""

    def __sub__(self, start: Cost) -> Cost:
        return Cost(self.seconds - start.seconds, self.cpu - start.cpu, self.peak)


def make_model(folder: Path, layers: int, **changes: int) -> None:
    """Write random weights in one file."""
    folder.mkdir()
    config = {**CONFIG, "num_hidden_layers": layers, **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = Model(read_config(folder), ParallelConfig()).hf_shapes
    generator = torch.Generator().manual_seed(1)
    specs = {name: Spec(torch.bfloat16, shape) for name, shape in shapes.items()}
    with TensorsWriter(folder, specs, 1 << 62) as writer:
        for name, spec in specs.items():
            writer.write(name, torch.randn(spec.shape, generator=generator, dtype=spec.dtype).mul_(0.02))


def run(tool: str, *arguments: str) -> Cost:
    """Run a tool, watching its processes' memory."""
    begun = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    process = subprocess.Popen([sys.executable, str(TOOLS / f"{tool}.py"), *arguments], env=environment)
    watched = psutil.Process(process.pid)
    peak = 0
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        peak = max(peak, sum(map(resident, (watched, *children(watched)))))
        time.sleep(0.01)
    _, status, used = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{tool} ended with {process.returncode}")
    # The system has seen the peak of the process itself, in KiB.
    peak = max(peak, used.ru_maxrss * 1024)
    return Cost(time.monotonic() - begun, used.ru_utime + used.ru_stime, peak)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:  # it has ended meanwhile
        return []


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def copy(source: Path, target: Path) -> Cost:
    begun, before = time.monotonic(), time.process_time()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as opened:
            os.fsync(opened.fileno())
    return Cost(time.monotonic() - begun, time.process_time() - before)


def read_once(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(memoryview(bytearray(1 << 24))):
                    pass


def both_ways(source: Path, folder: Path, tp: int) -> tuple[Cost, Cost]:
    read_once(source)
    there = run("hf_to_megatron", str(source), str(folder / "megatron"), "--tp", str(tp))
    back = run("megatron_to_hf", str(folder / "megatron"), str(folder / "back"))
    return there, back


def differing(source: Path, back: Path) -> list[str]:
    one, other = TensorsFolder(source), TensorsFolder(back)
    assert set(one.specs) == set(other.specs)
    return [name for name in one.specs if digest(one.read(name)) != digest(other.read(name))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="where 5 times the model's size is free; default: the system's")
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        (folder / "tiny").mkdir()
        make_model(folder / "tiny/source", 2, **TINY)
        starts = both_ways(folder / "tiny/source", folder / "tiny", arguments.tp)
        make_model(folder / "source", arguments.layers)
        largest = max(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
        read_once(folder / "source")
        plain = copy(folder / "source", folder / "copy")
        costs = both_ways(folder / "source", folder, arguments.tp)
        again = copy(folder / "source", folder / "copy again")
        plain = Cost((plain.seconds + again.seconds) / 2, (plain.cpu + again.cpu) / 2)
        differ = differing(folder / "source", folder / "back")
    size = largest / 1e9
    text = io.StringIO()
    print(f"{size:.2f} GB; a copy takes {plain.seconds / size:.2f} s/GB, {plain.cpu / size:.2f} of CPU", file=text)
    for what, cost, start in zip(("to Megatron", "to Hugging Face"), costs, starts, strict=True):
        work = cost - start
        print(
            f"{what}: {cost.seconds / size:.2f} s/GB = {cost.seconds / plain.seconds:.1f} copies, of CPU "
            f"{cost.cpu / size:.2f} = {cost.cpu / plain.cpu:.1f}\n"
            f"  without starting, {start.seconds:.1f} s and {start.cpu:.1f} of CPU: {work.seconds / size:.2f} = "
            f"{work.seconds / plain.seconds:.1f} copies, of CPU {work.cpu / size:.2f} = {work.cpu / plain.cpu:.1f}\n"
            f"  peak {cost.peak / 1e9:.2f} GB = {cost.peak / largest:.2f} files; tiny {start.peak / 1e9:.2f} GB",
            file=text,
        )
    print(f"{len(differ)} tensors differ after both", file=text)
    print(text.getvalue(), end="")
    return 1 if differ or max(cost.peak for cost in costs) > BOUND * largest else 0


if __name__ == "__main__":
    sys.exit(main())
