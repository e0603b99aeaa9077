"""What names a model: a store, a model to pack once into the cache directory, or the bundled demo."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import dist_moe
from dist_moe import files
from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.checkpoint.hub import is_hub_id
from dist_moe.checkpoint.qw3w_directory import is_qw3w_directory
from dist_moe.checkpoint.source import Source, file_format, open_source
from dist_moe.demo import demo_model_directory
from dist_moe.errors import PlaceError, UsageError
from dist_moe.kernels import ScaleChoice, WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.cached import note_use
from dist_moe.store.carry import DEFAULT_FORMAT, conversion_notes, default_format
from dist_moe.store.convert import Progress, convert
from dist_moe.store.manifest import FORMAT_VERSION, MANIFEST_NAME, NUMERICS_VERSION, PROGRESS_NAME, read_manifest
from dist_moe.store.plan import StoreOptions, source_name
from dist_moe.store.synthetic import SyntheticModel, write_synthetic
from dist_moe.store.verify import check_text_files
from dist_moe.store.writer import write_errors, write_text

# Four bits cost a model as small as the demo visible quality, and save nothing worth having.
DEMO_FORMAT = WeightFormat.Q8
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A model before any weight is read; `format` is None for a store, which has its own.

    A `synthetic` model has no weights to read: `directory` is where the store of its random ones is, or will be.
    """

    path: Path  # a store's or checkpoint's directory, or a GGUF or QW3W file
    format: WeightFormat | None
    synthetic: SyntheticModel | None = None
    in_cache: bool = True  # of a synthetic model: a damaged store is ours to replace

    def read_config(self, with_text: bool = True) -> ModelConfig:
        """The model's sizes; a store's small files are checked on the way, before one of them is parsed.

        Args:
            with_text: Whether a store's small files must be there.

        Raises:
            StoreError: The store's manifest is damaged or of another version, or its tokenizer's files are damaged.
            CheckpointError: The checkpoint's config.json or the GGUF file is damaged or of an unsupported model.
        """
        if self.synthetic is not None:
            return self.synthetic.config
        if self.format is None:
            manifest = read_manifest(self.path / MANIFEST_NAME)
            check_text_files(self.path, manifest, required=with_text)
            return manifest.config
        return open_source(self.path).config if file_format(self.path) else read_hf_config(self.path)

    def name(self) -> str:
        """What to call the model: as the store's manifest says, else by its directory or file.

        Raises:
            StoreError: The store's manifest is damaged.
        """
        if self.synthetic is not None:
            return self.synthetic.name
        return (
            source_name(self.path) if self.format is not None else read_manifest(self.path / MANIFEST_NAME).source_name
        )

    def text_directory(self) -> Path:
        """Where tokenizer and generation settings lie; those of a model in one file are written to the cache directory.

        Raises:
            CheckpointError: The GGUF file has a tokenizer of another kind.
            PlaceError: The cache directory cannot be written.
        """
        return _write_texts(self.path) if file_format(self.path) else self.path


def find_model(
    model: str | None, quant: str | None, option: str = "-m ", quant_option: str = "--quant "
) -> ModelSource:
    """Tell the forms of a model's name apart.

    Args:
        model: A path; None is the bundled demo model.
        quant: The format of the weights when a model is packed; None is what suits it.
        option: What errors write before the path.
        quant_option: What errors write before the format.

    Raises:
        UsageError: The path is none of them, or `quant` contradicts the store.
        StoreError: The store's manifest is damaged.
    """
    wanted = WeightFormat.parse(quant) if quant else None
    if model is None:
        return ModelSource(demo_model_directory(), DEMO_FORMAT if wanted is None else wanted)
    directory = Path(model)
    if files.is_file(directory / MANIFEST_NAME) and not is_qw3w_directory(directory):
        _require_format(directory, wanted, quant_option)
        return ModelSource(directory, None)
    if files.is_file(directory / PROGRESS_NAME):
        raise UsageError(
            f"{option}{directory}: this store is incomplete (dist-moe shard or reshard was interrupted or still runs): "
            "repeat its command, it continues where it stopped"
        )
    if file_format(directory):
        return ModelSource(directory, default_format(open_source(directory)) if wanted is None else wanted)
    if files.is_file(directory / "config.json"):
        return ModelSource(directory, DEFAULT_FORMAT if wanted is None else wanted)
    found = {None: "does not exist", "directory": "holds neither"}.get(
        files.kind_of(directory), "is a file that does not begin with GGUF or QW3W"
    )
    raise UsageError(
        f"{option}{directory}: expected a store (with {MANIFEST_NAME}), a GGUF file or a Hugging Face directory (with "
        f"config.json), but it {found}{_hub_advice(model)}"
    )


