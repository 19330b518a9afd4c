from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import yaml

from dapo_megatron import __version__, cli, config_file
from dapo_megatron.config import Config
from dapo_megatron.eval.report import Told
from dapo_megatron.preflight import Checked
from tests.helpers.checkpoint import values, write_checkpoint, write_prompts


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dapo_megatron", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_an_answer_that_cannot_be_written_is_a_line_and_1() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "dapo_megatron", "config", "--schema"]
        done = subprocess.run(command, stdout=full, stderr=-1, text=True, timeout=100, check=False)
    said = "dapo-megatron: error: cannot write to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_run_whose_output_goes_to_a_full_disk_is_refused_by_a_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dropped: list[int] = []
    monkeypatch.setattr(cli, "_check", lambda config, ranks: "all is well")
    monkeypatch.setattr(cli, "_launch", lambda *_: pytest.fail("nothing is started"))
    monkeypatch.setattr(cli, "_drop", dropped.append)
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert cli.main(["train", str(config)]) == 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert capsys.readouterr().err == (
        "dapo-megatron: error: cannot write to standard output: No space left on device\n"
    )
    assert dropped == [1] and not (config.parent / "runs").exists()


def test_letters_that_a_terminal_lacks_are_escapes(tmp_path: Path) -> None:
    (tmp_path / "回答.jsonl").write_text('{"uid": "a", "answer": "1", "responses": ["Answer: 1"]}')
    command = [sys.executable, "-m", "dapo_megatron", "eval", "--responses", "回答.jsonl"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, timeout=100, check=False)
    assert done.returncode == 0 and rb"\u56de\u7b54.jsonl" in done.stdout, done


def test_where_not_even_an_error_can_be_written_the_exit_code_tells(config: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "dapo_megatron", "train", config, "train.steps=many"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path)))
    return path


def nothing(folder: Path) -> None: ...


def empty_data(folder: Path) -> None:
    (folder / "train.jsonl").write_text("")


def broken_data(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n{"prompt": "2+\n')


def long_prompt(folder: Path) -> None:
    write_prompts(folder / "train.jsonl", "1+2=", "1+2+3+4+5=")


@pytest.mark.parametrize(
    ("overrides", "damage", "messages"),
    [
        (["train.step=5"], nothing, ["unknown key train.step", "did you mean train.steps?"]),
        (["train.steps=many"], nothing, ["train.steps = 'many'", "integer"]),
        (["model.path=nowhere"], nothing, ["model.path nowhere is not a folder"]),
        (
            ["launch.processes=3", "parallel.tp=2"],
            nothing,
            ["tp(2) x pp(1) x cp(1) = 2 does not divide world size 3"],
        ),
        (["rollout.responses=1"], nothing, ["rollout.responses = 1", "greater than or equal to 2"]),
        ([], long_prompt, ["train.jsonl:2 with 10 tokens", "data.max_prompt_tokens(8)"]),
        ([], empty_data, ["train.jsonl holds no rows"]),
        ([], broken_data, ["train.jsonl:2 is not JSON"]),
    ],
)
def test_input_that_cannot_work(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: Sequence[str],
    damage: Callable[[Path], None],
    messages: Sequence[str],
) -> None:
    damage(config.parent)
    code, said = cli.main(["train", str(config), *overrides]), capsys.readouterr()
    assert code == 2, said.err
    assert said.err.startswith("dapo-megatron: error: ")
    assert all(message in said.err for message in messages), said.err
    assert not said.out
    assert not (config.parent / "runs").exists()


def test_a_port_in_use(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run("train", config, f"engine.port={port}")
    assert done.returncode == 2
    assert done.stderr.startswith("dapo-megatron: error: ") and "Traceback" not in done.stderr
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert not (config.parent / "runs").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["tain"], ["train"], ["config"], ["train", "--schema", "x"], ["config", "--sch"]]
)
def test_usage_errors(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2


def test_config_prints_what_it_would_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(config), "optimizer.lr=1e-5"]) == 0
    printed = config.with_name("resolved.yaml")
    printed.write_text(capsys.readouterr().out)
    assert config_file.load(printed) == config_file.load(config, ["optimizer.lr=1e-5"])


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == config_file.schema()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"dapo-megatron {__version__}\n"


