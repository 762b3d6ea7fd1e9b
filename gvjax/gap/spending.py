"""What a recipe spends, by arithmetic on its settings: tokens, floating-point operations, labels, calls of what rewards."""

from gvjax import config
from gvjax.gap.results import Ledger
from gvjax.models import cost
from gvjax.recipes.ground import Ground


def forward_flops(ground: Ground, tokens: int) -> float:
    """Operations of a forward pass over sequences of full length, `tokens` in all; every token's logits are taken."""
    length = ground.prompt_length + ground.completion_length
    return tokens / length * cost.forward_flops(ground.model, length)


def sampled(ground: Ground, completions: int, prompts: int) -> Ledger:
    """The ledger of drawing so many completions in all, of so many prompts."""
    tokens = completions * ground.completion_length
    passes = tokens + prompts * ground.prompt_length
    return Ledger(
        prompts=prompts, sampled_tokens=tokens, flops=forward_flops(ground, passes)
    )


def scored(ground: Ground, completions: int) -> Ledger:
    """The ledger of so many calls of a reward model."""
    length = ground.prompt_length + ground.completion_length
    return Ledger(
        reward_model_calls=completions,
        flops=forward_flops(ground, completions * length),
    )


def ranked(section: config.AugmentationSection, ground: Ground) -> Ledger:
    """The ledger of further samples that the reward model ranks, to be learned from offline."""
    completions = section.prompts * section.samples_per_prompt
    return sampled(ground, completions, section.prompts) + scored(ground, completions)


def spent(settings: config.Section, ground: Ground, pairs: int) -> Ledger:
    """The ledger of one run of a recipe; `seconds` is left to whoever holds the clock.

    Args:
      settings: a recipe's section.
      ground: the network and the lengths, every sequence counted at full length.
      pairs: labelled pairs that the recipe reads, or prompts where it answers each of them.
    """
    length = ground.prompt_length + ground.completion_length

    def training(
        sequences: int, *, reference: int = 0, labels: int = 0, **more
    ) -> Ledger:
        tokens = sequences * length
        flops = cost.TRAINING * forward_flops(ground, tokens) + forward_flops(
            ground, reference * length
        )
        return Ledger(labels=labels, trained_tokens=tokens, flops=flops, **more)

    def sampling(
        completions: int, prompts: int, rewards: config.RewardSources | None
    ) -> Ledger:
        drawn = sampled(ground, completions, prompts)
        if rewards is None:
            return drawn
        if rewards.reward_model > 0:
            drawn += scored(ground, completions)
        verifier = rewards.verifier
        by_gold = verifier is not None and verifier.path == "gold"
        return drawn + Ledger(gold_calls=completions if by_gold else 0)

    match settings:
        case config.SftSection():
            return training(settings.steps * settings.batch_size)
        case config.RewardSection():
            return training(2 * settings.steps * settings.batch_size, labels=pairs)
        case config.DpoSection():
            # The reference's log-probabilities came with the pairs.
            return training(2 * settings.steps * settings.batch_size, labels=pairs)
        case config.HypoSection():
            fresh = settings.steps * settings.on_policy_prompts
            learned = training(
                2 * settings.steps * settings.batch_size + fresh,
                reference=fresh,
                labels=pairs,
            )
            return learned + sampling(fresh, fresh, None)
        case config.RejectionSection():
            drawn = settings.n * pairs
            return training(settings.steps * settings.batch_size) + sampling(
                drawn, pairs, settings.rewards
            )
        case config.BestOfNSection():
            # Paid at every answer, not in training: counted for one answer to each training prompt.
            return sampling(settings.n * pairs, pairs, settings.rewards)
        case config.RebelSection():
            samples, learned_from = 2, 2
        case config.OnlineDpoSection():
            samples = settings.samples_per_prompt
            learned_from = 2 if settings.labels == "hard" else samples
        case config.PolicyGradientSection() | config.PpoSection():
            samples = learned_from = settings.samples_per_prompt
        case _:
            raise TypeError(f"no rule for what {type(settings).__name__} spends")
    prompts = settings.steps * settings.prompts_per_step
    critic = 2 if isinstance(settings, config.PpoSection) else 1
    return training(
        critic * prompts * learned_from * settings.epochs,
        reference=prompts * learned_from,
    ) + sampling(prompts * samples, prompts, settings.rewards)