def _hub_advice(model: str) -> str:
    """What to do about a name that only the Hugging Face hub knows."""
    return f"; dist-moe shard {model} downloads and packs a model of the Hugging Face hub" if is_hub_id(model) else ""


def is_source(path: Path) -> bool:
    """Whether a path is what a store is packed from, one file or a Hugging Face directory, and not a store."""
    if file_format(path) is not None:
        return True
    if any(files.is_file(path / name) for name in (MANIFEST_NAME, PROGRESS_NAME)):
        return False
    return files.is_file(path / "config.json")


def cache_directory() -> Path:
    """Where packed models are kept: $DIST_MOE_CACHE, else $XDG_CACHE_HOME/dist-moe, else ~/.cache/dist-moe.

    Raises:
        UsageError: There is none of them.
    """
    if own := os.environ.get("DIST_MOE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "dist-moe"
    try:
        return Path.home() / ".cache" / "dist-moe"
    except RuntimeError as error:
        raise UsageError("there is no home directory to keep the packed model in: set DIST_MOE_CACHE") from error


def synthetic_source(model: SyntheticModel, fmt: WeightFormat, directory: str | None) -> ModelSource:
    """A model of random weights, kept in `directory` or, if that is None, in the cache directory.

    Raises:
        UsageError: There is no cache directory.
    """
    if directory is not None:
        return ModelSource(Path(directory), fmt, model, in_cache=False)
    return ModelSource(_cached(model.name, fmt.label, _versions(model.fingerprint())), fmt, model)


def pack(source: ModelSource, options: StoreOptions, progress: Progress) -> Path:
    """The store of a model that is none itself: the one of before, or a new one in the cache directory.

    Raises:
        DistMoeError: The model cannot be read, or the store not written.
    """
    try:
        if source.synthetic is not None:
            write_synthetic(source.synthetic, source.path, options, progress)
            if source.in_cache:
                note_use(source.path)
            return source.path
        model = open_source(source.path)
        directory = packed_directory(model, options)
        for line in conversion_notes(model, options.model_formats(model.config)):
            logger.info("%s: %s", source.path, line)
        convert(model, directory, options, progress)
        note_use(directory)
    except PlaceError as error:
        other = "set DIST_MOE_CACHE to another directory" if source.in_cache else "choose another --synthetic-dir"
        raise PlaceError(f"{error} or {other}") from error
    return directory


def packed_directory(model: Source, options: StoreOptions) -> Path:
    """Where the cache directory has, or will have, the store of a model."""
    formats = options.model_formats(model.config)
    key = f"{model.path.resolve()}\n{_versions(model.fingerprint())}"
    if formats.uniform_format is None:
        key += f"\n{json.dumps(formats.to_json())}"
    scales = options.scale_choice(formats)
    if scales != ScaleChoice.ABSMAX:
        key += f"\n{scales.label} {options.importance.fingerprint if options.importance else ''}"
    return _cached(source_name(model.path), formats.label, key)


def _write_texts(source: Path) -> Path:
    model = open_source(source)
    key = f"{source.resolve()}\n{model.fingerprint()}\n{dist_moe.__version__}"
    directory = _cached(source_name(source), "text", key)
    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for name, text in model.text_files().items():
        if not files.is_file(directory / name) or files.read_bytes(directory / name) != text:
            write_text(directory, name, text)
    note_use(directory)
    return directory


def _cached(name: str, what: str, key: str) -> Path:
    return cache_directory() / f"{name}-{what}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _versions(fingerprint: str) -> str:
    """What decides a packed model's bytes, apart from its format."""
    return f"{fingerprint}\n{FORMAT_VERSION} {NUMERICS_VERSION} {StoreOptions.group_size}"


def _require_format(store: Path, wanted: WeightFormat | None, option: str) -> None:
    if wanted is None:
        return
    found = read_manifest(store / MANIFEST_NAME).label
    if found != wanted.label:
        raise UsageError(
            f"{option}{wanted.label}: {store} is a store of {found} weights, which a run does not change: "
            f"leave {option.strip()} out, or give what it was made from"
        )
