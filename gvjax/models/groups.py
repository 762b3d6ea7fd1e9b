"""Completions that share their prompt, with the prompt run once: a pair, or the samples of a group.

A row holds a prompt and all its completions, `[P + k · (C − 1)]` tokens; each completion sees the prompt and itself. Next
to the plain layout, where every completion carries its prompt along, a pair of 512 + 128 tokens costs 1.6 times fewer
products, and so do the logits, which are made for completions only.
"""

import chex
import jax.numpy as jnp
from jax.sharding import Mesh

from gvjax.models import platforms, transformer
from gvjax.models.attention import (
    causal_attention,
    group_attention,
    selected_attention,
)
from gvjax.models.config import ModelConfig
from gvjax.models.layers import at
from gvjax.types import GroupLogpsFn


def group_logps_fn(
    config: ModelConfig,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> GroupLogpsFn:
    """A GroupLogpsFn with the numbers of `transformer.token_logps_fn`.

    Args:
      config: ModelConfig, of a model whose layers see everything.
      chunk_size, mesh, platform: as for `transformer.token_logps_fn`.

    Raises:
      ValueError: the model has a sliding window, whose edge would lie elsewhere in every row.
    """
    if config.sliding_window is not None:
        raise ValueError(
            f"sliding_window is {config.sliding_window}; prompts can be shared only in models whose layers see"
            " everything, so use token_logps_fn"
        )
    platform = platforms.name_of(mesh, platform)

    def logps_fn(params, prompts, prompt_lengths, completions):
        chex.assert_rank([prompts, prompt_lengths, completions], [2, 1, 3])
        number, width = prompts.shape
        _, group, length = completions.shape
        longest = width + length
        if config.learned_positions is not None and longest > config.learned_positions:
            raise ValueError(
                f"sequences of {longest} tokens exceed learned_positions {config.learned_positions}; raise it"
            )
        # A completion's last token predicts nothing.
        run = length - 1
        read = completions[:, :, :run].reshape(number, group * run)
        places = jnp.arange(width)[None]
        behind = prompt_lengths[:, None, None] + jnp.zeros((group, 1), jnp.int32)
        behind = (behind + jnp.arange(run)).reshape(number, group * run)
        known = places < prompt_lengths[:, None]

        def attend(layer: int, queries, keys, values):
            attention = config.attention(layer)
            asked = queries.shape[1] - group * run
            prompt_only = queries[:, :asked], keys[:, :width], values[:, :width]
            if asked == width:
                of_prompts = causal_attention(
                    *prompt_only, config=attention, platform=platform, mesh=mesh
                )
            else:
                of_prompts = selected_attention(
                    *prompt_only, config=attention, positions=last[:, None]
                )
            if run == 0:
                return of_prompts
            of_completions = group_attention(
                queries[:, asked:],
                keys,
                values,
                config=attention,
                prompt_mask=known,
                group_size=group,
            )
            return jnp.concatenate([of_prompts, of_completions], axis=1)

        # The first token of every completion is predicted by the last of the prompt; what else the prompt has to say, its
        # keys and values say.
        last = jnp.maximum(prompt_lengths - 1, 0)

        def kept(part):
            of_prompts = at(part[:, :width], last)
            return jnp.concatenate([of_prompts, part[:, width:]], axis=1)

        states = transformer.run_layers(
            config,
            params,
            jnp.concatenate([prompts, read], axis=1),
            jnp.concatenate([jnp.broadcast_to(places, prompts.shape), behind], axis=1),
            attend,
            kept=kept,
            mesh=mesh,
            platform=platform,
        )
        shape = (number, group, 1, config.embed_dim)
        states = jnp.concatenate(
            [
                jnp.broadcast_to(states[:, None, :1], shape),
                states[:, 1:].reshape(number, group, run, config.embed_dim),
            ],
            axis=2,
        ).reshape(number * group, length, -1)
        tokens = jnp.pad(completions.reshape(number * group, length), ((0, 0), (1, 0)))
        logps = transformer.logps_of_states(
            config, params, states, tokens, chunk_size, mesh=mesh
        )
        return logps[:, 1:].reshape(completions.shape)

    return logps_fn