def test_it_starts_without_heavy_libraries(config: Path) -> None:
    code = (
        "import sys; from dapo_megatron import cli; cli.main(['config', sys.argv[1]])\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'rich') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("inherited", [{}, {"OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": "6", "KMP_BLOCKTIME": "5"}])
def test_the_config_decides_on_the_threads_of_the_ranks(
    config: Path, monkeypatch: pytest.MonkeyPatch, inherited: dict[str, str]
) -> None:
    seen: dict[str, str] = {}

    def launch(*_: object) -> int:
        seen.update(os.environ)
        return 0

    monkeypatch.setattr(cli, "_launch", launch)
    monkeypatch.setattr(os, "environ", inherited.copy())
    assert cli.main(["train", str(config), "launch.threads=3"]) == 0
    assert (seen["OMP_NUM_THREADS"], seen["MKL_NUM_THREADS"]) == ("3", "3")
    assert (seen["OMP_WAIT_POLICY"], seen["KMP_BLOCKTIME"]) == ("PASSIVE", inherited.get("KMP_BLOCKTIME", "0"))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("option", ["--resume", "run.existing=resume"])
def test_resume_begins_a_run_goes_on_with_it_and_tells_when_it_is_over(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    from dapo_megatron.obs.run_folder import open_run_folder

    launched: list[Sequence[str]] = []
    monkeypatch.setattr(cli, "_launch", lambda ranks, module: launched.append(module) or 0)
    monkeypatch.setattr(cli, "_set_threads", lambda threads: None)

    def train(steps: int) -> int:
        return cli.main(["train", str(config), option, f"train.steps={steps}"])

    assert train(3) == 0
    ((module, *arguments),) = launched
    assert (module, set(arguments)) == ("dapo_megatron.train", {str(config), "run.existing=resume", "train.steps=3"})
    with closing(open_run_folder(config_file.load(config, ["run.existing=resume", "train.steps=3"]))) as run:
        assert train(3) == 2 and len(launched) == 1
        assert "in use by process" in capsys.readouterr().err
        run.summarise({"steps": 3})
    assert train(3) == 0 and len(launched) == 1
    assert "is over: it has done 3 steps, and train.steps is 3; set train.steps to more" in capsys.readouterr().out
    assert cli.main(["train", str(config), option, "train.steps=4", "train.seed=1"]) == 2 and len(launched) == 1
    assert "train.seed: 0 -> 1" in capsys.readouterr().err
    assert train(4) == 0 and len(launched) == 2


def test_eval_prints_json_and_a_table_beside_it(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places: list[tuple[Path, Path]] = []

    def evaluate(config: Config, checked: Checked, folder: Path, say: Callable[[str], None]) -> Told:
        assert [prompt.text for prompt in checked.held_out["held-out"]] == ["1+1="]
        places.append((config.model.path, folder))
        return Told({"sets": {"held-out": 0.5}}, "held-out \x1b[2J 50%")

    monkeypatch.setattr("dapo_megatron.eval_command.evaluate_model", evaluate)
    (config.parent / "train.jsonl").unlink()
    assert cli.main(["eval", str(config)]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out, parse_constant=refuse) == {"sets": {"held-out": 0.5}}
    assert "held-out \\x1b[2J 50%" in shown.err
    other = write_checkpoint(config.parent / "run's/hf")
    assert cli.main(["eval", str(config), "--model", str(other.parent), "--out", "x", "parallel.tp=8"]) == 0
    runs = config.parent / "runs/test-eval"
    assert places == [(config.parent / "model", runs / "model"), (other, Path("x"))]


def test_the_log_of_an_engine_that_fails_in_an_evaluation_is_kept(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", r"print('out of \x1b[2J memory'); raise SystemExit(3)"]
    monkeypatch.setattr("dapo_megatron.rollout.adapters.vllm.Adapter.command", lambda *_: command)
    assert cli.main(["eval", str(config)]) == 1
    errors = capsys.readouterr().err
    assert "engine 0 ended with exit status 3" in errors
    assert "\x1b" not in errors
    (place,) = re.findall(r"go to (\S+), with the engines' logs", errors)
    assert (Path(place) / "engine0.log").read_text() == "out of \x1b[2J memory\n"


def test_eval_without_data_is_refused(config: Path) -> None:
    done = run("eval", config, "eval.data=null")
    assert done.returncode == 2
    assert "eval.data is null" in done.stderr


def launch(folder: Path, code: str, ranks: int = 1, stdin: int | None = None) -> subprocess.Popen[str]:
    """`cli._launch` on ranks that run `code`."""
    (folder / "job.py").write_text(code)
    program = f"import sys; from dapo_megatron import cli; sys.exit(cli._launch({ranks}, ['job']))"
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{Path.cwd()}"}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.multiproc
@pytest.mark.parametrize("code", [0, 130, *(pytest.param(code, marks=pytest.mark.long) for code in (1, 2))])
def test_the_exit_code_of_the_ranks_is_ours_and_torchrun_adds_nothing(tmp_path: Path, code: int) -> None:
    job = launch(tmp_path, f"import sys; print('said', file=sys.stderr); sys.exit({code})")
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (code, "said\n")


@pytest.mark.multiproc
def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    code = "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    job = launch(tmp_path, code, ranks=2)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "rank 1 was ended by SIGKILL" in errors


@pytest.mark.multiproc
def test_an_interrupt_reaches_the_ranks(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "try:\n print('ready', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n print('told'); sys.exit(130)"
    )
    job = launch(tmp_path, code)
    assert job.stdout
    assert job.stdout.readline() == "ready\n"
    ranks = psutil.Process(job.pid).children(recursive=True)
    started = time.monotonic()
    job.send_signal(2)
    output, errors = job.communicate(timeout=60)
    assert (job.returncode, output, errors) == (130, "told\n", "")
    assert time.monotonic() - started < 20
    assert not [rank for rank in ranks if rank.is_running()]


@pytest.mark.multiproc
@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "background"])
def test_a_signal_that_we_were_started_to_ignore_is_ignored(tmp_path: Path, ignored: signal.Signals) -> None:
    """The rank outlives the signal as well, and goes on to its own end."""
    code = "import sys\nprint('ready', flush=True)\nsys.exit(len(sys.stdin.readline()))"
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        job = launch(tmp_path, code, stdin=subprocess.PIPE)
    finally:
        signal.signal(ignored, before)
    assert job.stdout
    assert job.stdout.readline() == "ready\n"
    for process in (psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)):
        process.send_signal(ignored)
    time.sleep(0.5)
    _, errors = job.communicate("12\n", timeout=60)
    assert (job.returncode, errors) == (3, "")


def check_reduction(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dapo_megatron", "check-reduction", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "dp8"], "'dp8' is not one of yours, 1, dp2, "),
        (["--layouts", "dp2xtp2", "--processes", "2"], "dp2xtp2 wants 4 ranks, but --processes allows 2"),
        (["--processes", "0"], "at least one process is needed"),
        (["launch.processes=2", "parallel.tp=3"], "tp(3) x pp(1) x cp(1) = 3 does not divide world size 2"),
    ],
)
def test_a_check_that_cannot_be_made_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str
) -> None:
    code, said = cli.main(["check-reduction", str(config), *arguments]), capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert message in said.err


