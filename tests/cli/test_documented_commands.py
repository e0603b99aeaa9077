"""Every command line that the documentation shows is one that the program parses, and quoted sentences are its own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from dist_moe.checkpoint.model_toml import read_model_toml
from dist_moe.cli.main import PROGRAM, cli
from dist_moe.kernels.formats import WeightFormat
from dist_moe.store.layout import weight_files, weight_layout
from dist_moe.store.plan import StoreOptions, plan_store
from dist_moe.store.synthetic import synthetic_model

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "configs" / "README.md"]
COMMENTED = [
    *sorted((ROOT / "configs").rglob("*.toml")),
    *sorted((ROOT / "hostfiles").iterdir()),
    *sorted(path for path in (ROOT / "launch").rglob("*") if path.is_file()),
]
CLUSTER = ROOT / "docs" / "cluster.md"
_ENDS = {"|", ">", ">>", "2>", "&&", ";", "&", "||"}


def documented() -> Iterator[tuple[str, str]]:
    """(where, command line) of every line that names the program."""
    for path in PAGES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            shown = [line] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
            yield from ((f"{path.name}:{number}", text.strip()) for text in shown if is_command(text.strip()))
    for path in COMMENTED:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = re.match(r"#(?:  +|.*: )((?:mpirun|dist-moe|srun|launch/(?:cluster|local)\.sh)\b.*)", line)
            if found and is_command(found[1]):
                yield f"{path.name}:{number}", found[1]


def is_command(text: str) -> bool:
    """Whether it is a whole command, without places that are left open."""
    named = re.match(r"((mpirun|srun) .*|\S*cluster\.sh \S+ |[A-Z_]+=\S+ )*dist-moe [a-z]", text)
    script = re.match(r"(\S+=\S+ )?launch/(cluster|local)\.sh \S", text)
    return bool(named or script) and not re.search(r"[…\[<]|COMMAND|\.\.\.$", text)


def arguments(command: str) -> list[str]:
    """What the program is given; N, T and FILE are places."""
    words = shlex.split(command, comments=True)
    starts = [index for index, word in enumerate(words) if Path(word).name == PROGRAM]
    first = starts[-1] + 1 if starts else next(i for i, word in enumerate(words) if word.startswith("launch/")) + 2
    given = words[first:]
    stop = next((index for index, word in enumerate(given) if word in _ENDS), len(given))
    places = {"FILE": "configs/demo.toml", "N": "2", "T": "2"}
    return [places.get(word, word) for word in given[:stop]]


def parse(words: list[str]) -> None:
    """Let click read the words, without doing what they ask for."""
    context = click.Context(cli, info_name=PROGRAM)
    command = cli.get_command(context, words[0])
    # A group that stands for a command of its own, as verify does, has options instead.
    while isinstance(command, click.Group) and not (
        command.invoke_without_command and (len(words) == 1 or words[1].startswith("-"))
    ):
        words = words[1:]
        command = command.get_command(context, words[0])
    if command is None:
        raise click.UsageError(f"no such command: {words[0]}")
    command.make_context(words[0], words[1:], parent=context)


@pytest.mark.parametrize(("where", "command"), list(documented()))
def test_a_documented_command_is_parsed(where: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    try:
        parse(arguments(command))
    except click.exceptions.Exit:
        return  # --help and --version
    except click.MissingParameter:
        assert f"`{command}`" in "".join(page.read_text() for page in PAGES)  # a command that is only named
    except click.ClickException as error:
        pytest.fail(f"{where}: {command}: {error.format_message()}")


def test_the_documents_are_read() -> None:
    found = [where for where, _ in documented()]
    for name in ("README.md", "cluster.md", "laptop.toml", "mpijob.yaml", "local.sh", "mpich.example.txt"):
        assert any(where.startswith(name) for where in found), name


def test_files_that_the_page_on_clusters_names_are_there() -> None:
    for name in re.findall(r"\b((?:launch|configs|hostfiles)/[\w./-]*\w)", CLUSTER.read_text()):
        assert (ROOT / name).exists(), name


def test_sentences_of_the_table_are_the_programs() -> None:
    """Up to MPI's own; … stands for what differs."""
    texts = (path.read_text() for path in (ROOT / "dist_moe").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))
    source = re.sub(r"\{[^{}]*\}", "…", source.replace('{"s" if', "{"))
    table = CLUSTER.read_text().split("## 9.")[1].split("MPI's own")[0]
    rows = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(rows) >= 10
    for sentence in rows:
        for piece in sentence.split("…"):
            assert piece.strip(" :") in source, piece


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deployments").glob("*.toml")), ids=lambda path: path.name)
def test_a_deployments_bytes_are_the_stores(path: Path) -> None:
    text = path.read_text()
    found = re.search(r"([0-9.]+) GB of weights in (q4|q8)", text)
    nodes = re.search(r"--nodes ([0-9]+)", text)
    assert found is not None
    model = re.search(r"dist-moe shard (\S+)/", text)
    assert model is not None
    config = read_model_toml(ROOT / "configs" / f"{model[1].lower()}.toml")
    options = StoreOptions(format=WeightFormat.parse(found[2]), nodes=int(nodes[1]) if nodes else 1)
    manifest = plan_store(synthetic_model(config, path.stem, None), options)
    common, *shards = (weight_layout(manifest, name).file_bytes for name in weight_files(manifest))
    assert float(found[1]) == pytest.approx((common + max(shards)) / 1e9, abs=0.06)
