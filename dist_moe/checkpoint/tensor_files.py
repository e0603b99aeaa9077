"""The safetensors files of a Hugging Face directory as one set of named tensors."""

from __future__ import annotations

from pathlib import Path

from dist_moe import files
from dist_moe.checkpoint.fields import read_json, shown
from dist_moe.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from dist_moe.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECOPY = "download the checkpoint again"


class TensorFiles:
    """All weight files of a directory, each memory-mapped; a name leads to its file.

    Like transformers, a directory that has both model.safetensors and an index is read from model.safetensors.

    Raises:
        CheckpointError: If files are missing, damaged or disagree with the index, or the weights are in another format.
    """

    def __init__(self, directory: Path) -> None:
        """Opens the single file, or every file that the index names."""
        self.directory = directory
        self.files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        if files.is_file(directory / SINGLE):
            self._open_single()
        elif files.is_file(directory / INDEX):
            self._open_indexed()
        else:
            raise CheckpointError(no_weights(directory))

    def _open_single(self) -> None:
        file = self.files[SINGLE] = SafetensorsFile(self.directory / SINGLE)
        self._file_of = dict.fromkeys(file.names(), file)

    def _open_indexed(self) -> None:
        index = self.directory / INDEX
        places = weight_map(index)
        missing = [name for name in sorted(set(places.values())) if not files.is_file(self.directory / name)]
        if missing:
            raise CheckpointError(
                f"{index}: names {len(set(places.values()))} weight files, but {len(missing)} of them"
                f" {'is' if len(missing) == 1 else 'are'} not in the directory, first {missing[0]}; {RECOPY}"
            )
        self.files = {name: SafetensorsFile(self.directory / name) for name in sorted(set(places.values()))}
        present = {(tensor, name) for name, file in self.files.items() for tensor in file.names()}
        for tensor, name in sorted(present.symmetric_difference(places.items())):
            if places.get(tensor) == name:
                raise CheckpointError(f"{index}: places {tensor} in {name}, but that file does not hold it; {RECOPY}")
            raise CheckpointError(f"{index}: does not place {tensor} in {name}, but that file holds it; {RECOPY}")
        self._file_of = {tensor: self.files[name] for tensor, name in places.items()}

    def __contains__(self, tensor: object) -> bool:
        """Whether a tensor is there."""
        return tensor in self._file_of

    def names(self) -> list[str]:
        """All tensors' names, ascending."""
        return sorted(self._file_of)

    def file(self, tensor: str) -> SafetensorsFile:
        """The file that holds a tensor."""
        return self._file_of[tensor]

    def entry(self, tensor: str) -> TensorEntry:
        """Dtype, shape and place of a tensor."""
        return self._file_of[tensor].entry(tensor)


def weight_map(index: Path) -> dict[str, str]:
    """The index's map of tensor to file, which must be plain names in the same directory."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: weight_map is {shown(places)}, expected tensor names with files; {RECOPY}")
    for tensor, name in places.items():
        if not isinstance(name, str) or not name or "\\" in name or Path(name).name != name:
            raise CheckpointError(
                f"{index}: places {tensor} in {shown(name)}, expected a file name without a directory; {RECOPY}"
            )
    return places


def no_weights(directory: Path) -> str:
    """One sentence on a directory without readable weights."""
    gguf = sorted(path.name for path in directory.glob("*.gguf"))
    if gguf:
        return f"{directory}: expected {SINGLE} or {INDEX}, found {gguf[0]}; give that file: {directory / gguf[0]}"
    other = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if other:
        return (
            f"{directory}: expected {SINGLE} or {INDEX}, found {other[0]}, which dist-moe does not read;"
            " convert it to safetensors (transformers: model.save_pretrained(directory))"
        )
    return f"{directory}: expected {SINGLE} or {INDEX}, found neither; {RECOPY}"
