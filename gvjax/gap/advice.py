"""From intervals to advice: which road is likely to pay, never more strongly than the intervals allow.

Pure functions of numbers measured elsewhere. Every rule is a list of premises, each about one end of one interval or
about one estimate, so a wider interval can only lose a verdict: it never turns "inconclusive" into one, and never any
other verdict into "RL is likely to pay".
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from gvjax.gap.bounds import Bounds
from gvjax.gap.premises import (
    Premise,
    both,
    capital,
    either,
    estimate,
    estimate_at_most,
    high_end,
    low_end,
    shown,
)

Road = Literal[
    "RL is likely to pay",
    "DPO is enough",
    "fix the verifier first",
    "improve coverage first",
    "collect data",
    "inconclusive",
]
Basis = Literal["observed", "predicted"]

SCORER_SEEDS = 3
"""Seeds below which intervals of scorers are known to be erratic."""
RL_SEEDS = 5
"""The same for arms trained by RL, of which single seeds collapse."""


@dataclasses.dataclass(frozen=True)
class Margins:
    """What counts as much; declared before the run.

    Attributes:
      winrate: > 0, share of comparisons won; differences below it are too small to matter.
      nats: > 0, per pair; likelihoods closer than this are equal.
      low_efficiency: in (0, 1); a reward model that gets less than this of what an oracle gets out of the same
        samples is a poor one.
      nats_per_doubling: > 0; the verifier's advantage falls steeply if twice the data takes away more than this.
    """

    winrate: float = 0.03
    nats: float = 0.01
    low_efficiency: float = 0.25
    nats_per_doubling: float = 0.01

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"margin {name} is {value}; it must be positive")
        if self.low_efficiency >= 1:
            raise ValueError(
                f"low_efficiency is {self.low_efficiency}; it must be below 1, which is an oracle's"
            )


@dataclasses.dataclass(frozen=True)
class Tier1:
    """What is known without an RL run. Winrates are against one sample of the SFT policy, minus ½.

    Attributes:
      seeds: seeds behind every number here.
      advantage: nats per held-out pair, A(N) at all the data: NLL of the DPO policy's implicit reward − NLL of the
        reward model.
      headroom: winrate of the best of n samples by the reward model, at the n chosen on validation prompts.
      lead: the same minus that of the best of n by the DPO policy's implicit reward, paired.
      oracle: winrate of the best of n by the gold judge.
      efficiency: headroom / oracle.
      turn: winrate by the reward model at the largest n minus that at the n chosen; below 0 where more choosing makes
        it worse.
      slope: nats per pair and doubling of the data, of A(N) at all the data.
      data_multiplier_identified: whether both learning curves fall, and not to asymptotes that are shown to differ, so that
        more data may do what the reward model does; None where not fitted.
      peak_distance: nats per completion, mean log-probability under the SFT policy of the gold-best of M samples minus
        that of all.
      length_share: in [0, 1], share of the gold reward's variance that length explains.
      null_lead: headroom minus that of the best of n by the SFT policy's own log-probability, which learns from no label.
      cue_drop: accuracy on held-out pairs minus that on paraphrased or token-shifted ones: of the DPO policy's implicit reward
        minus of the reward model.
    """

    seeds: int
    advantage: Bounds | None = None
    headroom: Bounds | None = None
    lead: Bounds | None = None
    oracle: Bounds | None = None
    efficiency: Bounds | None = None
    turn: Bounds | None = None
    slope: Bounds | None = None
    data_multiplier_identified: bool | None = None
    peak_distance: Bounds | None = None
    length_share: Bounds | None = None
    null_lead: Bounds | None = None
    cue_drop: Bounds | None = None


@dataclasses.dataclass(frozen=True)
class Tier2:
    """What the pilot showed: the online arm minus the best offline one, chosen on validation prompts, in winrate.

    Attributes:
      seeds: of the RL arm.
      difference: D, as trained.
      matched_kl: D at equal KL to the SFT policy.
      unmatched: why there is no such number, or ''.
    """

    seeds: int
    difference: Bounds | None = None
    matched_kl: Bounds | None = None
    unmatched: str = ""


_Tier = TypeVar("_Tier", Tier1, Tier2)


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to do, and how sure that is.

    Attributes:
      verdict: one of six.
      basis: "observed" where an RL pilot was run and decides, or fails to; "predicted" where the verdict rests on
        scorers and samples alone.
      sentences: what the verdict rests on, in words.
      would_change: what would make it a different verdict.
      not_evidence_of: what the gap does not show, whatever the verdict.
    """

    verdict: Road
    basis: Basis
    sentences: tuple[str, ...]
    would_change: tuple[str, ...]
    not_evidence_of: tuple[str, ...]


