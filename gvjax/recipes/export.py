"""What a run made, as a directory of transformers; and weights from elsewhere as such a directory."""

import contextlib
import json
import pathlib

import numpy as np

from gvjax import config
from gvjax.data.tokenizer import Tokenizer
from gvjax.models import hf
from gvjax.recipes import single


def export(
    run_dir: pathlib.Path | str,
    directory: pathlib.Path | str,
    *,
    dtype: hf.Dtype = "float32",
    pad_token: str | None = None,
) -> str:
    """Writes the policy of a finished run as a CausalLM, or its reward model as a ForSequenceClassification.

    Adapters were merged when the run ended. Tokenizer files are those that the run read, with its chat template where its
    config named one; all ids at which its completions end are in config.json and generation_config.json.

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
    section, task = done.settings.settings, done.settings.task
    named = task.tokenizer if isinstance(task, config.DatasetSection) else None
    named = named or done.ground.checkpoint
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.refusing(f"{run_dir} cannot be exported"))
        tokenizer = None
        if named is not None:
            tokenizer = stack.enter_context(hf.tokenizer_files(named))
        if isinstance(section, config.RewardSection):
            said = _export_reward_model(done, directory, tokenizer, dtype, pad_token)
        elif pad_token is not None:
            raise ValueError(
                f"--pad-token is given, but recipe {section.recipe} made a policy; it is for reward models"
            )
        else:
            hf.save_policy(
                directory,
                done.ground.model,
                done.policy(),
                source=done.ground.checkpoint,
                tokenizer=tokenizer,
                token_ids=_token_ids(done, tokenizer),
                dtype=dtype,
            )
            said = f"policy of recipe {section.recipe} written to {directory}"
    _write_template(done.settings.task, directory)
    return said


def convert(source: str, directory: pathlib.Path | str) -> str:
    """Writes a .gguf file, or a model of the hub, as a directory of transformers with float32 weights.

    Raises:
      ConfigError: it cannot be read, or the directory holds weights already.
    """
    directory = pathlib.Path(directory)
    with (
        config.refusing(f"{source} cannot be imported"),
        hf.tokenizer_files(source) as tokenizer,
    ):
        model, params = hf.load_policy(source)
        hf.save_policy(directory, model, params, source=source, tokenizer=tokenizer)
    return f"{source} written to {directory}"


def _export_reward_model(
    done: single.Finished,
    directory: pathlib.Path,
    tokenizer: pathlib.Path | None,
    dtype: hf.Dtype,
    pad_token: str | None,
) -> str:
    found = done.reward_model()
    if tokenizer is None:
        raise ValueError(
            "its task has no tokenizer, and its model no checkpoint to take one from"
        )
    pad_id = _padding(tokenizer, pad_token)
    bias = float(np.asarray(found.params["head"]["bias"])[0])
    hf.save_reward_model(
        directory,
        done.ground.model,
        found.params,
        pooling=found.pooling,
        pad_id=pad_id,
        drop_bias=True,
        source=done.ground.checkpoint,
        tokenizer=tokenizer,
        token_ids=_token_ids(done, tokenizer),
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


def _token_ids(
    done: single.Finished, tokenizer: pathlib.Path | None
) -> dict[str, hf.Json]:
    """What a dataset's tokenizer says of ids; of a checkpoint's own only the EOS, which may stand in any of its files."""
    task = done.settings.task
    if tokenizer is None or not isinstance(task, config.DatasetSection):
        return {}
    tokens = Tokenizer(tokenizer)
    ends = sorted(tokens.eos_ids)
    ids: dict[str, hf.Json] = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    if task.tokenizer != done.ground.checkpoint:
        # An EOS that pads is no padding id: transformers would not train its embedding.
        pads = tokens.pad_id not in tokens.eos_ids
        ids["bos_token_id"] = tokens.bos_id
        ids["pad_token_id"] = tokens.pad_id if pads else None
    return ids


def _write_template(task: config.AnyTask, directory: pathlib.Path) -> None:
    if not isinstance(task, config.DatasetSection) or task.template is None:
        return
    from gvjax.recipes import reading

    template = reading.encoding_of(task).template
    if template is not None:
        (directory / "chat_template.jinja").write_text(template.source, "utf-8")
