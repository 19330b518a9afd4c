"""Input that cannot work, and conversions that are cut short: named, and nothing left under the final name."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron.convert.describe import describe
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.hf_folder import read_hf_config
from tests.helpers.conversion import to_hf, to_megatron
from tests.helpers.models import save_tiny

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "hf", tied=False)


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def left(tmp_path: Path) -> set[str]:
    return {entry.name for entry in tmp_path.iterdir()} - {"hf", "megatron"}


def test_an_unknown_architecture(own: Path, tmp_path: Path) -> None:
    change_config(own, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(ConfigError, match=r"'gpt2' is not supported; supported: "):
        to_megatron(own, tmp_path / "out")
    change_config(own, model_type="no_such_model")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: .*no_such_model"):
        to_megatron(own, tmp_path / "out")
    assert not left(tmp_path)


def test_a_mesh_that_does_not_divide_the_model(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pp\(3\) does not divide the model's num_hidden_layers\(2\)"):
        to_megatron(source, tmp_path / "out", pp=3)


def test_tensors_that_are_missing_or_have_no_place_or_the_wrong_shape(own: Path, tmp_path: Path) -> None:
    file = own / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ConfigError, match=rf"lacks 1 tensors, such as {name}; it has 26, the model wants 27"):
        to_megatron(own, tmp_path / "out")
    save_file({**tensors, "model.layers.2.extra": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"has no place in the model for 1 tensors, such as model\.layers\.2\.extra"):
        to_megatron(own, tmp_path / "out")
    save_file({**tensors, name: tensors[name][1:].clone()}, file)
    with pytest.raises(ConfigError, match=rf"{name} has shape \[47, 32\], but config\.json makes it \[48, 32\]"):
        to_megatron(own, tmp_path / "out")
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(ConfigError, match=rf"{name} is torch\.float8_e4m3fn; only .* undo the quantisation first"):
        to_megatron(own, tmp_path / "out")
    assert not left(tmp_path)


def test_quantised_weights_are_refused_whether_they_are_declared_or_not(own: Path, tmp_path: Path) -> None:
    change_config(own, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match=r"quantised \(quantization_config in config\.json says gptq\)") as refused:
        to_megatron(own, tmp_path / "out")
    assert refused.value.exit_code == 2
    change_config(own, quantization_config=None)
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file({**load_file(own / "model.safetensors"), scale: torch.ones(1, 1)}, own / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"hf: the weights are quantised: 1 tensors hold .*, such as {scale}; take"):
        to_megatron(own, tmp_path / "out")
    assert not left(tmp_path)


def test_weights_in_another_format_are_named_with_the_way_out(own: Path, tmp_path: Path) -> None:
    (own / "model.safetensors").rename(own / "pytorch_model.bin")
    advice = rf"AutoModelForCausalLM\.from_pretrained\('{own}', dtype='auto'\)\.save_pretrained\('NEW_FOLDER'\)"
    said = rf"hf has no \*\.safetensors; its weights are in pytorch_model\.bin, which is not read\. .*{advice}"
    with pytest.raises(ConfigError, match=said):
        to_megatron(own, tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"model\.path .*{said}"):
        read_hf_config(own)
    assert re.search(said, *describe(own)["missing"])
    (own / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"hf has no \*\.safetensors, and no pytorch_model\.bin to make"):
        to_megatron(own, tmp_path / "out")
    assert not left(tmp_path)


def test_a_folder_that_is_there_already_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"out is there already"):
        to_megatron(source, tmp_path / "out")
    assert left(tmp_path) == {"out"}


def test_a_disk_without_room_is_refused_with_the_arithmetic(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dapo_megatron.convert import output

    monkeypatch.setattr(output, "_MARGIN", 10**18)
    with pytest.raises(
        ConfigError, match=r"out needs \d+\.\d kB and 1,000,000,000\.0 GB to spare, but only .* GB are free in"
    ):
        to_megatron(source, tmp_path / "new/out")
    assert not left(tmp_path)


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `limit` bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [50, 3000, 20_000, 70_000])
def test_a_disk_that_fills_up_leaves_nothing(limit: int, source: Path, tmp_path: Path) -> None:
    to_megatron(source, tmp_path / "megatron")
    with small_files(limit):
        for convert, given in ((to_megatron, source), (to_hf, tmp_path / "megatron")):
            with pytest.raises(DapoError, match=r"cannot write .*new/out: .*; nothing is left of it"):
                convert(given, tmp_path / "new/out")
    assert not left(tmp_path)


def test_a_folder_that_cannot_be_written_to(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    advice = "give an OUT in a folder that you may write to"
    with pytest.raises(ConfigError, match=rf"cannot make a folder in .*/file: Not a directory; {advice}"):
        to_megatron(source, tmp_path / "file/out")
    mkdir = Path.mkdir

    def closed(path: Path, *arguments: object, **named: object) -> None:
        if path.parent.name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *arguments, **named)  # type: ignore[arg-type]

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(Path, "mkdir", closed)
    with pytest.raises(ConfigError, match=rf"cannot make a folder in .*/closed: Permission denied; {advice}"):
        to_megatron(source, tmp_path / "closed/out")
    assert left(tmp_path) == {"file", "closed"}


def test_a_checkpoint_of_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    to_megatron(source, tmp_path / "megatron", tp=2)
    hf = tmp_path / "megatron/hf"
    change_config(hf, intermediate_size=64)
    with pytest.raises(
        ConfigError, match=r"linear_fc1\.weight has shape \[2, 96, 32\], but .* makes it \[2, 128, 32\]"
    ):
        to_hf(tmp_path / "megatron", tmp_path / "out")
    change_config(hf, intermediate_size=48, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"has 1 tensors that the model of .* has no place for, such as output_layer"):
        to_hf(tmp_path / "megatron", tmp_path / "out")
    change_config(hf, tie_word_embeddings=False, vocab_size=65)
    with pytest.raises(ConfigError, match=r"embedding\.word_embeddings\.weight has shape \[64, 32\]"):
        to_hf(tmp_path / "megatron", tmp_path / "out")
    (hf / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"brings no hf/config\.json.*--hf-files DIR"):
        to_hf(tmp_path / "megatron", tmp_path / "out")
    assert not left(tmp_path)


@pytest.mark.parametrize("fault", ["flipped", "short", "gone"])
def test_damage_in_the_middle_of_a_checkpoint_leaves_nothing(fault: str, source: Path, tmp_path: Path) -> None:
    to_megatron(source, tmp_path / "megatron", tp=2)
    file = tmp_path / "megatron/__1_0.distcp"
    data = load_file(source / "model.safetensors")["model.layers.1.mlp.down_proj.weight"][:, 24:].contiguous()
    held = file.read_bytes()
    at = held.index(data.numpy().tobytes()) + 5
    if fault == "flipped":
        file.write_bytes(held[:at] + bytes([held[at] ^ 8]) + held[at + 1 :])
    elif fault == "short":
        os.truncate(file, at)
    else:
        file.unlink()
    said = {"flipped": r"linear_fc2\.weight is damaged: .*checksum", "short": "cut short", "gone": "is missing"}[fault]
    with pytest.raises(ConfigError, match=rf"__1_0\.distcp.*{said}"):
        to_hf(tmp_path / "megatron", tmp_path / "out")
    assert not left(tmp_path)


SLOW = """
import sys, time
from dapo_megatron.convert import dist_writer, main
save = dist_writer.torch.save
def slow(*arguments):
    print("writing", flush=True)
    time.sleep(60)
    save(*arguments)
dist_writer.torch.save = slow
sys.exit(main.hf_to_megatron(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_in_the_middle_leaves_nothing(
    number: signal.Signals, code: int, source: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SLOW, str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "writing\n"
        assert {name.split("-")[0] for name in left(tmp_path)} == {"out.unfinished"}
        begun = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert time.monotonic() - begun < 30
    assert not left(tmp_path)