def advise(
    tier1: Tier1 | None = None,
    tier2: Tier2 | None = None,
    *,
    margins: Margins | None = None,
    judge_warnings: Sequence[str] = (),
) -> Advice:
    """Applies the rules in this order; the first that holds is the verdict.

    With m a margin and lo, hi the ends of simultaneous 95% intervals:

    1. RL is likely to pay, observed: lo(D) > 0, D >= m, and both at matched KL too.
    2. DPO is enough, observed: hi(D) < m.
    3. RL is likely to pay, predicted, and only where no pilot was run: lo(A) > 0, lo(lead) > 0, lo(headroom) >= m; A >= its
       margin or lead >= m; and as estimates, oracle >= m, efficiency not low, turn > −m: a verifier that looks
       over-optimised backs no prediction.
    4. DPO is enough, predicted, and only where no pilot was run: A inside ± its margin and hi(lead) < m.
    5. Fix the verifier first: lo(oracle) >= m, and hi(efficiency) is low, or hi(turn) < 0 with turn <= −m.
    6. Improve coverage first: hi(oracle) < m.
    7. DPO is enough, predicted, and only where no pilot was run: hi(headroom) < m, nothing to extract.
    8. Collect data: hi(slope) < −m, and the data multiplier is not identified.
    9. Inconclusive.

    A tier of one seed has no intervals, whatever it was given. A pilot that decides nothing also silences the predictions of its
    own outcome (3, 4, 7): what was looked at and not seen is not to be predicted.

    Args:
      tier1: scorers and samples; None where not measured.
      tier2: the pilot; None where none was run.
      margins: the defaults unless given.
      judge_warnings: sentences on the judge, e.g. that it likes length more than its labels do; attached as they are.

    Returns:
      Advice.

    Raises:
      ValueError: neither tier is given, or a tier has no seeds.
    """
    if tier1 is None and tier2 is None:
        raise ValueError("nothing was measured; give tier1, tier2 or both")
    margins = margins or Margins()
    for name, tier in (("tier1", tier1), ("tier2", tier2)):
        if tier is not None and tier.seeds < 1:
            raise ValueError(f"{name} has {tier.seeds} seeds; at least one was trained")
    known1 = _known(tier1) if tier1 is not None else Tier1(1)
    known2 = _known(tier2) if tier2 is not None else Tier2(1)
    rules = _rules(known1, known2, margins, pilot=tier2 is not None)
    rule = next((rule for rule in rules if all(p.holds for p in rule.premises)), None)
    if rule is None:
        verdict: Road = "inconclusive"
        basis: Basis = "predicted" if tier2 is None else "observed"
        sentences = ["The intervals leave open which road pays.", *_in_the_way(rules)]
        would_change = _what_is_missing(
            # Without scorers, theirs is not a road to a verdict.
            [rule for rule in rules if tier1 is not None or rule.basis == "observed"]
        )
    else:
        verdict, basis = rule.verdict, rule.basis
        sentences = [_OPENINGS[verdict, basis]]
        sentences += [f"{capital(premise.text)}." for premise in rule.premises]
        would_change = list(_REVERSALS[verdict])
    sentences += _on_seeds(tier1, tier2)
    return Advice(
        verdict,
        basis,
        tuple(sentences),
        tuple(would_change),
        tuple(_not_evidence_of(known1, margins, judge_warnings)),
    )


@dataclasses.dataclass(frozen=True)
class _Rule:
    verdict: Road
    basis: Basis
    premises: tuple[Premise, ...]


_NAMES = {
    "advantage": "the reward model's lead in likelihood over the DPO policy",
    "headroom": "what the reward model gains by choosing among samples",
    "lead": "its lead over choosing by the DPO policy's own reward",
    "oracle": "what a perfect judge gains by choosing among the same samples",
    "efficiency": "the reward model's share of what a perfect judge gains",
    "turn": "what is left of the reward model's gain at the largest n",
    "slope": "the change of its lead in likelihood with twice the data",
    "difference": "the online policy's lead in winrate over the best offline one",
    "matched_kl": "the same lead at equal KL to the SFT policy",
}

