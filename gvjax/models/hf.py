"""Checkpoints of Hugging Face: read straight onto the devices, written so that `transformers` and vLLM load them.

Read are a directory with config.json and model.safetensors (one file, or several under an index), a GGUF file, or an id
on the hub. Pickles are refused and nothing in a checkpoint is ever run. Every tensor must be there, have its shape, and
have a place in the model: a checkpoint that half fits is an error that names what does not.

    config, params = hf.load_policy("path/to/SmolLM2-135M")
    ...
    hf.save_policy("out", config, params, source="path/to/SmolLM2-135M")
"""

import contextlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Sharding, SingleDeviceSharding

from gvjax.models import families, heads, transformer
from gvjax.models.config import ModelConfig
from gvjax.models.families import Family, Json, Source
from gvjax.models.weights import (
    BUFFERS,
    Gguf,
    Safetensors,
    Weights,
    save_gguf_tokenizer,
)
from gvjax.types import Params

Dtype = Literal["float32", "bfloat16"]
Shardings = Callable[[Params], Params]
"""From a tree of shapes to one of shardings: `functools.partial(sharding.shardings, mesh, rules=PARTITION_RULES)`."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_CARRIED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
)
"""What an export takes over from its source's config.json; our config does not know it."""
_SCORE = Source("score.weight")


def load_policy(
    path_or_id: str | os.PathLike[str],
    *,
    shardings: Shardings | None = None,
    dtype: Dtype = "float32",
) -> tuple[ModelConfig, Params]:
    """A causal language model.

    Files are memory-mapped, and each device is handed the slices it will hold, one array at a time.

    Args:
      path_or_id: a directory, a .gguf file, or an id such as "HuggingFaceTB/SmolLM2-135M", which needs a network.
      shardings: where the arrays go; None is the first device.
      dtype: what the model computes in. Its parameters are float32 whatever the file holds.

    Returns:
      The config and the parameters, laid out as `transformer.init` lays them out.

    Raises:
      ValueError: the architecture or one of its settings is not supported; a tensor is missing, left over, or of
        another shape; the weights are pickled.
    """
    path = resolve(path_or_id)
    config = families.model_config(read_config(path), dtype=dtype)
    shapes = transformer.init_shapes(config)
    return config, _load(path, config, shapes, shardings)


def load_reward_model(
    path_or_id: str | os.PathLike[str],
    *,
    shardings: Shardings | None = None,
    dtype: Dtype = "float32",
) -> tuple[ModelConfig, Params]:
    """A `ForSequenceClassification` of one label, as parameters of `heads`: score it with `pooling="last"`.

    Its head has no bias; ours is 0. Arguments and errors as for `load_policy`; shardings by `heads.PARTITION_RULES`.
    """
    path = resolve(path_or_id)
    config = families.model_config(read_config(path), dtype=dtype)
    shapes = jax.eval_shape(lambda: heads.init(jax.random.key(0), config))
    return config, _load(path, config, shapes, shardings)


