"""Where options come from (config file < environment < flag), what --print-config says, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.cli.main import cli, execute
from dist_moe.errors import UsageError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("DIST_MOE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory that looks like a checkpoint until its weights are wanted."""
    (tmp_path / "config.json").write_text("{}")
    advice = {"do_sample": True, "temperature": 0.6, "top_k": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    return str(tmp_path)


def printed_config(*arguments: str) -> dict[str, str]:
    """Lines of --print-config: by option name, the value with its origin."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        execute([*arguments, "--print-config"])
    lines = output.getvalue().splitlines()
    return dict(line.split(" = ", 1) for line in lines if not line.startswith("#"))


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.toml"
    config.write_text("max_tokens = 1\nseed = 1\nprefill-chunk = 1\nquiet = true\ntop_p = 0.5\n")
    monkeypatch.setenv("DIST_MOE_MAX_TOKENS", "2")
    monkeypatch.setenv("DIST_MOE_SEED", "2")
    monkeypatch.setenv("DIST_MOE_QUIET", "0")
    values = printed_config("run", "-m", model, "--config", str(config), "-n", "3")
    assert values["max_tokens"] == "3  # flag"
    assert values["seed"] == "2  # environment DIST_MOE_SEED"
    assert values["prefill_chunk"] == f"1  # config {config}"
    assert values["quiet"] == "false  # environment DIST_MOE_QUIET"
    assert values["top_p"] == f"0.5  # config {config}"
    assert values["kv"] == '"f16"  # default'


def test_the_model_gives_what_nobody_set(model: str) -> None:
    values = printed_config("run", "-m", model, "--top-k", "5")
    assert values["temperature"].startswith("0.6  # the model's generation_config.json")
    assert values["top_k"] == "5  # flag"


def test_what_is_printed_can_be_read_back(model: str, tmp_path: Path) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        execute(["run", "-m", model, "-p", 'a "b"\n\\c é', "--temperature", "0.25", "--ignore-eos", "--print-config"])
    copy = tmp_path / "copy.toml"
    copy.write_text(output.getvalue(), encoding="utf-8")
    again = printed_config("run", "--config", str(copy))
    assert json.loads(again["prompt"].split("  # ")[0]) == 'a "b"\n\\c é'
    assert again["temperature"] == f"0.25  # config {copy}"
    assert again["ignore_eos"] == f"true  # config {copy}"


def test_the_config_file_itself_can_come_from_the_environment(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'prompt-ids = [1, 2]\nmodel = "{model}"\n')
    monkeypatch.setenv("DIST_MOE_CONFIG", str(config))
    assert printed_config("run")["prompt_ids"] == f'"1,2"  # config {config}'


def test_one_file_serves_both_commands(model: str, tmp_path: Path) -> None:
    config = tmp_path / "both.toml"
    config.write_text('max_tokens = 7\nids = "1,2"\nkv = "f32"\n')
    assert printed_config("logits", "--config", str(config), "-o", "x.npy")["ids"] == f'"1,2"  # config {config}'
    assert printed_config("run", "-m", model, "--config", str(config))["max_tokens"] == f"7  # config {config}"


def test_a_prompt_of_a_stronger_place_replaces_another_kind(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_MOE_PROMPT", "from the environment")
    config = tmp_path / "run.toml"
    config.write_text('prompt_ids = "1,2"\n')
    values = printed_config("run", "-m", model, "--config", str(config), "--prompt-file", "story.txt")
    assert values["prompt_file"] == '"story.txt"  # flag'
    assert not {"prompt", "prompt_ids"} & set(values)


BAD_USE = [
    ("run", "there is nothing to continue: give --prompt TEXT"),
    ("run -p a --prompt-ids 1", "--prompt and --prompt-ids exclude each other"),
    ("run -p a --promt b", "No such option"),
    ("run -p a -n 0", "--max-tokens: expected a whole number from 1 to 2147483647, found '0'"),
    ("run -p a -n many", "--max-tokens: expected a whole number from 1 to 2147483647, found 'many'"),
    ("run -p a --temperature -1", "--temperature: expected a number from 0 to 100, found '-1'"),
    ("run -p a --temperature nan", "--temperature: expected a number from 0 to 100, found 'nan'"),
    ("run -p a --temperature inf", "--temperature: expected a number from 0 to 100, found 'inf'"),
    ("run -p a --top-p 1.5", "--top-p: expected a number from 0 to 1, found '1.5'"),
    ("run -p a --min-p -0.1", "--min-p: expected a number from 0 to 1, found '-0.1'"),
    ("run -p a --top-k -1", "--top-k: expected a whole number from 0 to 2147483647, found '-1'"),
    ("run -p a --seed -1", "--seed: expected a whole number from 0 to 9223372036854775807, found '-1'"),
    ("run -p a --ctx 0", "--ctx: expected a whole number from 1 to 2147483647, found '0'"),
    ("run -p a --threads 0", "--threads: expected a whole number from 1 to 1024, found '0'"),
    ("run -p a --prefill-chunk 0", "--prefill-chunk: expected a whole number from 1 to 65536, found '0'"),
    ("run -p a --kv f8", "--kv: expected f32, f16 or q8, found 'f8'"),
    ("run -p a --quant q5", "--quant: expected f32, bf16, q8 or q4, found 'q5'"),
    ("run -p a --experts some", "--experts: expected auto, whole, sliced or shared, found 'some'"),
    ("run -p a --check much", "--check: expected fast or full, found 'much'"),
    ("run -p a extra", "Got unexpected extra argument (extra)"),
    ("run -p", "Option '-p' requires an argument"),
    ("logits -o x.npy", "Missing option '--ids'"),
    ("logits --ids 1,2", "Missing option '-o' / '--output'"),
    ("rum", "No such command 'rum'"),
    ("--nothing", "No such option"),
    ("run -p a --config nowhere.toml", "--config: nowhere.toml cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("line", "message"), BAD_USE)
def test_bad_use_is_one_line(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        execute(line.split())
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_token = 3", "unknown option 'max_token'; known are"),
        ("config = 'x'", "unknown option 'config'"),
        ("max_tokens = ", "is not valid TOML"),
        ("max_tokens = " + "[" * 10**5, "is not valid TOML"),
        ("max_tokens = 3.5", "max_tokens: expected a whole number from 1 to 2147483647, found '3.5' (from config"),
        ("max-tokens = 0", "max-tokens: expected a whole number from 1"),
        ("max-tokens = 1\nmax_tokens = 2", "max_tokens is there twice"),
        ("quiet = 3", "quiet: expected true or false, found '3'"),
        ("[run]\nmax_tokens = 3", "run is a table: tables are not used"),
        ("[[run]]\nmax_tokens = 3", "run is a table: tables are not used"),
        ("model = ''", "model: expected the name of a file or directory, found an empty text"),
        ("max_tokens = {a = 1}", "max_tokens is a table: tables are not used"),
    ],
)
def test_a_bad_config_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "bad.toml"
    config.write_text(content)
    with pytest.raises(UsageError) as caught:
        execute(["run", "-p", "a", "--config", str(config)])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_bad_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_MOE_THREADS", "all")
    with pytest.raises(UsageError, match=r"--threads: .*, found 'all' \(from environment DIST_MOE_THREADS\)"):
        execute(["run", "-p", "a"])


def test_the_exit_code_of_bad_use_is_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_moe", "run", "-p", "a", "--kv", "f8"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


@pytest.mark.parametrize("name", ["run", "logits"])
def test_the_help_lists_every_option(name: str) -> None:
    command = cli.get_command(cli.make_context("dist-moe", [], resilient_parsing=True), name)
    assert command is not None
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        execute([name, "--help"])
    for parameter in command.params:
        for spelling in parameter.opts:
            assert spelling in output.getvalue()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["logits", "--help"], ["--version"], ["run"]])
def test_no_help_or_usage_error_starts_mpi(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom dist_moe.cli import main\n"
        "try:\n    main.execute(sys.argv[1:])\nexcept Exception: pass\n"
        "module = sys.modules.get('mpi4py.MPI')\n"
        "print('started' if module and module.Is_initialized() else 'imported' if module else 'absent')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    expected = "imported" if arguments == ["--version"] else "absent"
    assert done.stdout.splitlines()[-1] == expected


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, dist_moe; print(sorted({'mpi4py', 'numpy', 'tokenizers', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "environment",
    [{"PMI_RANK": "1", "PMI_SIZE": "2"}, {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}],
)
def test_only_the_first_rank_prints_the_help(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        execute(["run", "--help"])
    assert output.getvalue() == ""