_OPENINGS: dict[tuple[Road, Basis], str] = {
    (
        "RL is likely to pay",
        "observed",
    ): "RL paid in the pilot, and is likely to pay again on this task.",
    (
        "RL is likely to pay",
        "predicted",
    ): "RL is likely to pay: predicted from scorers and samples, not observed.",
    (
        "DPO is enough",
        "observed",
    ): "DPO is enough: the pilot excludes an advantage of RL that matters.",
    (
        "DPO is enough",
        "predicted",
    ): "DPO is likely to be enough: predicted from scorers and samples, not observed.",
    (
        "fix the verifier first",
        "predicted",
    ): "Fix the verifier first: better answers are among the samples, and this reward model would miss them or be gamed.",
    (
        "improve coverage first",
        "predicted",
    ): "Improve the SFT policy first: even a perfect judge finds hardly better answers among its samples.",
    (
        "collect data",
        "predicted",
    ): "Collect preference data first: the verifier's advantage is still changing fast with data.",
}

_REVERSALS: dict[Road, tuple[str, ...]] = {
    "RL is likely to pay": (
        "A better tuned offline arm, or twice its compute, that comes within the margin.",
        "More preference data: the reward model's advantage usually shrinks with it.",
        "Gold reward that falls as KL grows: stop before that, and the advantage may be gone.",
    ),
    "DPO is enough": (
        "A better reward model, if a perfect judge gains much among the same samples.",
        "Fewer labels or a longer horizon, where learning to verify is easier than learning to generate.",
        "A smaller margin: differences inside it are not excluded.",
    ),
    "fix the verifier first": (
        "A reward model that gets a larger share of the perfect judge's gain: more labels, a larger model, or a verifiable"
        " reward.",
        "A pilot with a tight KL limit that shows a gain all the same.",
    ),
    "improve coverage first": (
        "An SFT policy, a temperature or a prompt under which some samples are clearly better than others.",
        "More samples per prompt: a larger n may reach what this one does not.",
    ),
    "collect data": (
        "The same measurement with twice the data: the advantage may be gone, and the data multiplier known.",
        "Labels that cannot be had: then decide by a pilot of RL.",
    ),
}


def _rules(
    one: Tier1, two: Tier2, margins: Margins, *, pilot: bool
) -> tuple[_Rule, ...]:
    m, nats = margins.winrate, margins.nats
    names = dict(_NAMES)
    if two.matched_kl is None and two.unmatched:
        names["matched_kl"] += f" ({two.unmatched})"

    def low(name: str, bounds: Bounds | None, least: float, *, strictly=False):
        return low_end(names[name], bounds, least, strictly)

    def high(name: str, bounds: Bounds | None, most: float):
        return high_end(names[name], bounds, most)

    def point(name: str, bounds: Bounds | None, least: float, *, strictly=False):
        return estimate(names[name], bounds, least, strictly)

    observed = (
        _Rule(
            "RL is likely to pay",
            "observed",
            (
                low("difference", two.difference, 0.0, strictly=True),
                point("difference", two.difference, m),
                low("matched_kl", two.matched_kl, 0.0, strictly=True),
                point("matched_kl", two.matched_kl, m),
            ),
        ),
        _Rule("DPO is enough", "observed", (high("difference", two.difference, m),)),
    )
    outcome = (
        _Rule(
            "RL is likely to pay",
            "predicted",
            (
                low("advantage", one.advantage, 0.0, strictly=True),
                low("headroom", one.headroom, m),
                low("lead", one.lead, 0.0, strictly=True),
                either(
                    point("advantage", one.advantage, nats), point("lead", one.lead, m)
                ),
                point("oracle", one.oracle, m),
                point("efficiency", one.efficiency, margins.low_efficiency),
                point("turn", one.turn, -m, strictly=True),
            ),
        ),
        _Rule(
            "DPO is enough",
            "predicted",
            (
                low("advantage", one.advantage, -nats, strictly=True),
                high("advantage", one.advantage, nats),
                high("lead", one.lead, m),
            ),
        ),
    )
    turned_down = both(
        high("turn", one.turn, 0.0), estimate_at_most(_NAMES["turn"], one.turn, -m)
    )
    diagnoses = (
        _Rule(
            "fix the verifier first",
            "predicted",
            (
                low("oracle", one.oracle, m),
                either(
                    high("efficiency", one.efficiency, margins.low_efficiency),
                    turned_down,
                ),
            ),
        ),
        _Rule("improve coverage first", "predicted", (high("oracle", one.oracle, m),)),
    )
    nothing_to_extract = _Rule(
        "DPO is enough", "predicted", (high("headroom", one.headroom, m),)
    )
    collect = _Rule(
        "collect data",
        "predicted",
        (
            high("slope", one.slope, -margins.nats_per_doubling),
            Premise(
                "how many more labels would replace the reward model is not identified",
                one.data_multiplier_identified is False,
            ),
        ),
    )
    if pilot:
        return (*observed, *diagnoses, collect)
    return (*outcome, *diagnoses, nothing_to_extract, collect)


