"""What a run made, as a directory of transformers; and weights from elsewhere as such a directory."""

import json
import pathlib

import numpy as np

from gvjax import config
from gvjax.data.tokenizer import Tokenizer
from gvjax.models import hf, weights
from gvjax.recipes import single


def export(
    run_dir: pathlib.Path | str,
    directory: pathlib.Path | str,
    *,
    dtype: hf.Dtype = "float32",
    pad_token: str | None = None,
) -> str:
    """Writes the policy of a finished run as a CausalLM, or its reward model as a ForSequenceClassification.

    Adapters were merged when the run ended. Tokenizer files are those of the checkpoint that the run began with, with
    the run's chat template where its config named one.

    Args:
      run_dir: of a finished run.
      directory: made if absent; must hold no weights.
      dtype: of the tensors.
      pad_token: of a reward model: text of a special token that ends no completion; None takes the tokenizer's padding
        token, or where that is an EOS the last special token that is none.

    Returns:
      A sentence for whoever asked.

    Raises:
      ConfigError: the run made nothing to export, or transformers has no model that computes the same.
    """
    done, directory = single.finished(run_dir), pathlib.Path(directory)
    checkpoint = done.ground.checkpoint
    section = done.settings.settings
    with config.refusing(f"{run_dir} cannot be exported"):
        if isinstance(section, config.RewardSection):
            said = _export_reward_model(done, directory, dtype, pad_token)
        elif pad_token is not None:
            raise ValueError(
                f"--pad-token is given, but recipe {section.recipe} made a policy; it is for reward models"
            )
        else:
            model, policy = done.ground.model, done.policy()
            hf.save_policy(directory, model, policy, source=checkpoint, dtype=dtype)
            said = f"policy of recipe {section.recipe} written to {directory}"
            _write_tokenizer(checkpoint, directory)
    _write_template(done.settings.task, directory)
    return said


def convert(source: str, directory: pathlib.Path | str) -> str:
    """Writes a .gguf file, or a model of the hub, as a directory of transformers with float32 weights.

    Raises:
      ConfigError: it cannot be read, or the directory holds weights already.
    """
    directory = pathlib.Path(directory)
    with config.refusing(f"{source} cannot be imported"):
        model, params = hf.load_policy(source)
        hf.save_policy(directory, model, params, source=source)
        _write_tokenizer(source, directory)
    return f"{source} written to {directory}"


def _export_reward_model(
    done: single.Finished,
    directory: pathlib.Path,
    dtype: hf.Dtype,
    pad_token: str | None,
) -> str:
    found, checkpoint = done.reward_model(), done.ground.checkpoint
    if checkpoint is None:
        raise ValueError(
            "its model did not start from a checkpoint, so there is no tokenizer to go with it"
        )
    # Written before the weights: which token pads is read from there.
    _write_tokenizer(checkpoint, directory, copy=True)
    pad_id = _padding(directory, pad_token)
    bias = float(np.asarray(found.params["head"]["bias"])[0])
    hf.save_reward_model(
        directory,
        done.ground.model,
        found.params,
        pooling=found.pooling,
        pad_id=pad_id,
        drop_bias=True,
        source=checkpoint,
        dtype=dtype,
    )
    moved = f"; its rewards are lower by the head's bias, {bias:g}" if bias else ""
    return f"reward model written to {directory}, padded with id {pad_id}{moved}"


def _padding(directory: pathlib.Path, pad_token: str | None) -> int:
    """The id that pads for a sequence classifier, which must be no EOS."""
    tokens = Tokenizer(directory)
    added = json.loads((directory / "tokenizer.json").read_text("utf-8"))[
        "added_tokens"
    ]
    ids = {each["content"]: each["id"] for each in added if each["special"]}
    if pad_token is not None:
        if pad_token not in ids:
            raise ValueError(
                f"--pad-token {pad_token!r} is no special token; there are: {', '.join(ids)}"
            )
        return ids[pad_token]
    if tokens.pad_id not in tokens.eos_ids:
        return tokens.pad_id
    free = [index for index in ids.values() if index not in tokens.eos_ids]
    if not free:
        raise ValueError(
            "all special tokens of the tokenizer end a completion, and none is left to pad with; add one to"
            " tokenizer.json within the model's vocabulary"
        )
    return max(free)


def _write_tokenizer(
    source: str | None, directory: pathlib.Path, *, copy: bool = False
) -> None:
    """The tokenizer of a .gguf file, which holds it in another form; of a directory only if `copy`."""
    if source is None:
        return
    path = hf.resolve(source)
    if path.suffix == ".gguf":
        weights.save_gguf_tokenizer(path, directory)
    elif copy:
        directory.mkdir(parents=True, exist_ok=True)
        hf.copy_tokenizer(path, directory)


def _write_template(task: config.AnyTask, directory: pathlib.Path) -> None:
    if not isinstance(task, config.DatasetSection) or task.template is None:
        return
    from gvjax.recipes import reading

    template = reading.encoding_of(task).template
    if template is not None:
        (directory / "chat_template.jinja").write_text(template.source, "utf-8")
