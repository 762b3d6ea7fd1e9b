"""How much of a reference a text has: ROUGE-L, through the package rouge-score."""

import functools
import importlib


@functools.cache
def _scorer():
    """Its scorer, made once.

    Raises:
      ValueError: the package is not installed.
    """
    try:
        rouge = importlib.import_module("rouge_score.rouge_scorer")
    except ModuleNotFoundError:
        raise ValueError(
            "rouge_l is measured by the package rouge-score: pip install 'gvjax[rouge]'"
        ) from None
    return rouge.RougeScorer(["rougeL"], use_stemmer=False)


def check() -> None:
    """Refuses what `rouge_l` would fail on.

    Raises:
      ValueError: rouge-score is not installed.
    """
    _scorer()


def rouge_l(completion: str, reference: str) -> float:
    """float in [0, 1]: F1 of the longest common subsequence of words, lower case, not stemmed.

    References:
      Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.
    """
    return _scorer().score(reference, completion)["rougeL"].fmeasure