def save_policy(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    source: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    token_ids: Mapping[str, Json] | None = None,
    dtype: Dtype = "float32",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that `transformers` loads as a CausalLM.

    Args:
      directory: made if absent; must hold no weights.
      config: what `params` are of; its family is found from its switches.
      params: as `transformer.init` lays them out. Merge adapters into them first: `lora.merge`.
      source: what the model was made from: its tokenizer, token ids and context length are taken over.
      tokenizer: where another tokenizer's files are, which then come along in place of the source's.
      token_ids: `bos_token_id`, `eos_token_id` (an id or a list) or `pad_token_id` where the source's are not the model's;
        config.json and generation_config.json say these.
      dtype: of the tensors written.
      shard_bytes: above this size weights are written as several files.

    Raises:
      ValueError: no family can express the config, the parameters are not its, or the directory holds weights.
    """
    written = _exported_config(config, source, token_ids, dtype, head="CausalLM")
    _save(
        directory,
        config,
        params,
        transformer.init_shapes(config),
        written,
        tokenizer or source,
        dtype,
        shard_bytes,
    )
    if source is not None:
        _copy_files(resolve(source), Path(directory), ("generation_config.json",))
    if token_ids:
        _update_json(Path(directory) / "generation_config.json", token_ids)


def save_reward_model(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    pooling: heads.Pooling,
    pad_id: int,
    drop_bias: bool = False,
    source: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    token_ids: Mapping[str, Json] | None = None,
    dtype: Dtype = "float32",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that `transformers` loads as a ForSequenceClassification of one label.

    `transformers` scores the last token that is not `pad_id`, which is our pooling "last" as long as no completion ends
    with that id; an empty completion, which we give 0, it scores like any other text.

    Args:
      directory, config, source, tokenizer, token_ids, dtype, shard_bytes: as for `save_policy`; there is no
        generation_config.json.
      params: as `heads.init` lays them out.
      pooling: what the model was trained with; only "last" can be expressed there.
      pad_id: written as the padding id, and made the tokenizer's padding token; never an EOS.
      drop_bias: export without the head's bias, which `transformers` has no place for. All rewards move by it, so that
        comparisons stay as they are.

    Raises:
      ValueError: as for `save_policy`; or pooling, padding id or bias would change the answers, or the tokenizer has no
        such padding id.
    """
    if pooling != "last":
        raise ValueError(
            f"pooling is {pooling!r}, but sequence classifiers of transformers read the last token; train the reward "
            "model with pooling 'last' to export it"
        )
    if not 0 <= pad_id < config.vocab_size:
        raise ValueError(
            f"pad_id is {pad_id}; it must be a token of the vocabulary of {config.vocab_size}"
        )
    bias = float(np.asarray(params["head"]["bias"])[0])
    if bias and not drop_bias:
        raise ValueError(
            f"the head has the bias {bias:g}, which a sequence classifier of transformers has no place for; with "
            "drop_bias=True the export's rewards are lower by it"
        )
    written = _exported_config(
        config, source, token_ids, dtype, head="SequenceClassification"
    )
    ends = written["eos_token_id"]
    if pad_id in (ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"pad_id {pad_id} is the EOS: transformers would skip the EOS as padding and score the token before it; "
            "take an id that ends no completion, such as that of an unused special token"
        )
    written["pad_token_id"] = pad_id
    words = tokenizer or source
    places = [Path(directory)] if words is None else [resolve(words), Path(directory)]
    pad_token = _text_of(pad_id, places)
    shapes = jax.eval_shape(lambda: heads.init(jax.random.key(0), config))
    _save(directory, config, params, shapes, written, words, dtype, shard_bytes)
    if pad_token is not None:
        _set_padding_token(Path(directory), pad_token)


def resolve(path_or_id: str | os.PathLike[str]) -> Path:
    """A local directory or .gguf file as it is; anything else is fetched from the hub, weights and tokenizer only."""
    path = Path(path_or_id)
    if path.exists():
        return path
    name = str(path_or_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"{name} does not exist; give a directory, a .gguf file, or an id on the hub of the form owner/name"
        )
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise ValueError(
            f"{name} is no local path, and an id on the hub needs the package huggingface_hub; install it, or download "
            "the checkpoint and give its directory"
        ) from None
    patterns = ["model*.safetensors", "model.safetensors.index.json", "config.json"]
    patterns += ["generation_config.json", *TOKENIZER_FILES]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ValueError(
            f"{name} is no local path and could not be had from the hub: {error}"
        ) from error


@contextlib.contextmanager
def tokenizer_files(path_or_id: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory with the files of a tokenizer: a temporary one for a .gguf file, which holds it in another form.

    Args:
      path_or_id: as for `resolve`.
    """
    path = resolve(path_or_id)
    if path.suffix != ".gguf":
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        save_gguf_tokenizer(path, Path(scratch))
        yield Path(scratch)


def read_config(path: Path) -> dict[str, Json]:
    """The parsed config.json of a directory, or the same made from the keys of a GGUF file."""
    if path.suffix == ".gguf":
        return Gguf(path).config
    file = path / "config.json"
    if not file.exists():
        raise ValueError(f"{path} holds no config.json; it is no model of transformers")
    return json.loads(file.read_text())


# Reading.


class _Leaf(NamedTuple):
    """One of our arrays and where it comes from; without a source it is zeros."""

    path: str
    shape: tuple[int, ...]
    source: Source | None

    @property
    def stacked(self) -> bool:
        return self.source is not None and "{layer}" in self.source.name

    @property
    def is_kernel(self) -> bool:
        return self.path.endswith("kernel")

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors that it is read from."""
        if self.source is None:
            return
        shape = self.shape[1:] if self.stacked else self.shape
        shape = shape[::-1] if self.is_kernel else shape
        if self.source.part is not None:
            shape = (3 * shape[0], *shape[1:])
        for layer in range(self.shape[0] if self.stacked else 1):
            yield self.source.name.format(layer=layer), shape


def _leaves(family: Family, shapes: Params) -> list[_Leaf]:
    found = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        path = path.removeprefix("trunk/")
        if path.startswith("head/"):
            source = _SCORE if path == "head/kernel" else None
        else:
            source = families.source(family, path)
        found.append(_Leaf(path, leaf.shape, source))
    return found


def _load(
    path: Path, config: ModelConfig, shapes: Params, shardings: Shardings | None
) -> Params:
    weights: Weights = Gguf(path) if path.suffix == ".gguf" else Safetensors(path)
    leaves = _leaves(families.family_of(read_config(path)), shapes)
    _check(path, config, leaves, weights)
    if shardings is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        places = [here] * len(leaves)
    else:
        places = jax.tree.leaves(shardings(shapes))
    arrays = [
        _placed(weights, config, leaf, place)
        for leaf, place in zip(leaves, places, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _check(
    path: Path, config: ModelConfig, leaves: list[_Leaf], weights: Weights
) -> None:
    wanted = dict(tensor for leaf in leaves for tensor in leaf.tensors())
    missing = sorted(set(wanted) - set(weights.shapes))
    extra = sorted(
        name for name in set(weights.shapes) - set(wanted) if not name.endswith(BUFFERS)
    )
    tied = next((n for n in extra if n in ("lm_head.weight", "embed_out.weight")), None)
    if tied is not None and config.tied_embeddings and "score.weight" not in wanted:
        # Some files hold the tied matrix twice. Where the copies differ, somebody trained them apart.
        embedding = next(leaf for leaf in leaves if leaf.path == "embed/embedding")
        ((name, shape),) = embedding.tensors()
        every = (slice(0, shape[0]), slice(0, shape[1]))
        if weights.shapes[tied] != shape or not np.array_equal(
            weights.read(name, every), weights.read(tied, every)
        ):
            raise ValueError(
                f"{path} says that embeddings are tied, but {tied} differs from {name}; set tie_word_embeddings to "
                "false in config.json if both are meant"
            )
        extra.remove(tied)
    misshapen = [
        f"{name} has shape {weights.shapes[name]} for {shape}"
        for name, shape in wanted.items()
        if name in weights.shapes and weights.shapes[name] != shape
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}{' and more' * (len(names) > 5)}"
        for what, names in (
            (f"{len(missing)} tensors are missing", missing),
            (f"{len(extra)} have no place in the model", extra),
            (f"{len(misshapen)} do not fit", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{path} does not hold the model that its config describes; {'; '.join(problems)}"
        )


def _placed(
    weights: Weights, config: ModelConfig, leaf: _Leaf, place: Sharding
) -> jax.Array:
    pieces: dict[str, np.ndarray] = {}

    def piece(index: Any) -> np.ndarray:
        # Devices that hold the same slice share one copy of it on the host.
        key = str(index)
        if key not in pieces:
            pieces[key] = _piece(weights, config, leaf, index)
        return pieces[key]

    array = jax.make_array_from_callback(leaf.shape, place, piece, dtype=jnp.float32)
    # On a CPU the array would share numpy's memory, and that cannot be given to a step which updates it in place.
    return jax.device_put(array, place, may_alias=False)


def _piece(
    weights: Weights,
    config: ModelConfig,
    leaf: _Leaf,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part of one of our arrays that a device holds."""
    index = tuple(
        slice(*each.indices(size)[:2]) for each, size in zip(index, leaf.shape)
    )
    shape = tuple(each.stop - each.start for each in index)
    if leaf.source is None:
        return np.zeros(shape, np.float32)
    if not leaf.stacked:
        return _matrix(weights, config, leaf, leaf.source.name, index)
    piece = np.empty(shape, np.float32)
    for row, layer in enumerate(range(index[0].start, index[0].stop)):
        name = leaf.source.name.format(layer=layer)
        piece[row] = _matrix(weights, config, leaf, name, index[1:])
    return piece


def _matrix(
    weights: Weights,
    config: ModelConfig,
    leaf: _Leaf,
    name: str,
    index: tuple[slice, ...],
) -> np.ndarray:
    # Linear layers are stored as (out, in).
    rows, *columns = reversed(index) if leaf.is_kernel else index
    part = None if leaf.source is None else leaf.source.part
    if part is None:
        matrix = weights.read(name, (rows, *columns))
    else:
        # Rows are ordered by head, then query, key, value, then dimension: whole heads are read and then trimmed.
        width = config.width
        first, last = rows.start // width, -(-rows.stop // width)
        fused = weights.read(
            name, (slice(3 * width * first, 3 * width * last), *columns)
        )
        by_head = fused.reshape(last - first, 3, width, *fused.shape[1:])
        matrix = by_head[:, part].reshape(-1, *fused.shape[1:])
        matrix = matrix[rows.start - first * width : rows.stop - first * width]
    return matrix.T if leaf.is_kernel else matrix


# Writing.


def _exported_config(
    config: ModelConfig,
    source: str | os.PathLike[str] | None,
    token_ids: Mapping[str, Json] | None,
    dtype: Dtype,
    *,
    head: str,
) -> dict[str, Json]:
    written = families.hf_config(config)
    original = {} if source is None else read_config(resolve(source))
    original |= token_ids or {}
    for key in _CARRIED:
        if key in original or key.endswith("_id"):
            # null, where it is not known: the family's default would be another model's.
            written[key] = original.get(key)
    names = dict(
        zip(
            ("CausalLM", "SequenceClassification"),
            families.FAMILIES[written["model_type"]].classes,
        )
    )
    written["architectures"] = [f"{names[head]}For{head}"]
    written["torch_dtype"] = dtype
    if head == "SequenceClassification":
        written |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return written


def _save(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    shapes: Params,
    written: dict[str, Json],
    tokenizer: str | os.PathLike[str] | None,
    dtype: Dtype,
    shard_bytes: int,
) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
    _check_params(params, shapes)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    old = sorted(directory.glob("*.safetensors"))
    if old:
        raise ValueError(
            f"{directory} already holds {old[0].name}; remove it or export to another directory"
        )
    family = families.FAMILIES[written["model_type"]]
    leaves = zip(_leaves(family, shapes), jax.tree.leaves(params), strict=True)
    shards: list[dict[str, int]] = []
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        file = directory / f"model-{len(shards) + 1:05d}.safetensors"
        # The format is what tells transformers that these are not TensorFlow's.
        safetensors.numpy.save_file(pending, file, metadata={"format": "pt"})
        shards.append({name: array.nbytes for name, array in pending.items()})
        pending.clear()

    for name, array in _tensors(config, leaves):
        # safetensors writes the wrong bytes, silently, for an array that is not contiguous.
        array = np.ascontiguousarray(array.astype(jnp.dtype(dtype)))
        held = sum(each.nbytes for each in pending.values())
        if pending and held + array.nbytes > shard_bytes:
            flush()
        pending[name] = array
    flush()
    _name_shards(directory, shards)
    (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    if tokenizer is not None:
        _copy_files(resolve(tokenizer), directory, TOKENIZER_FILES)


def _check_params(params: Params, shapes: Params) -> None:
    def listed(tree: Params) -> dict[str, tuple[int, ...]]:
        return {
            jax.tree_util.keystr(keys, simple=True, separator="/"): np.shape(leaf)
            for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }

    want, got = listed(shapes), listed(params)
    wrong = [path for path in {**want, **got} if want.get(path) != got.get(path)]
    if wrong:
        hint = "; merge adapters first, with lora.merge" * ("lora" in wrong[0])
        raise ValueError(
            f"the parameters are not those of the config: {wrong[0]} has shape {got.get(wrong[0])}, not "
            f"{want.get(wrong[0])}{hint}"
        )
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                "the parameters are spread over several processes; gather them, or restore the checkpoint in one "
                "process, to export"
            )


def _tensors(config: ModelConfig, leaves) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of transformers, float32, one of our arrays on the host at a time (three where they are fused)."""
    fused: dict[str, dict[int, np.ndarray]] = {}
    for leaf, array in leaves:
        if leaf.source is None:
            continue
        host = np.asarray(array, np.float32)
        host = host if leaf.stacked else host[None]
        host = host.swapaxes(1, 2) if leaf.is_kernel else host
        if leaf.source.part is not None:
            parts = fused.setdefault(leaf.source.name, {})
            parts[leaf.source.part] = host.reshape(
                host.shape[0], -1, config.width, *host.shape[2:]
            )
            if len(parts) < 3:
                continue
            stacked = np.stack([parts[part] for part in range(3)], axis=2)
            host = stacked.reshape(host.shape[0], -1, *host.shape[2:])
            del fused[leaf.source.name]
        for layer in range(host.shape[0]):
            yield leaf.source.name.format(layer=layer), host[layer]


def _name_shards(directory: Path, shards: list[dict[str, int]]) -> None:
    if len(shards) == 1:
        (directory / "model-00001.safetensors").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, sizes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"model-{number:05d}.safetensors").rename(directory / name)
        weight_map |= dict.fromkeys(sizes, name)
    total = sum(sum(sizes.values()) for sizes in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    file = directory / "model.safetensors.index.json"
    file.write_text(json.dumps(index, indent=2) + "\n")


def _copy_files(source: Path, directory: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _text_of(pad_id: int, places: list[Path]) -> str | None:
    """The token of an id by the first of some directories that has a tokenizer; None where none has one."""
    files = [place / "tokenizer.json" for place in places]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        return None
    tokenizer = json.loads(file.read_text("utf-8"))
    tokens = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    tokens |= {each["id"]: each["content"] for each in tokenizer["added_tokens"]}
    if pad_id not in tokens:
        raise ValueError(
            f"pad_id is {pad_id}, which is no token of {file}, so no text could be padded with it; take the id of a token "
            "that ends no completion, or add one there"
        )
    return tokens[pad_id]


def _set_padding_token(directory: Path, token: str) -> None:
    """Makes the tokenizer pad with what the classifier skips; with another token it would be scored as text."""
    # The older of the two comes first in transformers, where the newer does not list the added tokens.
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).exists():
            _update_json(directory / name, {"pad_token": token})


def _update_json(file: Path, changes: Mapping[str, Json]) -> None:
    """Sets keys of a JSON file, which is made where there is none."""
    held = json.loads(file.read_text("utf-8")) if file.exists() else {}
    text = json.dumps({**held, **changes}, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", "utf-8")
