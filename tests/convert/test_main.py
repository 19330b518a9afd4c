"""The tools as programs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron import cli
from dapo_megatron.convert import main
from dapo_megatron.units import size
from tests.helpers.conversion import add_sides, assert_same_tensors, tensors, to_megatron
from tests.helpers.models import save_tiny

TOOLS = Path(__file__).parents[2] / "tools"


def command_of(tool: str, *arguments: str | Path) -> list[str]:
    program = [str(TOOLS / f"{tool}.py")] if (TOOLS / f"{tool}.py").exists() else ["-m", "dapo_megatron", tool]
    return [sys.executable, *program, *map(str, arguments)]


def run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = command_of(tool, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


def test_both_tools_convert_and_verify(tmp_path: Path) -> None:
    source = add_sides(save_tiny(tmp_path / "hf", layers=4, dtype=torch.bfloat16))
    there = run("hf_to_megatron", source, tmp_path / "m", "--tp", "2", "--pp", "2", "--vpp", "2", "--verify")
    back = run("megatron_to_hf", tmp_path / "m", tmp_path / "back", "--verify")
    for done, name in ((there, "m"), (back, "back")):
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        wrote, hashes, logits = done.stderr.splitlines()
        assert wrote.startswith(f"wrote {tmp_path / name} in ")
        assert hashes == "all 50 tensors are equal by SHA-256"
        assert logits.startswith("logits of 48 tokens agree with transformers' within ")
        assert float(logits.split("within ")[1].split()[0]) < 2e-6
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


def test_the_input_decides_the_direction(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf")
    there = run("convert", source, tmp_path / "m", "--tp", "2")
    assert there.returncode == 0, there.stderr
    none = "(tokenizer.json, tokenizer.model, vocab.json, vocab.txt, spiece.model), so the result has none"
    assert there.stderr.startswith(f"warning: {source} has no tokenizer {none}\n")
    back = run("convert", tmp_path / "m", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert back.stderr.startswith(f"warning: {tmp_path / 'm/hf'} has no tokenizer {none}\n")
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


def test_verify_says_what_was_cast(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "_prepare", lambda: None)
        assert main.hf_to_megatron([*map(str, (models / "hf", tmp_path / "m")), "--dtype", "float32", "--verify"]) == 0
    wrote, hashes, logits = capsys.readouterr().err.splitlines()
    assert wrote.startswith("wrote ")
    assert hashes == "all 50 tensors are equal after casting to float32, by SHA-256"
    assert logits == "logits are not compared: a cast changes them"


@pytest.mark.parametrize(
    "command", ["train", "convert", "inspect", "hf_to_megatron", "megatron_to_hf", "inspect_checkpoint"]
)
def test_help_has_exit_codes_and_where_to_read_on(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    call = getattr(main, command, None)
    with pytest.raises(SystemExit):
        call(["--help"]) if call else cli.main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "xit codes: 0 " in said
    assert "docs/checkpoints.md" in said
    assert " 130 " in said


def test_the_help_of_all_lists_what_a_closed_terminal_ends_with(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert " 129 the terminal was closed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("hf_to_megatron", ["m", "out"], "m is a Megatron checkpoint already; megatron_to_hf.py converts those"),
        ("megatron_to_hf", ["hf", "out"], "hf is a Hugging Face checkpoint already; hf_to_megatron.py converts those"),
        ("hf_to_megatron", ["hf", "out", "--tp", "0"], "--tp 0: at least 1 is needed"),
        ("hf_to_megatron", ["hf", "out", "--vpp", "2"], "--vpp 2 splits pipeline stages into chunks, but --pp is 1"),
        ("hf_to_megatron", ["hf", "hf"], "hf is there already"),
        ("hf_to_megatron", ["hf", "hf/out"], "hf/out lies in hf, which is only read; give an OUT elsewhere"),
        ("megatron_to_hf", ["m", "empty/../m/a/b"], "m/a/b lies in m, which is only read; give an OUT elsewhere"),
        ("hf_to_megatron", ["empty", "out"], "empty holds no checkpoint"),
        ("inspect_checkpoint", ["empty"], "empty holds no checkpoint"),
        ("megatron_to_hf", ["m", "out", "--hf-files", "nowhere"], "error: --hf-files nowhere does not exist\n"),
        ("megatron_to_hf", ["m", "out", "--hf-files", "m/common.pt"], "error: --hf-files m/common.pt is a file; give"),
    ],
)
def test_input_that_cannot_work_is_answered_with_2(
    tool: str,
    arguments: list[str],
    said: str,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setattr(main, "_prepare", lambda: None)
    assert getattr(main, tool)(arguments) == 2
    assert said in capsys.readouterr().err
    assert {entry.name for entry in models.iterdir()} == {"hf", "m", "empty"}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["inspect", "{}"], "PATH"),
        (["convert", "{}", "out"], "SOURCE"),
        (["convert", "m", "{}"], "OUT"),
        (["convert", "m", "out", "--hf-files={}"], "--hf-files"),
    ],
)
@pytest.mark.parametrize(
    ("path", "said"),
    [("", "it is empty, as a shell variable"), ("~/x", "the shell has not expanded ~ in '~/x', ")],
)
def test_a_path_that_the_shell_has_made_nothing_of_is_refused(
    command: list[str],
    name: str,
    path: str,
    said: str,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setattr(main, "_prepare", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main([word.format(path) for word in command])
    assert ended.value.code == 2
    assert f"error: argument {name}: {said}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    add_sides(save_tiny(folder / "hf", layers=4, dtype=torch.bfloat16))
    to_megatron(folder / "hf", folder / "m", tp=2, pp=2)
    (folder / "empty").mkdir()
    return folder


def swap_layers(folder: Path) -> None:
    file = folder / "model.safetensors"
    held = load_file(file)
    first, second = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    save_file({**held, first: held[second], second: held[first]}, file, {"format": "pt"})


def test_verify_names_tensors_that_differ(models: Path, tmp_path: Path) -> None:
    from dapo_megatron.convert.logits import compare_logits
    from dapo_megatron.convert.verify import VerifyError, compare_tensors

    other = tmp_path / "other"
    other.mkdir()
    for file in (models / "hf").glob("*.*"):
        if file.is_file():
            (other / file.name).write_bytes(file.read_bytes())
    assert (
        compare_tensors(models / "m", models / "m/hf", other, None, sys.stderr) == "all 50 tensors are equal by SHA-256"
    )
    swap_layers(other)
    names = r"model\.layers\.0\.mlp\.down_proj\.weight, model\.layers\.1\.mlp\.down_proj\.weight"
    with pytest.raises(VerifyError, match=rf"2 of 50 tensors of .*other differ from those of .*m, such as {names}"):
        compare_tensors(models / "m", models / "m/hf", other, None, sys.stderr)
    with pytest.raises(VerifyError, match=r"logits of .*m differ from those of transformers' model by"):
        compare_logits(models / "m", other)


def test_a_model_too_large_for_memory_has_no_logits_compared(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.convert import logits

    monkeypatch.setattr(logits, "_BASE", 10**18)
    said = logits.compare_logits(models / "m", models / "hf")
    assert said.startswith(
        "logits are not compared: in float32, 32,864 parameters x 4 bytes x 1.2 + 1,000,000,000.0 GB = "
    )


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    code = main.inspect_checkpoint([str(path), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_inspect_tells_what_a_hugging_face_checkpoint_holds(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = inspect(models / "hf", capsys)
    assert code == 0
    nbytes = (models / "hf/model.safetensors").stat().st_size
    assert found == {
        "kind": "huggingface",
        "path": str(models / "hf"),
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "declared_dtype": "bfloat16",
        "tied": True,
        "vocab_size": 50,
        "quantised": None,
        "tensors": 50,
        "parameters": 32_864,
        "bytes": 65_728,
        "dtypes": {"bfloat16": 32_864},
        "files": [{"name": "model.safetensors", "bytes": nbytes, "tensors": 50}],
        "side_files": [
            *("LICENSE", "additional_chat_templates/tools.jinja", "chat_template.jinja", "config.json"),
            *("generation_config.json", "modeling_own.py", "tokenizer.model", "tokenizer_config.json"),
        ],
        "notes": [],
        "missing": [],
    }


def test_inspect_tells_what_a_megatron_checkpoint_holds(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = inspect(models / "m", capsys)
    assert code == 0
    assert {name: found[name] for name in ("kind", "format", "step", "layers", "tensor_parallel", "missing")} == {
        "kind": "megatron",
        "format": "torch_dist",
        "step": None,
        "layers": 4,
        "tensor_parallel": 2,
        "missing": [],
    }
    # Rows that pad the vocabulary are no parameters.
    assert (found["parameters"], found["dtypes"]) == (32_864, {"bfloat16": 32_864})
    files = found["files"]
    assert isinstance(files, list)
    assert [file["name"] for file in files] == [f"__{rank}_0.distcp" for rank in range(4)]
    assert main.inspect_checkpoint([str(models / "m")]) == 0
    said = capsys.readouterr().out
    assert "Megatron (torch_dist), Qwen2ForCausalLM, tied" in said
    assert "4 layers, cut tensor-parallel in 2\n" in said
    assert "32,864 parameters in 9 tensors, 65.7 kB\n" in said
    assert "note: a tensor here is of all layers together, and may join several, so that Hugging" in said
    assert "step" not in said


def test_inspect_has_units_and_plurals(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.inspect_checkpoint([str(models / "hf")]) == 0
    assert "\n1 file with weights, 7" in capsys.readouterr().out
    assert [size(n) for n in (1, 999, 1500, 2_300_000, 459_200_000_000)] == [
        *("1 byte", "999 bytes", "1.5 kB", "2.3 MB", "459.2 GB"),
    ]


def test_the_folder_beside_the_weights_is_not_called_broken(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = inspect(models / "m/hf", capsys)
    beside = f"config and tokenizer only: the weights are in the checkpoint beside it, {models / 'm'}"
    assert (code, found["missing"], found["notes"]) == (0, [], [beside])
    assert main.inspect_checkpoint([str(models / "m/hf")]) == 0
    assert f"note: {beside}\n" in capsys.readouterr().out + "\n"


def test_an_architecture_that_cannot_be_converted_is_told(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((models / "hf/config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "model_type": "gpt2", "quantization_config": {"quant_method": "fp8"}})
    )
    (tmp_path / "model.safetensors").write_bytes((models / "hf/model.safetensors").read_bytes())
    code, found = inspect(tmp_path, capsys)
    assert code == 0
    assert found["notes"] == [
        "architecture gpt2 cannot be converted; qwen2, qwen3, qwen3_moe, llama, mistral can",
        "the weights are quantised (fp8), and such cannot be converted",
    ]


def test_inspect_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny(tmp_path / "hf")
    to_megatron(source, tmp_path / "m", tp=2)
    os.truncate(tmp_path / "m/__0_0.distcp", 100)
    (tmp_path / "m/__1_0.distcp").unlink()
    (tmp_path / "m/common.pt").unlink()
    assert main.inspect_checkpoint([str(tmp_path / "m")]) == 1
    assert "\n  __0_0.distcp  100 bytes\n  __1_0.distcp  missing\n" in capsys.readouterr().out
    code, found = inspect(tmp_path / "m", capsys)
    assert code == 1
    assert [str(said).split(":")[0] for said in found["missing"]] == [  # type: ignore[union-attr]
        "__0_0.distcp is cut short",
        "__1_0.distcp is missing",
        f"{tmp_path / 'm/common.pt'} is missing; the checkpoint is incomplete",
    ]
    names = list(tensors(source))
    places = {name: f"model-0000{1 + number % 3}-of-00003.safetensors" for number, name in enumerate(names)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    held = tensors(source)
    first = [name for name, file in places.items() if file.startswith("model-00001")]
    save_file({name: held[name] for name in first[1:]}, source / "model-00001-of-00003.safetensors")
    (source / "model-00002-of-00003.safetensors").write_bytes(bytes(30))
    code, found = inspect(source, capsys)
    assert code == 1
    one, two, three = found["missing"]  # type: ignore[misc]
    assert (
        one == f"model-00001-of-00003.safetensors lacks 1 tensors of model.safetensors.index.json, such as {first[0]}"
    )
    assert "model-00002-of-00003.safetensors is no whole safetensors file" in two
    assert three.startswith("model-00003-of-00003.safetensors is missing, and 8 tensors with it")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, ".metadata is missing; the checkpoint is incomplete"),
        (b"", ".metadata is damaged and cannot be read (Ran out of input)"),
        (b"j\xd5\xd4k\x0a.", ".metadata is damaged and cannot be read (Memo value not found at index 174838997)"),
        (b"N.", ".metadata is damaged and cannot be read (it is no index of a checkpoint)"),
    ],
)
def test_an_index_that_is_missing_or_damaged_is_no_missing_checkpoint(
    data: bytes | None, said: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "m", tmp_path / "m")
    (tmp_path / "m/.metadata").unlink() if data is None else (tmp_path / "m/.metadata").write_bytes(data)
    code, found = inspect(tmp_path / "m", capsys)
    assert (code, found["kind"], found["missing"]) == (1, "megatron", [said])
    assert main.inspect_checkpoint([str(tmp_path / "m")]) == 1
    assert f"MISSING: {said}\n" in capsys.readouterr().out


def test_a_hugging_face_index_that_is_damaged_is_told(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "hf", tmp_path / "hf")
    (tmp_path / "hf/model.safetensors.index.json").write_text("{")
    code, found = inspect(tmp_path / "hf", capsys)
    assert (code, found["tensors"]) == (1, 50)
    (said,) = found["missing"]  # type: ignore[misc]
    assert "model.safetensors.index.json is no index of a checkpoint: " in said


@pytest.mark.parametrize(("data", "said"), [(None, "is missing; the checkpoint is incomplete"), (b"PK", "is damaged")])
def test_what_megatron_could_not_load_is_not_converted(
    data: bytes | None, said: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "m", tmp_path / "m")
    file = tmp_path / "m/common.pt"
    file.unlink() if data is None else file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "_prepare", lambda: None)
        assert main.megatron_to_hf([str(tmp_path / "m"), str(tmp_path / "new/out")]) == 2
    assert f"error: {file} {said}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_name_that_standard_output_has_no_letters_for_is_spelled(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "hf", tmp_path / "\u6a21\u578b\x1b[2J")
    command, environment = command_of("inspect", folder), {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/\\u6a21\\u578b\\x1b[2J\nHugging Face, ")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_answer_that_cannot_be_written_is_a_line_and_1(options: list[str], models: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = command_of("inspect", models / "hf", *options)
        done = subprocess.run(command, stdout=full, stderr=-1, text=True, timeout=100, check=False)
    said = "dapo-megatron: error: cannot write to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


SWALLOWS = """
import time
try:
    print("importing", flush=True)
    time.sleep(60)
except KeyboardInterrupt as error:
    raise ImportError("as extension modules do") from error
"""


@pytest.mark.parametrize("library", ["pydantic", "torch"])
@pytest.mark.parametrize("tool", ["hf_to_megatron", "megatron_to_hf", "inspect_checkpoint", "convert", "inspect"])
def test_an_interrupt_during_imports_ends_with_130(tool: str, library: str, tmp_path: Path) -> None:
    (tmp_path / f"{library}.py").write_text(SWALLOWS)
    places = os.pathsep.join([str(tmp_path), str(TOOLS.parent)])
    command = command_of(tool, tmp_path, *([] if "inspect" in tool else [tmp_path / "out"]))
    environment = {**os.environ, "PYTHONPATH": places}
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout and process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "dapo-megatron: interrupted\n")