def test_a_check_of_a_broken_model_is_refused(config: Path) -> None:
    (config.parent / "model" / "config.json").write_text("{")
    done = run("check-reduction", config)
    assert done.returncode == 2
    assert "cannot read" in done.stderr and "config.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.multiproc
@pytest.mark.slow
def test_a_check_whose_verdict_nobody_read_has_not_passed(config: Path) -> None:
    job = check_reduction(config, "--layouts", "1")
    assert job.stdout and job.stderr
    job.stdout.readline()
    job.stdout.close()
    errors = job.stderr.read()
    assert (job.wait(60), errors) == (141, "")


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "dapo-megatron: interrupted\n"),
        pytest.param(signal.SIGTERM, 143, "", marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 129, "", marks=pytest.mark.long),
    ],
)
def test_a_check_that_is_ended_leaves_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, said: str
) -> None:
    folder = config.parent / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    job = check_reduction(config, "--layouts", "1,dp2", "--verbose")
    assert job.stdout
    next(line for line in job.stdout if line.startswith("1 "))
    ranks = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(number)
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (code, said)
    _, left = psutil.wait_procs(ranks, timeout=10)
    assert not [rank for rank in left if rank.status() != psutil.STATUS_ZOMBIE]
    assert not list(folder.glob("dapo-megatron-check-*"))