def _in_the_way(rules: Sequence[_Rule]) -> list[str]:
    """What was seen of either road's case, and what each lacks."""
    lines = []
    for rule in rules[:2]:
        met: dict[str, str] = {}
        unmet: dict[str, str] = {}
        for premise in rule.premises:
            # The first condition on a number has its interval; once is enough.
            said = met if premise.holds else unmet
            text = premise.text if premise.holds else premise.shortfall
            if text:
                said.setdefault(premise.name or text, text)
        for side, said in (("For", met), ("Against", unmet)):
            if said:
                lines.append(f"{side} “{rule.verdict}”: {'; '.join(said.values())}.")
    return lines


def _what_is_missing(rules: Sequence[_Rule]) -> list[str]:
    """For each verdict that more data could still give: what is in its way."""
    lines = []
    for rule in rules:
        failed = [premise for premise in rule.premises if not premise.holds]
        if all(premise.missing for premise in failed):
            needed = dict.fromkeys(premise.missing for premise in failed)
            lines.append(f"For “{rule.verdict}” ({rule.basis}): {'; '.join(needed)}.")
    if not lines:
        lines.append(
            "Not narrower intervals: the estimates themselves lie between the rules. Another reward model, another task or"
            " another margin, declared before the next run, would."
        )
    return lines


def _on_seeds(tier1: Tier1 | None, tier2: Tier2 | None) -> list[str]:
    lines = []
    for what, tier, enough in (
        ("Scorers were", tier1, SCORER_SEEDS),
        ("The RL arm was", tier2, RL_SEEDS),
    ):
        if tier is None or tier.seeds >= enough:
            continue
        if tier.seeds == 1:
            lines.append(
                f"{what} trained with one seed: seed variance unknown, so nothing is concluded from it."
            )
        else:
            lines.append(
                f"{what} trained with {tier.seeds} seeds; fewer than {enough} make for erratic intervals."
            )
    return lines


def _not_evidence_of(
    one: Tier1, margins: Margins, judge_warnings: Sequence[str]
) -> list[str]:
    lines = [
        "A lead in likelihood is neither necessary nor sufficient for RL to pay: accuracy does not predict winrates (Tang et"
        " al., 2024), either road may win when its model class misses the truth (Shi et al., 2025), and an implicit"
        " reward can verify what its policy cannot generate (Razin et al., 2025)."
    ]
    cues = "A lead of the reward model is not evidence that verifying is easier: an implicit reward leans on the tokens themselves"
    if one.cue_drop is None:
        lines.append(
            f"{cues}, and whether it does here was not probed with paraphrased pairs."
        )
    elif one.cue_drop.low is not None and one.cue_drop.low > 0:
        lines.append(
            f"{cues}, and here it loses {shown(one.cue_drop)} more accuracy than the reward model when pairs are paraphrased."
        )
    else:
        lines.append(
            f"{cues}. Here that is not seen: on paraphrased pairs it loses {shown(one.cue_drop)} more accuracy than the reward"
            " model."
        )
    length = (
        "A gain in gold reward is not evidence of better answers where length buys it"
    )
    if one.length_share is None:
        lines.append(f"{length}; the share that length explains was not measured.")
    elif one.length_share.point == 0:
        lines.append(f"{length}: here it explains nothing of the reward's variance.")
    else:
        lines.append(
            f"{length}: length explains {shown(one.length_share)} of its variance here."
        )
    peak = (
        "An advantage of RL is not evidence of easy verification where good answers are merely rare under the SFT policy,"
        " which favours learning from one's own samples by itself"
    )
    if one.peak_distance is None:
        lines.append(f"{peak}; how rare was not measured.")
    else:
        lines.append(
            f"{peak}: the best samples differ from all by {shown(one.peak_distance)} nats here."
        )
    null = (
        "A gain by choosing with the reward model is not evidence of what it learned from labels where the policy's own"
        " log-probability, which learned from none, chooses as well"
    )
    if one.null_lead is None:
        lines.append(f"{null}; that was not measured.")
    else:
        lines.append(
            f"{null}: the reward model's lead over it in winrate is {shown(one.null_lead)} here."
        )
    lines.append("All of it is as good as the gold judge, and says nothing beyond it.")
    return [*lines, *judge_warnings]


def _known(tier: _Tier) -> _Tier:
    """The tier, without intervals where one seed cannot give them."""
    if tier.seeds > 1:
        return tier
    bare: dict[str, Any] = {
        field.name: Bounds(value.point)
        for field in dataclasses.fields(tier)
        if isinstance(value := getattr(tier, field.name), Bounds)
    }
    return dataclasses.replace(tier, **bare)
